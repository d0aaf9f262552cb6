"""From a data set to batches, by step, in one of two ways that differ only in speed and memory.

Resident: all examples lie decoded on the device, and a step is fed nothing but rows. Streaming:
threads decode batches ahead of the step that wants them. The batches are the same, bit for bit, and
either way a batch is a function of the step alone: nothing to save, nothing to skip.

    with Feed.training(dataset, batch=256, seed=0, resident=True, place=place) as feed:
        fed = feed.fed(step, n)                      # numpy, [n, B, ...], for a scan over n steps
        batch = assemble(feed.resident, fed_of_one)  # inside the compiled step
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco.data import order
from jaxeco.data.dataset import Dataset, Field

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
      steps: batches in one pass over the data. Training goes on after it, evaluation ends.
      resident: fields on the device, arrays [N, ...] or pytrees of arrays; {} when streaming.
    """

    dataset: Dataset
    batch: int
    steps: int
    resident: dict[str, Any]

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        steps: int,
        plan: Callable[[int], Fields],
        *,
        ends: bool,
        resident: bool,
        place: Callable[[Any], Any],
    ):
        """Use the named constructors. `plan(step)` gives "row", and maybe "index" and "mask"."""
        self.dataset, self.batch, self.steps = dataset, batch, steps
        self._plan = plan
        self._stop = steps if ends else 2**62
        self._reader: Any = None
        self._next = 0  # the step that the reader gives next
        self.resident = {}
        if resident:
            placed = place({key: _whole(array) for key, array in dataset.arrays.items()})
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
    ) -> Self:
        """Shuffled batches without end; the remainder of an epoch is dropped (`order.indices`).

        Args:
          dataset: opened data.
          batch: examples in the global batch.
          seed: of the order, an integer in [0, 2**64).
          resident: whether the examples lie on the device; see `fits`.
          place: puts a pytree of arrays there, once, e.g. replicated over a mesh.

        Raises:
          ValueError: if the batch is larger than a pass.
        """
        steps = order.steps_per_epoch(batch, dataset.training_examples)

        def plan(step: int) -> Fields:
            return {"row": order.indices(seed, step, batch, len(dataset), dataset.stride)}

        return cls(dataset, batch, steps, plan, ends=False, resident=resident, place=place)

    @classmethod
    def evaluation(
        cls,
        dataset: Dataset,
        batch: int,
        *,
        resident: bool,
        place: Callable[[Any], Any] = jax.device_put,
    ) -> Self:
        """Every example once, in order, in `steps` batches of one size; padding has mask 0.

        A batch also holds "index", i32[B]: which of the split's examples each is, from 0.
        """
        size = dataset.eval_examples

        def plan(step: int) -> Fields:
            index, mask = order.eval_indices(step, batch, size)
            return {
                "row": index * dataset.stride,
                "index": index.astype(np.int32),
                "mask": mask,
            }

        steps = order.eval_steps(batch, size)
        return cls(dataset, batch, steps, plan, ends=True, resident=resident, place=place)

    def fed(self, step: int, n: int = 1) -> Fields:
        """What `n` steps from `step` on are fed: host arrays with leading dimensions [n, B].

        Resident: "row" i32[n, B]. Streaming: the examples themselves. In an evaluation also
        "index" i32[n, B] and "mask" f32[n, B]. Steps asked for one after another are read ahead;
        any other step starts the reader anew, which costs no more than the first batch did.

        Raises:
          ValueError: if an evaluation has no such steps.
          UserError: whatever the source found wrong with an example.
        """
        if n < 1 or step < 0:
            raise ValueError(f"got step {step} and n {n}, expected at least 0 and 1")
        if step + n > self._stop:
            raise ValueError(f"got steps up to {step + n}, expected at most {self._stop} of them")
        batches = [self._plan(step + i) for i in range(n)] if self.resident else self._read(step, n)
        return {name: _host(np.stack([batch[name] for batch in batches])) for name in batches[0]}

    def close(self) -> None:
        """Tells the reading threads to end, once each is through with the batch it is at.

        The feed may be used again and then starts new ones.
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
            self._reader = self._start(step, ahead=max(n, _THREADS))
        try:
            batches = [next(self._reader) for _ in range(n)]
        except BaseException:  # what the reader has lost is unknown now: begin afresh next time
            self.close()
            raise
        self._next = step + n
        return batches

    def _start(self, step: int, ahead: int) -> Iterator[Fields]:
        import grain  # takes more than a second, and only streaming wants it

        # An element is a step, so the place to resume at is simply where the range begins.
        batches = grain.MapDataset.range(step, self._stop).map(self._gather)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
        return iter(batches.to_iter_dataset(options))

    def _gather(self, step: int) -> Fields:
        plan = self._plan(int(step))
        row = plan.pop("row")
        return {name: _host(field[row]) for name, field in self.dataset.fields.items()} | plan


def assemble(resident: dict[str, Any], fed: dict[str, Any]) -> dict[str, jax.Array]:
    """One step's batch, from what lies on the device and what the step was fed. Pure.

    Runs inside the compiled step. Under `shard_map`, `resident` is whole, `fed` one shard's part.

    Args:
      resident: `Feed.resident`.
      fed: `Feed.fed` for one step, i.e. without the leading n.

    Returns:
      "x", "y" and every other field [B, ...], and "mask" f32[B], all ones unless it was fed; in
      an evaluation also "index" i32[B].
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


def _whole(field: Field) -> np.ndarray:
    """All examples; what has to be decoded is decoded by several threads."""
    if isinstance(field, np.ndarray):
        return _host(field)
    whole = np.empty(field.shape, field.dtype)

    def read(rows: np.ndarray) -> None:
        whole[rows] = field[rows]

    chunks = np.array_split(np.arange(len(whole)), -(-len(whole) // 64))
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(read, chunks):
            pass
    return _host(whole)
