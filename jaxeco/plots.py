"""Pictures of a run as PNG: learning curves, confusion, ROC and PR, examples with predictions.

Drawn on figures of their own, without pyplot, so that no window opens and no global state is left.
matplotlib is imported by the functions that draw: it costs 0.3 s.

Shapes: N examples, K classes, P points, H height, W width, C channels (1 or 3).
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxeco.errors import UserError

RIGHT, WRONG = "#1a7f37", "#cf222e"
COLOURS = ("#0969da", "#d1570d", "#1a7f37", "#8250df", "#bf3989", "#6e7781")
PANELS = ("loss", "accuracy", "f1", "macro_f1", "micro_f1")  # what has curves


def curves(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Loss, accuracy and F1 against the step: a line for training, one for every split evaluated.

    Args:
      metrics: lines as `log.read_metrics` returns them.
      path: the PNG to write. A panel is left out if no line has its values.

    Raises:
      UserError: `path` cannot be written.
    """
    panels = [name for name in PANELS if any(name in line for line in metrics)]
    figure = _figure(5.2 * max(len(panels), 1), 3.8)
    splits = dict.fromkeys(line["split"] for line in metrics)
    for axes, name in zip(np.ravel(figure.subplots(1, len(panels) or 1)), panels or [""]):
        for split, colour in zip(splits, _repeat(COLOURS)):
            points = [(m["step"], m[name]) for m in metrics if m["split"] == split and name in m]
            if points:
                x, y = np.array(points, float).T
                _curve(axes, x, y, split, colour)
        axes.set_xlabel("step")
        axes.set_title(name.replace("_", " ").replace("f1", "F1"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", integer=True, nbins=8, min_n_ticks=1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if name == "loss" and _spans_decades(metrics):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        if name == "accuracy":
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        if points_drawn := axes.get_legend_handles_labels()[0]:
            axes.legend(handles=points_drawn, frameon=False)
    _save(figure, path)


def confusion(counts_KxK: np.ndarray, classes: Sequence[str], path: str | os.PathLike[str]) -> None:
    """A confusion matrix: row = truth, column = prediction, shade = share of the row.

    With few classes every cell shows its count; with more than 40 the names are left out as well.

    Args:
      counts_KxK: how many examples of class [row] were taken for class [column].
      classes: K names, or () for numbers.
      path: the PNG to write.

    Raises:
      UserError: `path` cannot be written.
    """
    counts_KxK = np.asarray(counts_KxK)
    k = len(counts_KxK)
    side = min(max(0.55 * k, 4.0), 11.0)  # inches
    figure = _figure(side + 1.6, side + 1.0)
    axes = figure.subplots()
    from matplotlib.colors import PowerNorm

    share_KxK = counts_KxK / np.maximum(counts_KxK.sum(1, keepdims=True), 1)
    # The square root of the share: rare mistakes are what one looks for.
    image = axes.imshow(share_KxK, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    bar.set_label("share of the true class")
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    total, right = counts_KxK.sum(), np.trace(counts_KxK)
    axes.set_title(f"{right:,.0f} of {total:,.0f} right ({100 * right / max(total, 1):.2f} %)")
    cell = 72 * side / k  # points; a letter is about 0.6 of its size wide
    if k <= 40:
        size = 9 if k <= 20 else 7
        names = [_short(name, 16) for name in _names(classes, k)]
        wide = max(map(len, names)) * 0.6 * size > 0.9 * cell
        axes.set_xticks(range(k), names, fontsize=size, rotation=90 if wide else 0)
        axes.set_yticks(range(k), names, fontsize=size)
    if k <= 20:
        fits = 0.85 * cell / (0.6 * len(f"{counts_KxK.max():.0f}"))
        for (row, column), count in np.ndenumerate(counts_KxK):
            colour = "white" if share_KxK[row, column] > 0.3 else "#24292f"
            text = f"{count:.0f}" if count else ""
            axes.text(
                column, row, text, ha="center", va="center", fontsize=min(9, fits), color=colour
            )
    _save(figure, path)


def roc(curves_KxPx2: np.ndarray, classes: Sequence[str], path: str | os.PathLike[str]) -> None:
    """ROC curves, as `ranking.RocCurve` gives them: one, or one for each class against the rest.

    Of more than 12 classes the first 12 are named, the others pale. Classes that are NaN are left
    out.

    Args:
      curves_KxPx2: false positive rate and true positive rate.
      classes: K names, or () for numbers.
      path: the PNG to write.

    Raises:
      UserError: `path` cannot be written.
    """
    labels = ("false positive rate", "true positive rate")
    figure, axes = _class_curves(curves_KxPx2, classes, labels, drawstyle="default")
    axes.plot([0, 1], [0, 1], linewidth=0.8, linestyle=":", color="#6e7781")
    _save(figure, path)


def precision_recall(
    curves_KxPx2: np.ndarray, classes: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """As `roc`, of `ranking.PrecisionRecallCurve`: recall and precision, in steps."""
    labels = ("recall", "precision")
    figure, _ = _class_curves(curves_KxPx2, classes, labels, drawstyle="steps-pre")
    _save(figure, path)


def examples(
    x_NxHxWxC: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    predictions: Sequence[int] | np.ndarray,
    probabilities: Sequence[float] | np.ndarray,
    classes: Sequence[str],
    path: str | os.PathLike[str],
    *,
    columns: int = 6,
    rows: int = 6,
) -> None:
    """A grid of the first images, each under its prediction: green if right, red with the truth.

    Args:
      x_NxHxWxC: uint8 as they are; floats are stretched from their least to their greatest value,
        over all images together. Also NxHxW.
      labels, predictions: N class numbers.
      probabilities: N, what the model gave its prediction, 0 to 1.
      classes: K names, or () for numbers.
      path: the PNG to write.
      columns, rows: size of the grid; fewer images make a smaller one.

    Raises:
      UserError: `path` cannot be written.
    """
    x = np.asarray(x_NxHxWxC)[: columns * rows]
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
        low, high = float(x.min(initial=np.inf)), float(x.max(initial=-np.inf))
        x = (x - low) / max(high - low, 1e-12)
    columns = max(1, min(columns, len(x)))
    rows = max(1, math.ceil(len(x) / columns))
    names = _names(classes, 1 + int(max([0, *labels, *predictions])))
    width, height = 1.5 * columns, 1.8 * rows  # inches; an image takes 1.4 x 1.4 of its 1.5 x 1.8
    figure = _figure(width, height, fitted=False)
    for i, (image, truth, guess, p) in enumerate(zip(x, labels, predictions, probabilities)):
        left, below = 1.5 * (i % columns) + 0.05, height - 1.8 * (i // columns) - 1.77
        axes = figure.add_axes((left / width, below / height, 1.4 / width, 1.4 / height))
        axes.set_axis_off()
        image = image if image.shape[-1] == 3 else image[..., 0]
        full = 255 if image.dtype == np.uint8 else 1
        axes.imshow(image, cmap="gray", vmin=0, vmax=full, interpolation="nearest")
        right = int(truth) == int(guess)
        lines = [f"{_short(names[int(guess)], 15)} ({100 * p:.0f} %)"]
        lines += [] if right else [f"truth: {_short(names[int(truth)], 15)}"]
        axes.set_title("\n".join(lines), fontsize=8, color=RIGHT if right else WRONG, pad=3)
    _save(figure, path)


def _class_curves(
    curves_KxPx2: Any, classes: Sequence[str], labels: tuple[str, str], drawstyle: str
) -> tuple[Any, Any]:
    """A figure of curves in the unit square, and its axes; one curve needs no name."""
    curves_KxPx2, named = np.asarray(curves_KxPx2, float), 12
    k = len(curves_KxPx2)
    figure = _figure(6.8 if k > 1 else 5.0, 4.6)
    axes = figure.subplots()
    for i, (curve_Px2, name, colour) in enumerate(
        zip(curves_KxPx2, _names(classes, k), _repeat(COLOURS))
    ):
        if np.isnan(curve_Px2).any():
            continue
        style: dict[str, Any] = {"color": "#6e7781", "linewidth": 0.6, "alpha": 0.5, "zorder": 1}
        if i < named:
            line = "-" if i < len(COLOURS) else "--"
            style = {"color": colour, "linewidth": 1.4, "linestyle": line}
            style |= {"label": _short(name, 16)} if k > 1 else {}
        axes.plot(*curve_Px2.T, drawstyle=drawstyle, **style)
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_aspect("equal")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure, axes


def _curve(axes: Any, x: np.ndarray, y: np.ndarray, split: str, colour: str) -> None:
    """Training as a smoothed line over the pale raw one, evaluations as points on a line."""
    if split != "train":
        axes.plot(x, y, "o-", markersize=3.5, linewidth=1.6, color=colour, label=split)
        return
    window = len(y) // 50
    if window < 2:
        axes.plot(x, y, "o-" if len(y) == 1 else "-", linewidth=1.4, color=colour, label=split)
        return
    axes.plot(x, y, linewidth=0.8, alpha=0.3, color=colour)
    # At both ends the mean is over as much of the window as there is.
    kernel = np.ones(2 * window + 1)
    good = np.isfinite(y)
    total = np.convolve(np.where(good, y, 0), kernel, "same")
    count = np.convolve(good.astype(float), kernel, "same")
    smooth = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    axes.plot(x, smooth, linewidth=1.6, color=colour, label=split)


def _spans_decades(metrics: Sequence[Mapping[str, Any]]) -> bool:
    losses = np.array([line["loss"] for line in metrics if "loss" in line], float)
    losses = losses[np.isfinite(losses)]
    return bool(len(losses) and losses.min() > 0 and losses.max() > 30 * losses.min())


def _repeat(colours: Sequence[str]) -> Any:
    while True:
        yield from colours


def _names(classes: Sequence[str], k: int) -> list[str]:
    return [str(name) for name in classes] if len(classes) >= k else [str(i) for i in range(k)]


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _figure(width: float, height: float, fitted: bool = True) -> Any:
    """A figure of so many inches, drawn by Agg; `fitted` makes room for all labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained" if fitted else None)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Written beside its place and moved there: a reader never sees half a picture."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room or give a folder that can be written"
        ) from error
