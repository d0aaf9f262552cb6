"""Exact evaluation: every example of a split counts once, whatever the batch and device count."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco import axes, parallel
from jaxeco.data.dataset import Dataset
from jaxeco.data.image import augmented
from jaxeco.data.pipeline import Feed, assemble, fits
from jaxeco.errors import UserError
from jaxeco.experiment import Experiment, Views
from jaxeco.forward import Kept, Sums, forward, keep, measure, preprocess, results, viewed


def eval_step(
    ex: Experiment,
    params: Any,
    variables: Any,
    batch: dict[str, Any],
    views: Views | None = None,
) -> tuple[tuple[Sums, jax.Array], Kept]:
    """What a batch comes to. Pure.

    `eval_augment` draws from keys that depend on an example's "index" in the split alone: every
    evaluation hides the same tokens, however the split is batched.

    Returns:
      sums and the number of examples that counted, i32[]; and what is kept of each example, [B].
    """
    count = jnp.sum(batch["mask"], dtype=jnp.int32)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch["index"])
    batch = augmented(ex.eval_augment, keys_B, preprocess(ex, batch))
    if views is None:
        outputs, _ = forward(ex, params, variables, batch["x"], dropout_key=None)
    else:
        outputs = viewed(ex, params, variables, batch["x"], views)
    sums = measure(ex, outputs, batch, training=False)
    return axes.global_sum((sums, count)), axes.global_concat(keep(ex, outputs, batch))


Evaluate = Callable[[Any, dict[str, Any]], tuple[tuple[Sums, jax.Array], Kept]]


class Evaluator:
    """Evaluates models on one split; its compiled step and its data stay in place."""

    def __init__(
        self,
        ex: Experiment,
        dataset: Dataset,
        evaluate: Evaluate,
        compiled: Callable[[parallel.Function], parallel.Function],
        place: Callable[[Any], Any],
        share: np.ndarray | None = None,
    ) -> None:
        """Compiles nothing yet, and puts the data where it is to lie, if it fits.

        Args:
          evaluate: from a model, which may be any pytree, and a batch to what `eval_step` returns;
            of several models each array has an axis of models in front.
          compiled: compiles a function of (model, resident, fed_n).
          place, share: as `Feed.evaluation` takes them.
        """
        self.ex, self.name, self.size = ex, dataset.name, dataset.eval_examples
        self.feed = Feed.evaluation(
            dataset,
            ex.eval_batch,
            resident=fits(dataset, ex.resident_bytes),
            place=place,
            share=share,
            workers=ex.read_workers,
        )

        def step(model: Any, resident: Any, fed_n: Any) -> tuple[Any, Kept]:
            first = jax.tree.map(lambda a: a[0], fed_n)
            return evaluate(model, assemble(resident, first))

        self.step = compiled(step)

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
          UserError: the weights of all examples are 0.
        """
        found = self.measured((params, variables), stop)
        return None if found is None else results(self.ex, found)

    def measured(self, model: Any, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """As a call, but before the division: sums in float64, and what is kept of all examples.

        Of several models each array has an axis of models in front.
        """
        totals: Any = None
        parts: list[Kept] = []  # of the examples that count
        waiting: list[Any] = []  # the batch that the device works on while the last one is added

        def add() -> None:
            nonlocal totals
            mask_B, found = waiting.pop()
            sums, kept = jax.device_get(found)
            sums = jax.tree.map(lambda a: np.asarray(a, np.float64), sums)
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
            axis = np.ndim(sums[1])  # of examples, behind that of models if there is one
            parts.append(jax.tree.map(lambda a: np.compress(mask_B > 0, a, axis), kept))

        with self.feed as feed:
            for i in range(feed.steps):
                if stop():
                    return None
                found = self.step(model, feed.resident, feed.fed(i))
                if waiting:
                    add()
                waiting.append((feed.plan(i)["mask"], found))
        add()
        sums, count = totals
        if np.any(count != self.size):
            raise RuntimeError(f"evaluation counted {count} examples of {self.size}")
        if np.any(sums["loss"].weight == 0):
            raise UserError(f"{self.name}: nothing counts, all weights are 0; take more of it")
        axis = np.ndim(count)
        kept = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis), *parts)
        return sums | kept
