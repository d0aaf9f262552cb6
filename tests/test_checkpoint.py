"""Checkpoints come back bit for bit or not at all, whatever happens to the process or the files."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxeco import checkpoint, ondisk, run, storage, trees
from jaxeco.checkpoint import Checkpoints, load
from jaxeco.errors import UserError
from jaxeco.folder import open_run

EXPERIMENT = {"model": {"width": 64, "activation": "relu"}, "augment": [{"size": 8}], "lr": 0.1}


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    variables: Any
    opt_state: Any
    key: Any


def make_state(step: int = 0, seed: int = 0) -> State:
    k1, k2 = jax.random.split(jax.random.key(seed))
    params = {
        "Dense_0": {"kernel": jax.random.normal(k1, (16, 8)), "bias": jnp.arange(8.0)},
        "half": jax.random.normal(k2, (8, 3), jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "odd": jnp.array([np.nan, -0.0, np.inf, 1e-42], jnp.float32),
    }
    return State(
        step=jnp.int32(step),
        params=params,
        variables={"keys": jax.random.split(k1, 8)},
        opt_state=optax.adamw(1e-3).init(params),
        key=jax.random.key(seed, impl="rbg"),
    )


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, ("data", "model")[: len(shape)])


def spread(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Leaves whose axes divide by those of the mesh are split over them, in order."""

    def place(leaf):
        axes = zip(leaf.shape, mesh.axis_names)
        spec = [axis if size and size % mesh.shape[axis] == 0 else None for size, axis in axes]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, state)


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(leaf: Any) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_identical(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert (a.shape, a.dtype, bits(a)) == (b.shape, b.dtype, bits(b))


def write(folder: Path, *steps: int, **options: Any) -> None:
    with Checkpoints(folder, description=EXPERIMENT, **options) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step, seed=step))


@pytest.mark.parametrize("devices", [1, 8])
def test_restored_bit_for_bit_with_structure_dtypes_and_shardings(tmp_path, devices):
    state = spread(make_state(7), mesh_of(devices))
    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        assert checkpoints.save(state) is True
        assert checkpoints.save(state) is False  # step 7 is there
    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        restored, step = checkpoints.restore(abstract(state))
    assert step == 7
    assert_identical(restored, state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert jax.random.bits(restored.key) == jax.random.bits(state.key)


@pytest.mark.parametrize("saved", [(8,), (2, 4)])
@pytest.mark.parametrize("shape", [(1,), (4,), (4, 2)])
def test_restored_on_another_mesh(tmp_path, saved, shape):
    state = spread(make_state(7), mesh_of(*saved))
    pieces = {s.data.shape for s in state.params["Dense_0"]["kernel"].addressable_shards}
    assert pieces == {(2, 8) if saved == (8,) else (8, 2)}
    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        checkpoints.save(state)
        target = spread(make_state(0), mesh_of(*shape))
        restored, _ = checkpoints.restore(abstract(target))
    assert_identical(restored, state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(target)):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("layout", ["one device", "replicated", "sharded"])
def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path, layout):
    mesh = mesh_of(1 if layout == "one device" else 8)
    spec = PartitionSpec("data") if layout == "sharded" else PartitionSpec()
    rng = np.random.default_rng(0)
    mirror = [rng.integers(-(2**31), 2**31 - 1, (1024, 256), np.int32) for _ in range(4)]
    state = jax.device_put([w.copy() for w in mirror], NamedSharding(mesh, spec))
    step = jax.jit(lambda state: [w * 3 + 1 for w in state], donate_argnums=0)
    state, mirror = step(state), [w * 3 + 1 for w in mirror]  # now in memory that XLA owns
    wanted = {}
    with Checkpoints(tmp_path, description=EXPERIMENT, keep=3) as checkpoints:
        for number in range(3):
            wanted[number] = mirror
            checkpoints.save(state, step=number)
            for _ in range(5):  # overwrites what was saved, if it still lies where it was
                state, mirror = step(state), [w * 3 + 1 for w in mirror]
            jax.block_until_ready(state)
    for number, arrays in wanted.items():
        assert_identical(list(load(tmp_path, which=number).state.values()), arrays)


