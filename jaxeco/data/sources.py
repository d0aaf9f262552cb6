"""Data that needs no network: arrays, a folder of images, and the digits that scikit-learn carries.

A source is a frozen description; `open()` reads.
"""

import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxeco.data import order
from jaxeco.data.dataset import Column, Dataset
from jaxeco.data.records import decoded_image
from jaxeco.errors import UserError

_SPLIT = re.compile(r"(all|train|test)(?:\[(\d+%?)?:(\d+%?)?\])?")


def _check_split(owner: str, split: str) -> None:
    matched = _SPLIT.fullmatch(split)
    if not matched:
        raise ValueError(
            f'{owner}.split: got "{split}", expected "all", "train" or "test", or a part of one '
            'such as "train[:80%]" or "test[100:]"'
        )
    for bound in matched.groups()[1:]:
        if bound and bound.endswith("%") and int(bound[:-1]) > 100:
            raise ValueError(f'{owner}.split: got "{split}", expected at most 100%')


def _positions(split: str, size: int, train: int) -> range:
    """The part of a fixed order of `size` examples that `split` names.

    "train" is the first `train` of them, "test" the others, "all" both: train and test have nothing
    in common, whatever slices are taken of them. Slices count examples, or per cent rounded down,
    within their part, so that [:80%] and [80%:] meet without a gap or an overlap.
    """
    matched = _SPLIT.fullmatch(split)
    assert matched, split
    part, start, stop = matched.groups()
    whole = {"all": range(size), "train": range(train), "test": range(train, size)}[part]

    def count(bound: str) -> int:
        return len(whole) * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)

    first = count(start) if start else 0
    last = count(stop) if stop else len(whole)
    if not first < last <= len(whole):
        raise UserError(
            f'split "{split}" asks for examples {first} to {last} of the {len(whole)} in "{part}"; '
            "choose a part that holds at least one"
        )
    return whole[first:last]


def _digest(*arrays: np.ndarray) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for array in arrays:
        hashed.update(f"{array.dtype.str}{array.shape}".encode())
        hashed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


@dataclass(frozen=True)
class Arrays:
    """Arrays that the experiment file makes itself.

    They are not copied, so don't write into them afterwards. Two `Arrays` are equal if their
    content is; `repr` gives shapes and a digest instead of a thousand numbers.

    Attributes:
      x: inputs, numbers, [N, ...].
      y: targets, numbers, [N, ...].
      classes: names of the labels, if y holds integer labels [N] or soft ones [N, len(classes)].
      name: what to call the data.

    Raises:
      ValueError: if the arrays are empty, differ in length, hold no numbers or don't fit `classes`.
    """

    x: Any
    y: Any
    classes: tuple[str, ...] = ()
    name: str = "arrays"

    def __post_init__(self) -> None:
        for field in ("x", "y"):
            array = np.asarray(getattr(self, field)).view()
            if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
                raise ValueError(f"Arrays.{field}: got dtype {array.dtype}, expected numbers")
            if array.ndim == 0 or array.shape[0] == 0:
                raise ValueError(f"Arrays.{field}: got shape {array.shape}, expected [N > 0, ...]")
            array.flags.writeable = False
            object.__setattr__(self, field, array)
        if len(self.x) != len(self.y):
            raise ValueError(f"Arrays: got {len(self.x)} x and {len(self.y)} y, expected as many")
        if self.classes:
            self._check_labels()

    def _check_labels(self) -> None:
        count = len(self.classes)
        if self.y.ndim == 1 and self.y.dtype.kind in "iu":
            low, high = int(self.y.min()), int(self.y.max())
            if not 0 <= low <= high < count:
                raise ValueError(
                    f"Arrays.y: got labels {low} to {high}, expected 0 to {count - 1} "
                    f"for {count} classes"
                )
        elif self.y.ndim != 2 or self.y.shape[1] != count:
            raise ValueError(
                f"Arrays.y: got {self.y.dtype} of shape {self.y.shape}, expected integers [N] or "
                f"numbers [N, {count}] for {count} classes"
            )

    @cached_property
    def _content(self) -> str:
        return _digest(self.x, self.y)

    def __repr__(self) -> str:
        x, y = (f"{array.dtype}{list(array.shape)}" for array in (self.x, self.y))
        return (
            f"Arrays(x={x}, y={y}, classes={self.classes!r}, name={self.name!r}, "
            f"content={self._content!r})"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arrays) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def open(self) -> Dataset:
        return Dataset({"x": self.x, "y": self.y}, self.classes, self.name, self._content)


