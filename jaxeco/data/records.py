"""Sets larger than memory: examples in array_record files, read at random when they are asked for.

B: examples asked for.

`write_records` makes a folder of any examples, `ArrayRecords` opens it:

    features.json         what an example holds; of every shard, how many there are and a digest
    00000.array_record    one record for each example
    00001.array_record    ...

A record is the bytes of its numbers, little-endian, field after field, and then every image as it
came (PNG, JPEG, ...), each behind its length, a u32. Nothing in such a folder is executed, and
nothing in it names another file.
"""

import hashlib
import io
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxeco.data.dataset import Column, Dataset
from jaxeco.description import describe
from jaxeco.errors import UserError

FORMAT = "jaxeco records 1"
FEATURES = "features.json"
_MODES = {1: "L", 3: "RGB"}
# Files that are read at once: a batch lies in as many, and storage far away answers slowly.
_FILES_AT_ONCE = 32


@dataclass(frozen=True)
class Part:
    """A stretch of the records of one array_record file."""

    file: str
    first: int
    count: int


class Shards:
    """The records of some files, one after another, as bytes by index.

    A file is opened when it is first read. May be used from several threads, and pickled.
    """

    def __init__(self, parts: Sequence[Part], advice: str, title: str = ""):
        """`advice`: what to do if a record is damaged; `title`: how that message begins."""
        self.parts, self.advice, self.title = tuple(parts), advice, title
        self.ends = np.cumsum([part.count for part in parts])
        self._readers: dict[int, Any] = {}

    def __reduce__(self) -> Any:  # readers cannot be pickled
        return Shards, (self.parts, self.advice, self.title)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, rows_B: Sequence[int] | np.ndarray) -> list[bytes]:
        """Raises UserError, which names file and record, if one cannot be read."""
        rows_B = np.asarray(rows_B, np.int64)
        part_B = np.searchsorted(self.ends, rows_B, side="right")
        places = [(int(part), np.flatnonzero(part_B == part)) for part in np.unique(part_B)]
        records = [b""] * len(rows_B)

        def fill(place: tuple[int, np.ndarray]) -> None:
            part, here = place
            for i, record in zip(here.tolist(), self._of(part, rows_B[here]), strict=True):
                records[i] = record

        for _ in map(fill, places) if len(places) < 2 else _pool().map(fill, places):
            pass
        return records

    def decoded(
        self, rows_B: Sequence[int] | np.ndarray, decode: Callable[[bytes], Any]
    ) -> Iterator[Any]:
        """Gives `decode` of each record; UserError if it fails."""
        for row, record in zip(rows_B, self.read(rows_B), strict=True):
            try:
                value = decode(record)
            except Exception as error:  # decoders of images raise nearly everything
                raise self.damage(int(row), error) from error
            yield value

    def damage(self, row: int, error: Exception | str) -> UserError:
        part = self.parts[int(np.searchsorted(self.ends, row, side="right"))].file
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())
        what = f"{self.title}record {row} is damaged, in {part} ({reason})"
        return UserError(f"{what}; {self.advice}")

    def _of(self, part: int, rows: np.ndarray) -> list[bytes]:
        reader = self._reader(part)
        start = self.ends[part] - self.parts[part].count
        places = (rows - start + self.parts[part].first).tolist()
        try:
            return reader.read(places)
        except Exception:  # which of them it was shows only when they are read one by one
            return [self._one(reader, row, place) for row, place in zip(rows, places, strict=True)]

    def _one(self, reader: Any, row: int, place: int) -> bytes:
        try:
            return reader.read([place])[0]
        except Exception as error:
            raise self.damage(int(row), error) from error

    def _reader(self, index: int) -> Any:
        if index in self._readers:
            return self._readers[index]
        from array_record.python.array_record_module import ArrayRecordReader

        part = self.parts[index]
        # A large buffer would be filled anew for every record.
        reader = ArrayRecordReader(
            part.file, options="readahead_buffer_size:0", file_reader_buffer_size=32768
        )
        if not reader.ok() or (has := reader.num_records()) < part.first + part.count:
            what = f"{has} records" if reader.ok() else "none that can be read"
            row = int(self.ends[index]) - part.count
            raise self.damage(row, f"the file has {what}, not {part.first + part.count}")
        return self._readers.setdefault(index, reader)  # of two threads the first one's stays


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="records")


