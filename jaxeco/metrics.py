"""Metrics as sums and weights, divided once at the end; so they are exact however data is batched.

A metric maps (outputs, y, mask) to a `Mean`: a weighted sum over the examples that count, and the
weight. Means of parts of the data add up to the Mean of all of it: over batches, and over devices
by psum. Sums within a batch are float32, in which whole numbers are exact up to 2^24 (16.8 million
examples or tokens in one batch); sums over batches belong in float64 on the host. What is no such
sum, because it ranks all examples, is in `ranking.py`.

Shapes: B: examples, ...: further axes of an example (positions of a text), K: classes (tokens of a
vocabulary, where the example is a text).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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


def pick(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[..., label], f32[...] of [..., K]; NaN where the label is no class."""
    classes, labels = values.shape[-1], labels.astype(jnp.int32)
    nearest = jnp.clip(labels, 0, classes - 1)[..., None]
    own = jnp.take_along_axis(values, nearest, -1, mode="promise_in_bounds")[..., 0]
    return jnp.where((labels >= 0) & (labels < classes), own.astype(jnp.float32), jnp.nan)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: Any = 0.0) -> jax.Array:
    """-Σ_k target_k · log softmax(logits)_k in nats, with target = (1 - a)·onehot(label) + a/K.

    That is log Σ_k exp(logit_k) - (1 - a)·logit_label - a·mean(logits), which needs no target, and
    as a difference from the largest logit loses no digits. Faster on the CPU, forward and backward,
    than log_softmax and than finding the label's logit by comparison.

    Args:
      logits: [..., K], finite.
      labels: integers [...]; NaN comes of those that are no class.
      label_smoothing: a.

    Returns:
      f32[...].
    """
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.max(logits, -1))
    excess = jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), -1))
    own, even = top - pick(logits, labels), top - jnp.mean(logits, -1)
    return excess + (1 - label_smoothing) * own + label_smoothing * even


