"""Decoded arrays on disk: damage is noticed, nothing half-made stays, full disks say so."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxeco.data import cache
from jaxeco.errors import UserError

LAYOUT = {"x": ((10, 2, 3), np.dtype(np.uint8)), "y": ((10,), np.dtype(np.int32))}
X = np.arange(60, dtype=np.uint8).reshape(10, 2, 3)
Y = np.arange(10, dtype=np.int32) - 5


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXECO_CACHE", str(tmp_path))
    return tmp_path / "data" / "entry"


def blocks():
    for start in range(0, 10, 4):
        yield {"x": X[start : start + 4], "y": Y[start : start + 4]}


def forbidden():
    raise AssertionError("decoded again")


def test_what_was_written_is_read_without_decoding(folder):
    first, digest = cache.cached("entry", {"a": 1}, LAYOUT, blocks)
    again, same = cache.cached("entry", {"a": 1}, LAYOUT, forbidden)
    assert digest == same
    for arrays in (first, again):
        np.testing.assert_array_equal(arrays["x"], X)
        np.testing.assert_array_equal(arrays["y"], Y)
        assert arrays["y"].dtype == np.int32 and not arrays["x"].flags.writeable


def test_the_digest_does_not_depend_on_the_blocks():
    _, digest = cache.cached("entry", 1, LAYOUT, blocks)
    _, other = cache.cached("other", 1, LAYOUT, lambda: [{"x": X, "y": Y}])
    assert digest == other


def test_another_source_replaces_the_entry():
    cache.cached("entry", "old", LAYOUT, blocks)
    arrays, _ = cache.cached("entry", "new", LAYOUT, lambda: [{"x": X + 1, "y": Y}])
    np.testing.assert_array_equal(arrays["x"], X + 1)


GROWING = {"x": ((None, 2, 3), np.dtype(np.uint8)), "y": ((None,), np.dtype(np.int32))}


@pytest.mark.parametrize("rows", [0, 1, 10])
def test_a_first_dimension_may_show_only_at_the_end(folder, rows):
    written = {"x": X[:rows], "y": Y[:rows]}
    cache.cached("entry", 1, GROWING, lambda: [written, {"x": X[:0], "y": Y[:0]}])
    arrays, _ = cache.cached("entry", 1, GROWING, forbidden)
    for name in ("x", "y"):
        np.testing.assert_array_equal(arrays[name], written[name])
        assert arrays[name].dtype == written[name].dtype
        np.testing.assert_array_equal(np.load(folder / f"{name}.npy"), written[name])


def test_arrays_of_different_lengths_differ_in_their_digest():
    _, ten = cache.cached("entry", 1, GROWING, blocks)
    _, nine = cache.cached("other", 1, GROWING, lambda: [{"x": X[:9], "y": Y[:9]}])
    assert ten != nine


def test_many_rows_find_room_in_the_header(folder):
    layout = {"x": ((None,), np.dtype(np.uint8))}
    row = np.zeros(2**20, np.uint8)
    arrays, _ = cache.cached("entry", 1, layout, lambda: ({"x": row} for _ in range(11)))
    assert arrays["x"].shape == (11 * 2**20,) and not arrays["x"].any()


@pytest.mark.parametrize("file", ["x.npy", "y.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_damage_is_noticed_and_mended_with_a_warning(folder, file, damage):
    cache.cached("entry", 1, LAYOUT, blocks)
    path = folder / file
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(data[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        arrays, _ = cache.cached("entry", 1, LAYOUT, blocks)
    np.testing.assert_array_equal(arrays["x"], X)
    cache.cached("entry", 1, LAYOUT, forbidden)


def test_a_failure_while_decoding_leaves_nothing(folder):
    def failing():
        yield from list(blocks())[:1]
        raise UserError("record 5 is damaged")

    with pytest.raises(UserError, match="record 5"):
        cache.cached("entry", 1, LAYOUT, failing)
    assert [path.name for path in folder.parent.iterdir()] == ["entry.lock"]


def test_what_a_killed_process_left_is_removed(folder):
    script = (
        "import numpy as np, os, signal; from jaxeco.data import cache\n"
        "def blocks():\n"
        "    yield {'x': np.zeros(3, np.uint8)}\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.cached('entry', 1, {'x': ((9,), np.dtype(np.uint8))}, blocks)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert len(list(folder.parent.glob("entry.partial-*"))) == 1
    cache.cached("entry", 1, LAYOUT, blocks)  # and the dead process's lock is free
    assert sorted(path.name for path in folder.parent.iterdir()) == ["entry", "entry.lock"]


def test_a_second_process_waits_instead_of_decoding_too():
    def slow():
        time.sleep(0.3)
        yield from blocks()

    first = threading.Thread(target=cache.cached, args=("entry", 1, LAYOUT, slow))
    first.start()
    time.sleep(0.1)
    cache.cached("entry", 1, LAYOUT, forbidden)
    first.join()


def test_a_full_disk_is_a_users_error(folder):
    def full():
        yield from list(blocks())[:1]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"No space left.*JAXECO_CACHE"):
        cache.cached("entry", 1, LAYOUT, full)
    assert not folder.exists()


def test_large_arrays_are_checked_in_part(monkeypatch):
    monkeypatch.setattr(cache, "CHECKED_BYTES", 512 * 4)
    array = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    whole = cache._checksum(array)
    for at in (0, 99_999):  # both ends are always looked at
        array[at] ^= 1
        assert cache._checksum(array) != whole
        array[at] ^= 1
    assert cache._checksum(array) == whole


def test_meta_names_its_source(folder):
    cache.cached("entry", {"files": ["a", 1]}, LAYOUT, blocks)
    assert json.loads((folder / "meta.json").read_text())["source"] == {"files": ["a", 1]}
