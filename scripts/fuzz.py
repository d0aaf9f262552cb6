"""Throws damaged and hostile files at everything that reads files from elsewhere.

    python scripts/fuzz.py                        # every target, 10,000 cases each
    python scripts/fuzz.py tfds --cases 1000

A case may be accepted, or refused by UserError or ValueError. It fails if it raises anything else,
takes too long or too much memory, crashes, or does what loading data must not do: run code, start a
process, unpickle, connect, read outside its own folder or write outside the temporary one. The last
of these is watched by an audit hook of the interpreter (`Watch`), which sees what Python code does,
in any thread; what the C++ and Rust libraries do by themselves it does not see.

Each target runs in a process of its own. Exit status 0 if no case failed, else 1.
"""

import argparse
import ast
import base64
import collections
import contextlib
import copy
import dataclasses
import faulthandler
import io
import json
import os
import resource
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    from jaxeco import runtime

    runtime.configure()

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from jaxeco import config
from jaxeco.description import describe, flatten
from jaxeco.errors import UserError

REFUSALS = (UserError, ValueError)
SECONDS = 20.0  # that a case may take
MEMORY = 8 * 2**30  # that a target may take, in bytes of address space beyond its start

# the cases; what reads one, and raises one of REFUSALS where it refuses; one that must be accepted
Target = tuple[st.SearchStrategy[Any], Callable[[Any], Any], Any]


# What loading must not do


class Trespass(BaseException):
    """Not an Exception, so that nothing between here and the test takes it for a damaged file."""


class Watch:
    """While armed, fails on what loading data has no business to do."""

    # ast parses literals, as in the header of an array, and runs none; the others make code of what
    # our own code says: of annotations, and methods of dataclasses and named tuples
    BUILDERS = tuple(m.__file__ for m in (ast, typing, dataclasses, collections, config))
    NEVER = (
        *("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
        *("os.forkpty", "pty.spawn", "pickle.find_class", "ctypes.dlopen", "code.__new__"),
        *("socket.connect", "socket.getaddrinfo", "urllib.Request", "webbrowser.open"),
    )
    CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
    CHANGES += ("os.truncate", "os.chmod", "os.chown", "shutil.rmtree", "shutil.move")

    def __init__(self) -> None:
        self.armed, self.folder, self.found = False, "", []
        self.trusted: tuple[str, ...] = ()
        places = {sys.prefix, sys.base_prefix, str(ROOT / "jaxeco"), str(ROOT / "scripts")}
        places |= set(sysconfig.get_paths().values()) | {p for p in sys.path if "-packages" in p}
        self.installed = tuple(os.path.realpath(place) + os.sep for place in places)
        # a system's own description of itself, of time zones and of types of files
        self.system = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/", "/usr/share/")
        sys.addaudithook(self.hook)  # cannot be taken away again; does nothing while not armed

    @contextlib.contextmanager
    def over(self, folder: Path, trusted: tuple[Path, ...] = ()) -> Iterator[None]:
        """Within: files of `folder` may be read and written; of code only `trusted` may run."""
        self.folder = os.path.realpath(folder) + os.sep
        self.trusted = tuple(os.path.realpath(path) for path in trusted)
        self.found, self.armed = [], True
        try:
            yield
        finally:
            self.armed = False
        if self.found:  # also where something swallowed it, or a thread met it
            raise Trespass("; ".join(dict.fromkeys(self.found)))

    def hook(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event in self.NEVER:
            self.object(f"{event} {args[:2]!r}"[:200])
        elif event in ("exec", "compile"):
            origin = args[0].co_filename if event == "exec" else args[1]
            if not self.known(origin) and sys._getframe(1).f_code.co_filename not in self.BUILDERS:
                self.object(f"{event} {origin} {args[0]!r}"[:200])
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            mode, flags = args[1] or "", args[2] or 0
            writes = set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            path = os.path.realpath(os.fsdecode(args[0]))
            inside = path.startswith(self.folder) or path + os.sep == self.folder
            if not inside and not (path == "/dev/null" or (self.known(path) and not writes)):
                self.object(f"opens {path} to {'write' if writes else 'read'}")
        elif event in self.CHANGES and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            relative = not os.path.isabs(os.fsdecode(args[0]))  # to an open folder, as rmtree does
            if not relative and not path.startswith(self.folder):
                self.object(f"{event} {path}")

    def known(self, name: Any) -> bool:
        """Whether a file is the system's, Python's, a library's, ours, or trusted by a target."""
        if not isinstance(name, str):
            return False
        path = os.path.realpath(name)
        places = (*self.installed, *self.system)
        return name.startswith("<frozen") or path.startswith(places) or path in self.trusted

    def object(self, what: str) -> None:
        self.found.append(what)
        raise Trespass(what)


_watch: list[Watch] = []


def watch() -> Watch:
    """The one of this process."""
    if not _watch:
        _watch.append(Watch())
    return _watch[0]


# What is thrown

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan")]),
)
RUN = "__import__('os').system('id')"
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["../../secret", "/etc/passwd", "planted.Feature", "<i4", "|O", "\0", "a/b", RUN]
    ),
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
DEEP = b"[" * 100_000  # deeper than a parser that calls itself can go


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything within nested dicts and lists."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document[:50])
    for key, child in items:
        yield document, key
        yield from _places(child)


