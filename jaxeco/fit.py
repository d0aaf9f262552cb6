"""A run: its plan, which opens the data and builds the parts, and the loop that carries it out."""

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxeco import hosts, parallel, sharding
from jaxeco.checkpoint import Checkpoints, load
from jaxeco.data.dataset import Dataset
from jaxeco.data.pipeline import Feed, fits
from jaxeco.errors import RunFailed, UserError
from jaxeco.evaluate import Evaluator, eval_step
from jaxeco.experiment import Experiment
from jaxeco.forward import predict, results, whole_split
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log
from jaxeco.optim import clip_by_global_norm
from jaxeco.train import State, init, many_steps, train_step
from jaxeco.trees import listed, map_named
from jaxeco.watch import Watch

if TYPE_CHECKING:
    from jaxeco.pretrained import Report


@dataclass(frozen=True)
class Plan:
    """An experiment with its data opened and its parts built: a run without its State."""

    ex: Experiment
    train: Dataset
    evals: dict[str, Dataset]
    mesh: Mesh
    steps_per_epoch: int
    steps: int  # of the whole run
    tx: optax.GradientTransformation

    def init(self) -> State:
        """The State before step 0. Pure: it may be compiled, or only traced for its shapes."""
        one = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes(self.train, 1).items()}
        return init(self.ex, self.tx, jax.random.key(self.ex.seed), one)

    def abstract_state(self) -> State:
        """The State's shapes, dtypes and where on the devices each part belongs.

        Raises:
          UserError: the mesh does not divide what it is to split, or has nothing to split.
        """
        state = jax.eval_shape(self.init)
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            state,
            sharding.shardings(state, self.ex.model, self.mesh),
        )

    @property
    def shardings(self) -> State:
        """Where on the devices each part of the State belongs."""
        return jax.tree.map(lambda a: a.sharding, self.abstract_state())

    def start(self, said: Callable[["Report"], None] = lambda report: None) -> State:
        """The State before step 0, where it belongs; its parameters from `ex.start_from`, if set.

        Args:
          said: is told what was taken over from there.

        Raises:
          UserError: the parameters to start from are missing, damaged or do not fit.
        """
        shardings = self.shardings
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        # It runs once. XLA on CPU would compile it for seconds, for a tenth of one that it saves.
        quickly = {"xla_backend_optimization_level": 1} if cpu else None
        state = jax.jit(self.init, out_shardings=shardings, compiler_options=quickly)()
        if self.ex.start_from is None:
            return state
        params, report = self.ex.start_from.load(state.params, fingerprint(self.train.tokenizer))
        said(report)

        def begin(params: Any) -> tuple[Any, Any]:
            params = jax.tree.map(jnp.copy, params)  # what lies on the host cannot be given up
            return params, self.tx.init(params)

        outputs = (shardings.params, shardings.opt_state)
        params, opt_state = jax.jit(begin, out_shardings=outputs)(params)
        return state.replace(params=params, opt_state=opt_state)

    @property
    def step(self) -> Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]]:
        """(state, batch) -> (state, sums): the train step of this run, uncompiled."""
        return partial(train_step, self.ex, self.tx)

    def compiled(self) -> parallel.Function:
        """(state, resident, fed_n) -> (state, sums_n): n steps on all devices; gives up `state`."""
        steps = partial(many_steps, self.step)
        return parallel.compiled(steps, self.ex.parallel, self.mesh, self.shardings, updates=True)

    def evaluators(self) -> dict[str, Evaluator]:
        """For each split, what evaluates a State's parameters and variables on it."""
        model = self.shardings.params, self.shardings.variables
        return {
            split: Evaluator(self.ex, data, self.mesh, model) for split, data in self.evals.items()
        }

    def feed(self) -> Feed:
        """The training batches, by step; on the devices if the data fits there."""
        return Feed.training(
            self.train,
            self.ex.batch,
            self.ex.seed,
            resident=fits(self.train, self.ex.resident_bytes),
            place=partial(parallel.place, mesh=self.mesh),
            share=parallel.share(self.mesh, self.ex.batch),
            workers=self.ex.read_workers,
        )


