"""What becomes of a run whose loss goes bad: it ends, passes over the step, or goes back.

Which steps are bad, and how a step leaves all as it was, stands in `guard.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxeco.checkpoint import Checkpoints
from jaxeco.errors import RunFailed
from jaxeco.experiment import Experiment
from jaxeco.log import Log
from jaxeco.plan import Plan
from jaxeco.train import State


class Diverged(RunFailed):
    """The loss is not finite, and no guard has an answer. `fit` adds the State that it came to.

    Attributes:
      step: steps taken when the loss was computed; a State of that step is suspect itself.
      training: whether it was the loss of a step, not that of an evaluation.
    """

    state: State

    def __init__(self, message: str, step: int, training: bool = False) -> None:
        super().__init__(message)
        self.step, self.training = step, training


def skipped(ex: Experiment, sums: dict[str, Any], first: int) -> Iterator[str]:
    """What is to be said of steps that the guard has skipped.

    Args:
      sums: of each step, [N, ...], on the host.
      first: steps taken before them.

    Raises:
      Diverged: a step went bad, and there is no guard that skips it, or its limit is passed.
    """
    guard, loss_N = ex.guard, sums["loss"].total
    verdict = sums["guard"] if guard else None
    for i in np.flatnonzero(verdict.bad if verdict else ~np.isfinite(loss_N)).tolist():
        why = f"the loss is {loss_N[i] / (sums['loss'].weight[i] or 1):.6g}"
        if guard and verdict and np.isfinite(loss_N[i]):
            norm, moved = verdict.gradient_norm[i], verdict.update_norm[i]
            if not np.isfinite(norm):
                why += f", the gradient's norm {norm},"
            elif not np.isfinite(moved):
                why += f", the update's norm {moved},"
            else:
                why += f", {guard.factor:g} times its average of {verdict.average[i]:.6g} or more,"
        why += f" at step {first + i + 1}"
        if guard is None or verdict is None or guard.then != "skip":
            raise Diverged(why, first + i, training=True)
        if verdict.count[i] > guard.limit:
            raise Diverged(f"{why}, after {guard.limit} skipped steps", first + i, training=True)
        yield f"{why}: skipped ({verdict.count[i]} of at most {guard.limit})"


@dataclass(frozen=True)
class Rollback:
    """Where a roll-back leads."""

    why: str
    bad: int  # steps taken before the bad one
    step: int  # the last one before it at which this run saves, wherever it is stopped
    offset: int  # of the batches from there on
    count: int  # roll-backs, with this one


def way_back(plan: Plan, error: Diverged) -> Rollback:
    """Where the guard has the run go on from; raises `error` if there is no guard, or no more.

    A function of the step, so that a run that was interrupted on the way goes back as far as one
    that was not.
    """
    ex = plan.ex
    guard, record, bad = ex.guard, error.state.guard, error.step
    if guard is None or record is None or guard.then != "rollback" or not error.training:
        raise error
    if int(record.count) >= guard.limit:
        error.args = (f"{error}, after {guard.limit} roll-backs",)
        raise error
    step = plan.last_saved(bad)
    offset = int(error.state.offset) + bad - step + 1
    return Rollback(str(error), bad, step, offset, int(record.count) + 1)


def rolled_back(plan: Plan, checkpoints: Checkpoints, log: Log, to: Rollback) -> State:
    """The State that a run goes on from after a roll-back; the log forgets what came after it."""
    there = checkpoints.restore(plan.abstract_state(), up_to=to.step) if to.step else None
    state, step = there or (plan.start(), 0)
    log.rewind(step)
    batches = f"batches of steps {step + 1:,} to {to.bad + 1:,}"
    log.warn(f"{to.why}: back to step {step:,}, without the {batches} (roll-back {to.count})")
    if step != to.step:
        log.warn(f"checkpoint {to.step} is gone: the run is not the one it would have been")
    offset = to.offset + to.step - step
    return state.replace(
        offset=jax.device_put(np.int32(offset), state.offset.sharding),
        guard=state.guard.replace(
            count=jax.device_put(np.int32(to.count), state.guard.count.sharding)
        ),
    )