@st.composite
def altered(draw: Any, document: Any) -> Any:
    """`document` with one to three of its parts replaced, removed, renamed or exchanged."""
    whole = [copy.deepcopy(document)]
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        places = list(_places(whole))
        parent, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(["alike", "alike", "replace", "remove", "rename", "copy"])):
            case "remove" if parent is not whole:
                del parent[key]
            case "rename" if isinstance(parent, dict):
                parent[draw(TEXTS)] = parent.pop(key)
            case "copy":
                other, name = places[draw(st.integers(0, len(places) - 1))]
                parent[key] = copy.deepcopy(other[name]) if other is not whole else None
            case "alike" if isinstance(parent[key], str):
                parent[key] = draw(TEXTS)
            case "alike" if isinstance(parent[key], int | float):
                parent[key] = draw(NUMBERS)
            case _:
                parent[key] = draw(JUNK)
    return whole[0]


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """`data` with bytes overwritten, taken out, put in or cut off, most often near its start."""
    for _ in range(draw(st.integers(1, 3))):
        near = min(len(data), 200)
        at = draw(st.one_of(st.integers(0, near), st.integers(0, len(data))))
        piece = draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8)))
        match draw(st.sampled_from(["over", "over", "in", "out", "cut"])):
            case "over":
                data = data[:at] + piece + data[at + len(piece) :]
            case "in":
                data = data[:at] + piece + data[at:]
            case "out":
                data = data[:at] + data[at + len(piece) :]
            case "cut":
                data = data[:at]
    return data


def often(weights: dict[st.SearchStrategy[Any], int]) -> st.SearchStrategy[Any]:
    """One of several, each as often as its weight says."""
    return st.sampled_from([s for s, weight in weights.items() for _ in range(weight)]).flatmap(
        lambda strategy: strategy
    )


def texts_of(document: Any) -> st.SearchStrategy[bytes]:
    """JSON like `document`, and what was JSON once."""
    raw = json.dumps(document).encode()
    dumped = altered(document).map(lambda d: json.dumps(d).encode())
    lost = st.sampled_from([b"", DEEP, b"null", b"\xff"])
    return often({dumped: 8, damaged(raw): 2, lost: 1})


# Targets: each makes good files in a folder, and gives what may become of them and who reads it


def overrides(folder: Path) -> Target:
    """Words of the command line."""
    path = ROOT / "experiments" / "digits_mlp.py"
    flat = [*flatten(describe(config.load(path).experiment)), "lr", "widths", "mesh"]
    keys = st.one_of(st.sampled_from(flat), st.sampled_from(flat).flatmap(_misspelt), TEXTS)
    values = st.one_of(
        NUMBERS.map(str),
        TEXTS,
        st.sampled_from(["none", "true", "1,2,3", "(1,", "data:2,fsdp:0", "9" * 5000, "1e999", ""]),
        st.text("0123456789,.-+e_ ()[]:", max_size=12),
    )
    word = st.one_of(st.tuples(keys, values).map("=".join), TEXTS)
    hints = st.sampled_from(
        [int, float, bool, str, int | None, tuple[int, ...], tuple[float, str], str | int | None]
    )
    return (
        st.one_of(st.lists(word, min_size=1, max_size=3), st.tuples(values, hints)),
        lambda case: (
            config.load(path, case) if isinstance(case, list) else config.parse(*case, "name")
        ),
        ["lr=0.1", "optimizer.weight_decay=0", "mesh=data:2,fsdp:2"],
    )


