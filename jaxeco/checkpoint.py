"""Checkpoints: saved in the background, kept by recency and by metric, verified when read.

The only file that imports orbax, which writes and reads the arrays. What orbax leaves to its caller
is here: it restores flipped bytes in array data without a word, so every file carries a checksum;
and a checkpoint must tell which experiment it belongs to.

A folder of checkpoints holds, for steps 20 to 50 say:

    30/                 complete: a folder has this name only once everything in it is written
      state/            the arrays, by orbax (OCDBT)
      about.json        format, step, metrics, experiment, and the shape and dtype of every array
      checksums.json    SHA-256 of every file above; written last
    20/                 an older one, or the best by a metric
    40.damaged/         was found damaged, and set aside so that step 40 can be saved again
    50.tmp/             a save that was cut off or is still going on; removed at the next start

Nothing here executes code from a checkpoint: metadata is JSON, arrays are raw bytes.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco.errors import UserError
from jaxeco.trees import named, nested

FORMAT = 1  # counts up when older readers could not make sense of what is written

State = Any  # a pytree of arrays, typed PRNG keys among them
Mode = Literal["max", "min"]


@dataclass(frozen=True)
class About:
    """What `about.json` says of a checkpoint."""

    format: int
    step: int
    metrics: dict[str, float | None]  # None where the metric was not finite
    best: dict[str, str] | None  # {"metric": ..., "mode": ...}: what the writer kept the best by
    description: dict[str, Any]
    arrays: dict[str, dict[str, Any]]  # {"params/Dense_0/kernel": {"shape": ..., "dtype": ...}}

    def score(self, best: Mapping[str, str] | None) -> float | None:
        """How good it is by `best` (a metric and a mode), higher is better; None if unknown."""
        value = self.metrics.get(best["metric"]) if best else None
        if best is None or value is None or not math.isfinite(value):
            return None
        return value if best["mode"] == "max" else -value


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read by `load`: its arrays, and what was written beside them."""

    state: State
    step: int
    metrics: dict[str, float | None]
    description: dict[str, Any]


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
        with _user_error(f"cannot keep checkpoints in {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if re.fullmatch(r"[0-9]+(\.old)?\.tmp", path.name):
                    _remove(path)
        self._orbax = _orbax().AsyncCheckpointer(_handler())
        self._worker = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: futures.Future[None] | None = None

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
    ) -> bool:
        """Starts saving `state`, and returns as soon as its buffers may be donated.

        Waits for the save before it, if that is still going on.

        Args:
          state: pytree of arrays, on any devices; typed PRNG keys are allowed.
          metrics: scalars by name; without them this checkpoint is never the best.
          step: where training stands; `int(state.step)` if not given, which waits for the device.

        Returns:
          False if the step is saved already, and nothing happens; but where it was saved without
          metrics, and now comes with them, it is saved anew.

        Raises:
          UserError: this save could not start, or the one before it failed.
        """
        self.wait()
        with jax.transfer_guard("allow"):
            step = int(state.step) if step is None else step
        target, temporary = self.folder / str(step), self.folder / f"{step}.tmp"
        if target.exists() and (not metrics or _about(target).metrics):
            return False
        # CPU arrays reach orbax as views of the device's memory, not as copies. That is safe: XLA
        # does not reuse a donated buffer while a view of it exists (tested for 1 and 8 devices).
        with jax.transfer_guard("allow"):
            leaves = named(state)
            arrays = {name: _data(leaf) for name, leaf in leaves.items() if leaf.size}
        about = About(
            format=FORMAT,
            step=step,
            metrics={name: _finite(value) for name, value in (metrics or {}).items()},
            best=self._best,
            description=self._description,
            arrays={name: _spec(leaf) for name, leaf in leaves.items()},
        )
        with self._saving(step), jax.transfer_guard("allow"):
            _remove(temporary)
            temporary.mkdir()
            (temporary / "about.json").write_text(json.dumps(asdict(about)))
            save = _orbax().args.PyTreeSave(arrays)
            self._orbax.save(str(temporary / "state"), args=save)
        self._pending = self._worker.submit(self._commit, step, temporary, target)
        return True

    def wait(self) -> None:
        """Returns when the last `save` is complete. Raises UserError if it failed."""
        if self._pending is not None:
            futures.wait([self._pending])  # interrupted by Ctrl-C, it is still pending afterwards
            finished, self._pending = self._pending, None
            finished.result()

    def close(self) -> None:
        """Waits for the last save and gives its threads back. Raises UserError if it failed."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()

    def restore(self, abstract_state: State) -> tuple[State, int] | None:
        """Reads the newest good checkpoint, straight onto the devices that are to hold it.

        Damaged ones that are newer are named in a warning, and set aside.

        Args:
          abstract_state: the state wanted: jax.ShapeDtypeStruct leaves with `sharding`, or arrays.
            The devices and shardings may differ from those of the run that saved it.

        Returns:
          The state, bit for bit as it was saved, and its step; None if nothing was ever saved.

        Raises:
          UserError: every checkpoint is damaged; it belongs to another experiment; its arrays are
            not those of `abstract_state` (a message of several lines says which differ).
        """
        self.wait()
        found, damaged = _first_good(self.folder, reversed(self.steps()))
        if found is None and not damaged:
            return None
        if found is None:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged ({damaged[0][1]}): "
                "put a good copy there, or remove the folder to start anew"
            )
        for path, _ in damaged:
            with _user_error(f"cannot set aside {path}"):
                _remove(path.with_name(f"{path.name}.damaged"))
                path.rename(path.with_name(f"{path.name}.damaged"))
        path, about = found
        _refuse(
            f"{path} belongs to another experiment",
            about.description,
            self._description,
            "resume with the words it was started with, or choose another folder; to train on from"
            " its weights, set start_from",
        )
        return _read(path, about, abstract_state, partial=False), about.step

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        return _steps(self.folder)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if none has the metric. The newest of equals."""
        return max(_scores(self.folder, self._best), default=(0.0, None))[1]

    def _commit(self, step: int, temporary: Path, target: Path) -> None:
        """In the background: completes a save, then removes what need not be kept."""
        try:
            with self._saving(step):
                self._orbax.wait_until_finished()
                sums = {name: _sha256(path) for name, path in _files(temporary).items()}
                (temporary / "checksums.json").write_text(json.dumps(sums, indent=1))
                if target.exists():  # the same State, saved before it was evaluated
                    target.rename(self.folder / f"{step}.old.tmp")
                temporary.rename(target)
                _remove(self.folder / f"{step}.old.tmp")
                self._prune()
        except UserError:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk has better uses
            raise

    def _prune(self) -> None:
        steps = self.steps()
        for step in set(steps[: -self._keep]) - {self.best_step()}:
            # Renamed first: cut off half-way, it must not look like a damaged checkpoint.
            doomed = self.folder / f"{step}.old.tmp"
            (self.folder / str(step)).rename(doomed)
            _remove(doomed)

    @contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        with _user_error(f"cannot save checkpoint {step} in {self.folder}"):
            yield


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
    """
    folder = Path(folder).absolute()
    steps = _steps(folder)
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
        state = nested(_read_arrays(path, about, dict.fromkeys(names)))
    return Loaded(state, about.step, about.metrics, about.description)


# What lies on disk


class _Damaged(Exception):
    """A checkpoint is not what was written; the message says why."""


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch("[0-9]+", path.name))


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder`, by its relative name with forward slashes."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _about(path: Path) -> About:
    try:
        raw = json.loads((path / "about.json").read_text())
        written = raw["format"]
        if isinstance(written, int) and written > FORMAT:
            raise UserError(
                f"{path} has format {written}, this jaxeco reads up to {FORMAT}: update jaxeco"
            )
        about = About(**raw)
        about.score(
            about.best
        )  # what is asked of it later is asked once here, so that it can be believed
        for spec in about.arrays.values():
            _say(spec)
        return about
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Damaged(f"about.json: {_reason(error)}") from error


def _verify(path: Path) -> About:
    """Raises _Damaged unless every file is byte for byte what was written."""
    files = _files(path)
    try:
        sums = json.loads(files["checksums.json"].read_text())
        expected = {str(name): str(digest) for name, digest in sums.items()}
    except KeyError:
        raise _Damaged("checksums.json is missing") from None
    except (OSError, ValueError, AttributeError) as error:
        raise _Damaged(f"checksums.json: {_reason(error)}") from error
    for name, digest in expected.items():
        if name not in files:
            raise _Damaged(f"{name} is missing")
        try:
            if _sha256(files[name]) != digest:
                raise _Damaged(f"{name} is not what was written")
        except OSError as error:
            raise _Damaged(f"{name}: {_reason(error)}") from error
    return _about(path)


def _first_good(
    folder: Path, steps: Iterable[int]
) -> tuple[tuple[Path, About] | None, list[tuple[Path, str]]]:
    """The first of `steps` that is good, and those before it that are damaged, with the reason."""
    damaged: list[tuple[Path, str]] = []
    for step in steps:
        path = folder / str(step)
        try:
            return (path, _verify(path)), damaged
        except _Damaged as error:
            damaged.append((path, str(error)))
            warnings.warn(f"{path} is damaged ({error}): looking for another", stacklevel=3)
    return None, damaged


def _kept_by(folder: Path, step: int) -> dict[str, str] | None:
    """What the writer of a checkpoint kept the best by."""
    try:
        return _about(folder / str(step)).best
    except _Damaged:
        return None


def _scores(folder: Path, best: Mapping[str, str] | None) -> list[tuple[float, int]]:
    """(score, step) of every checkpoint that has the metric of `best`; higher is better."""
    scores = []
    for step in _steps(folder):
        try:
            score = _about(folder / str(step)).score(best)
        except _Damaged:
            continue
        if score is not None:
            scores.append((score, step))
    return scores


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


# Pytrees as flat dicts: what orbax is given has no structure that it could fail to give back


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _spec(leaf: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return spec | ({"impl": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {})


def _say(spec: Mapping[str, Any]) -> str:
    return f"{spec['dtype']}[{','.join(map(str, spec['shape']))}]"


def _read(path: Path, about: About, abstract: State, *, partial: bool) -> State:
    """Reads the arrays that `abstract` names; the checkpoint may hold more only if `partial`."""
    wanted = named(abstract)
    held = {
        name: _say(spec) for name, spec in about.arrays.items() if not partial or name in wanted
    }
    asked = {
        name: _say({"shape": leaf.shape, "dtype": leaf.dtype}) for name, leaf in wanted.items()
    }
    _refuse(
        f"{path} holds other arrays than the experiment",
        held,
        asked,
        "resume with the model and optimizer that wrote it, or choose another folder",
    )
    arrays = _read_arrays(path, about, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _read_arrays(path: Path, about: About, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays by name: onto the devices of `wanted[name]`, or as numpy where that is None."""
    ocp = _orbax()
    item: dict[str, Any] = {}
    restore_args: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for name, leaf in wanted.items():
        spec = about.arrays[name]
        if 0 in spec["shape"]:  # orbax does not store these
            result[name] = np.zeros(spec["shape"], jnp.dtype(spec["dtype"]))
            if leaf is not None:
                result[name] = jax.device_put(result[name], _sharding(leaf))
        elif leaf is None:
            item[name], restore_args[name] = 0, ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            item[name] = jax.eval_shape(_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            restore_args[name] = ocp.ArrayRestoreArgs(
                sharding=_sharding(leaf), global_shape=item[name].shape, dtype=item[name].dtype
            )
    if item:
        with ocp.Checkpointer(_handler()) as reader:
            args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
            result |= reader.restore(str(path / "state"), args=args)
    for name in item:
        if impl := about.arrays[name].get("impl"):
            result[name] = jax.random.wrap_key_data(jnp.asarray(result[name]), impl=impl)
    return result


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


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


def _refuse(what: str, held: Any, asked: Any, advice: str, most: int = 8) -> None:
    """Raises UserError if the two differ: one line for each leaf that does, at most `most`.

    None is as good as absent: a checkpoint does not know of options that came after it.
    """
    ours, theirs = (
        {name: leaf for name, leaf in _leaves(tree).items() if leaf is not None}
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


@contextmanager
def _user_error(what: str) -> Iterator[None]:
    """Turns a failure of the file system into a line that a user can act on."""
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
        raise UserError(
            f"{what}: {_reason(error)}; make room or give a folder that can be written"
        ) from error


def _reason(error: BaseException) -> str:
    """One short line: the operating system's own words if there are any."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) or type(error).__name__
    system = re.search(r"os_error_code='(\d+)'", text)  # so tensorstore puts it, after much else
    return os.strerror(int(system[1])) if system else text.splitlines()[0][:120]


# orbax


def _orbax() -> Any:
    import orbax.checkpoint as ocp  # 0.3 s, spared to whoever saves nothing

    for chatter in (logging.getLogger("absl"), logging.getLogger("asyncio")):
        chatter.addFilter(_not_orbax)  # once: a filter that is there already is not added again
    return ocp


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs its progress, and the tracebacks of errors that it raises as well."""
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


def _handler() -> Any:
    ocp = _orbax()
    # Sharing replicas out among the devices of one process saves nothing and compiles a slice for
    # every shape, in the middle of the run.
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=jax.process_count() > 1, enable_write_sharding_file=False
    )
    numpy = ocp.type_handlers.NumpyHandler()
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, numpy)
        ),
        use_compression=False,  # saves a tenth of the bytes, for the price of a core
    )
