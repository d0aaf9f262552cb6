"""Checkpoints: saved in the background, kept by recency and by metric, verified when read.

A folder of checkpoints holds, for steps 20 to 50 say:

    30/                 complete: a folder has this name only once everything in it is written;
                        `ondisk.py` says what
    20/                 an older one, or the best by a metric
    40.damaged/         was found damaged, and set aside so that step 40 can be saved again
    50.tmp/             a save that was cut off or is still going on; removed at the next start

Which is the newest is a matter of names, never of clocks.

With several processes, all call the same methods at the same points and see the same folder. Each
writes the arrays of its devices; the first alone does everything else, and the others learn from it
what came of that. A save counts once the first has given the folder its name; a failure anywhere is
an error on all.
"""

import json
import math
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import jax

from jaxeco import hosts, ondisk, storage
from jaxeco.errors import Hung, UserError
from jaxeco.ondisk import About, Damaged
from jaxeco.trees import named, nested

PATIENCE = 100.0  # s that a save may take once the clock on the wall was set by as much
MISSED = 3  # saves in a row that storage does not take, until the run ends

State = Any  # a pytree of arrays, typed PRNG keys among them
Mode = Literal["max", "min"]
T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read by `load`: its arrays, and what was written beside them."""

    state: State
    step: int
    metrics: dict[str, float | None]
    description: dict[str, Any]


class _Passing(UserError):
    """Storage failed in a way that may pass."""


def _settle(done: "futures.Future[None]", action: Callable[[], None]) -> None:
    """What comes of an action, as the outcome of a future."""
    try:
        action()
        done.set_result(None)
    except BaseException as error:
        done.set_exception(error)


@dataclass(frozen=True)
class _Save:
    """A save that is going on: what it takes to begin it anew, and what will come of it."""

    about: About
    state: State
    needed: int | None
    done: futures.Future[None]
    began: float  # by the clock that only goes forward

    @property
    def given_up(self) -> bool:
        """Whether the state's memory has been reused since, so that it cannot be written again."""
        leaves = jax.tree.leaves(self.state)
        return any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array))