@dataclass(frozen=True)
class Digits:
    """1,797 real handwritten digits that come inside scikit-learn: nothing to download.

    The test part of "Optical recognition of handwritten digits" (Alpaydin & Kaynak 1998, UCI):
    8x8 counts of black pixels in 4x4 blocks, so x is uint8[N, 8, 8, 1] with values 0 to 16, as they
    are (`Normalize(..., white=16)`), and y is int32[N].

    The file has no split of its own. Its rows come writer by writer (the labels begin 0, 1, 2, ...
    anew about every 130 rows), so that the last fifth would be the hands of two or three persons. A
    fixed permutation deals the rows out instead: its last 360 are "test", the other 1,437 "train".
    It stays the same for ever (`order.permutation`). Every writer is then in both.

    Attributes:
      split: "train", "test" or "all", or a part such as "train[:80%]" or "train[1200:]".
    """

    split: str = "train"

    def __post_init__(self) -> None:
        _check_split("Digits", self.split)

    def open(self) -> Dataset:
        # The file that `sklearn.datasets.load_digits` reads. To import scikit-learn for it would
        # take longer than to train on it.
        found = importlib.util.find_spec("sklearn")
        path = Path(found.origin or "").parent / "datasets/data/digits.csv.gz" if found else None
        if path is None or not path.is_file():
            raise UserError(
                "the digits come with scikit-learn, which "
                + (f"has no {path}" if path else "is not installed")
                + "; `pip install --force-reinstall scikit-learn` brings them"
            )
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        rows = order.permutation(0, 0, len(table))[_positions(self.split, len(table), 1437)]
        x = table[rows, :64].reshape(-1, 8, 8, 1)
        y = table[rows, 64].astype(np.int32)
        classes = tuple(str(digit) for digit in range(10))
        name = f"digits {self.split} (scikit-learn)"
        return Dataset({"x": x, "y": y}, classes, name, _digest(x, y))


_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}


@dataclass(frozen=True)
class ImageFolder:
    """A folder with one folder of images per class: `path/<class>/<anything>.png`.

    Classes are the folders' names, sorted. Images are .png, .jpg, .jpeg, .bmp, .gif (first frame)
    or .webp; other files, and names that begin with a dot, are left out. They are decoded on
    demand: turned upright as their EXIF data says, shorter side scaled to `image_size` (bilinear,
    with antialiasing), centre cut out. x is uint8[N, image_size, image_size, channels], y int32[N].

    A fifth of the images is for "test": those whose relative path has the largest hash. So the
    split needs no list, and a file that is added or removed hardly moves the others.

    Attributes:
      path: the folder; "~" is understood, a relative path starts at the working directory.
      image_size: side of the decoded images, in pixels.
      split: "train", "test" or "all", or a part such as "train[:90%]" or "test[:1000]".
      channels: 3 for colour, 1 for grey. Transparency is dropped.
    """

    path: str
    image_size: int
    split: str = "train"
    channels: Literal[1, 3] = 3

    def __post_init__(self) -> None:
        _check_split("ImageFolder", self.split)
        if self.image_size < 1:
            raise ValueError(f"ImageFolder.image_size: got {self.image_size}, expected at least 1")
        if self.channels not in (1, 3):
            raise ValueError(f"ImageFolder.channels: got {self.channels}, expected 1 or 3")

    def open(self) -> Dataset:
        """Lists the folder; an image is read when it is indexed.

        The fingerprint covers the files' names, sizes and times of modification, since reading
        every byte of a large folder would take longer than users wait. Copy with times kept
        (`cp -a`, `rsync -a`) if a run is to go on elsewhere.

        Raises:
          UserError: if the folder or a class has no images; on indexing, if an image is unreadable.
        """
        root = Path(self.path).expanduser()
        classes, files = _listing(root)
        dealt = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file.name)).digest())
        part = _positions(self.split, len(dealt), train=len(dealt) * 4 // 5)
        chosen = sorted(dealt[i] for i in part)
        described = repr((self.image_size, self.channels, classes, chosen))
        images = _ImageFiles([root / f.name for f in chosen], self.image_size, self.channels)
        shape = self.image_size, self.image_size, self.channels
        return Dataset(
            fields={
                "x": Column(images, "x", (len(chosen), *shape), np.dtype(np.uint8)),
                "y": np.array([file.label for file in chosen], np.int32),
            },
            classes=classes,
            name=f"{self.path} {self.split} (folder)",
            fingerprint=hashlib.blake2b(os.fsencode(described), digest_size=16).hexdigest(),
            keep=True,
        )


class _File(NamedTuple):
    name: str  # <class>/<image>, below the root
    label: int
    bytes: int
    modified_ns: int


def _listing(root: Path) -> tuple[tuple[str, ...], list[_File]]:
    """Names of the classes, and every image below `root`."""
    expected = "expected folders of images, one for each class: <class>/<image>.png"
    files = []
    try:
        folders = sorted(path for path in root.iterdir() if path.name[0] != "." and path.is_dir())
        for label, folder in enumerate(folders):
            paths = [
                path
                for path in folder.iterdir()
                if path.name[0] != "." and path.suffix.lower() in _IMAGE_SUFFIXES
            ]
            if not paths:
                raise UserError(f"{folder}: no images in it; {expected}")
            for path in paths:
                status = path.stat()
                name = f"{folder.name}/{path.name}"
                files.append(_File(name, label, status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; {expected}") from error
    if not folders:
        raise UserError(f"{root}: no folders in it; {expected}")
    return tuple(folder.name for folder in folders), files


class _ImageFiles:
    """uint8[N, size, size, channels] as a column, decoded when read, by any number of threads."""

    def __init__(self, paths: list[Path], size: int, channels: int):
        self._paths, self._size, self._channels = paths, size, channels

    def read(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        images = np.empty((len(rows_B), self._size, self._size, self._channels), np.uint8)
        for image, row in zip(images, rows_B, strict=True):
            image[...] = self._decode(self._paths[row])
        return {"x": images}

    def _decode(self, path: Path) -> np.ndarray:
        try:
            return decoded_image(path, self._channels, self._size)
        except Exception as error:  # Pillow's decoders raise nearly everything on a damaged file
            raise UserError(f"{path}: not a readable image ({error}); mend or remove it") from error