@st.composite
def _misspelt(draw: Any, key: str) -> str:
    parts = key.split(".")
    at = draw(st.integers(0, len(parts) - 1))
    parts[at] = draw(st.sampled_from(["0", "99", "-1", "__class__", "", parts[at] + "s", "apply"]))
    return ".".join(parts)


def checkpoints(folder: Path) -> Target:
    """A checkpoint whose files are changed, and whose checksums are right for them or are not."""
    import hashlib

    import jax

    from jaxeco.checkpoint import Checkpoints, load

    state = {"params": {"w": jax.numpy.ones((4, 3))}, "key": jax.random.key(0)}
    with Checkpoints(folder, description={"batch": 4}, best="loss", best_mode="min") as saved:
        saved.save(state | {"step": jax.numpy.int32(7)}, {"loss": 1.5}, step=7)
    good = {p: p.read_bytes() for p in sorted((folder / "7").rglob("*")) if p.is_file()}
    about, sums = folder / "7" / "about.json", folder / "7" / "checksums.json"
    arrays = [path for path in good if path not in (about, sums)]
    abstract = {"params": {"w": jax.ShapeDtypeStruct((4, 3), np.float32)}}
    case = st.one_of(
        st.tuples(st.just(about), texts_of(json.loads(good[about])), st.booleans()),
        st.tuples(st.just(sums), texts_of(json.loads(good[sums])), st.just(False)),
        st.sampled_from(arrays).flatmap(
            lambda path: st.tuples(st.just(path), damaged(good[path]), st.just(True))
        ),
    )

    def read(case: tuple[Path, bytes, bool]) -> None:
        path, data, vouched = case
        try:
            path.write_bytes(data)
            if vouched:
                known = json.loads(good[sums])
                known[path.relative_to(folder / "7").as_posix()] = hashlib.sha256(data).hexdigest()
                sums.write_text(json.dumps(known))
            load(folder, which=None)
            load(folder, abstract)
        finally:
            for changed in {path, sums}:
                changed.write_bytes(good[changed])

    return case, read, (about, good[about], True)


def tokenizers(folder: Path) -> Target:
    """Files of tokenizers: the three kinds of ours, Hugging Face's and SentencePiece's."""
    import sentencepiece
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    from jaxeco.data.tokenizers import load_tokenizer

    vocab = {piece: i for i, piece in enumerate(["<unk>", "a", "b", "ab", "</s>"])}
    byte_pairs = Library(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>"))
    byte_pairs.pre_tokenizer, byte_pairs.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    unigram = Library(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("x", "a")])
    pieces = Library(models.WordPiece(vocab | {"##a": 5}, unk_token="<unk>"))
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab abc"] * 20), model_writer=trained, vocab_size=9,
        minloglevel=3,
    )  # fmt: skip
    model = trained.getvalue()
    documents = [
        {"jaxeco_tokenizer": "bytes"},
        {"jaxeco_tokenizer": "characters", "alphabet": "ab", "specials": True},
        {"jaxeco_tokenizer": "bpe", "merges": [[100, 101], [259, 102]]},
        *(json.loads(library.to_str()) for library in (byte_pairs, unigram, pieces)),
    ]
    ours = {"jaxeco_tokenizer": "sentencepiece"}
    inside = damaged(model).map(
        lambda data: json.dumps(ours | {"model": base64.b64encode(data).decode()}).encode()
    )
    described = st.sampled_from(documents).flatmap(texts_of)
    case = often({described: 8, damaged(model): 1, inside: 1})

    def read(case: tuple[bytes, str]) -> None:
        data, text = case
        path = folder / "tokenizer.json"
        path.write_bytes(data)
        tokenizer = load_tokenizer(path)
        tokenizer.token_bytes()
        tokenizer.decode(tokenizer.encode(text))

    texts = st.sampled_from(["", "abba", "ab ba\0é\u2581"])
    return st.tuples(case, texts), read, (json.dumps(documents[3]).encode(), "abba")


