"""tfds without TensorFlow: preparing from a server on this machine, decoding, slicing, failing."""

import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image
from tensorflow_datasets.image_classification import cifar
from tiny_tfds import ARCHIVE, CLASSES, Server, serve_cifar10, serve_mnist, url_info

from jaxeco.data import prepare as prepare_module
from jaxeco.data import tfds as tfds_module
from jaxeco.data.pipeline import Feed
from jaxeco.data.tfds import Tfds
from jaxeco.errors import UserError

REAL = os.environ.get("TFDS_DATA_DIR", "")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXECO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def cifar10(server, monkeypatch):
    """tfds's own CIFAR-10 builder, its archive replaced by a tiny one on the local server."""
    return (server, *serve_cifar10(server, monkeypatch))


def same_examples(dataset, expected):
    """tfds shuffles when it prepares: compare as sets of (image, label)."""
    got = sorted((x.tobytes(), int(y)) for x, y in zip(*every(dataset), strict=True))
    return got == sorted((x.tobytes(), int(y)) for x, y in expected)


def every(dataset):
    indices = np.arange(len(dataset))
    return dataset.fields["x"][indices], dataset.fields["y"][indices]


def nothing_half_made(root):
    """No prepared folder, no archive, no temporary folder that another attempt could meet."""
    left = [path for path in Path(root).rglob("*") if path.is_file() and path.suffix != ".lock"]
    return left == [] and not list(Path(root).glob("*/*.incomplete*"))


# Preparing.


def test_prepares_cifar10_without_tensorflow_and_without_loss(cifar10, tmp_path, capfd):
    server, _, _, train = cifar10
    dataset = Tfds("cifar10", "train", data_dir=tmp_path / "data").open()
    assert same_examples(dataset, train)
    x, y = every(dataset)
    assert x.shape == (20, 32, 32, 3) and x.dtype == np.uint8 and y.dtype == np.int32
    assert dataset.classes == CLASSES
    assert dataset.name == "cifar10:3.0.2 train (tfds)"
    assert dataset.nbytes == 20 * 32 * 32 * 3 + 20 * 4
    assert len(Tfds("cifar10:3.0.2", "test", data_dir=tmp_path / "data").open()) == 6
    assert server.requests == 1
    assert "tensorflow" not in sys.modules
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) <= 6 and "WARNING" not in err


def test_prepares_mnist(server, tmp_path, monkeypatch):
    expected = serve_mnist(server, monkeypatch)
    dataset = Tfds("mnist", "train", data_dir=tmp_path).open()
    assert same_examples(dataset, expected)
    assert dataset.fields["x"].shape == (12, 28, 28, 1)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_stand_in_encodes_png_without_loss(channels):
    image = np.random.default_rng(2).integers(0, 256, (9, 7, channels), np.uint8)
    encoded = prepare_module.stand_in().image.encode_png(image).numpy()
    assert encoded.startswith(b"\x89PNG")
    decoded = np.asarray(Image.open(io.BytesIO(encoded))).reshape(image.shape)
    np.testing.assert_array_equal(decoded, image)


# Failing to prepare.


def test_a_wrong_checksum_is_refused_and_not_kept(cifar10, tmp_path, monkeypatch):
    _, url, archive, train = cifar10
    right, wrong = hashlib.sha256(archive).hexdigest(), "0" * 64
    monkeypatch.setattr(cifar.Cifar10, "url_infos", {url: url_info(archive, ARCHIVE, wrong)})
    with pytest.raises(UserError) as caught:
        Tfds("cifar10", "train", data_dir=tmp_path / "data").open()
    message = str(caught.value)
    assert url in message and wrong in message and right in message and "\n" not in message
    assert nothing_half_made(tmp_path)
    monkeypatch.setattr(cifar.Cifar10, "url_infos", {url: url_info(archive, ARCHIVE)})
    assert same_examples(Tfds("cifar10", "train", data_dir=tmp_path / "data").open(), train)


