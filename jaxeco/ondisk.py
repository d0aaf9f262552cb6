"""One checkpoint as it lies on disk: how it is written by several processes, verified and read.

The only file that imports orbax, which writes and reads the arrays. What orbax leaves to its caller
is here: it restores flipped bytes in array data without a word, so every file carries a checksum;
and a checkpoint must tell which experiment it belongs to. The folder of one holds

    state/            the arrays, by orbax (OCDBT); each process writes what lies on its devices
    about.json        format, step, metrics, experiment, and the shape and dtype of every array
    checksums.json    SHA-256 of every file above; written last

Nothing here executes code from a checkpoint: metadata is JSON, arrays are raw bytes.

No collective of the devices is used, so that a checkpoint can be written while they train.
"""

import errno
import functools
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco import hosts, storage
from jaxeco.errors import UserError
from jaxeco.trees import named

FORMAT = 2  # counts up when older readers could not make sense of what is written

Tree = Any  # a pytree of arrays, typed PRNG keys among them
Spec = dict[str, Any]  # an array's "shape", "dtype", a key's "impl"; "all": is not stored, all this


@dataclass(frozen=True)
class About:
    """What `about.json` says of a checkpoint."""

    format: int
    step: int
    metrics: dict[str, float | None]  # None where the metric was not finite
    best: dict[str, str] | None  # {"metric": ..., "mode": ...}: what the writer kept the best by
    description: dict[str, Any]
    arrays: dict[str, Spec]  # by name: "params/Dense_0/kernel"

    def score(self, best: Mapping[str, str] | None) -> float | None:
        """How good it is by `best` (a metric and a mode), higher is better; None if unknown."""
        value = self.metrics.get(best["metric"]) if best else None
        if best is None or value is None or not math.isfinite(value):
            return None
        return value if best["mode"] == "max" else -value


class Damaged(Exception):
    """A checkpoint is not what was written; the message says why."""


# Formats


def _with_offset(raw: dict[str, Any]) -> dict[str, Any]:
    """Format 1 to 2: the State has `offset`, batches passed over. No run had passed over any."""
    return raw | {"arrays": raw["arrays"] | {"offset": {"shape": [], "dtype": "int32", "all": 0}}}


UPGRADES = {1: _with_offset}  # from this format to the next


def upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """What `about.json` would say had it been written today."""
    while raw["format"] < FORMAT:
        raw = UPGRADES[raw["format"]](raw) | {"format": raw["format"] + 1}
    return raw


# Writing


def begin(folder: Path, about: About) -> None:
    """What one process does before any writes its arrays."""
    storage.remove(folder)
    storage.make_folder(folder)  # not its parent: if that is gone, a disk may be
    storage.make_folder(folder / "state")
    storage.write_text(folder / "about.json", json.dumps(asdict(about)))


def write(folder: Path, arrays: Mapping[str, Any]) -> Callable[[], dict[str, str]]:
    """Starts to write what lies on this process's devices; its buffers may then be donated.

    Args:
      arrays: by name, as `data` gives them; each spans all processes.

    Returns:
      a function that waits until all is written and returns this process's checksums. It raises
      OSError or ValueError if that failed, also where it failed to start.
    """
    from etils import epath

    ocp, handler = _orbax(), _handler()
    saved = ocp.args.PyTreeSave({name: array for name, array in arrays.items() if array.size})
    try:
        # CPU arrays reach orbax as views of the device's memory, not as copies. That is safe: XLA
        # does not reuse a donated buffer while a view of it exists (tested for 1 and 8 devices).
        started = _run(handler.async_save(epath.Path(folder / "state"), args=saved))
    except (OSError, ValueError) as error:
        failure = error

        def fail() -> dict[str, str]:
            raise failure

        return fail

    def wait() -> dict[str, str]:
        failures = []
        for part in started or []:
            try:
                part.result()
            except (OSError, ValueError) as error:  # the other parts go on meanwhile
                failures.append(error)
        if failures:
            raise failures[0]
        ours = folder / "state" / f"ocdbt.process_{hosts.index()}"
        if not ours.exists():  # others hold all there is
            return {}
        return {
            path.relative_to(folder).as_posix(): storage.sha256(path)
            for path in storage.files(ours).values()
        }

    return wait


def finish(folder: Path, sums: Mapping[str, str]) -> None:
    """What one process does when all have written: after it the checkpoint is complete.

    Args:
      sums: what the `write` of each process returned, together.
    """
    from etils import epath

    handler = _handler()
    handler.finalize(epath.Path(folder / "state"))
    if sums and not (folder / "state" / "manifest.ocdbt").exists():
        # orbax takes a listing of the folder that failed for one of an empty folder
        raise OSError(errno.EIO, "the parts of a checkpoint were not put together")
    whole = {
        name: sums[name] if name in sums else storage.sha256(path)
        for name, path in storage.files(folder).items()
    }
    storage.write_text(folder / "checksums.json", json.dumps(whole, indent=1))


