import numpy as np
import pytest
from scipy import stats

from jaxeco.data import order


def test_golden_order_from_the_raw_generator():
    # Seed 7, ten examples, batches of three: step 4 is the second batch of the second epoch.
    words = np.random.Philox(key=[7, 1]).random_raw(10)
    expected = sorted(range(10), key=lambda i: int(words[i]))
    assert order.indices(7, 4, 3, 10).tolist() == expected[3:6]
    # The very numbers, so that a change in NumPy's stream cannot pass unseen.
    assert order.permutation(7, 1, 10).tolist() == [3, 9, 1, 6, 2, 5, 4, 8, 0, 7]


@pytest.mark.parametrize(("batch", "size"), [(1, 5), (4, 12), (4, 15), (7, 7), (10, 64)])
def test_an_epoch_has_distinct_indices_and_drops_the_remainder(batch, size):
    steps = order.steps_per_epoch(batch, size)
    for epoch in range(3):
        seen = [order.indices(3, epoch * steps + i, batch, size) for i in range(steps)]
        assert all(index.shape == (batch,) and index.dtype == np.int64 for index in seen)
        seen = np.concatenate(seen)
        assert len(seen) == len(set(seen)) == size // batch * batch
        assert seen.min() >= 0 and seen.max() < size


def test_order_is_a_function_of_seed_and_step_alone():
    forwards = [order.indices(1, step, 8, 50).tolist() for step in range(40)]
    order.permutation.cache_clear()
    backwards = []
    for step in reversed(range(40)):
        order.indices(2, step, 8, 50)  # another seed in between leaves no trace
        order.indices(1, step, 5, 49)
        backwards.append(order.indices(1, step, 8, 50).tolist())
    assert backwards[::-1] == forwards


def test_a_far_step_needs_no_walk():
    assert len(order.indices(0, 10**15, 8, 50)) == 8


def test_epochs_and_seeds_differ():
    orders = {tuple(order.permutation(seed, epoch, 30)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # (seed, epoch) are not added up or swapped
    assert order.permutation(0, 1, 30).tolist() != order.permutation(1, 0, 30).tolist()


def test_what_an_epoch_drops_changes():
    dropped = {tuple(sorted(order.permutation(0, epoch, 11)[10:])) for epoch in range(40)}
    assert len(dropped) > 5


def test_every_example_is_equally_likely_at_every_position():
    size, epochs = 6, 3000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), order.permutation(11, epoch, size)] += 1
    expected = epochs / size
    # A table with fixed row and column sums has (size - 1)**2 degrees of freedom.
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-3