@dataclass(frozen=True)
class ArrayRecords:
    """A folder that `write_records` wrote: any number of examples, however large.

    Where they exceed `Experiment.resident_gib`, only the examples of a batch are read, by the
    process that holds them.

    Attributes:
      path: the folder; "~" is understood, a relative path starts at the working directory.
      decode: from an example's fields, numpy arrays by name, to those of the data set, on the host:
        for what cannot run in the compiled step. None: the fields as they are. A function or a
        frozen dataclass; with `read_workers` it must be one that can be pickled.
      image_size: scales the shorter side of each image to this many pixels and cuts the square from
        its middle; needed where images differ in size, unless `decode` makes them alike.
    """

    path: str
    decode: Callable[[dict[str, np.ndarray]], Mapping[str, Any]] | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"ArrayRecords.image_size: got {self.image_size}, expected at least 1")

    def open(self) -> Dataset:
        """Reads features.json, and the first example if there is a `decode`.

        Raises:
          UserError: the folder is not what `write_records` wrote, or not all of it; images differ
            in size; when it is indexed, an example is damaged.
        """
        root = Path(self.path).expanduser()
        layout, classes, parts, digest = _features(root)
        advice = f"copy that file to {root} anew, or write the folder again"
        described = f"{digest} {self.image_size} {json.dumps(describe(self.decode))}"
        examples = _Examples(Shards(parts, advice), layout, self.image_size, self.decode)
        return Dataset(
            fields={
                name: Column(examples, name, (len(examples.shards), *shape), dtype)
                for name, (shape, dtype) in examples.spec.items()
            },
            classes=classes,
            name=f"{self.path} (array_record)",
            fingerprint=hashlib.blake2b(described.encode(), digest_size=16).hexdigest(),
            keep=self.decode is None,  # of a function only the name is in the fingerprint
        )


@dataclass(frozen=True)
class Layout:
    """What a record holds.

    Attributes:
      numbers: a packed structure of the fields that are numbers.
      images: [H, W, C] of the fields that are images; None: differs.
    """

    numbers: np.dtype
    images: Mapping[str, tuple[int | None, int | None, int]]

    def parse(self, record: bytes) -> dict[str, Any]:
        """The fields of a record: arrays, and images as they are stored."""
        if len(record) < (place := self.numbers.itemsize):
            raise ValueError(f"{len(record)} bytes, expected {place} or more")
        row = np.frombuffer(record, self.numbers, count=1)[0] if place else {}
        fields: dict[str, Any] = {name: row[name] for name in self.numbers.names or ()}
        for name in self.images:
            (size,) = struct.unpack_from("<I", record, place)
            place += 4 + size
            fields[name] = record[place - size : place]
        if len(record) != place:
            raise ValueError(f"{len(record)} bytes, expected {place}")
        return fields


