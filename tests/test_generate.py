"""Generation against full forwards, filters by hand, text whatever the chunks."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from scipy import stats

from jaxeco import generate as g
from jaxeco.data.tokenizers import Bytes, load_tokenizer
from jaxeco.errors import UserError
from jaxeco.generate import Decoding, Sampling, Text, generate
from jaxeco.models import LanguageModel, Transformer
from jaxeco.models.lora import Lora

BYTES = Bytes().open()
CONTEXT = 24
GREEDY = Sampling(temperature=0)
PROMPTS = [[7, 40, 4], [11, 3, 90, 0, 0, 31, 80], [5, 6, 7, 8, 9]]
inf = float("inf")


def language_model(**fields: Any) -> LanguageModel:
    sizes = {"vocab_size": BYTES.vocab_size, "context": CONTEXT, "layers": 2, "heads": 2}
    return LanguageModel(Transformer(**sizes | {"width": 16} | fields))


def start(model: Any) -> Any:
    """Parameters so large that greedy text does not repeat itself at once."""
    key, text_1x4 = jax.random.key(0), np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(lambda: model.init(key, text_1x4, train=False))["params"]
    rng = np.random.default_rng(1)

    def draw(path: Any, a: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.normal("scale" in str(path), 0.4, a.shape).astype(a.dtype)

    return jax.tree.map_with_path(draw, shapes)


MODEL = language_model()
PARAMS = start(MODEL)


class Naive:
    """The whole text through the model for each token, one row at a time, without a cache."""

    def __init__(self, model: LanguageModel, params: Any):
        self.vocab = model.vocab_size
        self.forward = jax.jit(lambda x: model.apply({"params": params}, x, train=False))

    def logits(self, text: list[int]) -> np.ndarray:
        padded = text + [0] * (CONTEXT - len(text))  # what comes later is not looked at
        return np.array(self.forward(np.array([padded], np.int32)))[0, len(text) - 1, : self.vocab]

    def greedy(self, prompt: list[int], n: int, penalty: float = 1.0) -> list[int]:
        text, first = list(prompt), 0
        while len(text) < len(prompt) + n:
            if len(text) - first > CONTEXT:
                first = len(text) - CONTEXT // 2
            logits = self.logits(text[first:])
            for token in set(text):
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            text.append(int(logits.argmax()))
        return text[len(prompt) :]


NAIVE = Naive(MODEL, PARAMS)


# The next token


def logits_of(*chances: float) -> jax.Array:
    return jnp.log(jnp.array([chances]))


def kept(logits_1xV: jax.Array) -> list[int]:
    return np.flatnonzero(np.isfinite(logits_1xV[0])).tolist()


def test_top_k_by_hand() -> None:
    logits = jnp.array([[1.0, 4.0, 2.0, 2.0, 0.0]])
    assert kept(g.top_k(logits, 1)) == [1]
    assert kept(g.top_k(logits, 2)) == [1, 2, 3]  # 2 and 3 tie
    assert kept(g.top_k(logits, 4)) == [0, 1, 2, 3]
    assert kept(g.top_k(logits, 99)) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(g.top_k(logits, 1), [[-inf, 4, -inf, -inf, -inf]])


def test_top_p_by_hand() -> None:
    logits = logits_of(0.1, 0.4, 0.3, 0.2)
    for p, tokens in (
        (1e-6, [1]), (0.39, [1]), (0.41, [1, 2]), (0.69, [1, 2]), (0.71, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]), (1, [0, 1, 2, 3]),
    ):  # fmt: skip
        assert kept(g.top_p(logits, p)) == tokens, p
    assert kept(g.top_p(logits_of(0.25, 0.5, 0, 0.25), 0.6)) == [0, 1, 3]  # 0 and 3 tie


def test_top_p_is_the_smallest_set_by_numpy() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32) * 3
    for row, got in zip(logits.astype(float), np.isfinite(g.top_p(jnp.asarray(logits), 0.8))):
        chances = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-chances)
        size = next(n for n in range(1, 51) if chances[order[:n]].sum() >= 0.8)
        assert set(np.flatnonzero(got)) == set(order[:size])


def test_min_p_by_hand() -> None:
    logits = logits_of(0.5, 0.26, 0.2, 0.04)
    for p, tokens in ((0.05, [0, 1, 2, 3]), (0.1, [0, 1, 2]), (0.5, [0, 1]), (1, [0])):
        assert kept(g.min_p(logits, p)) == tokens, p


def test_repetition_penalty_by_hand() -> None:
    logits, seen = jnp.array([[3.0, -1.0, 2.0, -4.0]]), jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(g.penalized(logits, seen, 1.5), [[2, -1.5, 2, -4]])


def test_the_order_of_what_acts_on_logits() -> None:
    # penalty: 4 -> 2; temperature 1/2: 4, 6, 2, 0; top-k 3 drops the last; of the others the
    # chances are e^4, e^6, e^2 over their sum: 0.117, 0.867, 0.016; top-p 0.9 drops the third
    logits, seen = jnp.array([[4.0, 3, 1, 0]]), jnp.array([[True, False, False, False]])
    sampling = Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=2)
    np.testing.assert_allclose(g.filtered(logits, seen, sampling), [[4, 6, -inf, -inf]])
    stricter = Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.14, repetition_penalty=2)
    np.testing.assert_allclose(g.filtered(logits, seen, stricter), [[-inf, 6, -inf, -inf]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": inf}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 0.0}, "min_p=0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0"),
        ({"temperature": 0, "top_k": 3, "min_p": 0.1}, "leave out top_k, min_p"),
    ],
)
def test_sampling_checks_its_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.fixture(scope="module")
def noise() -> jax.Array:
    draw = jax.jit(g.gumbel_noise, static_argnums=(2, 3, 4))
    return draw(jax.random.key(3), jnp.int32(5), 200, 150, 5)


def test_noise_belongs_to_the_row_and_the_token(noise: jax.Array) -> None:
    of_row_2_token_6 = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2), 6)
    np.testing.assert_array_equal(noise[1, 2], jax.random.gumbel(of_row_2_token_6, (5,)))


def test_draws_follow_the_softmax(noise: jax.Array) -> None:
    logits = jnp.array([[0.5, -1.0, 2.0, 0.0, -30.0]])
    for sampling, exponent, tokens in (
        (Sampling(), 1, [0, 1, 2, 3]),
        (Sampling(temperature=2, top_k=3), 0.5, [0, 2, 3]),
    ):
        draws = np.argmax(np.asarray(g.filtered(logits, None, sampling) + noise), axis=-1)
        counts = np.bincount(draws.ravel(), minlength=5)
        assert counts.sum() == counts[tokens].sum()
        chances = np.exp(np.asarray(logits[0], float)[tokens] * exponent)
        expected = chances / chances.sum() * 30_000
        assert stats.chisquare(counts[tokens], expected).pvalue > 0.01


# Tokens


def test_with_a_cache_logits_are_those_of_each_row_alone() -> None:
    decoding = Decoding(MODEL, PARAMS, PROMPTS, tokens=CONTEXT)

    @jax.jit
    def after(token_B: jax.Array, cache: Any) -> jax.Array:
        tokens_Bx1 = token_B[:, None]
        return MODEL.apply({"params": PARAMS}, tokens_Bx1, cache, method="decode")[0][:, 0]

    for _ in range(2):
        logits_BxV = after(decoding.state.token_B, decoding.state.cache)
        for row, logits in zip(decoding.rows, logits_BxV):
            np.testing.assert_allclose(logits, NAIVE.logits(row), atol=1e-5)
        decoding.extend(16)
    assert [len(row) for row in decoding.rows] == [21, 25, 23]  # 25 is one beyond the context


def extended(prompts: list[list[int]], n: int, chunk: int, **arguments: Any) -> list[list[int]]:
    decoding = Decoding(MODEL, PARAMS, prompts, tokens=n, **arguments)
    while decoding.left:
        assert 0 < decoding.extend(chunk).shape[1] <= chunk
    return [row[len(prompt) :] for row, prompt in zip(decoding.rows, prompts)]


def test_greedy_text_is_the_argmax_of_full_forwards_far_beyond_the_context() -> None:
    n = 3 * CONTEXT
    expected = [NAIVE.greedy(prompt, n) for prompt in PROMPTS]
    assert min(len(set(row)) for row in expected) > 5
    assert extended(PROMPTS, n, chunk=9, sampling=GREEDY) == expected


def test_the_same_of_rotary_positions_and_a_vocabulary_smaller_than_the_models() -> None:
    model = language_model(positions="rotary", norm="rms", separator=0, pad=8, layers=1)
    params = start(model)
    naive = Naive(model, params)
    assert max(naive.greedy(PROMPTS[0], 32)) > 100
    naive.vocab = 100
    decoding = Decoding(model, params, PROMPTS, tokens=32, sampling=GREEDY, vocab=100)
    while decoding.left:
        decoding.extend()
    assert decoding.rows == [prompt + naive.greedy(prompt, 32) for prompt in PROMPTS]


def test_repetition_penalty_counts_prompt_and_text() -> None:
    expected = [NAIVE.greedy(prompt, CONTEXT, penalty=1.3) for prompt in PROMPTS]
    assert expected != [NAIVE.greedy(prompt, CONTEXT) for prompt in PROMPTS]
    sampling = Sampling(temperature=0, repetition_penalty=1.3)
    assert extended(PROMPTS, CONTEXT, chunk=9, sampling=sampling) == expected


def test_prompts_that_fill_the_context() -> None:
    rng = np.random.default_rng(0)
    for lengths in ((CONTEXT - 1, CONTEXT, CONTEXT + 1), (3 * CONTEXT, 1, 2)):
        prompts = [rng.integers(3, 200, length).tolist() for length in lengths]
        expected = [NAIVE.greedy(prompt, 5) for prompt in prompts]
        assert extended(prompts, 5, chunk=9, sampling=GREEDY) == expected


def test_the_same_seed_gives_the_same_text() -> None:
    together = extended(PROMPTS, 40, chunk=9, seed=1)
    assert extended(PROMPTS, 40, chunk=32, seed=1) == together
    longer = [PROMPTS[1] * 2, PROMPTS[1], [70] * 30]  # so that other slots hold the same text
    assert extended(longer, 40, chunk=9, seed=1)[1] == together[1]
    assert extended(PROMPTS, 40, chunk=9, seed=2) != together
    assert len({tuple(row) for row in extended(PROMPTS[:1] * 3, 40, chunk=9, seed=1)}) == 3


def test_rows_end_at_the_end_token() -> None:
    expected = [NAIVE.greedy(prompt, 9) for prompt in PROMPTS]
    end = expected[0][4]
    cut = [row[: row.index(end) + 1] if end in row else row for row in expected]
    assert len(cut[0]) < 9 == max(map(len, cut))

    def first(done: list[bool]) -> list[list[int]]:
        decoding = Decoding(MODEL, PARAMS, PROMPTS, tokens=CONTEXT, sampling=GREEDY, end=end)
        return decoding.extend(9, np.array(done)).tolist()

    assert first([False, True, True])[0] == cut[0]  # the others do not matter
    assert [row[:n] for row, n in zip(first([False] * 3), map(len, cut))] == cut
    assert first([True] * 3) == [[], [], []]


def test_other_ways_to_hold_the_same_parameters() -> None:
    expected = [NAIVE.greedy(prompt, 9) for prompt in PROMPTS]
    trunk = jax.device_get(PARAMS["trunk"])
    blocks = [trunk.pop(f"block_{i}") for i in range(2)]
    stacked = {"trunk": trunk | {"blocks": jax.tree.map(lambda *a: np.stack(a), *blocks)}}
    kernel = blocks[0]["query"]["kernel"]
    lora = {"a": np.ones((16, 2), np.float32), "b": np.full((2, 16), 0.25, np.float32)}
    blocks[0]["query"]["kernel"] = kernel - 3 * 0.5  # alpha/rank · A·B is 6/2 · 2 · 0.25
    base = {"trunk": trunk | {f"block_{i}": block for i, block in enumerate(blocks)}}
    for model, params in (
        (language_model(scan_layers=True), stacked),
        (
            Lora(MODEL, rank=2, alpha=6),
            {"base": base, "lora": {"trunk": {"block_0": {"query": {"kernel": lora}}}}},
        ),
    ):
        decoding = Decoding(model, params, PROMPTS, tokens=CONTEXT, sampling=GREEDY)
        assert decoding.extend(9).tolist() == expected


def test_what_cannot_go_on_from_a_text() -> None:
    for model, prompts, tokens, message in (
        (language_model(causal=False), PROMPTS, 5, "causal=True"),
        (language_model(context=1), PROMPTS, 5, "context is 1 token"),
        (MODEL.trunk, PROMPTS, 5, "Transformer, expected a LanguageModel"),
        (MODEL, [], 5, "prompts"),
        (MODEL, [[1], []], 5, "prompts"),
        (MODEL, PROMPTS, 0, "tokens=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoding(model, {}, prompts, tokens=tokens)


# Text


def told(whole: str | bytes, cuts: list[int], stop: list[str], end: bool = False) -> list[str]:
    """What a Text says of tokens that come in chunks."""
    raw = whole.encode() if isinstance(whole, str) else whole
    text = Text(BYTES, BYTES.encode("prompt"), stop)
    chunks = np.split(np.frombuffer(raw, np.uint8).astype(np.int32) + 3, cuts)
    if end:
        chunks[-1] = np.append(chunks[-1], [BYTES.separator, 70, 71])
    return [text.add(c, last=i == len(chunks) - 1).text for i, c in enumerate(chunks)]


def test_characters_wait_for_their_last_byte() -> None:
    assert told("aé€b", [2, 3, 5], []) == ["a", "é", "", "€b"]
    assert told(b"a\xe2\x82", [1, 2], []) == ["a", "", "\N{REPLACEMENT CHARACTER}"]
    assert told(b"a\xe2\x82", [1, 2], [], end=True) == ["a", "", "\N{REPLACEMENT CHARACTER}"]
    assert told(b"a\xffb", [2], []) == ["a", "\N{REPLACEMENT CHARACTER}b"]


def test_a_stop_string_across_chunks() -> None:
    assert told("to be END or", [4, 7, 8], ["END"]) == ["to b", "e ", "", ""]
    assert told("to be EN or", [4, 7, 8], ["END"]) == ["to b", "e ", "", "EN or"]
    assert told("aab", [1, 2], ["ab"]) == ["", "a", ""]
    for cuts in ([], [5], [6], [7]):  # which is complete first, not which begins first
        assert "".join(told("x, stop.", cuts, [", stop.", "st", "op"])) == "x, "
    assert told("ends EN", [3], ["END"], end=True) == ["end", "s EN"]


def test_text_does_not_depend_on_chunks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        whole = "".join(rng.choice(list("ab€é😀 "), 30))
        stop = ["".join(rng.choice(list("ab€"), n)) for n in (2, 3, 4)]
        ends = [n for n in range(len(whole) + 1) if whole[:n].endswith(tuple(stop))]
        at = ends[0] - max(len(s) for s in stop if whole[: ends[0]].endswith(s)) if ends else None
        cuts = np.sort(rng.integers(0, len(whole.encode()), 6)).tolist()
        assert "".join(told(whole, cuts, stop)) == whole[:at]


def test_spaces_that_a_tokenizer_writes_between_words_only(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁to": 0, "▁be": 1, ",": 2}))
    library.decoder = tokenizers.decoders.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode([0, 1, 2]) == "to be,"
    text = Text(tokenizer, [0], [])
    assert [text.add([1], False).text, text.add([2, 0], False).text] == [" be", ", to"]
    assert "".join(text.add([1], i == 20).text for i in range(21)) == " be" * 21


def test_generate_is_the_tokens_as_text() -> None:
    prompts = ["ROMEO", "é", ""]
    rows = [[BYTES.separator, *BYTES.encode(prompt)] for prompt in prompts]
    tokens = [[*row, BYTES.separator] for row in extended(rows, 60, chunk=32, seed=0)]
    tokens = [row[: row.index(BYTES.separator)] for row in tokens]
    assert min(map(len, tokens)) < 60 == max(map(len, tokens))
    expected = [BYTES.decode(row) for row in tokens]
    arguments: dict[str, Any] = {"tokens": 60, "seed": 0}
    assert generate(MODEL, PARAMS, BYTES, prompts, **arguments) == expected
    stop = expected[0][20:22]
    stopped = generate(MODEL, PARAMS, BYTES, prompts, **arguments, stop=[stop])
    assert stopped == [text.split(stop)[0] for text in expected]
    pieces = list(g.stream(MODEL, PARAMS, BYTES, prompts, **arguments))
    counts = np.sum([[piece.tokens for piece in row] for row in pieces], axis=0)
    assert counts.tolist() == [min(len(row) + 1, 60) for row in tokens]  # with the separator
    assert [all(p.done for p in row) for row in pieces] == [False] * (len(pieces) - 1) + [True]


def test_generate_refuses() -> None:
    small = language_model(vocab_size=100)
    with pytest.raises(UserError, match="tokenizer has 259 tokens, the model 100"):
        generate(small, {}, BYTES, ["a"], tokens=5)
    with pytest.raises(ValueError, match="empty string"):
        generate(MODEL, PARAMS, BYTES, ["a"], tokens=5, stop=[""])


def test_the_lowest_temperature_and_share_are_greedy() -> None:
    logits_1xV = jnp.array([[1.0, 90.0, 89.0, -3.0]])
    for sampling in (Sampling(1e-6), Sampling(top_p=1e-46)):
        kept_1xV = jax.nn.softmax(g.filtered(logits_1xV, None, sampling))
        np.testing.assert_array_equal(kept_1xV, [[0, 1, 0, 0]])
