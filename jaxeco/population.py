"""Many runs trained as few programs: they differ in their seeds, and in numbers.

A run is a pure function of (experiment, seed), so many runs are one function mapped over seeds and
over the numbers in which their experiments differ. Each member has the folder, the log and the
checkpoints of an ordinary run, and comes to what it would have come to alone, up to rounding.
Members whose programs agree form a group (`groups.py`), which one program trains (`programs.py`).
"""

import json
import math
import os
import resource
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from jaxeco import folder as folders
from jaxeco import hosts, outcome, trackers
from jaxeco.checkpoint import Checkpoints, refuse
from jaxeco.config import Loaded
from jaxeco.description import describe, flatten
from jaxeco.errors import UserError
from jaxeco.experiment import IDENTITY, Experiment
from jaxeco.fit import all_finite, chosen_first, mean_over, stalled
from jaxeco.forward import results
from jaxeco.groups import Group, How, grouped
from jaxeco.interrupt import Interrupt
from jaxeco.log import Log, read_metrics
from jaxeco.plan import Plan
from jaxeco.programs import at, program
from jaxeco.recovery import Diverged, skipped
from jaxeco.train import State

# Steps of a call of a mapped program: in fewer the host is felt, in more interrupts wait.
SHORTEST, LONGEST = 8, 50


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


Stop = Callable[[int, Mapping[int, Mapping[str, float]]], Collection[int]]


def never(step: int, scores: Mapping[int, Mapping[str, float]]) -> Collection[int]:
    return ()


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
      stop: told after every evaluation the step, and the scores of all members that were evaluated
        together, by their numbers; says which of them end there. Not asked at a run's end.
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
    whole = grouped([member.ex for member in members])
    groups = [part for group in whole for part in group.fitting(how)]
    for i, group in enumerate(groups):
        said(f"group {i + 1} of {len(groups)}: {group}" if len(groups) > 1 else f"{group}")
        with ExitStack() as opened:
            runs = [
                opened.enter_context(Training(i, members[i], group.plan.of(members[i].ex), resume))
                for i in group.members
            ]
            for part, first in begun(group, runs):
                fit_together(part, first, interrupt, said, stop, stop_at)
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


class Training:
    """One member as it trains: its log, its checkpoints, and what becomes of it."""

    def __init__(self, i: int, member: Member, p: Plan, resume: bool) -> None:
        self.i, self.member, self.plan, self.resume = i, member, p, resume
        self.ended: outcome.Ended | None = None
        self.step, self.why = 0, ""
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
        self, step: int, done: bool, evaluated: bool, stopped: bool
    ) -> tuple[outcome.Ended, str] | None:
        """Whether the member ends at this step, how, and why."""
        ex = self.member.ex
        if step >= self.plan.steps:
            return "complete", ""
        if done:
            return "interrupted", "it goes on with --resume"
        if stopped:
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
    runs: tuple[Training, ...]
    states: tuple[State, ...]


def begun(group: Group, runs: Sequence[Training]) -> Iterator[tuple[Part, int]]:
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


def fit_together(
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
    training = program(part.group, part.states)
    every_eval, every_save, every_log = (
        stretch.steps(p.steps_per_epoch) for stretch in (ex.eval_every, ex.save_every, ex.log_every)
    )
    end = min(p.steps, stop_at or p.steps)
    # what is read meanwhile has to lie somewhere, for every seed
    longest = max(LONGEST if training.feeds.resident else 1, ex.steps_per_call)
    stride = common_stride((every_eval, every_save, p.steps), every_log, longest)
    step = seen = first
    pending: list[Any] = []
    progress = Progress(said, p, first)

    def going_on() -> list[tuple[int, Training]]:
        return [(i, run) for i, run in enumerate(runs) if run.ended is None]

    def report() -> None:
        """Hands the members' logs what the pending calls came to; waits for them."""
        nonlocal seen
        if not pending:
            return
        sums_M = training.sums(pending)
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
        found = {split: training.measured(split, interrupt.asked) for split in p.evals}
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
            over: Collection[int] = ()
            if evaluated and not done:
                over = stop(step, {run.i: run.scores for _, run in going_on()})
            for i, run in going_on():
                ends = run.ends(step, done, evaluated, run.i in over)
                if not (saves or ends or (evaluated and run.at_its_best())):
                    continue
                state = training.member(i)
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
                training, runs = training.keep(which), [runs[i] for i in which]
            if not which:
                return
            n = p.call_length(step, end)  # as alone
            if part.group.how == "mapped":
                n = (
                    min(end, *(step - step % g + g for g in (stride, every_eval, every_save)))
                    - step
                )
            sums = training.call(step, n)
            if pending and step // every_log > seen // every_log:
                report()
            pending.append(sums)
            step += n
    finally:
        training.close()


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
            self._said(f"step {step:,}/{self._plan.steps:,}  {rate:,.0f} examples/s in all")
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
