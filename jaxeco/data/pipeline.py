"""From a data set to batches, by step, in one of two ways that differ only in speed and memory.

Resident: all examples lie decoded on the device, and a step is fed nothing but rows. Streaming:
threads, or processes where decoding is Python's work, make batches ahead of the step that wants
them. The batches are the same, bit for bit, and either way a batch is a function of the step alone:
nothing to save, nothing to skip.

    with Feed.training(dataset, batch=256, seed=0, resident=True, place=place) as feed:
        fed = feed.fed(step, n)                      # numpy, [n, S, ...], for a scan over n steps
        batch = assemble(feed.resident, fed_of_one)  # inside the compiled step

B: examples of the global batch, S: those of them that this process holds, its share. What is not in
the share is not read. The order is that of the global batch, so the number of processes does not
change it, nor does a run that goes on with another number.
"""

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco.data import order
from jaxeco.data.cache import cached
from jaxeco.data.dataset import Column, Dataset, Field, read
from jaxeco.errors import RunFailed, UserError

Fields = dict[str, np.ndarray]

# Decoders release the GIL, but more threads than this only add memory: each holds a batch.
_THREADS = min(8, os.cpu_count() or 1)


# A device counts in int32; the rest is for a window that begins at the last row.
_ROWS = 2**31 - 2**20


def fits(dataset: Dataset, limit_bytes: float) -> bool:
    """Whether the decoded examples take at most `limit_bytes`, and may so be made resident."""
    rows = max(array.shape[0] for array in dataset.arrays.values())
    return dataset.nbytes <= limit_bytes and rows <= _ROWS


