"""One session of a run, as a person sees it: summary, training, end table, pictures, result."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxeco import axes, hosts, onednn, outcome, parallel, plots, sharding, trackers
from jaxeco import folder as folders
from jaxeco.checkpoint import Checkpoints
from jaxeco.config import Loaded
from jaxeco.data.dataset import Dataset
from jaxeco.description import describe, flatten
from jaxeco.errors import UserError
from jaxeco.fit import fit, stalled
from jaxeco.forward import predict
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log, read_metrics, table
from jaxeco.plan import Plan, plan, shapes
from jaxeco.profile import Profile, window
from jaxeco.recovery import Diverged
from jaxeco.train import State, train_step
from jaxeco.trees import named

if TYPE_CHECKING:
    from jaxeco.pretrained import Report

Row = Sequence[str]


def run(
    loaded: Loaded,
    workdir: Path | None,
    resume: bool,
    stop_at: int | None,
    profiled: Sequence[int] | None = None,
) -> int:
    """Trains, evaluates, saves and reports; returns the exit status.

    Args:
      profiled: first step and end of what to profile; () leaves the choice to `profile.window`.

    Raises:
      UserError: something does not fit, before anything is compiled; or a file cannot be written.
      RunFailed: the loss became NaN or infinite.
    """
    ex = loaded.experiment
    folders.check(ex.name, workdir, resume)  # complains before the data is opened
    trackers.check(ex.trackers)
    p = plan(ex)
    check_alike(p, {"--resume": resume, "--steps": stop_at, "--profile": profiled})
    with (
        folders.claimed(ex.name, workdir, resume) as folder,
        Checkpoints(
            folder / folders.CHECKPOINTS,
            description=outcome.identity(p),
            keep=ex.keep,
            best=ex.best,
            best_mode=ex.best_mode,
        ) as checkpoints,
    ):
        found = checkpoints.restore(p.abstract_state()) if resume else None
        reports: list[Report] = []
        end = min(p.steps, stop_at or p.steps)
        at = None
        if profiled is not None:
            at = window(p, found[1] if found else 0, end, profiled)
        state, first = found or (p.start(reports.append), 0)
        facts, notes = outcome.environment(p), []
        if hosts.first():
            notes = folders.record(folder, loaded, first_step=first, **facts)
            if p.train.tokenizer:
                p.train.tokenizer.save(folder / folders.TOKENIZER)
        with (
            Log(
                folder,
                total_steps=p.steps,
                first_step=first,
                examples_per_step=ex.batch,
                trackers=ex.trackers,
                settings=flatten(describe(ex)),
                unit=p.train.unit,
                units=p.train.units,
            ) as log,
            Interrupt() as interrupt,
        ):
            rows = summary(p, folder, first, resume, log.tracked)
            log.table(ex.name, [*rows, *(row for report in reports for row in report.rows())])
            if any(p.mesh.shape[axis] > 1 for axis in ("fsdp", "tensor")):
                log.table(*shared_out(p))
            for note in notes:
                log.warn(note)
            try:
                profile = Profile(at, p, folder, log) if at else None
                state = fit(p, state, checkpoints, log, interrupt, stop_at, profile)
            except Diverged as error:
                if hosts.first():
                    reached = int(error.state.step)
                    outcome.finish(p, reached, read_metrics(folder), folder, log, "diverged")
                raise diverged(error, checkpoints, folder) from error
            log.finished()
            step = int(state.step)
            ended, said = ending(p, first, step, interrupt, log)
            if said:
                log.note(said)
            if hosts.first():
                outcome.finish(p, step, read_metrics(folder), folder, log, ended)
            if not interrupt.asked():
                pictures(p, state, folder)
    return interrupt.exit_status if interrupt.signal else 0


def dry_run(loaded: Loaded) -> int:
    """Prints the resolved experiment and what a step costs; trains nothing, writes nothing."""
    p = plan(loaded.experiment)
    if not hosts.first():
        return 0
    state, batch = p.abstract_state(), shapes(p.train, p.ex.batch)
    shared = NamedSharding(p.mesh, PartitionSpec(axes.BATCH))
    step = jax.jit(p.step, in_shardings=(p.shardings, shared), donate_argnums=0)
    with jax.sharding.use_abstract_mesh(p.mesh.abstract_mesh):
        memory: Any = step.lower(state, batch).compile().memory_analysis()
    held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    for path, value in flatten(describe(loaded.experiment)).items():
        shown = ",".join(map(str, value)) or "()" if isinstance(value, list) else value
        print(f"{path:<28} {shown}")
    rows = {
        "parameters": parameters(p),
        "steps": f"{p.steps:,} ({p.steps_per_epoch:,} an epoch)",
        "FLOPs a step": f"{flops(p):.3g}",
        "memory a step": f"{_size(held + temporary)}: {_size(held)} for state and batch,"
        f" {_size(temporary)} while it runs" + ", on each device" * (p.mesh.size > 1),
        "memory of the data": _size(sum(d.nbytes for d in (p.train, *p.evals.values()))),
    }
    print("", *(f"{name:<28} {text}" for name, text in rows.items()), sep="\n")
    if any(p.mesh.shape[axis] > 1 for axis in ("fsdp", "tensor")):
        print("", table(*shared_out(p)), sep="\n")
    return 0


def check_alike(p: Plan, words: dict[str, Any]) -> None:
    """Raises UserError, on all processes, unless all have the same experiment, data and words.

    Otherwise they would wait for each other where only some of them come.
    """
    if (n := jax.process_count()) > hosts.count():
        raise UserError(f"this is one of {n} hosts of a pod: start it on all, with --multihost")
    data = {split: d.fingerprint for split, d in {"train": p.train, **p.evals}.items()}
    ours = json.loads(json.dumps(flatten(describe(p.ex)) | words | {"data": data}))
    theirs = hosts.from_first(ours)
    differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    for i, names in enumerate(hosts.gather(differing)):
        if names:
            raise UserError(
                f"process {i} of {hosts.count()} differs from the first in {', '.join(names[:8])}:"
                " start all with the same words, the same files and the same data"
            )


def summary(p: Plan, folder: Path, first: int, resume: bool, tracked: Sequence[Row]) -> list[Row]:
    """What is about to happen, for the table at the start."""
    ex = p.ex
    devices = list(p.mesh.devices.flat)
    spare = f" of {jax.device_count()}" if len(devices) < jax.device_count() else ""
    rows: list[Row] = [
        ("devices", f"{len(devices)} x {devices[0].device_kind}{spare}, through {ex.parallel}"),
        ("parameters", parameters(p)),
        ("FLOPs a step", f"{flops(p):.3g}"),
        ("train", _sized(p.train, p.train.training_examples)),
        *((split, _sized(data, data.eval_examples)) for split, data in p.evals.items()),
        ("steps", f"{p.steps:,} with {ex.batch} examples each; {p.steps_per_epoch:,} an epoch"),
        ("folder", str(folder)),
        *tracked,
    ]
    if resume:
        rows.append(
            ("resumed", f"from step {first:,}" if first else "nothing there: from the start")
        )
    return rows


def shared_out(p: Plan) -> tuple[str, list[Row]]:
    """What is split how over the devices, and what that comes to on each: a title and rows."""
    found = sharding.table(p.abstract_state())
    used = ", ".join(f"{axis}:{n}" for axis, n in p.mesh.shape.items() if n > 1)
    rows: list[Row] = [("state", "shape", "split over", "has", "of")]
    rows += [(*row[:3], _size(row[3]), _size(row[4])) for row in found]
    here, everywhere = sum(row[3] for row in found), sum(row[4] for row in found)
    rows.append(("all", "", "", _size(here), _size(everywhere)))
    return f"on each of {p.mesh.size} devices, {used}", rows


def ending(
    p: Plan, first: int, step: int, interrupt: Interrupt, log: Log
) -> tuple[outcome.Ended, str]:
    """How a session ends at `step`, and what to say of it: nothing at the end as planned."""
    since = stalled(p, log)
    if interrupt.signal or (step < p.steps and since is None):
        why = interrupt.signal.name if interrupt.signal else "--steps"
        return "interrupted", f"{why}: saved step {step:,}; --resume goes on from there"
    said = ["this run was complete already"] if first == step else []
    if step < p.steps:
        said.append(f"stopped early: no better {p.ex.best} since step {since:,}")
    return "stalled" if step < p.steps else "complete", "; ".join(said)


def diverged(error: Diverged, checkpoints: Checkpoints, folder: Path) -> Diverged:
    """Keeps the State, and says what is left and what to try."""
    aside, step = folder / "diverged", int(error.state.step)
    with Checkpoints(aside, description={}, keep=1) as kept:
        kept.save(error.state)
    checkpoints.wait()
    good = max((s for s in checkpoints.steps() if s < error.step), default=None)
    last = "no checkpoint before it" if good is None else f"the last good checkpoint is step {good}"
    advice = "try a lower learning rate, or clip_norm=1"
    if error.step == 0 and "update" not in str(error):
        advice = "no update came before it: look at the inputs, the labels and the initialisation"
    if error.training:
        replay = f"python -m jaxeco.replay {folder} {error.step + 1} --check"
        advice += f"; {replay} names the operation that went bad first"
    return Diverged(
        f"{error}; {last}; the state of step {step} is kept in {aside}; {advice}", error.step
    )


def pictures(p: Plan, state: State, folder: Path) -> None:
    """Curves; of each split, if they were measured, a confusion matrix, ROC and PR; examples.

    The first process draws, and all of them compute what it shows.
    """
    metrics = read_metrics(folder) if hosts.first() else []
    if hosts.first():
        plots.curves(metrics, folder / "curves.png")
    latest = {line["split"]: line for line in metrics}
    for i, (split, data) in enumerate(p.evals.items()):
        suffix = f"-{split}" if i else ""
        for name, file, draw in (
            ("confusion_matrix", "confusion", plots.confusion),
            ("roc_curve", "roc", plots.roc),
            ("pr_curve", "pr", plots.precision_recall),
        ):
            if hosts.first() and name in latest[split]:
                draw(np.array(latest[split][name]), data.classes, folder / f"{file}{suffix}.png")
        x = data.fields["x"] if "x" in data.fields else np.zeros(0)
        if len(x.shape) == 4 and x.shape[-1] in (1, 3) and data.classes:
            examples(p, state, data, folder / f"examples{suffix}.png")


def examples(p: Plan, state: State, data: Dataset, path: Path) -> None:
    """The first images of a split, with what the model makes of them."""
    batch = {name: field[np.arange(min(36, len(data)))] for name, field in data.fields.items()}
    whole = parallel.replicated(p.mesh)
    model = (state.params, state.variables)
    outputs_NxK = jax.jit(partial(predict, p.ex), out_shardings=whole)(
        *model, parallel.place(batch, p.mesh)
    )
    if not hosts.first():
        return
    chances_NxK = np.asarray(jax.nn.softmax(np.asarray(outputs_NxK)))
    said_N, chance_N = chances_NxK.argmax(-1), chances_NxK.max(-1)
    truth_N = batch["y"] if batch["y"].ndim == 1 else batch["y"].argmax(-1)
    x_NxHxWxC = np.asarray(batch["x"], np.float32)  # as floats they are shown from black to white
    plots.examples(x_NxHxWxC, truth_N, said_N, chance_N, data.classes, path)


def flops(p: Plan) -> float:
    """Floating-point operations of a step, as XLA counts them before it optimises."""
    # without micro-batches: XLA counts the body of a loop once, however often it runs
    step = partial(train_step, replace(p.ex, grad_accum=1), p.tx)
    with onednn.left_out():
        lowered = jax.jit(step).lower(jax.eval_shape(p.init), shapes(p.train, p.ex.batch))
    costs: Any = lowered.cost_analysis()
    return costs["flops"]


def parameters(p: Plan) -> str:
    """How many numbers the model has, and how many of them it learns, if not all."""
    params = named(jax.eval_shape(p.init).params)
    learnt = sum(a.size for name, a in params.items() if p.ex.optimizer.trains(name, a))
    total = sum(a.size for a in params.values())
    return f"{total:,}" if learnt == total else f"{total:,}, of which {learnt:,} are trained"


def _sized(data: Dataset, examples: int) -> str:
    each = f" of {data.units} {data.unit}" if data.units > 1 else ""
    return f"{data.name}: {examples:,} examples{each}"


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} GiB"
