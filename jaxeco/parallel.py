"""Where a step meets the devices: the mesh, and one function compiled in any of three ways.

The function is the same in all three: `jit` shows it whole arrays and lets XLA split the work;
`shard_map` and `pmap` show it one device's share of the batch, and it sums over the others through
`jaxeco.axes`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeco.errors import UserError

AXIS = "data"  # the mesh axis over which a batch is split
FED = P(None, AXIS)  # what is fed to a call: [steps, batch, ...]

# (carry, resident, fed) -> (carry, results); the carry and the results are the same on all devices
Function = Callable[[Any, Any, Any], tuple[Any, Any]]


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices (default: all) in one row, sharing the batch."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def check_batch(name: str, batch: int, mesh: Mesh, grad_accum: int = 1) -> None:
    """Raises UserError unless every device gets the same number of examples."""
    devices = mesh.shape[AXIS]
    share = devices * grad_accum
    if batch % share:
        by = f"{devices} devices"
        if grad_accum > 1:
            by += f" x grad_accum={grad_accum} = {share}"
        below = batch // share * share
        advice = f"{below} or {below + share}" if below else f"{share}"
        raise UserError(f"{name}={batch} is not divisible by {by}; try {name}={advice}")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device."""
    return jax.device_put(tree, replicated(mesh))


def compiled(function: Function, how: str, mesh: Mesh, donate: bool) -> Function:
    """As `compiled_async`, but a call waits for its results where the CPU plays several devices.

    There XLA's collectives share one pool of threads: calls that overlap can take each other's, and
    then none ends until XLA gives up and aborts the process.
    """
    call = compiled_async(function, how, mesh, donate)
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        return lambda carry, resident, fed: jax.block_until_ready(call(carry, resident, fed))
    return call


def compiled_async(function: Function, how: str, mesh: Mesh, donate: bool) -> Function:
    """Compiles `function` so that the devices share what is fed.

    Args:
      function: pure; `carry` and `resident` are on every device, `fed` is [steps, batch, ...].
      how: "jit", "shard_map" or "pmap".
      mesh: as `data_mesh` makes it.
      donate: the carry's memory is reused for the new carry; the caller gives the old one up.

    Returns:
      A function of the same signature.
    """
    donated = (0,) if donate else ()
    if how == "jit":
        whole, split = replicated(mesh), NamedSharding(mesh, FED)
        return jax.jit(
            function,
            in_shardings=(whole, whole, split),
            out_shardings=whole,
            donate_argnums=donated,
        )
    if how == "shard_map":
        # check_vma=False: gradients stay local until the step itself sums them, as under pmap
        local = jax.shard_map(
            function, mesh=mesh, in_specs=(P(), P(), FED), out_specs=P(), check_vma=False
        )
        return jax.jit(local, donate_argnums=donated)
    if how == "pmap":
        mapped = jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=(None, None, 1),
            out_axes=None,
            devices=list(mesh.devices.flat),
            donate_argnums=donated,
        )

        def by_device(a: np.ndarray) -> np.ndarray:
            return a.reshape(a.shape[0], mesh.size, -1, *a.shape[2:])

        return lambda carry, resident, fed: mapped(carry, resident, jax.tree.map(by_device, fed))
    raise ValueError(f"parallel={how!r}: expected jit, shard_map or pmap")
