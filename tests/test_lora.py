"""Low-rank adaptation: what it adds, by hand; what it leaves alone; and that it is a model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxeco.config import override
from jaxeco.description import describe
from jaxeco.models.lora import Lora, without_lora
from jaxeco.models.transformer import LanguageModel, Transformer
from jaxeco.optim import AdamW, Partition


class Net(nn.Module):
    """Two linear layers, one of them within a block, and batch statistics."""

    width: int = 3

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(self.width, name="query")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="head")(x)

    def twice(self, x):
        return 2 * self(x, train=False)


X = jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
LORA = Lora(Net(), rank=2, alpha=6.0)


@pytest.fixture(scope="module")
def variables():
    return initialised(LORA)


def initialised(model):
    return jax.jit(lambda: model.init(jax.random.key(0), X, train=False))()


def moved(variables):
    """The same variables with B no longer 0."""
    params = variables["params"]
    b = jnp.arange(6.0).reshape(2, 3)
    query = {"a": params["lora"]["query"]["kernel"]["a"], "b": b}
    return {**variables, "params": {**params, "lora": {"query": {"kernel": query}}}}


def test_it_begins_at_the_model_itself(variables):
    alone = initialised(Net())
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["base"], alone["params"])
    assert variables["batch_stats"].keys() == {"norm"}
    assert jax.tree.map(jnp.shape, variables["params"]["lora"]) == {
        "query": {"kernel": {"a": (2, 2), "b": (2, 3)}}
    }
    np.testing.assert_array_equal(
        LORA.apply(variables, X, train=False), Net().apply(alone, X, train=False)
    )


def test_it_adds_alpha_over_rank_times_the_product(variables):
    changed = moved(variables)
    adapter = changed["params"]["lora"]["query"]["kernel"]
    a, b = np.asarray(adapter["a"]), np.asarray(adapter["b"])
    kernel = np.asarray(variables["params"]["base"]["query"]["kernel"])
    merged = LORA.merged(changed["params"])
    np.testing.assert_allclose(merged["query"]["kernel"], kernel + 3 * a @ b, rtol=1e-5)
    np.testing.assert_array_equal(
        merged["head"]["kernel"], variables["params"]["base"]["head"]["kernel"]
    )
    model, params = without_lora(LORA, changed["params"])
    plain = model.apply({**variables, "params": params}, X, train=False)
    np.testing.assert_allclose(LORA.apply(changed, X, train=False), plain, rtol=1e-5)
    assert without_lora(model, params) == (model, params)


def test_a_model_in_lora_trains_batch_statistics_and_has_methods(variables):
    outputs, new = LORA.apply(variables, X, train=True, mutable=["batch_stats"])
    alone = {**variables, "params": variables["params"]["base"]}
    expected, after = Net().apply(alone, X, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(outputs, expected)
    jax.tree.map(np.testing.assert_array_equal, new, after)
    twice = LORA.apply(variables, X, method="twice")
    np.testing.assert_allclose(twice, 2 * LORA.apply(variables, X, train=False), rtol=1e-6)


def test_only_the_adaptation_learns(variables):
    def loss(params):
        return jnp.sum(LORA.apply({**variables, "params": params}, X, train=False) ** 2)

    params = moved(variables)["params"]
    grads = jax.grad(loss)(params)
    assert all(not np.any(g) for g in jax.tree.leaves(grads["base"]))
    assert all(np.any(g) for g in jax.tree.leaves(grads["lora"]))
    tx = Partition((("lora/.*", AdamW(0.1, weight_decay=0.5)), ("base/.*", None))).build(10)
    state = tx.init(params)
    assert sum(a.size for a in jax.tree.leaves(state)) < 40  # moments of 10 numbers, not of 31
    updates, _ = tx.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, after["base"], params["base"])
    assert loss(after) < loss(params)


def test_a_language_model_decodes_in_lora():
    trunk = Transformer(vocab_size=7, context=8, layers=1, heads=2, width=4)
    lora = Lora(LanguageModel(trunk), rank=1)
    tokens_BxT = jnp.array([[1, 2, 3]])
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), tokens_BxT, train=False))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
    assert sorted(variables["params"]["lora"]["trunk"]["block_0"]) == ["query", "value"]
    assert (lora.vocab_size, lora.context) == (7, 8)

    @jax.jit
    def both_ways(variables):
        cache = lora.apply(variables, 1, 4, method="empty_cache")
        logits_BxTxV, cache = lora.apply(variables, tokens_BxT, cache, method="decode")
        return logits_BxTxV, lora.apply(variables, tokens_BxT, train=False), cache

    got_BxTxV, expected_BxTxV, cache = both_ways(variables)
    np.testing.assert_allclose(got_BxTxV, expected_BxTxV, rtol=1e-4, atol=1e-4)
    assert cache.filled == 3


def test_its_fields_can_be_read_and_set():
    assert describe(LORA) == {
        "type": "Lora",
        "model": {"type": "Net", "width": 3},
        "rank": 2,
        "alpha": 6.0,
        "targets": r"(.*/)?(query|value)/kernel",
        "learns": None,
    }
    assert override(LORA, ["model", "width"], "5", "model.model.width").model.width == 5
    assert override(LORA, ["rank"], "4", "model.rank") == Lora(Net(), rank=4, alpha=6.0)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (lambda: Lora(Net(), rank=0), "rank: got 0"),
        (lambda: Lora(Net(), alpha=0.0), "alpha: got 0.0"),
        (lambda: Lora(Net(), targets="("), "not a regular expression"),
        (lambda: Lora(Net(), targets="q"), "matches no parameter; there are head/bias, head/"),
        (lambda: Lora(Net(), targets="query/.*"), r"'query/bias', which is \[3\]"),
    ],
)
def test_errors_say_what_is_wrong(lora, says):
    with pytest.raises(ValueError, match=says) as error:
        jax.eval_shape(lambda: lora().init(jax.random.key(0), X, train=False))
    assert "\n" not in str(error.value)
