"""Many runs trained as few programs: they differ in their seeds, and in numbers.

A run is a pure function of (experiment, seed), so many runs are one function mapped over seeds and
over the numbers in which their experiments differ. Each member has the folder, the log and the
checkpoints of an ordinary run, and comes to what it would have come to alone, up to rounding.

Members whose programs agree form a group. Which numbers a program can take as inputs is found by
tracing it so: a learning rate is one; a width, or a moment of a schedule, is not. A group trains
either mapped: one program of all members, by `vmap`, shared out over the devices; or in turn: one
program of one member, called for each of them, each on its device. That is for convolutions, since
XLA turns those that have a kernel for each member into grouped ones, and for what oneDNN computes.

M: members of a group, U: seeds among them, n: steps of a call, B: examples of a batch.
"""

import json
import math
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeco import folder as folders
from jaxeco import hosts, outcome, parallel, trackers
from jaxeco.checkpoint import Checkpoints, refuse
from jaxeco.config import Loaded
from jaxeco.data.pipeline import Feed, fits
from jaxeco.description import describe, flatten, replaced
from jaxeco.errors import UserError
from jaxeco.evaluate import Evaluator, eval_step
from jaxeco.experiment import IDENTITY, Experiment
from jaxeco.fit import all_finite, chosen_first, mean_over, stalled
from jaxeco.forward import results
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log, read_metrics
from jaxeco.plan import Plan, plan, shapes
from jaxeco.recovery import Diverged, skipped
from jaxeco.runs import differing
from jaxeco.train import State, many_steps

Numbers = dict[str, Any]  # what differs between members, by dotted path
How = Literal["mapped", "in turn"]

# The fields of an experiment whose numbers go into steps and evaluations and nowhere else.
COMPUTED = ("preprocess", "augment", "model", "loss", "eval_loss", "optimizer", "clip_norm")
# What has a slow way, or none, for several kernels at once.
SINGLE = ("conv_general_dilated", "ffi_call")
# Steps of a call of a mapped program: in fewer the host is felt, in more interrupts wait.
SHORTEST, LONGEST = 8, 50
MEMBERS = "members"  # the axis of a mesh that shares them out


@dataclass(frozen=True)
class Member:
    """One run of a population: its experiment, seed included, and the folder that it has."""

    loaded: Loaded
    folder: Path

    @property
    def ex(self) -> Experiment:
        return self.loaded.experiment


@dataclass(frozen=True)
class Outcome:
    """What has become of a member.

    Attributes:
      step: steps it has taken.
      scores: its latest evaluation, by "split/metric".
      why: what there is to say, one line; of a member that is complete nothing.
    """

    member: Member
    step: int
    scores: Mapping[str, float]
    ended: outcome.Ended
    why: str


Stop = Callable[[int, int, Mapping[str, float]], bool]


def never(i: int, step: int, scores: Mapping[str, float]) -> bool:
    return False


def train(
    members: Sequence[Member],
    *,
    resume: bool,
    interrupt: Interrupt,
    said: Callable[[str], None],
    stop: Stop = never,
    stop_at: int | None = None,
    how: How | None = None,
) -> list[Outcome]:
    """Trains all members, each to its end; what becomes of one is nothing to the others.

    Args:
      resume: go on from the members' checkpoints, where they have some.
      said: is told what happens, line by line.
      stop: asked after every evaluation of members[i], by its number, step and scores: whether this
        member ends there.
      stop_at: the step at which all members stop, to be resumed later.
      how: a group trains; None: as its operations suggest.

    Raises:
      UserError: a member cannot be one of several, or something does not fit.
    """
    for member in members:
        check(member.ex)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each member holds some files open
    outcomes: dict[int, Outcome] = {}
    groups = [part for group in grouped(members) for part in group.fitting(how)]
    for i, group in enumerate(groups):
        if len(groups) > 1:
            said(f"group {i + 1} of {len(groups)}: {group}")
        with ExitStack() as opened:
            runs = [
                opened.enter_context(Run(i, members[i], group.plan.of(members[i].ex), resume))
                for i in group.members
            ]
            for part, first in begun(group, runs):
                fit(part, first, interrupt, said, stop, stop_at)
            outcomes |= {run.i: run.outcome for run in runs}
    return [outcomes[i] for i in range(len(members))]


