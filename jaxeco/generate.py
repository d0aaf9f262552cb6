"""Text from a language model: tokens drawn one after the other, with a cache of keys and values.

    from jaxeco.generate import Sampling, generate

    texts = generate(model, params, tokenizer, ["ROMEO:"], tokens=100, sampling=Sampling(0.8))

Two programs are compiled. `_prefill` takes prompts, of several lengths, into a cache; `_extend`
reads the last token and draws the next, up to CHUNK times. It is called again and again, so that
text can be shown in between, and searched for the strings that it is to stop at.

The random numbers of row b and token t come from fold_in(fold_in(key, b), t): the same seed gives
the same text whatever the chunks and the other rows, up to what rounding does to a tie.

Of a text that has become longer than the model's context the last context // 2 tokens are read
anew, and it goes on from there. The same holds for a prompt that is longer.

Shapes: B rows, P positions of a prompt, V vocabulary, n tokens of a chunk.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxeco.errors import UserError
from jaxeco.models.lora import Lora, without_lora
from jaxeco.models.transformer import LanguageModel, unscanned

if TYPE_CHECKING:
    from jaxeco.data.tokenizers import Tokenizer

CHUNK = 32  # tokens between two looks at the text, at most
LOOK_BACK = 8  # tokens that are decoded again for the sake of those after them
CUT_OFF = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to whose last bytes are missing


# The next token


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What is set here acts in this order:

    Attributes:
      repetition_penalty: of tokens in the prompt or the text so far, positive logits are divided by
        it and negative ones multiplied, so that above 1 both become less likely (Keskar et al.
        2019, section 4.1, which divides all).
      temperature: logits are divided by it; 0 takes the likeliest token, of equals the first.
      top_k: keep the k likeliest tokens (Fan et al. 2018).
      top_p: keep the fewest tokens that have a probability of p together (Holtzman et al. 2020).
      min_p: keep tokens at least p times as likely as the likeliest (Nguyen et al. 2024).

    A token as likely as the least likely one that is kept is kept, too.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected 0, or at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: expected at least 1 token")
        for name in ("top_p", "min_p"):
            if (p := getattr(self, name)) is not None and not 0 < p <= 1:
                raise ValueError(f"{name}={p}: expected a number above 0 and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty}: expected a number above 0"
            )
        filters = [n for n in ("top_k", "top_p", "min_p") if getattr(self, n) is not None]
        if self.temperature == 0 and filters:
            raise ValueError(
                f"temperature=0 takes the likeliest token: leave out {', '.join(filters)}"
            )


def filtered(logits_BxV: jax.Array, seen_BxV: jax.Array | None, sampling: Sampling) -> jax.Array:
    """Logits from which the next token is to be drawn; -inf where it must not be.

    Args:
      seen_BxV: bool, tokens that occurred; None stands for none.
    """
    if seen_BxV is not None:
        logits_BxV = penalized(logits_BxV, seen_BxV, sampling.repetition_penalty)
    if sampling.temperature > 0:
        logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_k is not None:
        logits_BxV = top_k(logits_BxV, sampling.top_k)
    if sampling.top_p is not None:
        logits_BxV = top_p(logits_BxV, sampling.top_p)
    if sampling.min_p is not None:
        logits_BxV = min_p(logits_BxV, sampling.min_p)
    return logits_BxV


def penalized(logits_BxV: jax.Array, seen_BxV: jax.Array, penalty: float) -> jax.Array:
    lower_BxV = jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty)
    return jnp.where(seen_BxV, lower_BxV, logits_BxV)


def top_k(logits_BxV: jax.Array, k: int) -> jax.Array:
    largest_Bxk, _ = jax.lax.top_k(logits_BxV, min(k, logits_BxV.shape[-1]))
    return _at_least(logits_BxV, largest_Bxk[:, -1:])


def top_p(logits_BxV: jax.Array, p: float) -> jax.Array:
    if p == 1:  # a sum of probabilities reaches 1 early, by rounding
        return logits_BxV
    falling_BxV = jnp.sort(logits_BxV, descending=True)
    chances_BxV = jax.nn.softmax(falling_BxV)
    before_BxV = jnp.cumsum(chances_BxV, axis=-1) - chances_BxV
    last_Bx1 = jnp.maximum(jnp.sum(before_BxV < p, axis=-1, keepdims=True) - 1, 0)
    return _at_least(logits_BxV, jnp.take_along_axis(falling_BxV, last_Bx1, axis=-1))


def min_p(logits_BxV: jax.Array, p: float) -> jax.Array:
    return _at_least(logits_BxV, jnp.max(logits_BxV, axis=-1, keepdims=True) + math.log(p))


def _at_least(logits_BxV: jax.Array, least_Bx1: jax.Array) -> jax.Array:
    return jnp.where(logits_BxV >= least_Bx1, logits_BxV, -jnp.inf)


def gumbel_noise(key: jax.Array, first: jax.Array, n: int, rows: int, vocab: int) -> jax.Array:
    """f32[n, B, V], of tokens `first` on: the argmax of logits + noise is a draw from softmax."""

    def draw(t: jax.Array, b: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, b), t), (vocab,))

    over_rows = jax.vmap(draw, in_axes=(None, 0))
    return jax.vmap(over_rows, in_axes=(0, None))(first + jnp.arange(n), jnp.arange(rows))


# Compiled


class State(struct.PyTreeNode):
    """What changes from token to token."""

    cache: Any  # the model's, of all tokens but the last
    token_B: jax.Array  # the last
    seen_BxV: jax.Array | None  # tokens that occurred; None where nothing asks for them
    drawn: jax.Array  # i32[]: tokens drawn so far


@partial(jax.jit, static_argnames=("model", "slots"))
def _prefill(
    model: Any, params: Any, tokens_BxP: jax.Array, start_B: jax.Array, *, slots: int
) -> Any:
    """A cache of `slots` slots of rows that begin at `start_B` and end at P.

    In it the longest row begins at slot 0: P is one of few lengths, and what is too much of it for
    all rows takes no slots. The logits are not computed, since nobody asks for them.
    """
    B, P = tokens_BxP.shape
    apply = partial(model.apply, {"params": params})
    _, cache = apply(tokens_BxP, apply(B, P, start_B, method="empty_cache"), method="decode")
    blank = jnp.min(start_B)

    def shift(a: jax.Array, axis: int) -> jax.Array:
        room = [(0, slots if i == axis else 0) for i in range(a.ndim)]
        return jax.lax.dynamic_slice_in_dim(jnp.pad(a, room), blank, slots, axis)

    keys, values = ([shift(a, 2) for a in of] for of in (cache.keys, cache.values))
    tokens_BxS = shift(cache.tokens_BxS, 1)
    return cache._replace(
        keys=tuple(keys),
        values=tuple(values),
        tokens_BxS=tokens_BxS,
        filled=P - blank,
        start_B=start_B - blank,
    )


@partial(jax.jit, static_argnames=("model", "sampling", "vocab"), donate_argnames="state")
def _extend(
    model: Any,
    params: Any,
    state: State,
    done_B: jax.Array,
    key: jax.Array,
    end: jax.Array,
    limit: jax.Array,
    *,
    sampling: Sampling,
    vocab: int,
) -> tuple[State, jax.Array]:
    """Reads a token and draws the next, `limit` <= CHUNK times or until every row is done.

    Args:
      done_B: rows whose next tokens do not matter.
      end: the token after which a row is done.

    Returns:
      the State afterwards, and the tokens, i32[CHUNK, B].
    """
    n, B = CHUNK, len(state.token_B)
    # all at once, which takes less time than one by one
    noise_nxBxV = gumbel_noise(key, state.drawn, n, B, vocab) if sampling.temperature else None

    def going(carry: Any) -> jax.Array:
        i, _, done_B, _ = carry
        return (i < limit) & ~jnp.all(done_B)

    def step(carry: Any) -> Any:
        i, state, done_B, tokens_nxB = carry
        logits_Bx1xV, cache = model.apply(
            {"params": params}, state.token_B[:, None], state.cache, method="decode"
        )
        logits_BxV = filtered(logits_Bx1xV[:, 0, :vocab], state.seen_BxV, sampling)
        if noise_nxBxV is not None:
            logits_BxV += noise_nxBxV[i]
        token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        seen_BxV = state.seen_BxV
        if seen_BxV is not None:
            seen_BxV = seen_BxV.at[jnp.arange(B), token_B].set(True)
        state = State(cache, token_B, seen_BxV, state.drawn + 1)
        return i + 1, state, done_B | (token_B == end), tokens_nxB.at[i].set(token_B)

    start = (jnp.int32(0), state, done_B, jnp.zeros((n, B), jnp.int32))
    _, state, _, tokens_nxB = jax.lax.while_loop(going, step, start)
    return state, tokens_nxB


# Tokens, on the host


def check_model(model: Any) -> None:
    """Raises ValueError unless the model can go on from a text."""
    inner = model.model if isinstance(model, Lora) else model
    if not isinstance(inner, LanguageModel):
        raise ValueError(f"the model is a {type(inner).__name__}, expected a LanguageModel")
    if not inner.trunk.causal:
        raise ValueError("the model's trunk is an encoder, expected causal=True")
    if inner.context < 2:
        raise ValueError("the model's context is 1 token, expected at least 2")


class Decoding:
    """Rows of tokens that grow.

    Args:
      model: a causal `LanguageModel`, bare or in `Lora`.
      prompts: of each row, at least one token.
      tokens: how many are wanted beside the prompt.
      end: the token after which a row is done, if there is one.
      vocab: no token from this on is drawn: a model may have more than the tokenizer.

    Raises:
      ValueError: there is no prompt, or one without a token; the model cannot go on from a text.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        prompts: Sequence[Sequence[int] | np.ndarray],
        *,
        tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        end: int | None = None,
        vocab: int | None = None,
    ):
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("prompts: expected at least one, and none without a token")
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: expected at least 1")
        check_model(model)
        self.model, params = unscanned(*without_lora(model, params))
        self.params = jax.device_put(params)
        self.rows = [list(map(int, prompt)) for prompt in prompts]
        self.first = [0] * len(prompts)  # where in its row that begins which the cache holds
        self.left, self.sampling = tokens, sampling
        self.end = -1 if end is None else end
        self.key = jax.random.key(seed)
        self.vocab = model.vocab_size if vocab is None else vocab
        whole = max(map(len, prompts)) + tokens
        self.slots = min(model.context, _bucket(whole))
        # what is read anew later mostly has this length, too, and then nothing is compiled for it
        self.shortest = _bucket(model.context // 2 - 1) if whole > model.context else 1
        self.state = State(*self._read(), self._seen(), jnp.int32(0))

    def extend(self, n: int = CHUNK, done_B: np.ndarray | None = None) -> np.ndarray:
        """The next tokens of all rows, i32[B, at most n]; n is at most CHUNK.

        Fewer where the cache is full, no more are wanted, or each row came to its end; none is left
        out for a row that did so earlier than others.

        Args:
          done_B: rows whose next tokens do not matter.
        """
        if self._longest() > self.model.context:
            cache, token_B = self._read()
            self.state = self.state.replace(cache=cache, token_B=token_B)
        before = int(self.state.drawn)
        self.state, tokens_nxB = _extend(
            self.model,
            self.params,
            self.state,
            np.zeros(len(self.rows), bool) if done_B is None else done_B,
            self.key,
            np.int32(self.end),
            np.int32(min(n, CHUNK, self.left, self.model.context - self._longest() + 1)),
            sampling=self.sampling,
            vocab=self.vocab,
        )
        tokens_Bxn = np.asarray(tokens_nxB).T[:, : int(self.state.drawn) - before]
        for row, new in zip(self.rows, tokens_Bxn.tolist()):
            row += new
        self.left -= tokens_Bxn.shape[1]
        return tokens_Bxn

    def _seen(self) -> jax.Array | None:
        """Which tokens are in each row, bool[B, V], if that is asked for."""
        if self.sampling.repetition_penalty == 1:
            return None
        seen_BxV = np.zeros((len(self.rows), self.vocab), bool)
        for b, row in enumerate(self.rows):
            seen_BxV[b, row] = True
        return jnp.asarray(seen_BxV)

    def _longest(self) -> int:
        return max(len(row) - first for row, first in zip(self.rows, self.first))

    def _read(self) -> tuple[Any, jax.Array]:
        """A cache of the last part of each row, but for its last token; and that, i32[B]."""
        context = self.model.context
        for b, row in enumerate(self.rows):
            if len(row) - self.first[b] > context:
                self.first[b] = len(row) - context // 2
        P = max(self.shortest, _bucket(self._longest() - 1))
        tokens_BxP = np.zeros((len(self.rows), P), np.int32)
        start_B = np.zeros(len(self.rows), np.int32)
        for b, (row, first) in enumerate(zip(self.rows, self.first)):
            start_B[b] = P - (len(row) - 1 - first)
            tokens_BxP[b, start_B[b] :] = row[first:-1]
        cache = _prefill(self.model, self.params, tokens_BxP, start_B, slots=self.slots)
        return cache, jnp.array([row[-1] for row in self.rows], jnp.int32)


def _bucket(length: int) -> int:
    """The next power of two: of lengths that are compiled for there are to be few."""
    return 1 << max(length - 1, 0).bit_length()


# Text


class Piece(NamedTuple):
    """What a chunk adds to a row."""

    text: str
    tokens: int  # that were drawn for it
    done: bool


class Text:
    """Turns a row's tokens into text as they come.

    Held back, until more is known, are a character whose bytes are not complete and what may be the
    beginning of a stop string.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Iterable[int], stop: Sequence[str]):
        self.tokenizer, self.stop, self.done = tokenizer, stop, False
        # some tokenizers put a space before a word only where other tokens come before it
        self.recent, self.held = list(map(int, prompt))[-LOOK_BACK:], ""
        self.shown = len(self._decoded())

    def add(self, tokens: Iterable[int], last: bool) -> Piece:
        """The text that is certain after `tokens` more; with `last`, all of it."""
        if self.done:
            return Piece("", 0, True)
        end, tokens = self.tokenizer.separator, list(map(int, tokens))
        drawn = tokens.index(end) + 1 if end in tokens else len(tokens)
        self.done = last or end in tokens
        self.recent += tokens[: drawn - (end in tokens)]
        whole = self._decoded()
        certain = whole if self.done else whole.rstrip(CUT_OFF)
        text, self.shown = self.held + certain[self.shown :], len(certain)
        if certain == whole:
            self.recent = self.recent[-LOOK_BACK:]
            self.shown = len(self._decoded())
        # that which is complete first: of two it does not depend on chunks which one that is
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.done = True
            return Piece(text[: min(found)[1]], drawn, True)
        keep = len(text) if self.done else len(text) - _begun(text, self.stop)
        self.held = text[keep:]
        return Piece(text[:keep], drawn, self.done)

    def _decoded(self) -> str:
        return self.tokenizer.decode(np.array(self.recent, np.int32))


def _begun(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of `text` that a stop string begins with, but is longer."""
    lengths = (n for string in stop for n in range(1, len(string)) if text.endswith(string[:n]))
    return max(lengths, default=0)


def prompt_tokens(tokenizer: "Tokenizer", prompt: str) -> np.ndarray:
    """The prompt's tokens, i32, behind the separator, as documents are in training.

    Where the tokenizer has no separator, an empty prompt is a line's end, or else token 0.

    Raises:
      UserError: a character of the prompt is not in the vocabulary.
    """
    if tokenizer.separator is not None:
        return np.append(np.int32(tokenizer.separator), tokenizer.encode(prompt)).astype(np.int32)
    if prompt:
        return tokenizer.encode(prompt)
    try:
        return tokenizer.encode("\n")
    except UserError:
        return np.zeros(1, np.int32)


def stream(
    model: Any,
    params: Any,
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    *,
    tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[list[Piece]]:
    """Goes on from each prompt, and yields a piece of text for each, again and again.

    A text is done when it has `tokens` tokens, when the model ends it with the tokenizer's
    separator, or where one of the strings `stop` is complete; neither of these is part of it.

    Args:
      model: a causal `LanguageModel`, bare or in `Lora`; `params` are its parameters.
      seed: of the random numbers; row b draws others than row b + 1.

    Raises:
      UserError: a character of a prompt is not in the vocabulary, or that is not the model's.
      ValueError: an argument is out of its range.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size};"
            " take the tokenizer that the model was trained with"
        )
    if "" in stop:
        raise ValueError("stop: got an empty string, which would stop every text at once")
    rows = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    decoding = Decoding(
        model,
        params,
        rows,
        tokens=tokens,
        sampling=sampling,
        seed=seed,
        end=tokenizer.separator,
        vocab=tokenizer.vocab_size,
    )
    texts = [Text(tokenizer, row, stop) for row in rows]
    while not all(text.done for text in texts):
        new_Bxn = decoding.extend(done_B=np.array([text.done for text in texts]))
        yield [text.add(new, decoding.left == 0) for text, new in zip(texts, new_Bxn)]


def generate(
    model: Any,
    params: Any,
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    *,
    tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """What follows each prompt, without the prompt; the arguments are those of `stream`."""
    pieces = stream(
        model, params, tokenizer, prompts,
        tokens=tokens, sampling=sampling, seed=seed, stop=stop,
    )  # fmt: skip
    return ["".join(piece.text for piece in row) for row in zip(*pieces)]
