"""Text by documents: of tfds, of files, and the English that comes with every Python.

A text source is a frozen description; `documents()` finds the text, and iterating reads it, one
document at a time. N counts documents. A tenth of the documents of files and of `PydocTopics`, and
a fifth of `StdlibDocstrings`, is for "test": those with the largest hash, of a file's name or of a
text. So a split needs no list, and a document that is added or removed hardly moves the others.
"""

import ast
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxeco.data.prepare import without_tensorflow
from jaxeco.data.sources import _check_split, _positions
from jaxeco.data.tfds import Records, check_label, feature, listed, opened, title_of
from jaxeco.errors import UserError

# The fingerprint of a corpus up to this size covers its content; of a larger one, its files' names,
# sizes and, outside tfds, times.
HASHED_BYTES = 64 * 2**20

# In every CPython, whatever a distribution splits off; each with 75 docstrings or more.
PACKAGES = (
    "asyncio", "email", "http", "importlib", "ipaddress", "logging",
    "mailbox", "multiprocessing", "tarfile", "unittest", "urllib", "xml",
)  # fmt: skip
_SHORTEST_DOCSTRING = 40  # characters


@dataclass(frozen=True, eq=False)
class Documents:
    """What every text source opens to; iterating reads the documents, as often as one likes.

    Attributes:
      name: the text as a person would name it, e.g. "imdb_reviews/plain_text:1.0.0 train (tfds)".
      fingerprint: differs whenever the documents, their order or their labels differ.
      read: begins an iteration. Iterating raises UserError where a document cannot be read.
      labels: i32[N], in the documents' order; None for text without labels.
      classes: the labels' names, () if there are none.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[str]]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return self.read()


class TextSource(Protocol):
    """A frozen description of text; `documents` finds (or first prepares) it."""

    def documents(self) -> Documents: ...


@dataclass(frozen=True)
class Texts:
    """Several text sources, one after the other, as one without labels."""

    sources: tuple[TextSource, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("Texts.sources: got none, expected one text source or more")

    def documents(self) -> Documents:
        parts = [source.documents() for source in self.sources]
        prints = json.dumps([part.fingerprint for part in parts])
        return Documents(
            name=" + ".join(part.name for part in parts),
            fingerprint=hashlib.blake2b(prints.encode(), digest_size=16).hexdigest(),
            read=lambda: chain.from_iterable(parts),
        )


@dataclass(frozen=True)
class TfdsText:
    """Text of tensorflow-datasets, without TensorFlow; prepared on first use, as by `Tfds`.

    Documents are read from the records whenever they are iterated over, 64 at a time.

    Attributes:
      name: as tfds spells it: "tiny_shakespeare", "imdb_reviews", "lm1b:1.1.0".
      split: as tfds spells it: "train", "train[:45000]", "train[:10%]+train[-10%:]".
      text: the feature that holds the text.
      label: the label feature, a class or an integer from 0 on; None for text without labels.
      data_dir: holds prepared data sets; None: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    """

    name: str
    split: str
    text: str = "text"
    label: str | None = None
    data_dir: str | os.PathLike[str] | None = None

    def documents(self) -> Documents:
        """Finds the text, preparing it where that has not been done, and reads the labels.

        Raises:
          UserError: unknown name, feature or split; no network; damaged or unsuitable data.
        """
        with without_tensorflow():
            builder, parts = opened(self.name, self.split, self.data_dir, self._check)
            files = {split: listed(builder, split) for split, _, _ in parts}
            ranges = [(Records(builder, split), start, stop) for split, start, stop in parts]

        def read() -> Iterator[str]:
            return _decoded(ranges, lambda values: values[self.text].bytes_list.value[0].decode())

        title = f"{title_of(builder)} {self.split} (tfds)"
        labels, classes = self._labels(builder, ranges, title)
        if sum(size for stats, _ in files.values() for _, size, _ in stats) <= HASHED_BYTES:
            content: Iterable[bytes] = (text.encode() for text in read())
        else:
            known = [[[file[:2] for file in stats], texts] for stats, texts in files.values()]
            content = [json.dumps([known, parts, self.text, self.label]).encode()]
        return Documents(title, _digest(content, labels, classes), read, labels, classes)

    def _labels(
        self, builder: Any, ranges: Sequence[tuple[Records, int, int]], title: str
    ) -> tuple[np.ndarray | None, tuple[str, ...]]:
        if self.label is None:
            return None, ()
        numbers = _decoded(ranges, lambda values: values[self.label].int64_list.value[0])
        labels_N = np.fromiter(numbers, np.int32)
        if labels_N.min() < 0:
            raise UserError(
                f"{title}: {int((labels_N < 0).sum())} documents have no {self.label} (it is "
                f"{labels_N.min()}); leave label out, or choose another split"
            )
        return labels_N, tuple(getattr(feature(builder, self.label), "names", ()))

    def _check(self, builder: Any) -> None:
        text = feature(builder, self.text)
        if text.shape != () or text.np_dtype != np.object_:
            raise UserError(
                f"text must be a feature of text, but {title_of(builder)}'s {self.text!r} is {text}"
            )
        if self.label is not None:
            check_label(builder, "label", self.label)


def _decoded(
    ranges: Sequence[tuple[Records, int, int]], decode: Callable[[Any], Any]
) -> Iterator[Any]:
    for records, start, stop in ranges:
        for first in range(start, stop, 64):
            yield from records.decoded(list(range(first, min(first + 64, stop))), decode)


@dataclass(frozen=True)
class TextFiles:
    """Text files, UTF-8; each is a document, sorted by name. Empty files are left out.

    A single file cannot be split by documents: its text is cut instead, at the starts of lines,
    "train" being the first nine tenths of its bytes. Slices then count bytes.

    Text is kept as it is: newlines, byte order marks.

    Attributes:
      pattern: a folder (all its .txt files, at any depth), a file, or a glob such as
        "~/notes/**/*.md", in which ** stands for folders at any depth. Names that begin with a dot
        are not found.
      split: "train", "test" or "all", or a part such as "train[:90%]" or "test[:1000]".
    """

    pattern: str
    split: str = "all"

    def __post_init__(self) -> None:
        _check_split("TextFiles", self.split)

    def documents(self) -> Documents:
        """Lists the files.

        Up to HASHED_BYTES the fingerprint covers what the files hold; beyond, their names, sizes
        and times of modification: copy with times kept (`cp -a`) if a run is to go on elsewhere.

        Raises:
          UserError: if there is no text; on iterating, if a file cannot be read or is not UTF-8.
        """
        files = _files(self.pattern, ".txt")
        sizes = [path.stat().st_size for path in files.values()]
        filled = [name for name, size in zip(files, sizes, strict=True) if size]
        if not filled:
            raise UserError(f"{next(iter(files.values()))}: the file is empty; expected text")
        if len(filled) == 1:
            path = files[filled[0]]
            parts = [(path, *_lines_between(path, self.split))]
        else:
            chosen = _dealt(map(os.fsencode, filled), self.split)
            paths = [files[filled[i]] for i in chosen]
            parts = [(path, 0, path.stat().st_size) for path in paths]
        if sum(stop - start for _, start, stop in parts) <= HASHED_BYTES:
            content: Iterable[bytes] = (_bytes(*part) for part in parts)
        else:
            stats = [(p.name, start, stop, p.stat().st_mtime_ns) for p, start, stop in parts]
            content = [os.fsencode(repr(stats))]
        name = f"{self.pattern} {self.split} (text files)"
        return Documents(name, _digest(content), lambda: (_text(*part) for part in parts))


def _files(pattern: str, suffix: str) -> dict[str, Path]:
    """The files that a pattern names, by their names below its fixed part, sorted."""
    pattern = os.path.expanduser(pattern)
    root = os.path.dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0])
    if os.path.isfile(pattern):
        found, root = [pattern], os.path.dirname(pattern)
    elif os.path.isdir(pattern):
        found = glob.glob(os.path.join(glob.escape(pattern), "**", f"*{suffix}"), recursive=True)
        root = pattern
    else:
        found = glob.glob(pattern, recursive=True)
    files = {os.path.relpath(path, root or "."): Path(path) for path in found}
    files = {name: files[name] for name in sorted(files) if files[name].is_file()}
    if not files:
        raise UserError(
            f"{pattern}: no such files; expected a file, a folder of {suffix} files, or a pattern "
            f"such as texts/**/*{suffix}"
        )
    return files


def _lines_between(path: Path, split: str) -> tuple[int, int]:
    """The bytes of a file that `split` names, from the start of a line to the start of another."""
    size = path.stat().st_size
    part = _positions(split, size, size * 9 // 10)
    with path.open("rb") as file:

        def line_from(position: int) -> int:
            if 0 < position < size:
                file.seek(position - 1)
                file.readline()
                return file.tell()
            return position

        start, stop = line_from(part.start), line_from(part.stop)
    if start == stop:
        raise UserError(
            f"{path}: no line begins in the part {split!r} of this only file; give several files, "
            "or one with shorter lines"
        )
    return start, stop


def _bytes(path: Path, start: int, stop: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _text(path: Path, start: int, stop: int) -> str:
    data = _bytes(path, start, stop)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {start + error.start} (0x{data[error.start]:02x}) is not UTF-8 text; "
            "convert the file (iconv -f LATIN1 -t UTF-8 does so for Latin-1), or leave it out"
        ) from error


@dataclass(frozen=True)
class JsonLines:
    """Documents as lines of JSON objects: {"text": "...", "label": "..."}. Blank lines are skipped.

    Attributes:
      path: a file, a folder (all its .jsonl files) or a glob, as in `TextFiles`.
      text: the key of the text.
      label: the key of the label, a string or an integer; None for text without labels.
      split: "train", "test" or "all", or a part such as "train[:90%]", by the text's hash: equal
        texts fall in the same part.
      classes: the labels in order; (): those found, sorted. Give them where training and test text
        are in different files, and one may lack a class.
    """

    path: str
    text: str = "text"
    label: str | None = None
    split: str = "all"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_split("JsonLines", self.split)
        if self.classes and self.label is None:
            raise ValueError("JsonLines.classes: got classes, but no label; name the label's key")
        if not isinstance(self.classes, tuple) or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"JsonLines.classes: got {self.classes!r}, expected a tuple of different names"
            )

    def documents(self) -> Documents:
        """Reads all lines once, for their hashes and labels; the fingerprint covers the content.

        Raises:
          UserError: there are no lines, or one of them does not hold what was asked for.
        """
        files = list(_files(self.path, ".jsonl").values())
        hashes, labels = [], []
        for text, label in self._rows(files):
            hashes.append(hashlib.sha256(text.encode()).digest()[:8])
            labels.append(label)
        if not hashes:
            raise UserError(f"{self.path}: no lines in it; expected lines of JSON objects")
        chosen = _dealt(hashes, self.split)
        keep = np.zeros(len(hashes), bool)
        keep[chosen] = True

        def read() -> Iterator[str]:
            return (text for (text, _), kept in zip(self._rows(files), keep, strict=True) if kept)

        name = f"{self.path} {self.split} (JSON lines)"
        numbers, classes = self._numbered(labels)
        numbers = None if numbers is None else numbers[chosen]
        content = (hashes[i] for i in chosen)
        return Documents(name, _digest(content, numbers, classes), read, numbers, classes)

    def _rows(self, files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
        for path in files:
            try:
                with path.open("rb") as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield self._row(line, f"{path}:{number}")
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from error

    def _row(self, line: bytes, where: str) -> tuple[str, Any]:
        expected = f'expected a line such as {{"{self.text}": "..."}}'
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); {expected}") from error
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: {type(row).__name__} is not an object; {expected}")
        for key in (self.text, self.label):
            if key is not None and key not in row:
                raise UserError(f"{where}: no {key!r} in it; it has {', '.join(row) or 'no keys'}")
        text, label = row[self.text], None if self.label is None else row[self.label]
        if not isinstance(text, str):
            raise UserError(f"{where}: {self.text!r} is {text!r:.40}; expected a string")
        if not text.isascii() and (lone := re.search("[\ud800-\udfff]", text)):
            raise UserError(
                f"{where}: {self.text!r} has half a surrogate pair, U+{ord(lone[0]):04X}, at "
                f"{lone.start()}, which no text can hold; mend the escapes there"
            )
        if self.label is not None and type(label) not in (str, int):
            raise UserError(f"{where}: {self.label!r} is {label!r:.40}; expected a string or int")
        if self.classes and str(label) not in self.classes:
            raise UserError(f"{where}: {label!r} is not one of classes: {', '.join(self.classes)}")
        return text, label

    def _numbered(self, labels: list[Any]) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """Labels as i32[N], and the classes' names."""
        if self.label is None:
            return None, ()
        if len(kinds := {type(label).__name__ for label in labels}) > 1 and not self.classes:
            raise UserError(
                f"{self.path}: {self.label!r} is {' or '.join(sorted(kinds))}; expected one kind "
                "throughout"
            )
        classes = self.classes or tuple(str(label) for label in sorted(set(labels)))
        number = {name: i for i, name in enumerate(classes)}
        return np.array([number[str(label)] for label in labels], np.int32), classes


