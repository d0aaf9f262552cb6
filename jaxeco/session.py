"""One session of a run, as a person sees it: summary, training, end table, pictures, result."""

import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxeco import folder as folders
from jaxeco import plots
from jaxeco.checkpoint import Checkpoints
from jaxeco.config import Loaded, describe, flatten
from jaxeco.data.dataset import Dataset
from jaxeco.errors import UserError
from jaxeco.experiment import IDENTITY
from jaxeco.fit import Diverged, Plan, fit, plan
from jaxeco.forward import predict
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log, read_metrics
from jaxeco.train import State

Row = Sequence[str]
PACE = ("time", "learning_rate", "examples_per_second")  # in the log, but no result


def run(loaded: Loaded, workdir: Path | None, resume: bool, stop_at: int | None) -> int:
    """Trains, evaluates, saves and reports; returns the exit status.

    Raises:
      UserError: something does not fit, before anything is compiled.
      RunFailed: the loss became NaN or infinite, or a checkpoint could not be written.
    """
    ex = loaded.experiment
    folder = folders.choose(ex.name, workdir, resume)
    p = plan(ex)
    step = traced(p)
    with folders.locked(folder):
        with Checkpoints(
            folder / "checkpoints",
            description=identity(p),
            keep=ex.keep,
            best=ex.best,
            best_mode=ex.best_mode,
        ) as checkpoints:
            found = checkpoints.restore(p.abstract_state()) if resume else None
            state, first = found or (p.start(), 0)
            folders.record(folder, loaded, first_step=first, **environment(p))
            with Log(
                folder, total_steps=p.steps, first_step=first, examples_per_step=ex.batch
            ) as log:
                log.table(ex.name, summary(p, step, folder, first, resume, log.tensorboard))
                try:
                    with Interrupt() as interrupt:
                        state = fit(p, state, checkpoints, log, interrupt, stop_at)
                except Diverged as error:
                    raise diverged(error, checkpoints, folder) from error
                if interrupt.signal:
                    done = f"saved step {int(state.step):,}; --resume goes on from there"
                    log.note(f"{interrupt.signal.name}: {done}")
                finish(p, state, folder, log)
    return interrupt.exit_status if interrupt.signal else 0


def dry_run(loaded: Loaded) -> int:
    """Prints the resolved experiment and what a step costs; trains nothing, writes nothing."""
    p = plan(loaded.experiment)
    step = traced(p)
    memory: Any = step.compile().memory_analysis()
    held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    for path, value in flatten(describe(loaded.experiment)).items():
        shown = ",".join(map(str, value)) or "()" if isinstance(value, list) else value
        print(f"{path:<28} {shown}")
    rows = {
        "parameters": f"{parameters(p):,}",
        "steps": f"{p.steps:,} ({p.steps_per_epoch:,} an epoch)",
        "FLOPs a step": f"{flops(step):.3g}",
        "memory a step": f"{_size(held + temporary)}: {_size(held)} for state and batch,"
        f" {_size(temporary)} while it runs",
        "memory of the data": _size(sum(d.nbytes for d in (p.train, *p.evals.values()))),
    }
    print("", *(f"{name:<28} {text}" for name, text in rows.items()), sep="\n")
    return 0


def traced(p: Plan) -> Any:
    """The train step for one device, traced and lowered but not compiled.

    Raises:
      UserError: one of our components says that shapes do not fit.
    """
    try:
        state, batch = jax.eval_shape(p.init), p.batch(p.ex.batch)
        return jax.jit(p.step, donate_argnums=0).lower(state, batch)
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(raised_in).is_relative_to(Path(__file__).parent):
            raise UserError(str(error).splitlines()[0]) from error
        raise


