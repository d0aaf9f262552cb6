"""Exact evaluation: every example of a split counts once, whatever the batch and device count."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco import axes
from jaxeco.experiment import Experiment
from jaxeco.metrics import Mean

Sums = dict[str, Mean]


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


def values(sums: Sums) -> dict[str, Any]:
    """Sums divided by their weights, on the host; the loss first, as people read it."""
    return {name: sums[name].value() for name in ("loss", *(n for n in sums if n != "loss"))}


def preprocess(ex: Experiment, batch: dict[str, Any]) -> dict[str, Any]:
    for transform in ex.preprocess:
        batch = transform(batch)
    return batch


def eval_step(ex: Experiment, model: tuple[Any, Any], batch: dict[str, Any]) -> tuple[Sums, Any]:
    """Pure. `model` is (params, other variables).

    Returns:
      sums over the batch, and the number of its examples that counted.
    """
    params, variables = model
    batch = preprocess(ex, batch)
    outputs, _ = forward(ex, params, variables, batch["x"], dropout_key=None)
    sums = measure(ex, outputs, batch, training=False)
    return axes.global_sum((sums, jnp.sum(batch["mask"], dtype=jnp.int32)))


def predict(ex: Experiment, model: tuple[Any, Any], batch: dict[str, Any]) -> Any:
    """The model's outputs for a batch as it comes from the data. Pure."""
    params, variables = model
    return forward(ex, params, variables, preprocess(ex, batch)["x"], dropout_key=None)[0]


def evaluate(
    step: Callable[[Any], tuple[Sums, Any]],
    fed: Iterable[Any],
    size: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Runs `step` over all of `fed` and divides once, at the end, in float64.

    Args:
      step: from one call's arrays to (sums, count), on the device.
      fed: the padded batches of a split.
      size: examples in the split.
      stop: asked between batches; if it says so the evaluation is abandoned.

    Returns:
      The value of each metric, or None if it was abandoned.

    Raises:
      RuntimeError: the examples counted are not `size`.
    """
    totals, pending = None, None

    def add(totals: Any, results: Any) -> Any:
        host = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(results))
        return host if totals is None else jax.tree.map(np.add, totals, host)

    for arrays in fed:
        if stop():
            return None
        results = step(arrays)
        if pending is not None:  # read the last batch while the device works on this one
            totals = add(totals, pending)
        pending = results
    sums, count = add(totals, pending)
    if count != size:
        raise RuntimeError(f"evaluation counted {count:.0f} examples of {size}")
    return values(sums)
