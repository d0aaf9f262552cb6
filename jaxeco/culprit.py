"""Which operation of a function was the first to make of finite numbers some that are not.

The function is traced, and its operations are carried out one by one, uncompiled. What contains
others (a compiled function, a loop, a branch, rematerialisation) is carried out whole, and looked
into where its result is not finite.
"""

import linecache
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Literal

# a frame in one of these is not the line that a person has written
LIBRARIES = (
    *(str(Path(str(module.__file__)).parent) for module in (jax, flax, optax, np)),
    sysconfig.get_paths()["stdlib"] + "/",
    "<frozen",
)


@dataclass(frozen=True)
class Culprit:
    """An operation whose result is not finite though its inputs are, or NaN though none is NaN."""

    operation: str  # the name of JAX's primitive
    modules: str  # MLP/Dense_0: the path of modules in the model; "" outside
    way: str  # forward, with what derivatives begin with; backward; or outside the gradient
    place: str  # file:line in function: text of the line
    inputs: tuple[str, ...]  # float32[8,10] from -3 to 5
    outputs: tuple[str, ...]  # float32[8,10]: 2 inf and 1 nan of 80


def find(function: Callable[..., Any], *args: Any) -> Culprit | None:
    """The culprit behind results of function(*args) that are not finite; None if all are.

    Of several the first. An operation whose bad result goes nowhere (masked, say) is none.

    Raises:
      ValueError: an argument is not finite itself.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    leaves = jax.tree.leaves(args)
    if any(_bad(leaf) for leaf in leaves):
        raise ValueError("expected finite arguments")
    suspects: list[Culprit] = []
    outs, origins = _walk(jaxpr.jaxpr, jaxpr.consts, leaves, [None] * len(leaves), "", suspects)
    found = [origin for out, origin in zip(outs, origins) if _bad(out) and origin is not None]
    return suspects[min(found)] if found else None


Origins = Sequence[int | None]  # of each value: the suspect that its numbers came from


def _walk(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    origins: Origins,
    stack: str,
    suspects: list[Culprit],
) -> tuple[list[Any], Origins]:
    """Carries out the operations of a jaxpr; returns its results and their origins."""
    env: dict[Any, tuple[Any, int | None]] = {}
    env |= {var: (value, None) for var, value in zip(jaxpr.constvars, consts, strict=True)}
    env |= dict(zip(jaxpr.invars, zip(args, origins), strict=True))

    def read(atom: Any) -> tuple[Any, int | None]:
        return (atom.val, None) if isinstance(atom, Literal) else env[atom]

    last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
    stay = set(_variables(jaxpr.outvars))
    for i, eqn in enumerate(jaxpr.eqns):
        values, roots = zip(*map(read, eqn.invars)) if eqn.invars else ((), ())
        where = "/".join(filter(None, (stack, str(eqn.source_info.name_stack))))
        outs = _carry_out(eqn, values)
        found: Origins = [None] * len(outs)
        if any(map(_bad, outs)):
            known = [r for value, r in zip(values, roots) if r is not None and _bad(value)]
            inner = _inside(eqn, values, roots, where, suspects)
            if inner is None or all(root is None for root in inner):
                new = not any(map(_bad, values)) or (_nan(outs) and not _nan(values))
                if not known and new:
                    suspects.append(_culprit(eqn, where, values, outs))
                    known = [len(suspects) - 1]
                inner = [min(known, default=None)] * len(outs)
            found = [root if _bad(out) else None for out, root in zip(outs, inner)]
        env |= dict(zip(eqn.outvars, zip(outs, found), strict=True))
        for var in {*_variables(eqn.invars), *eqn.outvars} - stay:
            if var not in last or last[var] <= i:  # nothing asks for it any more
                del env[var]
    results = [read(atom) for atom in jaxpr.outvars]
    return [value for value, _ in results], [root for _, root in results]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _carry_out(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _inside(
    eqn: Any, values: Sequence[Any], roots: Origins, stack: str, suspects: list[Culprit]
) -> Origins | None:
    """The origins of an operation's results, from the operations in it; None if there are none."""
    name, params = eqn.primitive.name, eqn.params

    def walk(inner: Any, values: Sequence[Any], roots: Origins) -> tuple[list[Any], Origins]:
        jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
        return _walk(jaxpr, consts, values, roots, stack, suspects)

    if name == "scan":
        body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
        # constants, carried, scanned: only what is scanned has an axis less inside, which tells
        # them apart in every version of JAX
        k = _alike(eqn.outvars, body.outvars)
        c = _alike(eqn.invars, body.invars) - k
        carried, carried_roots, seen = list(values[c : c + k]), list(roots[c : c + k]), None
        steps = range(params["length"])
        for i in reversed(steps) if params["reverse"] else steps:
            at = [x[i] for x in values[c + k :]]
            outs, found = walk(
                params["jaxpr"],
                [*values[:c], *carried, *at],
                [*roots[:c], *carried_roots, *roots[c + k :]],
            )
            carried, carried_roots = list(outs[:k]), list(found[:k])
            seen = _first(seen or [None] * (len(outs) - k), found[k:])
        return [*carried_roots, *(seen or [])]
    if name == "while":
        a, b = params["cond_nconsts"], params["body_nconsts"]
        fixed, state = values[a : a + b], list(values[a + b :])
        state_roots = list(roots[a + b :])
        while walk(params["cond_jaxpr"], [*values[:a], *state], [None] * (a + len(state)))[0][0]:
            state, found = walk(
                params["body_jaxpr"], [*fixed, *state], [*roots[a : a + b], *state_roots]
            )
            state_roots = list(found)
        return state_roots
    if name == "cond":
        branch = params["branches"][int(values[0])]
        return walk(branch, values[1:], roots[1:])[1]
    for inner in params.values():  # a call: to a compiled function, to one with its own derivative
        if isinstance(inner, ClosedJaxpr) or hasattr(inner, "eqns"):
            jaxpr = getattr(inner, "jaxpr", inner)
            if (len(jaxpr.invars), len(jaxpr.outvars)) == (len(eqn.invars), len(eqn.outvars)):
                return walk(inner, values, roots)[1]
    return None


