"""From a batch to outputs to sums: what training and evaluation share. All pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxeco import sharding
from jaxeco.experiment import Experiment, Views
from jaxeco.metrics import Mean, Metric, expand
from jaxeco.ranking import WholeSplit
from jaxeco.sharding import inner
from jaxeco.trees import map_named

Sums = dict[str, Mean]  # the loss and the metrics of some examples, by name, not yet divided
Kept = dict[str, dict[str, Any]]  # what metrics of a whole split keep of each example, by name


def preprocess(ex: Experiment, batch: dict[str, Any]) -> dict[str, Any]:
    for transform in ex.preprocess:
        batch = transform(batch)
    return batch


def forward(
    ex: Experiment, params: Any, variables: Any, x: Any, dropout_key: jax.Array | None
) -> tuple[Any, Any]:
    """Applies the model; trains (dropout, batch statistics) if a dropout key is given.

    In bfloat16 the parameters and inputs are cast here, so that the master copy, the batch
    statistics, the loss and the optimizer stay float32 (Micikevicius et al. 2018). A model whose
    first layers cannot do with 8 bits has a pattern of their parameters' names, `kept_float32`:
    these stay as they are, and so does x.

    Returns:
      outputs in float32, and the model's other variables as they are afterwards.
    """
    if ex.precision == "bfloat16":
        wide = getattr(inner(ex.model), "kept_float32", None)
        x = x if wide else jax.tree.map(_bfloat16, x)
        params = map_named(
            lambda name, a: a if wide and re.fullmatch(wide, name) else _bfloat16(a), params
        )
    params = sharding.gathered(ex.model, params)
    train = dropout_key is not None
    outputs, new = ex.model.apply(
        {"params": params, **variables},
        x,
        train=train,
        mutable=list(variables) if train else [],
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return jax.tree.map(lambda a: a.astype(jnp.float32), outputs), {**variables, **new}


def viewed(ex: Experiment, params: Any, variables: Any, x: Any, views: Views) -> Any:
    """The model's outputs for several views of each input, averaged by their weights.

    All pass through the model at once, those of an example side by side: memory goes with V.
    """
    x_BxV = views(x)
    B, V = x_BxV.shape[:2]
    outputs, _ = forward(ex, params, variables, x_BxV.reshape(B * V, *x.shape[1:]), None)
    weights_V = jnp.asarray(views.weights)
    return jax.tree.map(
        lambda a: jnp.tensordot(weights_V, a.reshape(B, V, *a.shape[1:]), (0, 1)), outputs
    )


def _bfloat16(a: jax.Array) -> jax.Array:
    return a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a


def measure(ex: Experiment, outputs: Any, batch: Mapping[str, Any], training: bool) -> Sums:
    """The loss and all metrics of a batch, as sums and weights.

    An example counts by its "mask" and, if the batch has them, by the "weights" of its positions.
    """
    loss = ex.loss if training or ex.eval_loss is None else ex.eval_loss
    metrics = ex.metrics if training else (*ex.metrics, *ex.eval_metrics)
    y, counts = batch["y"], batch["mask"]
    if "weights" in batch:
        counts = batch["weights"] * expand(counts, batch["weights"])
    sums = {"loss": loss.mean(outputs, y, counts)}
    return sums | {m.name: m(outputs, y, counts) for m in metrics if not isinstance(m, WholeSplit)}


def keep(ex: Experiment, outputs: Any, batch: Mapping[str, Any]) -> Kept:
    """What the metrics of a whole split need of each example of a batch, masked ones too.

    Raises:
      ValueError: the batch has weights, which these metrics do not know.
    """
    kept = {m.name: m.keep(outputs, batch["y"]) for m in whole_split(ex.eval_metrics)}
    if kept and "weights" in batch:
        raise ValueError(f"{min(kept)}: the data has weights, of which a ranking makes no use")
    return kept


def whole_split(metrics: Sequence[Metric | WholeSplit]) -> list[WholeSplit]:
    return [metric for metric in metrics if isinstance(metric, WholeSplit)]


def results(ex: Experiment, found: Mapping[str, Any]) -> dict[str, Any]:
    """What sums over all examples, and what was kept of all, come to; on the host, the loss first.

    Args:
      found: Sums and Kept, by name.
    """
    metrics = [m for m in (*ex.metrics, *ex.eval_metrics) if m.name in found]
    return {"loss": found["loss"].value(), **{m.name: m.result(found[m.name]) for m in metrics}}


def predict(ex: Experiment, params: Any, variables: Any, batch: dict[str, Any]) -> Any:
    """The model's outputs for a batch as it comes from the data."""
    return forward(ex, params, variables, preprocess(ex, batch)["x"], dropout_key=None)[0]
