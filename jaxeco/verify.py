"""Proves on this machine what a run promises: python -m jaxeco.verify FILE [key=value ...]

That a resumed run is the uninterrupted one, through files; that one device and several come to the
same, in every way that a step can be compiled; that data streamed is data held on the device. It
takes the experiment as it is, on real data, and works in a temporary folder.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxeco import command, config
from jaxeco.errors import RunFailed, UserError
from jaxeco.experiment import Experiment, MeshShape

if TYPE_CHECKING:
    import jax

    from jaxeco.parallel import Function
    from jaxeco.plan import Plan
    from jaxeco.train import State

FAKE = 8  # devices that a CPU plays if it is alone
FAKE_FLAG = "--xla_force_host_platform_device_count"
# Largest relative difference of a loss. bfloat16 keeps 8 bits: a sum in another order differs in
# the last of them, 0.4 %, and so does what follows.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
ROUNDING = """
A difference near 1e-7 at step 1 that grows is rounding: devices add up in another order. A run can
amplify it: AdamW moves a parameter by the sign of its gradient even where that is mere noise. A
difference that is there at step 1 is a defect. A GPU adds up in the same order each time only with
XLA_FLAGS=--xla_gpu_deterministic_ops=true, which "to the bit" may need there."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    level: Literal["ok", "failed", "not tried"]
    text: str

    def __str__(self) -> str:
        return f"{self.level:<10} {self.what:<36} {self.text}"


