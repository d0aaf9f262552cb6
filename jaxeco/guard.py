"""Which steps have gone bad, and what a step itself does about it: leaves everything as it was.

To go back to a checkpoint is the loop's task (`fit`), which reads the verdicts of this.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxeco.experiment import Guard
from jaxeco.metrics import Mean

MEMORY = 100  # steps that the running average of the loss goes back, about


class Record(struct.PyTreeNode):
    """What a State remembers where a guard is on."""

    count: jax.Array  # i32[]: steps skipped so far, or roll-backs
    steps: jax.Array  # i32[]: steps in the average, at most MEMORY
    loss: jax.Array  # f32[]: running average over the good ones

    @classmethod
    def start(cls) -> "Record":
        return cls(jnp.int32(0), jnp.int32(0), jnp.float32(0))


class Verdict(NamedTuple):
    """What is told of each step."""

    bad: Any  # bool[]
    count: Any  # i32[]: `Record.count` after it
    gradient_norm: Any  # f32[]
    update_norm: Any  # f32[]
    average: Any  # f32[]: of the loss of good steps before it


def judged(
    guard: Guard, before: Any, after: Any, loss: Mean, grads: Any, updates: Any
) -> tuple[Any, Verdict]:
    """The State after a step as it shall be, and what is to be said of the step. Pure.

    A step is bad if its loss, the norm of its gradient or of its update is not finite; so a State
    that no bad step led to is finite. With a factor it is bad, too, if its loss lies above the
    average of the good steps before it by more than factor - 1 times the average's size.

    Args:
      before, after: the States around the step; of the whole batch, on every shard.
    """
    record, weighs = before.guard, loss.weight > 0
    value = loss.total / jnp.where(weighs, loss.weight, 1)
    norm, moved = optax.tree.norm(grads), optax.tree.norm(updates)
    bad = ~(jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(moved))
    if guard.factor is not None:
        highest = record.loss + (guard.factor - 1) * jnp.abs(record.loss)
        bad |= (record.steps > 0) & (value > highest)
    average = record.loss
    steps = jnp.minimum(record.steps + 1, MEMORY)
    seen = Record(record.count, steps, record.loss + (value - record.loss) / steps)
    record = jax.tree.map(partial(jnp.where, ~bad & weighs), seen, record)
    if guard.then == "skip":
        kept = jax.tree.map(partial(jnp.where, bad), before, after)
        after = kept.replace(step=after.step)
        record = record.replace(count=record.count + bad)
    return after.replace(guard=record), Verdict(bad, record.count, norm, moved, average)
