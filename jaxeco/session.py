"""One session of a run, as a person sees it: summary, training, end table, pictures, result."""

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxeco import folder as folders
from jaxeco import plots
from jaxeco.checkpoint import Checkpoints
from jaxeco.config import Loaded, describe, flatten
from jaxeco.data.order import eval_indices
from jaxeco.evaluate import predict
from jaxeco.experiment import IDENTITY, Experiment
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log, read_metrics
from jaxeco.train import Diverged, Plan, State, fit, plan


def run(loaded: Loaded, workdir: Path | None, resume: bool, stop_at: int | None) -> int:
    """Trains, evaluates, saves and reports; returns the exit status.

    Raises:
      UserError: something does not fit, before anything is compiled.
      RunFailed: the loss became NaN or infinite, or a checkpoint could not be written.
    """
    ex = loaded.experiment
    folder = folders.choose(ex.name, workdir, resume)
    with folders.locked(folder), Interrupt() as interrupt:
        p = plan(ex)
        with Checkpoints(
            folder / "checkpoints", description=identity(p), keep=ex.keep, best=ex.best
        ) as checkpoints:
            restored = checkpoints.restore(p.abstract_state()) if resume else None
            state = restored or p.place(jax.jit(p.init)())
            first = int(state.step)
            folders.record(folder, loaded, first_step=first, **environment(p))
            with Log(folder, total_steps=p.steps, first_step=first, examples_per_step=ex.batch) as log:
                log.table(ex.name, summary(p, state, folder, resume))
                try:
                    state = fit(p, state, checkpoints, log, interrupt, stop_at)
                except Diverged as error:
                    good = checkpoints.latest_step()
                    last = "there is no checkpoint before it" if good is None else (
                        f"the last good checkpoint is of step {good}"
                    )
                    raise Diverged(
                        f"{error}; {last}; the state is kept in {folder / 'diverged'};"
                        " try a lower learning rate, or clip_norm=1"
                    ) from error
                step = int(state.step)
                if interrupt.signal:
                    log.note(f"{interrupt.signal.name}: saved step {step}; go on with --resume")
                finish(p, state, folder, log)
    return interrupt.exit_status if interrupt.signal else 0


def dry_run(loaded: Loaded) -> int:
    """Prints the resolved experiment and what a step costs; trains nothing, writes nothing."""
    p = plan(loaded.experiment)
    for path, value in flatten(describe(loaded.experiment)).items():
        print(f"{path:<28} {value}")
    print()
    state, batch = jax.eval_shape(p.init), p.batch(loaded.experiment.batch)
    lowered = jax.jit(p.step, donate_argnums=0).lower(state, batch)
    memory = lowered.compile().memory_analysis()
    rows = {
        "parameters": f"{count(state.params):,}",
        "steps": f"{p.steps:,} ({p.steps_per_epoch:,} an epoch)",
        "FLOPs a step": f"{lowered.cost_analysis()['flops']:.3g}",
        "memory a step": f"{_mib(memory.argument_size_in_bytes + memory.temp_size_in_bytes)} MiB"
        f" ({_mib(memory.argument_size_in_bytes)} state and batch,"
        f" {_mib(memory.temp_size_in_bytes)} temporary)",
        "data on device": f"{_mib(sum(d.nbytes for d in (p.train, *p.evals.values())))} MiB",
    }
    for name, text in rows.items():
        print(f"{name:<28} {text}")
    return 0


def identity(p: Plan) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued: all that determines the State."""
    resolved = describe(p.ex)
    return {name: resolved[name] for name in IDENTITY} | {"data": p.train.fingerprint}


def environment(p: Plan) -> dict[str, Any]:
    return {
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in p.mesh.devices.flat],
        "data": {
            name: {"name": data.name, "examples": len(data), "fingerprint": data.fingerprint}
            for name, data in {"train": p.train, **p.evals}.items()
        },
    }


def summary(p: Plan, state: State, folder: Path, resume: bool) -> dict[str, str]:
    """What is about to happen, for the table at the start."""
    ex, step = p.ex, int(state.step)
    flops = jax.jit(p.step).lower(jax.eval_shape(p.init), p.batch(ex.batch)).cost_analysis()
    devices = p.mesh.devices.flat
    rows = {
        "devices": f"{p.mesh.size} x {devices[0].device_kind}, {ex.parallel}",
        "parameters": f"{count(state.params):,}",
        "train": f"{p.train.name}, {len(p.train):,} examples",
        **{name: f"{data.name}, {len(data):,} examples" for name, data in p.evals.items()},
        "steps": f"{p.steps:,} of {ex.batch} examples, {p.steps_per_epoch:,} an epoch",
        "FLOPs a step": f"{flops['flops']:.3g}",
        "folder": str(folder),
    }
    if resume:
        rows["resumed"] = f"from step {step:,}" if step else "nothing to resume: from the start"
    if not find_spec("tensorboardX"):
        rows["TensorBoard"] = "off; pip install 'jaxeco[tensorboard]' turns it on"
    return rows


def finish(p: Plan, state: State, folder: Path, log: Log) -> None:
    """The end table, result.json and the pictures."""
    metrics = read_metrics(folder)
    step = int(state.step)
    last = {line["split"]: line for line in metrics if line["step"] == step}
    ...
    plots.curves(metrics, folder / "curves.png")


def count(params: Any) -> int:
    """Numbers in a pytree of arrays or of their shapes."""
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(params))


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.0f}"
