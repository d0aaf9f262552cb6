"""Examples in array_record files: written, read at random, cut among hosts, damaged."""

import io
import json
import os
import pickle
import resource
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxeco import data
from jaxeco.data.cache import cached
from jaxeco.data.pipeline import Feed, fits
from jaxeco.data.records import Shards
from jaxeco.errors import UserError


def examples(count):
    rng = np.random.default_rng(0)
    for i in range(count):
        yield {
            "x": rng.integers(0, 256, (4, 5, 3), np.uint8),
            "y": np.int32(i),
            "weights": rng.normal(size=2),
            "flag": i % 2 == 0,
        }


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **options)
    return file.getvalue()


def noise(i, height=6, width=8):
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """50 examples in five files."""
    folder = tmp_path_factory.mktemp("master") / "records"
    assert data.write_records(folder, examples(50), classes=("a", "b"), shard_size=816) == 50
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{i:05d}.array_record" for i in range(5)),
        "features.json",
    ]
    return folder


@pytest.fixture
def folder(master, tmp_path):
    return Path(shutil.copytree(master, tmp_path / "records"))


def test_what_is_written_is_read_in_any_order(folder):
    opened, written = data.ArrayRecords(str(folder)).open(), list(examples(50))
    assert len(opened) == 50 and opened.classes == ("a", "b")
    rows = np.array([49, 0, 17, 17, 10, 9])
    for name in ("x", "y", "weights", "flag"):
        expected = np.stack([written[row][name] for row in rows])
        got = opened.fields[name][rows]
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype == opened.fields[name].dtype
        assert opened.fields[name].shape == (50, *expected.shape[1:])
    assert opened.nbytes == 50 * (60 + 4 + 16 + 1) and fits(opened, 4050)


def test_a_record_is_the_numbers_bytes_and_then_images_behind_their_length(tmp_path):
    image = png(noise(0))
    written = [{"image": image, "y": np.array([1, -2], ">i2"), "w": 0.5}]
    data.write_records(tmp_path / "r", written)
    from array_record.python.array_record_module import ArrayRecordReader

    [record] = ArrayRecordReader(str(tmp_path / "r/00000.array_record")).read([0])
    head = b"\x01\x00\xfe\xff" + np.float64(0.5).astype("<f8").tobytes()
    assert record == head + len(image).to_bytes(4, "little") + image
    described = json.loads((tmp_path / "r/features.json").read_text())
    assert described["fields"] == {
        "image": {"image": [6, 8, 3]},
        "y": {"dtype": "<i2", "shape": [2]},
        "w": {"dtype": "<f8", "shape": []},
    }


def test_images_lie_as_they_came_and_are_decoded_on_demand(tmp_path):
    sizes = [(6, 8), (10, 7), (5, 5)]
    images = [noise(i, *size) for i, size in enumerate(sizes)]
    upright = [*images, images[0].transpose(1, 0, 2)[::-1]]
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees to the left
    encoded = [*map(png, images), png(images[0], exif=exif)]
    data.write_records(tmp_path / "r", [{"x": x, "y": i} for i, x in enumerate(encoded)])
    with pytest.raises(UserError, match=r"images 'x' differ in size: give image_size"):
        data.ArrayRecords(str(tmp_path / "r")).open()
    opened = data.ArrayRecords(str(tmp_path / "r"), image_size=4).open()
    for name in "ab":
        (tmp_path / "folder" / name).mkdir(parents=True)
    for i, content in enumerate(encoded):
        (tmp_path / "folder" / "ab"[i % 2] / f"{i}.png").write_bytes(content)
    folder = data.ImageFolder(str(tmp_path / "folder"), 4, "all").open()
    order = [0, 2, 1, 3]  # the folder's: class by class
    np.testing.assert_array_equal(
        opened.fields["x"][np.array(order)], folder.fields["x"][np.arange(4)]
    )
    data.write_records(tmp_path / "one", [{"x": encoded[3]}])
    np.testing.assert_array_equal(
        data.ArrayRecords(str(tmp_path / "one")).open().fields["x"][np.array([0])], [upright[3]]
    )
    # grey ones are read as one channel, unless some have colour
    grey = png(noise(1)[..., 0])
    data.write_records(tmp_path / "grey", [{"x": grey}] * 2)
    assert data.ArrayRecords(str(tmp_path / "grey")).open().fields["x"].shape == (2, 6, 8, 1)
    data.write_records(tmp_path / "mixed", [{"x": grey}, {"x": encoded[0]}])
    assert data.ArrayRecords(str(tmp_path / "mixed")).open().fields["x"].shape == (2, 6, 8, 3)


@dataclass(frozen=True)
class Sum:
    """A decoder with a setting."""

    times: int

    def __call__(self, example):
        if example["y"] == 33:
            raise ZeroDivisionError
        return {"x": example["x"].sum(dtype=np.int64) * self.times, "y": example["y"]}