def check(ex: Experiment) -> None:
    """Raises UserError if an experiment cannot be a member of a population, or be tracked."""
    for words, wrong in (
        ("several processes", hosts.count() > 1),
        (f"mesh={ex.mesh}", ex.mesh != type(ex.mesh)()),
        (f"parallel={ex.parallel}", ex.parallel != "jit"),
        (f"guard={ex.guard}", ex.guard is not None and ex.guard.then == "rollback"),
    ):
        if wrong:
            raise UserError(
                f"{words} is for a single run: many at once share the devices among them, each"
                " on one; leave it out, or start the runs one by one"
            )
    trackers.check(ex.trackers)


# Groups


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


def grouped(members: Sequence[Member]) -> list[Group]:
    """The members in groups, each in the order of its members.

    Raises:
      UserError: data is missing, or something does not fit.
    """
    flats = [flatten(describe(replace(member.ex, seed=0, name="one"))) for member in members]
    alike: dict[str, list[int]] = {}
    for i, flat in enumerate(flats):
        masked = {k: "a number" if _may_vary(k, v) else v for k, v in flat.items()}
        alike.setdefault(json.dumps(masked), []).append(i)
    groups = []
    for numbers in alike.values():
        p = plan(members[numbers[0]].ex, jax.local_devices()[:1])
        varying = differing([flats[i] for i in numbers])
        inputs = tuple(path for path in varying if takes(p, [path]))
        inputs = inputs if takes(p, inputs) else ()
        same: dict[str, list[int]] = {}
        for i in numbers:
            rest = {path: flats[i][path] for path in varying if path not in inputs}
            same.setdefault(json.dumps(rest), []).append(i)
        for part in same.values():
            experiments = tuple(members[i].ex for i in part)
            first = p if part[0] == numbers[0] else p.of(experiments[0])
            differ = differing([flats[i] for i in part])
            groups.append(
                Group(tuple(part), first, experiments, tuple(k for k in inputs if k in differ))
            )
    return groups


def takes(p: Plan, paths: Sequence[str]) -> bool:
    """Whether steps and evaluations can be given the numbers at these paths as inputs."""
    if not paths:
        return True
    state, numbers = jax.eval_shape(p.init), dict.fromkeys(paths, jax.ShapeDtypeStruct((), "f4"))

    def step(state: State, numbers: Numbers, batch: Any) -> Any:
        return p.of(replaced(p.ex, numbers)).step(state, batch)[0]

    def evaluation(state: State, numbers: Numbers, batch: Any) -> Any:
        ex = replaced(p.ex, numbers)
        return eval_step(ex, state.params, state.variables, batch)

    try:
        after = jax.eval_shape(step, state, numbers, shapes(p.train, p.ex.batch))
        for data in p.evals.values():
            batch = shapes(data, p.ex.eval_batch, training=False)
            jax.eval_shape(evaluation, state, numbers, batch)
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


# Programs: what trains a group. Members are counted from 0 in the order that they have now.


