"""What a pure function needs to know about the mesh around it: which axes have split the batch.

Under plain `jit`, and uncompiled, an array is the whole batch and nothing here does anything.
Inside `shard_map` and `pmap` the same code sees one shard, and must then sum over all of them and
draw the random numbers that belong to its own examples.
"""

from typing import Any

import jax
import jax.numpy as jnp


def mapped_axes() -> tuple[str, ...]:
    """Mesh axes over which the surrounding shard_map or pmap has split the batch; () under jit."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


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
