import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxeco.data import order
from jaxeco.data.dataset import Column, Dataset
from jaxeco.data.pipeline import _THREADS as THREADS
from jaxeco.data.pipeline import Feed, assemble, fits
from jaxeco.errors import RunFailed, UserError


class OnDemand:
    """A field that decodes when indexed, and cannot decode one of its examples."""

    def __init__(self, values, broken=None):
        self._values, self.broken = values, broken
        self.shape, self.dtype = values.shape, values.dtype

    def __getitem__(self, indices):
        if self.broken in indices:
            raise UserError(f"example {self.broken} is damaged")
        return self._values[indices]


@partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["ahead"])
@dataclass(frozen=True, eq=False)
class Pairs:
    """A pytree as a field: row i holds values i and i + ahead, squared."""

    values: Any
    ahead: int
    dtype = np.dtype(np.int32)

    @property
    def shape(self):
        return len(self.values) - 1, 2

    def __getitem__(self, rows):
        places = rows[:, None] + np.array([0, self.ahead], np.int32)
        return self.values[places].astype("int32") ** 2


def of_pairs(count=41, stride=4):
    """Two fields that share their array."""
    values = np.arange(count, dtype=np.uint16)
    x, y = Pairs(values, 0), Pairs(values, 1)
    return Dataset({"x": x, "y": y}, (), "pairs", "pairs", stride=stride)


def values(count):
    x = np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)
    return x, np.arange(count, dtype=np.int32)


def dataset(count=10, wrap=lambda array: array):
    x, y = values(count)
    return Dataset({"x": wrap(x), "y": y}, (), "toy", "toy")


def batches(feed, steps):
    """One batch per step, as the step would assemble it, on the host."""
    found = []
    for step in steps:
        fed = {name: value[0] for name, value in feed.fed(step).items()}
        found.append(jax.device_get(jax.jit(assemble)(feed.resident, fed)))
    return found


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda a: a.dtype, one) == jax.tree.map(lambda a: a.dtype, other)


def reading_threads():
    return [thread for thread in threading.enumerate() if "grain" in thread.name]


def assert_no_thread_reads_on():
    for thread in reading_threads():  # told to stop, each finishes the batch it is at
        thread.join(10)
    assert not reading_threads()


