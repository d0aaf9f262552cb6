"""From a batch to outputs to sums: what training and evaluation share. All pure."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxeco.experiment import Experiment
from jaxeco.metrics import Mean

Sums = dict[str, Mean]  # the loss and the metrics of some examples, by name, not yet divided


def preprocess(ex: Experiment, batch: dict[str, Any]) -> dict[str, Any]:
    for transform in ex.preprocess:
        batch = transform(batch)
    return batch


def forward(
    ex: Experiment, params: Any, variables: Any, x: Any, dropout_key: jax.Array | None
) -> tuple[Any, Any]:
    """Applies the model; trains (dropout, batch statistics) if a dropout key is given.

    In bfloat16 the parameters and inputs are cast here, so that the master copy, the batch
    statistics, the loss and the optimizer stay float32 (Micikevicius et al. 2018).

    Returns:
      outputs in float32, and the model's other variables as they are afterwards.
    """
    if ex.precision == "bfloat16":
        params, x = jax.tree.map(_bfloat16, (params, x))
    train = dropout_key is not None
    outputs, new = ex.model.apply(
        {"params": params, **variables},
        x,
        train=train,
        mutable=list(variables) if train else [],
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return jax.tree.map(lambda a: a.astype(jnp.float32), outputs), {**variables, **new}


def _bfloat16(a: jax.Array) -> jax.Array:
    return a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a


def measure(ex: Experiment, outputs: Any, batch: Mapping[str, Any], training: bool) -> Sums:
    """The loss and all metrics of a batch, as sums and weights over its unmasked examples."""
    loss = ex.loss if training or ex.eval_loss is None else ex.eval_loss
    y, mask = batch["y"], batch["mask"]
    metrics = ex.metrics if training else (*ex.metrics, *ex.eval_metrics)
    sums = {"loss": loss.mean(outputs, y, mask)}
    return sums | {metric.name: metric(outputs, y, mask) for metric in metrics}


def results(ex: Experiment, sums: Sums) -> dict[str, Any]:
    """What sums over all examples come to, on the host; the loss first, as people read it."""
    metrics = [m for m in (*ex.metrics, *ex.eval_metrics) if m.name in sums]
    return {"loss": sums["loss"].value(), **{m.name: m.result(sums[m.name]) for m in metrics}}


def predict(ex: Experiment, params: Any, variables: Any, batch: dict[str, Any]) -> Any:
    """The model's outputs for a batch as it comes from the data."""
    return forward(ex, params, variables, preprocess(ex, batch)["x"], dropout_key=None)[0]