class Mapped:
    """All members in one program; what it carries has an axis of members in front.

    That is as long as the devices can share evenly; what is too much repeats the first member.
    """

    def __init__(self, group: Group, states: Sequence[State]) -> None:
        self.group, self.devices = group, jax.local_devices()
        p = group.plan
        self.mesh = jax.make_mesh(
            (len(self.devices),), (MEMBERS,), axis_types=(AxisType.Auto,), devices=self.devices
        )
        self.share, self.whole = NamedSharding(self.mesh, P(MEMBERS)), NamedSharding(self.mesh, P())
        self.feeds = Feeds(p, [ex.seed for ex in group.experiments], self._everywhere)
        padded = self._padded(range(len(states)))
        numbers = stacked([group.numbers(group.experiments[i]) for i in padded])
        order = np.array([self.feeds.order[i] for i in padded], np.int32)
        self.inputs = jax.device_put((numbers, order), self.share)
        self.state = jax.device_put(stacked([states[i] for i in padded]), self.share)

        def steps(state: State, inputs: Any, resident: Any, fed_nxU: Any) -> tuple[State, Any]:
            numbers, order = inputs
            fed_n = at(fed_nxU, (slice(None), order))
            return many_steps(group.computing(numbers).step, state, resident, fed_n)

        self.steps = self._compiled(steps, donated=(0,))
        self.take = jax.jit(at)
        self.evaluators = {
            split: Evaluator(p.ex, data, self._evaluation(split), self._of_models, self._everywhere)
            for split, data in p.evals.items()
        }

    def call(self, step: int, n: int) -> Any:
        """Takes n steps; returns what `sums` reads later."""
        fed_nxU = self.feeds.fed(step, n)
        self.state, sums_Mxn = self.steps(self.state, self.inputs, self.feeds.resident, fed_nxU)
        return sums_Mxn

    def sums(self, pending: Sequence[Any]) -> Any:
        """What calls came to, of each member: [M, N, ...], on the host."""
        return jax.tree.map(lambda *a_Mxn: np.concatenate(jax.device_get(a_Mxn), 1), *pending)

    def measured(self, split: str, stop: Callable[[], bool]) -> list[Any] | None:
        """What an evaluation of each member came to, before the division; None if abandoned."""
        model = (self.state.params, self.state.variables), self.inputs[0]
        found = self.evaluators[split].measured(model, stop)
        if found is None:
            return None
        return [at(found, i) for i in range(len(self.group.members))]

    def member(self, i: int) -> State:
        return self.take(self.state, i)

    def keep(self, which: Sequence[int]) -> "Mapped":
        """A program of some of the members, which takes this one's place."""
        self.close()
        return Mapped(self.group.part(which), [self.member(i) for i in which])

    def close(self) -> None:
        self.feeds.close()

    def _evaluation(self, split: str) -> Any:
        def evaluation(model: Any, batch: Any) -> Any:
            trained, numbers = model
            return self.group.computing(numbers).evaluation(split)(trained, batch)

        return jax.vmap(evaluation, (0, None))

    def _of_models(self, function: parallel.Function) -> parallel.Function:
        """As `parallel.compiled`, of a function whose first argument has members."""
        spread = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(P(MEMBERS), P(), P()),
            out_specs=P(MEMBERS),
            check_vma=False,
        )
        return jax.jit(spread)

    def _compiled(self, function: Callable[..., Any], donated: tuple[int, ...]) -> Any:
        mapped = jax.vmap(function, (0, 0, None, None))
        specs = (P(MEMBERS), P(MEMBERS), P(), P())
        spread = jax.shard_map(
            mapped, mesh=self.mesh, in_specs=specs, out_specs=P(MEMBERS), check_vma=False
        )
        return jax.jit(spread, donate_argnums=donated)

    def _everywhere(self, tree: Any) -> Any:
        return jax.device_put(tree, self.whole)

    def _padded(self, which: Sequence[int]) -> list[int]:
        return [*which, *[which[0]] * (-len(which) % len(self.devices))]


