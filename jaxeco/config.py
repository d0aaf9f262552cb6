"""From text to an Experiment and back: load a file, bind its arguments, override, describe.

Strict throughout: an unknown name, a value of the wrong type or a file that does not load is a
`UserError` of one line. Standard library only.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import io
import runpy
import sys
import tokenize
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from jaxeco.description import values
from jaxeco.errors import UserError
from jaxeco.experiment import Experiment


@dataclass(frozen=True)
class Loaded:
    """An experiment, and the text it came from."""

    experiment: Experiment
    path: Path
    source: str
    assignments: tuple[str, ...]  # the key=value words of the command line


@dataclass(frozen=True)
class Axis:
    """One --grid: a key and the texts of its values."""

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """Reads "lr=0.01,0.03", or with semicolons; raises ValueError where it cannot."""
        key, equals, rest = text.partition("=")
        values = tuple(v.strip() for v in rest.split(";" if ";" in rest else ",") if v.strip())
        if not equals or not key or not values:
            raise ValueError(f"{text!r}: expected key=value,value,..., such as lr=0.01,0.03")
        if len(set(values)) < len(values):
            raise ValueError(f"{text!r}: a value is given twice")
        return cls(key, values)


def load(path: str | Path, assignments: Sequence[str] = ()) -> Loaded:
    """Runs an experiment file and binds `key=value` words to it.

    A key that is an argument of the file's `experiment` function is bound before the function is
    called, typed by its annotation; any other is a field of the resulting Experiment, dotted where
    it lies deeper ("model.width=32").

    Raises:
      UserError: no such file, it does not run, it defines no `experiment`, or a word does not fit.
    """
    path = Path(path)
    source, function = _function(path)
    parameters = inspect.signature(function).parameters
    hints = _hints(function)
    arguments: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    for word in assignments:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r}: expected key=value, such as seed=1")
        if key in arguments or key in overrides:
            raise UserError(f"{key} is given twice")
        if key in parameters:
            default = parameters[key].default
            hint = hints[key] if key in hints else type(default)
            arguments[key] = parse(text, hint, key)
        else:
            overrides[key] = text
    experiment = _guarded(path, lambda: function(**arguments))
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path}: experiment() returned {experiment!r}, expected an Experiment")
    for key, text in overrides.items():
        parts = key.split(".")
        if len(parts) == 1 and parts[0] not in (f.name for f in fields(Experiment)):
            known = [*parameters, *(f.name for f in fields(Experiment))]
            raise UserError(f"{path} has no argument {key!r}{_nearest(key, known, parameters)}")
        experiment = _guarded(path, functools.partial(override, experiment, parts, text, key))
    return Loaded(experiment, path, source, tuple(assignments))


def parse(text: str, hint: Any, name: str) -> Any:
    """Reads `text` as a value of type `hint`; `name` is for the message.

    Understands int, float, bool, str, None, Literal, unions, tuples (comma separated), and classes
    that have a `parse`.

    Raises:
      UserError: the text is not such a value.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return text
    if hint in (None, types.NoneType) and text.lower() == "none":
        return None
    if hint is bool and text.lower() in ("true", "1", "yes", "false", "0", "no"):
        return text.lower() in ("true", "1", "yes")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    if hint is str:
        return text
    if hasattr(hint, "parse"):  # a class that has a notation of its own
        try:
            return hint.parse(text)
        except ValueError as error:
            raise UserError(f"{name}={text}: {error}") from error
    if origin is typing.Literal:
        for option in options:
            if text == str(option):
                return option
        nearest = _nearest(text, [str(o) for o in options], options)
        raise UserError(f"{name}={text}: not one of the choices{nearest}")
    if origin in (typing.Union, types.UnionType):
        notations = [option for option in options if hasattr(option, "parse")]
        if notations and not (types.NoneType in options and text.lower() == "none"):
            return parse(text, notations[0], name)  # so that its own message is heard
        # None first, and text last: "none" and "3" should not become strings where a better fit is
        for option in sorted(options, key=lambda o: (o is str, o is not types.NoneType)):
            try:
                return parse(text, option, name)
            except UserError:
                continue
    if origin is tuple:
        words = [w.strip() for w in text.strip("()[]").split(",") if w.strip()]
        kinds = [options[0]] * len(words) if options[-1] is Ellipsis else list(options)
        with contextlib.suppress(UserError, ValueError):
            return tuple(parse(w, k, name) for w, k in zip(words, kinds, strict=True))
    raise UserError(f"{name}={text}: expected {type_name(hint)}")