@pytest.mark.parametrize("mode", ["truncated", "stalling", "no length", "hanging", "missing"])
def test_a_failing_download_is_one_line_and_leaves_nothing(cifar10, tmp_path, monkeypatch, mode):
    server, url, archive, train = cifar10
    monkeypatch.setattr(prepare_module, "STALL_SECONDS", 0.5)
    server.mode = mode
    if mode == "missing":
        server.files.clear()
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        Tfds("cifar10", "train", data_dir=tmp_path / "data").open()
    assert time.monotonic() - begun < 10
    message = str(caught.value)
    assert "\n" not in message and url in message and "cifar10/3.0.2" in message
    if mode in ("truncated", "no length"):
        assert f"{len(archive) // 2} " in message  # what came
    if mode in ("truncated", "no length", "stalling"):
        assert f"{len(archive)} bytes" in message  # what should have
    if mode == "missing":
        assert "404" in message
    assert "experiments/digits_mlp.py" in message and str(tmp_path / "data") in message
    assert nothing_half_made(tmp_path)
    server.mode, server.files[f"/{ARCHIVE}"] = "good", archive
    assert same_examples(Tfds("cifar10", "train", data_dir=tmp_path / "data").open(), train)


def test_no_network_fails_at_once_and_a_file_put_there_by_hand_helps(cifar10, tmp_path):
    server, _, archive, train = cifar10
    server.close()
    begun = time.monotonic()
    with pytest.raises(UserError, match="refused") as caught:
        Tfds("cifar10", "train", data_dir=tmp_path).open()
    assert time.monotonic() - begun < 5
    by_hand = tmp_path / "downloads" / "manual"
    assert f"Put {ARCHIVE} into {by_hand}" in str(caught.value)
    by_hand.mkdir()
    (by_hand / ARCHIVE).write_bytes(archive[:-1])
    with pytest.raises(UserError, match=r"wrong checksum.*Expected.*Got"):
        Tfds("cifar10", "train", data_dir=tmp_path).open()
    (by_hand / ARCHIVE).write_bytes(archive)
    assert same_examples(Tfds("cifar10", "train", data_dir=tmp_path).open(), train)


def test_a_name_server_that_never_answers_is_given_up_on(cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3))
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0\.5 s"):
        Tfds("cifar10", "train", data_dir=tmp_path).open()
    assert time.monotonic() - begun < 5


def test_proxies_of_the_environment_are_used(cifar10, tmp_path, monkeypatch):
    server, url, archive, train = cifar10
    far = f"http://data.invalid/{ARCHIVE}"
    server.files = {far: archive}  # what a proxy is asked for
    monkeypatch.setattr(cifar.Cifar10, "_cifar_info", cifar.Cifar10._cifar_info._replace(url=far))
    monkeypatch.setattr(cifar.Cifar10, "url_infos", {far: url_info(archive, ARCHIVE)})
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", url.removesuffix(f"/{ARCHIVE}"))
    assert same_examples(Tfds("cifar10", "train", data_dir=tmp_path).open(), train)


def test_time_limits_add_up_to_less_than_15_s():
    assert prepare_module.STALL_SECONDS <= 10 and prepare_module.CONNECT_SECONDS <= 10


