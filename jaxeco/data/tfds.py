"""Data sets by tfds's names: prepared on first use, decoded once, then read from a memory map.

B: examples asked for, H: height, W: width, C: channels.
"""

import bisect
import difflib
import hashlib
import io
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxeco.data.cache import Layout, cached, progress
from jaxeco.data.dataset import Dataset, Field
from jaxeco.data.prepare import prepare, without_tensorflow
from jaxeco.errors import UserError

# A split that would be larger than this once decoded is not cached: its examples are decoded
# whenever they are asked for.
CACHE_BYTES = 8 * 2**30
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Tfds:
    """An image-classification set of tensorflow-datasets, without TensorFlow.

    The first use downloads and prepares it (tfds's own builder, array_record files), then decodes
    each split once into the cache; later uses map that. Splits beyond CACHE_BYTES are decoded on
    demand instead, x and y each from the records.

    Attributes:
      name: as tfds spells it: "mnist", "cifar10:3.0.2", "emnist/balanced".
      split: as tfds spells it: "train", "train[:45000]", "train[:10%]+train[-10%:]".
      x: the image feature; opens as uint8 [N, H, W, C].
      y: the label feature, a class or an integer; opens as int32 [N].
      data_dir: holds prepared data sets; None: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
      image_size: scales the shorter side of each image to this many pixels and cuts the square
        from its middle; needed where images differ in size.
    """

    name: str
    split: str
    x: str = "image"
    y: str = "label"
    data_dir: str | os.PathLike[str] | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size is a number of pixels, got {self.image_size}")

    def open(self) -> Dataset:
        """Opens the split, preparing and decoding it where that has not been done.

        Raises:
          UserError: unknown name, feature or split; no network; damaged or unsuitable data.
        """
        with without_tensorflow():
            parts = _parse(self.split)
            builder = self._builder()
            self._image_shape(builder)  # a wrong feature is found before a long download
            if not Path(builder.data_dir).exists():
                prepare(builder)
                builder = self._builder()
            selected = []
            for split, start, stop in _absolute(parts, builder, self.split):
                selected.append((*self._whole(builder, split), start, stop))
            label = builder.info.features[self.y]
        prints = [(digest, start, stop) for _, digest, start, stop in selected]
        return Dataset(
            fields={
                key: _select([(fields[key], start, stop) for fields, _, start, stop in selected])
                for key in ("x", "y")
            },
            classes=tuple(getattr(label, "names", ())),
            name=f"{_title(builder)} {self.split} (tfds)",
            fingerprint=hashlib.blake2b(json.dumps(prints).encode(), digest_size=16).hexdigest(),
        )

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import naming, registered

        root = self.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        try:
            name, _ = naming.parse_builder_name_kwargs(self.name)
            if name.namespace:
                raise ValueError(f"{name.namespace} is not part of tfds itself")
            return tfds.builder(self.name, data_dir=os.path.expanduser(root))
        except registered.DatasetNotFoundError as error:
            near = _nearest(name.name, tfds.list_builders(with_community_datasets=False))
            raise UserError(f"tfds has no data set {self.name!r}{near}") from error
        except Exception as error:  # a version, a configuration, the spelling; or the builder's own
            message = str(error).rpartition('}": ')[2].partition(" Here are")[0]
            message = message.strip().partition("\n")[0] or type(error).__name__
            if "BuilderConfig" in message:
                configs = ", ".join(tfds.builder_cls(name.name).builder_configs) or "none"
                message += f" It has these: {configs}."
            raise UserError(f"tfds cannot give data set {self.name!r}: {message}") from error

    def _image_shape(self, builder: Any) -> tuple[int, int, int]:
        """(H, W, C) of x; raises UserError if x or y cannot serve."""
        import tensorflow_datasets as tfds

        features, title = builder.info.features, _title(builder)
        for feature in (self.x, self.y):
            if feature not in features:
                near = _nearest(feature, features)
                raise UserError(
                    f"{title} has no feature {feature!r}{near}; it has {', '.join(features)}"
                )
        x, y = features[self.x], features[self.y]
        if not isinstance(x, tfds.features.Image) or x.np_dtype != np.uint8:
            raise UserError(f"x must be an image of uint8, but {title}'s {self.x!r} is {x}")
        if y.shape != () or not np.issubdtype(y.np_dtype, np.integer):
            raise UserError(f"y must be a class or an integer, but {title}'s {self.y!r} is {y}")
        if len(x.shape) != 3 or x.shape[-1] not in MODES:
            raise UserError(
                f"x must be an image of 1, 3 or 4 channels, but {title}'s {self.x!r} has shape "
                f"{x.shape}"
            )
        height, width, channels = x.shape
        if self.image_size is not None:
            height = width = self.image_size
        if height is None or width is None:
            raise UserError(
                f"{title}'s images differ in size: give image_size, as in "
                f"Tfds({self.name!r}, {self.split!r}, image_size=224)"
            )
        return height, width, channels

    def _whole(self, builder: Any, split: str) -> tuple[Mapping[str, Field], str]:
        """x and y of all examples of a split, and a digest of their content."""
        info, title, folder = builder.info, _title(builder), Path(builder.data_dir)
        files = [folder / "dataset_info.json", folder / "features.json"]
        files += [Path(path) for path in info.splits[split].filepaths]
        try:
            stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        except OSError as error:
            raise UserError(
                f"{title} at {folder} is not complete: {error.filename}: {error.strerror}; remove "
                "that folder to have it prepared again, or copy it there anew"
            ) from error
        records = _Records(builder, split, self, self._image_shape(builder))
        layout: Layout = {
            "x": ((len(records), *records.shape), np.dtype(np.uint8)),
            "y": ((len(records),), np.dtype(np.int32)),
        }
        options = [self.x, self.y, self.image_size]
        if int(np.prod(layout["x"][0], dtype=np.int64)) > CACHE_BYTES:
            known = [file.read_text() for file in files[:2]], [stat[:2] for stat in stats], options
            digest = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
            return {key: _OnDemand(records, key, *spec) for key, spec in layout.items()}, digest
        key = hashlib.blake2b(json.dumps([str(folder.resolve()), options]).encode(), digest_size=4)
        name = f"{info.full_name.replace('/', '-')}-{split}-{key.hexdigest()}"
        source = json.loads(json.dumps([stats, options]))  # as it will be read back
        return cached(name, source, layout, records.blocks)