class InTurn:
    """A program of one member, called for each; the devices take members as cards are dealt."""

    def __init__(self, group: Group, states: Sequence[State]) -> None:
        self.group, p = group, group.plan
        devices = jax.local_devices()[: len(states)]
        self.where = [devices[i % len(devices)] for i in range(len(states))]
        self.place = place = partial(jax.device_put, device=devices[0])
        self.feeds = Feeds(p, [ex.seed for ex in group.experiments], place)
        self.resident = {d: jax.device_put(self.feeds.resident, d) for d in devices}
        self.numbers = [
            jax.device_put(group.numbers(ex), device)
            for ex, device in zip(group.experiments, self.where, strict=True)
        ]
        self.states = [jax.device_put(s, d) for s, d in zip(states, self.where, strict=True)]

        def steps(state: State, numbers: Numbers, resident: Any, fed_n: Any) -> tuple[State, Any]:
            return many_steps(group.computing(numbers).step, state, resident, fed_n)

        self.steps = jax.jit(steps, donate_argnums=0)
        self.evaluators = {
            split: Evaluator(p.ex, data, self._evaluation(split), jax.jit, place)
            for split, data in p.evals.items()
        }

    def call(self, step: int, n: int) -> Any:
        fed_nxU = self.feeds.fed(step, n)
        sums_M = []
        for i, device in enumerate(self.where):
            fed_n = at(fed_nxU, (slice(None), self.feeds.order[i]))
            self.states[i], sums_n = self.steps(
                self.states[i], self.numbers[i], self.resident[device], fed_n
            )
            sums_M.append(sums_n)
        return sums_M

    def sums(self, pending: Sequence[Any]) -> Any:
        by_member = [
            jax.tree.map(lambda *a_n: np.concatenate([np.asarray(a) for a in a_n]), *calls)
            for calls in zip(*pending, strict=True)
        ]
        return stacked(by_member)

    def measured(self, split: str, stop: Callable[[], bool]) -> list[Any] | None:
        found = []
        for state, numbers in zip(self.states, self.numbers, strict=True):
            model = self.place(((state.params, state.variables), numbers))
            if (one := self.evaluators[split].measured(model, stop)) is None:
                return None
            found.append(one)
        return found

    def member(self, i: int) -> State:
        return self.states[i]

    def keep(self, which: Sequence[int]) -> "InTurn":
        kept = copy(self)
        kept.group = self.group.part(which)
        kept.states, kept.numbers, kept.where = (
            [values[i] for i in which] for values in (self.states, self.numbers, self.where)
        )
        kept.feeds = self.feeds.keep(which)
        return kept

    def close(self) -> None:
        self.feeds.close()

    def _evaluation(self, split: str) -> Any:
        def evaluation(model: Any, batch: Any) -> Any:
            trained, numbers = model
            return self.group.computing(numbers).evaluation(split)(trained, batch)

        return evaluation


class Feeds:
    """The training batches of each seed, cut from one data set.

    Attributes:
      order: of each member, which of the orders it sees.
      resident: as a `Feed` has it.
    """

    def __init__(self, p: Plan, seeds: Sequence[int], place: Callable[[Any], Any]) -> None:
        distinct = list(dict.fromkeys(seeds))
        self.order = [distinct.index(seed) for seed in seeds]
        first = Feed.training(
            p.train,
            p.ex.batch,
            distinct[0],
            resident=fits(p.train, p.ex.resident_bytes),
            place=place,
            workers=p.ex.read_workers,
        )
        self.resident = first.resident
        self._each = [first, *(first.with_seed(seed) for seed in distinct[1:])]

    def fed(self, step: int, n: int) -> Any:
        """As `Feed.fed`, of each order: [n, U, B, ...]."""
        return stacked([feed.fed(step, n) for feed in self._each], axis=1)

    def keep(self, which: Sequence[int]) -> "Feeds":
        kept = copy(self)
        kept.order = [self.order[i] for i in which]
        return kept

    def close(self) -> None:
        for feed in self._each:
            feed.close()


def at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda a: a[index], tree)


def stacked(trees: Sequence[Any], axis: int = 0) -> Any:
    """One tree of many: each leaf with a new axis."""

    def stack(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.Array):
            return jnp.stack(leaves, axis)
        return np.stack(leaves, axis)

    return jax.tree.map(stack, *trees)


# The loop