def jsonl(folder: Path) -> Target:
    """Text: lines of JSON with labels, and plain files."""
    from jaxeco.data import JsonLines, TextFiles

    line = st.one_of(
        altered({"text": "a", "label": "b"}).map(lambda d: json.dumps(d).encode()),
        st.sampled_from([b'{"text": "a", "label": 1}', b'{"text": "\\ud800", "label": "b"}', DEEP]),
        st.text(max_size=9).map(lambda text: json.dumps({"text": text, "label": "c"}).encode()),
        st.binary(max_size=12),
    )

    path = folder / "texts.jsonl"
    sources = [
        TextFiles(str(path)),
        JsonLines(str(path)),
        JsonLines(str(path), label="label", split="train[:90%]"),
    ]

    def read(case: tuple[bytes, Any]) -> None:
        data, source = case
        path.write_bytes(data)
        list(source.documents())

    lines = st.lists(line, min_size=1, max_size=4).map(b"\n".join)
    good = b"\n".join(b'{"text": "text %d", "label": "b"}' % i for i in range(20))
    return st.tuples(lines, st.sampled_from(sources)), read, (good, sources[2])


def cache(folder: Path) -> Target:
    """An entry of the cache: meta.json, and arrays that it vouches for or does not."""
    from jaxeco.data.cache import _description, cached

    x, y = np.arange(12, dtype=np.uint8).reshape(4, 3), np.arange(4, dtype=np.int32)
    layout = {"x": ((4, 3), x.dtype), "y": ((4,), y.dtype)}
    source = ["a file", 17]
    entry = folder / "data" / "entry"

    def opened() -> dict[str, np.ndarray]:
        return cached("entry", source, layout, lambda: iter([{"x": x, "y": y}]))[0]

    opened()
    good = {path: path.read_bytes() for path in entry.iterdir()}
    meta, array = entry / "meta.json", entry / "x.npy"
    np.save(folder / "secret.npy", x)
    others = [
        *(np.zeros(shape, np.float64) for shape in ((), (0,), (3,), (4, 3))),
        np.zeros((4, 3), "S0"),
        np.zeros(4, [("a", "u1"), ("b", "f4")]),
        np.asfortranarray(x),
    ]
    headers = st.sampled_from([good[array], *map(_npy, others)])
    objects = _npy(np.array([{}, None], object), allow_pickle=True)

    case = st.one_of(
        st.tuples(texts_of(json.loads(good[meta])), st.just(good[array]), st.booleans()),
        st.tuples(
            st.just(good[meta]),
            st.one_of(headers, headers.flatmap(damaged), st.just(objects), damaged(objects)),
            st.booleans(),
        ),
    )

    def read(case: tuple[bytes, bytes, bool]) -> None:
        meta_data, array_data, vouched = case
        entry.mkdir(exist_ok=True)
        for path, data in (good | {meta: meta_data, array: array_data}).items():
            path.write_bytes(data)
        if vouched:
            with contextlib.suppress(Exception):
                known = json.loads(meta_data)
                known["fields"]["x"] = _description(np.load(array, mmap_mode="r"))
                meta.write_text(json.dumps(known))
        arrays = opened()
        for name, (shape, dtype) in layout.items():
            if (arrays[name].shape, arrays[name].dtype) != (shape, dtype):
                raise AssertionError(f"{name} is {arrays[name].dtype}{arrays[name].shape}")

    return case, read, (good[meta], good[array], False)


