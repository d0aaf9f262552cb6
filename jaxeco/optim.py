"""Optimizers, as small frozen descriptions that build optax transformations.

One order holds for all of them, for a parameter w with gradient g and learning rate lr:

    g  <-  g + l1·sign(w) + l2·w         coupled: the penalty l1·|w| + l2/2·|w|² joins the loss
    d   =  the optimizer's own direction, from g and its state
    w  <-  w - lr·(d + weight_decay·w)   decoupled: the optimizer's state never sees the decay

(Loshchilov & Hutter 2019 for the difference.) All three leave biases and norm scales alone. The
penalty is not part of the loss that is reported. Every epsilon sits outside the square root, beside
it in the denominator. Gradients are clipped, if at all, by the trainer.

Numeric fields may hold traced numbers, so that one program can train at many learning rates; only
the fields that are Python numbers are checked.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxeco.schedules import FRACTION, NOT_NEGATIVE, POSITIVE, Constant, Range, Schedule, require
from jaxeco.trees import check_pattern, listed, map_named, named


class Optimizer(ABC):
    """What the trainer needs from an optimizer."""

    @abstractmethod
    def build(self, total_steps: int) -> optax.GradientTransformation:
        """The transformation for a run of `total_steps`; its `update` needs the parameters."""

    @abstractmethod
    def learning_rate(self, step: int, total_steps: int) -> float:
        """The learning rate that step `step` uses, for the log. Computed on the host."""

    def trains(self, name: str, w: Any) -> bool:
        """Whether it changes the parameter `w` of that name; only the shape of `w` counts."""
        return True


@dataclass(frozen=True)
class GradientDescent(Optimizer):
    """What the optimizers share: the learning rate, and what regularises the parameters.

    Raises:
      ValueError: a number is out of its range, or a pattern is not a regular expression.
    """

    lr: float | Schedule
    l1: float = field(default=0.0, kw_only=True)  # coupled: adds l1·sign(w) to the gradient
    l2: float = field(default=0.0, kw_only=True)  # coupled: adds l2·w to the gradient
    # last names of the parameters that no penalty and no decay touches, as regular expressions
    no_decay: tuple[str, ...] = field(default=("bias", "scale"), kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.lr, Schedule):
            require(self, NOT_NEGATIVE, "lr")
        require(self, NOT_NEGATIVE, "l1", "l2")
        for pattern in self.no_decay:
            check_pattern(f"{type(self).__name__}.no_decay", pattern)

    def build(self, total_steps: int) -> optax.GradientTransformation:
        return optax.chain(
            self._add_penalty(self.l1, self.l2),
            self._direction(),
            optax.scale_by_learning_rate(self._schedule().build(total_steps)),
        )

    def learning_rate(self, step: int, total_steps: int) -> float:
        return float(self._schedule().build(total_steps)(step))

    @abstractmethod
    def _direction(self) -> optax.GradientTransformation:
        """From gradients to d of the module's text, any decoupled decay included."""

    def _schedule(self) -> Schedule:
        # always a schedule, so that the state has one structure whatever the learning rate is
        return self.lr if isinstance(self.lr, Schedule) else Constant(self.lr)

    def _add_penalty(self, l1: float, l2: float) -> optax.GradientTransformation:
        """Adds l1·sign(w) + l2·w, on the parameters that are regularised."""

        def spared(path: str) -> bool:
            return any(re.fullmatch(p, path.rpartition("/")[2]) for p in self.no_decay)

        def add(path: str, g: jax.Array, w: jax.Array) -> jax.Array:
            if spared(path):
                return g
            g = g if _is_zero(l1) else g + l1 * jnp.sign(w)
            return g if _is_zero(l2) else g + l2 * w

        return optax.stateless(lambda updates, params: map_named(add, updates, params))


def clip_by_global_norm(longest: float) -> optax.GradientTransformation:
    """Shortens gradients to a norm of `longest` over all parameters (Pascanu et al. 2013).

    As optax's, but the squares are summed by products: XLA's sums are slow on CPU.
    """

    def update(updates: Any, params: Any) -> Any:
        squares = [jnp.vdot(g, g, precision="highest") for g in jax.tree.leaves(updates)]
        scale = jnp.minimum(1, longest / jnp.sqrt(sum(squares)))
        return jax.tree.map(lambda g: g * scale, updates)

    return optax.stateless(update)


