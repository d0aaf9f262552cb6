"""Losses per example, in float32; what is averaged, and how, is one place: `metrics.Mean`.

The functions are plain maths. The frozen classes are what an experiment holds: called, they give
one loss per example; `weights` says how much each example counts; `mean` puts both together with
the mask.

Shapes: B: examples, ...: further axes of an example (positions of a text), K: classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco.metrics import Mean, cross_entropy, expand


def softmax_cross_entropy(
    logits: jax.Array, y: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """-Σ_k target_k · log softmax(logits)_k, with its gradient softmax - target. In nats.

    Args:
      logits: [..., K], finite.
      y: integer labels [...] from 0 to K-1 (any other gives NaN), or soft labels [..., K] that sum
        to 1, in floating point.
      label_smoothing: a, for target = (1 - a)·y + a/K (Szegedy et al. 2016, section 7).

    Returns:
      f32[...].

    Raises:
      ValueError: the shapes do not fit.
    """
    classes = logits.shape[-1] if logits.ndim else 0
    soft = jnp.issubdtype(y.dtype, jnp.floating)
    if classes < 2 or y.shape != (logits.shape if soft else logits.shape[:-1]):
        raise ValueError(
            f"softmax cross-entropy: logits of shape {logits.shape} and {y.dtype} labels of shape"
            f" {y.shape}; expected [..., K >= 2] with integers [...] or soft labels [..., K]"
        )
    if not soft:
        return cross_entropy(logits, y, label_smoothing)
    target = (1 - label_smoothing) * y.astype(jnp.float32) + label_smoothing / classes
    return -jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32)), -1)


def sigmoid_binary_cross_entropy(
    logits: jax.Array, y: jax.Array, pos_weight: Any = 1.0
) -> jax.Array:
    """-p·y·log σ(z) - (1 - y)·log(1 - σ(z)), elementwise, for any logits z. In nats.

    Args:
      logits: any shape.
      y: the same shape; the probability of yes: booleans, 0 and 1, or between.
      pos_weight: p, how much a yes counts; broadcasts to the shape of `logits`.

    Returns:
      f32, the shape of `logits`.

    Raises:
      ValueError: the shapes differ.
    """
    _check_equal("sigmoid cross-entropy", logits, y)
    z, y = logits.astype(jnp.float32), y.astype(jnp.float32)
    return -(pos_weight * y * jax.nn.log_sigmoid(z) + (1 - y) * jax.nn.log_sigmoid(-z))


def squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """(outputs - y)², elementwise, without a factor of ½.

    Args:
      outputs: any shape.
      y: the same shape.

    Returns:
      f32, the shape of `outputs`.

    Raises:
      ValueError: the shapes differ.
    """
    _check_equal("squared error", outputs, y)
    return jnp.square(outputs.astype(jnp.float32) - y.astype(jnp.float32))


class Loss(ABC):
    """What a run minimises: the mean of the losses, weighted and masked."""

    @abstractmethod
    def __call__(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        """The loss of each example, unweighted, f32[B] or f32[B, ...].

        Raises:
          ValueError: the shapes do not fit.
        """

    def weights(self, y: jax.Array) -> jax.Array:
        """How much each example counts, [B] or in the shape of the losses; here all alike."""
        return jnp.ones(y.shape[:1])

    def mean(self, outputs: jax.Array, y: jax.Array, mask: jax.Array) -> Mean:
        """Σ mask·weight·loss and Σ mask·weight, with mask [B] or [B, ...].

        Raises:
          ValueError: the shapes do not fit.
        """
        losses = self(outputs, y)
        return Mean.of(losses, expand(self.weights(y), losses) * expand(mask, losses))


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """Softmax cross-entropy of logits [B, ..., K]; one loss for each of [B, ...].

    An example weighs what its class weighs, and the mean is over the weights (as PyTorch's, for
    integer labels without smoothing); with soft labels it weighs their average, Σ_k y_k·weight_k.

    Raises:
      ValueError: a field is out of its range; when called, the shapes do not fit.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        smoothing = self.label_smoothing
        if not isinstance(smoothing, jax.Array) and not 0 <= smoothing < 1:
            raise ValueError(
                f"SoftmaxCrossEntropy.label_smoothing={smoothing!r}: expected 0 <= value < 1"
            )
        _check_weights("SoftmaxCrossEntropy.class_weights", self.class_weights)

    def __call__(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        _check_classes("class_weights", self.class_weights, outputs)
        return softmax_cross_entropy(outputs, y, self.label_smoothing)

    def weights(self, y: jax.Array) -> jax.Array:
        soft = jnp.issubdtype(y.dtype, jnp.floating)
        if self.class_weights is None:
            return jnp.ones(y.shape[:-1] if soft else y.shape)
        of_class = jnp.asarray(self.class_weights, jnp.float32)
        return jnp.sum(y * of_class, -1) if soft else of_class[y]


@dataclass(frozen=True)
class SigmoidBinaryCrossEntropy(Loss):
    """Sigmoid cross-entropy of logits [B, ...], averaged over all that an example holds: f32[B].

    For several yes-or-no questions, [B, K], `class_weights` makes that average a weighted one.
    Logits [B, 1] fit answers [B].

    Raises:
      ValueError: a field is out of its range; when called, the shapes do not fit.
    """

    pos_weight: float | tuple[float, ...] = 1.0  # how much a yes counts; a tuple: one for each of K
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        weight = self.pos_weight
        if not isinstance(weight, jax.Array):
            several = weight if isinstance(weight, tuple) else (weight,)
            _check_weights("SigmoidBinaryCrossEntropy.pos_weight", several)
        _check_weights("SigmoidBinaryCrossEntropy.class_weights", self.class_weights)

    def __call__(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        if isinstance(self.pos_weight, tuple):
            _check_classes("pos_weight", self.pos_weight, outputs)
        _check_classes("class_weights", self.class_weights, outputs)
        losses = sigmoid_binary_cross_entropy(
            _squeezed(outputs, y), y, jnp.asarray(self.pos_weight, jnp.float32)
        )
        weights = None if self.class_weights is None else jnp.asarray(self.class_weights)
        return _example_mean(losses, weights)


@dataclass(frozen=True)
class MeanSquaredError(Loss):
    """(outputs - y)², [B, ...], averaged over all that an example holds: f32[B].

    Outputs [B, 1] fit truths [B].
    """

    def __call__(self, outputs: jax.Array, y: jax.Array) -> jax.Array:
        return _example_mean(squared_error(_squeezed(outputs, y), y))


def _squeezed(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """A model with one output gives [B, 1], where data has [B]."""
    return outputs[..., 0] if outputs.shape == (*y.shape, 1) else outputs


def _example_mean(losses: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """The mean over all axes but the first, in which `weights` belong to the last one."""
    if weights is not None:
        losses = losses * (weights / jnp.mean(weights))
    return jnp.mean(losses, axis=tuple(range(1, losses.ndim)))


def _check_equal(what: str, outputs: jax.Array, y: jax.Array) -> None:
    if outputs.shape != y.shape:  # never broadcast: [B, 1] with [B] would make [B, B]
        raise ValueError(
            f"{what}: outputs of shape {outputs.shape} and truths of shape {y.shape};"
            " expected equal shapes"
        )


def _check_weights(name: str, weights: Sequence[float] | None) -> None:
    if weights is None or any(isinstance(w, jax.Array) for w in weights):  # of a sweep, traced
        return
    if not all(np.isfinite(w) and w >= 0 for w in weights) or not any(w > 0 for w in weights):
        raise ValueError(f"{name}={weights!r}: expected numbers of at least 0, not all of them 0")


def _check_classes(name: str, weights: Sequence[float] | None, outputs: jax.Array) -> None:
    if weights is not None and (outputs.ndim < 2 or len(weights) != outputs.shape[-1]):
        raise ValueError(f"{len(weights)} {name} do not fit outputs of shape {outputs.shape}")
