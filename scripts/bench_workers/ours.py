"""Trains as an experiment does: its step, its calls, its feed; on noise shaped as its data."""

import dataclasses
import sys

import numpy as np
from serve import serve

from jaxeco import config, runtime

runtime.configure()

import jax

from jaxeco import data
from jaxeco.data.tokens import Present, Windows
from jaxeco.plan import plan

FILES = {
    "lenet": ("experiments/cifar_lenet.py", []),
    "cifar_cnn": ("experiments/cifar_cnn.py", ["batch=500"]),
    "char_gpt": ("experiments/shakespeare_char.py", []),
}


@dataclasses.dataclass(frozen=True)
class Text:
    """A million characters of noise, in windows of 64."""

    def open(self) -> data.Dataset:
        tokens = np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint16)
        x = Windows(tokens, rows=len(tokens) - 1, length=64)
        y = dataclasses.replace(x, shift=1)
        return data.Dataset({"x": x, "y": y, "weights": Present(y)}, (), "noise", "0", stride=64)


def images() -> data.Arrays:
    noise = np.random.default_rng(0)
    x = noise.integers(0, 256, (10_000, 32, 32, 3)).astype(np.uint8)
    return data.Arrays(x, noise.integers(0, 10, 10_000).astype(np.int32))


def main(workload: str) -> None:
    ex = config.load(*FILES[workload]).experiment
    train, units = (Text(), 64) if workload == "char_gpt" else (images(), 1)
    p = plan(dataclasses.replace(ex, train=train, evals={}, best=None))
    call, feed = p.compiled(), p.feed()
    n, step, state = ex.steps_per_call, 0, p.start()

    def steps() -> int:
        nonlocal step, state
        state, sums = call(state, feed.resident, feed.fed(step, n))
        step += n
        jax.block_until_ready(sums)
        return n * ex.batch * units

    serve(f"jaxeco (JAX {jax.__version__})", steps)


main(sys.argv[1])