def _alike(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many have as many axes outside as inside."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))


def _first(before: Origins, now: Origins) -> Origins:
    return [b if b is not None else n for b, n in zip(before, now, strict=True)]


def _floats(value: Any) -> np.ndarray | None:
    """The value as an array, if its numbers can be other than finite."""
    dtype = jax.numpy.result_type(value)
    return np.asarray(value) if jax.numpy.issubdtype(dtype, jax.numpy.inexact) else None


def _bad(value: Any) -> bool:
    array = _floats(value)
    return array is not None and not np.isfinite(array).all()


def _nan(values: Sequence[Any]) -> bool:
    arrays = map(_floats, values)
    return any(array is not None and np.isnan(array).any() for array in arrays)


def _culprit(eqn: Any, stack: str, values: Sequence[Any], outs: Sequence[Any]) -> Culprit:
    way = "backward" if "transpose(" in stack else "forward" if "jvp(" in stack else "outside"
    words = [word for part in stack.split("/") if (word := part.split("(")[-1].rstrip(")"))]
    return Culprit(
        operation=eqn.primitive.name,
        modules="/".join(words),
        way=way,
        place=_place(eqn.source_info.traceback),
        inputs=tuple(map(_described, values)),
        outputs=tuple(map(_described, outs)),
    )


def _place(traceback: Any) -> str:
    for frame in traceback.frames if traceback else ():
        if not frame.file_name.startswith(LIBRARIES):
            text = linecache.getline(frame.file_name, frame.line_num).strip()
            return f"{frame.file_name}:{frame.line_num} in {frame.function_name}: {text}"
    return "in no line that is known"


def _described(value: Any) -> str:
    kind = f"{jax.numpy.result_type(value)}[{','.join(map(str, np.shape(value)))}]"
    array = _floats(value)
    if array is None or not array.size:
        return kind
    nan, inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    if nan or inf:
        counts = [f"{n} {what}" for n, what in ((inf, "inf"), (nan, "nan")) if n]
        return f"{kind}: {' and '.join(counts)} of {array.size}"
    if np.iscomplexobj(array):
        return kind
    if array.size == 1:
        return f"{kind} {array.item():.4g}"
    return f"{kind} from {array.min():.4g} to {array.max():.4g}"
