"""Works as an experiment does: its step, its calls, its feed; on noise shaped as its data."""

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
from serve import WORKLOAD, serve

from jaxeco import config, runtime

if __name__ == "__main__":
    runtime.restart_with_huge_pages()  # as every command of jaxeco
runtime.configure()
if WORKLOAD in ("digits_16", "mlp_16", "lenet_4_16"):  # as jaxeco.run --seeds does
    runtime.split_cpu()

import flax
import jax

from jaxeco import data, losses, models, onednn, optim
from jaxeco.axes import example_keys
from jaxeco.data.dataset import Source
from jaxeco.data.image import augmented
from jaxeco.data.pipeline import assemble
from jaxeco.data.tokens import Present, Windows
from jaxeco.experiment import Experiment
from jaxeco.forward import preprocess
from jaxeco.generate import Decoding, Sampling
from jaxeco.groups import Group
from jaxeco.plan import Plan, plan
from jaxeco.programs import program
from jaxeco.train import State, gradient
from jaxeco.trees import named

ROOT = Path(__file__).resolve().parent.parent.parent
Steps = Callable[[], float]  # takes steps, waits, and returns how many examples or tokens they had


@dataclasses.dataclass(frozen=True)
class Text:
    """Half a million tokens of noise, in windows."""

    vocabulary: int
    length: int

    def open(self) -> data.Dataset:
        tokens = np.random.default_rng(0).integers(0, self.vocabulary, 500_000).astype(np.uint16)
        x = Windows(tokens, rows=len(tokens) - 1, length=self.length)
        y = dataclasses.replace(x, shift=1)
        fields = {"x": x, "y": y, "weights": Present(y)}
        return data.Dataset(fields, (), "noise", "0", stride=self.length, units=self.length)


def images(side: int = 32, channels: int = 3) -> data.Arrays:
    noise = np.random.default_rng(0)
    x = noise.integers(0, 256, (10_000, side, side, channels), np.uint8)
    return data.Arrays(x, noise.integers(0, 10, len(x)).astype(np.int32))


def experiment(name: str, train: Source, *words: str) -> Experiment:
    ex = config.load(ROOT / f"experiments/{name}.py", words).experiment
    return dataclasses.replace(ex, train=train, evals={}, views={}, best=None, eval_metrics=())


def as_peers(ex: Experiment, optimizer: optim.Optimizer) -> Experiment:
    """With the peers' loss and optimizer, and no augmentation."""
    loss = losses.SoftmaxCrossEntropy()
    return dataclasses.replace(ex, augment=(), calibrate=None, optimizer=optimizer, loss=loss)


def airbench(batch: int, precision: str = "float32") -> Experiment:
    nesterov = optim.Momentum(0.1, momentum=0.85, nesterov=True)
    words = f"batch={batch}", f"precision={precision}"
    ex = experiment("cifar_speedrun", images(), *words)
    return as_peers(ex, optim.Partition((("stem/kernel", None), (".*", nesterov))))


def resnet18() -> Experiment:
    ex = experiment("cifar_cnn", images(), "batch=64")
    model = models.ResNet(18, num_classes=10, stem="cifar")
    return dataclasses.replace(as_peers(ex, optim.Momentum(0.1, momentum=0.9)), model=model)


def pipeline(resident_gib: float) -> Experiment:
    ex = experiment("cifar_cnn", images(), "batch=256", f"resident_gib={resident_gib}")
    return dataclasses.replace(ex, augment=(data.Flip(), data.Crop(4)))


def gpt2() -> Experiment:
    words = ("context=256", "batch=1", "micro_batches=1", "precision=float32")
    return experiment("gpt2_124m", Text(50_257, 256), *words, "model.trunk.context=1024")


