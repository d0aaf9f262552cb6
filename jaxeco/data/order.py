"""Which examples make up a batch: pure index arithmetic, on the host, before any data is read.

A batch is a function of (seed, step) and of nothing else, so resuming has nothing to fast-forward
and the order does not depend on how many devices or reading threads there are. Indices are those
of the *global* batch; whoever holds a part of it cuts that part out afterwards.
"""

import math
from functools import lru_cache

import numpy as np

# Up to this many examples an epoch's order is sorted as a whole: some seconds, 256 MiB.
SORTED = 2**24
SMALL = 2**17  # orders of so many are kept for each of many seeds: 1 MiB each at most
_ROUNDS = 8


def shuffled(seed: int, epoch: int, size: int, positions_B: np.ndarray) -> np.ndarray:
    """What stands at some positions of an epoch's order of `size` examples; O(B) beyond SORTED.

    Args:
      seed, epoch: integers in [0, 2**64).
      positions_B: i64[B], in [0, size).

    Returns:
      i64[B], in [0, size); over all positions, every example once. The same for ever.
    """
    if size <= SMALL:
        return _small(seed, epoch, size)[positions_B]
    if size <= SORTED:
        return permutation(seed, epoch, size)[positions_B]
    return network(seed, epoch, size, positions_B)


def network(seed: int, epoch: int, size: int, positions_B: np.ndarray) -> np.ndarray:
    """A permutation of [0, size), of which any value can be had alone.

    The generalized Feistel cipher of Black & Rogaway 2002, "Ciphers with arbitrary finite domains"
    (methods 2 and 3): a place is a pair of digits of bases a and b, whose product is `size` or just
    above; each round adds to one digit a function of the other. What falls outside walks on along
    its cycle until it is inside. A round's function is the word of SplitMix64 (Steele, Lea & Flood
    2014, "Fast splittable pseudorandom number generators") that the digit numbers; its seed is one
    of Philox's words under the key (seed, epoch), at a counter that nothing else uses.

    Args and returns: as `shuffled`.
    """
    a = math.isqrt(size - 1) + 1
    bases = np.array([a, -(-size // a)], np.uint64)
    keys = _words(seed, epoch, _ROUNDS, counter=2**193)
    values_B = np.asarray(positions_B).astype(np.uint64)
    outside = np.ones(values_B.shape, bool)
    while outside.any():
        left, right = values_B[outside] % bases[0], values_B[outside] // bases[0]
        for i, key in enumerate(keys):
            left, right = right, (left + _splitmix(key, right)) % bases[i % 2]
        values_B[outside] = bases[0] * right + left  # an even number of rounds: as they began
        outside = values_B >= size
    return values_B.astype(np.int64)


def _splitmix(seed: np.uint64, number_B: np.ndarray) -> np.ndarray:
    """Word `number` of SplitMix64's stream, from 0; halved, so that a digit can be added."""
    z = seed + (number_B + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(1)


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


# For the members of a population, each with an order of its own.
_small = lru_cache(maxsize=512)(permutation.__wrapped__)


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
    positions_B = np.arange(position * batch, (position + 1) * batch)
    chosen_B = shuffled(seed, epoch, examples, positions_B)
    return offset(seed, epoch, stride) + stride * chosen_B


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
