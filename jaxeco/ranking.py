"""Metrics that rank all examples of a split by their outputs, and so are no sum over batches.

In the compiled step each keeps an array or two per example; the host gets those of every example
that counts, and works on them exactly, in float64. They are `eval_metrics`, listed as all others.

An example's score for a class is the log-odds of its softmax, log p - log(1 - p): in the order of
p, but without the ties of chances that float32 rounds to 1. Of two classes only class 1 is looked
at; of more, each against the rest. A class that no example has, or that all have, gives NaN, and
is left out of a mean over classes. NaN scores rank below all others.

Shapes: B examples of a batch, N of the split, K classes, C rankings (1 for two classes, else K), P
points of a curve.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco.metrics import integer_labels, two_classes


class WholeSplit(ABC):
    """A measure of outputs against truth that needs all examples at once."""

    lower_is_better = False  # what `Experiment.best` goes by

    @property
    @abstractmethod
    def name(self) -> str:
        """What logs and plots call it."""

    @abstractmethod
    def keep(self, outputs: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        """What it needs of each example, arrays [B, ...]; in the compiled step.

        Raises:
          ValueError: the shapes do not fit.
        """

    @abstractmethod
    def result(self, kept: dict[str, np.ndarray]) -> Any:
        """What it comes to, on the host: a float, or an array.

        Args:
          kept: what `keep` gave, [N, ...], of all examples that count, in the split's order.
        """


class _Ranking(WholeSplit):
    """One or several rankings, each a question of yes or no."""

    def keep(self, outputs: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        outputs, y = two_classes(outputs, y)
        if outputs.ndim != 2:
            raise ValueError(f"{self}: outputs of shape {outputs.shape}: expected [B, classes]")
        return {"scores": log_odds(outputs), "truth": integer_labels(outputs, y)}

    @abstractmethod
    def of(self, yes_P: np.ndarray, no_P: np.ndarray) -> Any:
        """What `counts` of one ranking come to; only asked if there are examples of both kinds."""

    @property
    @abstractmethod
    def nothing(self) -> Any:
        """What stands for a ranking without examples of one of the two kinds."""

    def each(self, kept: dict[str, np.ndarray]) -> list[Any]:
        """C results."""
        scores_NxC, truth_N = kept["scores"], kept["truth"]
        classes = [1] if scores_NxC.shape[1] == 1 else range(scores_NxC.shape[1])
        results = []
        for scores_N, label in zip(scores_NxC.T, classes, strict=True):
            yes_P, no_P = counts(scores_N, truth_N == label)
            results.append(self.of(yes_P, no_P) if yes_P[-1] and no_P[-1] else self.nothing)
        return results


class _Area(_Ranking):
    nothing = float("nan")

    def result(self, kept: dict[str, np.ndarray]) -> float:
        """The mean over the classes that have a result; NaN if none has."""
        values = [value for value in self.each(kept) if not np.isnan(value)]
        return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True)
class RocAuc(_Area):
    """Area under the ROC curve: the chance that a yes ranks above a no; a tie counts half.

    Of several classes the mean over each against the rest.
    """

    @property
    def name(self) -> str:
        return "roc_auc"

    def of(self, yes_P: np.ndarray, no_P: np.ndarray) -> float:
        return np.sum(np.diff(no_P) * (yes_P[1:] + yes_P[:-1])) / (2 * yes_P[-1] * no_P[-1])


@dataclass(frozen=True)
class AveragePrecision(_Area):
    """Σ (recall_i - recall_{i-1}) · precision_i over the distinct scores, from the highest.

    Of several classes the mean over each against the rest.
    """

    @property
    def name(self) -> str:
        return "average_precision"

    def of(self, yes_P: np.ndarray, no_P: np.ndarray) -> float:
        return np.sum(np.diff(yes_P) * yes_P[1:] / (yes_P[1:] + no_P[1:])) / yes_P[-1]


@dataclass(frozen=True)
class _Curve(_Ranking):
    """Points of the curve of each class, f64[C, points, 2], NaN where a class has none.

    Attributes:
      points: the curve as it is if it has at most so many, its last one repeated; else so many of
        them, evenly along its length.
    """

    points: int = 200

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"{type(self).__name__}.points={self.points}: expected at least 2")

    @property
    def nothing(self) -> np.ndarray:
        return np.full((self.points, 2), np.nan)

    def result(self, kept: dict[str, np.ndarray]) -> np.ndarray:
        return np.stack(self.each(kept))

    def thinned(self, x_P: np.ndarray, y_P: np.ndarray) -> np.ndarray:
        """f64[points, 2]."""
        chosen = np.minimum(np.arange(self.points), len(x_P) - 1)
        if len(x_P) > self.points:
            length_P = np.append(0, np.cumsum(np.abs(np.diff(x_P)) + np.abs(np.diff(y_P))))
            chosen = np.searchsorted(length_P, np.linspace(0, length_P[-1], self.points))
        return np.stack([x_P, y_P], -1)[chosen]


class RocCurve(_Curve):
    """Share of the yes (second) against share of the no (first) among those said to be yes.

    From (0, 0) to (1, 1), as the threshold falls over the distinct scores.
    """

    @property
    def name(self) -> str:
        return "roc_curve"

    def of(self, yes_P: np.ndarray, no_P: np.ndarray) -> np.ndarray:
        return self.thinned(no_P / no_P[-1], yes_P / yes_P[-1])


class PrecisionRecallCurve(_Curve):
    """Precision (second) against recall (first).

    From (0, 1), as the threshold falls over the distinct scores, to recall 1.
    """

    @property
    def name(self) -> str:
        return "pr_curve"

    def of(self, yes_P: np.ndarray, no_P: np.ndarray) -> np.ndarray:
        precision_P = np.append(1, yes_P[1:] / (yes_P[1:] + no_P[1:]))
        return self.thinned(yes_P / yes_P[-1], precision_P)


def log_odds(outputs_BxK: jax.Array) -> jax.Array:
    """log p - log(1 - p) of each class' softmax p, f32[B, C], to full precision near 0 and 1."""
    z_BxK = outputs_BxK.astype(jnp.float32)
    if z_BxK.shape[1] == 2:
        return z_BxK[:, 1:] - z_BxK[:, :1]
    falling_BxK = jnp.sort(z_BxK, 1, descending=True)  # sums do not depend on the order of classes
    others_Bx1 = jax.nn.logsumexp(falling_BxK[:, 1:], 1, keepdims=True)  # than one on top
    log_p_BxK = z_BxK - jax.nn.logsumexp(falling_BxK, 1, keepdims=True)
    on_top_BxK = z_BxK == falling_BxK[:, :1]
    below_BxK = log_p_BxK - jnp.log1p(-jnp.exp(jnp.where(on_top_BxK, -1, log_p_BxK)))
    return jnp.where(on_top_BxK, z_BxK - others_Bx1, below_BxK)


def counts(scores_N: np.ndarray, truth_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many yes and no have at least each distinct score, from the highest on, after a 0.

    Args:
      scores_N: numbers.
      truth_N: bool, yes or no.

    Returns:
      yes_P, no_P: i64, P - 1 distinct scores; equal scores count at once.
    """
    scores_N = np.where(np.isnan(scores_N), -np.inf, scores_N)
    order_N = np.argsort(-scores_N, kind="stable")
    scores_N, yes_N = scores_N[order_N], np.cumsum(truth_N[order_N])
    last = np.append(np.flatnonzero(scores_N[1:] != scores_N[:-1]), len(scores_N) - 1)
    return np.append(0, yes_N[last]), np.append(0, last + 1 - yes_N[last])
