"""What every source opens to: named arrays, indexed by example."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Field(Protocol):
    """One value per example: a numpy array, a memory map, or an object that decodes on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Dataset:
    """Examples by index.

    Attributes:
      fields: "x" (the model's input) and "y" (the target); the first dimension counts examples.
      classes: the labels' names, () if the target is not a class.
      name: the data as a person would name it, e.g. "cifar10:3.0.2 train[:45000]".
      fingerprint: differs whenever the content differs.
    """

    fields: Mapping[str, Field]
    classes: tuple[str, ...]
    name: str
    fingerprint: str

    def __post_init__(self) -> None:
        if reserved := {"index", "mask"} & self.fields.keys():
            raise ValueError(f"{self.name}: a field is called {reserved.pop()!r}, a reserved name")
        sizes = {name: field.shape[0] for name, field in self.fields.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"{self.name}: fields differ in their number of examples: {sizes}")

    def __len__(self) -> int:
        return next(iter(self.fields.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all examples once decoded."""
        return sum(
            int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
            for field in self.fields.values()
        )


class Source(Protocol):
    """A frozen description of data; opening it reads (or first prepares) the data."""

    def open(self) -> Dataset: ...