def scaled(factor):
    return lambda example: {"x": example["x"] * factor, "y": example["y"]}


def test_a_decoder_makes_the_fields(folder):
    source = data.ArrayRecords(str(folder), Sum(3))
    opened, written = source.open(), list(examples(50))
    rows = np.array([3, 30])
    expected = [int(written[row]["x"].astype(int).sum()) * 3 for row in rows]
    assert opened.fields["x"][rows].tolist() == expected and set(opened.fields) == {"x", "y"}
    assert opened.fingerprint == source.open().fingerprint
    prints = [
        data.ArrayRecords(str(folder), decode).open().fingerprint
        for decode in (None, Sum(2), scaled(2), scaled(3))
    ]
    assert len({opened.fingerprint, *prints}) == 5
    with pytest.raises(UserError, match=r"decode failed on record 33: ZeroDivisionError"):
        opened.fields["x"][np.array([3, 33])]
    with pytest.raises(UserError, match="cannot be described"):
        data.ArrayRecords(str(folder), partial(scaled(2), unknown=object())).open()


def test_shards_read_the_part_that_they_are_given_and_can_be_pickled(folder):
    opened = data.ArrayRecords(str(folder)).open()
    opened.fields["x"][np.array([1])]  # with a file open
    again = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(again.fields["y"][np.arange(50)], np.arange(50))
    part = type(opened.fields["x"].records.shards.parts[0])
    files = [str(folder / f"{i:05d}.array_record") for i in range(2)]
    shards = Shards([part(files[1], 3, 4), part(files[0], 9, 1)], "mend it")
    assert len(shards) == 5
    first = [record[60:64] for record in shards.read([4, 0, 3])]
    assert [int.from_bytes(y, "little") for y in first] == [9, 14, 17]


# Hosts.


class Host:
    """One of several processes: its feed, and every row that it has read from its source."""

    def __init__(self, folder, count, index, seed=5, batch=8):
        self.read_rows = []
        opened = data.ArrayRecords(str(folder)).open()
        shards = opened.fields["x"].records.shards
        read = shards.read
        shards.read = lambda rows: self.read_rows.append(list(rows)) or read(rows)
        share = np.arange(batch).reshape(count, -1)[index]
        self.feed = Feed.training(opened, batch, seed, resident=False, share=share)


def test_a_run_goes_on_at_the_next_example_with_another_number_of_hosts(folder):
    with Feed.training(data.ArrayRecords(str(folder)).open(), 8, 5, resident=False) as feed:
        whole = {step: feed.fed(step) for step in range(15)}  # two and a half passes
    stretches = [(1, range(0, 4)), (4, range(4, 7)), (2, range(7, 9)), (4, range(9, 15))]
    for count, steps in stretches:
        hosts = [Host(folder, count, index) for index in range(count)]
        for step in steps:
            parts = [host.feed.fed(step) for host in hosts]
            for name, expected in whole[step].items():
                together = np.concatenate([part[name] for part in parts], axis=1)
                np.testing.assert_array_equal(together, expected)
                assert together.dtype == expected.dtype
        for host in hosts:
            host.feed.close()
            # y is the row's number, and nobody reads what is another's
            mine = {step: whole[step]["y"][0][host.feed.share].tolist() for step in steps}
            done = [rows for rows in host.read_rows if rows in mine.values()]
            assert sorted(done) == sorted(mine.values())
            assert all(len(rows) == 8 // count for rows in host.read_rows)
    passes = [
        np.concatenate([whole[s]["y"][0] for s in steps]) for steps in (range(6), range(6, 12))
    ]
    assert all(len(set(rows.tolist())) == 48 for rows in passes)  # nothing twice in a pass of 50


# What is wrong.


def test_a_damaged_record_is_named_with_its_file(folder):
    file = folder / "00003.array_record"
    content, x = bytearray(file.read_bytes()), list(examples(50))[37]["x"].tobytes()
    at = content.find(x[:40])
    assert at > 0, "records of noise are stored as they are"
    content[at + 7] ^= 1
    file.write_bytes(content)
    opened = data.ArrayRecords(str(folder)).open()
    assert len(opened.fields["x"][np.array([36, 38, 2])]) == 3
    with pytest.raises(UserError, match=rf"record 37 is damaged, in {file} .*copy that") as caught:
        opened.fields["x"][np.array([36, 37, 2])]
    assert "\n" not in str(caught.value)


def rewritten(folder, change):
    path = folder / "features.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="jaxeco records 2"), "format 'jaxeco records 2', expected"),
        (lambda d: d["fields"]["x"].update(dtype="|O1"), r"'\|O1'"),
        (lambda d: d["fields"]["x"].update(dtype="|O"), r"dtype '\|O'"),
        (lambda d: d["fields"]["x"].update(shape=[2**20, 2**20]), "shape"),
        (lambda d: d["fields"]["x"].update(shape=[-1]), "-1, expected a whole number"),
        (lambda d: d["fields"].update(row={"dtype": "|u1", "shape": []}), "fields .*'row'"),
        (lambda d: d.update(fields=[]), "damaged"),
        (lambda d: d.update(fields={}), "damaged"),
        (lambda d: d.update(shards=[]), "no records"),
        (lambda d: d["shards"][1].update(records=True), "True, expected a whole number"),
        (lambda d: d["shards"][1].update(bytes=1), "00001.array_record has .* bytes, expected 1"),
        (lambda d: d["shards"].append(d["shards"][0]), "00005.array_record: No such file"),
        (lambda d: d.pop("classes"), "KeyError: 'classes'"),
    ],
)
def test_a_description_that_cannot_be_is_refused(folder, change, message):
    rewritten(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        data.ArrayRecords(str(folder)).open()
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["fields"]["x"].update(shape=[2, 5, 3]), "81 bytes, expected 51"),
        (lambda d: d["shards"][0].update(records=12), "the file has 11 records, not 12"),
        (lambda d: d["fields"].update(z={"image": [1, 1, 3]}), "record 0 is damaged"),
    ],
)
def test_a_description_of_other_records_is_found_out_when_they_are_read(folder, change, message):
    rewritten(folder, change)
    opened = data.ArrayRecords(str(folder)).open()
    with pytest.raises(UserError, match=message):
        next(iter(opened.fields.values()))[np.array([0])]


