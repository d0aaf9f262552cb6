"""Learning-rate schedules, as frozen descriptions that stretch with the length of the run.

A moment of a run is written as a float (a fraction of the run: 0.5 is its middle) or as an int (a
count of steps: 500). Steps are numbered from 0, and step t uses the rate at t. Where a schedule
rises from a value or falls to one, that value lies one step outside the run: the start at step -1,
the end at step `total_steps`. So no step is spent at a rate of 0. The peak itself is reached, but
by a warm-up that is longer than the run.

One formula serves two callers: with a traced step it is part of the compiled train step (an optax
schedule), with a Python int it is plain numpy, so that the log can ask without touching a device.
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Range(NamedTuple):
    """A condition on a number, and how to say it."""

    holds: Callable[[Any], bool]
    words: str


NOT_NEGATIVE = Range(lambda v: 0 <= v < math.inf, "a number of at least 0")
POSITIVE = Range(lambda v: 0 < v < math.inf, "a number above 0")
FRACTION = Range(lambda v: 0 <= v < 1, "a number of at least 0 and below 1")


def require(owner: Any, allowed: Range, *names: str) -> None:
    """Checks numeric fields; arrays pass, since a sweep puts traced numbers there.

    Raises:
      ValueError: a field is not a number, or outside the range.
    """
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, (jax.Array, np.ndarray)):
            continue
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not allowed.holds(value):
            raise ValueError(f"{type(owner).__name__}.{name}={value!r}: expected {allowed.words}")


def _check_moment(owner: Any, name: str, moment: Any) -> None:
    whole = isinstance(moment, int) and not isinstance(moment, bool) and moment >= 0
    if not whole and not (isinstance(moment, float) and 0 <= moment <= 1):
        raise ValueError(
            f"{type(owner).__name__}.{name}={moment!r}: expected a fraction of the run (a float"
            " from 0.0 to 1.0) or a count of steps (an int of at least 0)"
        )


def _step_at(moment: int | float, total_steps: int) -> int:
    """The step, nearest if need be, at a moment of the run."""
    return moment if isinstance(moment, int) else round(moment * total_steps)


def _between(np_: ModuleType, step: Any, begin: int, end: int, first: Any, last: Any) -> Any:
    """The straight line from `first` at step `begin` to `last` at `end`, level outside of it."""
    share = np_.clip((step - begin) / max(end - begin, 1), 0, 1)
    return (1 - share) * first + share * last  # this form meets both ends exactly


@dataclass(frozen=True)
class Schedule(ABC):
    """The rate as a function of the step.

    Raises:
      ValueError: a rate is negative, or a moment neither a fraction nor a count.
    """

    peak: float  # the highest rate

    def __post_init__(self) -> None:
        require(self, NOT_NEGATIVE, "peak")

    def build(self, total_steps: int) -> Callable[[Any], Any]:
        """An optax schedule: from a step, i32[] or int, to its rate, f32[] or float.

        Raises:
          ValueError: `total_steps` is below 1.
        """
        if total_steps < 1:
            raise ValueError(f"{type(self).__name__}: total_steps={total_steps}: expected >= 1")

        def rate(step: Any) -> Any:
            traced = any(isinstance(v, jax.Array) for v in (step, *vars(self).values()))
            return self._rate(jnp if traced else np, step, total_steps)

        return rate

    @abstractmethod
    def _rate(self, np_: ModuleType, step: Any, end: int) -> Any:
        """The rate at `step` of `end`, by the functions of `np_`: numpy's or jax.numpy's."""


@dataclass(frozen=True)
class _WarmedUp(Schedule):
    """Climbs in equal stairs for `warmup`, reaches the peak on the step after, then descends."""

    warmup: int | float = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moment(self, "warmup", self.warmup)

    def _rate(self, np_: ModuleType, step: Any, end: int) -> Any:
        top = _step_at(self.warmup, end)
        climb = _between(np_, step, -1, top, 0.0, self.peak)
        return np_.where(step < top, climb, self._descent(np_, step, top, end))

    @abstractmethod
    def _descent(self, np_: ModuleType, step: Any, top: int, end: int) -> Any:
        """The rate from step `top`, where it is the peak, on."""


@dataclass(frozen=True)
class Constant(_WarmedUp):
    """`peak` throughout. With a warm-up of w steps, step t < w has peak·(t+1)/(w+1)."""

    def _descent(self, np_: ModuleType, step: Any, top: int, end: int) -> Any:
        return self.peak + 0.0 * step  # as an array even where `peak` is a Python number


@dataclass(frozen=True)
class Step(_WarmedUp):
    """`peak` times `factor` for every boundary passed; step t has passed boundary b if t >= b."""

    boundaries: tuple[int | float, ...] = field(default=(0.5, 0.75), kw_only=True)
    factor: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, POSITIVE, "factor")
        for moment in self.boundaries:
            _check_moment(self, "boundaries", moment)

    def _descent(self, np_: ModuleType, step: Any, top: int, end: int) -> Any:
        passed = sum((step >= _step_at(b, end) for b in self.boundaries), 0 * step)
        return self.peak * self.factor ** (1.0 * passed)


@dataclass(frozen=True)
class Linear(_WarmedUp):
    """From `peak`, straight to `final`, which step `total_steps` would have.

    With no warm-up, steps 0 and T-1 of T have peak and final + (peak - final)/T. With `until` it is
    there by that moment and stays: what has a rate of 0 from then on no longer learns.
    """

    final: float = field(default=0.0, kw_only=True)
    until: int | float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, NOT_NEGATIVE, "final")
        _check_moment(self, "until", self.until)

    def _descent(self, np_: ModuleType, step: Any, top: int, end: int) -> Any:
        return _between(np_, step, top, _step_at(self.until, end), self.peak, self.final)


@dataclass(frozen=True)
class Cosine(Linear):
    """From `peak`, along half a cosine to `final`, which step `total_steps` would have.

    SGDR (Loshchilov & Hutter 2017, eq. 5) without restarts:
    final + (peak - final)·(1 + cos(π·(t - w)/(T - w)))/2 after w steps of warm-up.
    """

    def _descent(self, np_: ModuleType, step: Any, top: int, end: int) -> Any:
        angle = _between(np_, step, top, _step_at(self.until, end), 0.0, math.pi)
        share = (1 - np_.cos(angle)) / 2
        return (1 - share) * self.peak + share * self.final


@dataclass(frozen=True)
class Triangular(Schedule):
    """Straight up from `start` at step -1 to `peak`, straight down to `final` at `total_steps`.

    `at` is the moment of the peak (Smith & Topin 2018, "super-convergence", with one cycle).
    """

    at: int | float = 0.5
    start: float = field(default=0.0, kw_only=True)
    final: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_moment(self, "at", self.at)
        require(self, NOT_NEGATIVE, "start", "final")

    def _rate(self, np_: ModuleType, step: Any, end: int) -> Any:
        top = _step_at(self.at, end)
        up = _between(np_, step, -1, top, self.start, self.peak)
        down = _between(np_, step, top, end, self.peak, self.final)
        return np_.where(step < top, up, down)
