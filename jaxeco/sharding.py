"""How the devices of a mesh share a State: from logical names of a parameter's axes to shardings.

A model says what the axes of its parameters are (`logical_axes`: patterns of names, see
`models.transformer`); where it does not, a kernel is [..., in, out], as Flax has them, and all else
stays whole. `axes.RULES` says which axes of the mesh split which of these. Optimizers keep arrays
under their parameters' names: those of the same shape are split alike.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeco import axes
from jaxeco.errors import UserError
from jaxeco.trees import listed, map_named, named

Names = tuple[str | None, ...]

KERNELS: Mapping[str, Names] = {r"(.*/)?kernel": ("in", "out")}


def logical_axes(model: Any) -> Mapping[str, Names]:
    """What the axes of a model's parameters are, by pattern; the first that fits counts."""
    return {**getattr(inner(model), "logical_axes", {}), **KERNELS}


def inner(model: Any) -> Any:
    """The model that says how its parameters are to be treated: not Lora, but what it wraps."""
    return getattr(model, "model", model)


def shardings(state: Any, model: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a State.

    Args:
      state: of arrays or their shapes, with `params` among its fields.

    Raises:
      UserError: the mesh does not divide what it is to split, or has nothing to split.
    """
    sizes, patterns = dict(mesh.shape), logical_axes(model)
    params = named(state.params)
    try:
        specs = {name: _spec(name, leaf.shape, patterns, sizes) for name, leaf in params.items()}
    except ValueError as error:
        raise UserError(f"{error}") from error
    used = {axis for spec in specs.values() for part in spec for axis in _names(part)}
    for axis in ("fsdp", "tensor"):
        if sizes[axis] > 1 and axis not in used:
            widths = sorted({n for leaf in params.values() for n in leaf.shape})
            raise UserError(
                f"mesh {axis}:{sizes[axis]} divides no parameter of this model, whose widths are"
                f" {', '.join(map(str, widths))}"
            )
    if sizes["sequence"] > 1 and patterns == KERNELS:
        raise UserError(
            f"mesh sequence:{sizes['sequence']} is for transformers: {type(model).__name__} has no"
            " axis of that name"
        )

    def sharding(name: str, leaf: Any) -> NamedSharding:
        """Of the parameter whose name ends this one, if there is one of the same shape."""
        words = name.split("/")
        for first in range(len(words)):
            param = "/".join(words[first:])
            if param in params and params[param].shape == leaf.shape:
                return NamedSharding(mesh, specs[param])
        return NamedSharding(mesh, P())

    return map_named(sharding, state)


def _spec(name: str, shape: Sequence[int], patterns: Mapping[str, Names], sizes: Any) -> P:
    for pattern, names in patterns.items():
        if re.fullmatch(pattern, name) and len(names) <= len(shape):
            # axes before those that are named: of a stack of layers, or of a window of pixels
            whole = (None,) * (len(shape) - len(names))
            try:
                return axes.split(sizes, whole + names, shape)
            except ValueError as error:
                raise ValueError(f"{name} {list(shape)}: {error}") from error
    return P()


def gathered(model: Any, params: Any) -> Any:
    """Parameters as a step uses them: what `fsdp` has split is whole again. To be traced.

    Stated for each parameter before its use, because XLA does not always sum the parts of gradients
    where it is left to choose (openxla/xla#40034; tests/test_sharding.py has an example). Not so
    what a scan over layers stacks, under "blocks": all layers would be whole at once.
    """
    sizes = axes.mesh_sizes()
    if sizes is None or sizes["fsdp"] == 1:
        return params
    patterns = logical_axes(model)

    def gather(name: str, w: jax.Array) -> jax.Array:
        if "/blocks/" in f"/{name}":
            return w
        spec = _spec(name, w.shape, patterns, {**sizes, "fsdp": 1})
        return jax.lax.with_sharding_constraint(w, spec)

    return map_named(gather, params)


def table(state: Any) -> list[tuple[str, str, str, int, int]]:
    """What is split how, for a person; `state`: shapes with shardings.

    Parameters that are alike share a row; all that is no parameter has one. Columns: arrays, shape
    of each, mesh axes of each of its axes, bytes on each device, bytes in all.
    """
    rows: dict[tuple[str, str], tuple[set[str], list[int]]] = {}
    for name, leaf in named(state).items():
        part, *path = name.split("/")
        spec = [_names(names) for names in leaf.sharding.spec]
        spec += [()] * (leaf.ndim - len(spec))
        split = " x ".join("+".join(names) or "-" for names in spec) if any(spec) else "whole"
        shape = "x".join(map(str, leaf.shape)) if any(spec) else ""
        kind = "/".join(path[-2:]) if any(spec) else "other parameters"
        if part != "params":
            shape, kind, split = "", "optimizer and other state", "as the parameters"
        kinds, sums = rows.setdefault((shape, split), (set(), [0, 0, 0]))
        kinds.add(kind)
        here = math.prod(leaf.sharding.shard_shape(leaf.shape))
        for i, more in enumerate((1, here * leaf.dtype.itemsize, leaf.size * leaf.dtype.itemsize)):
            sums[i] += more
    return [
        (listed(sorted(kinds), most=1), f"{n} of {shape}" if shape else "", split, here, total)
        for (shape, split), (kinds, (n, here, total)) in rows.items()
    ]


def _names(part: Any) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())
