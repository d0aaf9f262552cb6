"""Runs as one page that can be read anywhere: python -m jaxeco.report FOLDER ... [-o FILE]

The page loads nothing and needs nothing but itself. What it says comes from the runs' folders: no
experiment's code runs.
"""

import argparse
import base64
import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxeco import command, runs, storage
from jaxeco.description import differing, flatten
from jaxeco.errors import UserError
from jaxeco.log import PACE
from jaxeco.markup import Cell, Markup, embedded_json, joined, number, page, table, tag
from jaxeco.runs import Run
from jaxeco.stats import plus_minus, summary

POINTS = 300  # of a curve at most, ...
ALL_POINTS = 150_000  # ... and of all curves together
SHOWN = 8  # settings whose matrices, pictures and texts are on the page
CLASSES = 25  # of a confusion matrix that is drawn as a table
LETTERS = 5000  # of a file of samples
WIDTH, HEIGHT = 1000, 2000  # of a picture at most, pixels
DOUBTFUL = {  # ways to end, and what that means for a mean
    "diverged": "left out, which flatters the rest",
    "stopped": "counted as far as they came",
    "interrupted": "counted as far as they came",
    "unfinished": "counted as far as they came",
}


@dataclass(frozen=True)
class Told:
    """A run, and what its log comes to."""

    run: Run

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """Of every "split/metric" that is a number: its values by step."""
        found: dict[str, dict[int, float]] = {}
        for line in self.run.metrics:
            for name, value in line.items():
                if isinstance(value, int | float) and name not in ("step", "time"):
                    found.setdefault(f"{line['split']}/{name}", {})[line["step"]] = value
        return found

    @cached_property
    def latest(self) -> dict[str, Mapping[str, Any]]:
        """The latest line of each split."""
        return {line["split"]: line for line in self.run.metrics}

    def last(self, metric: str) -> float | None:
        if metric not in self.curves:
            return None
        return self.curves[metric][max(self.curves[metric])]

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.run.metrics), default=0)

    @property
    def seconds(self) -> float:
        return max((line["time"] for line in self.run.metrics), default=0.0)

    @cached_property
    def environment(self) -> dict[str, str]:
        """What it ran on and with, by dotted path; older records lack some of it."""
        session = self.run.session
        kinds = Counter(device.split(" ", 1)[1] for device in session["devices"])
        names = ("python", "platform", "hosts", "git", "xla_flags", "versions", "code")
        facts = {name: session[name] for name in names if name in session}
        facts["devices"] = [f"{n} x {kind}" for kind, n in kinds.items()]
        facts["data"] = {
            split: f"{data['name']}, {data['examples']:,} examples, {data['fingerprint']}"
            for split, data in session["data"].items()
        }
        return {path: _text(value) for path, value in flatten(facts).items()}


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: Sequence[Told]

    @cached_property
    def counted(self) -> list[Told]:
        """Those in the means, as in `jaxeco.compare`: one of each seed, none that diverged."""
        return list({t.run.seed: t for t in self.runs if t.run.ended != "diverged"}.values())

    def finals(self, metric: str) -> list[float]:
        """The last value of each run that counts and has one, which may be NaN."""
        values = [told.last(metric) for told in self.counted]
        return [value for value in values if value is not None]

    def worth(self, metric: str, unknown: float) -> float:
        """The mean; `unknown` if there is none, or it is no number."""
        mean = statistics.fmean(self.finals(metric) or [np.nan])
        return mean if np.isfinite(mean) else unknown

    @property
    def name(self) -> str:
        return self.runs[0].run.name

    @property
    def first(self) -> Told:
        """One that stands for all."""
        return (self.counted or self.runs)[0]


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(prog="python -m jaxeco.report", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    what = "of a run, or one that holds runs, such as runs/"
    add("folders", nargs="+", type=Path, metavar="FOLDER", help=what)
    add("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE",
        help="the page (%(default)s)")  # fmt: skip
    what = 'what settings are ordered by, such as "test/loss" (default: what most experiments'
    add("--metric", metavar="SPLIT/NAME", help=f"{what} call their best)")
    options = parser.parse_args(words)
    if options.output.is_dir():
        parser.error(f"-o {options.output} is a folder: expected a file, such as report.html")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    found = {run.folder.resolve(): run for folder in options.folders for run in runs.find(folder)}
    settings = [
        Setting(label, [Told(run) for run in group])
        for label, group in runs.by_setting(found.values()).items()
    ]
    text = written(settings, options.metric, time.strftime("%Y-%m-%d %H:%M %Z"))
    contents = text.encode("utf-8", "replace")  # a file's name may be no text
    try:
        storage.write_whole(options.output, contents)
    except OSError as error:
        raise UserError(f"cannot write {options.output}: {error.strerror}") from error
    print(f"{options.output}: {_head(settings)}, {len(contents) / 2**20:.2f} MiB")
    return 0


def written(settings: Sequence[Setting], metric: str | None, when: str) -> str:
    """The page.

    Raises:
      UserError: no run has measured `metric`.
    """
    metrics = measured(settings)
    if metric is not None and metric not in metrics:
        raise UserError(f"no run has measured {metric!r}: expected one of {', '.join(metrics)}")
    metric = metric or most_called_best(settings) or (metrics or ["train/loss"])[0]
    ordered = list(dict.fromkeys([metric, *metrics]))
    lower = any(told.run.lower_is_better(metric) for s in settings for told in s.runs)

    sign = 1 if lower else -1
    settings = sorted(settings, key=lambda setting: sign * setting.worth(metric, sign * np.inf))
    names = _some(list(dict.fromkeys(setting.name for setting in settings)))
    first, direction = ("lowest", "ascending") if lower else ("highest", "descending")
    sections = {
        "Warnings": warnings(settings),
        "Settings": settings_table(settings, ordered, direction),
        "Curves": curves() if metrics else (),
        "Runs": runs_table(settings, ordered),
        "Differences": differences(settings),
        "Confusion": confusion(settings[:SHOWN]),
        "Pictures": pictures(settings[:SHOWN]),
        "Samples": samples(settings[:SHOWN]),
        "Resources": resources(settings),
        "Environment": environment([told for setting in settings for told in setting.runs]),
    }
    parts = {
        "title": tag("title", names),
        "head": joined(
            [
                tag("h1", names),
                tag("p", f"{_head(settings)}; by {metric}, {first} first; written {when}"),
            ]
        ),
        "sections": joined(
            tag("section", tag("h2", title), content, id=title.lower())
            for title, content in sections.items()
            if content
        ),
        "data": embedded_json(drawn(settings, metric) if metrics else None),
        "style": _beside("report.css"),
    }
    return page(_beside("report.html"), parts, _beside("report.js"))


def measured(settings: Sequence[Setting]) -> list[str]:
    """Every "split/metric" that a run comes to, training's last."""
    names = dict.fromkeys(name for s in settings for told in s.runs for name in told.curves)
    results = [name for name in names if not PACE.fullmatch(name.rpartition("/")[2])]
    return sorted(results, key=lambda name: name.startswith("train/"))


def most_called_best(settings: Sequence[Setting]) -> str | None:
    """What most of the experiments call their best."""
    bests = (told.run.settings.get("best") for setting in settings for told in setting.runs)
    counts = Counter(best for best in bests if best is not None)
    return counts.most_common(1)[0][0] if counts else None


# Sections: what stands in each; nothing, where there is nothing to say

Content = Sequence[Markup]


def warnings(settings: Sequence[Setting]) -> Content:
    """What should keep a reader from believing the numbers as they are."""
    doubts: dict[str, list[str]] = {}  # and of which settings
    for setting in settings:
        said = []
        ended = Counter[str](told.run.ended for told in setting.runs)
        for how, what in DOUBTFUL.items():
            if ended[how]:
                said.append(f"{ended[how]} of {_counted(len(setting.runs), 'run')} {how}: {what}")
        seeds = Counter(told.run.seed for told in setting.runs)
        if twice := [str(seed) for seed, n in seeds.items() if n > 1]:
            said.append(f"of seed {', '.join(twice)} only the last run counts")
        paths = differing([told.environment for told in setting.runs])
        if paths := [path for path in paths if path.split(".")[0] in ("versions", "code", "data")]:
            said.append(f"its runs differ in {', '.join(paths)}")
        if len(setting.counted) == 1:
            said.append("a single run: nothing tells how sure its numbers are")
        for doubt in said:
            doubts.setdefault(doubt, []).append(setting.label)
    if not doubts:
        return ()
    return [tag("ul", (tag("li", f"{_some(labels)}: {said}") for said, labels in doubts.items()))]


def settings_table(settings: Sequence[Setting], metrics: Sequence[str], direction: str) -> Content:
    """The first of `metrics` with its interval."""
    first, *others = metrics

    def row(setting: Setting) -> Iterator[object]:
        n, of = len(setting.finals(first) or setting.counted), len(setting.runs)
        yield setting.label
        yield Cell(f"{n}" if n == of else f"{n} of {of}", n)
        yield _mean(setting, first)
        yield _interval(setting.finals(first))
        yield from (_mean(setting, name) for name in others)

    said = (
        "Mean ± standard deviation of the runs' last values, and an interval of the mean. Of runs"
        " that diverged nothing counts."
    )
    head = ["setting", "runs", first, "95 % interval", *others]
    return tag("p", said), table("Settings", head, map(row, settings), first=(2, direction))


def curves() -> Content:
    said = (
        "The first settings of the table above, as it is sorted and filtered there. Line: mean over"
        " seeds. Band: from the smallest to the largest. Long curves are thinned."
    )
    without = tag("p", "Curves are drawn by the page's own script, which does not run here.")
    return tag("p", said), tag("noscript", without), tag("div", id="panels")


def runs_table(settings: Sequence[Setting], metrics: Sequence[str]) -> Content:
    def row(told: Told) -> Iterator[object]:
        run, of = told.run, f" of {told.run.result['of']:,}" if told.run.result else ""
        early = run.ended in ("stalled", "stopped")
        yield from (str(run.folder), run.seed, "stopped early" if early else run.ended)
        yield from (told.last(name) for name in metrics)
        yield Cell(f"{told.step:,}{of}", told.step)
        yield _shown(told.seconds, ",.1f")
        yield from (run.name, " ".join(run.words))

    head = ["run", "seed", "ended", *metrics, "step", "seconds", "experiment", "words"]
    return [table("Runs", head, (row(told) for setting in settings for told in setting.runs))]


def differences(settings: Sequence[Setting]) -> Content:
    """For each experiment a table of the values in which its settings differ."""
    tables = []
    for name in dict.fromkeys(setting.name for setting in settings):
        group = [setting for setting in settings if setting.name == name]
        values = [setting.first.run.settings for setting in group]
        paths = differing(values)
        head = ["setting", *paths]
        rows = [
            [setting.label, *(_text(one[path]) if path in one else None for path in paths)]
            for setting, one in zip(group, values, strict=True)
        ]
        if len(paths) > len(group):
            head, *rows = map(list, zip(["field", *paths], *rows, strict=True))
        if paths:
            tables.append(table(f"Where settings of {name} differ", head, rows))
    return tables


def confusion(settings: Sequence[Setting]) -> Content:
    """Of each setting the mean over its runs of their last matrices."""
    said = "Means over runs. Row: truth. Column: prediction. Shade: share of the row."
    matrices = _folded(
        (f"{setting.label}: {split}, {_counted(len(found), 'run')}", _matrix(found, classes))
        for setting in settings
        for split, (found, classes) in _matrices(setting).items()
    )
    return [tag("p", said), *matrices] if matrices else ()


def _matrices(setting: Setting) -> dict[str, tuple[list[np.ndarray], Sequence[str]]]:
    """By split: the last matrices [K, K] of the runs, and K names, or none."""
    found: dict[str, tuple[list[np.ndarray], Sequence[str]]] = {}
    for told in setting.counted:
        for split, line in told.latest.items():
            if "confusion_matrix" in line and len(line["confusion_matrix"]) <= CLASSES:
                data = told.run.session["data"][split]
                names = data["classes"] if "classes" in data else ()  # older records have none
                matrices, _ = found.setdefault(split, ([], names))
                matrices.append(np.array(line["confusion_matrix"]))
    return found


def _matrix(found: Sequence[np.ndarray], classes: Sequence[str]) -> Markup:
    """The mean. Rows are truths, columns predictions; a cell's shade is its share of the row."""
    counts_KxK = np.mean(found, 0)
    k = len(counts_KxK)
    names = classes if len(classes) == k else [str(i) for i in range(k)]
    share_KxK = counts_KxK / np.maximum(counts_KxK.sum(1, keepdims=True), 1e-9)

    def cell(i: int, j: int) -> Markup:
        share = share_KxK[i, j]
        if not share > 0:
            return tag("td")
        said = f"{names[i]} taken for {names[j]}: {share:.1%}"
        shade = f"--shade:{np.sqrt(share):.2f}"  # the root: rare mistakes are what one looks for
        strong = "strong" if share > 0.8 else None
        n = counts_KxK[i, j]
        count = format(n, ".2g" if n < 10 else ".3g" if n < 100 else ".0f")
        return tag("td", count, style=shade, title=said, class_=strong)

    head = tag("tr", tag("td"), (tag("th", name, scope="col") for name in names))
    body = (
        tag("tr", tag("th", name, scope="row"), (cell(i, j) for j in range(k)))
        for i, name in enumerate(names)
    )
    caption = tag("caption", "Truth by row, prediction by column")
    whole = tag("table", caption, tag("thead", head), tag("tbody", body), class_="matrix")
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label="Matrix")