class Feed:
    """What each step is fed. Use `Feed.training` or `Feed.evaluation`; close it, or use `with`.

    Attributes:
      dataset: where the examples come from.
      batch: B, examples in a batch.
      share: i64[S], which of them this process holds, ascending.
      steps: batches in one pass over the data. Training goes on after it, evaluation ends.
      resident: fields on the device, arrays [N, ...] or pytrees of arrays; {} when streaming.
    """

    dataset: Dataset
    batch: int
    share: np.ndarray
    steps: int
    resident: dict[str, Any]

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        steps: int,
        plan: Callable[[int], Fields],
        how: "_How",
        *,
        ends: bool,
    ):
        """Use the named constructors."""
        self.dataset, self.batch, self.steps = dataset, batch, steps
        self.share, self.workers = how.positions(batch), how.workers
        self._plan = plan
        self._batches = _Batches(dataset.fields, plan, self.share)
        self._stop = steps if ends else 2**62
        self._reader: Any = None
        self._next = 0  # the step that the reader gives next
        self.resident = {}
        if how.resident:
            placed = how.place(_whole(dataset))
            self.resident = jax.tree.map(lambda array: placed[id(array)], dict(dataset.fields))

    @classmethod
    def training(
        cls,
        dataset: Dataset,
        batch: int,
        seed: int,
        *,
        resident: bool,
        place: Callable[[Any], Any] = jax.device_put,
        share: np.ndarray | None = None,
        workers: int = 0,
    ) -> Self:
        """Shuffled batches without end; the remainder of an epoch is dropped (`order.indices`).

        A batch also holds "index", which row of the data each example is, and "epoch"; i32[B].

        Args:
          dataset: opened data.
          batch: examples in the global batch.
          seed: of the order, an integer in [0, 2**64).
          resident: whether the examples lie on the device; see `fits`.
          place: puts a pytree of arrays there, once, e.g. replicated over a mesh.
          share: positions in the global batch that this process holds, ascending; None: all.
          workers: processes that decode batches; 0: threads of this one do.

        Raises:
          ValueError: if the batch is larger than a pass, or the share is not a part of it.
        """
        steps = order.steps_per_epoch(batch, dataset.training_examples)
        plan = partial(_training_rows, seed, batch, len(dataset), dataset.stride)
        how = _How(resident, place, share, workers)
        return cls(dataset, batch, steps, plan, how, ends=False)

    @classmethod
    def evaluation(
        cls,
        dataset: Dataset,
        batch: int,
        *,
        resident: bool,
        place: Callable[[Any], Any] = jax.device_put,
        share: np.ndarray | None = None,
        workers: int = 0,
    ) -> Self:
        """Every example once, in order, in `steps` batches of one size; padding has mask 0.

        A batch also holds "index", i32[B]: which of the split's examples each is, from 0.
        `share` and `workers` are as in `training`.
        """
        size = dataset.eval_examples
        plan = partial(_evaluation_rows, batch, size, dataset.stride)
        steps = order.eval_steps(batch, size)
        how = _How(resident, place, share, workers)
        return cls(dataset, batch, steps, plan, how, ends=True)

    def with_seed(self, seed: int) -> Self:
        """A feed of the same training data in another seed's order; what is resident is shared."""
        feed = copy(self)
        feed._plan = partial(
            _training_rows, seed, self.batch, len(self.dataset), self.dataset.stride
        )
        feed._batches = replace(self._batches, plan=feed._plan)
        feed._reader, feed._next = None, 0
        return feed

    def plan(self, step: int) -> Fields:
        """Which examples the whole batch of a step consists of, whoever holds them; reads none.

        Returns:
          "row" i64[B], of the data set; "index" and in training "epoch", whole numbers, [B]; in an
          evaluation "mask" f32[B].
        """
        return self._plan(step)

    def fed(self, step: int, n: int = 1) -> Fields:
        """What `n` steps from `step` on are fed: host arrays with leading dimensions [n, S].

        Resident: "row" i32[n, S]. Streaming: the examples themselves. Either way "index" i32[n, S],
        and in training "epoch" i32[n, S], in an evaluation "mask" f32[n, S]. Steps asked for one
        after another are read ahead; any other step starts the reader anew, which costs no more
        than the first batch did.

        Raises:
          ValueError: if an evaluation has no such steps.
          UserError: whatever the source found wrong with an example.
          RunFailed: a process that decodes came to an end.
        """
        if n < 1 or step < 0:
            raise ValueError(f"got step {step} and n {n}, expected at least 0 and 1")
        if step + n > self._stop:
            raise ValueError(f"got steps up to {step + n}, expected at most {self._stop} of them")
        batches = (
            [self._batches.cut(step + i) for i in range(n)]
            if self.resident
            else self._read(step, n)
        )
        return {name: _host(np.stack([batch[name] for batch in batches])) for name in batches[0]}

    def close(self) -> None:
        """Tells the reading threads to end, once each is through with the batch it is at.

        Reading processes have ended when this returns. The feed may be used again and then starts
        new ones.
        """
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, step: int, n: int) -> list[Fields]:
        if self._reader is None or self._next != step:
            self.close()
            self._reader = self._start(step, ahead=max(n, _THREADS, 2 * self.workers))
        try:
            batches = [next(self._reader) for _ in range(n)]
        except BaseException:  # what the reader has lost is unknown now: begin afresh next time
            self.close()
            raise
        self._next = step + n
        return batches

    def _start(self, step: int, ahead: int) -> Any:
        columns = {k: f for k, f in self.dataset.fields.items() if isinstance(f, Column)}
        if self.workers and columns:
            return self._from_processes(step, ahead, columns)
        return _ahead(self._batches, step, self._stop, _THREADS, ahead)

    def _from_processes(
        self, step: int, ahead: int, columns: Mapping[str, Field]
    ) -> Generator[Fields, None, None]:
        """Batches whose columns other processes decode; what need not be decoded stays here."""
        rest = {name: f for name, f in self.dataset.fields.items() if name not in columns}
        here = replace(self._batches, fields=rest)
        there = partial(_told, replace(self._batches, fields=columns))
        each = -(-ahead // self.workers)
        found = None
        try:
            while True:
                try:
                    if found is None:
                        found = _ahead(there, step, self._stop, 1, each, self.workers)
                    values = next(found)
                except Exception as error:  # none of the decoder's own, which come as values
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    raise RunFailed(
                        f"a process that decodes examples (read_workers={self.workers}) failed "
                        f"({reason}): it may have been killed for want of memory, or of room in "
                        "/dev/shm, or what decodes cannot be pickled; go on with --resume, and "
                        "fewer of them, or read_workers=0, where threads decode"
                    ) from error
                if isinstance(values, Exception):
                    raise values
                yield values | here(step)
                step += 1
        finally:
            if found is not None:
                found.close()


@dataclass(frozen=True)
class _How:
    """The settings that `Feed.training` and `Feed.evaluation` have in common."""

    resident: bool
    place: Callable[[Any], Any]
    share: np.ndarray | None
    workers: int

    def positions(self, batch: int) -> np.ndarray:
        share = np.arange(batch) if self.share is None else np.asarray(self.share, np.int64)
        ascending = np.array_equal(share, np.unique(share))
        if not (ascending and len(share) and 0 <= share[0] <= share[-1] < batch):
            raise ValueError(
                f"share: got {self.share}, expected ascending positions in 0 to {batch - 1}"
            )
        return share


@dataclass(frozen=True)
class _Batches:
    """A share of each batch, by step. Pure, and may be pickled as its fields may."""

    fields: Mapping[str, Field]
    plan: Callable[[int], Fields]
    share: np.ndarray

    def cut(self, step: int) -> Fields:
        return {name: value[self.share] for name, value in self.plan(step).items()}

    def __call__(self, step: int) -> Fields:
        fed = self.cut(int(step))
        examples = read(self.fields, fed.pop("row"))
        return {name: _host(value) for name, value in examples.items()} | fed


def _training_rows(seed: int, batch: int, size: int, stride: int, step: int) -> Fields:
    row = order.indices(seed, step, batch, size, stride)
    epoch = np.full(batch, step // order.steps_per_epoch(batch, size // stride))
    return {"row": row, "index": row, "epoch": epoch}


def _evaluation_rows(batch: int, size: int, stride: int, step: int) -> Fields:
    index, mask = order.eval_indices(step, batch, size)
    return {"row": index * stride, "index": index.astype(np.int32), "mask": mask}


def _ahead(
    batches: Callable[[int], Any], step: int, stop: int, threads: int, ahead: int, workers: int = 0
) -> Any:
    """An iterator over `batches` of steps, each made before it is asked for, in the same order."""
    import grain  # takes more than a second, and only streaming wants it

    # An element is a step, so the place to resume at is simply where the range begins.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    made = grain.MapDataset.range(step, stop).map(batches).to_iter_dataset(options)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain asks them, and there are none of ours
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
        made = made.mp_prefetch(processes, worker_init_fn=partial(_settle, os.getpid()))
    return iter(made)


def _settle(parent: int, *_: int) -> None:
    """Makes a reading process one that only its parent ends, and that ends with it."""
    jax.config.update("jax_platforms", "cpu")  # the devices are the run's
    for asked in (signal.SIGINT, signal.SIGTERM):  # of the whole group: the run answers them
        signal.signal(asked, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _told(batches: Callable[[int], Fields], step: int) -> Fields | Exception:
    """A batch, or what went wrong: between processes only plain errors are sure to be pickled."""
    try:
        return batches(step)
    except UserError as error:
        return UserError(str(error))
    except Exception:
        return RuntimeError(f"in a process that decodes examples:\n{traceback.format_exc()}")


def assemble(resident: dict[str, Any], fed: dict[str, Any]) -> dict[str, jax.Array]:
    """One step's batch, from what lies on the device and what the step was fed. Pure.

    Runs inside the compiled step. Under `shard_map`, `resident` is whole, `fed` one shard's part.

    Args:
      resident: `Feed.resident`.
      fed: `Feed.fed` for one step, i.e. without the leading n.

    Returns:
      "x", "y" and every other field [B, ...]; "mask" f32[B], all ones unless it was fed; "index"
      i32[B], which of the data each example is; and in training "epoch" i32[B], from 0.
    """
    batch = {name: jnp.asarray(value) for name, value in fed.items()}
    if resident:
        row = batch.pop("row")
        for name, field in resident.items():
            if isinstance(field, jax.Array | np.ndarray):
                # Our own rows are within bounds; saying so spares a comparison per element.
                batch[name] = jnp.asarray(field).at[row].get(mode="promise_in_bounds")
            else:
                batch[name] = field[row]
    if "mask" not in batch:
        batch["mask"] = jnp.ones(len(next(iter(batch.values()))), jnp.float32)
    return batch


def _host(array: np.ndarray) -> np.ndarray:
    """The array as JAX will hold it (float64 as float32, ...), so that both ways agree in dtype."""
    return np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))


def _whole(dataset: Dataset) -> dict[int, np.ndarray]:
    """`dataset.arrays`, decoded by several threads; once only if the data set says `keep`."""
    wholes = dict(dataset.arrays)
    decoded = {key: field for key, field in wholes.items() if not isinstance(field, np.ndarray)}
    names = {str(number): key for number, key in enumerate(decoded)}
    layout = {name: (decoded[key].shape, decoded[key].dtype) for name, key in names.items()}
    if not decoded:
        return {key: _host(array) for key, array in wholes.items()}
    chunks = np.array_split(np.arange(len(dataset)), -(-len(dataset) // 64))

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for values in pool.map(partial(read, decoded), chunks):
                yield {name: values[key] for name, key in names.items()}

    if dataset.keep:
        kept, _ = cached(f"whole-{dataset.fingerprint}", dataset.fingerprint, layout, blocks)
        wholes |= {key: kept[name] for name, key in names.items()}
    else:
        wholes |= {key: np.empty(field.shape, field.dtype) for key, field in decoded.items()}
        for rows, block in zip(chunks, blocks(), strict=True):
            for name, values in block.items():
                wholes[names[name]][rows] = values
    return {key: _host(array) for key, array in wholes.items()}
