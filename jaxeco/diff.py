"""What differs between two runs, or two populations: python -m jaxeco.diff A B [options]"""

import argparse
import difflib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxeco import command, runs
from jaxeco.description import differing, flatten
from jaxeco.experiment import IDENTITY
from jaxeco.log import PACE
from jaxeco.runs import Run

RTOL = 1e-5
TRAIN = "train"  # the split whose lines are means over the steps since the line before
WIDEST = 60  # letters of a value that are shown
NAMED = 4  # fields in a verdict
# sections of what a folder tells; what differs in the first two is another experiment
FIELDS, DATA, FREE = "fields that change the result", "data", "other fields"
SOURCE, WORDS = "source", "words"


# What a folder tells beside metrics


def facts(run: Run) -> dict[str, dict[str, Any]]:
    """By section, by name; None is as good as absent.

    So that a record and one from before some field was there have the same fields.
    """
    fields = {k: v for k, v in flatten(run.record["resolved"]).items() if v is not None}
    determining = {path for path in fields if path.split(".")[0] in IDENTITY}
    return {
        SOURCE: sources(run),
        WORDS: assigned(run),
        FIELDS: {path: value for path, value in fields.items() if path in determining},
        FREE: {path: value for path, value in fields.items() if path not in determining},
        **surroundings(run.session),
        "sessions": {"from the steps": [s["first_step"] for s in run.record["sessions"]]},
    }