class Metric(ABC):
    """A measure of outputs against truth."""

    lower_is_better = False  # what `Experiment.best` goes by

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
          mask: [B] or [B, ...]; how much each counts: 0 for padding, else 1, or its weight.

        Raises:
          ValueError: the shapes do not fit.
        """


@dataclass(frozen=True)
class Accuracy(Metric):
    """Share of examples (tokens of a text) whose true class has the largest output.

    Of equal outputs the first class counts as the larger, as for argmax. NaN counts as wrong.
    """

    @property
    def name(self) -> str:
        return "accuracy"

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        return Mean.of(_right(outputs, integer_labels(outputs, y)), mask)


@dataclass(frozen=True)
class SequenceAccuracy(Metric):
    """Share of examples [B, ...] of which every position that counts has its true class on top.

    For a model that sees the true tokens before each position, this is how often greedy decoding
    gives exactly the true sequence: up to a first mistake both see the same. An example counts 1,
    or 0 if none of its positions does; weights other than 0 are alike.
    """

    @property
    def name(self) -> str:
        return "sequence_accuracy"

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        labels = integer_labels(outputs, y)
        counts = jnp.broadcast_to(expand(mask, labels), labels.shape) != 0
        positions = tuple(range(1, labels.ndim))
        right = jnp.all(_right(outputs, labels) | ~counts, positions)
        return Mean.of(right, jnp.any(counts, positions))


@dataclass(frozen=True)
class Perplexity(Metric):
    """exp of the mean cross-entropy in nats, without label smoothing or class weights."""

    lower_is_better = True

    @property
    def name(self) -> str:
        return "perplexity"

    def result(self, sums: Mean) -> Any:
        return np.exp(sums.value())

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        return Mean.of(cross_entropy(outputs, integer_labels(outputs, y)), mask)


@dataclass(frozen=True)
class BitsPerByte(Metric):
    """Cross-entropy in bits, per byte (UTF-8) of the text: comparable between tokenizers.

    A target that stands for no bytes, such as a separator, adds bits alone. Exact over any part of
    a text.

    Attributes:
      tokenizer: the description of a tokenizer, as the data has it.
    """

    tokenizer: Any
    lower_is_better = True

    @property
    def name(self) -> str:
        return "bits_per_byte"

    def result(self, sums: Mean) -> Any:
        return sums.value() / np.log(2)

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        labels = integer_labels(outputs, y)
        bytes_V = jnp.asarray(self.tokenizer.open().token_bytes(), jnp.float32)
        if len(bytes_V) > outputs.shape[-1]:
            raise ValueError(
                f"BitsPerByte: outputs of shape {outputs.shape} are fewer than the tokenizer's"
                f" {len(bytes_V)} tokens"
            )
        nats = Mean.of(cross_entropy(outputs, labels), mask)
        size = Mean.of(bytes_V.at[labels].get(mode="fill", fill_value=0), mask)
        return Mean(nats.total, size.total)


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
        return Mean.of(jnp.sum(_ahead(outputs, integer_labels(outputs, y)), -1) < self.k, mask)


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
        labels = integer_labels(outputs, y)
        counts = jax.nn.one_hot(labels, self.num_classes) * expand(mask, labels)[..., None]
        right = counts * _right(outputs, labels)[..., None]
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
        labels = integer_labels(outputs, y)
        truth = jax.nn.one_hot(labels, self.num_classes) * expand(mask, labels)[..., None]
        given = jax.nn.one_hot(jnp.argmax(outputs, -1), self.num_classes)
        # at full precision: an accelerator would else be free to round the sums of a large batch
        total = jnp.einsum("...t,...g->tg", truth, given, precision=jax.lax.Precision.HIGHEST)
        return Mean(total, jnp.sum(truth, tuple(range(labels.ndim)))[:, None])


@dataclass(frozen=True)
class _Counted(Metric):
    """A ratio of counts of each class, averaged.

    total, [3, K]: how often a class is given rightly, given at all, and true. weight: examples.
    As in scikit-learn, a ratio 0/0 is 0, and "macro" is over classes that are true or given at
    least once.

    Attributes:
      average: "binary": of class 1 of two, for outputs [B, 2], or [B] and [B, 1], which say class 1
        where they are above 0; "macro": the mean over the classes; "micro": of the counts added up
        over the classes, which is the accuracy.
    """

    average: Literal["binary", "macro", "micro"]

    def __post_init__(self) -> None:
        if self.average not in ("binary", "macro", "micro"):
            which = f"{type(self).__name__}.average={self.average!r}"
            raise ValueError(f"{which}: expected binary, macro or micro")

    @property
    def name(self) -> str:
        name = type(self).__name__.lower()
        return name if self.average == "binary" else f"{self.average}_{name}"

    @abstractmethod
    def ratio(self, right: Any, given: Any, true: Any) -> tuple[Any, Any]:
        """Numerator and denominator."""

    def result(self, sums: Mean) -> float:
        counts_3xK = np.asarray(sums.total, np.float64)
        if np.all(sums.weight == 0):
            return float("nan")
        if self.average == "binary":
            counts_3xK = counts_3xK[:, 1:]
        elif self.average == "macro":
            counts_3xK = counts_3xK[:, counts_3xK[1:].any(0)]
        else:
            counts_3xK = counts_3xK.sum(1, keepdims=True)
        above, below = self.ratio(*counts_3xK)
        return float(np.mean(np.divide(above, below, out=np.zeros_like(below), where=below != 0)))

    def __call__(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        if self.average == "binary":
            outputs, y = two_classes(outputs, y)
            if outputs.shape[-1] != 2:
                raise ValueError(f"{self}: outputs of shape {outputs.shape} are not of 2 classes")
        labels = integer_labels(outputs, y)
        weights = jnp.broadcast_to(expand(mask.astype(jnp.float32), labels), labels.shape)
        true = jax.nn.one_hot(labels, outputs.shape[-1]) * weights[..., None]
        given = jax.nn.one_hot(jnp.argmax(outputs, -1), outputs.shape[-1]) * weights[..., None]
        axes = tuple(range(labels.ndim))
        counts = [jnp.sum(n, axes) for n in (true * (given != 0), given, true)]
        return Mean(jnp.stack(counts), jnp.sum(weights))


class Precision(_Counted):
    """Of what is given a class, the share that has it."""

    def ratio(self, right: Any, given: Any, true: Any) -> tuple[Any, Any]:
        return right, given


class Recall(_Counted):
    """Of what has a class, the share that is given it."""

    def ratio(self, right: Any, given: Any, true: Any) -> tuple[Any, Any]:
        return right, true


class F1(_Counted):
    """Harmonic mean of precision and recall; "macro" is the mean of that of each class."""

    def ratio(self, right: Any, given: Any, true: Any) -> tuple[Any, Any]:
        return 2 * right, given + true


def two_classes(outputs: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, 2] and i32[B], also of a model with one output, the logit of yes, [B] or [B, 1].

    Its truths are booleans, 0 and 1, or chances, of which above a half is yes.
    """
    if y.ndim == 1 and outputs.shape in (y.shape, (*y.shape, 1)):
        yes = outputs.reshape(y.shape)
        return jnp.stack([jnp.zeros_like(yes), yes], -1), (y > 0.5).astype(jnp.int32)
    return outputs, y


def _check_classes(metric: Any, outputs: jax.Array) -> None:
    if outputs.shape[-1] != metric.num_classes:
        has, name = outputs.shape[-1], type(metric).__name__
        raise ValueError(
            f"{metric}: the model's outputs, of shape {outputs.shape}, are {has}: set {name}({has})"
        )


def integer_labels(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Integer labels [B, ...] from integer or soft ones."""
    if outputs.ndim < 2 or outputs.shape[-1] < 2:
        raise ValueError(f"outputs of shape {outputs.shape}: expected [B, ..., classes >= 2]")
    soft = jnp.issubdtype(y.dtype, jnp.floating)
    if y.shape != (outputs.shape if soft else outputs.shape[:-1]):
        kind = "soft" if soft else "integer"
        raise ValueError(f"{kind} labels of shape {y.shape} do not fit outputs of {outputs.shape}")
    return jnp.argmax(y, -1) if soft else y


def _right(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the true class has the largest output, bool[B, ...]."""
    return ~jnp.any(_ahead(outputs, labels), -1)


def _ahead(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Which classes stand before the true one, bool[B, ..., K]; all if it has NaN or is none."""
    classes, labels = jnp.arange(outputs.shape[-1]), labels[..., None]
    own = pick(outputs, labels[..., 0])[..., None]
    return ~((outputs < own) | ((outputs == own) & (classes >= labels)))