def plan(ex: Experiment, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Opens the data and builds the parts, for all devices or the given ones.

    Raises:
      UserError: the data is missing, or batch sizes do not fit it or the devices.
    """
    mesh = parallel.make_mesh(ex.mesh, devices)
    parallel.check_parallel(ex.parallel, mesh)
    parallel.check_batch("batch", ex.batch, mesh, ex.grad_accum)
    parallel.check_batch("eval_batch", ex.eval_batch, mesh)
    train = ex.train.open()
    if ex.batch > (size := train.training_examples):
        raise UserError(f"batch={ex.batch} is more than the {size} examples of {train.name}")
    evals = {name: source.open() for name, source in ex.evals.items()}
    for name, data in evals.items():
        if data.fingerprint == train.fingerprint:
            warnings.warn(f"the split {name!r} is the training data itself", stacklevel=2)
    steps_per_epoch = size // ex.batch
    steps = ex.length.steps(steps_per_epoch)
    tx = ex.optimizer.build(steps)
    if ex.clip_norm is not None:
        trained = partial(map_named, ex.optimizer.trains)  # frozen parameters have gradients, too
        tx = optax.chain(optax.masked(clip_by_global_norm(ex.clip_norm), trained), tx)
    if steps >= 2**31:
        raise UserError(f"a run of {steps:,} steps: expected fewer than 2^31")
    plan = Plan(ex, train, evals, mesh, steps_per_epoch, steps, tx)
    check(plan)
    return plan


def shapes(data: Dataset, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of `data` as a step is given it."""
    fields = {
        name: jax.ShapeDtypeStruct(
            (examples, *field.shape[1:]), jax.dtypes.canonicalize_dtype(field.dtype)
        )
        for name, field in data.fields.items()
    }
    return fields | {"mask": jax.ShapeDtypeStruct((examples,), jnp.float32)}


def fingerprint(tokenizer: Any) -> str | None:
    return tokenizer and tokenizer.fingerprint


def check(plan: Plan) -> None:
    """Traces a step and an evaluation on shapes alone.

    Raises:
      UserError: the model, the loss or a metric does not fit the data.
    """
    ex, classes = plan.ex, plan.train.classes
    if split := whole_split(ex.metrics):
        raise UserError(f"{split[0].name} needs a whole split: move it to eval_metrics")
    try:
        for data in (plan.train, *plan.evals.values()):
            if data.classes and classes and data.classes != classes:
                raise UserError(
                    f"{data.name} has the classes {listed(data.classes)}, {plan.train.name}"
                    f" {listed(classes)}: expected the same, in the same order"
                )
            check_text(ex, plan.train, data)
        state = plan.abstract_state()
        model = (state.params, state.variables)
        outputs = jax.eval_shape(partial(predict, ex), *model, shapes(plan.train, 1))
        labelled = classes and len(plan.train.fields["y"].shape) == 1 and outputs.ndim == 2
        if labelled and outputs.shape[1] != len(classes):
            has, name = outputs.shape[1], plan.train.name
            raise UserError(
                f"the model has {has} outputs, but {name} has {len(classes)} classes: set the"
                f" model's num_classes={len(classes)}"
            )
        with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):  # can it be split so?
            jax.eval_shape(plan.step, state, shapes(plan.train, ex.batch))
            for data in plan.evals.values():
                index = {"index": jax.ShapeDtypeStruct((ex.eval_batch,), jnp.int32)}
                batch = shapes(data, ex.eval_batch) | index
                jax.eval_shape(partial(eval_step, ex), *model, batch)
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(raised_in).is_relative_to(Path(__file__).parent):  # one of our components says so
            raise UserError(str(error).splitlines()[0]) from error
        raise


def check_text(ex: Experiment, train: Dataset, data: Dataset) -> None:
    """Raises UserError if the model, a metric or a transform was made for other tokens.

    A model says what it was made for by `vocab_size`, and by a `trunk` with special tokens; one
    that has neither is trusted.
    """
    if (tokenizer := data.tokenizer) is None:
        return
    trunk = getattr(ex.model, "trunk", None)
    where = "model.trunk" if trunk is not None else "model"
    if hasattr(ex.model, "model"):  # in Lora
        where = f"model.{where}"
    room = getattr(ex.model, "vocab_size", None)
    if room is not None and tokenizer.vocab_size > room:
        raise UserError(
            f"{data.name}: its tokenizer has {tokenizer.vocab_size} tokens, the model room for"
            f" {room}: set {where}.vocab_size={tokenizer.vocab_size}"
        )
    for special in ("separator", "pad") if trunk else ():
        ours, theirs = getattr(trunk, special), getattr(tokenizer, special)
        if ours != theirs and (ours is not None or special in data.specials):
            raise UserError(
                f"the model's {special} is token {ours}, that of {data.name} {theirs}: set"
                f" {where}.{special}={theirs}"
            )
    if tokenizer.fingerprint != fingerprint(train.tokenizer):
        raise UserError(f"{data.name} has another tokenizer than {train.name}: give it the same")
    for part in (*ex.metrics, *ex.eval_metrics, *ex.augment, *ex.eval_augment):
        own = getattr(part, "tokenizer", None)
        if own is not None and own.open().fingerprint != tokenizer.fingerprint:
            name = type(part).__name__
            raise UserError(f"{name} has another tokenizer than {data.name}: give it the same")


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


