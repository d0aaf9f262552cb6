"""Exact evaluation: every example of a split counts once, whatever the batch and device count."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxeco import axes, parallel
from jaxeco.data.dataset import Dataset
from jaxeco.data.pipeline import Feed, assemble, fits
from jaxeco.experiment import Experiment
from jaxeco.forward import Sums, forward, measure, preprocess, results


def eval_step(
    ex: Experiment, params: Any, variables: Any, batch: dict[str, Any]
) -> tuple[Sums, jax.Array]:
    """Sums over a batch, and the number of its examples that counted, i32[]. Pure."""
    count = jnp.sum(batch["mask"], dtype=jnp.int32)
    batch = preprocess(ex, batch)
    outputs, _ = forward(ex, params, variables, batch["x"], dropout_key=None)
    return axes.global_sum((measure(ex, outputs, batch, training=False), count))


class Evaluator:
    """Evaluates models on one split; its compiled step and its data stay in place."""

    def __init__(self, ex: Experiment, dataset: Dataset, mesh: Mesh) -> None:
        self.ex, self.size = ex, len(dataset)
        self.feed = Feed.evaluation(
            dataset,
            ex.eval_batch,
            resident=fits(dataset, ex.resident_bytes),
            place=partial(parallel.place, mesh=mesh),
        )

        def step(model: tuple[Any, Any], resident: Any, fed_n: Any) -> tuple[Sums, jax.Array]:
            first = jax.tree.map(lambda a: a[0], fed_n)
            return eval_step(ex, *model, assemble(resident, first))

        self.step = parallel.compiled(step, ex.parallel, mesh, donate=False)

    def __call__(
        self, params: Any, variables: Any, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """The value of each metric over the whole split; divided once, in float64.

        Args:
          stop: asked between batches; if it says so, the evaluation is abandoned.

        Returns:
          values by name, or None if it was abandoned.

        Raises:
          RuntimeError: not every example was counted once.
        """
        totals: Any = None
        waiting: list[Any] = []  # the batch that the device works on while the last one is added

        def add() -> None:
            nonlocal totals
            host = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(waiting.pop()))
            totals = host if totals is None else jax.tree.map(np.add, totals, host)

        with self.feed as feed:
            for i in range(feed.steps):
                if stop():
                    return None
                sums = self.step((params, variables), feed.resident, feed.fed(i))
                if waiting:
                    add()
                waiting.append(sums)
        add()
        sums, count = totals
        if count != self.size:
            raise RuntimeError(f"evaluation counted {count:.0f} examples of {self.size}")
        return results(self.ex, sums)