@dataclass(frozen=True)
class SGD(GradientDescent):
    """Stochastic gradient descent, d = g. Here `l2` and `weight_decay` come to the same update."""

    weight_decay: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, NOT_NEGATIVE, "weight_decay")

    def _direction(self) -> optax.GradientTransformation:
        return self._add_penalty(0.0, self.weight_decay)


@dataclass(frozen=True)
class Momentum(SGD):
    """SGD with momentum γ, v = 0 at first.

    Classic ("heavy ball", Polyak 1964): v <- γv + g, d = v. Averaged: v <- γv + (1 - γ)g, which is
    the classic form at a learning rate 1 - γ times as high. Nesterov: looks one step of v ahead,
    d = γv + g (or γv + (1 - γ)g) after v was updated; this is the form of Sutskever et al. 2013,
    eq. 3-4, written for the looked-ahead parameters, as PyTorch has it.
    """

    momentum: float = field(default=0.9, kw_only=True)
    nesterov: bool = field(default=False, kw_only=True)
    averaged: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, FRACTION, "momentum")

    def _direction(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale(1 - self.momentum) if self.averaged else optax.identity(),
            optax.trace(self.momentum, self.nesterov),
            super()._direction(),
        )


@dataclass(frozen=True)
class AdaGrad(GradientDescent):
    """AdaGrad (Duchi et al. 2011): s <- s + g², d = g / (√s + eps), s = `initial` at first."""

    eps: float = field(default=1e-10, kw_only=True)
    initial: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, POSITIVE, "eps")
        require(self, NOT_NEGATIVE, "initial")

    def _direction(self) -> optax.GradientTransformation:
        # optax.scale_by_rss has its epsilon inside the root, where 1e-10 is no longer small

        def init(params: Any) -> optax.ScaleByRssState:
            return optax.ScaleByRssState(
                jax.tree.map(lambda w: jnp.full_like(w, self.initial), params)
            )

        def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            s = jax.tree.map(lambda s, g: s + g * g, state.sum_of_squares, grads)
            d = jax.tree.map(lambda s, g: g / (jnp.sqrt(s) + self.eps), s, grads)
            return d, optax.ScaleByRssState(s)

        return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class RMSProp(GradientDescent):
    """RMSProp (Hinton 2012, lecture 6e): s <- ρs + (1 - ρ)g², r = g / (√s + eps), s = 0 at first.

    Centred (Graves 2013, eq. 38-41): also m <- ρm + (1 - ρ)g, and s - m² stands for s.
    d = r, or with momentum γ: v <- γv + r, d = v.
    """

    rho: float = field(default=0.9, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)
    momentum: float = field(default=0.0, kw_only=True)
    centered: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, FRACTION, "rho", "momentum")
        require(self, POSITIVE, "eps")

    def _direction(self) -> optax.GradientTransformation:
        scale = (
            _scale_by_deviation(self.rho, self.eps)
            if self.centered
            else optax.scale_by_rms(self.rho, self.eps, eps_in_sqrt=False)
        )
        return scale if _is_zero(self.momentum) else optax.chain(scale, optax.trace(self.momentum))


