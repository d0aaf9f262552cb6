"""Transformers: attention by hand, who may look at whom, sizes, and that ways to compute agree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco.models import (
    EncoderDecoder,
    LanguageModel,
    TextClassifier,
    Transformer,
    unscanned,
    written,
)
from jaxeco.models.attention import attend, layout, rotate, sinusoids

KEY = jax.random.key(0)
TOKENS_2x9 = np.array([[5, 1, 8, 2, 2, 7, 4, 6, 3], [6, 6, 1, 9, 3, 8, 2, 5, 4]], np.int32)


def trunk(**fields: Any) -> Transformer:
    return Transformer(
        **{"vocab_size": 11, "context": 12, "layers": 2, "heads": 2, "width": 8, "init_sd": 0.3}
        | fields
    )


def modern(**fields: Any) -> Transformer:
    return trunk(
        norm="rms", positions="rotary", activation="swiglu", kv_heads=1, qk_norm=True, bias=False,
        **fields,
    )  # fmt: skip


def start(model: Any, x: Any = TOKENS_2x9) -> Any:
    """Variables with every parameter away from its initial 0 or 1."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(KEY, x, train=False))
    return jax.tree.map(lambda a: rng.normal(0.1, 0.4, a.shape).astype(np.float32), shapes)


def run(model: Any, variables: Any, *args: Any, **options: Any) -> Any:
    """model.apply, compiled: uncompiled every operation would be compiled by itself."""
    options = options or {"train": False}
    return jax.jit(lambda variables, args: model.apply(variables, *args, **options))(
        variables, args
    )


def test_attention_on_small_integers_by_hand() -> None:
    # two positions, one head, K = 4, so that scores are halved; ln 3 makes the weights quarters
    q = np.array([[2.0, 0, 0, 0], [0, 2, 0, 0]])[None, :, None]
    k = np.array([[np.log(3), 0, 0, 0], [0, 0, 0, 0]])[None, None]
    v = np.array([[4.0, 0, 8, 0], [0, 4, 0, 16]])[None, None]
    # scores: q0·k0/2 = ln 3, q0·k1/2 = 0 -> weights 3/4, 1/4; q1: 0, 0 -> 1/2, 1/2
    expected = np.array([[3.0, 1, 6, 4], [2, 2, 4, 8]])[None, :, None]
    q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    for method in ("einsum", "written", "xla"):
        np.testing.assert_allclose(attend(q, k, v, None, method), expected, rtol=1e-6)
    causal = np.tril(np.ones((1, 2, 2), bool))
    expected[0, 0, 0] = [4, 0, 8, 0]  # the first position sees itself alone
    np.testing.assert_allclose(attend(q, k, v, causal, "einsum"), expected, rtol=1e-6)


def test_heads_share_keys_in_order() -> None:
    q = jax.random.normal(KEY, (2, 5, 6, 4))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 2, 5, 4))
    repeated = attend(q, jnp.repeat(k, 3, 1), jnp.repeat(v, 3, 1), None, "einsum")
    for method in ("einsum", "written", "xla"):
        np.testing.assert_allclose(attend(q, k, v, None, method), repeated, atol=1e-6)


def test_a_row_with_nothing_allowed_is_finite() -> None:
    q = jnp.ones((1, 2, 2, 4))
    nothing = jnp.zeros((1, 2, 2), bool)
    assert np.isfinite(jax.grad(lambda q: attend(q, q, q, nothing, "einsum").sum())(q)).all()


def test_rotary_by_hand_and_relative() -> None:
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    # pairs (1, 3) at frequency 1 and (2, 4) at frequency 1/100
    a, b = 5.0, 0.05
    expected = [np.cos(a) - 3 * np.sin(a), 2 * np.cos(b) - 4 * np.sin(b),
                3 * np.cos(a) + np.sin(a), 4 * np.cos(b) + 2 * np.sin(b)]  # fmt: skip
    np.testing.assert_allclose(rotate(x, jnp.array([[5]]))[0, 0, 0], expected, rtol=1e-5)
    y = x[..., ::-1]

    def product(i: int, j: int) -> float:
        return float(jnp.sum(rotate(x, jnp.array([[i]])) * rotate(y, jnp.array([[j]]))))

    assert product(3, 7) == pytest.approx(product(13, 17), rel=1e-5)
    assert product(3, 7) != pytest.approx(product(3, 8), rel=1e-3)