def test_restored_buffers_may_be_donated(tmp_path):
    state = {"w": jnp.arange(100_000.0)}
    step = jax.jit(lambda s: {"w": s["w"] * 2 + 1}, donate_argnums=0)
    with Checkpoints(tmp_path, description={}) as checkpoints:
        checkpoints.save(state, step=1)
        restored, _ = checkpoints.restore(abstract(state))
    for _ in range(3):
        restored = step(restored)
    assert_identical(restored, {"w": jnp.arange(100_000.0) * 8 + 7})


def test_the_last_and_the_best_are_kept_across_restarts(tmp_path):
    accuracy = {1: 0.3, 2: 0.9, 3: float("nan"), 4: 0.5, 5: None, 6: 0.7, 7: 0.9, 8: None, 9: None}
    kept = {3: [2, 3], 4: [2, 3, 4], 6: [2, 5, 6], 7: [6, 7], 9: [7, 8, 9]}
    for step, value in accuracy.items():
        with Checkpoints(tmp_path, description={}, keep=2, best="test/accuracy") as checkpoints:
            metrics = None if value is None else {"test/accuracy": value, "loss": 1.0}
            checkpoints.save({"w": jnp.full(3, step)}, metrics, step=step)
            checkpoints.wait()
            if step in kept:
                assert checkpoints.steps() == kept[step]
            assert checkpoints.steps()[-1] == step
    with Checkpoints(tmp_path, description={}, best="test/accuracy") as checkpoints:
        assert checkpoints.best_step() == 7  # as good as step 2 was, and newer
    best = load(tmp_path, which="best")
    assert (best.step, best.metrics) == (7, {"test/accuracy": 0.9, "loss": 1.0})
    assert best.state["w"].tolist() == [7, 7, 7]


def test_best_by_a_metric_where_less_is_better(tmp_path):
    with Checkpoints(tmp_path, description={}, keep=1, best="loss", best_mode="min") as checkpoints:
        assert checkpoints.best_step() is None
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5], start=1):
            checkpoints.save({"w": jnp.ones(1)}, {"loss": loss}, step=step)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]
        assert checkpoints.best_step() == 2


def test_the_best_is_judged_by_what_this_session_asks_for(tmp_path):
    scores = {1: (0.5, 0.9), 2: (0.9, 0.8), 3: (0.6, 0.1), 4: (0.7, 0.7)}  # accuracy, loss
    with Checkpoints(tmp_path, description={}, keep=4, best="accuracy") as checkpoints:
        for step, (accuracy, loss) in scores.items():
            checkpoints.save(make_state(step), {"accuracy": accuracy, "loss": loss})
        checkpoints.wait()
        assert checkpoints.best_step() == 2
    with Checkpoints(tmp_path, description={}, keep=1, best="loss", best_mode="min") as checkpoints:
        assert checkpoints.best_step() == 3
        checkpoints.save(make_state(5), {"accuracy": 0.99, "loss": 0.3})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 5]
    assert load(tmp_path, which="best").step == 3


def test_metrics_may_come_after_the_state(tmp_path):
    with Checkpoints(tmp_path, description={}, keep=1, best="accuracy") as checkpoints:
        assert checkpoints.save(make_state(1))
        assert checkpoints.save(make_state(1), {"accuracy": 0.5})
        assert not checkpoints.save(make_state(1), {"accuracy": 0.9})
        checkpoints.wait()
        assert checkpoints.best_step() == 1
    assert load(tmp_path).metrics == {"accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_cut_off_while_one_checkpoint_takes_the_place_of_another(tmp_path):
    with Checkpoints(tmp_path, description={}) as checkpoints:
        checkpoints.save(make_state(1))
    (tmp_path / "1").rename(tmp_path / "1.old.tmp")
    (tmp_path / "1.tmp").mkdir()
    with Checkpoints(tmp_path, description={}) as checkpoints:
        found = checkpoints.restore(abstract(make_state()))
    assert found is not None and found[1] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_save_that_waits_for_a_clock_that_was_set_back(tmp_path, monkeypatch):
    """As tensorstore can: it ends in an error, not never."""
    never = threading.Event()
    monkeypatch.setattr(ondisk, "write", lambda *_: never.wait)
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.2)
    real = time.time
    with pytest.raises(UserError, match=r"clock was set by -86,400 s .*--resume"):
        with Checkpoints(tmp_path, description={}) as checkpoints:
            checkpoints.save(make_state(1))
            monkeypatch.setattr(time, "time", lambda: real() - 86_400)
            checkpoints.wait()
    never.set()