def fitted(ex: Experiment, devices: int, steps: int) -> tuple[Experiment, int, list[str]]:
    """The experiment and the number of steps as they are tried, and what was changed for that.

    Batches are made divisible by the number of devices; the number of steps even, in calls of which
    several fit into half of them.
    """
    notes = []
    share = devices * ex.grad_accum
    batch = max(1, ex.batch // share) * share
    eval_batch = max(1, ex.eval_batch // devices) * devices
    steps = steps // 2 * 2
    calls = gcd(ex.steps_per_call, steps // 2)
    for name, before, after in (
        ("batch", ex.batch, batch),
        ("eval_batch", ex.eval_batch, eval_batch),
        ("steps_per_call", ex.steps_per_call, calls),
    ):
        if before != after:
            notes.append(f"{name}={after} instead of {before}")
    return replace(ex, batch=batch, eval_batch=eval_batch, steps_per_call=calls), steps, notes


def layouts(
    ex: Experiment, devices: int, every_mesh: bool = False
) -> Iterator[tuple[str, Experiment]]:
    """Ways in which several devices may share a step; some may not suit the model.

    Args:
      every_mesh: whether to try all shapes, rather than each axis and a few mixtures.
    """
    row = MeshShape(data=devices)
    for how in ("jit", "shard_map", "pmap"):
        yield f"{how} {row}", replace(ex, parallel=how, mesh=row)
    meshes = [MeshShape(data=1, fsdp=devices)]
    if devices % 2 == 0:
        half = devices // 2
        meshes += [MeshShape(half, fsdp=2), MeshShape(half, tensor=2), MeshShape(half, sequence=2)]
    if devices % 8 == 0:
        meshes.append(MeshShape(devices // 4, fsdp=2, tensor=2))
    if ex.mesh != MeshShape():
        meshes.append(ex.mesh)
    if every_mesh:
        sizes = product(range(1, devices + 1), repeat=4)
        meshes += [MeshShape(*four) for four in sizes if prod(four) == devices]
    for mesh in dict.fromkeys(mesh for mesh in meshes if mesh != row):
        yield f"jit {mesh}", replace(ex, parallel="jit", mesh=mesh)


def compare(losses: np.ndarray, reference: np.ndarray, tolerance: float) -> tuple[bool, str]:
    """Whether losses agree, and the largest relative difference in words. Both f64[steps]."""
    difference = np.abs(losses - reference) / np.maximum(np.abs(reference), 1e-12)
    difference = np.nan_to_num(difference, nan=np.inf)
    at = int(difference.argmax())
    text = f"within {difference[at]:.1e} (step {at + 1})"
    if difference[at] <= tolerance:
        return True, text
    first = int((difference > tolerance).argmax())
    return False, (
        f"off by {difference[at]:.1e} (step {at + 1});"
        f" more than {tolerance:g} from step {first + 1} on; {difference[0]:.1e} at step 1"
    )


def train(
    p: "Plan", call: "Function", state: "State", first: int, stop: int
) -> tuple["State", np.ndarray]:
    """The State after steps `first` to `stop`, and their losses, f64[stop - first].

    Args:
      call: as `p.compiled()` gives it; gives up `state`.
    """
    import jax

    feed, n, losses = p.feed(), p.ex.steps_per_call, []
    try:
        for step in range(first, stop, n):
            state, sums = call(state, feed.resident, feed.fed(step, n))
            loss = jax.device_get(sums["loss"])
            losses.append(np.float64(loss.total) / np.float64(loss.weight))
    finally:
        feed.close()
    losses_n = np.concatenate(losses)
    if not np.isfinite(losses_n).all():
        bad = first + int(np.argmin(np.isfinite(losses_n))) + 1
        raise RunFailed(f"the loss is not finite at step {bad}; nothing can be compared")
    return state, losses_n


def bits(state: "State") -> dict[str, np.ndarray]:
    """Every array of a State on the host, by name; keys as numbers."""
    import jax

    from jaxeco.trees import named

    def data(leaf: Any) -> np.ndarray:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return {name: data(leaf) for name, leaf in named(state).items()}


def identical(what: str, found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> Row:
    """A row that says which arrays, by name, differ in any bit."""
    assert found.keys() == wanted.keys()
    differ = [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()]
    if not differ:
        return Row(what, "ok", f"{sum(a.size for a in wanted.values()):,} numbers, to the bit")
    largest = max(
        np.max(np.abs(found[name].astype(np.float64) - wanted[name].astype(np.float64)))
        for name in differ
    )
    more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
    return Row(what, "failed", f"{differ[0]}{more} differ, by {largest:.1e} at most")


def resumed(ex: Experiment, devices: list["jax.Device"], steps: int, folder: Path) -> Iterator[Row]:
    """Half the steps, a checkpoint, the other half from its files: against all in one go."""
    from jaxeco.checkpoint import Checkpoints
    from jaxeco.plan import plan

    p, half = plan(ex, devices), steps // 2
    call = p.compiled()
    final, losses = train(p, call, p.start(), 0, steps)
    middle, _ = train(p, call, p.start(), 0, half)
    saved = bits(middle)
    alone = plan(replace(ex, parallel="jit", mesh=MeshShape()), devices[:1])
    with Checkpoints(folder, description={}) as checkpoints:
        checkpoints.save(middle)
        checkpoints.wait()
        found = checkpoints.restore(p.abstract_state())
        elsewhere = checkpoints.restore(alone.abstract_state())
    if found is None or elsewhere is None:
        raise RunFailed("a checkpoint was saved, but is not there")
    state, rest = train(p, call, found[0], half, steps)
    yield identical("resumed = uninterrupted: State", bits(state), bits(final))
    names = [f"the loss of step {step + 1}" for step in range(half, steps)]
    wanted = dict(zip(names, losses[half:], strict=True))
    yield identical("resumed = uninterrupted: losses", dict(zip(names, rest, strict=True)), wanted)
    if len(devices) > 1:
        what = f"checkpoint of {len(devices)} devices, read on 1"
        yield identical(what, bits(elsewhere[0]), saved)


def streamed(ex: Experiment, devices: list["jax.Device"], steps: int) -> Row:
    """The batches of some steps, and of the first ones of the second epoch."""
    import jax

    from jaxeco.data.pipeline import assemble, fits
    from jaxeco.plan import plan

    what = "streamed = resident: batches"
    held = plan(replace(ex, parallel="jit", mesh=MeshShape()), devices)
    if not fits(held.train, max(ex.resident_bytes, 2**30)):
        gib = held.train.nbytes / 2**30
        return Row(what, "not tried", f"{gib:.1f} GiB of data are more than resident_gib")
    resident = replace(held, ex=replace(held.ex, resident_gib=1.0 + ex.resident_gib)).feed()
    stream = replace(held, ex=replace(held.ex, resident_gib=0.0)).feed()
    tried = [*range(steps), *range(held.steps_per_epoch - 1, held.steps_per_epoch + 2)]
    gather = jax.jit(assemble)
    found: dict[str, np.ndarray] = {}
    wanted: dict[str, np.ndarray] = {}
    try:
        for step in tried:
            for feed, into in ((stream, found), (resident, wanted)):
                fed = {name: values[0] for name, values in feed.fed(step).items()}
                batch = jax.device_get(gather(feed.resident, fed))
                into.update({f"{name} of step {step}": a for name, a in batch.items()})
    finally:
        stream.close()
        resident.close()
    return identical(what, found, wanted)


def many(
    ex: Experiment,
    devices: list["jax.Device"],
    steps: int,
    tolerance: float,
    every_mesh: bool = False,
) -> Iterator[Row]:
    """Training on all devices, in every layout, and evaluation: against one device."""
    import jax

    from jaxeco.plan import plan

    one = plan(replace(ex, parallel="jit", mesh=MeshShape()), devices[:1])
    state, reference = train(one, one.compiled(), one.start(), 0, steps)
    model = jax.device_get((state.params, state.variables))
    for name, tried in layouts(ex, len(devices), every_mesh):
        what = f"as on 1: {name}"
        try:
            p = plan(tried, devices)
            start = p.start()
        except UserError as error:
            yield Row(what, "not tried", str(error).splitlines()[0])
            continue
        _, losses = train(p, p.compiled(), start, 0, steps)
        agree, text = compare(losses, reference, tolerance)
        yield Row(what, "ok" if agree else "failed", text)
    alone = one.evaluators()
    p = plan(replace(ex, mesh=MeshShape(data=len(devices))), devices)
    placed = jax.tree.map(jax.device_put, model, (p.shardings.params, p.shardings.variables))
    for split, evaluator in p.evaluators().items():
        wanted, values = alone[split](*model), evaluator(*placed)
        assert wanted is not None and values is not None  # nothing interrupts them
        differences = {name: _distance(values[name], wanted[name]) for name in wanted}
        worst = max(differences, key=lambda name: differences[name])
        text = f"within {differences[worst]:.1e} ({worst})"
        what = f"as on 1: evaluation of {split}"
        yield Row(what, "ok" if differences[worst] <= tolerance else "failed", text)


def _distance(found: Any, wanted: Any) -> float:
    """The largest difference, as a part of the largest number. NaN is as good as NaN."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if np.array_equal(found, wanted, equal_nan=True):
        return 0.0
    difference = np.nan_to_num(np.abs(found - wanted), nan=np.inf).max()
    return float(difference / max(np.nan_to_num(np.abs(wanted)).max(), 1e-12))


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(prog="python -m jaxeco.verify", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("file", type=Path, help="the experiment, such as experiments/digits_mlp.py")
    add("assignments", nargs="*", metavar="key=value", help="its arguments, or fields: batch=16")
    add("--steps", type=int, default=20, help="steps that are compared (20)")
    add("--every-mesh", action="store_true", help="all mesh shapes, not a choice of them")
    add("--devices", type=int, help=f"default: all; {FAKE} fake ones where there is one CPU device")
    options = parser.parse_intermixed_args(words)
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: expected at least 2")
    if options.devices is not None and options.devices < 2:
        parser.error(f"--devices {options.devices}: expected at least 2")
    return options


def devices_to_use(asked: int | None) -> list["jax.Device"]:
    """The devices; where a CPU is alone, starts this command anew with several fake ones.

    Raises:
      UserError: there are fewer than asked for.
    """
    import jax

    there = jax.devices()
    if len(there) >= (asked or 2):
        return there[: asked or len(there)]
    flags = os.environ["XLA_FLAGS"]  # as `runtime.configure` has set them
    if there[0].platform == "cpu" and FAKE_FLAG not in flags:
        count = asked or FAKE
        print(f"one CPU device: it plays {count} ({FAKE_FLAG}={count})", flush=True)
        environment = os.environ | {"XLA_FLAGS": f"{FAKE_FLAG}={count} {flags}"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    if asked is not None:
        raise UserError(f"--devices {asked}: there are {len(there)} ({there[0].platform})")
    return there


def verify(
    ex: Experiment, devices: list["jax.Device"], steps: int, folder: Path, every_mesh: bool
) -> Iterator[Row]:
    """The rows, one by one as they are found."""
    tolerance = TOLERANCE[ex.precision]
    yield from resumed(ex, devices, steps, folder)
    yield streamed(ex, devices, steps)
    if len(devices) > 1:
        yield from many(ex, devices, steps, tolerance, every_mesh)
    else:
        text = "there is one; JAX_PLATFORMS=cpu tries it on fake ones"
        yield Row("1 device = several", "not tried", text)


def main(words: list[str]) -> int:
    """Prints the table; returns 1 if anything in it failed."""
    options = parse(words)
    loaded = config.load(options.file, options.assignments)
    devices = devices_to_use(options.devices)
    import jax

    from jaxeco.plan import plan

    ex, steps, notes = fitted(loaded.experiment, len(devices), options.steps)
    planned = plan(replace(ex, mesh=MeshShape()), devices).steps
    if planned < steps:
        ex, steps, more = fitted(ex, len(devices), planned)
        notes += [f"{steps} steps, of which the run has {planned}", *more]
    if steps < 2:
        raise UserError(f"a run of {planned} steps: expected at least 2, to cut it in two")
    kind = devices[0].device_kind
    print(f"{ex.name}: {steps} steps on {len(devices)} x {kind}, {ex.precision}")
    print(f"tolerance of losses and metrics: {TOLERANCE[ex.precision]:g}, relative to their size")
    if ex.precision == "float32" and devices[0].platform != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")
        notes.append("matrix products in full float32 (jax_default_matmul_precision=highest)")
    for note in notes:
        print(f"changed: {note}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="jaxeco-verify-") as folder:
        for row in verify(ex, devices, steps, Path(folder), options.every_mesh):
            print(row, flush=True)
            rows.append(row)
    failed = [row for row in rows if row.level == "failed"]
    if failed:
        print(ROUNDING)
    return 1 if failed else 0


if __name__ == "__main__":
    command.start(main)