class Run:
    """One member as it trains: its log, its checkpoints, and what becomes of it."""

    def __init__(self, i: int, member: Member, p: Plan, resume: bool) -> None:
        self.i, self.member, self.plan, self.resume = i, member, p, resume
        self.ended: outcome.Ended | None = None
        self.why = ""
        self.scores: dict[str, float] = {}
        self._held = ExitStack()

    def __enter__(self) -> Self:
        ex, folder, p = self.member.ex, self.member.folder, self.plan
        with ExitStack() as held:
            held.enter_context(folders.locked(folder))
            if not self.resume and folders.holds_run(folder):
                raise UserError(f"{folder} already holds a run; continue it with --resume")
            self.known = self._known()
            self.checkpoints = held.enter_context(
                Checkpoints(
                    folder / folders.CHECKPOINTS,
                    description=outcome.identity(p),
                    keep=ex.keep,
                    best=ex.best,
                    best_mode=ex.best_mode,
                )
            )
            self._held = held.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)

    def _known(self) -> bool:
        """Whether the folder has a record, which can be read.

        Raises:
          UserError: it is of another experiment. Where a checkpoint is, that says so as well.
        """
        path = self.member.folder / folders.RECORD
        try:
            resolved = json.loads(path.read_text())["resolved"]
            held = {name: resolved[name] for name in IDENTITY}
        except (OSError, ValueError, LookupError, TypeError):
            return False
        asked = {name: describe(getattr(self.member.ex, name)) for name in IDENTITY}
        advice = "resume with the words it was started with, or choose another folder"
        refuse(f"{path} is of another experiment", held, json.loads(json.dumps(asked)), advice)
        return True

    def restored(self, up_to: int | None = None) -> tuple[State, int] | None:
        if not self.resume:
            return None
        return self.checkpoints.restore(self.plan.abstract_state(), up_to=up_to)

    def settled(self) -> bool:
        """Whether the member has come to an end before from which it does not go on."""
        result = folders.read_result(self.member.folder)
        if not self.known or result is None or "ended" not in result:
            return False
        complete = result["ended"] == "complete" and result["step"] >= self.plan.steps
        if not complete and result["ended"] not in ("stopped", "diverged"):
            return False
        why = "" if complete else "it was so before"
        self.ended, self.step, self.why = result["ended"], result["step"], why
        self.scores = self.recorded()
        return True

    def recorded(self) -> dict[str, float]:
        """The latest evaluation on record, by "split/metric"."""
        latest = {line["split"]: line for line in read_metrics(self.member.folder)}
        return {
            f"{split}/{name}": value
            for split in self.plan.evals
            if split in latest
            for name, value in outcome.scalars(latest[split]).items()
        }

    def begin(self, first: int) -> None:
        """Records the session and opens the log, at the step from which the member goes on."""
        folder, p = self.member.folder, self.plan
        facts = outcome.environment(p)
        for note in folders.record(folder, self.member.loaded, first_step=first, **facts):
            warnings.warn(note, stacklevel=2)  # one that concerns all is shown once
        if p.train.tokenizer:
            p.train.tokenizer.save(folder / folders.TOKENIZER)
        self.log = self._held.enter_context(
            Log(
                folder,
                total_steps=p.steps,
                first_step=first,
                examples_per_step=p.ex.batch,
                trackers=p.ex.trackers,
                settings=flatten(describe(self.member.ex)),
                group=folder.parent.name,
                unit=p.train.unit,
                units=p.train.units,
                stream=self._held.enter_context(open(os.devnull, "w")),
            )
        )
        self.scores = self.recorded()

    def ends(
        self, step: int, done: bool, evaluated: bool, stop: Stop
    ) -> tuple[outcome.Ended, str] | None:
        """Whether the member ends at this step, how, and why."""
        ex = self.member.ex
        if step >= self.plan.steps:
            return "complete", ""
        if done:
            return "interrupted", "it goes on with --resume"
        if evaluated and stop(self.i, step, self.scores):
            return "stopped", ""
        if evaluated and stalled(self.plan, self.log) is not None:
            return "stalled", f"no better {ex.best} for {ex.patience} evaluations"
        return None

    def at_its_best(self) -> bool:
        """Whether no evaluation was better than the latest, whose checkpoint is to be kept then."""
        ex = self.member.ex
        values = [value for _, value in self.log.history(ex.best)] if ex.best else []
        return bool(values) and values[-1] == (max if ex.best_mode == "max" else min)(values)

    def end(self, step: int, ended: outcome.Ended, why: str = "") -> None:
        """Writes what the member has come to, and closes what is open."""
        self.ended, self.why, self.step = ended, why, step
        folder = self.member.folder
        self.checkpoints.wait()
        outcome.finish(self.plan, step, read_metrics(folder), folder, self.log, ended)
        self._held.close()

    @property
    def outcome(self) -> Outcome:
        assert self.ended is not None
        return Outcome(self.member, self.step, self.scores, self.ended, self.why)