def test_nothing_saved_yet(tmp_path):
    (tmp_path / "5.tmp" / "state").mkdir(parents=True)  # the first save was cut off
    (tmp_path / "4.old.tmp").mkdir()
    (tmp_path / "notes.txt").write_text("kept")
    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None
        assert checkpoints.steps() == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="no checkpoint in"):
        load(tmp_path)


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 0x10
    path.write_bytes(content)


def garbage(path: Path) -> None:
    path.write_bytes(b'{"format": 1, "step": ')


FAULTS = [truncate, flip, garbage, Path.unlink]


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_to_any_file_is_noticed(tmp_path, fault):
    write(tmp_path / "run", 1, 2)
    files = [path for path in (tmp_path / "run" / "2").rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", copy)
        fault(copy / path.relative_to(tmp_path / "run"))
        with pytest.warns(UserWarning, match=r"copy/2 is damaged \(.+\)"):
            loaded = load(copy, abstract(make_state()))
        assert loaded.step == 1
        assert_identical(loaded.state, make_state(1, seed=1))
        shutil.rmtree(copy)


def test_a_damaged_checkpoint_is_set_aside_and_saved_again(tmp_path):
    with Checkpoints(tmp_path, description=EXPERIMENT, keep=3, best="accuracy") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step, seed=step), {"accuracy": step / 10})
    flip(max((tmp_path / "3" / "state").rglob("d/*"), key=lambda path: path.stat().st_size))
    with Checkpoints(tmp_path, description=EXPERIMENT, keep=3, best="accuracy") as checkpoints:
        with pytest.warns(UserWarning, match=r"/3 is damaged \(state/\S+ is not what was written"):
            state, step = checkpoints.restore(abstract(make_state()))
        assert step == 2
        assert_identical(state, make_state(2, seed=2))
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.best_step() == 2
        assert (tmp_path / "3.damaged" / "about.json").exists()
        assert checkpoints.save(make_state(3, seed=33))
        assert_identical(checkpoints.restore(abstract(make_state()))[0], make_state(3, seed=33))


def test_an_empty_folder_is_a_damaged_checkpoint(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "2").mkdir()
    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        with pytest.warns(UserWarning, match=r"/2 is damaged \(checksums.json is missing\)"):
            assert checkpoints.restore(abstract(make_state()))[1] == 1


