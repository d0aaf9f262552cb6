"""Where a step meets the devices: the mesh, and one function compiled in any of three ways.

The function is the same in all three: `jit` shows it whole arrays and lets XLA split the work;
`shard_map` and `pmap` show it one device's share of the batch, and it sums over the others through
`jaxeco.axes`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeco.axes import BATCH, MESH
from jaxeco.errors import UserError
from jaxeco.experiment import MeshShape

FED = P(None, BATCH)  # what is fed to a call: [steps, batch, ...]

# (carry, resident, fed) -> two results; what is fed is this process's share
Function = Callable[[Any, Any, Any], tuple[Any, Any]]


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all) as an array with the axes of `MESH`.

    A mesh of fewer devices takes the first of them, as long as one process has them all.

    Raises:
      UserError: there are too few, or they cannot be shared out so.
    """
    devices = jax.devices() if devices is None else devices
    inner = shape.fsdp * shape.sequence * shape.tensor
    data = shape.data or len(devices) // inner
    size, has = data * inner, f"{len(devices)} ({devices[0].platform})"
    if shape.data is None and (size != len(devices) or not size):
        raise UserError(
            f"mesh={shape} shares {inner} devices, there are {has}: expected a number that divides"
            " them, or data:N to use fewer"
        )
    if size > len(devices):
        advice = "expected as many at most"
        if devices[0].platform == "cpu":
            advice = (
                "to try it on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count="
                + str(size)
            )
        raise UserError(f"mesh={shape} needs {size} devices, there are {has}: {advice}")
    if size < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh={shape} needs {size} devices, there are {has}: expected all, since each process"
            " takes part"
        )
    sizes = (data, shape.fsdp, shape.sequence, shape.tensor)
    types = (AxisType.Auto,) * len(MESH)
    return jax.make_mesh(sizes, MESH, axis_types=types, devices=devices[:size])


def check_batch(name: str, batch: int, mesh: Mesh, grad_accum: int = 1) -> None:
    """Raises UserError unless every device gets the same number of examples."""
    ways = _ways(mesh)
    share = ways * grad_accum
    if batch % share:
        by = f"{ways} devices"
        if mesh.size > ways:
            by = f"{ways} groups of devices ({' x '.join(f'{a}:{mesh.shape[a]}' for a in BATCH)})"
        if grad_accum > 1:
            by += f" x grad_accum={grad_accum} = {share}"
        below = batch // share * share
        advice = f"{below} or {below + share}" if below else f"{share}"
        raise UserError(f"{name}={batch} is not divisible by {by}; try {name}={advice}")


def check_parallel(how: str, mesh: Mesh) -> None:
    """Raises UserError unless the mesh can be used in this way."""
    if how != "jit" and (beyond := [a for a in MESH if a != "data" and mesh.shape[a] > 1]):
        given = ",".join(f"{a}:{mesh.shape[a]}" for a in beyond)
        raise UserError(f"parallel={how} shares the batch alone: {given} needs parallel=jit")
    if how == "pmap" and jax.process_count() > 1:
        raise UserError("parallel=pmap serves one process: use jit or shard_map with several")


def _ways(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def share(mesh: Mesh, batch: int) -> np.ndarray:
    """Positions in a global batch whose examples this process's devices hold: i64, ascending."""
    parts = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[part] for part in parts]))


def room(device: jax.Device) -> float:
    """Bytes of memory that a device has left, or nearly so; a CPU's are the machine's."""
    if stats := device.memory_stats():
        return 0.9 * (stats["bytes_limit"] - stats["bytes_in_use"])
    meminfo = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = re.search(r"MemAvailable: +(\d+) kB", meminfo)
    free = int(found[1]) * 1024 if found else 2**63
    try:  # what a container may take at most
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current")
        )
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):  # there is no such limit
        pass
    return 0.8 * free


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place(tree: Any, mesh: Mesh) -> Any:
    """A copy on every device of arrays that every process holds."""
    whole = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, whole)
    # no comparison between the processes, as device_put makes: each has read the same data
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(whole, a, a.shape), tree)


def compiled(
    function: Function, how: str, mesh: Mesh, carry: Any = None, *, updates: bool
) -> Function:
    """As `compiled_async`, but a call waits for its results where the CPU plays several devices.

    There XLA's collectives share one pool of threads: calls that overlap can take each other's, and
    then none ends until XLA gives up and aborts the process.
    """
    call = compiled_async(function, how, mesh, carry, updates=updates)
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        return lambda carry, resident, fed: jax.block_until_ready(call(carry, resident, fed))
    return call


def compiled_async(
    function: Function, how: str, mesh: Mesh, carry: Any = None, *, updates: bool
) -> Function:
    """Compiles `function` so that the devices share what is fed.

    Args:
      function: pure; `resident` is on every device, `fed` is [steps, batch, ...].
      how: "jit", "shard_map" or "pmap".
      mesh: as `make_mesh` makes it.
      carry: shardings of the function's first argument, a prefix of its tree; None: whole on every
        device, as it must be under shard_map and pmap.
      updates: the first of the two results is the next carry, in the memory of the old one, which
        the caller gives up. Else all results are whole on every device.

    Returns:
      A function of the same signature, to which each process hands its `share` of what is fed.
    """
    whole, split = replicated(mesh), NamedSharding(mesh, FED)
    carry = whole if carry is None else carry
    donated = (0,) if updates else ()
    if how == "jit":

        def within(carry: Any, resident: Any, fed: Any) -> tuple[Any, Any]:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for axes.constrain
                return function(carry, resident, fed)

        call: Function = jax.jit(
            within,
            in_shardings=(carry, whole, split),
            out_shardings=(carry if updates else whole, whole),
            donate_argnums=donated,
        )
    elif how == "shard_map":
        # check_vma=False: gradients stay local until the step itself sums them, as under pmap
        local = jax.shard_map(
            function, mesh=mesh, in_specs=(P(), P(), FED), out_specs=P(), check_vma=False
        )
        call = jax.jit(local, donate_argnums=donated)
    elif how == "pmap":
        mapped = jax.pmap(
            function,
            axis_name="data",
            in_axes=(None, None, 1),
            out_axes=None,
            devices=list(mesh.devices.flat),
            donate_argnums=donated,
        )

        def by_device(a: np.ndarray) -> np.ndarray:
            return a.reshape(a.shape[0], mesh.size, -1, *a.shape[2:])

        return lambda carry, resident, fed: mapped(carry, resident, jax.tree.map(by_device, fed))
    else:
        raise ValueError(f"parallel={how!r}: expected jit, shard_map or pmap")
    if jax.process_count() == 1:
        return call

    def joined(a: np.ndarray) -> jax.Array:
        """The processes' shares as one array."""
        batch = a.shape[1] * _ways(mesh) // len(share(mesh, _ways(mesh)))
        return jax.make_array_from_process_local_data(split, a, (len(a), batch, *a.shape[2:]))

    return lambda carry, resident, fed: call(carry, resident, jax.tree.map(joined, fed))