def test_sinusoids_by_hand() -> None:
    expected = [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)]
    np.testing.assert_allclose(sinusoids(jnp.array([[3]]), 4)[0, 0], expected, rtol=1e-6)


def test_segments_keep_apart_and_count_anew() -> None:
    tokens = jnp.array([[0, 5, 6, 0, 7]])
    position, allowed = layout(
        tokens, 0, 5, causal=True, separator=0, pad=None, start_B=None
    )  # fmt: skip
    assert position.tolist() == [[0, 1, 2, 0, 1]]
    assert np.asarray(allowed[0], int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_gpt2s_published_sizes() -> None:
    def parameters(model: Any) -> int:
        shapes = jax.eval_shape(lambda: model.init(KEY, TOKENS_2x9, train=False))
        return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(shapes))

    def gpt2(layers: int, heads: int, width: int) -> LanguageModel:
        return LanguageModel(
            Transformer(vocab_size=50257, context=1024, layers=layers, heads=heads, width=width)
        )

    assert parameters(gpt2(12, 12, 768)) == 124_439_808
    assert parameters(gpt2(24, 16, 1024)) == 354_823_168
    bert = Transformer(
        vocab_size=30522, context=512, layers=12, heads=12, width=768,
        causal=False, norm_first=False, embed_norm=True, activation="gelu",
    )  # fmt: skip
    # BERT-base without its pooler (590,592) and its two token types (1,536)
    assert parameters(bert) == 109_482_240 - 590_592 - 1_536


@pytest.mark.parametrize("make", [trunk, modern])
def test_a_token_depends_on_those_before_it_and_no_other(make: Any) -> None:
    model = make(vocab_size=9)
    tokens_1x9 = np.arange(9)[None]  # each its own, so that an embedding's gradient is a position's
    params = start(model, tokens_1x9)["params"]
    probe_D = np.random.default_rng(1).normal(size=8)

    def out_9(embedding: jax.Array) -> jax.Array:
        own = params | {"token_embed": {"embedding": embedding}}
        return model.apply({"params": own}, tokens_1x9, train=False)[0] @ probe_D

    jacobian_9x9xD = jax.jit(jax.jacrev(out_9))(params["token_embed"]["embedding"])
    np.testing.assert_array_equal(np.abs(jacobian_9x9xD).sum(-1) > 1e-7, np.tri(9, dtype=bool))


def test_an_encoder_looks_both_ways_and_not_at_padding() -> None:
    model = TextClassifier(trunk(causal=False, pad=1), num_classes=3)
    x = jnp.where(TOKENS_2x9 == 1, 2, TOKENS_2x9)
    variables = start(model)
    plain = run(model, variables, x)
    changed = x.at[:, -1].set(9)
    assert np.abs(run(model, variables, changed) - plain).min() > 1e-6
    padded = jnp.pad(x, ((0, 0), (0, 3)), constant_values=1)
    np.testing.assert_allclose(run(model, variables, padded), plain, atol=1e-6)


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_pooling(pool: Any) -> None:
    model = TextClassifier(trunk(pad=1), num_classes=3, pool=pool)
    x = jnp.array([[4, 5, 6, 1, 1]])
    variables = start(model)
    hidden = run(trunk(pad=1), {"params": variables["params"]["trunk"]}, x)[0]
    pooled = {"first": hidden[0], "last": hidden[2], "mean": hidden[:3].mean(0)}[pool]
    head = variables["params"]["head"]
    expected = pooled @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(run(model, variables, x)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        LanguageModel(trunk()),
        LanguageModel(modern(separator=2)),
        LanguageModel(trunk(positions="sinusoidal", pad=9), tied=False),
    ],
    ids=["gpt2", "modern with segments", "sinusoidal with padding"],
)
def test_cached_is_uncached(model: LanguageModel) -> None:
    variables = start(model)
    full = run(model, variables, TOKENS_2x9)
    cache = model.apply(variables, 2, 9, method="empty_cache")
    parts = []
    for first, stop in ((0, 4), (4, 5), (5, 9)):
        out, cache = run(model, variables, TOKENS_2x9[:, first:stop], cache, method="decode")
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=1e-5)


