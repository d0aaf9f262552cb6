"""Metrics as sums and weights, divided once at the end; so they are exact however data is batched.

A metric maps (outputs, y, mask) to a `Mean`: a weighted sum over the examples that count, and the
weight. Means of parts of the data add up to the Mean of all of it: over batches, and over devices
by psum. Sums within a batch are float32, in which whole numbers are exact up to 2^24 (16.8 million
examples or tokens in one batch); sums over batches belong in float64 on the host.

Shapes: B: examples, ...: further axes of an example (positions of a text), K: classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
    """A weighted sum and its weight, of equal shape or such that weight broadcasts to total."""

    total: Any
    weight: Any

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> "Mean":
        """The mean of `values`, [B, ...]. Where the weight is 0 the value has no effect, even NaN.

        Args:
          values: any shape.
          weights: the shape of `values`, or its first axes: one weight per example counts for all
            that the example holds.

        Raises:
          ValueError: the shape of `weights` is no beginning of that of `values`.
        """
        weights = expand(weights.astype(jnp.float32), values)
        products = jnp.where(weights != 0, values.astype(jnp.float32) * weights, 0)
        return cls(jnp.sum(products), jnp.sum(jnp.broadcast_to(weights, values.shape)))

    def __add__(self, other: "Mean") -> "Mean":  # type: ignore[override]  # not joined, as tuples are
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float | np.ndarray:
        """total / weight in float64 on the host; NaN where the weight is 0."""
        total, weight = np.asarray(self.total, np.float64), np.asarray(self.weight, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where(weight == 0, np.nan, total / weight)
        return mean if mean.ndim else float(mean)


def expand(mask: jax.Array, values: jax.Array) -> jax.Array:
    """`mask` with axes of size 1 appended, so that it broadcasts over the last axes of `values`.

    Raises:
      ValueError: the shape of `mask` is no beginning of that of `values`.
    """
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(f"weights of shape {mask.shape} do not fit values of shape {values.shape}")
    return mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))


class Metric(ABC):
    """A measure of outputs against truth."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What logs and plots call it."""

    def result(self, sums: Mean) -> Any:
        """What sums over all examples come to, on the host; total / weight unless it says else."""
        return sums.value()

    @abstractmethod
    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        """Sums over the examples that count.

        Args:
          outputs: logits or probabilities, [B, ..., K].
          y: integer labels [B, ...], or soft labels [B, ..., K], of which the largest is the truth.
          mask: [B] or [B, ...]; 1 counts, 0 does not.

        Raises:
          ValueError: the shapes do not fit.
        """


@dataclass(frozen=True)
class Accuracy(Metric):
    """Share of examples whose true class has the largest output.

    Of equal outputs the first class counts as the larger, as for argmax. NaN counts as wrong.
    """

    @property
    def name(self) -> str:
        return "accuracy"

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        return Mean.of(_rank(outputs, _labels(outputs, y)) < 1, mask)


@dataclass(frozen=True)
class TopK(Metric):
    """Share of examples whose true class is among the `k` largest outputs; TopK(1) is Accuracy.

    Of equal outputs the earlier class counts as the larger (as jax.lax.top_k has it). NaN counts as
    larger than everything, and as wrong.
    """

    k: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopK.k={self.k!r}: expected an int of at least 1")

    @property
    def name(self) -> str:
        return f"top{self.k}"

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        if self.k > outputs.shape[-1]:
            raise ValueError(f"TopK({self.k}) of outputs of shape {outputs.shape}: too few classes")
        return Mean.of(_rank(outputs, _labels(outputs, y)) < self.k, mask)


@dataclass(frozen=True)
class PerClassAccuracy(Metric):
    """For each class, the share of its examples that are classified right: recall, [K].

    total and weight are [K]; a class without examples is NaN.
    """

    num_classes: int

    @property
    def name(self) -> str:
        return "per_class_accuracy"

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        _check_classes(self, outputs)
        labels = _labels(outputs, y)
        counts = jax.nn.one_hot(labels, self.num_classes) * expand(mask, labels)[..., None]
        right = counts * (_rank(outputs, labels) < 1)[..., None]
        axes = tuple(range(labels.ndim))
        return Mean(jnp.sum(right, axes), jnp.sum(counts, axes))


@dataclass(frozen=True)
class ConfusionMatrix(Metric):
    """How often each class is taken for which.

    total, [K, K]: the number of examples of true class (row) that are given a class (column).
    weight, [K, 1]: the number of examples of the true class, that is the sum of the row. So the
    value has rows that sum to 1, recalls on its diagonal, and NaN for a class without examples;
    the result is the counts.
    """

    num_classes: int

    @property
    def name(self) -> str:
        return "confusion_matrix"

    def result(self, sums: Mean) -> np.ndarray:
        """Counts, int[K, K]."""
        return np.rint(np.asarray(sums.total)).astype(np.int64)

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        _check_classes(self, outputs)
        labels = _labels(outputs, y)
        truth = jax.nn.one_hot(labels, self.num_classes) * expand(mask, labels)[..., None]
        given = jax.nn.one_hot(jnp.argmax(outputs, -1), self.num_classes)
        # at full precision: an accelerator would else be free to round the sums of a large batch
        total = jnp.einsum("...t,...g->tg", truth, given, precision=jax.lax.Precision.HIGHEST)
        return Mean(total, jnp.sum(truth, tuple(range(labels.ndim)))[:, None])


def _check_classes(metric: Any, outputs: jax.Array) -> None:
    if outputs.shape[-1] != metric.num_classes:
        raise ValueError(f"{metric}: outputs of shape {outputs.shape} end in another number")


def _labels(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Integer labels [B, ...] from integer or soft ones."""
    if outputs.ndim < 2 or outputs.shape[-1] < 2:
        raise ValueError(f"outputs of shape {outputs.shape}: expected [B, ..., classes >= 2]")
    soft = jnp.issubdtype(y.dtype, jnp.floating)
    if y.shape != (outputs.shape if soft else outputs.shape[:-1]):
        kind = "soft" if soft else "integer"
        raise ValueError(f"{kind} labels of shape {y.shape} do not fit outputs of {outputs.shape}")
    return jnp.argmax(y, -1) if soft else y


def _rank(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes stand before the true one, i32[B, ...]; K where it has NaN or no class."""
    classes = jnp.arange(outputs.shape[-1])
    own = jnp.max(outputs, -1, initial=-jnp.inf, where=classes == labels[..., None])[..., None]
    behind = (outputs < own) | ((outputs == own) & (classes >= labels[..., None]))
    return jnp.sum(~behind, -1)