def pictures(settings: Sequence[Setting]) -> Content:
    """Of a run of each setting, but for what is drawn elsewhere on the page."""
    return _folded(
        (str(path), tag("img", src=source, alt=path.stem, loading="lazy"))
        for setting in settings
        for path in sorted(setting.first.run.folder.glob("*.png"))
        if not path.stem.startswith("curves")
        and not (path.stem.startswith("confusion") and _matrices(setting))
        and (source := _embedded(path))
    )


def _embedded(path: Path) -> str | None:
    """A picture as a data URI, no larger than a page needs it; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
        image.thumbnail((WIDTH, HEIGHT))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    image.save(contents := io.BytesIO(), "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(contents.getvalue()).decode()}"


def samples(settings: Sequence[Setting]) -> Content:
    """Texts of a language model, which lie in its run's folder as samples*.txt."""
    return _folded(
        (str(path), tag("pre", path.read_text("utf-8", "replace")[:LETTERS]))
        for setting in settings
        for path in sorted(setting.first.run.folder.glob("samples*.txt"))
    )


def resources(settings: Sequence[Setting]) -> Content:
    def middle(setting: Setting, metric: str) -> float | None:
        found = [told.curves[metric] for told in setting.runs if metric in told.curves]
        return statistics.median([v for curve in found for v in curve.values()]) if found else None

    def row(setting: Setting) -> Iterator[object]:
        yield setting.label
        yield _shown(statistics.median(told.seconds for told in setting.runs), ",.1f")
        yield _shown(middle(setting, "train/examples_per_second"), ",.0f")
        yield _shown(middle(setting, "train/data_wait"), ".1%")
        yield ", ".join(dict.fromkeys(told.environment["devices"] for told in setting.runs))

    said = "Medians, of seconds over runs, of rates over all lines of their logs."
    head = ["setting", "seconds", "examples per second", "waits for data"]
    return tag("p", said), table("Resources", [*head, "devices"], map(row, settings))