def override(value: Any, parts: list[str], text: str, key: str) -> Any:
    """A copy of `value` in which the field reached by the names `parts` is read from `text`.

    Raises:
      UserError: there is no such field, or the text does not fit its type.
    """
    head, *rest = parts
    where = key.removesuffix("." + ".".join(parts)) if key != ".".join(parts) else "the experiment"
    if isinstance(value, tuple):
        if not head.isdigit() or int(head) >= len(value):
            raise UserError(f"{key}: {where} has entries 0 to {len(value) - 1}, not {head!r}")
        children: dict[str, Any] = {str(i): v for i, v in enumerate(value)}
    elif isinstance(value, Mapping):
        children = dict(value)
    elif is_dataclass(value):
        children = values(value)
    else:
        raise UserError(f"{key}: {where} is {value!r} and has no fields")
    if head not in children:
        raise UserError(f"{key}: {where} has no field {head!r}{_nearest(head, children, children)}")
    if rest:
        children[head] = override(children[head], rest, text, key)
    else:
        hints = _hints(type(value)) if is_dataclass(value) else {}
        hint = hints[head] if head in hints else type(children[head])
        if is_dataclass(children[head]) and not _readable(hint):
            inner = ", ".join(f"{key}.{name}" for name in values(children[head]))
            kind = type(children[head]).__name__
            raise UserError(f"{key} is of the kind {kind}; set one of its fields: {inner}")
        children[head] = parse(text, hint, key)
    if isinstance(value, tuple):
        return tuple(children.values())
    if isinstance(value, Mapping):
        return children
    return type(value)(**children)


def help_text(path: str | Path) -> str:
    """What `--help` says of an experiment file: its claim, its arguments and their comments."""
    path = Path(path)
    source, function = _function(path)
    comments = _comments(source)
    hints = _hints(function)
    rows = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = "" if parameter.default is parameter.empty else f"{parameter.default!r}"
        hint = hints[name] if name in hints else type(parameter.default)
        comment = comments[name] if name in comments else ""
        rows.append((f"{name}={default}", type_name(hint), comment))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    doc = ast.get_docstring(ast.parse(source)) or ""
    return "\n".join(
        [
            f"{path}\n\n{doc}\n\narguments, written key=value:",
            *lines,
            "\nany field of the resolved experiment can be set too, by its dotted name; --dry-run"
            "\nlists them all",
        ]
    )


def type_name(hint: Any) -> str:
    """A type as a person would write it."""
    if hint in (None, types.NoneType):
        return "None"
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(str(o) for o in options)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(o) for o in options)
    if origin is tuple:
        return f"tuple of {type_name(options[0])}" if options else "tuple"
    return getattr(hint, "__name__", str(hint))


def _function(path: Path) -> tuple[str, typing.Callable[..., Any]]:
    """The text of an experiment file and its `experiment` function."""
    try:
        source = path.read_text()
    except FileNotFoundError:
        folder = path.parent
        near = [str(p) for p in sorted(folder.glob("*.py"))] if folder.is_dir() else []
        raise UserError(
            f"no such experiment file: {path}{_nearest(str(path), near, near)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the experiment file {path}: {error}") from error
    try:
        compile(source, str(path), "exec")
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        place = f"{path}:{line}" if line else f"{path}"
        raise UserError(f"{place}: syntax error: {getattr(error, 'msg', error)}") from error
    if (neighbours := str(path.resolve().parent)) not in sys.path:
        sys.path.append(neighbours)  # a variant may import from the files beside it
    namespace = _guarded(path, lambda: runpy.run_path(str(path)))
    if not callable(function := namespace.get("experiment")):
        raise UserError(
            f"{path} defines no function `experiment`; expected def experiment(...) -> Experiment"
        )
    return source, function


def _guarded(path: Path, call: typing.Callable[[], Any]) -> Any:
    """Calls; what the experiment file got wrong becomes one line with its place.

    That includes what components say of their fields, as ValueError. Any other error that comes
    from within jaxeco is a bug of ours, and keeps its traceback.
    """
    try:
        return call()
    except (ValueError, TypeError, NameError, AttributeError, ImportError, OSError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
        if ours and not isinstance(error, ValueError):
            raise
        lines = [f.lineno for f in frames if f.filename == str(path)]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{place}: {kind}{' '.join(str(error).split())}") from error


def _hints(owner: Any) -> dict[str, Any]:
    """Type hints that can be resolved; one naming a type that is not imported is left out."""
    try:
        return typing.get_type_hints(owner)
    except Exception:  # an annotation can be any text
        pass
    hints = {}
    for base in reversed(getattr(owner, "__mro__", (owner,))):
        module = inspect.getmodule(base)
        names = vars(module) if module else getattr(base, "__globals__", {})
        for name, text in getattr(base, "__annotations__", {}).items():
            try:
                hints[name] = eval(text, dict(names)) if isinstance(text, str) else text
            except Exception:
                continue
    return hints


def _readable(hint: Any) -> bool:
    """Whether a value of this type can be written on the command line."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_readable(h) for h in typing.get_args(hint) if h is not types.NoneType)
    simple = hint in (int, float, bool, str) or hasattr(hint, "parse")
    return simple or typing.get_origin(hint) in (typing.Literal, tuple)


def _nearest(name: str, known: typing.Iterable[str], listed: typing.Iterable[Any]) -> str:
    """How a message about an unknown name ends: with the nearest real one, or all of them."""
    if close := difflib.get_close_matches(name, list(known), n=1, cutoff=0.6):
        return f"; did you mean {close[0]}?"
    names = ", ".join(str(n) for n in listed)
    return f"; there are: {names}" if names else ""


def _comments(source: str) -> dict[str, str]:
    """The comment at the end of the line of each argument of `experiment`."""
    by_line = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "experiment":
            arguments = [*node.args.args, *node.args.kwonlyargs]
            return {a.arg: by_line[a.lineno] for a in arguments if a.lineno in by_line}
    return {}