@dataclass(frozen=True)
class Part:
    """Members of a group that go on from the same step."""

    group: Group
    runs: tuple[Run, ...]
    states: tuple[State, ...]


def begun(group: Group, runs: Sequence[Run]) -> Iterator[tuple[Part, int]]:
    """The members in parts that stand at the same step, with that step; without those at their end.

    A kill in the middle of a save leaves some members one save behind: the others go back to it.
    """
    found = {i: run.restored() for i, run in enumerate(runs)}
    for i, run in enumerate(runs):
        if run.resume and run.settled():
            del found[i]
    behind = min((one[1] for one in found.values() if one), default=0)
    first = jax.jit(lambda seed, numbers: group.computing(numbers).init(seed))
    states: dict[int, State] = {}
    parts: dict[int, list[int]] = {}
    for i, one in found.items():
        run, ex = runs[i], runs[i].member.ex
        if one and one[1] > behind:
            one = run.restored(up_to=behind) or one
        if one is None:
            random = first(np.uint32(ex.seed), group.numbers(ex))
            one = run.plan.prepared(random), 0
        states[i], step = one
        run.begin(step)
        if step >= run.plan.steps:
            run.end(step, "complete")
        elif stalled(run.plan, run.log) is not None:
            run.end(step, "stalled", "it was so before")
        else:
            parts.setdefault(step, []).append(i)
    for step, which in parts.items():
        part = group.part(which)
        yield Part(part, tuple(runs[i] for i in which), tuple(states.pop(i) for i in which)), step