def test_if_every_checkpoint_is_damaged_the_run_never_starts_from_nothing(tmp_path):
    write(tmp_path, 1, 2)
    for step in "12":
        truncate(tmp_path / step / "about.json")
    for _ in range(2):  # and a second attempt is refused as well
        with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
            with pytest.warns(UserWarning, match="is damaged"):
                with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
                    checkpoints.restore(abstract(make_state()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    with pytest.warns(UserWarning), pytest.raises(UserError, match="/2 is damaged"):
        load(tmp_path, which=2)


@pytest.mark.parametrize(
    "about",
    ["[]", "3", "{}", '{"format": 1}', '{"format": "1", "arrays": []}', "null", '"x"', "\0"],
)
def test_nonsense_with_a_right_checksum_is_damage_too(tmp_path, about):
    write(tmp_path, 1)
    rewrite(tmp_path / "1", about)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"damaged \(about.json: "):
        load(tmp_path)


def rewrite(checkpoint: Path, about: str) -> None:
    (checkpoint / "about.json").write_text(about)
    sums = json.loads((checkpoint / "checksums.json").read_text())
    digest = subprocess.run(
        ["sha256sum", checkpoint / "about.json"], capture_output=True, text=True, check=True
    )
    sums["about.json"] = digest.stdout.split()[0]
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def test_a_newer_format_is_refused_by_name(tmp_path):
    write(tmp_path, 1)
    about = json.loads((tmp_path / "1" / "about.json").read_text())
    rewrite(tmp_path / "1", json.dumps(about | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, this jaxeco reads up to 2"):
        load(tmp_path)


# Other experiments


def test_another_experiment_is_refused_with_the_difference(tmp_path):
    write(tmp_path, 1)
    other = {"model": {"width": 32, "activation": "relu", "depth": 2}, "augment": [], "lr": 0.1}
    with Checkpoints(tmp_path, description=other) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore(abstract(make_state()))
    first, *lines, advice = str(error.value).splitlines()
    assert first.endswith("/1 belongs to another experiment; they differ in")
    assert lines == [
        "  model.width: checkpoint 64, experiment 32",
        "  augment.0.size: checkpoint 8, experiment has none",
        "  model.depth: checkpoint has none, experiment 2",
        "  augment: checkpoint has none, experiment []",
    ]
    assert "another folder" in advice
    assert (tmp_path / "1").exists()


def test_a_field_that_no_longer_exists_is_one_line(tmp_path):
    with Checkpoints(tmp_path, description=EXPERIMENT | {"sam": 0.1, "off": None}) as checkpoints:
        checkpoints.save(make_state(1))
    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        with pytest.raises(UserError, match=r"^\S+/1 was written with sam, which .*start_from.*$"):
            checkpoints.restore(abstract(make_state()))


def test_a_long_difference_is_cut_short(tmp_path):
    with Checkpoints(tmp_path, description={f"x{i}": i for i in range(20)}) as checkpoints:
        checkpoints.save({"w": jnp.ones(1)}, step=1)
    with Checkpoints(tmp_path, description={f"x{i}": -i for i in range(20)}) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore({"w": jnp.ones(1)})
    lines = str(error.value).splitlines()
    assert len(lines) == 11
    assert lines[-2] == "  and 11 more"  # 0 is -0: nineteen differ


def test_tuples_and_lists_are_the_same_description(tmp_path):
    for _ in range(2):
        with Checkpoints(tmp_path, description={"widths": (1, 2)}) as checkpoints:
            checkpoints.restore({"w": jnp.ones(1)})
            checkpoints.save({"w": jnp.ones(1)}, step=1)


def test_other_arrays_are_refused_by_path(tmp_path):
    write(tmp_path, 1)
    state = make_state()
    params = {
        **state.params,
        "Dense_0": {"kernel": jnp.ones((16, 4)), "bias": jnp.ones(8, jnp.bfloat16)},
        "Dense_1": {"kernel": jnp.ones(2)},
    }
    del params["half"]
    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore(abstract(state.replace(params=params)))
    assert str(error.value).splitlines()[1:-1] == [
        "  params/Dense_0/bias: checkpoint float32[8], experiment bfloat16[8]",
        "  params/Dense_0/kernel: checkpoint float32[16,8], experiment float32[16,4]",
        "  params/half: checkpoint bfloat16[8,3], experiment has none",
        "  params/Dense_1/kernel: checkpoint has none, experiment float32[2]",
    ]


# Reading without training on


def test_load_reads_all_or_a_part(tmp_path):
    write(tmp_path, 1, 2)
    state = make_state(2, seed=2)
    everything = load(tmp_path)
    assert (everything.step, everything.description) == (2, EXPERIMENT)
    assert_identical(everything.state["params"], jax.tree.map(np.asarray, state.params))
    assert bits(everything.state["key"]) == bits(state.key)
    assert everything.state["opt_state"]["0"]["count"] == 0
    assert list(load(tmp_path, only=("params",)).state) == ["params"]

    wanted = {"params": {"half": abstract(spread(state.params["half"], mesh_of(8)))}}
    part = load(tmp_path, wanted, which=1).state["params"]["half"]
    assert part.sharding == wanted["params"]["half"].sharding
    assert bits(part) == bits(make_state(1, seed=1).params["half"])

    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*: it has \[1, 2\]"):
        load(tmp_path, which=3)
    with pytest.raises(UserError, match="has the metric"):
        load(tmp_path, which="best")
    with pytest.raises(UserError, match="params/other: checkpoint has none"):
        load(tmp_path, {"params": {"other": jnp.ones(1)}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


# Saves that fail


@pytest.fixture
def full_disk():
    """A context in which no file may grow beyond 64 KiB: writing fails in the background."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full:
        def __enter__(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield Full()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FAILS = r"cannot save checkpoint 2 in .*: File too large"


def test_a_failed_save_is_raised_by_the_next_and_harms_nothing(tmp_path, full_disk):
    small, large = {"w": jnp.ones(4)}, {"w": jnp.ones((512, 512))}
    checkpoints = Checkpoints(tmp_path, description={})
    checkpoints.save(small, step=1)
    checkpoints.wait()
    with full_disk:
        checkpoints.save(large, step=2)  # begins well
        with pytest.raises(UserError, match=FAILS):
            checkpoints.save(small, step=3)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert checkpoints.save(large, step=2)  # said once, and done with
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_a_failed_last_save_is_raised_by_close(tmp_path, full_disk):
    with full_disk, pytest.raises(UserError, match=FAILS):
        with Checkpoints(tmp_path, description={}) as checkpoints:
            checkpoints.save({"w": jnp.ones((512, 512))}, step=2)
    with full_disk, pytest.warns(UserWarning, match=FAILS), pytest.raises(ZeroDivisionError):
        with Checkpoints(tmp_path, description={}) as checkpoints:
            checkpoints.save({"w": jnp.ones((512, 512))}, step=2)
            raise ZeroDivisionError  # what went wrong first stays what is raised


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep checkpoints in .*: Not a directory"):
        Checkpoints(tmp_path / "file" / "run", description={})
    checkpoints = Checkpoints(tmp_path / "run", description={})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"cannot save checkpoint 1 in .*: No such file"):
        checkpoints.save({"w": jnp.ones(1)}, step=1)
    checkpoints.close()


@pytest.mark.parametrize("options", [{"keep": 0}, {"best_mode": "most"}])
def test_wrong_options(tmp_path, options):
    with pytest.raises(ValueError, match=r"got .*, expected"):
        Checkpoints(tmp_path, description={}, **options)


# Storage that fails now and then


class Flaky:
    """Makes Python's calls on files below `folder` fail with EIO: every `every`-th of them."""

    folder, every, calls = "", 0, 0
    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir")

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.every and event in self.EVENTS and str(args[0]).startswith(self.folder):
            self.calls += 1
            if self.calls % self.every == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))


HOOK = Flaky()


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    """That hook, for `tmp_path`; waiting takes no time, and lets the storage recover if told so."""
    if HOOK.folder == "":
        sys.addaudithook(HOOK)  # for ever: it cannot be removed
    HOOK.folder, HOOK.calls = str(tmp_path), 0
    monkeypatch.setattr(storage, "PAUSES", (0, 0, 0))
    yield HOOK
    HOOK.every = 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("every", [7, 23])
def test_storage_that_fails_now_and_then_is_not_noticed(tmp_path, flaky, every):
    flaky.every = every
    with Checkpoints(tmp_path, description=EXPERIMENT, keep=2, best="accuracy") as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(make_state(step, seed=step), {"accuracy": -step})
        state, step = checkpoints.restore(abstract(make_state()))
    assert flaky.calls > 100
    assert_identical(state, make_state(4, seed=4))
    flaky.every = 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]


def test_a_state_that_is_still_there_is_written_again(tmp_path, flaky, monkeypatch):
    pauses = []

    def sleep(seconds):  # the storage recovers while one waits for it the sixth time
        pauses.append(seconds)
        flaky.every = int(len(pauses) < 6)

    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        flaky.every = 1
        monkeypatch.setattr(storage.time, "sleep", sleep)
        checkpoints.save(make_state(1))
        checkpoints.wait()
    assert len(pauses) == 6
    assert_identical(load(tmp_path, abstract(make_state())).state, make_state(1))


def test_the_next_save_stands_in_for_one_that_storage_did_not_take(tmp_path, flaky):
    advance = jax.jit(lambda s: {"w": s["w"] + 1}, donate_argnums=0)
    state, fails = {"w": jnp.zeros(1000)}, r"cannot save checkpoint \d in .*: Input/output error"
    checkpoints = Checkpoints(tmp_path, description={})
    for step in (1, 2, 3, 4, 5, 6):
        flaky.every = int(step != 3)
        if step in (1, 4):  # none before it has failed
            checkpoints.save(state, step=step)
        elif step < 6:
            with pytest.warns(UserWarning, match=fails + ".*; the next save stands in for it"):
                checkpoints.save(state, step=step)
            if step == 3:
                checkpoints.wait()
                assert load(tmp_path).state["w"].tolist() == [2] * 1000
        else:
            with pytest.warns(UserWarning), pytest.raises(UserError, match=fails):
                checkpoints.save(state, step=step)  # the third in a row
                checkpoints.save(state, step=7)
            break
        state = advance(state)
    flaky.every = 0
    checkpoints.close()
    assert load(tmp_path).step == 3


def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, flaky):
    write(tmp_path, 1, 2)
    with Checkpoints(tmp_path, description=EXPERIMENT) as checkpoints:
        flaky.folder, flaky.every = str(tmp_path / "2"), 1
        with pytest.raises(UserError, match=r"cannot read .*/2/.*: Input/output error; try again"):
            checkpoints.restore(abstract(make_state()))
        flaky.every = 0
        assert checkpoints.restore(abstract(make_state()))[1] == 2


# Formats


def test_a_run_of_format_1_goes_on(tmp_path):
    """tests/golden/checkpoint_format_1 was written by the last version that had no `offset`."""
    golden = Path(__file__).parent / "golden" / "checkpoint_format_1"
    folder = tmp_path / "run"
    shutil.copytree(golden, folder)
    shutil.rmtree(folder / "checkpoints" / "22")
    begun = load(folder / "checkpoints")
    assert (begun.step, begun.state["offset"], begun.state["offset"].dtype) == (11, 0, np.int32)
    words = [str(folder / "experiment.py"), *open_run(folder).assignments]
    assert run.main([*words, "--workdir", str(folder), "--resume", "--steps", "22"]) == 0
    about = json.loads((folder / "checkpoints" / "22" / "about.json").read_text())
    assert about["format"] == 2 and about["arrays"]["offset"] == {"shape": [], "dtype": "int32"}
    ours, theirs = (trees.named(load(f / "checkpoints").state) for f in (folder, golden))
    assert ours.keys() == theirs.keys() and bits(ours["key"]) == bits(theirs["key"])
    for name in ours:
        if name != "key":  # other versions of XLA may round otherwise
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)


