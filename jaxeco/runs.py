"""Runs as their folders tell of them: found, read, and put together by what they have in common.

A folder holds a run if it has a run.json. Many runs that were started as one (`--seeds`, `--grid`)
lie in one folder, each in a folder of its own. Nothing here runs an experiment's code.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxeco.description import differing, flatten
from jaxeco.errors import UserError
from jaxeco.folder import RECORD, read_result
from jaxeco.log import FILE, PACE, read_metrics

DEEPEST = 3  # folders below the one that is asked for
READABLE = 6  # values in a label

# As result.json says it; "unfinished": killed, or still on its way.
Ended = Literal["complete", "stalled", "stopped", "diverged", "interrupted", "unfinished"]


@dataclass(frozen=True)
class Run:
    """One run's folder, read.

    Attributes:
      record: run.json, as `folder.record` writes it.
      metrics: the lines of metrics.jsonl, as `log.read_metrics` gives them.
      result: result.json; None before the run's first session has ended.
    """

    folder: Path
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        return self.record["resolved"]["name"]

    @property
    def seed(self) -> int:
        return self.record["resolved"]["seed"]

    @property
    def session(self) -> Mapping[str, Any]:
        """What the latest session recorded: command, versions, code, devices, data, ..."""
        return self.record["sessions"][-1]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved experiment by dotted path, without its name and its seed."""
        flat = flatten(self.record["resolved"])
        return {path: value for path, value in flat.items() if path not in ("name", "seed")}

    @property
    def words(self) -> tuple[str, ...]:
        """What was written on the command line, without the seed."""
        return tuple(w for w in self.record["assignments"] if not w.startswith("seed="))

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps i64[N] and values f64[N] of "split/metric", in order; N = 0 if it was not measured.

        Lists and matrices are no curve.
        """
        split, _, name = metric.rpartition("/")
        found = {
            line["step"]: line[name]
            for line in self.metrics
            if line["split"] == split and name in line and np.ndim(line[name]) == 0
        }
        steps = sorted(found)
        return np.array(steps, np.int64), np.array([found[s] for s in steps], np.float64)

    def last(self, metric: str) -> float | None:
        """The latest value of "split/metric"; None if it was not measured."""
        _, values = self.curve(metric)
        return float(values[-1]) if len(values) else None

    @property
    def step(self) -> int:
        """Steps it has taken, as far as it has told."""
        return max((line["step"] for line in self.metrics), default=0)

    @cached_property
    def scores(self) -> dict[str, float]:
        """The latest evaluation of each split, by "split/metric": what is one number."""
        latest = {line["split"]: line for line in self.metrics if line["split"] != "train"}
        return {
            f"{split}/{name}": float(value)
            for split, line in latest.items()
            for name, value in line.items()
            if isinstance(value, int | float) and not PACE.fullmatch(name)
        }

    def best(self, metric: str) -> float | None:
        """The value of "split/metric" at the run's best step; None if it has none."""
        best = self.result["best"] if self.result and "best" in self.result else {}
        return best[metric] if metric in best else None

    @cached_property
    def ended(self) -> Ended:
        """How the run came to where it is."""
        result = self.result
        if result and result["step"] < self.step:  # it has gone on since
            result = None
        if result and "ended" in result:
            return result["ended"]
        # of before that was recorded
        if result and result["step"] >= result["of"]:
            return "complete"
        if (self.folder / "diverged").is_dir():
            return "diverged"
        if result is None:
            return "unfinished"
        return "stalled" if self._stalled() else "interrupted"

    def _stalled(self) -> bool:
        """Whether the experiment's patience was at its end."""
        resolved = self.record["resolved"]
        patience, best = resolved["patience"], resolved["best"]
        if patience is None or best is None:
            return False
        _, values = self.curve(best)
        scores = np.nan_to_num(-values if self.lower_is_better(best) else values, nan=-np.inf)
        return len(scores) > 0 and len(scores) - 1 - int(np.argmax(scores)) >= patience

    def lower_is_better(self, metric: str) -> bool:
        """Whether less of "split/metric" is better; by its name, of runs that did not record it."""
        name = metric.rpartition("/")[2]
        if "lower_is_better" in self.session:
            return name in self.session["lower_is_better"]
        return name in ("loss", "perplexity", "bits_per_byte")


def read(folder: Path) -> Run:
    """The run in `folder`.

    Raises:
      UserError: there is none, or its record is damaged.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        record["resolved"]["name"], record["resolved"]["seed"], record["sessions"][-1]
    except FileNotFoundError:
        raise UserError(f"{folder} is not the folder of a run: it has no {RECORD}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / RECORD} cannot be read: {error}") from error
    metrics = read_metrics(folder) if (folder / FILE).exists() else []
    return Run(folder, record, metrics, read_result(folder))


def find(path: Path) -> list[Run]:
    """The run in `path`, or those in the folders below it, sorted by folder.

    Raises:
      UserError: there are none, or one is damaged.
    """
    if not path.is_dir():
        raise UserError(f"no such folder: {path}; expected that of a run, or one that holds runs")
    depths = range(DEEPEST + 1)
    folders = {file.parent for depth in depths for file in path.glob("*/" * depth + RECORD)}
    if folders:
        return [read(folder) for folder in sorted(folders, key=_by_numbers)]
    raise UserError(f"{path} holds no run: no {RECORD} in it, nor in the folders below it")


def by_setting(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, together, by a label; each ordered by seed.

    A label is the experiment's name and what tells its setting from that experiment's others: the
    words that were written, where these tell all apart, else a few dotted paths with values, else
    the first run's folder.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault((run.name, json.dumps(run.settings, sort_keys=True)), []).append(run)
    labels: dict[tuple[str, str], str] = {}
    for name in dict.fromkeys(name for name, _ in groups):
        keys = [key for key in groups if key[0] == name]
        labels |= zip(keys, _labels([groups[key][0] for key in keys]), strict=True)
    return {labels[key]: group for key, group in groups.items()}


def _by_numbers(path: Path) -> list[str | int]:
    """A key that sorts seed=2 before seed=10."""
    words = re.split(r"(\d+)", str(path))
    return [int(word) if i % 2 else word for i, word in enumerate(words)]


def _labels(runs: Sequence[Run]) -> list[str]:
    """Of runs of one experiment, each of another setting."""
    written = [dict(_split(word) for word in run.words) for run in runs]
    for settings in (written, [run.settings for run in runs]):
        paths = differing(settings)
        labels = [
            " ".join([run.name, *(f"{path}={one[path]}" for path in paths if path in one)])
            for run, one in zip(runs, settings, strict=True)
        ]
        if len(paths) <= READABLE and len(set(labels)) == len(runs):
            return labels
    return [f"{run.name} {run.folder}" for run in runs]


def _split(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key, value