def environment(tolds: Sequence[Told]) -> Content:
    """What all runs have in common, once; and the combinations of what they have not."""
    facts = [told.environment for told in tolds]
    paths = differing(facts)
    common = {path: value for path, value in facts[0].items() if path not in paths}
    tables = [table("The same for all runs", ["what", "is"], common.items())]
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for told, one in zip(tolds, facts, strict=True):
        values = tuple(one[path] if path in one else None for path in paths)
        groups.setdefault(values, []).append(str(told.run.folder))
    if paths:
        rows = [[_some(names), len(names), *values] for values, names in groups.items()]
        tables.append(table("Where runs differ", ["run", "runs", *paths], rows))
    return tables


# Curves


def drawn(settings: Sequence[Setting], metric: str) -> dict[str, Any]:
    """What the page's script draws.

    Returns:
      "settings": of each its label and curves, by "split/metric": "grid", which of "grids" holds
      the steps; "mean", "low", "high" over runs at each; "n", how many runs that are. "metrics":
      names without their split, the one to begin with first, each with its "split/metric"s.
    """
    names = dict.fromkeys(name for s in settings for told in s.runs for name in told.curves)
    by_name: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda n: (n != metric, n.startswith("train/"))):
        by_name.setdefault(name.rpartition("/")[2], []).append(name)
    count = sum(len({name for told in s.runs for name in told.curves}) for s in settings)
    points = max(20, min(POINTS, ALL_POINTS // max(count, 1)))
    grids: dict[tuple[int, ...], int] = {}
    told_settings = []
    for setting in settings:
        found = {}
        for name in names:
            drawn = setting.counted or setting.runs
            if of := [told.curves[name] for told in drawn if name in told.curves]:
                steps, band = banded(of, points)
                found[name] = {"grid": grids.setdefault(steps, len(grids)), **band}
        told_settings.append({"label": setting.label, "curves": found})
    return {"settings": told_settings, "grids": list(grids), "metrics": by_name}


def banded(
    curves: Sequence[Mapping[int, float]], points: int
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Several runs' values by step as one curve: steps [N], and mean, low, high, n at each.

    A step counts if all runs that have come so far have a value there: else the mean would jump
    with who is in it. (Where they have no step in common, all count.) At most `points` are kept,
    evenly chosen, the first and the last among them.
    """
    every = sorted(set().union(*curves))
    if any(all(step in curve for curve in curves) for step in every):
        last = [max(curve) for curve in curves]
        every = [s for s in every if all(s in c or s > end for c, end in zip(curves, last))]
    kept = np.unique(np.linspace(0, len(every) - 1, points).round().astype(int))
    steps = [every[i] for i in kept]
    values = [[curve[s] for curve in curves if s in curve and np.isfinite(curve[s])] for s in steps]
    band: dict[str, Any] = {"mean": [_short(statistics.fmean(v)) if v else None for v in values]}
    if len(curves) > 1:
        band["low"] = [_short(min(v)) if v else None for v in values]
        band["high"] = [_short(max(v)) if v else None for v in values]
    counts = [len(v) for v in values]
    band["n"] = counts if len(set(counts)) > 1 else counts[0]
    return tuple(steps), band


def _short(value: float) -> float:
    """Five digits: what a curve can show."""
    return float(f"{value:.5g}")


# Words


def _head(settings: Sequence[Setting]) -> str:
    count = sum(len(setting.runs) for setting in settings)
    return f"{_counted(count, 'run')} of {_counted(len(settings), 'setting')}"


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _mean(setting: Setting, metric: str) -> Cell | None:
    values = setting.finals(metric)
    if not values:
        return None
    mean = statistics.fmean(values)
    if not np.isfinite(mean):
        return Cell(str(mean), None)
    return Cell(plus_minus(mean, statistics.stdev(values) if len(values) > 1 else None), mean)


def _shown(value: float | None, pattern: str) -> Cell | None:
    return None if value is None else Cell(format(value, pattern), value)


def _interval(values: Sequence[float]) -> Cell | None:
    found = summary(values) if values else None
    if found is None or found.low is None or found.high is None:
        return None
    return Cell(f"{number(found.low)} to {number(found.high)}", found.low)


def _folded(parts: Iterable[tuple[str, Markup]]) -> Content:
    """Parts that open one by one, the first of them open already."""
    return [
        tag("details", tag("summary", title), content, open=i == 0)
        for i, (title, content) in enumerate(parts)
    ]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if value is None:
        return "none"  # as on the command line
    return value if isinstance(value, str) else json.dumps(value)


def _beside(name: str) -> str:
    """One of the three files that are the page's frame."""
    return (Path(__file__).parent / name).read_text()


if __name__ == "__main__":
    command.start(main)