def data(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by name; of PRNG keys their numbers."""
    return {name: _data(leaf) for name, leaf in named(tree).items()}


def specs(tree: Tree) -> dict[str, Spec]:
    """Shape and dtype of each leaf, by name."""
    return {name: _spec(leaf) for name, leaf in named(tree).items()}


# Verifying


def read_about(path: Path) -> About:
    """What a checkpoint says of itself, whatever format it was written in; its arrays unread.

    Raises:
      Damaged: it is not what was written.
      UserError: it is of a format to come, or cannot be read at the moment.
    """
    try:
        raw = json.loads(storage.read_text(path / "about.json"))
        written = raw["format"]
        if isinstance(written, int) and written > FORMAT:
            raise UserError(
                f"{path} has format {written}, this jaxeco reads up to {FORMAT}: update jaxeco"
            )
        about = About(**upgraded(raw))
        # what is asked of it later is asked once here, so that it can be believed
        about.score(about.best)
        for spec in about.arrays.values():
            say(spec)
        return about
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, "about.json", error) from error


def verify(path: Path) -> About:
    """Raises Damaged unless every file is byte for byte what was written; else as `read_about`."""
    try:
        files = storage.files(path)
        sums = json.loads(storage.read_text(files["checksums.json"]))
        expected = {str(name): str(digest) for name, digest in sums.items()}
    except KeyError:
        raise Damaged("checksums.json is missing") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, "checksums.json", error) from error
    for name, digest in expected.items():
        if name not in files:
            raise Damaged(f"{name} is missing")
        try:
            if storage.sha256(files[name]) != digest:
                raise Damaged(f"{name} is not what was written")
        except OSError as error:
            raise _damaged(path, name, error) from error
    return read_about(path)


def _damaged(path: Path, name: str, error: Exception) -> Exception:
    """Not what storage denies for now: a good checkpoint must not be taken for a damaged one."""
    why = storage.reason(error)
    if storage.passing(error) or isinstance(error, PermissionError):
        return UserError(f"cannot read {path / name}: {why}; try again, or remove {path}")
    return Damaged(f"{name}: {why}")


# Reading


def say(spec: Mapping[str, Any]) -> str:
    """`float32[16,8]`."""
    return f"{spec['dtype']}[{','.join(map(str, spec['shape']))}]"


def read(path: Path, about: About, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays by name, each process no more of them than its devices are to hold.

    Args:
      wanted: by name a jax.ShapeDtypeStruct with `sharding` or an array, which says where it goes;
        None reads it as numpy.
    """
    from etils import epath

    ocp = _orbax()
    item: dict[str, Any] = {}
    restore_args: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for name, leaf in wanted.items():
        spec = about.arrays[name]
        if "all" in spec or 0 in spec["shape"]:  # these are not stored
            result[name] = _filled(spec, leaf)
        elif leaf is None:
            item[name], restore_args[name] = 0, ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            item[name] = jax.eval_shape(_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            restore_args[name] = ocp.ArrayRestoreArgs(
                sharding=_sharding(leaf), global_shape=item[name].shape, dtype=item[name].dtype
            )
    if item:
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        result |= _handler(_at_once(about, item)).restore(epath.Path(path / "state"), args=args)
    for name in item:
        if "impl" in (spec := about.arrays[name]):
            result[name] = jax.random.wrap_key_data(jnp.asarray(result[name]), impl=spec["impl"])
    return result


def _at_once(about: About, names: Iterable[str]) -> float:
    """How many GB to have in the host's memory on their way to the devices: the largest arrays."""
    specs = [about.arrays[name] for name in names]
    items = [math.prod(spec["shape"]) for spec in specs]
    return max(1.0, 2 * 8 * max(items) / 1e9)  # of at most 8 bytes; orbax refuses what is beyond


def _filled(spec: Spec, leaf: Any) -> Any:
    values = np.full(spec["shape"], spec["all"] if "all" in spec else 0, jnp.dtype(spec["dtype"]))
    if leaf is None:
        return values
    return jax.make_array_from_callback(values.shape, _sharding(leaf), lambda part: values[part])


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _spec(leaf: Any) -> Spec:
    spec: Spec = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return spec | ({"impl": str(jax.random.key_impl(leaf))} if _is_key(leaf) else {})


# orbax


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint as ocp  # 0.3 s, spared to whoever saves nothing

    for chatter in (logging.getLogger("absl"), logging.getLogger("asyncio")):
        chatter.addFilter(_not_orbax)
    # one that fails leaves others unused
    warnings.filterwarnings("ignore", "coroutine 'async_serialize", RuntimeWarning)
    shown = sys.unraisablehook
    sys.unraisablehook = lambda seen: None if _too_late(seen.exc_value) else shown(seen)
    return ocp


def _too_late(error: BaseException | None) -> bool:
    """Writes that end after the first failed one report to an event loop that is gone."""
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs its progress, and the errors of its writes beside raising one of them."""
    said = record.pathname + record.getMessage()
    return "orbax" not in said and "exception was never retrieved" not in said


def _run(work: Any) -> Any:
    import asyncio

    return asyncio.run(work)


def _handler(read_gb: float = 1.0) -> Any:
    """Orbax's writer and reader by itself, without the barriers and time limits it is given.

    `finish` is called when all have written. And a time limit is in seconds of a clock on the wall,
    which someone may set in between.
    """
    ocp = _orbax()
    # Sharing replicas out among the devices of one process saves nothing and compiles a slice for
    # every shape, in the middle of the run.
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=hosts.count() > 1, enable_write_sharding_file=False
    )
    numpy = ocp.type_handlers.NumpyHandler()
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, numpy)
        ),
        use_compression=False,  # saves a tenth of the bytes, for the price of a core
        restore_concurrent_gb=read_gb,
    )