# Several processes

PROCESS = """
import sys
folder, index, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
from jaxeco import runtime
runtime.configure(fake_devices=2)
import resource
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from jaxeco.checkpoint import Checkpoints
from jaxeco.errors import UserError

mesh = jax.make_mesh((2, 2), ("data", "fsdp"))

def put(values, *axes):
    where = NamedSharding(mesh, P(*axes))
    return jax.make_array_from_callback(values.shape, where, lambda part: values[part])

def state(step):
    w = np.arange(48, dtype=np.float32).reshape(8, 6) * step
    key = jax.jit(lambda: jax.random.key(step), out_shardings=NamedSharding(mesh, P()))()
    return {"both": put(w, "data", "fsdp"), "one": put(w + 1, None, "fsdp"), "all": put(w + 2),
            "nothing": put(w[:0]), "key": key}

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

with Checkpoints(folder, description={}, keep=3, best="a") as checkpoints:
    for step in (1, 2, 3):
        assert checkpoints.save(state(step), {"a": -step}, step=step)
    assert not checkpoints.save(state(3), step=3)
    for failing in (0, 1):
        if index == failing:
            limit(100)
        try:
            checkpoints.save(state(4), step=4)
            checkpoints.wait()
        except UserError as error:
            print("failed:", error)
        limit(resource.RLIM_INFINITY)
        assert checkpoints.steps() == [1, 2, 3]
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    found, step = checkpoints.restore(jax.tree.map(shape, state(0)))
    assert step == 3
    found["key"] = jax.random.key_data(found["key"])
    for name, wanted in (state(3) | {"key": jax.random.key_data(state(3)["key"])}).items():
        for ours, theirs in zip(found[name].addressable_shards, wanted.addressable_shards):
            np.testing.assert_array_equal(ours.data, theirs.data)
    checkpoints.save(state(5), step=5)
"""