def test_a_damaged_archive_without_a_checksum_is_fetched_anew(cifar10, tmp_path, monkeypatch):
    server, _, archive, train = cifar10
    monkeypatch.setattr(cifar.Cifar10, "url_infos", {})
    server.files[f"/{ARCHIVE}"] = archive[: len(archive) // 2]
    with pytest.raises(UserError, match="extracting"):
        Tfds("cifar10", "train", data_dir=tmp_path).open()
    server.files[f"/{ARCHIVE}"] = archive
    assert same_examples(Tfds("cifar10", "train", data_dir=tmp_path).open(), train)
    assert server.requests == 2


def test_ctrl_c_during_a_download_leaves_nothing(cifar10, tmp_path, monkeypatch):
    *_, train = cifar10

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_open", interrupted)
        Tfds("cifar10", "train", data_dir=tmp_path / "data").open()
    assert nothing_half_made(tmp_path)
    assert same_examples(Tfds("cifar10", "train", data_dir=tmp_path / "data").open(), train)


def test_a_data_dir_that_cannot_be_written(cifar10, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be prepared in"):
        Tfds("cifar10", "train", data_dir=tmp_path / "file").open()


class JaxecoResizes(tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        x, y = features.Image(shape=(2, 2, 3)), features.ClassLabel(num_classes=2)
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=features.FeaturesDict({"image": x, "label": y})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow

        yield 0, {"image": tensorflow.image.resize(np.zeros((4, 4, 3)), (2, 2)), "label": 0}


def test_a_builder_that_needs_tensorflow_itself_is_told_apart(tmp_path):
    with pytest.raises(UserError, match=r"cannot be prepared without TensorFlow: .*`resize`"):
        Tfds("jaxeco_resizes", "train", data_dir=tmp_path).open()
    assert nothing_half_made(tmp_path)


class JaxecoArchive(tensorflow_datasets.core.GeneratorBasedBuilder):
    """As many examples as files come out of an archive from `url`; the label counts their bytes."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    url = ""

    def _info(self):
        features = tensorflow_datasets.features
        x, y = features.Image(shape=(2, 2, 3)), features.Scalar(np.int64)
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=features.FeaturesDict({"image": x, "label": y})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(Path(dl_manager.download_and_extract(self.url)))}

    def _generate_examples(self, folder):
        for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
            assert not path.is_symlink()
            size = len(path.read_bytes())
            yield str(path), {"image": np.zeros((2, 2, 3), np.uint8), "label": size}


def hostile_archive(kind, outside):
    """Good files, of 1 and 2 bytes, among names and links that lead out of the folder."""
    names = ["../evil", "a/../../evil", f"{outside}/evil", "a/../../../../../../evil"]
    entries = {"good": b"1", "a/good": b"22", **dict.fromkeys(names, b"evil!")}
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
            link = zipfile.ZipInfo("link")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, b"/")  # as a file, it has the one byte of its target's name
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        links = {"up": "..", "out": str(outside), "file": str(outside / "secret"), "b": "good"}
        for name, target in links.items():
            for folder, link in (("", tarfile.SYMTYPE), ("hard/", tarfile.LNKTYPE)):
                entry = tarfile.TarInfo(folder + name)
                entry.type, entry.linkname = link, target
                archive.addfile(entry)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "sizes"), [("zip", [1, 1, 2]), ("tar.gz", [1, 1, 1, 2])])
def test_archives_and_servers_cannot_write_outside_their_folder(
    server, tmp_path, monkeypatch, kind, sizes
):
    (tmp_path / "outside").mkdir()
    (secret := tmp_path / "outside" / f"secret.{kind}").write_bytes(b"secret!")
    content = hostile_archive(kind, tmp_path / "outside")
    server.files[f"/archive.{kind}"] = content
    server.headers["Content-Disposition"] = f'attachment; filename="{secret}"'
    monkeypatch.setattr(JaxecoArchive, "url", f"{server.url}/archive.{kind}")
    here = tmp_path / "a" / "b" / "data"
    _, y = every(Tfds("jaxeco_archive", "train", data_dir=here).open())
    assert sorted(y.tolist()) == sizes
    files = [path for path in tmp_path.rglob("*") if not path.is_dir() or path.is_symlink()]
    assert not any(path.is_symlink() or path.read_bytes() == b"evil!" for path in files)
    roots = here, tmp_path / "cache", secret
    assert [path for path in files if not any(map(path.is_relative_to, roots))] == []
    assert secret.read_bytes() == b"secret!"


# A tiny prepared data set, written by tfds itself: examples in order, y = index % 3.


class JaxecoTiny(tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(4, 5, 3), encoding_format="png"),
                    "photo": features.Image(shape=(None, None, 3)),
                    "label": features.ClassLabel(names=["a", "b", "c"]),
                    "weight": np.float32,
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "test": self._generate_examples(7)}

    def _generate_examples(self, n):
        for i in range(n):
            yield (
                i,
                {
                    "image": png(tiny_image(i)),
                    "photo": png(np.full((20 + i, 40, 3), i, np.uint8)),
                    "label": i % 3,
                    "weight": 0.5,
                },
            )


def tiny_image(i):
    return np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def tiny_master(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    builder = JaxecoTiny(data_dir=root)
    builder.download_and_prepare(file_format="array_record")
    return root


@pytest.fixture
def tiny(tiny_master, tmp_path):
    return Path(shutil.copytree(tiny_master, tmp_path / "tiny"))


def labels(tiny, split, **options):
    return every(Tfds("jaxeco_tiny", split, data_dir=tiny, **options).open())


TRAIN, TEST = list(range(30)), list(range(7))


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", TRAIN),
        ("train[:11]", TRAIN[:11]),
        ("train[-4:]", TRAIN[-4:]),
        ("train[5:-5]", TRAIN[5:-5]),
        ("train[50%:]", TRAIN[15:]),
        ("train[:33%]", TRAIN[:10]),  # 9.9 examples, rounded
        ("train[:3]+train[-3:]", TRAIN[:3] + TRAIN[-3:]),
        ("test+train[:2]", TEST + TRAIN[:2]),
        ("all", TRAIN + TEST),
    ],
)
def test_slices(tiny, split, expected):
    x, y = labels(tiny, split)
    np.testing.assert_array_equal(x, [tiny_image(i) for i in expected])
    np.testing.assert_array_equal(y, [i % 3 for i in expected])


def test_joined_parts_take_indices_in_any_order(tiny):
    x = Tfds("jaxeco_tiny", "train[:3]+test[-2:]", data_dir=tiny).open().fields["x"]
    np.testing.assert_array_equal(x[np.array([4, 0, 3, 0])], [tiny_image(i) for i in (6, 0, 5, 0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cifar11"}, "did you mean .*cifar10"),
        ({"name": "cifar10:9.9.9"}, "only: 3.0.2"),
        ({"name": "emnist/balansed"}, "balanced"),
        ({"name": "kaggle:something"}, "not part of tfds"),
        ({"split": "trian"}, r"Should be one of \['train', 'test'\]"),
        ({"split": "train[:31]"}, r"train \(30\)"),
        ({"split": "train["}, "Unrecognized split format"),
        ({"split": "train[:101%]"}, "percent"),
        ({"split": "train[4:4]"}, "selects no examples"),
        ({"x": "imaeg"}, "did you mean image"),
        ({"y": "lable"}, "did you mean label"),
        ({"y": "weight"}, "class or an integer"),
        ({"x": "label"}, "must be an image"),
        ({"x": "photo"}, "image_size"),
    ],
)
def test_mistakes_are_named(tiny, options, message):
    settings = {"name": "jaxeco_tiny", "split": "train", "data_dir": tiny} | options
    with pytest.raises(UserError, match=message) as caught:
        Tfds(**settings).open()
    assert "\n" not in str(caught.value)


def test_image_size_must_be_positive():
    with pytest.raises(ValueError, match="image_size"):
        Tfds("mnist", "train", image_size=0)


def test_images_that_differ_in_size_are_scaled_and_cropped(tiny):
    x, _ = labels(tiny, "train", x="photo", image_size=8)
    assert x.shape == (30, 8, 8, 3)
    np.testing.assert_array_equal(x[:, 0, 0, 0], TRAIN)  # each photo has one colour


def test_shapes_of_scaled_crops():
    """A 2 x 4 image scaled to 2: the middle two columns stay, unchanged."""
    records = object.__new__(tfds_module._Records)
    records.shape, records.resize = (2, 2, 3), True
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(records._image(png(image)), image[:, 1:3])


def test_large_sets_are_decoded_on_demand(tiny, tmp_path, monkeypatch):
    cached = labels(tiny, "train[10:]+test")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(tfds_module, "CACHE_BYTES", 100)
    on_demand = labels(tiny, "train[10:]+test")
    for a, b in zip(cached, on_demand, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert not (tmp_path / "cache").exists()


def test_a_process_decodes_its_share_and_each_record_once(tiny, monkeypatch):
    whole = Tfds("jaxeco_tiny", "train[:20]+test", data_dir=tiny).open()
    monkeypatch.setattr(tfds_module, "CACHE_BYTES", 100)
    dataset, share = Tfds("jaxeco_tiny", "train[:20]+test", data_dir=tiny).open(), np.array([1, 2])
    decode, decoded = tfds_module._Records._example, []
    monkeypatch.setattr(
        tfds_module._Records, "_example", lambda *args: decoded.append(0) or decode(*args)
    )
    with Feed.evaluation(dataset, 9, resident=False, share=share) as feed:
        for step in range(3):
            fed = feed.fed(step)
            rows = feed.plan(step)["row"][share]
            np.testing.assert_array_equal(fed["x"][0], whole.fields["x"][rows])
            np.testing.assert_array_equal(fed["y"][0], whole.fields["y"][rows])
    assert len(decoded) == 3 * len(share)
    again = pickle.loads(pickle.dumps(whole))  # what is in the cache is mapped again, not copied
    assert len(pickle.dumps(whole)) < 3000
    np.testing.assert_array_equal(again.fields["x"][rows], whole.fields["x"][rows])


# The decoded cache.


def test_later_opens_need_no_records(tiny, monkeypatch):
    first = Tfds("jaxeco_tiny", "train", data_dir=tiny).open()
    monkeypatch.setattr(tfds_module._Records, "read", None)
    again = Tfds("jaxeco_tiny", "train", data_dir=tiny).open()
    assert isinstance(again.fields["x"], np.memmap)
    assert again.fingerprint == first.fingerprint


def test_fingerprints_follow_the_content(tiny, tmp_path):
    def fingerprint(root, split):
        return Tfds("jaxeco_tiny:1.0.0", split, data_dir=root).open().fingerprint

    whole = fingerprint(tiny, "train")
    assert fingerprint(tiny, "train[:29]") != whole
    moved = Path(shutil.copytree(tiny, tmp_path / "moved", copy_function=shutil.copyfile))
    assert fingerprint(moved, "train") == whole  # elsewhere, with other times: the same data
    shard = "jaxeco_tiny/1.0.0/jaxeco_tiny-{}.array_record-00000-of-00001".format
    info = json.loads((moved / "jaxeco_tiny/1.0.0/dataset_info.json").read_text())
    info["splits"][0]["shardLengths"], info["splits"][1]["shardLengths"] = ["7"], ["7"]
    (moved / "jaxeco_tiny/1.0.0/dataset_info.json").write_text(json.dumps(info))
    shutil.copyfile(moved / shard("test"), moved / shard("train"))
    changed = Tfds("jaxeco_tiny:1.0.0", "train", data_dir=moved).open()
    assert len(changed) == 7 and changed.fingerprint != whole


def test_a_damaged_record_is_named_and_not_cached(tiny, tmp_path):
    shard = next(tiny.rglob("*train.array_record*"))
    data = bytearray(shard.read_bytes())
    at = data.index(png(tiny_image(17))[-40:-12])  # inside the pixels of image 17
    data[at + 10] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"jaxeco_tiny:1.0.0 train: record 17 is damaged") as caught:
        Tfds("jaxeco_tiny", "train", data_dir=tiny).open()
    assert str(shard) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.suffix for path in (tmp_path / "cache" / "data").iterdir()] == [".lock"]
    assert len(Tfds("jaxeco_tiny", "test", data_dir=tiny).open()) == 7


def test_incomplete_data_sets_are_named(tiny):
    shard = next(tiny.rglob("*train.array_record*"))
    shard.unlink()
    with pytest.raises(UserError, match=f"not complete: .*{shard.name}"):
        Tfds("jaxeco_tiny", "train", data_dir=tiny).open()
    (tiny / "jaxeco_tiny/1.0.0/dataset_info.json").unlink()
    with pytest.raises(UserError, match="dataset_info"):
        Tfds("jaxeco_tiny", "train", data_dir=tiny).open()


def test_other_file_formats_are_refused(tiny):
    info = tiny / "jaxeco_tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for shard in tiny.rglob("*.array_record*"):
        shard.rename(str(shard).replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"tfrecord.*no random access"):
        Tfds("jaxeco_tiny:1.0.0", "train", data_dir=tiny).open()


def test_processes_that_open_at_once_agree_and_never_load_tensorflow(tiny):
    script = (
        "import sys; from jaxeco.data.tfds import Tfds;"
        "assert 'tensorflow_datasets' not in sys.modules;"  # it is slow to import
        "d = Tfds('jaxeco_tiny:1.0.0', 'train', data_dir=sys.argv[1]).open();"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules;"
        "print(int(d.fields['x'].sum()), d.fingerprint)"
    )
    command = [sys.executable, "-c", script, str(tiny)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs, errors = zip(*(process.communicate() for process in running), strict=True)
    assert [process.returncode for process in running] == [0, 0], errors
    assert not any("OpenCV" in error for error in errors)
    total = sum(int(tiny_image(i).sum()) for i in TRAIN)
    assert outputs[0] == outputs[1] and outputs[0].startswith(f"{total} ")


# Real data.


def test_real_cifar10(monkeypatch):
    if not REAL or not (Path(REAL) / "cifar10").is_dir():
        pytest.skip("$TFDS_DATA_DIR holds no cifar10")
    monkeypatch.setenv("TFDS_DATA_DIR", REAL)
    test = Tfds("cifar10", "test").open()
    begun = time.monotonic()
    again = Tfds("cifar10", "test").open()
    assert time.monotonic() - begun < 2
    assert again.fingerprint == test.fingerprint
    assert test.fields["x"].shape == (10000, 32, 32, 3) and test.classes == CLASSES
    np.testing.assert_array_equal(np.bincount(test.fields["y"]), [1000] * 10)
    with pytest.raises(UserError, match=r"train \(50000\), test \(10000\)"):
        Tfds("cifar10", "train[:50001]").open()
