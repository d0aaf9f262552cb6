"""What meshes, checkpoints and start-up cost, on one device:

    python scripts/bench_scaling.py            # all parts; --only step, loop, save, start or memory

- step: the step as a mesh of one device compiles it, against plain jax.jit of the same function,
  in turn (A B A B ...); the ratio of medians.
- loop: what the loop of `fit` adds to each step beside the bare calls, in turn.
- save: how much longer training is with a save than without, in steps.
- start: from the end of the imports to the end of the first step, in a fresh process, with a warm
  compilation cache. Data are decoded and compiled programs cached by a run before.
- memory: how much more than the State itself a process holds at most while it saves and restores.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxeco import runtime

runtime.configure()

import jax

from jaxeco.checkpoint import Checkpoints
from jaxeco.config import load
from jaxeco.experiment import Experiment, MeshShape, Steps
from jaxeco.fit import fit
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log
from jaxeco.plan import Plan, plan
from jaxeco.train import many_steps

ROOT = Path(__file__).parent.parent
ROUNDS = 9
ONE = MeshShape(data=1)
Row = tuple[str, str]


def experiment(name: str, *words: str) -> Experiment:
    return replace(load(ROOT / f"experiments/{name}.py", words).experiment, mesh=ONE)


def seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def in_turn(*actions: Callable[[], None]) -> list[list[float]]:
    """Seconds of each action, in ROUNDS rounds."""
    for action in actions:
        action()
    rounds = [[seconds(action) for action in actions] for _ in range(ROUNDS)]
    return [list(column) for column in zip(*rounds)]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def trains(p: Plan, call: Callable, steps: int) -> Callable[[], None]:
    """An action that takes some steps, one in a call, and waits for them."""
    feed = p.feed()
    fed = [feed.fed(step) for step in range(steps)]
    state = p.start()

    def action() -> None:
        nonlocal state
        for step in range(steps):
            state, _ = call(state, feed.resident, fed[step])
        jax.block_until_ready(state)

    return action


def step() -> list[Row]:
    rows = []
    for name, words, steps in (
        ("digits_mlp", [], 2000),
        ("shakespeare_char", [], 30),
        ("cifar_lenet", [], 300),
    ):
        p = plan(experiment(name, *words))
        plain = jax.jit(partial(many_steps, p.step), donate_argnums=0)
        ours, theirs = in_turn(trains(p, p.compiled(), steps), trains(p, plain, steps))
        ratio = statistics.median(ours) / statistics.median(theirs)
        each = statistics.median(theirs) / steps * 1e3
        said = f"{100 * (ratio - 1):+.1f} % of {each:.3g} ms, n = {ROUNDS} rounds of {steps}"
        rows.append((f"sharded step of {name}, against plain jit", said))
    return rows


def loop() -> list[Row]:
    """By the difference of a long run and a short one: compilation and the last save drop out."""
    short, long = 2000, 10_000
    seldom = {"eval_every": Steps(10**6), "save_every": Steps(10**6), "log_every": Steps(500)}
    ex = experiment("digits_mlp", "model.widths=8", "augment=", "batch=16")
    ex = replace(ex, length=Steps(long), steps_per_call=1, evals={}, best=None, **seldom)
    p = plan(ex)
    bare = trains(p, p.compiled(), short)

    def whole(steps: int, folder: Path) -> float:
        with (
            Checkpoints(folder / "checkpoints", description={}) as checkpoints,
            open(os.devnull, "w") as stream,
            Log(folder, total_steps=long, examples_per_step=1, stream=stream) as log,
            Interrupt() as interrupt,
        ):
            state = p.start()
            return seconds(lambda: fit(p, state, checkpoints, log, interrupt, steps))

    beyond = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            few, many = (whole(n, Path(folder) / str(n)) for n in (short, long))
        beyond.append(((many - few) / (long - short) - seconds(bare) / short) * 1e6)
    said = f"{spread(beyond)} µs, n = {ROUNDS} rounds of {long - short} steps"
    return [("a step of `fit` beyond the bare call (digits, one hidden layer of 8)", said)]


def save() -> list[Row]:
    p = plan(experiment("shakespeare_char"))
    steps, every = 120, 40
    feed, call, state = p.feed(), p.compiled(), p.start()
    fed = [feed.fed(step) for step in range(steps)]
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(Path(folder) / "c", description={}) as checkpoints:
            number = 0

            def train(saving: bool) -> None:
                nonlocal state, number
                for step in range(steps):
                    if saving and step % every == 0:
                        number += 1
                        checkpoints.save(state, step=number)
                    state, _ = call(state, feed.resident, fed[step])
                jax.block_until_ready(state)

            with_, without = in_turn(partial(train, True), partial(train, False))
            checkpoints.wait()
    one = statistics.median(without) / steps
    longer = [(a - b) / (steps // every) / one for a, b in zip(with_, without)]
    size = sum(a.nbytes for a in jax.tree.leaves((state.params, state.opt_state))) / 2**20
    return [
        (
            f"a save of {size:.3g} MiB beside steps of {one * 1e3:.3g} ms",
            f"{spread(longer)} steps longer, n = {ROUNDS} rounds of {steps // every} saves",
        )
    ]


STARTED = """
import sys, time
from jaxeco import runtime
runtime.configure()
import jax, jaxeco.session, jaxeco.data, jaxeco.models
from jaxeco.config import load
ex = load(sys.argv[1], sys.argv[2:]).experiment
began = time.perf_counter()
p = jaxeco.session.plan(ex)
state, feed = p.start(), p.feed()
ready = time.perf_counter()
state, sums = p.compiled()(state, feed.resident, feed.fed(0))
jax.block_until_ready(sums)
print(ready - began, time.perf_counter() - began)
"""


def start() -> list[Row]:
    rows = []
    for name in ("digits_mlp", "cifar_cnn"):
        words = [sys.executable, "-c", STARTED, str(ROOT / f"experiments/{name}.py"), "mesh=data:1"]
        found = []
        for _ in range(6):
            ran = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
            if ran.returncode:
                rows.append((f"{name}: start", f"not measured: {ran.stderr.splitlines()[-1]}"))
                break
            found.append([float(word) for word in ran.stdout.split()])
        else:
            ready, first = zip(*found[1:])  # the first filled the caches
            said = f"{spread(first)} s, of which {spread(ready)} s before it; n = {len(first)}"
            rows.append((f"{name}: from the imports to the end of the first step", said))
    return rows


PEAK = """
import resource, sys
from pathlib import Path
from jaxeco import runtime
runtime.configure()
import jax, jax.numpy as jnp, numpy as np
from jaxeco.checkpoint import Checkpoints
def now(): return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
folder, what, mib = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shape = jax.ShapeDtypeStruct((mib // 16, 2**20), jnp.float32, sharding=device)
abstract = {str(i): shape for i in range(4)}
make = jax.jit(lambda: {n: jnp.full(s.shape, float(n)) for n, s in abstract.items()})
with Checkpoints(folder, description={}) as checkpoints:
    small = {"a": jnp.zeros(8)}
    if what == "save":
        with Checkpoints(folder + "-small", description={}) as other:
            other.save(small, step=1)
        state = jax.block_until_ready(make())
    before = now()
    Path("/proc/self/clear_refs").write_text("5")
    if what == "save":
        checkpoints.save(state, step=1)
        checkpoints.wait()
        extra = peak() - before
    else:
        found, _ = checkpoints.restore(abstract)
        jax.block_until_ready(found)
        extra = peak() - before - mib * 2**20
    print(extra / 2**20)
"""


def memory() -> list[Row]:
    rows, mib = [], 2048
    with tempfile.TemporaryDirectory() as folder:
        for what in ("save", "restore"):
            words = [sys.executable, "-c", PEAK, f"{folder}/c", what, str(mib)]
            ran = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
            if ran.returncode:
                sys.exit(ran.stderr)
            extra = float(ran.stdout)
            said = f"{extra:,.0f} MiB beside the State, {extra / mib:.2f} of its size; n = 1"
            rows.append((f"peak host memory of a {what} of {mib} MiB in 4 arrays", said))
    return rows


PARTS = {"step": step, "loop": loop, "save": save, "start": start, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part")
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"{os.cpu_count()} cores, {device}, JAX {jax.__version__}, {platform.platform()}\n")
    print("| what | median (least to most) |\n| --- | --- |")
    for name in PARTS if options.only is None else [options.only]:
        for what, said in PARTS[name]():
            print(f"| {what} | {said} |", flush=True)


if __name__ == "__main__":
    main()
