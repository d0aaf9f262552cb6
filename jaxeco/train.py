"""Training as pure functions: the State, how it begins, many steps, one step, its gradient.

A run is a pure function of (experiment, seed). All that changes is one pytree, `State`; the batch
at step t is a pure function of (seed, t); so to resume is to load a State.

Dimensions: A micro-batches, B examples, n steps in one call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxeco import axes
from jaxeco.data.image import augmented
from jaxeco.data.pipeline import assemble
from jaxeco.experiment import Experiment
from jaxeco.forward import Sums, forward, measure, preprocess
from jaxeco.guard import Record, judged

NO_STEP = 2**32 - 1  # what a run draws from this number of its key is the same in all steps


class State(struct.PyTreeNode):
    """Everything that changes during training."""

    step: jax.Array  # i32[]: steps taken
    offset: jax.Array  # i32[]: batches passed over by roll-backs; step t sees batch t + offset
    params: Any
    variables: Any  # the model's other collections, such as batch statistics
    opt_state: Any
    key: jax.Array  # the run's random key; step t draws from fold_in(key, t)
    guard: Any = None  # a Record, where the experiment has a guard


def init(
    ex: Experiment, tx: optax.GradientTransformation, key: jax.Array, batch: dict[str, Any]
) -> State:
    """The State before step 0. Of `batch` only shapes and dtypes matter."""
    init_key, run_key = jax.random.split(key)
    variables = ex.model.init(init_key, preprocess(ex, batch)["x"], train=False)
    params = variables.pop("params")
    record = Record.start() if ex.guard else None
    return State(jnp.int32(0), jnp.int32(0), params, variables, tx.init(params), run_key, record)


def many_steps(
    step: Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]],
    state: State,
    resident: Any,
    fed_n: Any,
) -> tuple[State, dict[str, Any]]:
    """n steps in one call; returns the last State and the sums of each step, [n, ...]."""
    first = jax.tree.map(lambda a: a[0], fed_n)
    if len(jax.tree.leaves(fed_n)[0]) == 1:  # no loop: XLA's convolutions are slower inside one
        state, sums = step(state, assemble(resident, first))
        return state, jax.tree.map(lambda a: a[None], sums)
    return jax.lax.scan(lambda state, fed: step(state, assemble(resident, fed)), state, fed_n)


def train_step(
    ex: Experiment, tx: optax.GradientTransformation, state: State, batch: dict[str, Any]
) -> tuple[State, dict[str, Any]]:
    """One step of training. Pure; `parallel` compiles this same function in three ways.

    Args:
      batch: "x", "y", "mask" of B examples: all, or inside shard_map and pmap one device's share.

    Returns:
      the next State, and the batch's loss and metrics as sums and weights; with a guard also its
      `Verdict`, as "guard".
    """
    variables, sums, grads = gradient(ex, state, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    after = state.replace(
        step=state.step + 1, params=params, variables=variables, opt_state=opt_state
    )
    if ex.guard:
        after, verdict = judged(ex.guard, state, after, sums["loss"], grads, updates)
        return after, {**sums, "guard": verdict}
    return after, sums


def gradient(ex: Experiment, state: State, batch: dict[str, Any]) -> tuple[Any, Sums, Any]:
    """The model's other variables after a batch, its sums, and the gradient of its mean loss."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    batch = preprocess(ex, batch)
    keys_B = axes.example_keys(augment_key, len(batch["mask"]))
    own = {"key": jax.random.fold_in(state.key, NO_STEP)}
    batch = augmented(ex.augment, keys_B, batch | own)
    batch = {name: value for name, value in batch.items() if name != "key"}
    variables, sums, grads = accumulated_grads(ex, state, batch, dropout_key)
    sums, grads = axes.global_sum((sums, grads))
    weight = sums["loss"].weight
    weight = jnp.where(weight > 0, weight, 1)  # where nothing counts, the gradient is 0
    return variables, sums, jax.tree.map(lambda g: g / weight, grads)


def accumulated_grads(
    ex: Experiment, state: State, batch: dict[str, Any], dropout_key: jax.Array
) -> tuple[Any, Sums, Any]:
    """As `summed_grads`, over `ex.grad_accum` micro-batches one after the other."""
    if ex.grad_accum == 1:
        return summed_grads(ex, state.params, state.variables, batch, dropout_key)
    A = ex.grad_accum
    # every A-th example, so that each micro-batch stays spread over all devices
    micro_AxB = jax.tree.map(lambda a: a.reshape(-1, A, *a.shape[1:]).swapaxes(0, 1), batch)
    keys_A = jax.random.split(dropout_key, A)

    def body(carry: Any, micro: Any) -> tuple[Any, None]:
        variables, *totals = carry
        variables, *new = summed_grads(ex, state.params, variables, *micro)
        return (variables, *jax.tree.map(jnp.add, totals, new)), None

    first = jax.tree.map(lambda a: a[0], (micro_AxB, keys_A))
    rest = jax.tree.map(lambda a: a[1:], (micro_AxB, keys_A))
    start = summed_grads(ex, state.params, state.variables, *first)
    return jax.lax.scan(body, start, rest)[0]


def summed_grads(
    ex: Experiment, params: Any, variables: Any, batch: dict[str, Any], dropout_key: jax.Array
) -> tuple[Any, Sums, Any]:
    """The model's other variables afterwards, sums, and the gradient of the summed loss."""

    def summed_loss(params: Any) -> tuple[jax.Array, Any]:
        outputs, after = forward(ex, params, variables, batch["x"], dropout_key)
        sums = measure(ex, outputs, batch, training=True)
        return sums["loss"].total, (after, sums)

    grads, (variables, sums) = jax.grad(summed_loss, has_aux=True)(params)
    return variables, sums, grads