def _npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def tfds(folder: Path) -> Target:
    """Sets that tfds has prepared: what describes them, and the records."""
    import tensorflow_datasets
    from tensorflow_datasets.core import registered

    from jaxeco.data import Tfds, TfdsText
    from jaxeco.data.prepare import prepare, without_tensorflow

    features = tensorflow_datasets.features
    with without_tensorflow(), registered.skip_registration():

        class Tiny(tensorflow_datasets.core.GeneratorBasedBuilder):
            VERSION = tensorflow_datasets.core.Version("1.0.0")

            def _info(self) -> Any:
                fields = {
                    "image": features.Image(shape=(2, 2, 1)),
                    "label": features.ClassLabel(names=["a", "b"]),
                    "text": features.Text(),
                }
                features_dict = features.FeaturesDict(fields)
                return tensorflow_datasets.core.DatasetInfo(builder=self, features=features_dict)

            def _split_generators(self, manager: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                for i in range(3):
                    image = np.full((2, 2, 1), i, np.uint8)
                    yield i, {"image": image, "label": i % 2, "text": "ab" * i}

        Tiny.name = "tiny"
        prepare(Tiny(data_dir=folder))
    here = folder / "tiny" / "1.0.0"
    # a module that is there to be imported, as in a folder where somebody works
    (folder / "planted.py").write_text("raise SystemExit('imported')\n")
    sys.path.append(str(folder))
    good = {path: path.read_bytes() for path in here.iterdir()}
    described = [path for path in good if path.suffix == ".json"]
    records = [path for path in good if "array_record" in path.name]
    case = st.one_of(
        st.sampled_from(described).flatmap(
            lambda path: st.tuples(st.just(path), texts_of(json.loads(good[path])))
        ),
        st.sampled_from([p for p in good if p not in described]).flatmap(
            lambda path: st.tuples(st.just(path), damaged(good[path]))
        ),
    )
    assert described and records

    def read(case: tuple[Path, bytes]) -> None:
        path, data = case
        try:
            path.write_bytes(data)
            opened = Tfds("tiny", "train", data_dir=folder).open()
            rows = np.arange(len(opened))
            [field[rows] for field in opened.fields.values()]
            list(TfdsText("tiny", "train", label="label", data_dir=folder).documents())
        finally:
            path.write_bytes(good[path])

    return case, read, (described[0], good[described[0]])


def images(folder: Path) -> Target:
    """Files of images, of the five kinds that a folder may hold."""
    from PIL import Image

    from jaxeco.data import ImageFolder

    (folder / "images" / "a").mkdir(parents=True)
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    good = {}
    for kind in ("png", "jpg", "bmp", "gif", "webp"):
        file = io.BytesIO()
        picture.save(file, {"jpg": "jpeg"}.get(kind, kind))
        good[kind] = file.getvalue()
    case = st.sampled_from(list(good)).flatmap(
        lambda kind: st.tuples(st.just(kind), damaged(good[kind]))
    )

    def read(case: tuple[str, bytes]) -> None:
        kind, data = case
        path = folder / "images" / "a" / f"one.{kind}"
        try:
            path.write_bytes(data)
            opened = ImageFolder(str(folder / "images"), 4, split="all").open()
            opened.fields["x"][np.arange(1)]
        finally:
            path.unlink()

    return case, read, ("png", good["png"])


def safetensors(folder: Path) -> Target:
    """A file of weights."""
    from jaxeco import trees

    path = folder / "weights.safetensors"
    trees.write(path, {"a": np.ones((2, 3), np.float32), "b": np.arange(4)}, {"format": "jaxeco"})
    good = path.read_bytes()
    (size,) = struct.unpack("<Q", good[:8])
    header, numbers = json.loads(good[8 : 8 + size]), good[8 + size :]

    def framed(header: bytes) -> bytes:
        return struct.pack("<Q", len(header)) + header + numbers

    def read(data: bytes) -> None:
        path.write_bytes(data)
        trees.read(path)

    return st.one_of(texts_of(header).map(framed), damaged(good)), read, good


def records(folder: Path) -> Target:
    """A folder of array_record shards of ours."""
    from jaxeco.data.records import ArrayRecords, write_records

    here = folder / "records"
    image = io.BytesIO()
    from PIL import Image

    Image.fromarray(np.zeros((3, 3), np.uint8)).save(image, "PNG")
    write_records(
        here,
        ({"x": image.getvalue(), "y": np.int32(i), "z": np.ones(2, np.float32)} for i in range(3)),
        classes=("a", "b", "c"),
    )
    good = {path: path.read_bytes() for path in here.iterdir()}
    features = here / "features.json"
    (shard,) = [path for path in good if path != features]
    case = st.one_of(
        st.tuples(st.just(features), texts_of(json.loads(good[features]))),
        st.tuples(st.just(shard), damaged(good[shard])),
    )

    def read(case: tuple[Path, bytes]) -> None:
        path, data = case
        try:
            path.write_bytes(data)
            if path == shard:  # whose length the description gives
                known = json.loads(good[features])
                known["shards"][0]["bytes"] = len(data)
                features.write_text(json.dumps(known))
            opened = ArrayRecords(str(here)).open()
            rows = np.arange(min(len(opened), 4))
            [field[rows] for field in opened.fields.values()]
        finally:
            for changed in {path, features}:
                changed.write_bytes(good[changed])

    return case, read, (shard, good[shard])


TARGETS: dict[str, Callable[[Path], Target]] = {
    "overrides": overrides,
    "checkpoints": checkpoints,
    "tokenizers": tokenizers,
    "jsonl": jsonl,
    "cache": cache,
    "tfds": tfds,
    "images": images,
    "safetensors": safetensors,
    "records": records,
}


# Carrying it out


def fuzz(name: str, folder: Path, cases: int, start: int = 0) -> Counter[str]:
    """Tries at least `cases` cases; returns how many were accepted and refused.

    Args:
      folder: empty; JAXECO_CACHE and the system's temporary files should lie in it.
      start: seed of the cases.

    Raises:
      BaseException: what the simplest case that fails came to; hypothesis prints the case.
    """
    strategy, read, good = TARGETS[name](folder)
    counts: Counter[str] = Counter()
    trusted = tuple((ROOT / "experiments").glob("*.py")) if name == "overrides" else ()

    def attempt(case: Any) -> None:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            with watch().over(folder, trusted), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read(case)
                    counts["accepted"] += 1
                except REFUSALS:
                    counts["refused"] += 1
        finally:
            faulthandler.cancel_dump_traceback_later()

    attempt(good)
    assert counts == {"accepted": 1}, f"{name}: what nobody has damaged was refused"
    for round_ in range(100):
        if (left := cases - counts.total()) <= 0:
            break
        tried = settings(
            max_examples=left,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )(given(strategy)(attempt))
        seed(start + round_)(tried)()
    return counts


def child(name: str, cases: int, start: int) -> int:
    """Fuzzes one target in this process, under a limit of memory."""
    sys.dont_write_bytecode = True
    faulthandler.enable()
    with tempfile.TemporaryDirectory(prefix="jaxeco-fuzz-") as temporary:
        os.environ["JAXECO_CACHE"] = os.environ["TMPDIR"] = tempfile.tempdir = temporary
        import jax

        jax.devices()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        counts = fuzz(name, Path(temporary), cases, start)
    print(json.dumps(counts))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    parser.add_argument("--cases", type=int, default=10_000, help="at least, for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target {unknown.pop()!r}: expected some of {', '.join(TARGETS)}")
    if options.child:
        return child(options.targets[0], options.cases, options.seed)
    failed = 0
    for name in options.targets or TARGETS:
        began = time.monotonic()
        words = [name, "--cases", str(options.cases), "--seed", str(options.seed), "--child"]
        done = subprocess.run(
            [sys.executable, __file__, *words], capture_output=True, text=True, errors="replace"
        )
        seconds = time.monotonic() - began
        if done.returncode:
            failed += 1
            said = "\n".join(line[:300] for line in done.stderr.splitlines()[-60:])
            print(f"{name}: FAILED, status {done.returncode}\n{said}", flush=True)
            continue
        counts = Counter(json.loads(done.stdout.splitlines()[-1]))
        print(
            f"{name}: {counts.total():,} cases, {counts['accepted']:,} accepted,"
            f" {counts['refused']:,} refused, none failed; {seconds:.0f} s",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
