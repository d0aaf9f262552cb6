"""Trees of arrays by the names of their leaves, and the safetensors files that hold such arrays.

A leaf's name is its path, "trunk/block_0/query/kernel"; a pattern of names is a regular expression
that matches the whole of it.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxeco.errors import UserError


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    by_name = {_name(path): leaf for path, leaf in leaves}
    assert len(by_name) == len(leaves), "two leaves have the same path"
    return by_name


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts whose leaves have these names."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """tree.map of `function`(name, leaf, ...)."""
    return jax.tree.map_with_path(lambda path, *leaves: function(_name(path), *leaves), tree, *rest)


def check_pattern(field: str, pattern: Any) -> None:
    """Raises ValueError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{field}: {pattern!r} is not a regular expression: {error}") from None


def listed(names: Any, most: int = 4) -> str:
    """Names as a person reads them: the first few, and how many there are beyond."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file by name, bfloat16 among them, and its metadata.

    Raises:
      UserError: it cannot be read, or it is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        Path(path).open("rb").close()  # for the system's own words: safetensors has others
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} holds a type of numbers that numpy lacks: {error}") from error
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file, or is cut off ({error}): copy or download it again"
        ) from error


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes arrays (numpy or JAX) as a safetensors file, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    from safetensors.numpy import save

    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    part = path.with_name(f".{path.name}.part")
    rows = {name: np.require(array, requirements="C") for name, array in arrays.items()}
    try:
        part.write_bytes(save(rows, dict(metadata)))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