def test_two_processes_write_one_checkpoint_and_one_reads_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [sys.executable, "-c", PROCESS, str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    processes = [subprocess.Popen([*words, str(i), str(port)], **options) for i in range(2)]
    for process in processes:
        said, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
        failed = [line for line in said.splitlines() if line.startswith("failed: ")]
        assert len(failed) == 2 and all("cannot save checkpoint 4" in line for line in failed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "5"]
    found = load(tmp_path)
    w = np.arange(48, dtype=np.float32).reshape(8, 6) * 5
    wanted = {"both": w, "one": w + 1, "all": w + 2, "nothing": w[:0], "key": jax.random.key(5)}
    assert found.step == 5 and {name: bits(a) for name, a in found.state.items()} == {
        name: bits(a) for name, a in wanted.items()
    }
    parts = [(tmp_path / "5" / "state" / f"ocdbt.process_{i}").is_dir() for i in range(2)]
    assert parts == [True, True]


# The process


def save_until_killed(folder: str, done: Any, touches: int) -> None:
    """Resumes, then counts up; every leaf carries the counter. `done` is told what is complete.

    It kills itself before it touches the file system for the `touches`-th time, if not 0.
    """
    count = 0

    def touched(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if args and str(args[0]).startswith(folder):
            count += 1
            if count == touches:
                os.kill(os.getpid(), signal.SIGKILL)

    def state(step: int) -> Any:
        return {f"w{i}": jax.device_put(np.full((64, 64 * i), step, "f4")) for i in range(4)}

    sys.addaudithook(touched)
    with Checkpoints(folder, description={}) as checkpoints:
        restored = checkpoints.restore(abstract(state(0)))
        step = restored[1] if restored else 0
        while True:
            step += 1
            checkpoints.save(state(step), step=step)
            done.value = max([done.value, *checkpoints.steps()])


@pytest.mark.filterwarnings("error")
def test_killed_at_any_moment_nothing_is_lost(tmp_path):
    """SIGKILL: what is found is whole, and no older than what was reported complete.

    Half the moments are random in time, half among the 300 times that Python first touches a file.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "orbax.checkpoint", "jaxeco.checkpoint"])
    rng = random.Random(seed := time.time_ns())
    done = context.Value("q", 0, lock=False)
    for kill in range(int(os.environ.get("JAXECO_TEST_KILLS", "10"))):
        touches = rng.randint(1, 300) if kill % 2 else 0
        before = done.value
        process = context.Process(target=save_until_killed, args=(str(tmp_path), done, touches))
        process.start()
        while not touches and done.value == before and process.is_alive():
            time.sleep(0.002)
        process.join(None if touches else rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if done.value:
            found = load(tmp_path)
            assert found.step >= done.value
            for name, w in found.state.items():
                assert np.all(w == found.step), (name, found.step, seed)
            assert not list(tmp_path.glob("*.damaged")), seed
    assert done.value > 5


def test_importing_is_cheap_and_saving_is_silent(tmp_path):
    script = f"""
import sys, logging
import jaxeco.checkpoint
assert "orbax" not in str(sys.modules.keys())
logging.basicConfig(level=logging.INFO)
import jax.numpy as jnp
with jaxeco.checkpoint.Checkpoints({str(tmp_path)!r}, description={{}}) as c:
    c.save({{"w": jnp.ones(3)}}, step=1)
    c.restore({{"w": jnp.ones(3)}})
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
