"""Trains as an experiment does: its step, its calls, its feed; on noise shaped as CIFAR-10."""

import dataclasses
import sys

import numpy as np
from serve import serve

from jaxeco import config, runtime

runtime.configure()

import jax

from jaxeco import data
from jaxeco.fit import plan

FILES = {"lenet": "experiments/cifar_lenet.py", "cifar_cnn": "experiments/cifar_cnn.py"}


def main(workload: str) -> None:
    ex = config.load(FILES[workload]).experiment
    noise = np.random.default_rng(0)
    x = noise.integers(0, 256, (10_000, 32, 32, 3)).astype(np.uint8)
    y = noise.integers(0, 10, 10_000).astype(np.int32)
    p = plan(dataclasses.replace(ex, train=data.Arrays(x, y), evals={}, best=None))
    call, feed = p.compiled(), p.feed()
    n, step, state = ex.steps_per_call, 0, p.start()

    def train() -> int:
        nonlocal step, state
        state, sums = call(state, feed.resident, feed.fed(step, n))
        step += n
        jax.block_until_ready(sums)
        return n * ex.batch

    serve(f"jaxeco (JAX {jax.__version__})", train)


main(sys.argv[1])
