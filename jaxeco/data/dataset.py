"""What every source opens to: named arrays, indexed by example."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxeco.data.tokenizers import Tokenizer


class Field(Protocol):
    """One value per row: a numpy array, a memory map, or an object that decodes on demand.

    It may also be a registered pytree of arrays, with rows that are a function of them which works
    on jax arrays, too. Then those arrays are what lies on the device.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray: ...


class Records(Protocol):
    """Examples that are decoded as a whole, all fields at once."""

    def read(self, rows_B: np.ndarray, /) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True, eq=False)
class Column:
    """A field of `records`, decoded on demand; `read` decodes several of one example once."""

    records: Records
    name: str
    shape: tuple[int, ...]
    dtype: Any

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray:
        return self.records.read(indices)[self.name]


def read(fields: Mapping[Any, Field], rows_B: np.ndarray) -> dict[Any, np.ndarray]:
    """The given rows of every field; a record that several are columns of is decoded once."""
    columns = {id(f.records): f.records for f in fields.values() if isinstance(f, Column)}
    records = {key: value.read(rows_B) for key, value in columns.items()}
    return {
        key: records[id(f.records)][f.name] if isinstance(f, Column) else f[rows_B]
        for key, f in fields.items()
    }


@dataclass(frozen=True)
class Dataset:
    """Examples by index.

    Most often a row of the fields is an example. Examples may also overlap, as windows of a text
    do: then every row is one that could be had, and a pass takes one row in `stride`.

    Attributes:
      fields: "x" (the model's input) and "y" (the target), or what `Experiment.preprocess` makes
        them of; "weights" is how much each position of an example counts. The first dimension
        counts rows.
      classes: the labels' names, () if the target is not a class.
      name: the data as a person would name it, e.g. "cifar10:3.0.2 train[:45000]".
      fingerprint: differs whenever the content differs.
      tokenizer: of what is predicted, if that is text.
      specials: special tokens that a model must know to read the rows: "separator", "pad".
      stride: rows from one example of a pass to the next.
      unit, units: what a rate counts, in the plural, and how many of it an example has.
      keep: where all of it fits on the device, what has to be decoded is decoded once and kept in
        the cache; so the fingerprint must cover all that the values depend on.
    """

    fields: Mapping[str, Field]
    classes: tuple[str, ...]
    name: str
    fingerprint: str
    tokenizer: "Tokenizer | None" = None
    specials: tuple[str, ...] = ()
    stride: int = 1
    unit: str = "examples"
    units: int = 1
    keep: bool = False

    def __post_init__(self) -> None:
        if reserved := {"row", "index", "epoch", "mask", "key"} & self.fields.keys():
            raise ValueError(f"{self.name}: a field is called {reserved.pop()!r}, a reserved name")
        sizes = {name: field.shape[0] for name, field in self.fields.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"{self.name}: fields differ in their number of rows: {sizes}")
        for name in ("stride", "units"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{self.name}: {name} is {value}, expected at least 1")

    def __len__(self) -> int:
        """Rows of the fields."""
        return next(iter(self.fields.values())).shape[0]

    @property
    def training_examples(self) -> int:
        """Examples in one pass of training, whose first row is anywhere below `stride`."""
        return len(self) // self.stride

    @property
    def eval_examples(self) -> int:
        """Examples in an evaluation: rows 0, stride, ... to the end."""
        return -(-len(self) // self.stride)

    @property
    def arrays(self) -> dict[int, Any]:
        """What the fields consist of, each once, by `id`: fields may share an array."""
        return {id(array): array for array in jax.tree.leaves(dict(self.fields))}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays once decoded."""
        return sum(
            int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize
            for array in self.arrays.values()
        )


class Source(Protocol):
    """A frozen description of data; opening it reads (or first prepares) the data."""

    def open(self) -> Dataset: ...
