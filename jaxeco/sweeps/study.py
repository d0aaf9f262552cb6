"""A sweep's trials in Optuna's storage: shared by its workers, and lost with none of them.

Optuna stores trials and proposes new ones; the loop is ours (ask and tell). What its states mean:

    RUNNING    a worker trains it
    WAITING    has the parameters, and what was measured, of a lost trial; the next one asked for
    COMPLETE   has its value, a finite number
    PRUNED     was ended by the pruner; or failed, for a reason ("why"), so that samplers avoid it
    FAIL       was lost: its worker died, or was stopped. Such a trial does not count

A worker is alive as long as it holds a lock on its file in the sweep's folder: the system frees it
with the process, however that ends, so that there is no time-out and no doubt. A worker on another
machine, whose folder is not seen here, counts up in the storage instead, and is taken for dead once
the number has stood still for SILENCE seconds by our own clock; clocks are not compared. (Optuna's
heartbeat serves its own loop only, not ask and tell.) If it was not dead after all, it finds its
trial gone when it reports, and lets it go: a trial has one value.

SQLite has no locks on rows, so its users take turns by a lock on a file beside the database.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import platform
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from jaxeco.errors import UserError
from jaxeco.sweeps import space
from jaxeco.sweeps.space import Choice, Dimension, Value

BEAT, SILENCE = 20.0, 120.0  # s: between two signs of life, and without one until death
ALONE, DEADLY = 2, 3  # workers in a row died with a trial: it is asked for alone; has failed
REDUCTION = 3  # of successive halving: this part of the trials survives each rung
Direction = Literal["max", "min"]


@dataclass(frozen=True)
class Row:
    """What is known of a trial.

    Attributes:
      value: of the metric, a mean over seeds: at the end, or when it was pruned; None: not measured
        or not finite.
      values: that of each seed, if it is complete.
      evaluations: how many were reported.
      why: what it failed of.
    """

    number: int
    state: Literal["complete", "pruned", "failed", "running", "waiting"]
    value: float | None
    values: tuple[float, ...]
    evaluations: int
    params: Mapping[str, Value]
    folder: str
    why: str = ""


@dataclass(frozen=True, eq=False)
class Asked:
    """A trial that this worker has to train; each is itself alone.

    Attributes:
      folder: the name of its folder; that of a lost trial goes on there.
    """

    trial: optuna.Trial
    params: Mapping[str, Value]
    folder: str

    @property
    def number(self) -> int:
        return self.trial.number


class Study:
    """The trials of a sweep. Use it as a context manager: while it is entered, this worker lives.

    Args:
      folder: of the sweep; it exists.
      url: of a database, as SQLAlchemy writes it; None: SQLite in the folder.
      about: what all workers of the sweep must have in common: by name, fit for JSON.
      evaluations: how often a trial is measured, if it is not ended before.

    Raises:
      UserError: the storage cannot be used, or holds another sweep of that name.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None,
        dimensions: Sequence[Dimension],
        direction: Direction,
        sampler: str,
        pruner: str,
        evaluations: int,
        about: Mapping[str, Any],
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._dimensions, self._sampler, self._folder = tuple(dimensions), sampler, folder
        self.name = folder.resolve().name
        own = folder.resolve() / "study.db"
        self._url = url or f"sqlite:///{own}"
        # the storage's users may not see each other's folders
        self._remote = url is not None
        self._turns = _turns(self._url)
        # of workers elsewhere: the count, since when, and whether it has moved before our eyes
        self._seen: dict[str, tuple[Any, float, bool]] = {}
        self.worker = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        about = json.loads(json.dumps(about))  # as it comes back
        with self._turn():
            storage = _storage(self._url)
            self._study = optuna.create_study(
                study_name=self.name,
                storage=storage,
                direction="maximize" if direction == "max" else "minimize",
                pruner=_pruner(pruner, evaluations),
                load_if_exists=True,
            )
            if "about" not in self._study.user_attrs:
                self._study.set_user_attr("about", dict(about))
        kept = self._study.user_attrs["about"]
        if differing := [n for n in {**kept, **about} if kept.get(n) != about.get(n)]:
            where = "the storage" if url else str(folder)
            raise UserError(
                f"{where} holds another sweep called {self.name}, which differs in"
                f" {', '.join(differing)}: choose another --workdir"
            )

    def __enter__(self) -> "Study":
        path = self._folder / ".workers" / self.worker
        path.parent.mkdir(exist_ok=True)
        self._alive = path.open("w")
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._over = threading.Event()
        if self._remote:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._alive.close()

    def ask(self, most: int, trials: int) -> list[Asked]:
        """Up to `most` trials to train, such that the study comes to at most `trials` that count.

        Those lost by other workers come first, as they were; one that several workers have died
        with comes alone, since it may be what they died of.
        """
        with self._turn():
            self._recover()
            self._study.sampler = _sampler(self._sampler, self._dimensions, len(self._all()))
            asked: list[Asked] = []
            while len(asked) < most:
                here = self._all()
                waiting = [t for t in here if t.state == TrialState.WAITING]
                if not waiting and sum(map(_counts, here)) >= trials:
                    break
                alone = bool(waiting) and _deaths(waiting[0]) >= ALONE
                if not (alone and asked):
                    asked.append(self._ask())
                if alone:
                    break
            counted = [t.number for t in self._all() if _counts(t)]
            surplus = set(sorted(counted)[trials:])  # where others asked at the same moment
            for one in asked:
                if one.number in surplus:
                    self._study.tell(one.trial, state=TrialState.FAIL)
        return [one for one in asked if one.number not in surplus]

    def report(self, one: Asked, evaluation: int, value: float) -> None:
        """Records what a trial has come to at an evaluation, counted from 1."""
        with self._turn():
            if self._ours(one):
                _report(one, evaluation, value)

    def judged(self, one: Asked) -> bool:
        """Whether the pruner, or the loss of it to another worker, ends a trial here."""
        with self._turn():
            return not self._ours(one) or one.trial.should_prune()

    def complete(self, one: Asked, evaluations: int, values: Sequence[float]) -> None:
        """Ends a trial by the finite values of its seeds, after so many evaluations."""
        with self._turn():
            if self._ours(one):
                mean = math.fsum(values) / len(values)
                _report(one, evaluations, mean)
                one.trial.set_user_attr("values", list(values))
                self._study.tell(one.trial, mean)

    def pruned(self, one: Asked, why: str = "") -> None:
        """Ends a trial that was pruned, or has failed: then `why` says of what."""
        with self._turn():
            if self._ours(one):
                one.trial.set_user_attr("why", why)
                self._study.tell(one.trial, state=TrialState.PRUNED)

    def give_back(self, one: Asked) -> None:
        """Leaves a trial to whoever asks next."""
        with self._turn():
            self._lose(self._all()[one.number], death=False)

    def undecided(self) -> bool:
        """Whether a trial's worker may be dead, or has just been found to be: then ask again."""
        with self._turn():
            self._recover()
            here = self._all()
        running = {t.user_attrs.get("worker", "") for t in here if t.state == TrialState.RUNNING}
        waiting = any(t.state == TrialState.WAITING for t in here)
        return waiting or any(self._lives(worker) is None for worker in running)

    def rows(self) -> list[Row]:
        """All trials that count, by number."""
        with self._turn():
            here = self._all()
        return [_row(t) for t in here if _counts(t)]

    def importances(self) -> dict[str, float]:
        """The share of the value's variance that each name accounts for; {} if that is unknown.

        By fANOVA (Hutter et al. 2014), over the complete trials.
        """
        done = [t for t in self._all() if t.state == TrialState.COMPLETE]
        if len(done) < 4 or len({t.value for t in done}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dict(optuna.importance.get_param_importances(self._study, evaluator=evaluator))

    def _all(self) -> list[optuna.trial.FrozenTrial]:
        return list(self._study.get_trials(deepcopy=False))

    def _ask(self) -> Asked:
        trial = self._study.ask({d.name: distribution(d) for d in self._dimensions})
        trial.set_user_attr("worker", self.worker)
        if "folder" not in trial.user_attrs:
            trial.set_user_attr("folder", f"trial={trial.number:04d}")
        return Asked(trial, trial.params, trial.user_attrs["folder"])

    def _ours(self, one: Asked) -> bool:
        """Whether a trial is still this worker's; not so if it was taken for dead."""
        return bool(self._all()[one.number].state == TrialState.RUNNING)

    def _recover(self) -> None:
        """Copies the trials of workers that are dead; within a turn."""
        for t in self._all():
            if t.state == TrialState.RUNNING:
                worker = t.user_attrs.get("worker", "")
                if worker != self.worker and self._lives(worker) is False:
                    self._lose(t, death=True)

    def _lose(self, lost: optuna.trial.FrozenTrial, death: bool) -> None:
        """A trial no longer counts; one with its parameters, folder and measurements waits.

        One with which DEADLY workers have died, and came no farther, has failed instead.
        """
        try:
            self._study.tell(lost.number, state=TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return  # it has ended meanwhile, or another worker was quicker
        if set(lost.params) < {d.name for d in self._dimensions}:
            return  # killed while it was asked for: another takes its place
        came = len(lost.intermediate_values)
        # one that came farther than before is not what workers die of: they are often killed
        before = lost.user_attrs["came"] if "came" in lost.user_attrs else 0
        deaths = (_deaths(lost) if came == before else 0) + death
        kept = {name: value for name, value in lost.user_attrs.items() if name == "folder"}
        if failed := deaths >= DEADLY:
            kept["why"] = f"{deaths} workers died with it: is the memory too small?"
        copy = optuna.trial.create_trial(
            state=TrialState.PRUNED if failed else TrialState.WAITING,
            params=lost.params,
            distributions=lost.distributions,
            user_attrs={**kept, "deaths": deaths, "came": came},
            intermediate_values=lost.intermediate_values,
        )
        self._study.add_trial(copy)

    def _lives(self, worker: str) -> bool | None:
        """Whether a worker is alive; None: that will show."""
        if worker == self.worker:
            return True
        path = self._folder / ".workers" / worker
        if worker and path.exists():
            with path.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return True
            return False
        if not self._remote:
            return False  # whoever shares the folder has its file there from its start on
        now, count = time.monotonic(), self._study.user_attrs.get(f"worker {worker}")
        if worker not in self._seen:
            self._seen[worker] = (count, now, False)
        elif count != self._seen[worker][0]:
            self._seen[worker] = (count, now, True)
        _, since, moved = self._seen[worker]
        return False if now - since > SILENCE else (moved or None)

    def _beat(self) -> None:
        for count in itertools.count():
            with contextlib.suppress(Exception), self._turn():  # the storage may be away a while
                self._study.set_user_attr(f"worker {self.worker}", count)
            if self._over.wait(BEAT):
                return

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """While it is this worker's turn to read and write, where the storage needs that."""
        try:
            if self._turns is None:
                yield
                return
            with self._turns.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError, OSError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"the sweep's storage cannot be used: {cause}") from error


def distribution(dimension: Dimension) -> BaseDistribution:
    """A dimension in Optuna's terms."""
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.options)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def check_sampler(name: str, dimensions: Sequence[Dimension]) -> None:
    """Raises UserError unless the sampler can serve that space."""
    if name == "grid":
        space.grid(dimensions)
    if name == "cmaes":
        if choices := [d.name for d in dimensions if isinstance(d, Choice)]:
            raise UserError(
                f"--sampler cmaes is for numbers, and {choices[0]} is a choice: use tpe"
            )
        if len(dimensions) < 2:
            raise UserError("--sampler cmaes: expected two names or more in --space; use tpe")
        try:
            import cmaes  # noqa: F401
        except ImportError as error:
            raise UserError("--sampler cmaes needs cmaes: pip install cmaes") from error


