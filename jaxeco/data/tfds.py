"""Data sets by tfds's names: prepared on first use, decoded once, then read from a memory map.

B: examples asked for, H: height, W: width, C: channels.
"""

import difflib
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxeco.data.cache import Layout, cached, progress
from jaxeco.data.dataset import Column, Dataset, Field, read
from jaxeco.data.prepare import prepare, without_tensorflow
from jaxeco.data.records import Part, Shards
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
    demand instead.

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
            builder, parts = opened(self.name, self.split, self.data_dir, self._image_shape)
            selected = [(*self._whole(builder, split), start, stop) for split, start, stop in parts]
            label = builder.info.features[self.y]
        prints = [(digest, start, stop) for _, digest, start, stop in selected]
        return Dataset(
            fields=_select([(fields, start, stop) for fields, _, start, stop in selected]),
            classes=tuple(getattr(label, "names", ())),
            name=f"{title_of(builder)} {self.split} (tfds)",
            fingerprint=hashlib.blake2b(json.dumps(prints).encode(), digest_size=16).hexdigest(),
        )

    def _image_shape(self, builder: Any) -> tuple[int, int, int]:
        """(H, W, C) of x; raises UserError if x or y cannot serve."""
        import tensorflow_datasets as tfds

        x, title = feature(builder, self.x), title_of(builder)
        if not isinstance(x, tfds.features.Image) or x.np_dtype != np.uint8:
            raise UserError(f"x must be an image of uint8, but {title}'s {self.x!r} is {x}")
        check_label(builder, "y", self.y)
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
        stats, described = listed(builder, split)
        records = _Records(builder, split, self, self._image_shape(builder))
        layout: Layout = {
            "x": ((len(records), *records.shape), np.dtype(np.uint8)),
            "y": ((len(records),), np.dtype(np.int32)),
        }
        options = [self.x, self.y, self.image_size]
        if int(np.prod(layout["x"][0], dtype=np.int64)) > CACHE_BYTES:
            known = described, [stat[:2] for stat in stats], options
            digest = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
            return {key: Column(records, key, *spec) for key, spec in layout.items()}, digest
        where = str(Path(builder.data_dir).resolve())
        key = hashlib.blake2b(json.dumps([where, options]).encode(), digest_size=4)
        name = f"{builder.info.full_name.replace('/', '-')}-{split}-{key.hexdigest()}"
        source = json.loads(json.dumps([stats, options]))  # as it will be read back
        return cached(name, source, layout, records.blocks)