class _Examples:
    """Decodes all fields of an example at once. Safe to use from several threads; can be pickled.

    Attributes:
      spec: shape and dtype of each field of an example.
    """

    def __init__(
        self,
        shards: Shards,
        layout: Layout,
        image_size: int | None,
        decode: Callable[[dict[str, np.ndarray]], Mapping[str, Any]] | None,
    ):
        self.shards, self.layout, self.image_size, self.decode = shards, layout, image_size, decode
        numbers = layout.numbers
        self.spec: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            name: (numbers[name].shape, numbers[name].base) for name in numbers.names or ()
        }
        for name, (height, width, channels) in layout.images.items():
            if image_size is not None:
                height = width = image_size
            if height is None or width is None:
                if decode is None:
                    raise UserError(
                        f"{self._named()}: the images {name!r} differ in size: give image_size, "
                        "as in ArrayRecords(..., image_size=224)"
                    )
                continue
            self.spec[name] = (height, width, channels), np.dtype(np.uint8)
        if decode is not None:
            self.spec = {}
            [first] = self._examples(np.array([0]))
            self.spec = {name: (value.shape, value.dtype) for name, value in first.items()}

    def read(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        if self.decode is None and not self.layout.images:
            return self._numbers(rows_B)
        examples = self._examples(rows_B)
        empty = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in self.spec.items()}
        return (
            {name: np.stack([e[name] for e in examples]) for name in empty} if examples else empty
        )

    def _numbers(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        records, size = self.shards.read(rows_B), self.layout.numbers.itemsize
        for row, record in zip(rows_B, records, strict=True):
            if len(record) != size:
                raise self.shards.damage(int(row), f"{len(record)} bytes, expected {size}")
        table_B = np.frombuffer(b"".join(records), self.layout.numbers)
        return {name: np.ascontiguousarray(table_B[name]) for name in self.spec}

    def _examples(self, rows_B: np.ndarray) -> list[Mapping[str, np.ndarray]]:
        examples = self.shards.decoded(rows_B, self._stored)
        if self.decode is None:
            return list(examples)
        return [self._made(int(row), example) for row, example in zip(rows_B, examples)]

    def _stored(self, record: bytes) -> dict[str, np.ndarray]:
        fields = self.layout.parse(record)
        for name, (height, width, channels) in self.layout.images.items():
            fields[name] = image = decoded_image(fields[name], channels, self.image_size)
            expected = (height, width) if self.image_size is None else (self.image_size,) * 2
            if any(e not in (None, s) for e, s in zip(expected, image.shape[:2], strict=True)):
                raise ValueError(f"{name!r} is an image of {image.shape}, expected {expected}")
        return fields

    def _made(self, row: int, example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.decode is not None
        try:
            made = {name: np.asarray(value) for name, value in self.decode(example).items()}
        except Exception as error:  # the user's own code
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{self._named()}: decode failed on record {row}: {reason}") from error
        found = {name: (value.shape, value.dtype) for name, value in made.items()}
        if self.spec and found != self.spec:
            raise UserError(
                f"{self._named()}: decode gives {found} for record {row}, expected {self.spec} as "
                "for the first"
            )
        return made

    def _named(self) -> str:
        return os.path.dirname(self.shards.parts[0].file)


def decoded_image(file: Any, channels: int, size: int | None) -> np.ndarray:
    """uint8[H, W, channels], turned upright as its EXIF data says.

    Args:
      file: an image's bytes, or what Pillow opens.
      channels: 3 for colour, 1 for grey. Transparency is dropped.
      size: if given, the shorter side is scaled to it (bilinear, with antialiasing) and the centre
        cut out: H = W = size.

    Raises:
      Exception: of nearly any kind, if the image is damaged.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError("more than 8 bits per channel")
        upright = ImageOps.exif_transpose(image).convert(_MODES[channels])
        if size is not None:
            upright = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(upright).reshape(upright.height, upright.width, channels)


def write_records(
    folder: str | os.PathLike[str],
    examples: Iterable[Mapping[str, Any]],
    *,
    classes: Sequence[str] = (),
    shard_size: int = 2**28,
) -> int:
    """Writes examples to a new folder that `ArrayRecords` opens; holds one of them at a time.

    The folder appears when all is written; if the examples end in an error, nothing is left.

    Args:
      folder: where to; its parents are made.
      examples: fields by name, "x" and "y" or what the experiment makes those of: numbers, of one
        shape and dtype in all examples, or the bytes of an image, as they lie in its file.
      classes: the labels' names, if y is a class.
      shard_size: bytes after which a file ends.

    Returns:
      how many examples there were.

    Raises:
      UserError: an example does not fit the first one, or is no number and no image; there are
        none; the folder exists, or cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or choose another folder to write to")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
        try:
            count = _write(partial, folder, examples, classes, shard_size)
            partial.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp shuts others out
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; free some space there, or choose "
            "another folder"
        ) from error
    return count


def _write(
    partial: Path,
    folder: Path,
    examples: Iterable[Mapping[str, Any]],
    classes: Sequence[str],
    shard_size: int,
) -> int:
    fields: dict[str, Any] = {}
    shards: list[dict[str, Any]] = []
    records = _encoded(folder, examples, fields)
    record = next(records, None)
    while record is not None:
        path, count, size = partial / _shard(len(shards)), 0, 0
        digest = hashlib.blake2b(digest_size=16)
        with _Writer(path) as write:
            while record is not None and size < shard_size:
                write(record)
                digest.update(struct.pack("<Q", len(record)) + record)
                count, size = count + 1, size + len(record)
                record = next(records, None)
        entry = {"records": count, "bytes": path.stat().st_size, "digest": digest.hexdigest()}
        shards.append(entry)
    if not shards:
        raise UserError(f"{folder}: there are no examples to write")
    described = {"format": FORMAT, "fields": fields, "classes": list(classes), "shards": shards}
    (partial / FEATURES).write_text(json.dumps(described, indent=1))
    return sum(shard["records"] for shard in shards)


class _Writer:
    """An array_record file of one record per chunk, for random access; `OSError` if it fails."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path, self.file = path, ArrayRecordWriter(os.fspath(path), "group_size:1")

    def __enter__(self) -> Callable[[bytes], None]:
        return self.write

    def write(self, record: bytes) -> None:
        try:
            self.file.write(record)
        except RuntimeError as error:
            raise OSError(f"{self.path.name}: {error}") from error

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self.file.close()
        except RuntimeError as error:
            if kind is None:
                raise OSError(f"{self.path.name}: {error}") from error


def _encoded(
    folder: Path, examples: Iterable[Mapping[str, Any]], fields: dict[str, Any]
) -> Iterator[bytes]:
    """Records; `fields` becomes what features.json says of them."""
    for number, example in enumerate(examples):
        numbers: list[bytes] = []
        images: list[bytes] = []
        if number and example.keys() != fields.keys():
            raise UserError(
                f"{folder}: example {number} has the fields {sorted(example)}, expected "
                f"{sorted(fields)} as in the first"
            )
        for name in fields or example:
            value = example[name]
            if isinstance(value, bytes):
                spec = _image_spec(folder, number, name, value)
                images.append(struct.pack("<I", len(value)) + value)
            else:
                spec, data = _number_spec(folder, number, name, value)
                numbers.append(data)
            known = fields.setdefault(name, spec)
            if spec != known:
                if not {"image"} == spec.keys() == known.keys():
                    raise UserError(
                        f"{folder}: example {number} has {name!r} as {spec}, expected {known} as "
                        "in the first"
                    )
                sizes = zip(spec["image"][:2], known["image"][:2], strict=True)
                same = [a if a == b else None for a, b in sizes]
                fields[name] = {"image": [*same, max(spec["image"][2], known["image"][2])]}
        yield b"".join(numbers + images)


def _number_spec(folder: Path, number: int, name: str, value: Any) -> tuple[dict[str, Any], bytes]:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8 or not array.size:
        raise UserError(
            f"{folder}: example {number} has {name!r} of {array.dtype} and shape {array.shape}, "
            "expected numbers, or the bytes of an image file"
        )
    array = array.astype(array.dtype.newbyteorder("<"))
    return {"dtype": array.dtype.str, "shape": list(array.shape)}, array.tobytes()


def _image_spec(folder: Path, number: int, name: str, value: bytes) -> dict[str, Any]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(value)) as image:
            height, width = image.height, image.width
            if image.getexif().get(0x0112, 1) >= 5:  # turned by 90 degrees
                height, width = width, height
            return {"image": [height, width, 1 if image.mode in ("1", "L") else 3]}
    except Exception as error:  # Pillow's decoders raise nearly everything on a damaged file
        raise UserError(
            f"{folder}: example {number} has bytes as {name!r} that are not a readable image "
            f"({error}); mend it or leave it out"
        ) from error


def _shard(index: int) -> str:
    return f"{index:05d}.array_record"


def _features(root: Path) -> tuple[Layout, tuple[str, ...], list[Part], str]:
    """Layout, classes, shards and a digest of the content, from a folder's features.json."""
    try:
        text = (root / FEATURES).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{root / FEATURES}: {getattr(error, 'strerror', None) or 'not text'}; expected a "
            "folder that data.write_records wrote"
        ) from error
    try:
        described = json.loads(text)
        if described["format"] != FORMAT:
            raise ValueError(f"format {described['format']!r}, expected {FORMAT!r}")
        numbers, images = [], {}
        for name, spec in described["fields"].items():
            if "image" in spec:
                images[name] = _image_shape(spec["image"])
            else:
                numbers.append((name, *_checked(spec["dtype"], spec["shape"])))
        layout = Layout(np.dtype(numbers), images)
        if not (numbers or images) or {"row", "index", "mask"} & described["fields"].keys():
            raise ValueError(f"fields {list(described['fields'])}")
        classes = tuple(map(_text, described["classes"]))
        shards = [
            (_natural(shard["records"]), _natural(shard["bytes"]), _text(shard["digest"]))
            for shard in described["shards"]
        ]
        if not shards or min(count for count, _, _ in shards) < 1:
            raise ValueError("no records")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{root / FEATURES} is damaged ({type(error).__name__}: {' '.join(str(error).split())})"
            "; copy it there anew, or write the folder again"
        ) from error
    parts = []
    for index, (count, size, _) in enumerate(shards):
        file = root / _shard(index)
        try:
            found = file.stat().st_size
        except OSError as error:
            raise UserError(
                f"{file}: {error.strerror}; it is one of {len(shards)} files of the set: copy it "
                "there anew"
            ) from error
        if found != size:
            raise UserError(f"{file} has {found} bytes, expected {size}: copy it there anew")
        parts.append(Part(str(file), 0, count))
    return layout, classes, parts, hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _checked(dtype: Any, shape: Any) -> tuple[np.dtype, tuple[int, ...]]:
    if not isinstance(dtype, str) or len(dtype) != 3 or dtype[0] not in "<|":
        raise ValueError(f"dtype {dtype!r}")
    found, sizes = np.dtype(dtype), tuple(map(_natural, shape))
    if found.kind not in "biuf" or not 0 < math.prod(sizes) < 2**31 // found.itemsize:
        raise ValueError(f"dtype {dtype!r}, shape {shape}")
    return found, sizes


def _image_shape(shape: Any) -> tuple[int | None, int | None, int]:
    height, width, channels = (None if size is None else _natural(size) for size in shape)
    if channels not in _MODES:
        raise ValueError(f"an image of {shape}")
    return height, width, channels


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{value!r}, expected a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r}, expected text")
    return value