EXPERIMENTS = {
    "mlp": lambda: experiment("mnist_mlp", images(28, 1)),
    "lenet_4": lambda: experiment("cifar_lenet", images()),
    # calls short enough for a round
    "lenet_128": lambda: experiment("cifar_lenet", images(), "batch=128", "steps_per_call=20"),
    "airbench_16": lambda: airbench(16),
    "airbench_256": lambda: airbench(256),
    "airbench_2000": lambda: airbench(2000),
    "airbench_256_bf16": lambda: airbench(256, "bfloat16"),
    "resnet18": resnet18,
    "char_gpt": lambda: experiment("shakespeare_char", Text(65, 64)),
    "char_gpt_bf16": lambda: experiment("shakespeare_char", Text(65, 64), "precision=bfloat16"),
    "generate": lambda: experiment("shakespeare_char", Text(65, 64), "model.trunk.context=256"),
    "gpt2": gpt2,
    "digits_1": lambda: experiment("digits_mlp", images(8, 1)),
    "digits_16": lambda: experiment("digits_mlp", images(8, 1)),
    "mlp_16": lambda: experiment("mnist_mlp", images(28, 1)),
    "lenet_4_16": lambda: experiment("cifar_lenet", images()),
    "input_resident": lambda: pipeline(4.0),
    "input_streamed": lambda: pipeline(0.0),
}


def trains(p: Plan, state: State) -> Steps:
    call, feed, step = p.compiled(), p.feed(), 0
    n = p.ex.steps_per_call

    def steps() -> float:
        nonlocal step, state
        state, sums = call(state, feed.resident, feed.fed(step, n))
        step += n
        jax.block_until_ready(sums)
        return n * p.ex.batch * p.train.units

    return steps


def differentiates(p: Plan, state: State) -> Steps:
    """Forward and backward, without the optimizer."""
    feed = p.feed()
    fed = jax.tree.map(lambda a: a[0], feed.fed(0))

    @jax.jit
    def grads(state: State, resident: dict, fed: dict) -> tuple:
        return gradient(p.ex, state, assemble(resident, fed))

    def step() -> float:
        jax.block_until_ready(grads(state, feed.resident, fed))
        return p.ex.batch * p.train.units

    return step


def feeds(p: Plan, state: State) -> Steps:
    """Batches as the network would see them."""
    feed, step = p.feed(), 0

    @jax.jit
    def batch(resident: dict, fed: dict, step: jax.Array) -> dict:
        keys = example_keys(jax.random.fold_in(state.key, step), p.ex.batch)
        return augmented(p.ex.augment, keys, preprocess(p.ex, assemble(resident, fed)))

    def steps() -> float:
        nonlocal step
        fed = jax.tree.map(lambda a: a[0], feed.fed(step))
        jax.block_until_ready(batch(feed.resident, fed, np.int32(step)))
        step += 1
        return p.ex.batch

    return steps


def populates(p: Plan, state: State) -> Steps:
    """As many members as the workload's name says, with seeds of their own, as one program."""
    count, step = int(WORKLOAD.rpartition("_")[2]), 0
    experiments = tuple(dataclasses.replace(p.ex, seed=seed) for seed in range(count))
    group = Group(tuple(range(count)), p, experiments, ())
    begin = jax.jit(p.init)
    states = [begin(np.uint32(ex.seed)) for ex in experiments]
    group = dataclasses.replace(group, how=group.natural())
    runs = program(group, states)
    n = 50

    calls = 4  # the host runs ahead in them, as a population's loop does

    def steps() -> float:
        nonlocal step
        for _ in range(calls):
            sums = runs.call(step, n)
            step += n
        jax.block_until_ready(sums)  # all of them: the others' turn is next
        return calls * count * n * p.ex.batch

    return steps


def writes(p: Plan, state: State, tokens: int = 250) -> Steps:
    def text() -> float:
        rows = Decoding(p.ex.model, state.params, [[0]], tokens=tokens, sampling=Sampling(0.8))
        while rows.left:
            rows.extend()
        return tokens

    return text


WORK = {
    "generate": writes,
    "gpt2": differentiates,
    "input_resident": feeds,
    "input_streamed": feeds,
    "digits_16": populates,
    "mlp_16": populates,
    "lenet_4_16": populates,
}


def learnt(p: Plan) -> int:
    """How many numbers the network learns."""
    params = named(jax.eval_shape(p.init).params)
    return sum(a.size for name, a in params.items() if p.ex.optimizer.trains(name, a))


def main() -> None:
    p = plan(EXPERIMENTS[WORKLOAD]())
    work = WORK[WORKLOAD] if WORKLOAD in WORK else trains
    versions = {"JAX": jax.__version__, "Flax": flax.__version__}
    if library := onednn.version():
        versions["oneDNN"] = library
    serve(
        work(p, p.start()),
        0 if work is feeds else learnt(p),
        device=jax.devices()[0].device_kind,
        Python=platform.python_version(),
        **versions,
    )


if __name__ == "__main__":
    main()
