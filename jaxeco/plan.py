"""A run's plan: its data opened, its parts built and checked, before anything is compiled."""

import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxeco import parallel, sharding
from jaxeco.data.dataset import Dataset, read
from jaxeco.data.pipeline import Feed, fits
from jaxeco.errors import UserError
from jaxeco.evaluate import Evaluate, Evaluator, eval_step
from jaxeco.experiment import Experiment, Views
from jaxeco.forward import predict, preprocess, whole_split
from jaxeco.optim import clip_by_global_norm
from jaxeco.train import State, init, many_steps, train_step
from jaxeco.trees import listed, map_named

if TYPE_CHECKING:
    from jaxeco.pretrained import Report


MOST_EXAMPLES = 2**24  # in a batch of an evaluation, which is padded up to its size


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

    def of(self, ex: Experiment) -> "Plan":
        """The plan of an experiment that differs in the seed, or in what steps compute with.

        Numbers may be traced. The data stays open, and nothing is checked anew.
        """
        return replace(self, ex=ex, tx=transformation(ex, self.steps))

    def init(self, seed: Any = None) -> State:
        """The State before step 0. Pure: it may be compiled, or only traced for its shapes.

        Args:
          seed: instead of the experiment's; it may be traced, u32[].
        """
        one = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes(self.train, 1).items()}
        key = jax.random.key(self.ex.seed if seed is None else seed)
        return init(self.ex, self.tx, key, one)

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
        """The State before step 0, where it belongs; with `ex.start_from` and `ex.calibrate`.

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
        return self.prepared(state, said)

    def prepared(
        self, state: State, said: Callable[["Report"], None] = lambda report: None
    ) -> State:
        """The State before step 0 from one of random parameters: `start_from`, then `calibrate`."""
        params, shardings = state.params, self.shardings
        if self.ex.start_from is not None:
            params, report = self.ex.start_from.load(params, fingerprint(self.train.tokenizer))
            said(report)
        if self.ex.calibrate is not None:
            params = self.ex.calibrate(params, self.first(self.ex.calibrate.examples))
        if params is state.params:
            return state

        def begin(params: Any) -> tuple[Any, Any]:
            params = jax.tree.map(jnp.copy, params)  # what lies on the host cannot be given up
            return params, self.tx.init(params)

        outputs = (shardings.params, shardings.opt_state)
        params, opt_state = jax.jit(begin, out_shardings=outputs)(params)
        return state.replace(params=params, opt_state=opt_state)

    def first(self, examples: int) -> np.ndarray:
        """What the model is given of the first training examples, or of all if they are fewer."""
        rows = self.train.stride * np.arange(min(examples, self.train.training_examples))
        batch = jax.tree.map(jnp.asarray, read(self.train.fields, rows))
        return np.asarray(preprocess(self.ex, batch)["x"])

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
        compiled = partial(
            parallel.compiled, how=self.ex.parallel, mesh=self.mesh, carry=model, updates=False
        )
        place = partial(parallel.place, mesh=self.mesh)
        share = parallel.share(self.mesh, self.ex.eval_batch)
        return {
            split: Evaluator(self.ex, data, self.evaluation(split), compiled, place, share)
            for split, data in self.evals.items()
        }

    def evaluation(self, split: str) -> Evaluate:
        """((params, variables), batch) -> sums and what is kept: evaluation of a split, a batch."""
        views = views_of(self.ex, split)

        def evaluation(model: tuple[Any, Any], batch: dict[str, Any]) -> Any:
            params, variables = model
            return eval_step(self.ex, params, variables, batch, views)

        return evaluation

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

    def call_length(self, step: int, end: int) -> int:
        """How many steps the call from `step` on takes, in a run to `end`.

        It ends where an evaluation or a checkpoint is due, so that a resumed run makes the same
        calls.
        """
        ex, epoch = self.ex, self.steps_per_epoch
        grids = (ex.eval_every.steps(epoch), ex.save_every.steps(epoch), ex.steps_per_call)
        return min(end, *(step - step % grid + grid for grid in grids)) - step

    def evaluates_at(self, step: int) -> bool:
        """Whether the run evaluates at this step wherever it may have been stopped before."""
        return step == self.steps or step % self.ex.eval_every.steps(self.steps_per_epoch) == 0

    def last_saved(self, step: int) -> int:
        """The last step up to this one at which the run saves wherever it was stopped; or 0."""
        saves = [self.ex.save_every] + [self.ex.eval_every] * bool(self.evals)
        return max(step - step % every.steps(self.steps_per_epoch) for every in saves)


def plan(ex: Experiment, devices: Sequence[jax.Device] | None = None) -> Plan:
    """Opens the data and builds the parts, for all devices or the given ones.

    Raises:
      UserError: the data is missing, or batch sizes do not fit it or the devices.
    """
    mesh = parallel.make_mesh(ex.mesh, devices)
    parallel.check_parallel(ex.parallel, mesh)
    parallel.check_batch("batch", ex.batch, mesh, ex.grad_accum)
    parallel.check_batch("eval_batch", ex.eval_batch, mesh)
    if ex.eval_batch > MOST_EXAMPLES:
        raise UserError(f"eval_batch={ex.eval_batch}: expected at most {MOST_EXAMPLES:,}")
    train = ex.train.open()
    if ex.batch > (size := train.training_examples):
        raise UserError(f"batch={ex.batch} is more than the {size} examples of {train.name}")
    evals = {name: source.open() for name, source in ex.evals.items()}
    for name, data in evals.items():
        if data.fingerprint == train.fingerprint:
            warnings.warn(f"the split {name!r} is the training data itself", stacklevel=2)
    steps_per_epoch = size // ex.batch
    steps = ex.length.steps(steps_per_epoch)
    if steps >= 2**31:
        raise UserError(f"a run of {steps:,} steps: expected fewer than 2^31")
    plan = Plan(ex, train, evals, mesh, steps_per_epoch, steps, transformation(ex, steps))
    check(plan)
    return plan


def transformation(ex: Experiment, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps, behind the clipping of its gradients."""
    tx = ex.optimizer.build(steps)
    if ex.clip_norm is None:
        return tx
    trained = partial(map_named, ex.optimizer.trains)  # frozen parameters have gradients, too
    return optax.chain(optax.masked(clip_by_global_norm(ex.clip_norm), trained), tx)


def shapes(data: Dataset, examples: int, training: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of `data` as a step is given it."""
    fields = {
        name: jax.ShapeDtypeStruct(
            (examples, *field.shape[1:]), jax.dtypes.canonicalize_dtype(field.dtype)
        )
        for name, field in data.fields.items()
    }
    whose = ("index", "epoch") if training else ("index",)
    numbers = {name: jax.ShapeDtypeStruct((examples,), jnp.int32) for name in whose}
    return fields | numbers | {"mask": jax.ShapeDtypeStruct((examples,), jnp.float32)}


def views_of(ex: Experiment, split: str) -> Views | None:
    return ex.views[split] if split in ex.views else None


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
            for name, data in plan.evals.items():
                evaluate = partial(eval_step, ex, views=views_of(ex, name))
                jax.eval_shape(evaluate, *model, shapes(data, ex.eval_batch, training=False))
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