class Records:
    """The encoded examples of one whole split, by index; may be pickled."""

    def __init__(self, builder: Any, split: str):
        self.title, self.split = title_of(builder), split
        kind = builder.info.file_format
        if kind.value != "array_record":
            raise UserError(
                f"{self.title} at {builder.data_dir} was prepared as {kind.value}, which has no "
                "random access: remove that folder to have it prepared as array_record, or name "
                "another data_dir"
            )
        files = builder.info.splits[split].file_instructions
        self.shards = Shards(
            [Part(os.fspath(file.filename), file.skip, file.take) for file in files],
            f"remove {builder.data_dir} to have it prepared again, or copy that file there anew",
            f"{self.title} {split}: ",
        )

    def __len__(self) -> int:
        return len(self.shards)

    def decoded(self, indices: Sequence[int], decode: Callable[[Any], Any]) -> Iterator[Any]:
        """`decode` of each example's features, {name: tf.train.Feature}.

        Raises:
          UserError: a record cannot be read or decoded.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        parse = tf_example_pb2.Example.FromString
        return self.shards.decoded(indices, lambda record: decode(parse(record).features.feature))


class _Records(Records):
    """Images and labels of one whole split."""

    def __init__(self, builder: Any, split: str, of: Tfds, shape: tuple[int, int, int]):
        super().__init__(builder, split)
        self.shape, self.resize = shape, of.image_size is not None
        self.x, self.y = of.x, of.y

    def read(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
        """Decodes examples: {"x": uint8 [B, H, W, C], "y": int32 [B]}."""
        indices = [int(index) for index in indices]
        x_BxHxWxC = np.empty((len(indices), *self.shape), np.uint8)
        y_B = np.empty(len(indices), np.int32)
        for i, (image, label) in enumerate(self.decoded(indices, self._example)):
            x_BxHxWxC[i], y_B[i] = image, label
        return {"x": x_BxHxWxC, "y": y_B}

    def _example(self, features: Any) -> tuple[np.ndarray, int]:
        image = self._image(features[self.x].bytes_list.value[0])
        return image, features[self.y].int64_list.value[0]

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


class _Joined:
    """Rows of several splits, one after another: (fields, start, stop) of each; may be pickled."""

    def __init__(self, parts: Sequence[tuple[Mapping[str, Any], int, int]]):
        self.parts = parts

    def __getstate__(
        self,
    ) -> Any:  # of a memory map its name: pickled, it would be all that it maps
        return [
            ({key: getattr(field, "filename", field) for key, field in fields.items()}, *ends)
            for fields, *ends in self.parts
        ]

    def __setstate__(self, parts: Any) -> None:
        self.parts = [
            (
                {
                    k: f if isinstance(f, Column) else np.load(f, mmap_mode="r")
                    for k, f in d.items()
                },
                *ends,
            )
            for d, *ends in parts
        ]

    def read(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        values: dict[str, np.ndarray] = {}
        first = 0
        for fields, start, stop in self.parts:
            here = (first <= rows_B) & (rows_B < first + stop - start)
            for key, found in read(fields, rows_B[here] - first + start).items():
                values.setdefault(key, np.empty((len(rows_B), *found.shape[1:]), found.dtype))
                values[key][here] = found
            first += stop - start
        return values


def _select(parts: list[tuple[Mapping[str, Any], int, int]]) -> dict[str, Field]:
    """The given parts as fields: views of memory maps where there is only one part."""
    fields, start, stop = parts[0]
    if len(parts) == 1 and all(isinstance(field, np.ndarray) for field in fields.values()):
        return {key: field[start:stop] for key, field in fields.items()}
    joined, count = _Joined(parts), sum(stop - start for _, start, stop in parts)
    return {
        key: Column(joined, key, (count, *field.shape[1:]), field.dtype)
        for key, field in fields.items()
    }


def opened(
    name: str, split: str, data_dir: str | os.PathLike[str] | None, check: Callable[[Any], Any]
) -> tuple[Any, list[tuple[str, int, int]]]:
    """A data set of tfds, prepared if need be; call it within `without_tensorflow`.

    Args:
      name, split, data_dir: as in `Tfds`.
      check: of the builder; what it raises is raised before a long download.

    Returns:
      The builder, and (split, start, stop) of each part of `split` that has examples.

    Raises:
      UserError: unknown name or split; the set cannot be prepared.
    """
    parts = _parse(split)
    builder = _builder(name, data_dir)
    check(builder)
    if not Path(builder.data_dir).exists():
        prepare(builder)
        builder = _builder(name, data_dir)
    return builder, _absolute(parts, builder, split)


def prepared(
    name: str, data_dir: str | os.PathLike[str] | None, beam: Sequence[str] | None
) -> tuple[str, str]:
    """Prepares a data set if that has not been done; returns its title and folder.

    Args and raises: as `prepare`, and UserError for an unknown name.
    """
    with without_tensorflow():
        builder = _builder(name, data_dir)
        if not Path(builder.data_dir).exists():
            prepare(builder, beam)
        return title_of(builder), str(builder.data_dir)


def _builder(data_set: str, data_dir: str | os.PathLike[str] | None) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, registered

    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        name, _ = naming.parse_builder_name_kwargs(data_set)
        if name.namespace:
            raise ValueError(f"{name.namespace} is not part of tfds itself")
        return tfds.builder(data_set, data_dir=os.path.expanduser(root))
    except registered.DatasetNotFoundError as error:
        near = _nearest(name.name, tfds.list_builders(with_community_datasets=False))
        raise UserError(f"tfds has no data set {data_set!r}{near}") from error
    except Exception as error:  # a version, a configuration, the spelling; or the builder's own
        message = str(error).rpartition('}": ')[2].partition(" Here are")[0]
        message = message.strip().partition("\n")[0] or type(error).__name__
        if "BuilderConfig" in message:
            configs = ", ".join(tfds.builder_cls(name.name).builder_configs) or "none"
            message += f" It has these: {configs}."
        raise UserError(f"tfds cannot give data set {data_set!r}: {message}") from error


def feature(builder: Any, name: str) -> Any:
    """A feature by its name; UserError if there is none."""
    features = builder.info.features
    if not hasattr(features, "keys"):
        raise UserError(f"{title_of(builder)} is a set of {features}, expected features by name")
    if name not in features:
        near = _nearest(name, features)
        raise UserError(
            f"{title_of(builder)} has no feature {name!r}{near}; it has {', '.join(features)}"
        )
    return features[name]


def check_label(builder: Any, field: str, name: str) -> None:
    """UserError unless the feature `name`, given as `field`, is a class or an integer."""
    label = feature(builder, name)
    if label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
        raise UserError(
            f"{field} must be a class or an integer, but {title_of(builder)}'s {name!r} is {label}"
        )


def listed(builder: Any, split: str) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Name, bytes and time (ns) of a split's files, and the text of those that describe it.

    Raises:
      UserError: a file is missing.
    """
    folder = Path(builder.data_dir)
    files = [folder / "dataset_info.json", folder / "features.json"]
    try:
        described = [file.read_text() for file in files]
        files += [Path(path) for path in builder.info.splits[split].filepaths]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise UserError(
            f"{title_of(builder)} at {folder} is not complete: {error.filename}: {error.strerror}; "
            "remove that folder to have it prepared again, or copy it there anew"
        ) from error
    return stats, described


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
            f"{title_of(builder)} at {builder.data_dir} is not complete: dataset_info.json is not "
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
            f"{title_of(builder)} has no split {split!r}: {message} It has {sizes}"
        ) from error
    found = [part for part in found if part[1] < part[2]]
    if not found:
        raise UserError(f"{title_of(builder)}: {split!r} selects no examples; it has {sizes}")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def title_of(builder: Any) -> str:
    name, _, version = builder.info.full_name.rpartition("/")
    return f"{name}:{version}"
