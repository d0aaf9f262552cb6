"""What trains a group of runs: one program of all members, or one of a member, called in turn.

Mapped members are an axis of every array, by `vmap`, which the devices share. In turn is for
convolutions, since XLA turns those that have a kernel for each member into grouped ones, and for
what oneDNN computes.

M: members of a group, U: seeds among them, n: steps of a call, B: examples of a batch.
"""

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeco import onednn, parallel
from jaxeco.data.pipeline import Feed, fits
from jaxeco.evaluate import Evaluator
from jaxeco.groups import Group, Numbers
from jaxeco.plan import Plan
from jaxeco.train import State, many_steps

MEMBERS = "members"  # the axis of a mesh that shares them out


def program(group: Group, states: Sequence[State]) -> "Program":
    """What trains a group from these States on, in the way that it is to."""
    return Mapped(group, states) if group.how == "mapped" else InTurn(group, states)


class Program(Protocol):
    """Trains a group; its members are counted from 0 in the order that they have now."""

    group: Group
    feeds: "Feeds"

    def call(self, step: int, n: int) -> Any:
        """All members take n steps; returns what `sums` reads later."""

    def sums(self, pending: Sequence[Any]) -> Any:
        """What calls came to, of each member and step: [M, N, ...], on the host."""

    def measured(self, split: str, stop: Callable[[], bool]) -> list[Any] | None:
        """What an evaluation of each member came to, before the division; None if abandoned."""

    def member(self, i: int) -> State:
        """One member's State."""

    def keep(self, which: Sequence[int]) -> "Program":
        """A program of some of the members, which takes this one's place."""

    def close(self) -> None:
        """Ends what reads data."""


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

        spread = self._spread(jax.vmap(steps, (0, 0, None, None)), members=2)
        self.steps = jax.jit(spread, donate_argnums=0)
        self.take = jax.jit(at)
        self.evaluators = {
            split: Evaluator(
                p.ex,
                data,
                jax.vmap(group.evaluation(split), (0, None)),
                self._of_models,
                self._everywhere,
            )
            for split, data in p.evals.items()
        }

    def call(self, step: int, n: int) -> Any:
        fed_nxU = self.feeds.fed(step, n)
        self.state, sums_Mxn = self.steps(self.state, self.inputs, self.feeds.resident, fed_nxU)
        return sums_Mxn

    def sums(self, pending: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *a_Mxn: np.concatenate(jax.device_get(a_Mxn), 1), *pending)

    def measured(self, split: str, stop: Callable[[], bool]) -> list[Any] | None:
        model = (self.state.params, self.state.variables), self.inputs[0]
        found = self.evaluators[split].measured(model, stop)
        if found is None:
            return None
        return [at(found, i) for i in range(len(self.group.members))]

    def member(self, i: int) -> State:
        return self.take(self.state, i)

    def keep(self, which: Sequence[int]) -> "Mapped":
        self.close()
        return Mapped(self.group.part(which), [self.member(i) for i in which])

    def close(self) -> None:
        self.feeds.close()

    def _of_models(self, function: parallel.Function) -> parallel.Function:
        """Compiles a function whose first argument has members."""
        return jax.jit(self._spread(function, members=1))

    def _spread(self, function: Callable[..., Any], members: int) -> Callable[..., Any]:
        """A function whose first so many arguments have members, shared out over the devices.

        Two more arguments are whole on each of them.
        """
        specs = (*[P(MEMBERS)] * members, P(), P())
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=P(MEMBERS), check_vma=False
        )

    def _everywhere(self, tree: Any) -> Any:
        return jax.device_put(tree, self.whole)

    def _padded(self, which: Sequence[int]) -> list[int]:
        return [*which, *[which[0]] * (-len(which) % len(self.devices))]


def dealt_to() -> list[jax.Device]:
    """The devices that members in turn are dealt to: of a CPU one, since a call takes all cores."""
    devices = jax.local_devices()
    return devices[:1] if devices[0].platform == "cpu" else devices


class InTurn:
    """A program of one member, called for each; the devices take members as cards are dealt."""

    def __init__(self, group: Group, states: Sequence[State]) -> None:
        self.group, p = group, group.plan
        devices = dealt_to()[: len(states)]
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

        self.steps = jax.jit(onednn.alone()(steps), donate_argnums=0)
        self.evaluators = {
            split: Evaluator(p.ex, data, onednn.alone()(group.evaluation(split)), jax.jit, place)
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
    """Each leaf at an index."""
    return jax.tree.map(lambda a: a[index], tree)


def stacked(trees: Sequence[Any], axis: int = 0) -> Any:
    """One tree of many: each leaf with a new axis."""

    def stack(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.Array):
            return jnp.stack(leaves, axis)
        return np.stack(leaves, axis)

    return jax.tree.map(stack, *trees)
