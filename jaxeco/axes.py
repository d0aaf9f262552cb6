"""What a pure function needs to know about the mesh around it: which axes have split what.

Under plain `jit`, and uncompiled, an array is whole. Where `jit` compiles for a mesh of devices,
`constrain` tells XLA how they are to share it. Inside `shard_map` and `pmap` the same code sees one
shard, and must then sum over all of them and draw its own examples' random numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BATCH = ("data", "fsdp")  # the mesh axes that share the examples of a batch
MESH = ("data", "fsdp", "sequence", "tensor")

# Which axes of a mesh split an axis of an array, by its logical name. An axis whose length they do
# not divide stays whole, unless it is STRICT: to be split was then the purpose of the mesh.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH,
    "sequence": ("sequence",),
    "heads": ("tensor",),  # of a kernel: all numbers of all heads
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # of parameters; the vectors between blocks are whole
    "in": ("fsdp",),
    "out": ("tensor",),
}
STRICT = ("sequence", "heads", "mlp", "embed")


def mapped_axes() -> tuple[str, ...]:
    """Mesh axes over which the surrounding shard_map or pmap has split the batch; () under jit.

    An axis of another name shares out other things, such as the members of a population.
    """
    return tuple(a for a in jax.sharding.get_abstract_mesh().manual_axes if a in MESH)


def split(sizes: dict[str, int], names: tuple[str | None, ...], shape: Any) -> PartitionSpec:
    """How a mesh with axes of these sizes splits an array whose axes have these logical names.

    Raises:
      ValueError: it does not divide an axis that is STRICT.
    """
    spec: list[tuple[str, ...] | None] = []
    for name, length in zip(names, shape, strict=True):
        axes = tuple(axis for axis in RULES[name] if sizes[axis] > 1) if name else ()
        parts = 1
        for axis in axes:
            parts *= sizes[axis]
        if length % parts and name in STRICT:
            raise ValueError(
                f"mesh {', '.join(f'{axis}:{sizes[axis]}' for axis in axes)} does not divide"
                f" {name}={length}; choose a divisor of {length}"
            )
        spec.append(axes if axes and length % parts == 0 else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, and XLA is told how the devices share it: each axis by its logical name, or None: whole.

    Does nothing outside a program for several devices, and inside shard_map and pmap.

    Raises:
      ValueError: as `split`.
    """
    sizes = mesh_sizes()
    if sizes is None:
        return x
    return jax.lax.with_sharding_constraint(x, split(sizes, names, x.shape))


def mesh_sizes() -> dict[str, int] | None:
    """The sizes of the mesh's axes where `jit` compiles for several devices, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    several = mesh.axis_names == MESH and mesh.size > 1 and not mesh.manual_axes
    return dict(mesh.shape) if several else None


def global_sum(tree: Any) -> Any:
    """Sums every leaf of `tree` over all shards of the batch; the identity under jit."""
    axes = mapped_axes()
    return jax.lax.psum(tree, axes) if axes else tree


def global_concat(tree: Any) -> Any:
    """Joins every leaf of `tree`, [B, ...], over all shards, in order; the identity under jit."""
    axes = mapped_axes()
    return jax.lax.all_gather(tree, axes, tiled=True) if axes else tree


def example_keys(key: jax.Array, n: int) -> jax.Array:
    """One random key for each of the `n` examples that this shard holds.

    The keys depend on an example's position in the *global* batch, so that dropout and augmentation
    draw the same numbers however many devices share the batch.

    Args:
      key: a typed PRNG key, the same on every shard.
      n: examples in this shard.

    Returns:
      keys_n: typed PRNG keys, shape [n].
    """
    axes = mapped_axes()
    first = jax.lax.axis_index(axes) * n if axes else 0
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(n))
