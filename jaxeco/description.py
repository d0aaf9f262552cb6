"""What a component is, in words that can be compared: nested dicts, lists and scalars."""

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from jaxeco.errors import UserError


def describe(value: Any) -> Any:
    """`value` as nested dicts, lists and scalars fit for JSON: the resolved experiment."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = {name: describe(child) for name, child in values(value).items()}
        return {"type": type(value).__name__, **inner}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [describe(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, functools.partial):
        arguments = {"args": describe(value.args), "keywords": describe(value.keywords)}
        return {"type": "partial", "function": describe(value.func), **arguments}
    if hasattr(value, "__qualname__"):  # a class or a function, which may hold values of its own
        name = f"{value.__module__}.{value.__qualname__}"
        held = inspect.getclosurevars(value).nonlocals if inspect.isfunction(value) else {}
        return {"type": name, **describe(held)} if held else name
    if hasattr(value, "tobytes"):
        return f"array {value.shape} sha256 {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if " at 0x" in (text := repr(value)):
        raise UserError(
            f"{text} cannot be described, so that a checkpoint could not tell whether it is the"
            " same; make it a function or a frozen dataclass"
        )
    return text


def flatten(description: Any, prefix: str = "") -> dict[str, Any]:
    """A description by dotted path; the paths are those that the command line takes."""
    if isinstance(description, Mapping):
        items = [(k, v) for k, v in description.items() if k != "type"]
        head = {prefix: description["type"]} if prefix and "type" in description else {}
    elif isinstance(description, list) and any(isinstance(v, Mapping | list) for v in description):
        head, items = {}, [(str(i), v) for i, v in enumerate(description)]
    else:
        return {prefix: description}
    for name, child in items:
        head |= flatten(child, f"{prefix}.{name}" if prefix else name)
    return head


def replaced(value: Any, new: Mapping[str, Any]) -> Any:
    """A copy of a component with other values at some of the dotted paths of `flatten`.

    Nothing is parsed or converted; components check what they are given.

    Raises:
      KeyError: there is no such path, or none that a copy can be made with.
    """
    if "" in new:
        return new[""]
    if isinstance(value, tuple):
        children: dict[str, Any] = {str(i): v for i, v in enumerate(value)}
    elif isinstance(value, Mapping):
        children = {str(name): v for name, v in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        children = values(value)
    else:
        raise KeyError(min(new))
    below: dict[str, dict[str, Any]] = {}
    for path, one in new.items():
        head, _, rest = path.partition(".")
        below.setdefault(head, {})[rest] = one
    children |= {head: replaced(children[head], inner) for head, inner in below.items()}
    if isinstance(value, tuple):
        return tuple(children.values())
    return children if isinstance(value, Mapping) else type(value)(**children)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths whose values are not the same in all of `settings`; one that is missing is another."""
    paths = dict.fromkeys(path for one in settings for path in one)
    absent = object()
    return [
        path
        for path in paths
        if any(
            (s[path] if path in s else absent)
            != (settings[0][path] if path in settings[0] else absent)
            for s in settings
        )
    ]


def values(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that its constructor takes; a Flax module's without its wiring."""
    wiring = ("parent", "name") if hasattr(value, "apply") else ()
    names = [f.name for f in fields(value) if f.init and f.name not in wiring]
    return {name: getattr(value, name) for name in names}
