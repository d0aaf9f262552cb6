"""An experiment file with other defaults: its text stays as it is, comments and all, but for them.

Arguments of `experiment` get new defaults in place. Fields that are no arguments are set by a few
lines at the end of the file, around the function.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from jaxeco import config
from jaxeco.config import Loaded
from jaxeco.errors import UserError

HEAD = """

# What was found for arguments and fields that have no place above.
import functools as _functools
"""
PARTIAL = """
experiment = _functools.partial(experiment, {arguments})
"""
FIELDS = """
from jaxeco import config as _config

_FIELDS = {fields}
_experiment = experiment


@_functools.wraps(_experiment)
def experiment(*args, **arguments):
    found = _experiment(*args, **arguments)
    for path, text in _FIELDS.items():
        found = _config.override(found, path.split("."), text, path)
    return found
"""


def with_defaults(loaded: Loaded, said: str) -> str:
    """The text of the experiment file such that, without any words, it is the experiment loaded.

    What the file claims of itself (CLAIMS) is left out: it was claimed of other defaults.

    Args:
      loaded: the file, and the words that are to become its defaults.
      said: becomes the first line of its docstring.

    Raises:
      UserError: a value cannot be written into Python.
    """
    _, function = config._function(loaded.path)
    hints, arguments, fields = config._hints(function), {}, {}
    known = config.inspect.signature(function).parameters
    for word in loaded.assignments:
        name, _, text = word.partition("=")
        if name in known:
            hint = hints[name] if name in hints else type(known[name].default)
            arguments[name] = _literal(config.parse(text, hint, name), name)
        else:
            fields[name] = text
    tree = ast.parse(loaded.source)
    edits = [_docstring(tree, loaded.source, said), *_without_claims(tree, loaded.source)]
    places = _defaults(tree, loaded.source, arguments)
    edits += [places[name] for name in arguments if name in places]
    text = _edited(loaded.source, edits).rstrip() + "\n"
    rest = {name: value for name, value in arguments.items() if name not in places}
    if rest or fields:
        text += HEAD
    if rest:
        text += PARTIAL.format(arguments=", ".join(f"{k}={v}" for k, v in rest.items()))
    if fields:
        text += FIELDS.format(fields=repr(fields))
    return text


Edit = tuple[int, int, str]  # from which byte up to which, and what stands there instead


def _edited(source: str, edits: Sequence[Edit]) -> str:
    data = source.encode()
    for begin, end, text in sorted(edits, reverse=True):
        data = data[:begin] + text.encode() + data[end:]
    return data.decode()


def _span(source: str, node: Any) -> tuple[int, int]:
    """The bytes of a node: ast counts columns in bytes of UTF-8."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    begin = starts[node.lineno - 1] + node.col_offset
    return begin, starts[node.end_lineno - 1] + node.end_col_offset


def _docstring(tree: ast.Module, source: str, said: str) -> Edit:
    old = ast.get_docstring(tree)
    said = said.replace("\\", "\\\\").replace('"""', "'''")
    if old is None:
        first = source.splitlines(keepends=True)[:2]
        kept = [line for line in first if line.startswith("#!") or "coding" in line]
        at = len("".join(kept).encode())
        return at, at, f'"""{said}"""\n\n'
    begin, end = _span(source, tree.body[0])
    literal = source.encode()[begin:end].decode()
    mark = literal.find('"""')
    if 0 <= mark <= 1:
        inside = begin + mark + 3
        return inside, inside, f"{said}\n\n"
    old = old.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return begin, end, f'"""{said}\n\n{old}\n"""'


def _without_claims(tree: ast.Module, source: str) -> list[Edit]:
    found = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if any(isinstance(t, ast.Name) and t.id == "CLAIMS" for t in targets):
            begin, end = _span(source, node)
            rest = source.encode()[end:]
            found.append((begin, end + len(rest) - len(rest.lstrip(b"\n")), ""))
    return found


def _defaults(tree: ast.Module, source: str, values: Mapping[str, str]) -> dict[str, Edit]:
    """Where the defaults of `experiment` stand, if the file defines it by itself."""
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "experiment"]
    found: dict[str, Edit] = {}
    for function in functions[-1:]:
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        missing = [None] * (len(positional) - len(arguments.defaults))
        defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
        for argument, default in zip([*positional, *arguments.kwonlyargs], defaults, strict=True):
            if argument.arg not in values:
                continue
            value = values[argument.arg]
            if default is not None:
                found[argument.arg] = (*_span(source, default), value)
            else:
                _, end = _span(source, argument)
                found[argument.arg] = (
                    end,
                    end,
                    f" = {value}" if argument.annotation else f"={value}",
                )
    return found


def _literal(value: Any, name: str) -> str:
    def plain(value: Any) -> bool:
        if isinstance(value, tuple):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    if not plain(value):
        raise UserError(f"{name}: {value!r} has no notation in Python that needs no import")
    return repr(value)