class _Records:
    """The encoded examples of one whole split."""

    def __init__(self, builder: Any, split: str, of: Tfds, shape: tuple[int, int, int]):
        from tensorflow_datasets import decode
        from tensorflow_datasets.proto import tf_example_pb2

        self.title, self.split, self.shape = _title(builder), split, shape
        self.x, self.y, self.resize = of.x, of.y, of.image_size is not None
        self.parse = tf_example_pb2.Example.FromString
        self.files = builder.info.splits[split].file_instructions
        try:
            self.raw = builder.as_data_source(
                split, deserialize_method=decode.DeserializeMethod.RAW_BYTES
            ).data_source
        except NotImplementedError as error:
            kind = builder.info.file_format.value
            raise UserError(
                f"{self.title} at {builder.data_dir} was prepared as {kind}, which has no random "
                "access: remove that folder to have it prepared as array_record, or name another "
                "data_dir"
            ) from error

    def __len__(self) -> int:
        return sum(file.take for file in self.files)

    def read(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
        """Decodes examples: {"x": uint8 [B, H, W, C], "y": int32 [B]}."""
        indices = [int(index) for index in indices]
        x_BxHxWxC = np.empty((len(indices), *self.shape), np.uint8)
        y_B = np.empty(len(indices), np.int32)
        try:
            encoded = self.raw.__getitems__(indices) if indices else []
        except Exception:  # which of them it was shows only when they are read one by one
            encoded = [None] * len(indices)
        for i, (index, record) in enumerate(zip(indices, encoded, strict=True)):
            try:
                features = self.parse(record or self.raw[index]).features.feature
                x_BxHxWxC[i] = self._image(features[self.x].bytes_list.value[0])
                y_B[i] = features[self.y].int64_list.value[0]
            except Exception as error:
                raise UserError(self._damage(index, error)) from error
        return {"x": x_BxHxWxC, "y": y_B}

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """All examples in order, about 2 MiB at a time, decoded by as many threads as cores."""
        size = max(1, 2**21 // int(np.prod(self.shape)))
        workers = os.cpu_count() or 1
        pool, ahead = ThreadPoolExecutor(workers), deque[Any]()
        try:
            with progress(f"decoding {self.title} {self.split} (once)", len(self)) as report:
                for stop in [*range(size, len(self), size), len(self)]:
                    indices = range((stop - 1) // size * size, stop)
                    ahead.append((stop, pool.submit(self.read, indices)))
                    while len(ahead) > 2 * workers or (ahead and stop == len(self)):
                        decoded, block = ahead.popleft()
                        yield block.result()
                        report(decoded)
        finally:
            pool.shutdown(cancel_futures=True)

    def _image(self, encoded: bytes) -> np.ndarray:
        from PIL import Image

        height, width, channels = self.shape
        with Image.open(io.BytesIO(encoded)) as file:
            image = file if file.mode == MODES[channels] else file.convert(MODES[channels])
            if self.resize and image.size != (width, height):
                scale = max(height / image.height, width / image.width)
                scaled = round(image.width * scale), round(image.height * scale)
                image = image.resize(scaled, Image.Resampling.BILINEAR)
                left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
                image = image.crop((left, top, left + width, top + height))
            return np.asarray(image).reshape(self.shape)

    def _damage(self, index: int, error: Exception) -> str:
        ends = list(itertools.accumulate(file.take for file in self.files))
        file = self.files[bisect.bisect_right(ends, index)].filename
        return (
            f"{self.title} {self.split}: record {index} is damaged, in {file} "
            f"({type(error).__name__}: {' '.join(str(error).split())}); remove "
            f"{os.path.dirname(file)} to have it prepared again, or copy that file there anew"
        )


@dataclass(frozen=True)
class _OnDemand:
    """One field of a split, decoded whenever it is indexed."""

    records: _Records
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray:
        return self.records.read(np.asarray(indices))[self.key]


@dataclass(frozen=True)
class _Joined:
    """Parts of fields, one after the other: (field, start, stop)."""

    parts: tuple[tuple[Field, int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        count = sum(stop - start for _, start, stop in self.parts)
        return (count, *self.parts[0][0].shape[1:])

    @property
    def dtype(self) -> Any:
        return self.parts[0][0].dtype

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray:
        indices = np.asarray(indices)
        values = np.empty((*indices.shape, *self.shape[1:]), self.dtype)
        first = 0
        for field, start, stop in self.parts:
            here = (first <= indices) & (indices < first + stop - start)
            values[here] = field[indices[here] - first + start]
            first += stop - start
        return values


def _select(parts: list[tuple[Any, int, int]]) -> Field:
    """The given parts as one field: a view of a memory map where there is only one."""
    field, start, stop = parts[0]
    if len(parts) == 1 and isinstance(field, np.ndarray):
        return field[start:stop]
    return _Joined(tuple(parts))


def _parse(split: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.core.ReadInstruction.from_spec(split)
    except (ValueError, NotImplementedError) as error:
        message = str(error).partition("\n")[2] or str(error)
        raise UserError(
            f"tfds cannot read the split {split!r}: {message.splitlines()[0]} (expected a name, or "
            "a slice such as train[:45000], train[90%:], or a sum of them)"
        ) from error


def _absolute(parts: Any, builder: Any, split: str) -> list[tuple[str, int, int]]:
    """(split, start, stop) of each part that has examples."""
    splits = dict(builder.info.splits.items())
    if not splits:
        raise UserError(
            f"{_title(builder)} at {builder.data_dir} is not complete: dataset_info.json is not "
            "there, or names no split; remove that folder to have it prepared again"
        )
    sizes = ", ".join(f"{name} ({info.num_examples})" for name, info in splits.items())
    try:
        found = [
            (part.splitname, part.from_ or 0, splits[part.splitname].num_examples
             if part.to is None else part.to)
            for part in parts.to_absolute(splits)
        ]  # fmt: skip
    except (ValueError, AssertionError) as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"{_title(builder)} has no split {split!r}: {message} It has {sizes}"
        ) from error
    found = [part for part in found if part[1] < part[2]]
    if not found:
        raise UserError(f"{_title(builder)}: {split!r} selects no examples; it has {sizes}")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _title(builder: Any) -> str:
    name, _, version = builder.info.full_name.rpartition("/")
    return f"{name}:{version}"
