"""Learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3): --lr-find.

The learning rate rises by the same factor each step, from where nothing happens to where the loss
blows up, over the experiment's own steps: its data in its order, augmentation, optimizer. Where an
optimizer has several learning rates, all rise together and keep their proportions; what is said is
the one that a run logs.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxeco import config, hosts, plots
from jaxeco import folder as folders
from jaxeco.config import Loaded
from jaxeco.description import describe, flatten
from jaxeco.errors import RunFailed, UserError
from jaxeco.experiment import Steps
from jaxeco.optim import Optimizer
from jaxeco.plan import plan
from jaxeco.schedules import POSITIVE, Constant, Schedule, require

STEPS = 200
LOWEST, HIGHEST = 1e-7, 10.0  # of the rate; farther where the experiment's own is near an end
BLOWN = 4.0  # times the least smoothed loss: there the test ends
BLUR = STEPS / 50  # steps: standard deviation of the Gaussian that smooths the loss


@dataclass(frozen=True)
class Ramp(Schedule):
    """Up to `peak` at the last step, by the same factor each step, from peak/span at the first."""

    span: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, POSITIVE, "span")

    def _rate(self, np_: ModuleType, step: Any, end: int) -> Any:
        return self.peak * self.span ** (step / max(end - 1, 1) - 1.0)


@dataclass(frozen=True)
class Found:
    """What a test has come to.

    Attributes:
      rate_N: learning rates, ascending, one a step; N is less than STEPS where the loss blew up.
      loss_N, smooth_N: of the step's batch before its update; and smoothed over neighbours.
      least, steepest: where the smoothed loss is least, and where before that it falls the most
        for the same factor of the rate.
      suggested: a tenth of `least`, to two digits.
    """

    rate_N: np.ndarray
    loss_N: np.ndarray
    smooth_N: np.ndarray
    least: float
    steepest: float
    suggested: float


def run(loaded: Loaded, workdir: Path | None) -> int:
    """Makes the test, draws and tells it; returns the exit status. Leaves no run behind.

    Args:
      workdir: where lr_find.png and lr_find.csv go; None: runs/<name>-lr-find. Those of a test
        before are replaced.

    Raises:
      UserError: something does not fit, or the optimizer has no learning rate.
      RunFailed: the loss falls at no learning rate.
    """
    found = test(loaded)
    if not hosts.first():
        return 0
    folder = workdir or Path("runs") / f"{loaded.experiment.name}-lr-find"
    picture(found, folder / "lr_find.png")
    text = io.StringIO()
    rows = zip(found.rate_N, found.loss_N, found.smooth_N)
    lines = csv.writer(text, lineterminator="\n")
    lines.writerows([("lr", "loss", "smoothed"), *(map(float, row) for row in rows)])
    folders.write(folder / "lr_find.csv", text.getvalue())
    print(
        f"suggested lr: {found.suggested:g}, a tenth of where the smoothed loss is least"
        f" ({found.least:.2g}); it falls most steeply at {found.steepest:.2g}; see"
        f" {folder / 'lr_find.png'}"
    )
    for line in usage(loaded, found.suggested):
        print(line)
    return 0


def test(loaded: Loaded) -> Found:
    """Trains for STEPS steps, or until the loss blows up, at a rising learning rate.

    Raises:
      UserError, RunFailed: as `run`.
    """
    ex = loaded.experiment
    own = rate_of(ex.optimizer)
    low, high = min(LOWEST, own / 1e4), max(HIGHEST, own * 1e2)
    rising = scaled(ex.optimizer, lambda peak: Ramp(peak * high / own, span=high / low))
    # a guard would hide what is looked for
    p = plan(replace(ex, optimizer=rising, length=Steps(STEPS), guard=None))
    at_once = max(n for n in range(1, STEPS + 1) if STEPS % n == 0 and n <= ex.steps_per_call)
    call, state, losses = p.compiled(), p.start(), list[float]()
    with p.feed() as feed:
        for step in range(0, STEPS, at_once):
            state, sums = call(state, feed.resident, feed.fed(step, at_once))
            total_n, weight_n = np.asarray(sums["loss"].total), np.asarray(sums["loss"].weight)
            losses += (total_n / np.where(weight_n > 0, weight_n, 1)).tolist()
            if blown(losses):
                break
    rates = [p.ex.optimizer.learning_rate(step, STEPS) for step in range(len(losses))]
    return read(rates, losses)


def read(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """What the losses at rising rates say; from the first loss on that is not finite, nothing.

    Raises:
      RunFailed: the loss does not fall.
    """
    good = int(np.argmin(np.isfinite([*losses, math.nan])))
    rate_N, loss_N = np.array(rates[:good]), np.array(losses[:good])
    if good < 3:
        raise RunFailed("the loss is not finite from the start: look at the data and the model")
    smooth_N = smoothed(loss_N)
    best = int(np.argmin(smooth_N))
    slope_N = np.gradient(smooth_N)
    steepest = int(np.argmin(slope_N[: best + 1]))
    if smooth_N[0] - smooth_N[best] < 0.01 * abs(smooth_N[0]):
        raise RunFailed("the loss falls at no learning rate: look at the data and the model")
    suggested = float(f"{rate_N[best] / 10:.2g}")
    return Found(rate_N, loss_N, smooth_N, float(rate_N[best]), float(rate_N[steepest]), suggested)


def smoothed(loss_N: np.ndarray) -> np.ndarray:
    """A mean over the steps around, weighted by a Gaussian; at an end, over those on one side."""
    step_N = np.arange(len(loss_N))
    weight_NxN = np.exp(-0.5 * ((step_N[:, None] - step_N) / BLUR) ** 2)
    return weight_NxN @ loss_N / weight_NxN.sum(1)


def blown(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or the last smoothed one far above the least."""
    if not np.isfinite(losses).all():
        return True
    smooth_N = smoothed(np.array(losses))
    return bool(smooth_N[-1] > BLOWN * smooth_N.min() > 0)