def test_rows_of_different_lengths_share_a_cache() -> None:
    model = LanguageModel(modern())
    variables = start(model)
    start_B = jnp.array([0, 4])
    cache = model.apply(variables, 2, 9, start_B, method="empty_cache")
    out, _ = run(model, variables, TOKENS_2x9, cache, method="decode")
    alone = run(model, variables, TOKENS_2x9[1:, 4:])
    np.testing.assert_allclose(out[1, 4:], alone[0], atol=1e-5)


def test_scanned_and_rematerialised_layers_compute_the_same() -> None:
    plain = LanguageModel(trunk())
    scanned = LanguageModel(trunk(scan_layers=True, remat=True))
    variables = start(scanned)
    model, params = unscanned(scanned, variables["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, start(plain)["params"])

    def loss(model: Any, params: Any) -> jax.Array:
        return jnp.sum(run(model, {"params": params}, TOKENS_2x9, train=True) ** 2)

    grads = jax.grad(lambda p: loss(scanned, p))(variables["params"])
    same = jax.grad(lambda p: loss(model, p))(params)
    _, split = unscanned(scanned, grads)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(same)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)
    kept = LanguageModel(trunk(remat=True))
    again = jax.grad(lambda p: loss(kept, p))(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(same)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_a_translator_reads_its_source_but_not_the_padding(kv_heads) -> None:
    model = EncoderDecoder(
        encoder=trunk(causal=False, pad=1),
        decoder=trunk(cross=True, positions="rotary", kv_heads=kv_heads),
    )
    source = jnp.where(TOKENS_2x9 == 1, 2, TOKENS_2x9)
    x = {"source": source, "target": TOKENS_2x9[:, :5]}
    variables = start(model, x)
    out = run(model, variables, x)
    assert out.shape == (2, 5, 11)
    other = run(model, variables, x | {"source": source.at[:, 3].set(10)})
    assert np.abs(other - out).max(-1).min() > 1e-5  # every position looks at the source
    padded = jnp.pad(source, ((0, 0), (0, 2)), constant_values=1)
    np.testing.assert_allclose(run(model, variables, x | {"source": padded}), out, atol=1e-5)


def test_dropout_is_drawn_in_training_only() -> None:
    model = LanguageModel(trunk(dropout=0.5))
    variables = start(model)
    calm = run(model, variables, TOKENS_2x9)
    keys = {"dropout": jax.random.key(3)}
    assert np.abs(run(model, variables, TOKENS_2x9, train=True, rngs=keys) - calm).max() > 1e-3


def test_zero_init_makes_every_block_the_identity() -> None:
    model = trunk(zero_init=True, norm_first=True)
    variables = model.init(KEY, TOKENS_2x9, train=False)
    params = variables["params"]
    embedded = (
        params["token_embed"]["embedding"][TOKENS_2x9]
        + params["position_embed"]["embedding"][jnp.arange(9)]
    )
    mean, sd = embedded.mean(-1, keepdims=True), embedded.std(-1, keepdims=True)
    out = run(model, variables, TOKENS_2x9)
    np.testing.assert_allclose(out, (embedded - mean) / np.sqrt(sd**2 + 1e-5), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 9}, "not divisible by heads"),
        ({"kv_heads": 3, "heads": 4}, "not divisible by kv_heads"),
        ({"width": 6, "positions": "rotary"}, "turns pairs"),
        ({"norm": "layers"}, "did you mean 'layer'"),
        ({"dropout": 1.0}, "[0, 1)"),
        ({"layers": 0}, "at least 1"),
        ({"context": 0}, "at least 1"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        trunk(**fields)
    assert says in str(error.value)


def test_what_does_not_fit_is_said() -> None:
    model = LanguageModel(trunk(context=8))
    with pytest.raises(ValueError, match=r"9 tokens.*context is 8"):
        model.init(KEY, TOKENS_2x9, train=False)
    with pytest.raises(ValueError, match="cross=True"):
        EncoderDecoder(encoder=trunk(causal=False), decoder=trunk())
    scanned = LanguageModel(trunk(scan_layers=True))
    variables = scanned.init(KEY, TOKENS_2x9, train=False)
    cache = scanned.apply(variables, 2, 9, method="empty_cache")
    with pytest.raises(ValueError, match="not scanned"):
        scanned.apply(variables, TOKENS_2x9, cache, method="decode")


def test_fields_of_a_trunk_reach_its_blocks() -> None:
    names = {f.name for f in dataclasses.fields(Transformer)}
    assert {"width", "kv_heads", "qk_norm", "attention"} <= names
    params = LanguageModel(modern(mlp_width=20)).init(KEY, TOKENS_2x9, train=False)["params"]
    block = params["trunk"]["block_1"]
    assert block["key"]["kernel"].shape == (8, 4)  # one group, K = 4
    assert block["gate"]["kernel"].shape == (8, 20)
    assert block["query_norm"]["scale"].shape == (4,)
    assert "bias" not in block["up"] and "bias" not in block["norm1"]


def loss_and_gradients(model: Any, variables: Any, x: Any, dtype: Any) -> Any:
    """A loss in which every output counts differently, and its gradients, all in one dtype."""

    def loss(variables: Any) -> jax.Array:
        out = model.apply(variables, x, train=False)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size, dtype=dtype).reshape(out.shape) / 99)

    variables = jax.tree.map(lambda a: jnp.asarray(a, dtype), variables)
    return jax.jit(jax.value_and_grad(loss))(variables)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": 1, "context": 70},  # rows of scores long enough to be halved
        {"norm": "rms", "kv_heads": 1, "qk_norm": True, "mlp_width": 5, "bias": False},
        {"norm_first": False, "embed_norm": True, "separator": 2, "pad": 9, "scan_layers": True},
    ],
    ids=["gpt2", "rms, a group, a narrow mlp", "norm last, documents"],
)
def test_written_gradients_are_those_derived_in_float64(fields: dict[str, Any]) -> None:
    x = np.arange(128).reshape(2, 64) ** 2 % 11 if "context" in fields else TOKENS_2x9
    by_hand = LanguageModel(trunk(**fields, gradients="written", attention="written"))
    derived = LanguageModel(trunk(**fields, gradients="derived", attention="einsum"))
    variables = start(by_hand, x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, start(derived, x))
    got = loss_and_gradients(by_hand, variables, x, np.float32)
    with jax.enable_x64(True):
        expected = loss_and_gradients(derived, variables, x, np.float64)
    atol = 3e-6 * max(np.abs(a).max() for a in jax.tree.leaves(expected[1]))  # some are 0
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol, err_msg=str(path))


def test_a_row_with_nothing_allowed_passes_no_gradient_to_scores() -> None:
    q, k, v = (jax.random.normal(jax.random.fold_in(KEY, i), (1, 1, 3, 4)) for i in range(3))
    allowed = jnp.zeros((1, 3, 3), bool)
    dq, dk, dv = jax.grad(lambda *a: written.attention(*a, allowed).sum(), (0, 1, 2))(q, k, v)
    assert not dq.any() and not dk.any()
    np.testing.assert_allclose(dv, np.ones((1, 1, 3, 4)), rtol=1e-6)