def splitmix64(seed, number):
    """The generator as its authors print it, word by word."""
    state = seed
    for _ in range(number + 1):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_network_is_the_cipher_of_the_paper_on_plain_integers():
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF  # the reference implementation's first word
    size, a, b = 90, 10, 9
    keys = np.random.Philox(key=[7, 1], counter=2**193).random_raw(8)

    def cipher(m):
        left, right = m % a, m // a
        for j, key in enumerate(keys.tolist(), 1):
            new = (left + splitmix64(key, right) // 2) % (a if j % 2 else b)
            left, right = right, new
        return a * right + left

    got = order.network(7, 1, size, np.arange(size))
    assert got.tolist() == [cipher(m) for m in range(size)]
    walked = [m if (m := cipher(i)) < 87 else cipher(m) for i in range(87)]
    assert max(walked) < 87  # bases 10 and 9 again, and one step of walking is enough
    assert order.network(7, 1, 87, np.arange(87)).tolist() == walked
    # The very numbers, far beyond what is sorted, so that no change can pass unseen.
    assert order.indices(7, 3, 4, 10**9).tolist() == [764248903, 761370895, 713850286, 46385003]
    assert order.SORTED == 2**24  # a change would give running experiments another order


def test_the_network_is_a_bijection_for_every_size():
    for size in [*range(1, 120), 2**10, 2**10 + 1, 99_991]:
        got = order.network(3, size, size, np.arange(size))
        assert got.dtype == np.int64
        np.testing.assert_array_equal(np.sort(got), np.arange(size))


def test_every_example_is_equally_likely_at_every_position_of_the_network():
    size, epochs = 7, 3000
    counts = np.zeros((size, size))
    pairs = np.zeros((size, size))
    for epoch in range(epochs):
        got = order.network(11, epoch, size, np.arange(size))
        counts[np.arange(size), got] += 1
        pairs[got[2], got[3]] += 1  # neighbours know nothing of each other, but that they differ
    statistic = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-3
    assert stats.chisquare(pairs[~np.eye(size, dtype=bool)]).pvalue > 1e-3
    assert not pairs.diagonal().any()


def test_orders_of_very_large_sets_cost_a_batch_and_are_uniform():
    size, batch = 10**9, 2**16
    got = order.indices(0, 5, batch, size)  # sorting them all would take minutes and 16 GB
    assert len(set(got.tolist())) == batch
    bins, digits = np.bincount(got * 64 // size, minlength=64), np.bincount(got % 61, minlength=61)
    steps = np.bincount(np.diff(got) % size * 64 // size, minlength=64)
    both = np.bincount(got[:-1] * 8 // size * 8 + got[1:] * 8 // size, minlength=64)
    for counts in (bins, digits, steps, both):
        assert stats.chisquare(counts).pvalue > 1e-3
    other = order.indices(0, 5 + size // batch, batch, size)  # the same place in the next epoch
    assert len(np.intersect1d(got, other)) < 40  # 4.3 are expected


def test_the_shared_permutation_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        order.permutation(0, 0, 8)[0] = 1


def test_errors_name_both_numbers():
    with pytest.raises(ValueError, match="got 9, expected at most the 8 examples"):
        order.indices(0, 0, 9, 8)
    with pytest.raises(ValueError, match="batch: got 0"):
        order.indices(0, 0, 0, 8)
    with pytest.raises(ValueError, match="step: got -1"):
        order.indices(0, -1, 4, 8)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed: got {seed}"):
            order.indices(seed, 0, 4, 8)
    with pytest.raises(ValueError, match="step: got 3, expected one of 3 batches"):
        order.eval_indices(3, 4, 9)


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (8, 4), (3, 5), (1, 1), (17, 16)])
def test_evaluation_counts_every_index_exactly_once(size, batch):
    steps = order.eval_steps(batch, size)
    assert steps == -(-size // batch)
    batches = [order.eval_indices(step, batch, size) for step in range(steps)]
    counted = []
    for index, mask in batches:
        assert index.shape == mask.shape == (batch,) and mask.dtype == np.float32
        assert set(mask) <= {0.0, 1.0}
        assert index.min() >= 0 and index.max() < size  # padding can be read, too
        counted += index[mask == 1].tolist()
    assert counted == list(range(size))


def test_no_examples_no_evaluation_batches():
    assert order.eval_steps(4, 0) == 0


@pytest.mark.parametrize(("batch", "size", "stride"), [(2, 50, 8), (3, 24, 8), (1, 9, 9)])
def test_windows_of_an_epoch_do_not_overlap(batch, size, stride):
    steps = order.steps_per_epoch(batch, size // stride)
    for epoch in range(4):
        rows = [order.indices(3, epoch * steps + i, batch, size, stride) for i in range(steps)]
        rows = np.sort(np.concatenate(rows))
        first = order.offset(3, epoch, stride)
        expected = range(first, size, stride)[: size // stride]
        assert len(rows) == size // stride // batch * batch
        assert set(rows) <= set(expected) and expected[-1] < size


def test_golden_offset_from_the_raw_generator():
    word = np.random.Philox(key=[7, 1], counter=[0, 0, 0, 1]).random_raw()
    assert order.offset(7, 1, 1000) == word % 1000
    chosen = order.permutation(7, 1, 5)[2:4]  # step 3 is the second batch of two in epoch 1
    assert order.indices(7, 3, 2, 5039, 1000).tolist() == (word % 1000 + 1000 * chosen).tolist()


def test_offsets_are_uniform_and_those_of_stride_1_are_0():
    counts = np.bincount([order.offset(5, epoch, 10) for epoch in range(2000)], minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert order.offset(5, 0, 1) == 0