def scaled(optimizer: Optimizer, schedule: Callable[[float], Schedule]) -> Any:
    """The optimizer with another schedule for each of its learning rates, and of its parts'.

    Args:
      schedule: from the rate, or the peak of the schedule that is there, to the new one.
    """

    def other(name: str, value: Any) -> Any:
        if isinstance(value, Schedule):
            return schedule(value.peak)
        if name == "lr" and isinstance(value, int | float):
            return schedule(value)
        if isinstance(value, tuple):
            return tuple(other("", entry) for entry in value)
        if isinstance(value, Optimizer) and is_dataclass(value):
            inner = {f.name: other(f.name, getattr(value, f.name)) for f in fields(value)}
            return replace(value, **inner)
        return value

    return other("", optimizer)


def rate_of(optimizer: Optimizer) -> float:
    """The learning rate that a run with this optimizer logs, at its peak.

    Raises:
      UserError: there is none, or it is 0.
    """
    rate = float(scaled(optimizer, Constant).learning_rate(0, 1))
    if not 0 < rate < math.inf:
        raise UserError(f"--lr-find: the learning rate is {rate:g}: expected one above 0")
    return rate


def usage(loaded: Loaded, rate: float) -> list[str]:
    """How a run gets that learning rate: by the word that turns out to set it, if there is one."""
    optimizer = loaded.experiment.optimizer
    peaks: list[float] = []

    def noted(peak: float) -> Schedule:
        peaks.append(peak)
        return Constant(peak)

    scaled(optimizer, noted)
    factor = f"{rate / rate_of(optimizer):.2g}"
    several = f"all {len(peaks)} learning rates rose together: they were {factor} times their own"
    paths = (
        [f"optimizer.{path}" for path in flatten(describe(optimizer))] if len(peaks) == 1 else []
    )
    paths = [path for path in paths if path.endswith((".lr.peak", ".lr"))]
    for name in ("lr", *sorted(paths, key=lambda path: path.endswith(".lr"))):  # keeps a schedule
        others = [word for word in loaded.assignments if not word.startswith(f"{name}=")]
        words = [*others, f"{name}={rate:g}"]
        try:
            changed = config.load(loaded.path, words).experiment
        except UserError:
            continue
        if math.isclose(rate_of(changed.optimizer), rate, rel_tol=1e-6):
            line = f"to use it: python -m jaxeco.run {loaded.path} {' '.join(words)}"
            return [line, several] if len(peaks) > 1 else [line]
    return [f"to use it, multiply the learning rates by {factor}"]


def picture(found: Found, path: Path) -> None:
    """The loss against the learning rate, and the suggestion."""
    figure = plots._figure(6.4, 4.0)
    axes = figure.subplots()
    blue, orange, green = plots.COLOURS[:3]
    axes.plot(found.rate_N, found.loss_N, color=blue, linewidth=0.8, alpha=0.35)
    axes.plot(found.rate_N, found.smooth_N, color=blue, linewidth=1.6, label="loss, smoothed")
    for at, label, mark in (
        (found.steepest, f"steepest descent, {found.steepest:.2g}", "s"),
        (found.least, f"least, {found.least:.2g}", "o"),
    ):
        y = found.smooth_N[np.searchsorted(found.rate_N, at)]
        axes.plot(at, y, mark, color=green, markersize=6, label=label)
    label = f"suggested, {found.suggested:g}"
    axes.axvline(found.suggested, color=orange, linewidth=1.4, linestyle="--", label=label)
    low, first = found.smooth_N.min(), found.smooth_N[0]
    axes.set_ylim(low - 0.08 * (first - low), first + 0.6 * (first - low))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    plots._save(figure, path)
