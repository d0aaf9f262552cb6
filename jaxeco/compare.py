"""Whether runs differ by more than chance: python -m jaxeco.compare RUNS [RUNS ...] [options]"""

import argparse
import difflib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxeco import command, stats
from jaxeco.claims import is_share
from jaxeco.description import differing, flatten
from jaxeco.errors import UserError
from jaxeco.log import table
from jaxeco.runs import Run, by_setting, find
from jaxeco.stats import Comparison, Summary

FEW = 4  # settings, of which all pairs are shown; of more, those with the best
USELESS = 100  # seeds each: a difference that needs more of them is not worth it


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seeds alone, and what counts of each: one value."""

    label: str
    runs: tuple[Run, ...]
    values: tuple[float, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True)
class Pair:
    """Two settings: the one that is ahead, and the other.

    Attributes:
      found: by how much the one ahead is better than the one behind, whichever way that is; of n,
        the first is of the one behind.
      p: corrected for the number of pairs (Holm).
      needed: runs of each with which a difference of this size is found 4 times in 5; None: more
        than are worth it, or it cannot be said.
    """

    ahead: Setting
    behind: Setting
    found: Comparison
    p: float
    needed: int | None


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m jaxeco.compare",
        description=__doc__,
        epilog="Runs of one setting and several seeds are put together. Those of a folder that"
        " holds several runs are kept apart from all others. What the sentences mean:"
        " docs/statistics.md.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="a run's folder, or one of many runs")
    add("--metric", metavar="SPLIT/NAME", help="such as test/accuracy (default: what is `best` by)")
    which = "what counts of a run: its last evaluation, or that at its best step (%(default)s)"
    add("--at", choices=("last", "best"), default="last", help=which)
    what = "Student's and Welch's, or one that assumes no distribution (%(default)s)"
    add("--test", choices=("t", "permutation"), default="t", help=what)
    add("--unpaired", action="store_true", help="do not pair the runs of equal seeds")
    add("--alpha", type=float, default=0.05, help="chance to find what is not there (%(default)s)")
    add("--json", action="store_true", help="all of it, and of all pairs, as JSON")
    options = parser.parse_args(words)
    if not 1e-6 <= options.alpha <= 0.5:
        parser.error(f"--alpha {options.alpha}: expected a chance of 0.5 at most, such as 0.05")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    groups = populations(options.runs)
    everyone = [run for group in groups.values() for run in group]
    metric = options.metric or default_metric(everyone)
    check_metric(metric, everyone)
    settings, warnings = settled(groups, metric, options.at)
    lower = less_is_better(metric, everyone)
    settings.sort(key=lambda s: np.mean(s.values) * (1 if lower else -1))
    pairs = compared(settings, lower, options.test, options.alpha, not options.unpaired)
    if options.json:
        print(json.dumps(_plain(report(settings, pairs, warnings, options, metric, lower))))
        return 0
    for warning in warnings:
        print(f"warning: {warning}")
    print("\n" * bool(warnings) + page(settings, pairs, options.alpha, metric, options.at, lower))
    return 0


# What is compared


def populations(paths: Sequence[Path]) -> dict[str, list[Run]]:
    """Runs by setting, with a label for each: those of each folder of many, and the single ones.

    Raises:
      UserError: there are no runs, or one is damaged.
    """
    found = {path.resolve(): find(path) for path in paths}
    seen = [run.folder.resolve() for runs in found.values() for run in runs]
    if twice := [folder for folder in seen if seen.count(folder) > 1]:
        raise UserError(f"{twice[0]} is in two of the folders that are given: leave one out")
    many = {path: runs for path, runs in found.items() if runs[0].folder.resolve() != path}
    single = [run for path, runs in found.items() if path not in many for run in runs]
    parts: list[tuple[str, dict[str, list[Run]]]] = [("", by_setting(single))] if single else []
    parts += [(folder.name, by_setting(runs)) for folder, runs in many.items()]
    groups: dict[str, list[Run]] = {}
    for name, part in parts:
        for label, runs in part.items():
            if len(parts) > 1 and name:
                label = name if len(part) == 1 else f"{name}: {label}"
            if label in groups:
                label = f"{label} ({runs[0].folder.parent})"
            groups[label] = runs
    return groups


def default_metric(runs: Iterable[Run]) -> str:
    """What the runs' experiments call best by; else the first measure of their first split.

    Raises:
      UserError: nothing was measured, or the runs do not agree.
    """
    names = dict.fromkeys(run.record["resolved"]["best"] or _first(run) for run in runs)
    if None in names and len(names) == 1:
        raise UserError("none of these runs was evaluated yet: wait for them, or run them on")
    agreed = [name for name in names if name]
    if len(agreed) > 1:
        raise UserError(f"--metric: these runs are best by {', '.join(agreed)}: choose one")
    return agreed[0]


def _first(run: Run) -> str | None:
    splits = list(run.record["resolved"]["evals"])
    found = [name for name in measured(run) if splits and name.partition("/")[0] == splits[0]]
    found.sort(key=lambda name: name.endswith("/loss"))
    return found[0] if found else None


def measured(run: Run) -> list[str]:
    """Names, "split/metric", of all numbers that evaluations of a run have come to."""
    return list(
        dict.fromkeys(
            f"{line['split']}/{name}"
            for line in run.metrics
            if line["split"] != "train"
            for name, value in line.items()
            if name not in ("step", "split", "time") and isinstance(value, int | float)
        )
    )


def check_metric(metric: str, runs: Iterable[Run]) -> None:
    """Raises UserError unless a run has this metric."""
    known = list(dict.fromkeys(name for run in runs for name in measured(run)))
    if metric not in known:
        near = difflib.get_close_matches(metric, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}"
        raise UserError(f"--metric {metric}: these runs have not measured it; {hint}")


def less_is_better(metric: str, runs: Iterable[Run]) -> bool:
    """By the runs that have measured it; others know nothing of it.

    Raises:
      UserError: they do not agree.
    """
    found = {run.lower_is_better(metric) for run in runs if metric in measured(run)}
    if len(found) > 1:
        raise UserError(f"{metric}: less is better in some of these runs, more in others")
    return found.pop()


def settled(
    groups: Mapping[str, Sequence[Run]], metric: str, at: str
) -> tuple[list[Setting], list[str]]:
    """One value of each run that has one, and warnings of what makes runs hard to compare.

    Raises:
      UserError: there is no value at all.
    """
    warnings: list[str] = []
    settings = []
    for label, group in groups.items():
        value = {run.folder: _value(run, metric, at) for run in group}
        diverged = [run for run in group if run.ended == "diverged"]
        finite = [run for run in group if np.isfinite(value[run.folder])]
        good = [run for run in finite if run not in diverged]
        kept = list({run.seed: run for run in good}.values())
        for which, said in (
            (diverged, "diverged and is left out: the mean of the others flatters"),
            (
                [run for run in group if run not in (*finite, *diverged)],
                f"has no finite {metric}{' at a best step' * (at == 'best')} and is left out",
            ),
            ([run for run in good if run not in kept], "has the seed of one that counts already"),
            ([run for run in kept if _cut_short(run)], "is unfinished"),
        ):
            if which:
                more = f" and {len(which) - 1} more" * (len(which) > 1)
                first = f"{len(which)} of {len(group)} runs, {which[0].folder}{more},"
                warnings.append(f"{label}: {first} {said}")
        if kept:
            settings.append(Setting(label, tuple(kept), tuple(value[r.folder] for r in kept)))
    if not settings:
        raise UserError(f"none of these runs has a finite {metric}; {'; '.join(warnings)}")
    return settings, [*warnings, *_unlike(settings, metric)]


def _cut_short(run: Run) -> bool:
    """Whether a run is not at its end, be it that somebody, or a sweep, has stopped it."""
    return run.ended not in ("complete", "stalled")


def _value(run: Run, metric: str, at: str) -> float:
    found = run.last(metric) if at == "last" else run.best(metric)
    return math.nan if found is None else found


def _unlike(settings: Sequence[Setting], metric: str) -> list[str]:
    """What the settings differ in so that their values mean something else."""
    split = metric.partition("/")[0]
    said = []
    data = [run.session["data"] for s in settings for run in s.runs]
    if len({of[split]["fingerprint"] for of in data if split in of}) > 1:
        said.append(f"the data of {split} is not the same in all: their values do not compare")
    steps = {s.label: {run.result["of"] for run in s.runs if run.result} for s in settings}
    if len(set().union(*steps.values())) > 1:
        numbers = [
            f"{label} {' and '.join(f'{n:,}' for n in sorted(found))}"
            for label, found in steps.items()
            if found
        ]
        said.append(f"the numbers of steps differ: {'; '.join(numbers)}")
    for s in settings:
        facts = [
            flatten({k: run.session[k] for k in ("code", "versions") if k in run.session})
            for run in s.runs
        ]
        if paths := differing(facts):
            said.append(f"{s.label}: its runs differ in {', '.join(paths)}")
    return said


# The comparison


def compared(
    settings: Sequence[Setting], lower: bool, test: stats.Test, alpha: float, pairing: bool = True
) -> list[Pair]:
    """Each setting with each that comes after it; they are sorted, the best first.

    Args:
      lower: less is better.
    """
    both = list(itertools.combinations(settings, 2))
    found = []
    for ahead, behind in both:
        paired = pairing and sorted(ahead.seeds) == sorted(behind.seeds)
        a, b = (_values(s, paired, -1 if lower else 1) for s in (behind, ahead))
        found.append(stats.compare(a, b, paired=paired, alpha=alpha, test=test))
    corrected = stats.holm([c.p for c in found])
    strict = alpha / max(1, len(both))  # what Holm asks of the smallest p
    return [
        Pair(*two, c, p, _needed(c, strict))
        for two, c, p in zip(both, found, corrected, strict=True)
    ]


def _values(setting: Setting, by_seed: bool, sign: int) -> list[float]:
    values = zip(setting.seeds, setting.values, strict=True)
    return [sign * value for _, value in (sorted(values) if by_seed else values)]


def _needed(c: Comparison, alpha: float) -> int | None:
    if not c.effect:
        return None
    needed = stats.runs_needed(c.effect, paired=c.paired, alpha=alpha, most=USELESS + max(c.n))
    if needed is not None and c.least_p > alpha:  # few runs have few permutations
        needed = max(needed, next(n for n in itertools.count(2) if _least(n, c.paired) <= alpha))
    return needed


def _least(n: int, paired: bool) -> float:
    """The smallest p of a permutation test of n runs each."""
    return 2 / (2**n if paired else math.comb(2 * n, n))


# What is said of it


def page(
    settings: Sequence[Setting],
    pairs: Sequence[Pair],
    alpha: float,
    metric: str,
    at: str,
    lower: bool,
) -> str:
    """The table of settings, and a sentence for each pair that is shown."""
    rows = [("setting", "n", "mean ± sd", f"{_level(alpha)} interval")]
    for s in settings:
        short = stats.summary(s.values, 1 - alpha)
        interval = _interval(short, metric) + " %" * (is_share(metric) and short.n > 1)
        mean = stats.plus_minus(short.mean, short.sd, is_share(metric))
        rows.append((s.label, f"{short.n}", mean, interval))
    which = "last value" if at == "last" else "value at its best step"
    title = f"{metric}, each run's {which}; {'less' if lower else 'more'} is better"
    shown = pairs if len(settings) <= FEW else [p for p in pairs if p.ahead is settings[0]]
    lines = [sentence(pair, alpha, metric, len(pairs)) for pair in shown]
    if len(settings) == 1:
        lines = ["there is one setting only, and nothing to compare it with"]
    elif all(len(s.runs) == 1 for s in settings):
        lines = ["one run of each setting says nothing of chance: run more seeds of each"]
    elif len(shown) < len(pairs):
        lines.append(f"the p-values are corrected for all {len(pairs)} pairs; --json has the rest")
    return "\n\n".join([table(title, rows), *lines])


def sentence(pair: Pair, alpha: float, metric: str, pairs: int = 1) -> str:
    """What a person is to take from a comparison.

    Args:
      alpha: pairs whose corrected p is no more than this are told apart.
      pairs: how many comparisons p was corrected for.
    """
    c, ahead, behind = pair.found, pair.ahead.label, pair.behind.label
    if c.paired and c.difference == 0 and not math.isfinite(c.high - c.low):
        return f"{ahead} and {behind} are not distinguishable: all {c.n[0]} pairs are equal"
    interval = f"({_level(alpha)} interval {_interval(c, metric)})"
    numbers = f"{_difference(c, metric)} {interval}, p = {_p(c.p)}"
    if pairs > 1:
        numbers += f", {_p(pair.p)} corrected for {pairs} comparisons"
    numbers += f", {_how(c)}"
    if c.effect is not None:
        numbers += f", {'d_z' if c.paired else 'g'} = {abs(c.effect):.2g}"
    if pair.p <= alpha:
        return f"{ahead} is better than {behind} by {numbers}"
    n = f"n = {c.n[0]}" if c.n[0] == c.n[1] else f"n = {c.n[1]} and {c.n[0]}"
    lead = f"{ahead} is ahead by" if abs(c.difference) > 0 else "they differ by"
    return f"{ahead} and {behind} are not distinguishable at {n}: {lead} {numbers}; " + _advice(
        pair, alpha / pairs
    )


def _how(c: Comparison) -> str:
    if c.paired:
        test = "" if c.test == "paired t" else " in a permutation test"
        return f"paired by {c.n[0]} seed{'s' * (c.n[0] != 1)}{test}"
    if c.test == "t of one run":
        return "one run against the spread of the others"
    return c.test if c.test == "Welch's t" else "permutation test"


def _advice(pair: Pair, alpha: float) -> str:
    """What would settle it."""
    c = pair.found
    if max(c.n) == 1:
        return "one run of each says nothing of chance: run more seeds of each"
    if c.difference == 0:
        return "no number of seeds settles a difference of nothing"
    settled = ""
    if pair.needed is not None:
        more = max(1, pair.needed - min(c.n))
        settled = f"about {more} more seed{'s' * (more > 1)} each would settle a difference of this"
        settled += " size"
    if c.least_p > alpha:
        n = f"{c.n[0]} pairs of runs" if c.paired else f"{c.n[1]} against {c.n[0]} runs"
        why = f"{n} cannot show it by a permutation test, whose p is {_p(c.least_p)} at least"
        return "; ".join(filter(None, [why, settled]))
    return settled or (
        f"so small a difference is no use: to settle it takes more than {USELESS} seeds each"
    )


def _interval(of: Comparison | Summary, metric: str) -> str:
    if of.low is None or of.high is None:
        return ""
    return " to ".join(_number(end, of.high - of.low, metric) for end in (of.low, of.high))


def _difference(c: Comparison, metric: str) -> str:
    said = _number(abs(c.difference), c.high - c.low, metric)
    return f"{said} points" if is_share(metric) else said


def _number(value: float, width: float, metric: str) -> str:
    """With as many digits as two of the width of its interval need."""
    value, width = (100 * value, 100 * width) if is_share(metric) else (value, width)
    if not math.isfinite(width) or width == 0:
        return f"{value:.3g}"
    return f"{value:.{stats.decimals(width)}f}"


def _level(alpha: float) -> str:
    return f"{100 * (1 - alpha):g} %"


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def report(
    settings: Sequence[Setting],
    pairs: Sequence[Pair],
    warnings: Sequence[str],
    options: argparse.Namespace,
    metric: str,
    lower: bool,
) -> dict[str, Any]:
    """All that was found, for a program to read."""
    return {
        "metric": metric,
        "at": options.at,
        "better": "less" if lower else "more",
        "alpha": options.alpha,
        "warnings": list(warnings),
        "settings": [
            {
                "label": s.label,
                **asdict(stats.summary(s.values, 1 - options.alpha)),
                "values": list(s.values),
                "seeds": list(s.seeds),
                "folders": [str(run.folder) for run in s.runs],
            }
            for s in settings
        ],
        "comparisons": [
            {
                "ahead": pair.ahead.label,
                "behind": pair.behind.label,
                "distinguishable": pair.p <= options.alpha,
                **asdict(pair.found),
                "p_corrected": pair.p,
                "runs_needed": pair.needed,
                "sentence": sentence(pair, options.alpha, metric, len(pairs)),
            }
            for pair in pairs
        ],
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity: it is null."""
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    command.start(main)