class Checkpoints:
    """Writes and restores the checkpoints of one run. Use it as a context manager, or `close()` it.

    Args:
      folder: made if it does not exist. One run at a time may write to it.
      description: JSON-able nested dict of what makes the run the one it is. A checkpoint with
        another description is refused by `restore`.
      keep: how many of the newest checkpoints to keep, at least 1.
      best: name of a metric; the checkpoint where it was best is kept as well, however old it is.
      best_mode: "max" if higher is better.

    Raises:
      UserError: `folder` cannot be made or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        description: Mapping[str, Any],
        keep: int = 2,
        best: str | None = None,
        best_mode: Mode = "max",
    ):
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1 checkpoint to keep")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode: got {best_mode!r}, expected 'max' or 'min'")
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._best = {"metric": best, "mode": best_mode} if best is not None else None
        self._description = json.loads(json.dumps(description))
        self._pending: _Save | None = None
        # how far the clock on the wall is ahead of the one that only goes forward
        self._clocks = time.time() - time.monotonic()
        self._missed = 0  # saves in a row that storage did not take
        _by_first(self._prepare)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # `error` is the one that ends the run

    def save(
        self,
        state: State,
        metrics: Mapping[str, float] | None = None,
        *,
        step: int | None = None,
        needed: int | None = None,
    ) -> bool:
        """Starts saving `state`, and returns as soon as its buffers may be donated.

        Waits for the save before it, if that is still going on. If storage has not taken that one,
        in a way that may pass, this save stands in for it, with a warning.

        Args:
          state: pytree of arrays, on any devices; typed PRNG keys are allowed.
          metrics: scalars by name; without them this checkpoint is never the best.
          step: where training stands; `int(state.step)` if not given, which waits for the device.
          needed: a step whose checkpoint is kept this time, however old it is.

        Returns:
          False if the step is saved already, and nothing happens; but where it was saved without
          metrics, and now comes with them, it is saved anew.

        Raises:
          UserError: this save could not start, or the one before it failed.
        """
        try:
            self.wait()
        except _Passing as failure:
            self._missed += 1
            if self._missed == MISSED:
                raise
            warnings.warn(f"{failure}; the next save stands in for it", stacklevel=2)
        with jax.transfer_guard("allow"):
            step = int(state.step) if step is None else step
        about = About(
            format=ondisk.FORMAT,
            step=step,
            metrics={name: _finite(value) for name, value in (metrics or {}).items()},
            best=self._best,
            description=self._description,
            arrays=ondisk.specs(state),
        )
        return self._start(about, state, needed)

    def wait(self) -> None:
        """Returns when the last `save` is complete.

        Where storage has not taken it, in a way that may pass, and the state's buffers are not
        donated yet, it is written anew after a pause, some times over.

        Raises:
          UserError: it failed.
        """
        for pause in (*storage.PAUSES, None):
            if (save := self._pending) is None:
                return
            self._await(save)  # interrupted by Ctrl-C, it is still pending afterwards
            self._pending = None
            try:
                save.done.result()
                self._missed = 0
            except _Passing:
                if pause is None or save.given_up:
                    raise
                time.sleep(pause)
                self._start(save.about, save.state, save.needed)

    def close(self) -> None:
        """Waits for the last save. Raises UserError if it failed."""
        self.wait()

    def _await(self, save: _Save) -> None:
        """Returns when a save is through.

        tensorstore's threads wait by the clock on the wall: where that has been set back, they can
        wait for the same hour to come again.

        Raises:
          Hung: the clock was set since the session began, and the save takes long.
        """
        while not futures.wait([save.done], timeout=PATIENCE / 10).done:
            moved = time.time() - time.monotonic() - self._clocks
            if abs(moved) > PATIENCE and time.monotonic() - save.began > PATIENCE:
                self._pending = None
                raise Hung(
                    f"checkpoint {save.about.step} is not through after {PATIENCE:g} s: the"
                    f" machine's clock was set by {moved:,.0f} s since the start; start again,"
                    " with --resume"
                )

    def restore(self, abstract_state: State, up_to: int | None = None) -> tuple[State, int] | None:
        """Reads the newest good checkpoint, straight onto the devices that are to hold it.

        Damaged ones that are newer are named in a warning, and set aside.

        Args:
          abstract_state: the state wanted: jax.ShapeDtypeStruct leaves with `sharding`, or arrays.
            The devices and shardings may differ from those of the run that saved it; each process
            reads only what its devices are to hold.
          up_to: the newest step that will do; None: any.

        Returns:
          The state, bit for bit as it was saved, and its step; None if nothing was ever saved.

        Raises:
          UserError: every checkpoint is damaged; storage fails; it belongs to another experiment;
            its arrays are not those of `abstract_state` (a message of several lines says which).
        """
        self.wait()
        found = _by_first(lambda: self._newest(up_to))
        if found is None:
            return None
        about = About(**found)
        path = self.folder / str(about.step)
        read: list[State] = []
        _together(lambda: read.append(_read(path, about, abstract_state, partial=False)))
        return read[0], about.step

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        return steps_in(self.folder)

    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if none has the metric. The newest of equals."""
        return max(_scores(self.folder, self._best), default=(0.0, None))[1]

    def _prepare(self) -> None:
        """Makes the folder, and removes what an earlier session left half-done."""
        with storage.explained(f"cannot keep checkpoints in {self.folder}"):
            storage.make_folder(self.folder, parents=True)
            for path in storage.listed(self.folder):
                step = re.fullmatch(r"([0-9]+)(\.old)?\.tmp", path.name)
                if step and step[2] and not (target := path.with_name(step[1])).exists():
                    with suppress(Damaged):  # cut off before what was to replace it had its name
                        ondisk.verify(path)
                        storage.rename(path, target)
                        continue
                if step:
                    storage.remove(path)

    def _newest(self, up_to: int | None) -> dict[str, Any] | None:
        """What the newest good checkpoint says of itself, if it belongs to this experiment."""
        steps = [step for step in reversed(self.steps()) if up_to is None or step <= up_to]
        found, damaged = _first_good(self.folder, steps)
        if found is None and not damaged:
            return None
        if found is None:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged ({damaged[0][1]}): "
                "put a good copy there, or remove the folder to start anew"
            )
        for path, _ in damaged:
            with storage.explained(f"cannot set aside {path}"):
                storage.remove(path.with_name(f"{path.name}.damaged"))
                storage.rename(path, path.with_name(f"{path.name}.damaged"))
        path, about = found
        theirs = {name for name, value in about.description.items() if value is not None}
        if gone := sorted(theirs - self._description.keys()):
            raise UserError(
                f"{path} was written with {', '.join(gone)}, which this jaxeco does not have: go on"
                " with the version that run.json names, or set start_from to train on from its"
                " weights"
            )
        refuse(
            f"{path} belongs to another experiment",
            about.description,
            self._description,
            "resume with the words it was started with, or choose another folder; to train on from"
            " its weights, set start_from",
        )
        return asdict(about)

    def _start(self, about: About, state: State, needed: int | None) -> bool:
        """Begins to write; False if there is nothing to do."""
        temporary = self.folder / f"{about.step}.tmp"
        done: futures.Future[None] = futures.Future()
        try:
            if not _by_first(lambda: self._begin(about, temporary)):
                return False
            with jax.transfer_guard("allow"):
                written = ondisk.write(temporary, ondisk.data(state))
            commit = partial(self._commit, about.step, temporary, written, needed)
            # a daemon: where it hangs, the process can end nevertheless
            threading.Thread(target=_settle, args=(done, commit), daemon=True).start()
        except _Passing as failure:
            done.set_exception(failure)
        self._pending = _Save(about, state, needed, done, time.monotonic())
        return True

    def _begin(self, about: About, temporary: Path) -> bool:
        with self._saving(about.step):
            saved = self._saved(about)
            if not saved:
                ondisk.begin(temporary, about)
        return not saved

    def _saved(self, about: About) -> bool:
        """Whether the step is on disk already, with metrics if these have come."""
        path = self.folder / str(about.step)
        try:
            return path.exists() and (not about.metrics or bool(ondisk.read_about(path).metrics))
        except Damaged:
            return False

    def _commit(
        self,
        step: int,
        temporary: Path,
        written: Callable[[], dict[str, str]],
        needed: int | None,
    ) -> None:
        """In the background: completes a save, then removes what need not be kept."""
        name = f"save {self.folder}"
        try:
            parts = _together(self._saving(step)(written), name)
            complete = self._saving(step)(self._complete)
            _by_first(lambda: complete(step, temporary, parts, needed), name)
        except UserError:
            if hosts.first():
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk has better uses
            raise

    def _complete(
        self, step: int, temporary: Path, parts: Sequence[Mapping[str, str]], needed: int | None
    ) -> None:
        target, older = self.folder / str(step), self.folder / f"{step}.old.tmp"
        ondisk.finish(temporary, {name: digest for part in parts for name, digest in part.items()})
        if target.exists():  # the same State, saved before it was evaluated
            storage.rename(target, older)
        try:
            storage.rename(temporary, target)
        except OSError:
            if older.exists():
                storage.rename(older, target)
            raise
        storage.remove(older)
        self._prune(needed)

    def _prune(self, needed: int | None) -> None:
        steps = self.steps()
        for step in set(steps[: -self._keep]) - {self.best_step(), needed}:
            # Renamed first: cut off half-way, it must not look like a damaged checkpoint.
            doomed = self.folder / f"{step}.old.tmp"
            storage.rename(self.folder / str(step), doomed)
            storage.remove(doomed)

    @contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            what = f"cannot save checkpoint {step} in {self.folder}"
            kind = _Passing if storage.passing(error) else UserError
            raise kind(storage.explanation(what, storage.reason(error))) from error