def test_folders_that_are_not_written_by_us(tmp_path):
    with pytest.raises(UserError, match=r"features.json: No such file.*write_records wrote"):
        data.ArrayRecords(str(tmp_path)).open()
    (tmp_path / "features.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"features.json: not text"):
        data.ArrayRecords(str(tmp_path)).open()
    (tmp_path / "features.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        data.ArrayRecords(str(tmp_path)).open()


def test_a_file_that_is_no_array_record_is_named(folder):
    file = folder / "00002.array_record"
    file.write_bytes(b"x" * file.stat().st_size)
    opened = data.ArrayRecords(str(folder)).open()
    with pytest.raises(UserError, match=f"in {file} .*none that can be read"):
        opened.fields["x"][np.array([25])]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([], "no examples"),
        ([{"x": "text"}], "example 0 has 'x' of <U4"),
        ([{"x": None}], "example 0 has 'x' of object"),
        ([{"x": np.zeros((0, 3))}], r"shape \(0, 3\)"),
        ([{"x": b"no image"}], "not a readable image"),
        ([{"x": 1}, {"x": 1, "y": 2}], r"example 1 has the fields \['x', 'y'\], expected \['x'\]"),
        ([{"x": 1}, {"x": 1.5}], "example 1 has 'x' as .*<f8.*, expected .*<i8"),
        ([{"x": np.zeros(2)}, {"x": np.zeros(3)}], "example 1"),
        ([{"x": 1}, {"x": png(noise(0))}], "example 1"),
    ],
)
def test_examples_that_cannot_be_written_leave_nothing(tmp_path, written, message):
    with pytest.raises(UserError, match=message):
        data.write_records(tmp_path / "r", written)
    assert list(tmp_path.iterdir()) == []


def test_errors_and_full_disks_while_writing_leave_nothing(tmp_path):
    def broken():
        yield {"x": 1}
        raise KeyError("the user's own")

    with pytest.raises(KeyError):
        data.write_records(tmp_path / "r", broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists"):
        data.write_records(tmp_path / "there", examples(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*File exists"):
        data.write_records(tmp_path / "file" / "r", examples(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*00000.array_record: .*too large"):
            data.write_records(tmp_path / "r", ({"x": noise(i, 64, 64)} for i in range(60)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_that_is_opened_is_executed(folder, tmp_path, monkeypatch):
    payload = Payload(tmp_path / "executed")
    pickled = pickle.dumps(payload)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(pickled)
        with pytest.raises(UserError, match="not a tokenizer"):
            data.load_tokenizer(tmp_path / name)
    for name in ("00000.array_record", "features.json"):
        size = (folder / name).stat().st_size
        (folder / name).write_bytes(pickled.ljust(size, b"\0"))
        with pytest.raises(UserError, match=name):
            data.ArrayRecords(str(folder)).open().fields["y"][np.array([0])]
    monkeypatch.setenv("JAXECO_CACHE", str(tmp_path / "cache"))
    layout = {"y": ((None,), np.dtype(np.int32))}
    cached("entry", 1, layout, lambda: [{"y": np.arange(3, dtype=np.int32)}])
    np.save(tmp_path / "cache/data/entry/y.npy", np.array([payload]), allow_pickle=True)
    with pytest.warns(UserWarning, match="Python objects in dtype"):
        cached("entry", 1, layout, lambda: [{"y": np.arange(3, dtype=np.int32)}])
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickled)
    assert (tmp_path / "executed").exists()  # or the payload would prove nothing
