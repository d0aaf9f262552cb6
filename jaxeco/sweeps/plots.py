"""Pictures of a sweep as PNG: its history, slices, parallel coordinates, importances.

A complete trial is a dot, a pruned one a pale cross, at the last value that was measured. The scale
of the metric spans the better part of the values; what lies beyond stands at its edge, as a
triangle: otherwise a few bad trials would hide how the good ones differ.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxeco import plots
from jaxeco.sweeps.space import Choice, Dimension, Value

if TYPE_CHECKING:
    from jaxeco.sweeps.study import Row

BLUE, ORANGE = plots.COLOURS[:2]
PALE = "#8c959f"
SHOWN = 0.7  # this share of the trials lies within the scale: those that are better


def history(rows: Sequence["Row"], metric: str, direction: str, path: Path) -> None:
    """The value of each trial, in the order in which they were asked, and the best so far.

    At least one is complete.
    """
    figure = plots._figure(7.2, 3.8)
    axes = figure.subplots()
    scale = _scale(rows, direction)
    _trials(axes, [(row.number, row) for row in rows], scale, "Blues", None)
    done = [(r.number, r.value) for r in rows if r.state == "complete" and r.value is not None]
    so_far = list(accumulate((v for _, v in done), max if direction == "max" else min))
    numbers = [*(number for number, _ in done), rows[-1].number]
    line = {"color": ORANGE, "linewidth": 1.4, "label": "best so far"}
    axes.step(numbers, [*so_far, so_far[-1]], where="post", **line)
    for i, row in enumerate(r for r in rows if r.state == "failed"):
        label = "failed" if i == 0 else None
        axes.axvline(row.number, 0, 0.05, color=plots.WRONG, linewidth=1.4, label=label)
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    axes.locator_params(axis="x", integer=True, nbins=10, min_n_ticks=1)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, 1.12))
    _bare(axes)
    plots._save(figure, path)


def slices(
    rows: Sequence["Row"],
    dimensions: Sequence[Dimension],
    metric: str,
    direction: str,
    path: Path,
) -> None:
    """The metric against each name alone; later trials are darker, the best has a ring."""
    columns = min(len(dimensions), 4)
    lines = math.ceil(len(dimensions) / columns)
    figure = plots._figure(max(3.1 * columns, 4.2), 3.1 * lines)
    panels = np.ravel(figure.subplots(lines, columns, sharey=True, squeeze=False))
    scale = _scale(rows, direction)
    for axes, d in zip(panels, dimensions):
        places = [(_place(d, row.params[d.name]), row) for row in rows if d.name in row.params]
        _trials(axes, places, scale, "Blues", best(rows, direction))
        ticks, labels = _ticks(d)
        axes.set_xticks(ticks, labels, fontsize=8)
        axes.set_xlim(-0.06, 1.06)
        axes.set_xlabel(d.name)
        _bare(axes)
    for axes in panels[len(dimensions) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(metric)
    plots._save(figure, path)


def parallel(
    rows: Sequence["Row"],
    dimensions: Sequence[Dimension],
    metric: str,
    direction: str,
    path: Path,
) -> None:
    """A line for each trial through its values; the better, the darker; pruned ones pale."""
    figure = plots._figure(max(1.7 * (len(dimensions) + 1) + 0.8, 5.0), 4.0)
    axes = figure.subplots()
    sign, first = (1 if direction == "max" else -1), best(rows, direction)
    low, high = _scale(rows, direction)
    from matplotlib import colormaps

    columns = range(len(dimensions) + 1)
    for row in rows:
        if row.value is None:
            continue
        height = (min(max(row.value, low), high) - low) / (high - low)
        heights = [*(_place(d, row.params[d.name]) for d in dimensions), height]
        quality = height if sign > 0 else 1 - height
        style: dict[str, Any] = {"color": PALE, "linewidth": 0.6, "alpha": 0.5, "zorder": 1}
        if row.state == "complete":
            shade = colormaps["Blues"](0.25 + 0.7 * quality)
            style = {"color": shade, "linewidth": 1.1, "zorder": 2 + quality}
        if first is not None and row.number == first.number:
            style = {"color": ORANGE, "linewidth": 2.2, "zorder": 4}
        axes.plot(columns, heights, **style)
    names = [d.name for d in dimensions]
    scales = [_ticks(d) for d in dimensions]
    scales.append(([0.0, 0.5, 1.0], [f"{low + u * (high - low):.4g}" for u in (0, 0.5, 1)]))
    for x, (ticks, labels) in enumerate(scales):
        axes.axvline(x, color="#57606a", linewidth=0.8, zorder=0)
        for tick, label in zip(ticks, labels):
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
            axes.text(x + 0.03, tick, label, fontsize=8, va="center", bbox=box, zorder=5)
    axes.set_xticks(list(columns), [*names, metric])
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(dimensions) + 0.45)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    plots._save(figure, path)


def importance(shares: Mapping[str, float], trials: int, metric: str, path: Path) -> None:
    """How much of the variance of the metric each name accounts for, by so many trials."""
    names = sorted(shares, key=lambda name: shares[name])
    figure = plots._figure(5.6, 1.0 + 0.36 * len(names))
    axes = figure.subplots()
    bars = axes.barh(names, [100 * shares[name] for name in names], color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{100 * shares[name]:.0f} %" for name in names], padding=3, fontsize=8)
    axes.set_xlim(0, 112 * max(shares.values()))
    axes.set_xlabel(f"% of the variance of {metric}, by fANOVA of {trials} trials")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    plots._save(figure, path)


def best(rows: Sequence["Row"], direction: str) -> "Row | None":
    """The complete trial with the best value; of equals, the first."""
    done = [row for row in rows if row.state == "complete" and row.value is not None]
    sign = 1 if direction == "max" else -1
    return max(done, key=lambda row: (sign * (row.value or 0.0), -row.number), default=None)


def _trials(
    axes: Any,
    places: Sequence[tuple[float, "Row"]],
    scale: tuple[float, float],
    colours: str,
    ringed: "Row | None",
) -> None:
    """Draws trials at (x, value): in the scale, or as triangles at its edge."""
    from matplotlib import colormaps

    low, high = scale
    last = max((row.number for _, row in places), default=0) or 1
    for state, shape in (("pruned", "x"), ("complete", "o")):
        label: str | None = state
        for x, row in places:
            if row.state != state or row.value is None:
                continue
            inside = low <= row.value <= high
            marker = shape if inside else ("v" if row.value < low else "^")
            shade = colormaps[colours](0.35 + 0.6 * row.number / last)
            axes.plot(
                x,
                min(max(row.value, low), high),
                marker,
                color=PALE if state == "pruned" else shade,
                markersize=4.5,
                alpha=0.9,
                clip_on=False,
                label=label if inside else None,
                linestyle="none",
            )
            label = None if inside else label
            if ringed is not None and row.number == ringed.number:
                axes.plot(x, row.value, "o", markersize=10, fillstyle="none", color=ORANGE)
    margin = 0.04 * (high - low)
    axes.set_ylim(low - margin, high + margin)


def _scale(rows: Sequence["Row"], direction: str) -> tuple[float, float]:
    """From the value that SHOWN of the trials reach to the best, or the other way round."""
    values = [row.value for row in rows if row.value is not None] or [0.0]
    worst = float(np.quantile(values, 1 - SHOWN if direction == "max" else SHOWN))
    low, high = (worst, max(values)) if direction == "max" else (min(values), worst)
    room = 0.05 * (high - low) or abs(high) * 0.01 or 1.0
    return low - room, high + room


def _place(d: Dimension, value: Value) -> float:
    """Where a value lies between the ends of its axis, 0 to 1."""
    if isinstance(d, Choice):
        return d.options.index(str(value)) / (len(d.options) - 1)
    low, high, at = d.low, d.high, float(value)
    if d.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)


def _ticks(d: Dimension) -> tuple[list[float], list[str]]:
    """Places and labels: all options; the ends, and what is round between them."""
    if isinstance(d, Choice):
        return [_place(d, o) for o in d.options], [plots._short(o, 12) for o in d.options]
    if d.log:
        decades = range(math.ceil(math.log10(d.low)), math.floor(math.log10(d.high)) + 1)
        inner = [10.0**e for e in decades][:: math.ceil(len(decades) / 5) or 1]
    else:
        from matplotlib.ticker import MaxNLocator

        inner = list(MaxNLocator(4, integer=d.whole).tick_values(d.low, d.high))
    values = [v for v in inner if d.low <= v <= d.high]
    if d.log:  # an end that no decade is near
        ends = [
            e
            for e in (d.low, d.high)
            if all(abs(_place(d, e) - _place(d, v)) > 0.12 for v in values)
        ]
        values = sorted([*values, *ends])
    return [_place(d, v) for v in values], [f"{v:g}" for v in values]


def _bare(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