def load(
    folder: str | os.PathLike[str],
    abstract: State | None = None,
    *,
    which: Literal["newest", "best"] | int | None = "newest",
    only: Sequence[str] = (),
) -> Loaded:
    """Reads a checkpoint without training on: for evaluation, sampling, export. Writes nothing.

    Args:
      folder: the folder given to `Checkpoints`.
      abstract: what to read: any part of the state that was saved, e.g. {"params": ...}, with the
        shardings wanted. None reads into nested dicts of numpy arrays (tuples become dicts too).
      which: the newest, the best by the metric that the run kept, or a step; None: the best, where
        the run kept one, or else the newest.
      only: without `abstract`, the top-level parts wanted, e.g. ("params", "variables"); () is all.

    Raises:
      UserError: there is no such checkpoint, or it is damaged and no other may stand in for it.
      ValueError: it fits its checksums, but holds what this version did not write.
    """
    folder = Path(folder).absolute()
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}: expected the checkpoint folder of a run")
    wanted: Iterable[int] = reversed(steps)
    if which in ("best", None):
        kept_by = next((kept for step in reversed(steps) if (kept := _kept_by(folder, step))), None)
        best = [step for _, step in sorted(_scores(folder, kept_by), reverse=True)]
        if which == "best" and not best:
            raise UserError(f"no checkpoint in {folder} has the metric that decides which is best")
        wanted = best or wanted
    elif which == "newest":
        pass
    elif which in steps:
        wanted = [which]
    else:
        raise UserError(f"no checkpoint of step {which} in {folder}: it has {steps}")
    found, damaged = _first_good(folder, wanted)
    if found is None:
        raise UserError(f"{damaged[0][0]} is damaged ({damaged[0][1]}): put a good copy there")
    path, about = found
    if abstract is not None:
        state = _read(path, about, abstract, partial=True)
    else:
        names = [name for name in about.arrays if not only or name.split("/")[0] in only]
        state = nested(_arrays(path, about, dict.fromkeys(names)))
    return Loaded(state, about.step, about.metrics, about.description)


# What the processes agree on