def _scale_by_deviation(rho: float, eps: float) -> optax.GradientTransformation:
    # optax.scale_by_stddev takes the root of s - m² as it comes: rounded below 0, that is NaN

    def init(params: Any) -> optax.ScaleByRStdDevState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByRStdDevState(mu=zeros, nu=zeros)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        m = jax.tree.map(lambda m, g: rho * m + (1 - rho) * g, state.mu, grads)
        s = jax.tree.map(lambda s, g: rho * s + (1 - rho) * g * g, state.nu, grads)
        d = jax.tree.map(
            lambda g, m, s: g / (jnp.sqrt(jnp.maximum(s - m * m, 0)) + eps), grads, m, s
        )
        return d, optax.ScaleByRStdDevState(mu=m, nu=s)

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class Adam(GradientDescent):
    """Adam (Kingma & Ba 2015, algorithm 1), with m = s = 0 at first and t counted from 1.

    m <- β1·m + (1 - β1)g, s <- β2·s + (1 - β2)g²,
    d = m/(1 - β1^t) / (√(s/(1 - β2^t)) + eps).
    """

    b1: float = field(default=0.9, kw_only=True)
    b2: float = field(default=0.999, kw_only=True)
    eps: float = field(default=1e-8, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, FRACTION, "b1", "b2")
        require(self, POSITIVE, "eps")

    def _direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    As in optax and PyTorch the decay is times the whole learning rate: w <- w - lr·weight_decay·w.
    """

    weight_decay: float = field(default=1e-2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, NOT_NEGATIVE, "weight_decay")

    def _direction(self) -> optax.GradientTransformation:
        return optax.chain(super()._direction(), self._add_penalty(0.0, self.weight_decay))


@dataclass(frozen=True)
class Muon(GradientDescent):
    """Muon (Jordan et al. 2024) for the weight matrices, `rest` for every other parameter.

    The momentum (an average, corrected for its start at 0; or where `averaged` is False, the sum of
    airbench) is made nearly orthogonal by `ns_steps` Newton-Schulz steps, so that all its singular
    values come to lie around 1: of a sum and an average alike; d is that, times
    √max(1, out/in) for a matrix [in, out], or times `consistent_rms`·√max(in, out), where 0.2 gives
    updates the size of AdamW's (Liu et al. 2025). With `fixed_norm`, w is scaled to the norm √out
    before each update (as in airbench, Jordan 2024), which suits layers before a normalisation.

    A parameter is a weight matrix if `matrices`, a regular expression, matches its whole path
    ("block/conv/kernel") and it has two axes or more. More than two are read as a convolution's,
    (H, W, in, out) -> (H·W·in, out); do not let `matrices` match kernels whose *output* has several
    axes, such as an attention's (in, heads, width), or whose first axis counts layers. Embeddings
    are none as it is; the head of a language model should be none either (Jordan et al. 2024):
    matrices=".*/block_.*/kernel".

    Raises at initialisation:
      ValueError: no parameter of the model is a weight matrix.
    """

    rest: Optimizer = field(kw_only=True)
    momentum: float = field(default=0.95, kw_only=True)
    nesterov: bool = field(default=True, kw_only=True)
    averaged: bool = field(default=True, kw_only=True)
    ns_steps: int = field(default=5, kw_only=True)
    consistent_rms: float | None = field(default=None, kw_only=True)
    fixed_norm: bool = field(default=False, kw_only=True)  # each matrix keeps its norm at √out
    weight_decay: float = field(default=0.0, kw_only=True)
    matrices: str = field(default="(.*/)?kernel", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, FRACTION, "momentum")
        require(self, NOT_NEGATIVE, "weight_decay")
        if not isinstance(self.rest, Optimizer):
            raise ValueError(f"Muon.rest={self.rest!r}: expected an optimizer, such as AdamW(3e-4)")
        if not isinstance(self.ns_steps, int) or self.ns_steps < 1:
            raise ValueError(f"Muon.ns_steps={self.ns_steps!r}: expected an int of at least 1")
        if self.consistent_rms is not None:
            require(self, POSITIVE, "consistent_rms")
        check_pattern("Muon.matrices", self.matrices)

    def build(self, total_steps: int) -> optax.GradientTransformation:
        muon = super().build(total_steps)
        if self.fixed_norm:
            muon = optax.chain(muon, optax.stateless(_to_fixed_norm))
        transforms = {"muon": muon, "rest": self.rest.build(total_steps)}
        return optax.partition(transforms, self._labels)

    def trains(self, name: str, w: Any) -> bool:
        return self._is_matrix(name, w) or self.rest.trains(name, w)

    def _is_matrix(self, name: str, w: Any) -> bool:
        if len(w.shape) < 2 or not re.fullmatch(self.matrices, name):
            return False
        if "blocks" in name.split("/"):
            raise ValueError(
                f"Muon would read {name!r} as one matrix, but it is those of all layers: set"
                " scan_layers=False, or name other matrices"
            )
        return True

    def _labels(self, params: Any) -> Any:
        labels = map_named(lambda name, w: "muon" if self._is_matrix(name, w) else "rest", params)
        if "muon" not in jax.tree.leaves(labels):
            raise ValueError(
                f"Muon.matrices={self.matrices!r} matches no parameter with two axes or more;"
                f" there are {listed(named(params))}"
            )
        return labels

    def _direction(self) -> optax.GradientTransformation:
        def size(d: jax.Array) -> jax.Array:
            outputs = d.shape[-1]
            inputs = d.size // outputs
            if self.consistent_rms is None:
                return d * max(1, outputs / inputs) ** 0.5
            return d * (self.consistent_rms * max(inputs, outputs) ** 0.5)

        momentum = _mean_of_gradients if self.averaged else optax.trace
        return optax.chain(
            momentum(self.momentum, self.nesterov),
            optax.stateless(lambda updates, params: _orthogonalised(updates, self.ns_steps)),
            optax.stateless(lambda updates, params: jax.tree.map(size, updates)),
            self._add_penalty(0.0, self.weight_decay),
        )


class MuonState(NamedTuple):
    steps: jax.Array  # i32[]
    mu: Any  # mean of the gradients


def _mean_of_gradients(beta: float, nesterov: bool) -> optax.GradientTransformation:
    """m <- β·m + (1 - β)g, then m/(1 - β^t), as one step further where `nesterov` looks ahead."""

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        t = state.steps + 1
        mu = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.mu, grads)

        def corrected(m: jax.Array, g: jax.Array) -> jax.Array:
            if not nesterov:
                return m / (1 - beta**t)
            return beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)

        return jax.tree.map(corrected, mu, grads), MuonState(t, mu)

    return optax.GradientTransformation(init, update)


def _orthogonalised(tree: Any, steps: int) -> Any:
    """Each leaf [..., out] as a matrix made nearly orthogonal; those of one shape together."""
    leaves = jax.tree.leaves(tree)
    matrices = [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves]
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault(matrix.shape, []).append(i)
    for places in alike.values():
        stacked = _newton_schulz(jnp.stack([matrices[i] for i in places]), steps)
        for i, matrix in zip(places, stacked):
            matrices[i] = matrix
    done = [matrix.reshape(leaf.shape) for matrix, leaf in zip(matrices, leaves)]
    return jax.tree.unflatten(jax.tree.structure(tree), done)


def _newton_schulz(x_NxIxO: jax.Array, steps: int) -> jax.Array:
    """N matrices made nearly orthogonal by x <- a·x + (b·xxᵀ + c·(xxᵀ)²)x (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x_NxIxO.shape[1] > x_NxIxO.shape[2]
    x = x_NxIxO.mT if tall else x_NxIxO  # so that xxᵀ is the smaller of the two squares
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _to_fixed_norm(updates: Any, params: Any) -> Any:
    """Updates that also bring each parameter, as it was before, to the norm √(its outputs)."""

    def scaled(u: jax.Array, w: jax.Array) -> jax.Array:
        return u + w * (w.shape[-1] ** 0.5 / jnp.linalg.norm(w) - 1)

    return jax.tree.map(scaled, updates, params)


@dataclass(frozen=True)
class Partition(Optimizer):
    """Another optimizer for each kind of parameter.

    `rules` are pairs of a regular expression and an optimizer, or None to freeze. A parameter falls
    under the first rule whose expression matches its whole path ("head/kernel"). The learning rate
    that is logged is that of the first rule which trains.

    Raises:
      ValueError: a rule is no such pair, or all of them freeze; at initialisation: a parameter
        falls under no rule, or no parameter under a rule.
    """

    rules: tuple[tuple[str, Optimizer | None], ...]

    def __post_init__(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, tuple) or len(rule) != 2:
                raise ValueError(f"Partition.rules: {rule!r}: expected (pattern, optimizer)")
            check_pattern("Partition.rules", rule[0])
            if not isinstance(rule[1], Optimizer | None):
                raise ValueError(f"Partition.rules: {rule!r}: expected an optimizer, or None")
        if not self._trained():
            raise ValueError(f"Partition.rules={self.rules!r}: expected one optimizer or more")

    def build(self, total_steps: int) -> optax.GradientTransformation:
        transforms = {
            f"rule{i}": optimizer.build(total_steps) if optimizer else optax.set_to_zero()
            for i, (_, optimizer) in enumerate(self.rules)
        }
        return optax.partition(transforms, self._labels)

    def trains(self, name: str, w: Any) -> bool:
        _, optimizer = self.rules[self._rule(name)]
        return optimizer is not None and optimizer.trains(name, w)

    def learning_rate(self, step: int, total_steps: int) -> float:
        return self._trained()[0].learning_rate(step, total_steps)

    def _trained(self) -> list[Optimizer]:
        return [optimizer for _, optimizer in self.rules if optimizer is not None]

    def _rule(self, name: str) -> int:
        for i, (pattern, _) in enumerate(self.rules):
            if re.fullmatch(pattern, name):
                return i
        patterns = ", ".join(repr(pattern) for pattern, _ in self.rules)
        raise ValueError(f"Partition: no rule matches the parameter {name!r}; of {patterns}")

    def _labels(self, params: Any) -> Any:
        labels = map_named(lambda name, _: f"rule{self._rule(name)}", params)
        used = set(jax.tree.leaves(labels))
        for i, (pattern, _) in enumerate(self.rules):
            if f"rule{i}" not in used:
                raise ValueError(
                    f"Partition: no parameter falls under the rule {pattern!r}, by itself or after"
                    f" the rules before it; there are {listed(named(params))}"
                )
        return labels


@dataclass(frozen=True)
class Layerwise(Optimizer):
    """Smaller steps the nearer a layer is to the input (Clark et al. 2020, as "layerwise decay").

    The whole update of `optimizer`, decay of the weights included, is scaled: by 1 for what comes
    after the blocks, by decay^(L - i) for block i of L, by decay^(L + 1) for the embeddings. The
    learning rate that is logged is that of the top.

    Attributes:
      layers: L, of the deeper one if there are two stacks.
      block: pattern of the names of parameters in a block; its first group is the block's number.
      embed: pattern of those before the blocks.

    Raises:
      ValueError: a field is out of its range; at the first update: there are more than L blocks, or
        none.
    """

    optimizer: Optimizer
    decay: float
    layers: int
    block: str = field(default=r"(?:.*/)?block_(\d+)/.*", kw_only=True)
    embed: str = field(default=r"(?:.*/)?(?:\w+_embed|norm_in)/.*", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise ValueError(f"Layerwise.optimizer={self.optimizer!r}: expected an optimizer")
        require(self, Range(lambda v: 0 < v <= 1, "a number above 0, at most 1"), "decay")
        check_pattern("Layerwise.block", self.block)
        check_pattern("Layerwise.embed", self.embed)
        if re.compile(self.block).groups < 1:
            raise ValueError(
                f"Layerwise.block={self.block!r}: expected a group: the block's number"
            )

    def build(self, total_steps: int) -> optax.GradientTransformation:
        def scale(updates: Any, params: Any) -> Any:
            depths = self._depths(updates)
            return jax.tree.map(lambda u, depth: u * self.decay**depth, updates, depths)

        return optax.chain(self.optimizer.build(total_steps), optax.stateless(scale))

    def learning_rate(self, step: int, total_steps: int) -> float:
        return self.optimizer.learning_rate(step, total_steps)

    def trains(self, name: str, w: Any) -> bool:
        return self.optimizer.trains(name, w)

    def _depths(self, tree: Any) -> Any:
        """How many layers each leaf lies below the top."""
        blocks = {
            name: int(match[1]) for name in named(tree) if (match := re.fullmatch(self.block, name))
        }
        if not blocks:
            raise ValueError(
                f"Layerwise.block={self.block!r} matches no parameter;"
                f" there are {listed(named(tree))}"
            )
        if self.layers < (found := 1 + max(blocks.values())):
            raise ValueError(f"Layerwise.layers={self.layers}: the model has {found} blocks")

        def depth(name: str, _: Any) -> int:
            if name in blocks:
                return self.layers - blocks[name]
            return self.layers + 1 if re.fullmatch(self.embed, name) else 0

        return map_named(depth, tree)


def _is_zero(value: Any) -> bool:
    """Whether it is 0 for sure; a traced number is not."""
    return isinstance(value, (int, float)) and value == 0