def identity(p: Plan) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued: all that determines the State."""
    resolved = describe(p.ex)
    return {name: resolved[name] for name in IDENTITY} | {"data": p.train.fingerprint}


def environment(p: Plan) -> dict[str, Any]:
    return {
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in p.mesh.devices.flat],
        "data": {
            name: {
                "name": data.name,
                "examples": len(data),
                "fingerprint": data.fingerprint,
                "classes": list(data.classes),
                "fields": {k: f"{f.dtype}{list(f.shape[1:])}" for k, f in data.fields.items()},
            }
            for name, data in {"train": p.train, **p.evals}.items()
        },
    }


def summary(
    p: Plan, step: Any, folder: Path, first: int, resume: bool, tensorboard: str
) -> list[Row]:
    """What is about to happen, for the table at the start."""
    ex = p.ex
    devices = list(p.mesh.devices.flat)
    rows: list[Row] = [
        ("devices", f"{len(devices)} x {devices[0].device_kind}, through {ex.parallel}"),
        ("parameters", f"{parameters(p):,}"),
        ("FLOPs a step", f"{flops(step):.3g}"),
        ("train", f"{p.train.name}: {len(p.train):,} examples"),
        *((split, f"{data.name}: {len(data):,} examples") for split, data in p.evals.items()),
        ("steps", f"{p.steps:,} with {ex.batch} examples each; {p.steps_per_epoch:,} an epoch"),
        ("folder", str(folder)),
        ("TensorBoard", tensorboard),
    ]
    if resume:
        rows.append(
            ("resumed", f"from step {first:,}" if first else "nothing there: from the start")
        )
    return rows


def diverged(error: Diverged, checkpoints: Checkpoints, folder: Path) -> Diverged:
    """Keeps the State, and says what is left and what to try."""
    aside = folder / "diverged"
    with Checkpoints(aside, description={}, keep=1) as kept:
        kept.save(error.state)
    good = checkpoints.latest_step()
    last = "no checkpoint before it" if good is None else f"the last good checkpoint is step {good}"
    return Diverged(
        f"{error}; {last}; the state is kept in {aside}; try a lower learning rate or clip_norm=1"
    )


def finish(p: Plan, state: State, folder: Path, log: Log) -> None:
    """The end table, result.json and the pictures."""
    metrics, step = read_metrics(folder), int(state.step)
    final = {line["split"]: line for line in metrics if line["step"] == step}
    rows: list[Row] = [("split", "metric", "value")]
    result: dict[str, Any] = {"step": step, "of": p.steps, "seed": p.ex.seed}
    for split, line in final.items():
        values = {k: v for k, v in line.items() if k not in ("step", "split")}
        scalars = {k: v for k, v in values.items() if isinstance(v, int | float)}
        rows += [(split, k, f"{v:.4f}") for k, v in scalars.items() if k not in PACE]
        result[split] = scalars
    result["seconds"] = metrics[-1]["time"] if metrics else 0.0
    folders.write_result(folder, result)
    log.table(f"{p.ex.name} after {step:,} of {p.steps:,} steps, {result['seconds']:.1f} s", rows)
    if metrics:
        plots.curves(metrics, folder / "curves.png")
    for i, (split, data) in enumerate(p.evals.items()):
        suffix = f"-{split}" if i else ""
        if split in final and "confusion_matrix" in final[split]:
            counts_KxK = np.array(final[split]["confusion_matrix"])
            plots.confusion(counts_KxK, data.classes, folder / f"confusion{suffix}.png")
        if len(shape := data.fields["x"].shape) == 4 and shape[-1] in (1, 3) and data.classes:
            examples(p, state, data, folder / f"examples{suffix}.png")


def examples(p: Plan, state: State, data: Dataset, path: Path) -> None:
    """The first images of a split, with what the model makes of them."""
    batch = {name: field[np.arange(min(36, len(data)))] for name, field in data.fields.items()}
    params, variables = jax.device_get((state.params, state.variables))
    outputs_NxK = jax.jit(partial(predict, p.ex))(params, variables, batch)
    chances_NxK = np.asarray(jax.nn.softmax(outputs_NxK))
    said_N, chance_N = chances_NxK.argmax(-1), chances_NxK.max(-1)
    truth_N = batch["y"] if batch["y"].ndim == 1 else batch["y"].argmax(-1)
    x_NxHxWxC = np.asarray(batch["x"], np.float32)  # as floats they are shown from black to white
    plots.examples(x_NxHxWxC, truth_N, said_N, chance_N, data.classes, path)


def flops(step: Any) -> float:
    """Floating-point operations of a lowered computation, as XLA counts them before optimising."""
    return step.cost_analysis()["flops"]


def parameters(p: Plan) -> int:
    """How many numbers the model learns."""
    shapes = jax.tree.leaves(jax.eval_shape(p.init).params)
    return sum(int(np.prod(a.shape)) for a in shapes)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} GiB"