@pytest.mark.parametrize("resident", [True, False])
def test_batches_follow_the_order(resident):
    x, y = values(10)
    with Feed.training(dataset(), 4, seed=5, resident=resident) as feed:
        assert feed.steps == 2 and feed.batch == 4
        for step, batch in enumerate(batches(feed, range(7))):
            index = order.indices(5, step, 4, 10)
            expected = {"x": x[index], "y": y[index], "mask": np.ones(4, np.float32)}
            assert_same(
                batch,
                expected
                | {"index": index.astype(np.int32), "epoch": np.full(4, step // 2, np.int32)},
            )


def memmapped(tmp_path):
    def wrap(array):
        np.save(tmp_path / "field.npy", array)
        return np.load(tmp_path / "field.npy", mmap_mode="r")

    return wrap


@pytest.mark.parametrize("kind", ["array", "on demand", "memory map", "float64"])
def test_streaming_equals_resident_bit_for_bit(kind, tmp_path):
    wrap = {
        "array": lambda array: array,
        "on demand": OnDemand,
        "memory map": memmapped(tmp_path),
        "float64": lambda array: array / 3,  # JAX keeps it as float32
    }[kind]
    data = dataset(300, wrap)
    with (
        Feed.training(data, 8, seed=1, resident=True) as resident,
        Feed.training(data, 8, seed=1, resident=False) as streaming,
    ):
        assert set(resident.resident) == {"x", "y"} and streaming.resident == {}
        assert resident.fed(0)["row"].dtype == np.int32
        assert streaming.fed(0)["x"].dtype == resident.resident["x"].dtype
        assert_same(batches(resident, range(40)), batches(streaming, range(40)))


@pytest.mark.parametrize("resident", [True, False])
def test_resumed_equals_uninterrupted(resident):
    with Feed.training(dataset(), 3, seed=2, resident=resident) as feed:
        whole = batches(feed, range(12))
    with Feed.training(dataset(), 3, seed=2, resident=resident) as feed:
        assert_same(batches(feed, range(7, 12)), whole[7:])
        assert_same(batches(feed, range(3)), whole[:3])  # and back again
        assert len(batches(feed, [10**12])) == 1  # O(1)


@pytest.mark.parametrize("resident", [True, False])
def test_several_steps_in_one_call(resident):
    with Feed.training(dataset(), 4, seed=0, resident=resident) as feed:
        single = [feed.fed(step) for step in range(9)]
        # Calls of changing length, as at the end of a run.
        several = [feed.fed(0, 4), feed.fed(4, 4), feed.fed(8, 1)]
    stacked = {name: np.concatenate([fed[name] for fed in several]) for name in several[0]}
    assert_same(stacked, {name: np.concatenate([fed[name] for fed in single]) for name in stacked})
    assert all(value.shape[:2] == (9, 4) for value in stacked.values())


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("count", "batch"), [(10, 4), (8, 4), (3, 5)])
def test_evaluation_counts_every_example_once(resident, count, batch):
    x, y = values(count)
    with Feed.evaluation(dataset(count), batch, resident=resident) as feed:
        assert feed.steps == -(-count // batch)
        found = batches(feed, range(feed.steps))
        with pytest.raises(ValueError, match=f"steps up to {feed.steps + 1}, .*{feed.steps}"):
            feed.fed(feed.steps)
        assert_same(batches(feed, range(feed.steps)), found)  # an evaluation can be repeated
    assert all(len(got["x"]) == batch for got in found)
    counted = {
        name: np.concatenate([got[name][got["mask"] == 1] for got in found])
        for name in ("x", "y", "index")
    }
    assert_same(counted, {"x": x, "y": y, "index": np.arange(count, dtype=np.int32)})
    assert all(sorted(got) == ["index", "mask", "x", "y"] for got in found)


class Counting:
    """Records of two columns that note which rows are decoded."""

    def __init__(self, count):
        self.x, self.y = values(count)
        self.decoded = []

    def read(self, rows):
        self.decoded.append(rows.tolist())
        return {"x": self.x[rows], "y": self.y[rows]}

    def dataset(self):
        fields = {k: Column(self, k, a.shape, a.dtype) for k, a in (("x", self.x), ("y", self.y))}
        return Dataset(fields, (), "counted", "counted")


@pytest.mark.parametrize("kind", [partial(Feed.training, seed=4), Feed.evaluation])
def test_a_share_of_the_batch_is_cut_from_the_same_batches(kind):
    share = np.array([1, 2, 6])
    for resident in (True, False):
        with (
            kind(dataset(20), 8, resident=resident) as whole,
            kind(dataset(20), 8, resident=resident, share=share) as part,
        ):
            cut = {name: value[:, share] for name, value in whole.fed(0, 2).items()}
            assert_same(part.fed(0, 2), cut)
            assert all(len(value) == 8 for value in part.plan(1).values())
            assert_same(part.plan(1), whole.plan(1))


def test_streaming_decodes_the_rows_of_its_share_once_and_no_others():
    records, share = Counting(40), np.array([0, 3])
    with Feed.training(records.dataset(), 8, seed=4, resident=False, share=share) as feed:
        for step in range(5):
            feed.fed(step)
        ahead = [feed.plan(step)["row"][share].tolist() for step in range(5 + 2 * THREADS)]
    assert_no_thread_reads_on()
    assert sorted(records.decoded) == sorted(ahead[: len(records.decoded)])
    assert len(records.decoded) >= 5
    records.decoded.clear()
    Feed.training(records.dataset(), 8, seed=4, resident=True)
    assert sorted(np.concatenate(records.decoded)) == list(range(40))


@pytest.mark.parametrize("share", [[], [3, 1], [1, 1], [-1, 2], [7, 8]])
def test_a_share_that_is_no_part_of_the_batch_is_an_error(share):
    with pytest.raises(ValueError, match=r"share: got .*, expected ascending positions in 0 to 7"):
        Feed.training(dataset(20), 8, seed=0, resident=False, share=np.array(share, int))


def processes():
    return [child for child in multiprocessing.active_children() if "grain" in child.name]


def test_processes_give_the_batches_that_threads_give_and_fail_as_they_do(tmp_path):
    x, y = values(40)
    records = Counting(40)
    fields = {"x": Column(records, "x", x.shape, x.dtype), "y": memmapped(tmp_path)(y / 3)}
    data, share = Dataset(fields, (), "mixed", "mixed"), np.array([0, 2, 3])
    with (
        Feed.training(data, 4, seed=6, resident=False, share=share) as threads,
        Feed.training(data, 4, seed=6, resident=False, share=share, workers=2) as feed,
    ):
        for step, n in ((0, 3), (3, 2), (5, 1)):
            assert_same(feed.fed(step, n), threads.fed(step, n))
        assert len(processes()) == 2
        killed = processes()[0]
        os.kill(killed.pid, signal.SIGTERM)  # not theirs to answer
        assert_same(feed.fed(6), threads.fed(6))
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        begun = time.monotonic()
        with pytest.raises(RunFailed, match=r"read_workers=2.* exit code -9.*memory") as caught:
            for step in range(7, 100):
                feed.fed(step)
        assert time.monotonic() - begun < 20 and "\n" not in str(caught.value)
    assert not processes()


class Odd(Exception):
    """Cannot be pickled: sent as it is, it would never arrive."""

    def __init__(self, one, other):
        self.lock = threading.Lock()


def test_an_error_in_a_process_is_the_users_or_keeps_its_traceback():
    class Damaged:
        def read(self, rows):
            if 6 in rows:
                raise Odd(1, 2)
            if 7 in rows:
                raise UserError("example 7 is damaged")
            return {"x": rows}

    data = Dataset({"x": Column(Damaged(), "x", (9,), np.dtype(int))}, (), "damaged", "damaged")
    with Feed.evaluation(data, 1, resident=False, workers=1) as feed:
        assert [feed.fed(step)["x"].item() for step in range(6)] == list(range(6))
        with pytest.raises(RuntimeError, match=r"(?s)line \d+, in read\n.*raise Odd\(1, 2\)"):
            feed.fed(6)
        with pytest.raises(UserError, match=r"^example 7 is damaged$"):
            feed.fed(7)
    assert not processes()


def test_reading_processes_end_with_a_run_that_is_killed(tmp_path):
    script = """
import multiprocessing, os, signal, sys
from jaxeco.data import ArrayRecords, Feed, write_records
write_records(sys.argv[1], ({"x": i} for i in range(64)))
feed = Feed.training(ArrayRecords(sys.argv[1]).open(), 4, seed=0, resident=False, workers=2)
feed.fed(0)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "records"], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pids = [int(pid) for pid in killed.stdout.split()]
    assert len(pids) == 2

    def alive(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_threads_end_with_the_feed():
    with Feed.training(dataset(wrap=OnDemand), 4, seed=0, resident=False) as feed:
        feed.fed(0)
        assert reading_threads()
    assert_no_thread_reads_on()
    feed.close()  # a second time does no harm


def test_a_damaged_example_reaches_the_main_thread():
    data = dataset(wrap=lambda array: OnDemand(array, broken=7))
    with Feed.training(data, 4, seed=0, resident=False) as feed:
        steps = range(10)
        bad = [step for step in steps if 7 in order.indices(0, step, 4, 10)]
        for step in steps:
            if step in bad:
                with pytest.raises(UserError, match="example 7 is damaged"):
                    feed.fed(step)
            else:
                feed.fed(step)
        assert 0 < len(bad) < 10
        # Once it is mended, the same step gives its own batch, not the one that was read ahead.
        step = next(step for step in bad if step - 1 in range(10) and step - 1 not in bad)
        feed.fed(step - 1)
        with pytest.raises(UserError):
            feed.fed(step)
        data.fields["x"].broken = None
        np.testing.assert_array_equal(feed.fed(step)["y"][0], order.indices(0, step, 4, 10))
        data.fields["x"].broken = 7
    assert_no_thread_reads_on()
    with pytest.raises(UserError, match="example 7 is damaged"):
        Feed.training(data, 4, seed=0, resident=True)


def test_a_memory_map_is_gathered_in_any_order(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (500, 3, 3)).astype(np.uint8)
    field = memmapped(tmp_path)(x)
    with Feed.training(
        Dataset({"x": field, "y": np.arange(500)}, (), "", ""), 50, seed=4, resident=False
    ) as feed:
        for step in range(12):
            fed = feed.fed(step)
            assert type(fed["x"]) is np.ndarray
            index = fed["y"][0]
            assert (np.diff(index) < 0).any()
            np.testing.assert_array_equal(fed["x"][0], x[index])


def test_placed_once_and_assembled_on_every_shard():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    calls = []

    def place(fields):
        calls.append(len(fields))
        return jax.device_put(fields, replicated)

    data = dataset(40)
    feed = Feed.training(data, 16, seed=0, resident=True, place=place)
    [expected] = batches(Feed.training(data, 16, seed=0, resident=True), [3])
    fed = jax.device_put({name: value[0] for name, value in feed.fed(3).items()}, split)
    mapped = jax.shard_map(assemble, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    assert_same(jax.device_get(jax.jit(mapped)(feed.resident, fed)), expected)
    sharded = jax.jit(assemble, out_shardings=split)
    assert_same(jax.device_get(sharded(feed.resident, fed)), expected)
    assert "all-gather" not in sharded.lower(feed.resident, fed).compile().as_text()
    assert calls == [2]


def test_under_scan_over_the_steps_of_a_call():
    feed = Feed.training(dataset(), 4, seed=0, resident=True)

    def step(total, fed):
        return total + assemble(feed.resident, fed)["y"].sum(), None

    total, _ = jax.jit(lambda fed: jax.lax.scan(step, jnp.int32(0), fed))(feed.fed(2, 5))
    assert int(total) == sum(int(order.indices(0, t, 4, 10).sum()) for t in range(2, 7))


def test_assemble_uncompiled_keeps_what_was_fed():
    batch = assemble({}, {"x": np.ones((3, 2)), "y": np.arange(3), "mask": np.array([1.0, 1, 0])})
    assert batch["mask"].tolist() == [1, 1, 0] and batch["y"].tolist() == [0, 1, 2]


def test_fits_counts_decoded_bytes():
    data = dataset(10)  # 10 * (2 * 3 * 1 + 4) bytes
    assert fits(data, 100) and not fits(data, 99)
    assert fits(of_pairs(41), 82) and not fits(of_pairs(41), 81)  # a shared array counts once


def test_rows_that_int32_cannot_number_stay_on_the_host():
    one = np.broadcast_to(np.uint8(0), (2**31,))  # one byte, seen many times
    assert not fits(Dataset({"x": one, "y": one}, (), "", ""), np.inf)


def test_fields_that_are_pytrees_share_their_array_on_the_device():
    feed = Feed.training(of_pairs(), 2, seed=0, resident=True)
    x, y = feed.resident["x"], feed.resident["y"]
    assert isinstance(x, Pairs) and x.values is y.values and x.values.dtype == jnp.uint16


@pytest.mark.parametrize("resident", [True, False])
def test_a_pass_takes_one_row_in_stride(resident):
    data = of_pairs()  # rows 0 to 39, of which a pass takes 10
    assert (len(data), data.training_examples, data.eval_examples) == (40, 10, 10)
    assert (of_pairs(42).training_examples, of_pairs(42).eval_examples) == (10, 11)
    with Feed.training(data, 2, seed=3, resident=resident) as feed:
        assert feed.steps == 5
        for step, batch in enumerate(batches(feed, range(7))):
            rows = order.indices(3, step, 2, 40, 4).astype(np.int32)
            assert_same(
                batch,
                {
                    "index": rows,
                    "epoch": np.full(2, step // 5, np.int32),
                    "x": np.stack([rows, rows], 1) ** 2,
                    "y": np.stack([rows, rows + 1], 1) ** 2,
                    "mask": np.ones(2, np.float32),
                },
            )
    with Feed.evaluation(data, 4, resident=resident) as feed:
        assert feed.steps == 3
        found = batches(feed, range(3))
    index = np.concatenate([batch["index"] for batch in found])
    assert index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    np.testing.assert_array_equal(np.concatenate([b["x"][:, 0] for b in found]), (4 * index) ** 2)
    assert sum(batch["mask"].sum() for batch in found) == 10


def test_streaming_pytrees_equals_resident_bit_for_bit():
    for kind in (partial(Feed.training, seed=1), Feed.evaluation):
        with kind(of_pairs(), 3, resident=True) as a, kind(of_pairs(), 3, resident=False) as b:
            assert_same(batches(a, range(3)), batches(b, range(3)))


def test_a_stride_or_unit_below_1_is_an_error():
    with pytest.raises(ValueError, match="stride is 0, expected at least 1"):
        of_pairs(stride=0)


def test_a_batch_larger_than_the_data_fails_at_once():
    with pytest.raises(ValueError, match="got 11, expected at most the 10"):
        Feed.training(dataset(), 11, seed=0, resident=False)
    with pytest.raises(ValueError, match="seed: got -1"):
        Feed.training(dataset(), 4, seed=-1, resident=True).fed(0)
    with pytest.raises(ValueError, match="step -1 and n 1"):
        Feed.training(dataset(), 4, seed=0, resident=True).fed(-1)