class Points(optuna.samplers.BaseSampler):
    """The i-th trial that counts has the i-th of a sequence of points, whoever trains it."""

    def __init__(
        self, dimensions: Sequence[Dimension], point: Callable[[int], Mapping[str, Value]]
    ) -> None:
        self._dimensions, self._point = dimensions, point

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {d.name: distribution(d) for d in self._dimensions}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        return dict(self._point(sum(map(_counts, before))))

    def sample_independent(self, study: Any, trial: Any, param_name: str, _: Any) -> Any:
        raise RuntimeError(f"{param_name} is no part of the space")


class Halving(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934).

    A trial that is evaluated for the η^k-th time goes on if it is among the best 1/η of all that
    have been evaluated so often, those that it is trained with included. It is a function of what
    is stored alone: a trial that another worker takes up is judged alike.

    With `brackets` it is Hyperband (Li et al. 2018, algorithm 1): trials are shared out over
    brackets, of which the i-th judges from the η^i-th evaluation on.
    """

    def __init__(self, evaluations: int, brackets: bool) -> None:
        self._brackets = bracket_sizes(evaluations) if brackets else [1]

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        at = trial.last_step
        bracket = bracket_of(trial.number, self._brackets)
        if at is None or at not in [REDUCTION**k for k in range(bracket, 40)]:
            return False
        rivals = [
            t.intermediate_values[at]
            for t in study.get_trials(deepcopy=False)
            if _counts(t)
            and at in t.intermediate_values
            and bracket_of(t.number, self._brackets) == bracket
        ]
        sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
        return not survives(sign * trial.intermediate_values[at], [sign * v for v in rivals])


def survives(value: float, rivals: Sequence[float]) -> bool:
    """Whether a value is among the best 1/REDUCTION, at least one; it is one of the rivals."""
    kept = max(1, len(rivals) // REDUCTION)
    return value >= sorted(rivals, reverse=True)[kept - 1]


def bracket_sizes(evaluations: int) -> list[int]:
    """How many of some trials go to each bracket, so that each has about the same work.

    With s = the last bracket's number minus its own, ceil((s_max + 1)/(s + 1)·η^s) of them.
    """
    last = 0
    while REDUCTION ** (last + 1) <= evaluations:
        last += 1
    return [math.ceil((last + 1) / (s + 1) * REDUCTION**s) for s in range(last, -1, -1)]


def bracket_of(number: int, sizes: Sequence[int]) -> int:
    """The bracket of a trial: they are filled one after the other, again and again."""
    ends = list(itertools.accumulate(sizes))
    return next(i for i, end in enumerate(ends) if number % ends[-1] < end)


def _pruner(name: str, evaluations: int) -> optuna.pruners.BasePruner:
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5)
    if name in ("halving", "hyperband"):
        return Halving(evaluations, brackets=name == "hyperband")
    return optuna.pruners.NopPruner()


def _sampler(name: str, dimensions: Sequence[Dimension], seed: int) -> optuna.samplers.BaseSampler:
    """What proposes the next trials.

    Args:
      seed: how many trials there are: one worker's sweep can be repeated, and several, or a session
        that follows another, do not propose the same.
    """
    if name == "tpe":
        # "constant_liar": trials that are still running count as bad, so that a batch spreads out
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these are "experimental"
            return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
    if name == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return Points(dimensions, points(name, dimensions))


def points(name: str, dimensions: Sequence[Dimension]) -> Callable[[int], Mapping[str, Value]]:
    """A sequence of points: "grid", "random", or "qmc": a scrambled one of Sobol (Owen 1998)."""
    if name == "grid":
        grid = space.grid(dimensions)
        return lambda i: grid[i % len(grid)]

    def in_cube(i: int) -> Any:
        if name == "random":
            import numpy as np

            return np.random.default_rng(i).random(len(dimensions))
        from scipy.stats import qmc

        sequence = qmc.Sobol(len(dimensions), scramble=True, seed=0)
        return (sequence.fast_forward(i) if i else sequence).random()[0]

    return lambda i: {d.name: d.at(float(u)) for d, u in zip(dimensions, in_cube(i))}


def _report(one: Asked, evaluation: int, value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trial that goes on may have reported it before
        one.trial.report(value, evaluation)


def _deaths(trial: optuna.trial.FrozenTrial) -> int:
    """How many workers have died with a trial, under whatever number, where it stands now."""
    return int(trial.user_attrs["deaths"]) if "deaths" in trial.user_attrs else 0


def _counts(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state != TrialState.FAIL


def _row(t: optuna.trial.FrozenTrial) -> Row:
    why = t.user_attrs["why"] if "why" in t.user_attrs else ""
    state: Any = "failed" if why else t.state.name.lower()
    value = t.value if t.state.is_finished() and not why else None
    return Row(
        number=t.number,
        state=state,
        value=value,
        values=tuple(t.user_attrs.get("values", ())),
        evaluations=len(t.intermediate_values),
        params=dict(t.params),
        folder=t.user_attrs.get("folder", ""),
        why=why,
    )


def _turns(url: str) -> Path | None:
    """The file whose lock makes turns of a SQLite database; None for other storages."""
    from sqlalchemy.engine import make_url

    try:
        parsed = make_url(url)
    except SQLAlchemyError as error:
        example = "sqlite:///a.db or postgresql://host/db"
        raise UserError(f"--storage: expected a URL such as {example}") from error
    if parsed.get_backend_name() != "sqlite":
        return None
    if parsed.database in (None, "", ":memory:"):
        raise UserError("--storage: SQLite in memory cannot be shared: give it a file")
    return Path(f"{parsed.database}.lock")


def _storage(url: str) -> optuna.storages.RDBStorage:
    kwargs = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    for again in (True, False):
        try:
            return optuna.storages.RDBStorage(url.replace("{", "{{"), engine_kwargs=kwargs)
        except ImportError as error:
            raise UserError(f"--storage: its driver is not installed: {error.__cause__}") from error
        except SQLAlchemyError as error:
            # two workers that come at the same moment both make the tables: one is told they exist
            if not again:
                raise UserError(f"--storage: {str(error).splitlines()[0]}") from error
            time.sleep(1)
    raise AssertionError
