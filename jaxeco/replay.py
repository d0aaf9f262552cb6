"""Takes a step of a run anew, from its checkpoint: python -m jaxeco.replay RUN STEP [options]"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxeco import command
from jaxeco.errors import UserError

if TYPE_CHECKING:
    from jaxeco.config import Loaded
    from jaxeco.plan import Plan
    from jaxeco.train import State

SHOWN = 12  # parameters in the table


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m jaxeco.replay",
        description=__doc__,
        epilog="Takes the steps between the checkpoint and STEP as well. Leaves RUN as it is.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder, such as runs/digits_mlp")
    add("step", type=int, metavar="STEP", help="which one, as the log counts them: the first is 1")
    what = "go through the step's operations one by one, and name the first that goes bad"
    add("--check", action="store_true", help=what)
    what = "batches passed over by roll-backs before STEP (default: as in the checkpoint)"
    add("--offset", type=int, metavar="N", help=what)
    options = parser.parse_args(words)
    if options.step < 1:
        parser.error(f"STEP {options.step}: expected at least 1")
    if options.offset is not None and not 0 <= options.offset < 2**31:
        parser.error(f"--offset {options.offset}: expected 0 or more, below 2^31")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    from jaxeco import folder as folders  # from here on JAX is awake
    from jaxeco.log import table
    from jaxeco.plan import plan

    loaded = folders.open_run(options.run)
    p = plan(loaded.experiment)
    if options.step > p.steps:
        raise UserError(f"{options.run} has {p.steps:,} steps: there is no step {options.step:,}")
    state, first, notes = beginning(p, options.run, options.step, options.offset)
    origin = f"checkpoint {first:,}" if first else "the start of the run"
    print(f"step {options.step:,} of {options.run}, from {origin}")
    state, found, doubts = replayed(p, state, options.step)
    doubts = [*unlike(p, options.run, loaded, options.step), *doubts]
    rows, parameters = found
    print(table("", rows).strip("\n- "))
    for note in notes:
        print(f"note: {note}")
    print("not to the bit as in the run: " * bool(doubts) + ("; ".join(doubts) or "to the bit"))
    print(table("\nlargest gradients", parameters))
    if options.check:
        if _not_finite(_learnt(state)):  # a gradient can be bad a step before the loss shows it
            origin_state, *_ = beginning(p, options.run, options.step, options.offset)
            state = last_finite(p, origin_state)
            print(f"\nthe State was not finite any more after step {int(state.step) + 1:,}, where")
        print("\n" + "\n".join(checked(p, state)))
    return 0


def beginning(
    p: "Plan", run: Path, step: int, offset: int | None
) -> tuple["State", int, list[str]]:
    """The State of the newest good checkpoint before a step, its number of steps, and notes.

    Without one it is the State at the start of the run, which follows from the experiment.

    Raises:
      UserError: the run's data is not there any more.
    """
    import jax
    import numpy as np

    from jaxeco import folder as folders
    from jaxeco.checkpoint import load, steps_in
    from jaxeco.log import FILE, read_metrics

    folder, notes = run / folders.CHECKPOINTS, []
    there = steps_in(folder)
    lines = read_metrics(run) if (run / FILE).exists() else []
    reached = max(
        [*there, *steps_in(run / "diverged"), *(line["step"] for line in lines)], default=0
    )
    if step > reached:
        notes.append(f"what the run has left ends at step {reached:,}")
    first, state = 0, None
    for saved in sorted((s for s in there if s < step), reverse=True):
        try:
            found = load(folder, p.abstract_state(), which=saved)
        except UserError as error:
            notes.append(str(error))
            continue
        if found.description.get("data", p.train.fingerprint) != p.train.fingerprint:
            raise UserError(f"the training data is not what {run} was trained on: put that there")
        first, state = saved, found.state
        break
    if state is None:
        notes.append(f"there is no checkpoint before step {step:,}: all steps are taken anew")
        state = p.start()
    later = [s for s in there if s >= step]
    if offset is not None:
        state = state.replace(offset=jax.device_put(np.int32(offset), state.offset.sharding))
    elif later:
        then = int(load(folder, which=later[0], only=("offset",)).state["offset"])
        if then != int(state.offset):
            notes.append(
                f"the run rolled back after this step, and may have taken it again: --offset {then}"
            )
    return state, first, notes


def replayed(p: "Plan", state: "State", step: int) -> tuple["State", tuple[Any, Any], list[str]]:
    """Takes the steps up to `step` in the calls of the run, and looks into that one.

    Returns:
      the State before the step; a table of what the step came to, and one of parameters; and why
      it is not to the bit what the run had.
    """
    import jax
    import jax.numpy as jnp

    from jaxeco import parallel

    call, doubts, at = p.compiled(), [], int(state.step)
    offset = int(state.offset)
    with p.feed() as feed:
        while at + (n := p.call_length(at, p.steps)) < step:
            state, _ = call(state, feed.resident, feed.fed(at + offset, n))
            at += n
        taken = step - 1 - at
        copy = jax.tree.map(jnp.copy, state)
        _, sums = call(copy, feed.resident, feed.fed(at + offset, n))
        if taken:
            state, _ = call(state, feed.resident, feed.fed(at + offset, taken))
            doubts.append(
                f"gradients and norms, since the run took {n} steps at once, and the {taken} before"
                " this one are now taken by themselves"
            )
        look = parallel.compiled(partial(_norms, p.ex), "jit", p.mesh, p.shardings, updates=False)
        norms = look(state, feed.resident, feed.fed(step - 1 + offset))[0]
    return state, _tables(p, jax.tree.map(lambda a: a[taken], sums), norms, step), doubts


def _norms(ex: Any, state: "State", resident: Any, fed_1: Any) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    from jaxeco.data.pipeline import assemble
    from jaxeco.train import gradient

    _, _, grads = gradient(ex, state, assemble(resident, jax.tree.map(lambda a: a[0], fed_1)))
    norms = [jax.tree.map(lambda a: jnp.sqrt(jnp.sum(a**2)), t) for t in (state.params, grads)]
    return tuple(norms), ()


def _tables(p: "Plan", sums: Any, norms: Any, step: int) -> tuple[Any, Any]:
    import jax
    import numpy as np

    from jaxeco.forward import results
    from jaxeco.trees import named

    sizes, grads = (jax.device_get(named(tree)) for tree in norms)
    values = results(p.ex, {name: mean for name, mean in sums.items() if name != "guard"})
    whole = float(np.sqrt(np.sum(np.square(np.array(list(grads.values()), np.float64)))))
    rate = p.ex.optimizer.learning_rate(step - 1, p.steps)
    rows = [
        *((name, f"{value:.9g}") for name, value in values.items() if np.ndim(value) == 0),
        ("gradient norm", f"{whole:.6g}"),
        ("learning rate", f"{rate:.6g}"),
    ]
    shapes = named(p.abstract_state().params)
    order = sorted(grads, key=lambda name: -np.nan_to_num(grads[name], nan=np.inf))
    parameters = [("parameter", "norm", "of its gradient", "shape")]
    for name in order[:SHOWN]:
        shape = "x".join(map(str, shapes[name].shape))
        parameters.append((name, f"{sizes[name]:.4g}", f"{grads[name]:.4g}", shape))
    return rows, parameters


def unlike(p: "Plan", run: Path, loaded: "Loaded", step: int) -> list[str]:
    """What differs from the session of the run that took the step."""
    from jaxeco import folder as folders
    from jaxeco.outcome import environment

    sessions = json.loads((run / folders.RECORD).read_text())["sessions"]
    took = [session for session in sessions if session["first_step"] < step]
    if not took:
        return ["nothing is known of the session that took it"]
    now = {**folders.code(loaded), **environment(p)}
    changed = folders.changes(took[-1], now)
    if took[-1]["devices"] != now["devices"]:
        changed.append("the devices")
    return [f"{' and '.join(changed)} changed since"] if changed else []


def last_finite(p: "Plan", state: "State") -> "State":
    """The last State from this one on that is finite; this one, if it is not."""
    import jax
    import jax.numpy as jnp

    call, offset = p.compiled(), int(state.offset)
    with p.feed() as feed:
        while True:
            before = jax.tree.map(jnp.copy, state)
            state, _ = call(state, feed.resident, feed.fed(int(before.step) + offset))
            if _not_finite(_learnt(state)):
                return before


def _learnt(state: "State") -> dict[str, Any]:
    parts = ("params", "variables", "opt_state")
    return {name: getattr(state, name) for name in parts}


def checked(p: "Plan", state: "State") -> Sequence[str]:
    """The step after `state`, operation by operation on one device: lines that name the culprit."""
    import jax
    import numpy as np

    from jaxeco import culprit
    from jaxeco.data.pipeline import assemble
    from jaxeco.trees import listed

    state = jax.device_put(state, jax.devices()[0])
    if bad := _not_finite(_learnt(state)):
        return [f"not finite before this step: {listed(bad)}; replay an earlier step"]
    with p.feed() as feed:
        fed = feed.fed(int(state.step + state.offset))
        resident = jax.device_put(feed.resident, jax.devices()[0])
    batch = assemble(resident, {name: array[0] for name, array in fed.items()})
    if bad := _not_finite(batch):
        finite_B = np.isfinite(batch[bad[0]]).reshape(len(batch["mask"]), -1).all(1)
        where = listed(map(str, np.flatnonzero(~finite_B)))
        return [f"the data is not finite: {listed(bad)} in example {where} of the batch"]
    found = culprit.find(p.step, state, batch)
    if found is None:
        return ["every operation of this step has a finite result, or one that goes nowhere"]
    way = {
        "forward": "in the forward pass, where derivatives are begun as well",
        "backward": "in the backward pass",
        "outside": "outside the gradient",
    }[found.way]
    return [
        f"the first operation that goes bad is {found.operation}, {way}",
        *([f"  of    {found.modules}"] if found.modules else []),
        f"  line  {found.place}",
        *(f"  from  {value}" for value in found.inputs),
        *(f"  makes {value}" for value in found.outputs),
    ]


def _not_finite(tree: Any) -> list[str]:
    import jax.numpy as jnp

    from jaxeco.trees import named

    numbers = {n: a for n, a in named(tree).items() if jnp.issubdtype(a.dtype, jnp.inexact)}
    return [name for name, array in numbers.items() if not jnp.isfinite(array).all()]


if __name__ == "__main__":
    command.start(main)