def surroundings(session: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a session ran on and with, by section, by name."""
    machine = ("hosts", "devices", "platform", "xla_flags")
    return {
        DATA: flatten(session["data"]),
        "versions": {"python": session["python"], **session["versions"]},
        "code": dict(session["code"]),
        "git": {"commit": session["git"]},
        "machine": {name: session[name] for name in machine if name in session},
    }


def sources(run: Run) -> dict[str, str]:
    """The latest session's copy of the experiment file and of the modules beside it."""
    numbers = range(len(run.record["sessions"]), 1, -1)
    copies = [run.folder / f"session-{n}" for n in numbers]  # only of those that found it changed
    latest = next((copy for copy in copies if (copy / "experiment.py").exists()), run.folder)
    return {path.name: path.read_text() for path in sorted(latest.glob("*.py"))}


def assigned(run: Run) -> dict[str, str]:
    return {key: text for key, _, text in (w.partition("=") for w in run.record["assignments"])}


# Metrics


@dataclass(frozen=True)
class Parting:
    """The first line in which a metric is not the same in two runs.

    Attributes:
      after: the step of the line before it, or 0.
      a, b: the two values; of a list or matrix, those of `entry`, such as "[2, 3]", or the shapes.
      before: how many lines before it were the same.
    """

    step: int
    after: int
    a: float | str
    b: float | str
    entry: str
    before: int

    def __str__(self) -> str:
        return " ".join([f"step {self.step:,}:", *[self.entry] * bool(self.entry), self.values])

    @property
    def values(self) -> str:
        """Both, with as many digits as show that they differ."""
        shown = [(f"{self.a}", f"{self.b}")]
        if not isinstance(self.a, str):
            shown = [(f"{self.a:.{n}g}", f"{self.b:.{n}g}") for n in range(4, 18)]
        return " and ".join(next((pair for pair in shown if pair[0] != pair[1]), shown[-1]))


@dataclass(frozen=True)
class Curve:
    """A metric, "split/name", where both runs have lines of the same steps.

    Attributes:
      lines: how many.
      exact: the first that is not the same to the bit.
      beyond: the first that differs by more than the tolerance.
    """

    metric: str
    lines: int
    exact: Parting | None
    beyond: Parting | None

    def said(self, rtol: float) -> str:
        """What there is to say of it, in a line."""
        lines = _count(self.lines, "line")
        if self.exact is None:
            return f"the same to the bit ({lines})"
        before = f"equal to the bit before, {_count(self.exact.before, 'line')}"
        before = f"({before})" if self.exact.before else "(the first line)"
        if self.beyond is None:
            return f"the same within {rtol:g} ({lines}); bits part at {self.exact} {before}"
        if self.beyond == self.exact:
            return f"parts at {self.beyond} {before}"
        return f"parts at {self.beyond}; bits part at {self.exact} {before}"


def compared(a: Run, b: Run, rtol: float) -> list[Curve]:
    """Every metric that both runs have in lines of the same steps."""
    found = []
    for split in splits(a):
        theirs = by_stretch(b, split)
        pairs = [(x, theirs[at]) for at, x in by_stretch(a, split).items() if at in theirs]
        for name in names(x for x, _ in pairs):
            both = [(x["step"], x[name], y[name]) for x, y in pairs if name in x and name in y]
            if both:
                exact, beyond = parting(both, 0.0), parting(both, rtol)
                found.append(Curve(f"{split}/{name}", len(both), exact, beyond))
    return found


def parting(values: Iterable[tuple[int, Any, Any]], rtol: float) -> Parting | None:
    """Where the two values of a step, in order, first differ by more than rtol of the larger."""
    after = 0
    for before, (step, x, y) in enumerate(values):
        if np.shape(x) != np.shape(y):
            a, b = (f"numbers of shape {np.shape(value)}" for value in (x, y))
            return Parting(step, after, a, b, "", before)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if len(apart := np.argwhere(~alike(x, y, rtol))):
            at = tuple(apart[0].tolist())
            return Parting(step, after, float(x[at]), float(y[at]), str([*at]) * bool(at), before)
        after = step
    return None


def alike(x: np.ndarray, y: np.ndarray, rtol: float) -> np.ndarray:
    """Where two arrays differ by no more than rtol of the larger; NaN is the same as NaN."""
    with np.errstate(invalid="ignore"):
        near = np.abs(x - y) <= rtol * np.maximum(np.abs(x), np.abs(y))
    return near | (x == y) | (np.isnan(x) & np.isnan(y))


def by_stretch(run: Run, split: str) -> dict[tuple[int, int], Mapping[str, Any]]:
    """The lines of a split by the steps they tell of: after the first number, up to the second.

    A line of training is a mean over the steps since the line before, and those of two runs with
    the same step are of other stretches where one run has logged, evaluated or saved more often.
    An evaluation is of one step.
    """
    lines = [line for line in run.metrics if line["split"] == split]
    steps = [line["step"] for line in lines]
    begun = [0, *steps] if split == TRAIN else steps
    return {(first, line["step"]): line for first, line in zip(begun, lines)}


def splits(run: Run) -> list[str]:
    return list(dict.fromkeys(line["split"] for line in run.metrics))


def names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """What lines have measured: results, no pace."""
    found = dict.fromkeys(name for line in lines for name in line)
    return [name for name in found if name != "split" and not PACE.fullmatch(name)]


def left_out(a: Run, b: Run) -> list[str]:
    """What of the metrics cannot be compared, and why."""
    said = []
    for split in (split for split in splits(a) if split in splits(b)):
        one, other = by_stretch(a, split), by_stretch(b, split)
        common = _count(sum(at in other for at in one), "line") + " in common"
        if one.keys() != other.keys():
            said.append(f"{split}: {common}: a has {_steps(one)}; b has {_steps(other)}")
            if split == TRAIN:
                said[-1] += "; a line is the mean of the steps since the line before"
    metrics = [
        {f"{split}/{n}": n for split in splits(run) for n in names(by_stretch(run, split).values())}
        for run in (a, b)
    ]
    for side, ours, theirs in (("a", *metrics), ("b", *reversed(metrics))):
        if alone := [metric for metric in ours if metric not in theirs]:
            said.append(f"only in {side}: {', '.join(alone)}")
    return said


# Two runs


@dataclass(frozen=True)
class Diff:
    """Two runs side by side."""

    a: Run
    b: Run
    rtol: float

    @cached_property
    def sections(self) -> dict[str, dict[str, tuple[Any, Any]]]:
        """What differs: by section, by name, as (a, b); None is absent."""
        a, b = facts(self.a), facts(self.b)
        return {
            name: {k: (_or_none(a[name], k), _or_none(b[name], k)) for k in differing(both)}
            for name, both in ((name, [a[name], b[name]]) for name in a)
        }

    @cached_property
    def curves(self) -> list[Curve]:
        return compared(self.a, self.b, self.rtol)

    @cached_property
    def reasons(self) -> list[str]:
        """Why the two are not the same; none where they are, up to the tolerance."""
        found = []
        if fields := self.sections[FIELDS]:
            more = f" and {len(fields) - NAMED} more" * (len(fields) > NAMED)
            found.append(f"fields ({', '.join([*fields][:NAMED])}{more})")
        prints = {k: pair for k, pair in self.sections[DATA].items() if k.endswith(".fingerprint")}
        if other := [k.partition(".")[0] for k, pair in prints.items() if None not in pair]:
            found.append(f"data ({', '.join(other)})")
        parted = [curve for curve in self.curves if curve.beyond and curve.beyond == self.parting]
        found += [f"{curve.metric} parts at {curve.beyond}" for curve in parted[:1]]
        if not self.curves:
            found.append("no metric could be compared")
        ends = {side: run.ended for side, run in (("a", self.a), ("b", self.b))}
        if list(ends.values()).count("diverged") == 1:
            found.append(", ".join(f"{side} {how}" for side, how in ends.items()))
        return found

    @property
    def parting(self) -> Parting | None:
        """The earliest beyond the tolerance; where there is none, the earliest in bits."""
        beyond = [curve.beyond for curve in self.curves if curve.beyond]
        exact = [curve.exact for curve in self.curves if curve.exact]
        return min(beyond or exact, key=lambda parting: parting.step, default=None)

    @property
    def verdict(self) -> str:
        if self.reasons:
            return f"they differ: {'; '.join(self.reasons)}"
        far = [_reached(run) for run in (self.a, self.b)]
        short = f", as far as both have come: step {min(far):,}" * (far[0] != far[1])
        if self.parting:
            bits = f"bits part at step {self.parting.step:,}"
            return f"they agree within {self.rtol:g}{short}; {bits}"
        return f"they agree to the bit{short}"

    @property
    def closer(self) -> list[str]:
        """Commands that take the step anew at which the two part."""
        at = self.parting
        return [f"python -m jaxeco.replay {r.folder} {at.step}" for r in (self.a, self.b) if at]

    def lines(self) -> list[str]:
        """For a person."""
        said = [f"a: {_headline(self.a)}", f"b: {_headline(self.b)}", ""]
        for name, pairs in self.sections.items():
            if not pairs:
                said.append(f"{name}: the same")
            else:
                said += [f"{name}:", *(self.unified() if name == SOURCE else _columns(pairs))]
        for side, run in (("a", self.a), ("b", self.b)):
            if changed := _changed(run):
                said.append(f"within {side}, sessions differ in: {', '.join(changed)}")
        widest = max((len(curve.metric) for curve in self.curves), default=0)
        said += ["", "metrics:" if self.curves else "metrics: none to compare"]
        said += [f"  {c.metric:<{widest}}  {c.said(self.rtol)}" for c in self.curves]
        said += [f"  {what}" for what in left_out(self.a, self.b)]
        said += ["", self.verdict]
        if self.parting:
            first, last = self.parting.after + 1, self.parting.step
            said.append(f"in one of the steps {first:,} to {last:,}; to take one anew:")
            said += [f"  {line}" for line in self.closer]
        return said

    def unified(self) -> list[str]:
        """The differences of the sources, as `diff -u` writes them."""
        said: list[str] = []
        for name, texts in self.sections[SOURCE].items():
            places = [f"{run.folder}/{name}" for run in (self.a, self.b)]
            old, new = (at if text is not None else "/dev/null" for at, text in zip(places, texts))
            a, b = ((text or "").splitlines() for text in texts)
            said += difflib.unified_diff(a, b, old, new, n=2, lineterm="")
        return said

    def json(self) -> dict[str, Any]:
        """The same as data."""
        return {
            "a": str(self.a.folder),
            "b": str(self.b.folder),
            "agree": not self.reasons,
            "why": self.reasons,
            "differences": {
                section: {name: {"a": a, "b": b} for name, (a, b) in pairs.items()}
                for section, pairs in self.sections.items()
            },
            "metrics": {curve.metric: asdict(curve) for curve in self.curves},
            "left_out": left_out(self.a, self.b),
            "closer": self.closer,
        }


def _headline(run: Run) -> str:
    of = f" of {run.result['of']:,}" if run.result else ""
    sessions = _count(len(run.record["sessions"]), "session")
    steps = f"{_reached(run):,}{of} steps in {sessions}"
    return f"{run.folder}  {run.name}, seed {run.seed}, {steps}, {run.ended}"


def _reached(run: Run) -> int:
    return max((line["step"] for line in run.metrics), default=0)


def _changed(run: Run) -> list[str]:
    """Names of what the sessions of a run do not have in common."""
    each = [surroundings(session) for session in run.record["sessions"]]
    return [name for section in each[0] for name in differing([found[section] for found in each])]


def _columns(pairs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    absent = [f"{name}." for name, pair in pairs.items() if None in pair]  # with all below it
    rows = [
        (name, _short(a), _short(b))
        for name, (a, b) in pairs.items()
        if not name.startswith(tuple(absent))
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [f"  {name:<{widths[0]}}  {a:<{widths[1]}}  {b}" for name, a, b in rows]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    text = "-" if value is None else text
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _steps(stretches: Iterable[tuple[int, int]]) -> str:
    steps = [f"{step:,}" for _, step in stretches]
    return ", ".join(steps if len(steps) < 6 else [*steps[:3], "...", steps[-1]])


def _or_none(values: Mapping[str, Any], name: str) -> Any:
    return values[name] if name in values else None


# Two populations


@dataclass(frozen=True)
class Populations:
    """Two of them, member by member.

    Attributes:
      pairs: by what tells a pair from the others.
      alone: members of a, and of b, without a counterpart.
    """

    pairs: Mapping[str, Diff]
    alone: tuple[Sequence[Run], Sequence[Run]]

    @classmethod
    def of(cls, a: Sequence[Run], b: Sequence[Run], rtol: float) -> "Populations":
        """Members of the same fields and seed are a pair.

        Where there are none, those of the same seed and words, of the words that differ within a
        population: so two are paired that differ in the same way throughout.
        """
        telling = [k for side in (a, b) for k in differing([assigned(run) for run in side])]
        telling = [name for name in dict.fromkeys(telling) if name != "seed"]
        ours, theirs = (_by(side, _fields) for side in (a, b))
        if not ours.keys() & theirs.keys():
            ours, theirs = (_by(side, lambda run: _label(run, telling)) for side in (a, b))
        pairs = {}
        for key in (key for key in ours if key in theirs):
            label = _label(ours[key], telling)
            label = str(ours[key].folder) if label in pairs else label
            pairs[label] = Diff(ours[key], theirs[key], rtol)
        alone = [
            [run for key, run in side.items() if key not in other]
            for side, other in ((ours, theirs), (theirs, ours))
        ]
        return cls(pairs, (alone[0], alone[1]))

    @property
    def reasons(self) -> list[str]:
        """Which pairs differ, and who has no counterpart."""
        found = [name for name, diff in self.pairs.items() if diff.reasons]
        return found + [str(run.folder) for side in self.alone for run in side]

    def lines(self) -> list[str]:
        """For a person: a line for each pair."""
        said = [f"{name}: {diff.verdict}" for name, diff in self.pairs.items()]
        for side, members in zip("ab", self.alone):
            said += [f"only in {side}: {run.folder}" for run in members]
        apart = [diff for diff in self.pairs.values() if diff.reasons or diff.parting]
        differ = sum(bool(diff.reasons) for diff in apart)
        alone = _count(sum(map(len, self.alone)), "run")
        said += [
            "",
            f"of {_count(len(self.pairs), 'pair')} {differ or 'none'} differ; {alone} alone",
        ]
        for diff in apart[:1]:
            said.append(f"more of a pair: python -m jaxeco.diff {diff.a.folder} {diff.b.folder}")
        return said

    def json(self) -> dict[str, Any]:
        a, b = ([str(run.folder) for run in side] for side in self.alone)
        pairs = {name: diff.json() for name, diff in self.pairs.items()}
        return {"agree": not self.reasons, "pairs": pairs, "only": {"a": a, "b": b}}


def _fields(run: Run) -> str:
    return json.dumps(facts(run)[FIELDS], sort_keys=True)


def _label(run: Run, telling: Iterable[str]) -> str:
    given = assigned(run)
    return " ".join([*(f"{k}={given[k]}" for k in telling if k in given), f"seed={run.seed}"])


def _by(members: Iterable[Run], key: Callable[[Run], str]) -> dict[tuple[str, int], Run]:
    """Runs by key, and by their number among those that have the same."""
    seen: Counter[str] = Counter()
    found = {}
    for run in members:
        name = key(run)
        found[name, seen[name]] = run
        seen[name] += 1
    return found


# The command


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m jaxeco.diff",
        description=__doc__,
        epilog="The status is 0 if no field that changes the result differs, nor the data, and the"
        " metrics agree up to R; 1 if something of that differs, or no metric could be compared;"
        " 2 after a mistake. Other sources, versions and machines count by what comes of them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="a run's folder, or one with runs in it")
    add("b", type=Path, metavar="B", help="the other")
    what = "by how much metrics may differ, in relation to the larger (%(default)s)"
    add("--rtol", type=float, default=RTOL, metavar="R", help=what)
    add("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(words)
    if not 0 <= options.rtol < math.inf:
        parser.error(f"--rtol {options.rtol}: expected 0 or more")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    a, b = runs.find(options.a), runs.find(options.b)
    alone = len(a) == len(b) == 1
    found = Diff(a[0], b[0], options.rtol) if alone else Populations.of(a, b, options.rtol)
    if options.json:
        print(json.dumps(_plain(found.json()), indent=2, allow_nan=False))
    else:
        print("\n".join(found.lines()))
    return 1 if found.reasons else 0


def _plain(value: Any) -> Any:
    """What JSON has no word for, as null."""
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    command.start(main)