def fit(
    part: Part,
    first: int,
    interrupt: Interrupt,
    said: Callable[[str], None],
    stop: Stop,
    stop_at: int | None,
) -> None:
    """Trains members from step `first` on until each has ended; the loop of `jaxeco.fit` for many.

    Once half of them have ended, the rest goes on in a program of its own.
    """
    p, ex, runs = part.group.plan, part.group.plan.ex, list(part.runs)
    program: Mapped | InTurn = WAYS[part.group.how](part.group, part.states)
    every_eval, every_save, every_log = (
        stretch.steps(p.steps_per_epoch) for stretch in (ex.eval_every, ex.save_every, ex.log_every)
    )
    end = min(p.steps, stop_at or p.steps)
    # what is read meanwhile has to lie somewhere, for every seed
    longest = max(LONGEST if program.feeds.resident else 1, ex.steps_per_call)
    stride = common_stride((every_eval, every_save, p.steps), every_log, longest)
    step = seen = first
    pending: list[Any] = []
    progress = Progress(said, p, first)

    def going_on() -> list[tuple[int, Run]]:
        return [(i, run) for i, run in enumerate(runs) if run.ended is None]

    def report() -> None:
        """Hands the members' logs what the pending calls came to; waits for them."""
        nonlocal seen
        if not pending:
            return
        sums_M = program.sums(pending)
        rate_at = step - 1
        for i, run in going_on():
            own = run.member.ex
            sums = at(sums_M, i)
            try:
                for text in skipped(own, sums, seen):
                    said(f"warning: {run.member.folder.name}: {text}")
            except Diverged as error:
                run.end(step, "diverged", str(error))
                continue
            rate = {"learning_rate": own.optimizer.learning_rate(rate_at, p.steps)}
            run.log.train(step, mean_over(own, sums) | rate)
        pending.clear()
        seen = step
        progress.trained(step, len(going_on()))

    def evaluate() -> bool:
        """Evaluates and logs; ends members whose loss is not finite. False if interrupted."""
        found = {split: program.measured(split, interrupt.asked) for split in p.evals}
        if any(one is None for one in found.values()):
            return False
        for i, run in going_on():
            run.scores = {}
            for split, measured in found.items():
                values = results(run.member.ex, measured[i])  # type: ignore[index]
                if not np.isfinite(values["loss"]):
                    run.end(step, "diverged", f"the loss on {split!r} is {values['loss']}")
                    break
                if not run.log.evaluated(step, split):
                    values = chosen_first(ex, split, values)
                    run.log.evaluation(step, split, values)
                scalars = {k: float(v) for k, v in values.items() if np.ndim(v) == 0}
                run.scores |= {f"{split}/{name}": value for name, value in scalars.items()}
        progress.evaluated(step, [run.scores for _, run in going_on()])
        return True

    try:
        while going_on():
            due = step and (step % every_eval == 0 or step >= end)
            evaluated = False
            if due and not all(
                run.log.evaluated(step, split) for _, run in going_on() for split in p.evals
            ):
                report()
                evaluated = evaluate()
            done = step >= end or interrupt.asked()
            saves = done or (step > first and step % every_save == 0)
            if saves or evaluated:
                report()
            for i, run in going_on():
                ends = run.ends(step, done, evaluated, stop)
                if not (saves or ends or (evaluated and run.at_its_best())):
                    continue
                state = program.member(i)
                if not all_finite(state.params):
                    ends = "diverged", f"the parameters are not finite at step {step}"
                else:
                    scored = run.scores if evaluated and p.evaluates_at(step) else {}
                    run.checkpoints.save(state, scored, step=step)
                if ends:
                    run.end(step, *ends)
            which = [i for i, _ in going_on()]
            if which and len(which) <= len(runs) // 2:
                report()
                program, runs = program.keep(which), [runs[i] for i in which]
            if not which:
                return
            n = p.call_length(step, end)  # as alone
            if part.group.how == "mapped":
                n = (
                    min(end, *(step - step % g + g for g in (stride, every_eval, every_save)))
                    - step
                )
            sums = program.call(step, n)
            if pending and step // every_log > seen // every_log:
                report()
            pending.append(sums)
            step += n
    finally:
        program.close()


def common_stride(ends: Sequence[int], every_log: int, longest: int) -> int:
    """How many steps a call takes, so that as few lengths as possible have to be compiled.

    Calls end where something is due. A divisor of all these steps makes all calls alike; if the
    log's steps are too odd for that, its lines come a little late; if the others are, calls are cut
    short there.

    Args:
      ends: steps whose multiples no call may pass.
    """
    for grids in ((*ends, every_log), ends):
        whole = math.gcd(*grids)
        stride = max(n for n in range(1, min(longest, whole) + 1) if whole % n == 0)
        if stride >= SHORTEST:
            return stride
    return longest


class Progress:
    """Says how far many runs have come: at every evaluation, and in between every few seconds."""

    def __init__(self, said: Callable[[str], None], p: Plan, first: int) -> None:
        self._said, self._plan, self._mark = said, p, (first, time.monotonic())

    def trained(self, step: int, members: int) -> None:
        before, then = self._mark
        if (passed := time.monotonic() - then) > 2:
            rate = members * (step - before) * self._plan.ex.batch / passed
            unit = "examples"
            self._said(f"step {step:,}/{self._plan.steps:,}  {rate:,.0f} {unit}/s in all")
            self._mark = step, time.monotonic()

    def evaluated(self, step: int, scores: Sequence[Mapping[str, float]]) -> None:
        if not scores:
            return
        split = next(iter(self._plan.evals))
        names = dict.fromkeys([f"{split}/loss", self._plan.ex.best or f"{split}/loss"])
        told = []
        for name in names:
            values = [one[name] for one in scores]
            told.append(f"{name} {np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        self._said(f"step {step:,}/{self._plan.steps:,}  {'  '.join(told)}, {len(scores)} runs")


WAYS: dict[How, type[Mapped] | type[InTurn]] = {"mapped": Mapped, "in turn": InTurn}
