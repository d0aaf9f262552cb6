"""Training: State, how it begins, one step, many steps, the loop. Reading order is running order.

A run is a pure function of (experiment, seed). All that changes is one pytree, `State`; the batch
at step t is a pure function of (seed, t); so to resume is to load a State.

Dimensions: A micro-batches, B examples, n steps in one call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxeco import axes, parallel
from jaxeco.checkpoint import Checkpoints
from jaxeco.data.dataset import Dataset
from jaxeco.data.image import augmented
from jaxeco.data.pipeline import Feed, assemble, fits
from jaxeco.errors import RunFailed, UserError
from jaxeco.evaluate import Sums, eval_step, evaluate, forward, measure, preprocess, values
from jaxeco.experiment import Experiment
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log


class State(struct.PyTreeNode):
    """Everything that changes during training."""

    step: jax.Array  # i32[]: steps taken
    params: Any
    variables: Any  # the model's other collections, such as batch statistics
    opt_state: Any
    key: jax.Array  # the run's random key; step t draws from fold_in(key, t)


def init(ex: Experiment, tx: optax.GradientTransformation, batch: dict[str, Any]) -> State:
    """The State before step 0. Of `batch` only shapes and dtypes matter."""
    init_key, run_key = jax.random.split(jax.random.key(ex.seed))
    variables = ex.model.init(init_key, preprocess(ex, batch)["x"], train=False)
    params = variables.pop("params")
    return State(jnp.int32(0), params, variables, tx.init(params), run_key)


def train_step(
    ex: Experiment, tx: optax.GradientTransformation, state: State, batch: dict[str, Any]
) -> tuple[State, Sums]:
    """One step of training. Pure; `parallel` compiles this same function in three ways.

    Args:
      batch: "x", "y", "mask" of B examples: all, or inside shard_map and pmap one device's share.

    Returns:
      the next State, and the batch's loss and metrics as sums and weights.
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    batch = preprocess(ex, batch)
    batch = augmented(ex.augment, axes.example_keys(augment_key, len(batch["mask"])), batch)
    variables, sums, grads = accumulated_grads(ex, state, batch, dropout_key)
    sums, grads = axes.global_sum((sums, grads))
    grads = jax.tree.map(lambda g: g / sums["loss"].weight, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, variables, opt_state, state.key), sums


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


def many_steps(
    step: Callable[[State, dict[str, Any]], tuple[State, Sums]],
    state: State,
    resident: Any,
    fed_n: Any,
) -> tuple[State, Sums]:
    """n steps in one call; returns the last State and the sums of each step, [n, ...]."""
    first = jax.tree.map(lambda a: a[0], fed_n)
    if len(jax.tree.leaves(fed_n)[0]) == 1:  # no loop: XLA's convolutions are slower inside one
        state, sums = step(state, assemble(resident, first))
        return state, jax.tree.map(lambda a: a[None], sums)
    return jax.lax.scan(lambda state, fed: step(state, assemble(resident, fed)), state, fed_n)


@dataclass(frozen=True)
class Plan:
    """An experiment with its data opened and its parts built: a run without its State."""

    ex: Experiment
    train: Dataset
    evals: dict[str, Dataset]
    mesh: jax.sharding.Mesh
    steps_per_epoch: int
    steps: int
    tx: optax.GradientTransformation

    @property
    def grids(self) -> tuple[int, int, int]:
        """Steps between evaluations, between checkpoints, and between lines of the log."""
        every = (self.ex.eval_every, self.ex.save_every, self.ex.log_every)
        eval_, save, log = (stretch.steps(self.steps_per_epoch) for stretch in every)
        return eval_, save, log

    @property
    def step(self) -> Callable[[State, dict[str, Any]], tuple[State, Sums]]:
        """(state, batch) -> (state, sums): the train step of this run, uncompiled."""
        return partial(train_step, self.ex, self.tx)

    def learning_rate(self, step: int) -> float:
        return self.ex.optimizer.learning_rate(step, self.steps)

    def place(self, tree: Any) -> Any:
        return parallel.place(tree, self.mesh)

    def feeding(self, dataset: Dataset) -> dict[str, Any]:
        """How a Feed keeps this data: on every device if it fits, else read ahead by the host."""
        resident = fits(dataset, int(self.ex.resident_gib * 2**30))
        return {"resident": resident, "place": self.place}

    def batch(self, examples: int) -> dict[str, Any]:
        """Shapes and dtypes of a batch as it comes from the data."""
        shapes = {
            name: jax.ShapeDtypeStruct((examples, *field.shape[1:]), field.dtype)
            for name, field in self.train.fields.items()
        }
        return shapes | {"mask": jax.ShapeDtypeStruct((examples,), jnp.float32)}

    def init(self) -> State:
        return init(self.ex, self.tx, zeros(self.batch(1)))

    def abstract_state(self) -> State:
        """The State's shapes, dtypes and where on the devices it belongs."""
        everywhere = parallel.replicated(self.mesh)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
            jax.eval_shape(self.init),
        )


def zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def plan(ex: Experiment, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Opens the data and builds the parts, for all devices or the given ones.

    Raises:
      UserError: the data is missing, or batch sizes do not fit it or the devices.
    """
    mesh = parallel.data_mesh(devices)
    parallel.check_batch("batch", ex.batch, mesh, ex.grad_accum)
    parallel.check_batch("eval_batch", ex.eval_batch, mesh)
    train = ex.train.open()
    if ex.batch > len(train):
        raise UserError(f"batch={ex.batch} is more than the {len(train)} examples of {train.name}")
    evals = {name: source.open() for name, source in ex.evals.items()}
    steps_per_epoch = len(train) // ex.batch
    steps = ex.length.steps(steps_per_epoch)
    tx = ex.optimizer.build(steps)
    if ex.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(ex.clip_norm), tx)
    return Plan(ex, train, evals, mesh, steps_per_epoch, steps, tx)


class Diverged(RunFailed):
    """The loss of a step is not finite. `fit` adds the State that it came to."""

    state: State


def mean_over(calls: list[tuple[int, Sums]]) -> dict[str, Any]:
    """Each metric over some calls; waits for the device. `calls`: (first step, sums [n, ...]).

    Raises:
      Diverged: a step's loss is not finite.
    """
    totals: Any = None
    for first, sums in jax.device_get(calls):
        losses_n = sums["loss"].total
        if not np.isfinite(losses_n).all():
            bad = int(np.argmin(np.isfinite(losses_n)))
            raise Diverged(f"the loss is {losses_n[bad]} at step {first + bad}")
        sums = jax.tree.map(lambda a: np.sum(a, axis=0, dtype=np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return values(totals)


class Evaluator:
    """Evaluates States on one split, exactly; the compiled step and the data stay in place."""

    def __init__(self, plan: Plan, split: str) -> None:
        dataset, ex = plan.evals[split], plan.ex
        self.size = len(dataset)
        self.feed = Feed.evaluation(dataset, ex.eval_batch, **plan.feeding(dataset))

        def step(model: Any, resident: Any, fed_n: Any) -> Any:
            return eval_step(ex, model, assemble(resident, jax.tree.map(lambda a: a[0], fed_n)))

        self.step = parallel.compiled(step, ex.parallel, plan.mesh, donate=False)

    def __call__(self, state: State, stop: Callable[[], bool]) -> dict[str, Any] | None:
        model = (state.params, state.variables)
        step = partial(self.step, model, self.feed.resident)
        with self.feed as feed:
            return evaluate(step, (feed.fed(i) for i in range(feed.steps)), self.size, stop)


def fit(
    plan: Plan,
    state: State,
    checkpoints: Checkpoints,
    log: Log,
    interrupt: Interrupt,
    stop_at: int | None = None,
) -> State:
    """Trains from `state` to the end of the run, to step `stop_at`, or until interrupted.

    Evaluates, logs and saves on the way; the State that it returns has been saved. The host runs
    ahead of the device and reads a call's sums only when the log, an evaluation or a checkpoint is
    due, so that the device never waits for it.

    Raises:
      Diverged: the loss became NaN or infinite; the error holds the State.
    """
    ex = plan.ex
    end = min(plan.steps, stop_at or plan.steps)
    every_eval, every_save, every_log = plan.grids
    call = parallel.compiled(partial(many_steps, plan.step), ex.parallel, plan.mesh, donate=True)
    feed = Feed.training(plan.train, ex.batch, ex.seed, **plan.feeding(plan.train))
    evaluators = {split: Evaluator(plan, split) for split in plan.evals}
    stops = (every_eval, every_save, ex.steps_per_call)  # where a call ends: a function of the step
    step = first = int(state.step)
    pending: list[tuple[int, Sums]] = []  # calls that the log has not seen: (first step, sums)

    def report() -> None:
        """Hands the log what the pending calls came to; waits for them."""
        if pending:
            log.train(step, mean_over(pending) | {"learning_rate": plan.learning_rate(step - 1)})
            pending.clear()

    try:
        while True:
            scores: dict[str, Any] = {}
            if step and (step % every_eval == 0 or step >= end) and not log.evaluated(step):
                report()
                for split, evaluator in evaluators.items():
                    if found := evaluator(state, stop=lambda: interrupt.signal is not None):
                        log.evaluation(step, split, found)
                        scores |= {f"{split}/{k}": v for k, v in found.items() if np.ndim(v) == 0}
            done = step >= end or interrupt.signal is not None
            if done or scores or (step and step % every_save == 0):
                report()  # so that a State that diverged is never saved
                checkpoints.save(state, scores, step=step)
            if done:
                return state
            n = min(end, *((step // grid + 1) * grid for grid in stops)) - step
            state, sums = call(state, feed.resident, feed.fed(step, n))
            if step == first:
                log.mark(step)  # the call has returned, so it is compiled: rates count from here
            if pending and step // every_log > pending[0][0] // every_log:
                report()  # of the calls before this one, on which the device is busy now
            pending.append((step, sums))
            step += n
    except Diverged as error:
        error.state = state
        raise
    finally:
        feed.close()
