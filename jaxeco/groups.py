"""Which runs train as one program: those whose experiments agree but for numbers.

Which numbers a program can take as inputs is found by tracing it so: a learning rate is one; a
width, or a moment of a schedule, is not.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.extend
import numpy as np

from jaxeco import onednn, parallel
from jaxeco.data.pipeline import fits
from jaxeco.description import describe, differing, flatten, replaced
from jaxeco.errors import UserError
from jaxeco.experiment import Experiment
from jaxeco.plan import Plan, plan, shapes
from jaxeco.train import State

Numbers = dict[str, Any]  # what differs between members, by dotted path
How = Literal["mapped", "in turn"]

# The fields of an experiment whose numbers go into steps and evaluations and nowhere else.
COMPUTED = ("preprocess", "augment", "model", "loss", "eval_loss", "optimizer", "clip_norm")
# What has a slow way, or none, for several kernels at once.
SINGLE = ("conv_general_dilated", "ffi_call")


@dataclass(frozen=True)
class Group:
    """Members whose programs agree.

    Attributes:
      members: their numbers in the population.
      plan: of the first.
      experiments: of each.
      inputs: dotted paths of the numbers that the program is given for each member.
      how: it trains.
    """

    members: tuple[int, ...]
    plan: Plan
    experiments: tuple[Experiment, ...]
    inputs: tuple[str, ...]
    how: How = "mapped"

    def __str__(self) -> str:
        count = f"{len(self.members)} members" if len(self.members) > 1 else "one member"
        by = f", which differ in {', '.join(self.inputs)}" if self.inputs else ""
        return f"{count} {self.how}{by}"

    def part(self, which: Sequence[int]) -> "Group":
        """Some of its members, by where they stand in it."""
        experiments = tuple(self.experiments[i] for i in which)
        members = tuple(self.members[i] for i in which)
        return replace(
            self, members=members, experiments=experiments, plan=self.plan.of(experiments[0])
        )

    def computing(self, numbers: Numbers) -> Plan:
        """The plan of a member that has these numbers, which may be traced."""
        return self.plan.of(replaced(self.plan.ex, numbers)) if numbers else self.plan

    def evaluation(self, split: str) -> Callable[[Any, Any], Any]:
        """(((params, variables), numbers), batch) -> as `eval_step`: of one member."""

        def evaluation(model: Any, batch: Any) -> Any:
            trained, numbers = model
            return self.computing(numbers).evaluation(split)(trained, batch)

        return evaluation

    def numbers(self, ex: Experiment) -> Numbers:
        """What the program is given for a member with this experiment."""
        values = flatten(describe(ex))
        return {path: np.float32(values[path]) for path in self.inputs}

    def fitting(self, how: How | None) -> list["Group"]:
        """Itself, or parts of itself that fit into the devices' memory one after another."""
        group = replace(self, how=how or self.natural())
        if len(self.members) == 1:
            return [replace(group, how="in turn")]
        most = group.most()
        if most < 1:
            raise UserError(f"{self.plan.ex.name}: the devices have no room for a single member")
        count = -(-len(self.members) // most)
        parts = np.array_split(np.arange(len(self.members)), count)
        return [group.part(part.tolist()) for part in parts]

    def natural(self) -> How:
        """In turn, where a step has operations that have no fast way for several kernels."""
        p = self.plan
        with onednn.alone():
            step = jax.make_jaxpr(p.step)(jax.eval_shape(p.init), shapes(p.train, p.ex.batch))
        return "in turn" if any(name in SINGLE for name in operations(step.jaxpr)) else "mapped"

    def most(self) -> int:
        """How many members fit into the devices' memory at once, by what XLA says of one."""
        p, devices = self.plan, jax.local_devices()
        state, batch = jax.eval_shape(p.init), shapes(p.train, p.ex.batch)
        memory: Any = jax.jit(p.step, donate_argnums=0).lower(state, batch).compile()
        memory = memory.memory_analysis()
        held = memory.argument_size_in_bytes
        passing = memory.temp_size_in_bytes + memory.output_size_in_bytes
        data = sum(d.nbytes for d in (p.train, *p.evals.values()) if fits(d, p.ex.resident_bytes))
        room = min(parallel.room(device) for device in devices) - data
        shared = 1 if devices[0].platform == "cpu" else len(devices)  # memory that each has
        if self.how == "in turn":
            return max(0, int((room - passing) // held)) * shared
        return max(0, int(room // (held + passing))) * shared


def grouped(experiments: Sequence[Experiment]) -> list[Group]:
    """The members with these experiments in groups, each in the order of its members.

    Raises:
      UserError: data is missing, or something does not fit.
    """
    flats = [flatten(describe(replace(ex, seed=0, name="one"))) for ex in experiments]
    alike: dict[str, list[int]] = {}
    for i, flat in enumerate(flats):
        masked = {k: "a number" if _may_vary(k, v) else v for k, v in flat.items()}
        alike.setdefault(json.dumps(masked), []).append(i)
    groups = []
    for numbers in alike.values():
        p = plan(experiments[numbers[0]], jax.local_devices()[:1])
        varying = differing([flats[i] for i in numbers])
        inputs = tuple(path for path in varying if takes(p, [path]))
        inputs = inputs if takes(p, inputs) else ()
        same: dict[str, list[int]] = {}
        for i in numbers:
            rest = {path: flats[i][path] for path in varying if path not in inputs}
            same.setdefault(json.dumps(rest), []).append(i)
        for part in same.values():
            first = p if part[0] == numbers[0] else p.of(experiments[part[0]])
            differ = differing([flats[i] for i in part])
            own = tuple(experiments[i] for i in part)
            groups.append(Group(tuple(part), first, own, tuple(k for k in inputs if k in differ)))
    return groups


def takes(p: Plan, paths: Sequence[str]) -> bool:
    """Whether steps and evaluations can be given the numbers at these paths as inputs."""
    if not paths:
        return True
    state, numbers = jax.eval_shape(p.init), dict.fromkeys(paths, jax.ShapeDtypeStruct((), "f4"))

    def step(state: State, numbers: Numbers, batch: Any) -> Any:
        return p.of(replaced(p.ex, numbers)).step(state, batch)[0]

    def evaluation(split: str, state: State, numbers: Numbers, batch: Any) -> Any:
        return p.of(replaced(p.ex, numbers)).evaluation(split)(
            (state.params, state.variables), batch
        )

    try:
        after = jax.eval_shape(step, state, numbers, shapes(p.train, p.ex.batch))
        for split, data in p.evals.items():
            batch = shapes(data, p.ex.eval_batch, training=False)
            jax.eval_shape(partial(evaluation, split), state, numbers, batch)
    except Exception:  # whatever Python code says to a number that has no value yet
        return False
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, after)
    return all(jax.tree.leaves(same))


def operations(jaxpr: Any) -> Iterator[str]:
    """The names of a program's operations, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from operations(inner)


def _may_vary(path: str, value: Any) -> bool:
    """Whether a program may be given it as an f32, which says little of how far 0.999 is below 1.

    That is what counts of Adam's β2, for one. In a program of its own 1 - β2 is what it should be.
    """
    in_steps = path.split(".")[0] in COMPUTED and isinstance(value, float)
    return in_steps and not 0.99 < value < 1