def fit(
    plan: Plan,
    state: State,
    checkpoints: Checkpoints,
    log: Log,
    interrupt: Interrupt,
    stop_at: int | None = None,
) -> State:
    """Trains from `state` to the end of the run, to step `stop_at`, or until interrupted.

    The run also ends where `stalled` says so. Evaluates, logs and saves on the way; the State that
    it returns has been saved. The host runs ahead of the device and reads a call's sums only when
    the log, an evaluation or a checkpoint is due, so that the device never waits for it. Where the
    experiment's guard says so, it goes back to a checkpoint from before a bad step.

    Raises:
      Diverged: the loss became NaN or infinite, or the guard gives up; the error holds the State.
    """
    ex = plan.ex
    every_eval, every_save, every_log = (
        stretch.steps(plan.steps_per_epoch)
        for stretch in (ex.eval_every, ex.save_every, ex.log_every)
    )
    end = min(plan.steps, stop_at or plan.steps)
    call, feed = plan.compiled(), plan.feed()
    evaluators = plan.evaluators()
    watch = Watch(log, feed)
    step, offset = int(state.step), int(state.offset)
    first = step
    pending: list[Any] = []  # sums of the calls that the log has not seen, [n, ...] each
    seen = step  # steps that it has seen

    def report() -> None:
        """Hands the log what the pending calls came to; waits for them."""
        nonlocal seen
        if pending:
            # straight from each array: jax.device_get takes six times as long for small ones
            sums = jax.tree.map(lambda *a_n: np.concatenate(a_n), *pending)
            for said in skipped(ex, sums, seen):
                log.warn(said)
            rate = {"learning_rate": ex.optimizer.learning_rate(step - 1, plan.steps)}
            log.train(step, mean_over(ex, sums) | watch.waiting() | rate)
            pending.clear()
            seen = step

    def evaluate() -> dict[str, float]:
        """Evaluates on all splits; returns the scalars, named. {} if interrupted."""
        found: dict[str, dict[str, Any]] = {}
        for split, evaluator in evaluators.items():
            values = evaluator(state.params, state.variables, interrupted)
            if values is None:
                return {}
            if not np.isfinite(loss := values["loss"]):
                raise Diverged(f"the loss on {split!r} is {loss} after step {step}", step)
            found[split] = chosen_first(ex, split, values)
        for split, values in found.items():
            log.evaluation(step, split, values)
        return {
            f"{split}/{name}": value
            for split, values in found.items()
            for name, value in values.items()
            if np.ndim(value) == 0
        }

    def interrupted() -> bool:
        return interrupt.asked()

    with feed, watch:
        while True:
            try:
                scores = {}
                due = step and (step % every_eval == 0 or step >= end)
                if due and not all(log.evaluated(step, split) for split in evaluators):
                    report()
                    scores = evaluate()
                    watch.compiled("an evaluation", step)
                done = step >= end or interrupted() or (due and stalled(plan, log) is not None)
                if done or scores or (step and step % every_save == 0):
                    report()  # so that no State is saved behind a loss that is not finite
                    # an evaluation because of `stop_at` is no candidate for the best: another run,
                    # stopped elsewhere, would not have it
                    checkpoints.needed = last_saved(plan, step) if ex.guard else None
                    checkpoints.save(state, scores if on_grid(plan, step) else {}, step=step)
                    log.mark(step)
                    watch.mark()
                    watch.compiled("a checkpoint", step)
                if done:
                    checkpoints.wait()
                    return state
                n = call_length(plan, step, end)
                state, sums = call(state, feed.resident, watch.fed(step + offset, n))
                watch.called(step, n, sums)
                if step == first:  # rates count from here, when it is compiled and has run once
                    jax.block_until_ready(sums)
                    log.mark(step + n)
                    watch.mark()
                if pending and step // every_log > seen // every_log:
                    report()  # of the calls before this one, on which the device is busy now
                    watch.compiled("a line of the log", step)
                pending.append(sums)
                step += n
            except Diverged as error:
                error.state = state
                back = way_back(plan, error)
            else:
                continue
            del state  # there may be no room for two
            state = returned(plan, checkpoints, log, back)
            watch.compiled(f"roll-back {back.count}", back.step)
            pending.clear()
            step, offset = int(state.step), int(state.offset)
            first = seen = step


