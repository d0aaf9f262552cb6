"""Evaluation: exact over any batches and devices, by sums and by what ranks a whole split."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from jaxeco import data, losses, metrics, models, optim, ranking
from jaxeco.data.dataset import Dataset
from jaxeco.errors import UserError
from jaxeco.experiment import Experiment, Steps
from jaxeco.forward import predict
from jaxeco.plan import Plan, plan
from jaxeco.train import State

RNG = np.random.default_rng(0)
X = RNG.integers(-2, 3, (37, 4)).astype(np.float32)  # few values: scores tie
Y = RNG.integers(0, 3, 37).astype(np.int32)
TOKENS = RNG.integers(0, 11, (37, 6)).astype(np.int32)
WEIGHTS = RNG.integers(0, 3, (37, 6)).astype(np.float32)


def experiment(**changes: Any) -> Experiment:
    ex = Experiment(
        name="test",
        train=data.Arrays(X[::-1].copy(), Y),
        evals={"test": data.Arrays(X, Y)},
        model=models.MLP(widths=(), num_classes=3),
        loss=losses.SoftmaxCrossEntropy(),
        eval_metrics=(
            metrics.Accuracy(),
            ranking.RocAuc(),
            ranking.AveragePrecision(),
            ranking.RocCurve(points=40),
        ),
        optimizer=optim.SGD(lr=0.1),
        batch=16,
        length=Steps(1),
        eval_batch=16,
    )
    return dataclasses.replace(ex, **changes)


def evaluated(p: Plan, state: State | None = None) -> dict[str, Any]:
    state = state or p.start()
    found = p.evaluators()["test"](state.params, state.variables)
    assert found is not None
    return found


@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_a_whole_split_on_eight_devices_with_an_uneven_last_batch(how: str) -> None:
    p = plan(experiment(parallel=how))
    assert p.mesh.size == 8
    state = p.start()
    found = evaluated(p, state)
    z = np.asarray(predict(p.ex, *jax.device_get((state.params, state.variables)), {"x": X}))
    scores = np.asarray(ranking.log_odds(jnp.asarray(z)))
    for name, reference in (
        ("roc_auc", roc_auc_score),
        ("average_precision", average_precision_score),
    ):
        expected = np.mean([reference(Y == k, scores[:, k]) for k in range(3)])
        assert found[name] == pytest.approx(expected, abs=1e-6)
    false, true, _ = roc_curve(Y == 1, scores[:, 1], drop_intermediate=False)
    np.testing.assert_allclose(found["roc_curve"][1][: len(true)], np.stack([false, true], 1))
    assert found["accuracy"] == pytest.approx((z.argmax(1) == Y).mean(), abs=1e-12)
    assert list(found) == ["loss", "accuracy", "roc_auc", "average_precision", "roc_curve"]


@dataclass(frozen=True)
class Texts:
    """Tokens, the same tokens to be predicted, and how much each counts."""

    first: int = 0  # tells training from evaluation
    tokenizer: Any = None

    def open(self) -> Dataset:
        x, weights = TOKENS[self.first :], WEIGHTS[self.first :]
        fields = {"x": x, "y": x, "weights": weights}
        return Dataset(
            fields, (), "texts", f"texts {self.first}", self.tokenizer, unit="tokens", units=6
        )


class Tokenwise(nn.Module):
    """The simplest language model: logits of a position by its token."""

    vocab_size: int = 11
    context: int = 6

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Embed(self.vocab_size, self.vocab_size)(x)


def texts(**changes: Any) -> Experiment:
    changes = {
        "train": Texts(first=1),
        "evals": {"test": Texts()},
        "model": Tokenwise(),
        "metrics": (metrics.Accuracy(),),
        "eval_metrics": (),
    } | changes
    return experiment(**changes)


def test_weights_of_positions_count_in_loss_and_metrics() -> None:
    p = plan(texts(eval_metrics=(metrics.Perplexity(), metrics.SequenceAccuracy())))
    state = p.start()
    found = evaluated(p, state)
    (table,) = jax.tree.leaves(jax.device_get(state.params))
    log_p = log_softmax(np.float64(table), -1)[TOKENS, TOKENS]
    loss = -(log_p * WEIGHTS).sum() / WEIGHTS.sum()
    right = table.argmax(-1)[TOKENS] == TOKENS
    rows = (right | (WEIGHTS == 0)).all(1)[WEIGHTS.any(1)]
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
    assert found["accuracy"] == pytest.approx((right * WEIGHTS).sum() / WEIGHTS.sum(), rel=1e-6)
    assert found["sequence_accuracy"] == pytest.approx(rows.mean(), abs=1e-12)


def hide(keys_B: jax.Array, batch: dict[str, Any]) -> dict[str, Any]:
    """Replaces some tokens, which are then what counts."""
    chosen_BxT = jax.vmap(lambda key: jax.random.bernoulli(key, 0.4, (6,)))(keys_B)
    weights_BxT = chosen_BxT.astype(jnp.float32)
    return batch | {"x": jnp.where(chosen_BxT, 0, batch["x"]), "weights": weights_BxT}


def test_what_evaluation_hides_depends_on_the_example_alone() -> None:
    ex = texts(eval_augment=(hide,))
    one = plan(ex, jax.devices()[:1])
    state = one.start()
    found = evaluated(one, state)
    again = evaluated(plan(dataclasses.replace(ex, eval_batch=37), jax.devices()[:1]), state)
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-6)
    host = jax.device_get(state)
    for how in ("jit", "shard_map"):
        eight = evaluated(plan(dataclasses.replace(ex, eval_batch=24, parallel=how)), host)
        assert eight["loss"] == pytest.approx(found["loss"], rel=1e-6)
    plain = evaluated(plan(texts(), jax.devices()[:1]), state)
    assert plain["loss"] != pytest.approx(found["loss"], rel=1e-3)


def weighted(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"weights": jnp.ones(len(batch["y"]))}


@dataclass(frozen=True)
class Vocabulary:
    """As much of a tokenizer as a plan looks at."""

    vocab_size: int
    fingerprint: str = "words"


@pytest.mark.parametrize(
    ("ex", "says"),
    [
        (experiment(metrics=(ranking.RocAuc(),), eval_metrics=()), "roc_auc needs a whole split"),
        (texts(eval_metrics=(ranking.RocAuc(),)), r"\(16, 6, 11\): expected \[B, classes\]"),
        (experiment(preprocess=(weighted,)), "average_precision: the data has weights"),
        (
            texts(train=Texts(1, Vocabulary(93))),
            "its tokenizer has 93 tokens, the model room for 11: set model.vocab_size=93",
        ),
        (texts(evals={"test": Texts(0, Vocabulary(12))}), "12 tokens, the model room for 11"),
        (
            texts(train=Texts(1, Vocabulary(5)), evals={"test": Texts(0, Vocabulary(5, "others"))}),
            "another tokenizer than",
        ),
        (
            experiment(
                train=data.Arrays(X[::-1].copy(), Y, classes=("a", "b", "c")),
                evals={"test": data.Arrays(X, Y, classes=("c", "b", "a"))},
            ),
            "has the classes c, b, a, .* expected the same",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(ex: Experiment, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        plan(ex)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap"])
def test_the_gradient_of_uneven_weights_does_not_depend_on_how_they_are_spread(how: str) -> None:
    def trained(ex: Experiment, devices: list[jax.Device]) -> Any:
        p = plan(ex, devices)
        call, feed = p.compiled(), p.feed()
        state, sums = call(p.start(), feed.resident, feed.fed(0))
        return jax.device_get((state.params, sums))

    ex = texts(optimizer=optim.SGD(lr=5.0))
    whole = trained(ex, jax.devices()[:1])
    spread = dataclasses.replace(ex, parallel=how, grad_accum=2)
    for got, expected in zip(
        jax.tree.leaves(trained(spread, jax.devices())), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
