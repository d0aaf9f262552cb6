"""Low-rank adaptation (Hu et al. 2021): a model whose weights stay, and what is learnt beside them.

Shapes: I a kernel's inputs, O its outputs, R rank.
"""

import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from jaxeco.models.layers import check_count
from jaxeco.trees import check_pattern, listed, map_named, named, nested


@dataclass(frozen=True)
class Lora:
    """A model with W + alpha/rank · A·B in place of each of its kernels W that is a target.

    To be used as the model itself is, by `init` and `apply`; its methods too: `method="decode"`.
    Its parameters are {"base": the model's, "lora": for each target's name "a" [I, R] and
    "b" [R, O]}. A begins normal with variance 1/I, B at 0, so that training begins at the model.
    The base has no gradient; that nothing else moves it (weight decay), and that no moments are
    kept for it, is for the optimizer to say:

        Partition((("lora/.*", AdamW(1e-3)), ("base/.*", None)))

    `apply` adds A·B to the kernels each time; to generate, take `without_lora(model, params)`,
    where it has been added for good. With precision="bfloat16" the sum is rounded to it.

    Attributes:
      targets: pattern of the names of kernels, [I, O].
      learns: pattern of the base's parameters that keep their gradient, such as a head that is new:
        "head/.*"; None: none does.

    Raises:
      ValueError: a field is out of its range; at initialisation: no parameter is a target, or one
        that is has not two axes.
    """

    model: nn.Module
    rank: int = 8
    alpha: float = 16.0
    targets: str = r"(.*/)?(query|value)/kernel"
    learns: str | None = None

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if not self.alpha > 0:
            raise ValueError(f"alpha: got {self.alpha!r}, expected a number above 0")
        check_pattern("targets", self.targets)
        check_pattern("learns", self.learns or "")

    def init(self, key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's own variables for this key, with the parameters as above."""
        variables = self.model.init(key, *args, **kwargs)
        base = variables["params"]
        shapes = {n: w.shape for n, w in named(base).items() if re.fullmatch(self.targets, n)}
        if not shapes:
            raise ValueError(
                f"Lora.targets={self.targets!r} matches no parameter; there are"
                f" {listed(named(base), most=12)}"
            )
        lora: dict[str, jax.Array] = {}
        keys = jax.random.split(jax.random.fold_in(key, 1), len(shapes))
        for (name, shape), key in zip(shapes.items(), keys):
            if len(shape) != 2:
                raise ValueError(
                    f"Lora.targets={self.targets!r} matches {name!r}, which is {list(shape)};"
                    " expected kernels of two axes"
                )
            lora[f"{name}/a"] = jax.random.normal(key, (shape[0], self.rank)) * shape[0] ** -0.5
            lora[f"{name}/b"] = jax.numpy.zeros((self.rank, shape[1]))
        return {**variables, "params": {"base": base, "lora": nested(lora)}}

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `apply`; without gradient to the base, but for what `learns`."""
        params = variables["params"]
        params = {**params, "base": map_named(self._still, params["base"])}
        return self.model.apply({**variables, "params": self.merged(params)}, *args, **kwargs)

    def _still(self, name: str, w: jax.Array) -> jax.Array:
        learns = self.learns is not None and re.fullmatch(self.learns, name)
        return w if learns else jax.lax.stop_gradient(w)

    def merged(self, params: Any) -> Any:
        """Parameters of the model alone that do the same as these."""
        lora = named(params["lora"])

        def add(name: str, w: Any) -> Any:
            if f"{name}/a" not in lora:
                return w
            return w + (self.alpha / self.rank) * (lora[f"{name}/a"] @ lora[f"{name}/b"])

        return map_named(add, params["base"])

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def trunk(self) -> nn.Module:
        return self.model.trunk

    @property
    def context(self) -> int:
        return self.model.context


def without_lora(model: Any, params: Any) -> tuple[Any, Any]:
    """The inner model with the adaptation merged in; any other model as it is."""
    return (model.model, model.merged(params)) if isinstance(model, Lora) else (model, params)