def call_length(plan: Plan, step: int, end: int) -> int:
    """How many steps the call from `step` on takes, in a run to `end`.

    It ends where an evaluation or a checkpoint is due, so that a resumed run makes the same calls.
    """
    ex, epoch = plan.ex, plan.steps_per_epoch
    grids = (ex.eval_every.steps(epoch), ex.save_every.steps(epoch), ex.steps_per_call)
    return min(end, *(step - step % grid + grid for grid in grids)) - step


@dataclass(frozen=True)
class Back:
    """Where a roll-back leads."""

    why: str
    bad: int  # steps taken before the bad one
    step: int  # the last one before it at which this run saves, wherever it is stopped
    offset: int  # of the batches from there on
    count: int  # roll-backs, with this one


def way_back(plan: Plan, error: Diverged) -> Back:
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
    step = last_saved(plan, bad)
    offset = int(error.state.offset) + bad - step + 1
    return Back(str(error), bad, step, offset, int(record.count) + 1)


def last_saved(plan: Plan, step: int) -> int:
    """The last step up to `step` at which the run saves wherever it may have been stopped; or 0."""
    saves = [plan.ex.save_every] + [plan.ex.eval_every] * bool(plan.evals)
    return max(step - step % every.steps(plan.steps_per_epoch) for every in saves)


def returned(plan: Plan, checkpoints: Checkpoints, log: Log, back: Back) -> State:
    """The State that a run goes on from after a roll-back; the log forgets what came after it."""
    checkpoints.wait()
    there = [step for step in hosts.from_first(checkpoints.steps()) if step <= back.bad]
    step = back.step if back.step in there or back.step == 0 else max(there, default=0)
    if step == 0:
        state = plan.start()
    else:
        state = load(checkpoints.folder, plan.abstract_state(), which=step).state
    log.rewind(step)
    batches = f"batches of steps {step + 1:,} to {back.bad + 1:,}"
    log.warn(f"{back.why}: back to step {step:,}, without the {batches} (roll-back {back.count})")
    if step != back.step:
        log.warn(f"checkpoint {back.step} is gone: the run is not the one it would have been")
    offset = back.offset + back.step - step
    return state.replace(
        offset=jax.device_put(np.int32(offset), state.offset.sharding),
        guard=state.guard.replace(
            count=jax.device_put(np.int32(back.count), state.guard.count.sharding)
        ),
    )


def chosen_first(ex: Experiment, split: str, values: dict[str, Any]) -> dict[str, Any]:
    """The same values: after the loss that by which the best is chosen, so that a line shows it."""
    first = [name for name in ("loss", *values) if name == "loss" or f"{split}/{name}" == ex.best]
    return {name: values[name] for name in dict.fromkeys([*first, *values])}


def on_grid(plan: Plan, step: int) -> bool:
    """Whether the run evaluates at this step wherever it may have been stopped before."""
    return step == plan.steps or step % plan.ex.eval_every.steps(plan.steps_per_epoch) == 0


def stalled(plan: Plan, log: Log) -> int | None:
    """The step of the best evaluation, if `patience` have followed without a better one.

    A function of the evaluations on record, which a resumed run has as well.
    """
    ex = plan.ex
    recorded = log.history(ex.best) if ex.best else []
    history = [(step, value) for step, value in recorded if on_grid(plan, step)]
    if ex.patience is None or not history:
        return None
    steps, values = zip(*history, strict=True)
    scores = np.nan_to_num(values if ex.best_mode == "max" else np.negative(values), nan=-np.inf)
    best = int(np.argmax(scores))  # the first of equals
    return steps[best] if len(steps) - 1 - best >= ex.patience else None


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
        if verdict and not np.isfinite(norm := verdict.gradient_norm[i]):
            why += f", the gradient's norm {norm}"
        why += f" at step {first + i + 1}"
        if guard is None or verdict is None or guard.then != "skip":
            raise Diverged(why, first + i, training=True)
        if verdict.count[i] > guard.limit:
            raise Diverged(f"{why}, after {guard.limit} skipped steps", first + i)
        yield f"{why}: skipped ({verdict.count[i]} of at most {guard.limit})"


def mean_over(ex: Experiment, sums: dict[str, Any]) -> dict[str, Any]:
    """Each metric over all steps but those that went bad, and what the guard counts.

    Args:
      sums: of each step, [N, ...], on the host.
    """
    said = {}
    if ex.guard:
        verdict = sums.pop("guard")
        sums = jax.tree.map(lambda a_N: a_N[~verdict.bad], sums)
        name = "skipped" if ex.guard.then == "skip" else "rolled_back"
        said = {name: int(verdict.count[-1])}
    return results(ex, jax.tree.map(lambda a_N: np.sum(a_N, 0, np.float64), sums)) | said