@dataclass(frozen=True)
class PydocTopics:
    """The half megabyte of English behind Python's `help("topic")`: nothing to download.

    Each topic of the language reference is a document. The text is that of the running Python, so
    versions of Python differ a little, and so do their fingerprints.

    Attributes:
      split: "train", "test" or "all", or a part such as "train[:80%]".
    """

    split: str = "train"

    def __post_init__(self) -> None:
        _check_split("PydocTopics", self.split)

    def documents(self) -> Documents:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError(
                "this Python comes without pydoc_data, the text of PydocTopics; install Python's "
                "complete standard library, or give TextFiles some text"
            ) from error
        texts = [topics[name] for name in sorted(topics)]
        chosen = _dealt([name.encode() for name in sorted(topics)], self.split)
        return _at_hand(f"Python's help topics {self.split}", [texts[i] for i in chosen])


@dataclass(frozen=True)
class StdlibDocstrings:
    """About 2,000 docstrings of Python's standard library, labelled with the package they are from.

    Those of the modules, classes and functions of PACKAGES, found in their source, from 40
    characters on, each text once; a text that several packages share is left out. Nothing to
    download. Versions of Python differ a little, and so do their fingerprints.

    Attributes:
      split: "train", "test" or "all", or a part such as "train[:80%]"; by the text's hash.
    """

    split: str = "train"

    def __post_init__(self) -> None:
        _check_split("StdlibDocstrings", self.split)

    def documents(self) -> Documents:
        """Raises UserError where Python comes without the source of its library."""
        texts, labels_N = _docstrings(Path(sysconfig.get_path("stdlib")))
        chosen = _dealt((text.encode() for text in texts), self.split, test=5)
        name = f"docstrings of Python's library {self.split}"
        return _at_hand(name, [texts[i] for i in chosen], labels_N[chosen], PACKAGES)


