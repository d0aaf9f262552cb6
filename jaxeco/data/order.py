"""Which examples make up a batch: pure index arithmetic, on the host, before any data is read.

A batch is a function of (seed, step) and of nothing else, so resuming has nothing to fast-forward
and the order does not depend on how many devices or reading threads there are. Indices are those
of the *global* batch; whoever holds a part of it cuts that part out afterwards.
"""

from functools import lru_cache

import numpy as np


# A handful, because several seeds may train side by side, each before and after an epoch's end.
@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """A random order of `size` examples, the same for ever.

    Sorts raw words of the counter-based generator Philox4x64 (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3") under the key (seed, epoch). NumPy promises to keep the stream of
    a bit generator, whereas `Generator.permutation` may change between its releases.

    Args:
      seed, epoch: integers in [0, 2**64).
      size: how many examples there are.

    Returns:
      i64[size], every index in [0, size) once; read-only, because it is shared between callers.
    """
    order = np.argsort(_words(seed, epoch, size), kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def offset(seed: int, epoch: int, stride: int) -> int:
    """Where an epoch's first window begins: uniform over [0, stride).

    The remainder of a raw word (its bias is below stride / 2**64) from the same generator, at a
    counter that no permutation gets to.
    """
    return int(_words(seed, epoch, 1, counter=2**192)[0] % np.uint64(stride)) if stride > 1 else 0


def _words(seed: int, epoch: int, size: int, counter: int = 0) -> np.ndarray:
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}: got {value}, expected an integer in [0, 2**64)")
    key = np.array([seed, epoch], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(size)


def steps_per_epoch(batch: int, size: int) -> int:
    """Training batches in one pass over `size` examples; the remainder is dropped.

    Raises:
      ValueError: if not even one batch can be filled.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    if batch > size:
        raise ValueError(f"batch: got {batch}, expected at most the {size} examples there are")
    return size // batch


def indices(seed: int, step: int, batch: int, size: int, stride: int = 1) -> np.ndarray:
    """The rows of one training step.

    An epoch's examples are the `size // stride` rows that lie `stride` apart from its `offset` on.
    In `size // stride // batch` steps it goes through them by its own permutation and leaves out
    the remainder, which is another every time.

    Args:
      seed: an integer in [0, 2**64).
      step: steps taken before this one, counted from the start of the run.
      batch: examples in the global batch.
      size: rows in the data set.
      stride: rows from one example of an epoch to the next; see `Dataset.stride`.

    Returns:
      i64[batch], distinct, in [0, size).

    Raises:
      ValueError: if the batch is larger than the data set, or an argument is negative.
    """
    examples = size // stride
    steps = steps_per_epoch(batch, examples)
    if step < 0:
        raise ValueError(f"step: got {step}, expected at least 0")
    epoch, position = divmod(step, steps)
    chosen = permutation(seed, epoch, examples)[position * batch : (position + 1) * batch]
    return offset(seed, epoch, stride) + stride * chosen


def eval_steps(batch: int, size: int) -> int:
    """Evaluation batches that hold `size` examples, the last one padded."""
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    return -(-size // batch)


def eval_indices(step: int, batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples of one evaluation batch, in the data's own order.

    Returns:
      index: i64[batch]; places beyond the end repeat the last example, so that they can be read.
      mask: f32[batch]; 1 where the example counts, 0 where it is padding.

    Raises:
      ValueError: if there is no such batch.
    """
    if not 0 <= step < eval_steps(batch, size):
        raise ValueError(f"step: got {step}, expected one of {eval_steps(batch, size)} batches")
    index = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    return np.minimum(index, size - 1), (index < size).astype(np.float32)
