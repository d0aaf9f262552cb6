"""Files from elsewhere: a few cases of each property of scripts/fuzz.py, and attacks by hand."""

import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jaxeco.errors import UserError

SCRIPT = Path(__file__).parent.parent / "scripts" / "fuzz.py"
CASES = 20


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXECO_CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_every_target_is_tried(fuzz) -> None:
    assert set(fuzz.TARGETS) == set(TARGETS)


TARGETS = (
    *("overrides", "checkpoints", "tokenizers", "jsonl"),
    *("cache", "tfds", "images", "safetensors", "records"),
)


@pytest.mark.parametrize("target", TARGETS)
def test_errors_only(fuzz, folder, target) -> None:
    counts = fuzz.fuzz(target, folder, CASES, start=5)
    assert counts["accepted"] >= 1 and counts.total() >= CASES


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    "act",
    [
        lambda folder: exec("x = 1"),
        lambda folder: eval("1 + 1"),
        lambda folder: os.system("true"),
        lambda folder: subprocess.run(["true"]),
        lambda folder: pickle.loads(pickle.dumps(Payload())),
        lambda folder: np.load(folder / "objects.npy", allow_pickle=True),
        lambda folder: (folder.parent / "outside").write_text("x"),
        lambda folder: (folder.parent / "secret").read_text(),
        lambda folder: (folder.parent / "secret").unlink(),
        lambda folder: (folder.parent / "secret").rename(folder / "inside"),
        lambda folder: __import__("planted_by_test_fuzz"),
    ],
)
def test_the_watch_sees_it(fuzz, folder, act) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (folder / "secret").write_text("secret")
    np.save(inner / "objects.npy", np.array([Payload()], object), allow_pickle=True)
    (inner / "planted_by_test_fuzz.py").write_text("")
    sys.path.append(str(inner))
    with pytest.raises(fuzz.Trespass), fuzz.watch().over(inner):
        try:
            act(inner)
        except BaseException:  # as a reader might that takes anything for damage
            pass
    assert (folder / "secret").exists()


def test_the_watch_lets_a_reader_work_in_its_folder(fuzz, folder) -> None:
    with fuzz.watch().over(folder):
        np.save(folder / "a.npy", np.arange(3))
        np.load(folder / "a.npy", mmap_mode="r")
        (folder / "a.npy").rename(folder / "b.npy")
        (folder / "b.npy").unlink()


def test_a_data_set_names_no_class_of_its_own(fuzz, folder) -> None:
    _, read, (path, _) = fuzz.tfds(folder)
    features = path.with_name("features.json")
    described = json.loads(features.read_text())
    described["featuresDict"]["features"]["label"]["pythonClassName"] = "planted.Feature"
    with pytest.raises(UserError, match=r"names planted\.Feature, which is no feature of tfds"):
        read((features, json.dumps(described).encode()))


def test_archives_stay_in_their_folder(folder) -> None:
    """tfds' extractor, through which every download goes."""
    from tensorflow_datasets.core.download import extractor, resource

    from jaxeco.data.prepare import without_tensorflow

    names = ["good.txt", "../evil.txt", str(folder / "evil.txt"), "a/../../evil.txt", "a/b.txt"]
    with tarfile.open(folder / "x.tar", "w") as tar, zipfile.ZipFile(folder / "x.zip", "w") as zip_:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 2
            tar.addfile(entry, io.BytesIO(b"hi"))
            zip_.writestr(name, "hi")
    before = set(folder.iterdir())
    for kind in ("tar", "zip"):
        target, extract = folder / f"from-{kind}", extractor.get_extractor()
        with without_tensorflow(), extract.tqdm():
            extract.extract(
                folder / f"x.{kind}", resource.ExtractMethod[kind.upper()], target
            ).get()
        files = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
        assert files == {"good.txt", "a/b.txt"}
    assert set(folder.iterdir()) - before == {folder / "from-tar", folder / "from-zip"}
    assert not list(folder.parent.glob("evil*"))