def _together(action: Callable[[], T], name: str = "checkpoints") -> list[T]:
    """What `action` returns on each process, in order; what fails on one is raised on all.

    Args:
      action: returns what JSON can hold.
      name: another one in each thread.
    """
    value, error = None, None
    try:
        value = action()
    except UserError as failure:
        error = failure
    mine = {"value": value, "error": error and str(error), "passing": isinstance(error, _Passing)}
    said = hosts.gather(mine, name)
    # the gravest counts, on all: they must not differ on whether to try again
    if failed := sorted((one for one in said if one["error"]), key=lambda one: one["passing"]):
        raise (_Passing if failed[0]["passing"] else UserError)(failed[0]["error"]) from error
    return [one["value"] for one in said]


def _by_first(action: Callable[[], T], name: str = "checkpoints") -> T:
    """What `action` returns, or raises, on the first process; the others do nothing."""
    return _together(action if hosts.first() else lambda: None, name)[0]  # type: ignore[return-value]


# What lies on disk


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a folder, in ascending order."""
    if not folder.is_dir():
        return []
    try:
        names = [path.name for path in storage.listed(folder)]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {storage.reason(error)}; try again") from error
    return sorted(int(name) for name in names if re.fullmatch("[0-9]+", name))


def _first_good(
    folder: Path, steps: Iterable[int]
) -> tuple[tuple[Path, About] | None, list[tuple[Path, str]]]:
    """The first of `steps` that is good, and those before it that are damaged, with the reason."""
    damaged: list[tuple[Path, str]] = []
    for step in steps:
        path = folder / str(step)
        try:
            return (path, ondisk.verify(path)), damaged
        except Damaged as error:
            damaged.append((path, str(error)))
            warnings.warn(f"{path} is damaged ({error}): looking for another", stacklevel=3)
    return None, damaged


def _kept_by(folder: Path, step: int) -> dict[str, str] | None:
    """What the writer of a checkpoint kept the best by."""
    try:
        return ondisk.read_about(folder / str(step)).best
    except Damaged:
        return None


def _scores(folder: Path, best: Mapping[str, str] | None) -> list[tuple[float, int]]:
    """(score, step) of every checkpoint that has the metric of `best`; higher is better."""
    scores = []
    for step in steps_in(folder):
        try:
            score = ondisk.read_about(folder / str(step)).score(best)
        except Damaged:
            continue
        if score is not None:
            scores.append((score, step))
    return scores


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def _read(path: Path, about: About, abstract: State, *, partial: bool) -> State:
    """Reads the arrays that `abstract` names; the checkpoint may hold more only if `partial`."""
    wanted = named(abstract)
    held = {
        name: ondisk.say(spec)
        for name, spec in about.arrays.items()
        if not partial or name in wanted
    }
    asked = {
        name: ondisk.say({"shape": leaf.shape, "dtype": leaf.dtype})
        for name, leaf in wanted.items()
    }
    refuse(
        f"{path} holds other arrays than the experiment",
        held,
        asked,
        "resume with the model and optimizer that wrote it, or choose another folder",
    )
    arrays = _arrays(path, about, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _arrays(path: Path, about: About, wanted: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return storage.persistent(ondisk.read)(path, about, wanted)
    except (OSError, ValueError) as error:
        if storage.passing(error) or isinstance(error, OSError):
            raise UserError(f"cannot read {path}: {storage.reason(error)}; try again") from error
        raise
    except Exception as error:  # files that fit their checksums, but were not written by orbax
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds arrays that orbax cannot read ({what})") from error


# What the user reads


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """{"model.width": 64, "augment.0.size": 8, ...} of nested dicts and lists."""
    if isinstance(value, Mapping) and value:
        children: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and value:
        children = enumerate(value)
    else:
        return {name: value}
    return {
        path: leaf
        for key, child in children
        for path, leaf in _leaves(child, f"{name}.{key}" if name else str(key)).items()
    }


# Fields that came after some checkpoints had been written, and what they say of these.
LATER = {"until": 1.0, "averaged": True, "gradients": "auto"}


def _came_later(name: str, value: Any) -> bool:
    field = name.rpartition(".")[2]
    return field in LATER and LATER[field] == value


def refuse(what: str, held: Any, asked: Any, advice: str, most: int = 8) -> None:
    """Raises UserError if the two differ: one line for each leaf that does, at most `most`.

    None is as good as absent, and so is what a field says in LATER: a checkpoint does not know of
    options that came after it.
    """
    ours, theirs = (
        {
            n: leaf
            for n, leaf in _leaves(tree).items()
            if leaf is not None and not _came_later(n, leaf)
        }
        for tree in (asked, held)
    )
    missing = "has none"
    lines = [
        f"  {name}: checkpoint {theirs.get(name, missing)}, experiment {ours.get(name, missing)}"
        for name in theirs | ours
        if name not in theirs or name not in ours or theirs[name] != ours[name]
    ]
    if lines:
        more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
        raise UserError("\n".join([f"{what}; they differ in", *lines[:most], *more, advice]))