@lru_cache(maxsize=1)
def _docstrings(stdlib: Path) -> tuple[list[str], np.ndarray]:
    """Texts, and the number of the package that each is from, i32[N]."""
    owners: dict[str, set[int]] = {}
    for label, package in enumerate(PACKAGES):
        module = stdlib / f"{package}.py"
        paths = [module] if module.is_file() else sorted((stdlib / package).rglob("*.py"))
        if not paths:
            raise UserError(
                f"{stdlib} has no source of {package}; install Python with the source of its "
                "library, or give JsonLines some text"
            )
        for path in paths:
            if "test" not in path.relative_to(stdlib).parts:  # unittest's own tests
                for text in _docstrings_of(path):
                    owners.setdefault(text, set()).add(label)
    found = [(text, min(labels)) for text, labels in owners.items() if len(labels) == 1]
    return [text for text, _ in found], np.array([label for _, label in found], np.int32)


def _docstrings_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _SHORTEST_DOCSTRING:
                yield text


def _at_hand(
    name: str, texts: list[str], labels: np.ndarray | None = None, classes: tuple[str, ...] = ()
) -> Documents:
    """Documents that are small enough to be held."""
    content = (text.encode() for text in texts)
    return Documents(name, _digest(content, labels, classes), lambda: iter(texts), labels, classes)


def _dealt(keys: Iterable[bytes], split: str, test: int = 10) -> np.ndarray:
    """The documents in `split`, i64[n] in order; one in `test` is for testing.

    Args:
      keys: of every document; those with the largest hash are for testing.
    """
    hashes_N = np.array(
        [int.from_bytes(hashlib.sha256(key).digest()[:8], "big") for key in keys], np.uint64
    )
    size = len(hashes_N)
    order_N = np.argsort(hashes_N, kind="stable")
    dealt_N = hashes_N[order_N]
    part = _positions(split, size, size * (test - 1) // test)
    # a cut between equal texts moves to their first, so that they stay together
    first, stop = (np.searchsorted(dealt_N, dealt_N[cut]) if cut < size else size
                   for cut in (part.start, part.stop))  # fmt: skip
    return np.sort(order_N[first:stop])


def _digest(
    content: Iterable[bytes], labels: np.ndarray | None = None, classes: tuple[str, ...] = ()
) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    extra = [] if labels is None else [labels.tobytes(), repr(classes).encode()]
    for part in chain(content, extra):
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()
