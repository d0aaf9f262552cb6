"""Text as data: tokenized once into the cache, then read as windows, packed rows, texts or pairs.

Shape suffixes: B batch, N rows, T tokens of an example, S of a source text, W of a row as it is
kept, U all tokens.

A corpus is any source of `jaxeco.data.text`, a tokenizer any of `jaxeco.data.tokenizers`. Text is
read and written as a stream, so it may be larger than memory. Tokens are kept as uint16 or uint32;
examples hold int32.
"""

import hashlib
import json
import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxeco.data.cache import cached, progress
from jaxeco.data.dataset import Dataset
from jaxeco.data.image import Batch
from jaxeco.data.text import Documents, TextSource
from jaxeco.data.tokenizers import PAD, Tokenizer
from jaxeco.errors import UserError

# Texts are handed to a tokenizer together until they have this many characters.
_CHARACTERS = 2**22
# Rows that packing keeps open; more would hardly be fuller.
_OPEN = 64


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens_U"],
    meta_fields=["rows", "length", "step", "shift", "fill"],
)
@dataclass(frozen=True, eq=False)
class Windows:
    """i32[rows, length]: row i holds the tokens from place `i * step + shift` on.

    A pytree of its tokens, of which it makes no copy: they lie in a memory map on the host, or on
    the device.

    Attributes:
      tokens_U: uint16 or uint32 [U].
      fill: the token that stands in places beyond the end.
    """

    tokens_U: Any
    rows: int
    length: int
    step: int = 1
    shift: int = 0
    fill: int = 0
    dtype = np.dtype(np.int32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.length

    def __len__(self) -> int:
        return self.rows

    def places(self, rows_B: Any) -> Any:
        rows_B = rows_B if isinstance(rows_B, jax.Array) else np.asarray(rows_B)
        return rows_B[:, None] * self.step + (self.shift + np.arange(self.length, dtype=np.int32))

    def __getitem__(self, rows_B: Any, /) -> Any:
        xp = jnp if isinstance(rows_B, jax.Array) else np
        places_BxT = self.places(rows_B)
        tokens_BxT = xp.take(self.tokens_U, places_BxT, mode="clip").astype(np.int32)
        return xp.where(places_BxT < len(self.tokens_U), tokens_BxT, np.int32(self.fill))


@partial(jax.tree_util.register_dataclass, data_fields=["windows"], meta_fields=["pad"])
@dataclass(frozen=True, eq=False)
class Present:
    """f32[rows, length]: 1 where a window holds a token, 0 beyond the end and at padding."""

    windows: Windows
    pad: int | None = None
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.windows.shape

    def __getitem__(self, rows_B: Any, /) -> Any:
        if self.pad is not None:
            return (self.windows[rows_B] != self.pad).astype(np.float32)
        places_BxT = self.windows.places(rows_B)
        return (places_BxT < len(self.windows.tokens_U)).astype(np.float32)


@dataclass(frozen=True)
class TextWindows:
    """A text as one stream of tokens, read in windows of `length`.

    The documents follow one another, each behind the tokenizer's separator, if it has one. A window
    can begin at any token: in training they lie `length` apart, from a place that each epoch draws
    anew; an evaluation begins at the first token and counts every target once.

    Opens to x, y: i32[N, T] and weights: f32[N, T], 0 where the text has no token left.

    Attributes:
      corpus: a text source.
      tokenizer: a tokenizer's description.
      length: T, tokens in a window.
      targets: "next": y holds the token after each of x, for a causal language model; "same": y is
        x, for `MaskTokens`.
    """

    corpus: TextSource
    tokenizer: Any
    length: int
    targets: Literal["next", "same"] = "next"

    def __post_init__(self) -> None:
        _check_length(self, "length")
        if self.targets not in ("next", "same"):
            raise ValueError(
                f'TextWindows.targets: got "{self.targets}", expected "next" or "same"'
            )

    def open(self) -> Dataset:
        """Raises UserError if the text is shorter than a window and its targets."""
        documents, tokenizer = self.corpus.documents(), self.tokenizer.open()
        blocks = _stream(documents, tokenizer)
        stream, digest = _kept("stream", self.corpus, documents, tokenizer, 1, blocks)
        ahead = 1 if self.targets == "next" else 0
        if len(stream) < self.length + ahead:
            raise UserError(
                f"{documents.name} has {len(stream)} tokens, fewer than the {self.length + ahead} "
                f"that a window of length={self.length} takes; choose a shorter one"
            )
        fill = 0 if tokenizer.pad is None else tokenizer.pad
        x = replace(stream, rows=len(stream) - ahead, length=self.length, fill=fill)
        y = replace(x, shift=ahead)
        return Dataset(
            fields={"x": x, "y": y, "weights": Present(y)},
            classes=(),
            name=f"{documents.name}, windows of {self.length} tokens",
            fingerprint=_digest("windows", self.length, self.targets, digest),
            tokenizer=tokenizer,
            stride=self.length,
            unit="tokens",
            units=self.length,
        )


@dataclass(frozen=True)
class PackedText:
    """Whole documents, several to a row, for a causal language model.

    Each document, behind its separator, goes into the fullest open row that has room for it
    (best fit); where none has, it opens a row. Of more than 64 open rows the fullest is closed
    (Csirik & Johnson 2001, "Bounded space on-line bin packing: best is better than first"). A
    document longer than a row fills rows of its own; what is left of it opens one more, so that
    it is never mistaken for a part of another. A row's first token is not predicted.

    Opens to x, y: i32[N, T], the first and the last T of a row's T + 1 tokens, and weights:
    f32[N, T], 0 where y is padding. The end of a document predicts the next one's separator.

    Attributes:
      corpus: a text source.
      tokenizer: a tokenizer's description; it must have a separator and padding.
      length: T, tokens of an example.
    """

    corpus: TextSource
    tokenizer: Any
    length: int

    def __post_init__(self) -> None:
        _check_length(self, "length")

    def open(self) -> Dataset:
        """Raises UserError if the tokenizer lacks a special token, or the text is empty."""
        documents, tokenizer = self.corpus.documents(), self.tokenizer.open()
        _check_specials(self, tokenizer, "separator", "pad")
        width = self.length + 1
        blocks = _packed(documents, tokenizer, width)
        packed, digest = _kept("packed", self.corpus, documents, tokenizer, width, blocks)
        x, y = (replace(packed, length=self.length, shift=shift) for shift in (0, 1))
        return Dataset(
            fields={"x": x, "y": y, "weights": Present(y, tokenizer.pad)},
            classes=(),
            name=f"{documents.name}, packed in rows of {self.length} tokens",
            fingerprint=_digest("packed", digest),
            tokenizer=tokenizer,
            specials=("separator",),
            unit="tokens",
            units=self.length,
        )


@dataclass(frozen=True)
class LabelledText:
    """A text and its class.

    Opens to x: i32[N, T], the separator, if the tokenizer has one, the text's first tokens and then
    padding, and y: i32[N].

    Attributes:
      corpus: a text source with labels.
      tokenizer: a tokenizer's description; it must have padding.
      length: T, tokens of an example.
    """

    corpus: TextSource
    tokenizer: Any
    length: int

    def __post_init__(self) -> None:
        _check_length(self, "length")

    def open(self) -> Dataset:
        """Raises UserError if there are no labels, no padding, or a text has no tokens."""
        documents, tokenizer = self.corpus.documents(), self.tokenizer.open()
        if documents.labels is None:
            raise UserError(f"{documents.name} has no labels; name their field with label=")
        _check_specials(self, tokenizer, "pad")
        before = () if tokenizer.separator is None else (tokenizer.separator,)
        x, digest = _rows(self.corpus, documents, tokenizer, self.length, before=before)
        y_N = np.asarray(documents.labels, np.int32)
        if len(x) != len(y_N):
            raise UserError(f"{documents.name} has {len(x)} texts, but {len(y_N)} labels")
        return Dataset(
            fields={"x": x, "y": y_N},
            classes=tuple(documents.classes),
            name=f"{documents.name}, first {self.length} tokens",
            fingerprint=_digest("labelled", digest, y_N.tolist(), *documents.classes),
            tokenizer=tokenizer,
            specials=("pad",),
        )


@dataclass(frozen=True)
class TextPairs:
    """Texts and what they are to become, such as sentences and their translations.

    Opens to source: i32[N, S], a text's tokens and then padding, and target: i32[N, T + 1], a
    separator, the tokens, another separator and then padding. `Translation` makes x and y of them.
    The dataset's tokenizer is that of the targets.

    Attributes:
      sources, targets: text sources; the documents of one belong to those of the other, in order.
      source_tokenizer: a tokenizer's description; it must have padding.
      target_tokenizer: likewise; it must have a separator and padding.
      source_length: S, at least the tokens of the longest source.
      target_length: T, at least one more than the tokens of the longest target.
    """

    sources: TextSource
    targets: TextSource
    source_tokenizer: Any
    target_tokenizer: Any
    source_length: int
    target_length: int

    def __post_init__(self) -> None:
        _check_length(self, "source_length")
        _check_length(self, "target_length")

    def open(self) -> Dataset:
        """Raises UserError if a text is too long, or there are more of one kind than the other."""
        sources, from_tokenizer = self.sources.documents(), self.source_tokenizer.open()
        targets, to_tokenizer = self.targets.documents(), self.target_tokenizer.open()
        _check_specials(self, from_tokenizer, "pad")
        _check_specials(self, to_tokenizer, "separator", "pad")
        source, from_digest = _rows(
            self.sources, sources, from_tokenizer, self.source_length, option="source_length"
        )
        target, to_digest = _rows(
            self.targets,
            targets,
            to_tokenizer,
            self.target_length + 1,
            before=(to_tokenizer.separator,),
            after=(to_tokenizer.separator,),
            option="target_length",
        )
        if len(source) != len(target):
            raise UserError(
                f"{sources.name} has {len(source)} texts, but {targets.name} has {len(target)}; "
                "expected as many"
            )
        return Dataset(
            fields={"source": source, "target": target},
            classes=(),
            name=f"{sources.name} to {targets.name}",
            fingerprint=_digest("pairs", from_digest, to_digest),
            tokenizer=to_tokenizer,
        )


@dataclass(frozen=True)
class MaskTokens:
    """Hides some tokens, to be predicted (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    An augmentation. Each token that is not special is chosen with probability `rate`; of those
    chosen 80% become the mask, 10% a random token that is not special, 10% stay as they are. Then y
    is x as it was, and weights are 1 where a token was chosen, times the weights there were.

    Attributes:
      tokenizer: the description of a tokenizer with a mask token, as the data has it.
      rate: the share of tokens that is chosen.
    """

    tokenizer: Any
    rate: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"MaskTokens.rate: got {self.rate}, expected 0 < rate <= 1")

    def __call__(self, keys_B: jax.Array, batch: Batch) -> Batch:
        x_BxT = _tokens(self, batch["x"])
        tokenizer = self.tokenizer.open()
        _check_specials(self, tokenizer, "mask")
        known = (tokenizer.separator, tokenizer.pad, tokenizer.mask)
        specials = np.array([token for token in known if token is not None], np.int32)
        others = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), specials)

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            lot, token = jax.random.split(key)
            shape = x_BxT.shape[1:]
            return jax.random.uniform(lot, shape), jax.random.choice(token, others, shape)

        lot_BxT, token_BxT = jax.vmap(draw)(keys_B)
        lot_BxT = jnp.where(jnp.isin(x_BxT, specials), 1, lot_BxT / self.rate)  # chosen if below 1
        hidden_BxT = jnp.where(lot_BxT < 0.9, token_BxT, x_BxT)
        hidden_BxT = jnp.where(lot_BxT < 0.8, tokenizer.mask, hidden_BxT)
        weights_BxT = (lot_BxT < 1).astype(jnp.float32)
        if "weights" in batch:
            weights_BxT *= batch["weights"]
        return batch | {"x": hidden_BxT, "y": x_BxT, "weights": weights_BxT}


@dataclass(frozen=True)
class Translation:
    """Makes a batch of `TextPairs` one for an encoder and a decoder. A preprocess.

    x = {"source": i32[B, S], "target": i32[B, T], a separator and then what came before}, y: i32[B,
    T], the tokens to predict, weights: f32[B, T], 1 for them and the separator that ends them.

    Attributes:
      pad: the target tokenizer's padding.
    """

    pad: int = PAD

    def __call__(self, batch: Batch) -> Batch:
        rest = dict(batch)
        source_BxS, target_BxT1 = rest.pop("source"), rest.pop("target")
        y_BxT = target_BxT1[:, 1:]
        return rest | {
            "x": {"source": source_BxS, "target": target_BxT1[:, :-1]},
            "y": y_BxT,
            "weights": (y_BxT != self.pad).astype(jnp.float32),
        }


def _tokens(who: object, x: Any) -> jax.Array:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{who}: got x {x.dtype}{list(x.shape)}, expected tokens, integers [B, T]")
    return x


def _check_length(source: Any, name: str) -> None:
    if (length := getattr(source, name)) < 1:
        raise ValueError(f"{type(source).__name__}.{name}: got {length}, expected at least 1 token")


def _check_specials(source: Any, tokenizer: Tokenizer, *names: str) -> None:
    for name in names:
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"{type(source).__name__} needs a tokenizer with a {name} token, which this one "
                "lacks; take one that has it, such as Bytes(), Bpe or Characters(specials=True)"
            )


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _kept(
    kind: str,
    corpus: TextSource,
    documents: Documents,
    tokenizer: Tokenizer,
    width: int,
    blocks: Iterable[np.ndarray],
) -> tuple[Windows, str]:
    """Rows of `width` tokens from the cache, and a digest; `blocks` [n, width] make what it lacks.

    A corpus has one entry for each tokenizer, kind and width: text that has changed replaces it.
    """
    key = _digest(kind, width, repr(corpus), tokenizer.fingerprint)[:12]
    name = f"{re.sub('[^A-Za-z0-9._-]+', '-', documents.name)[:60]}-{key}"
    source = [kind, documents.fingerprint, tokenizer.fingerprint]
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    arrays, digest = cached(
        name,
        source,
        {"tokens": ((None, width), dtype)},
        lambda: ({"tokens": block} for block in blocks),
    )
    tokens_U = arrays["tokens"].reshape(-1)
    rows = Windows(tokens_U, len(tokens_U) // width, width, step=width)
    return rows, _digest(digest, tokenizer.fingerprint)


def _encoded(documents: Documents, tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
    """The tokens of each document, some documents at a time; shows how far it has come."""
    done, texts, size = 0, [], 0
    with progress(f"tokenizing {documents.name} (once)", 0) as report:
        for text in documents:
            texts.append(text)
            size += len(text)
            if size >= _CHARACTERS:
                yield tokenizer.encode_batch(texts)
                done += size
                report(done)
                texts, size = [], 0
        if texts:
            yield tokenizer.encode_batch(texts)
        elif not done:
            raise UserError(f"{documents.name} has no documents; expected at least one")


def _stream(documents: Documents, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    separator = [] if tokenizer.separator is None else [tokenizer.separator]
    before = np.array(separator, np.int32)
    for encoded in _encoded(documents, tokenizer):
        tokens_U = np.concatenate([part for tokens in encoded for part in (before, tokens)])
        yield tokens_U[:, None]


def _packed(documents: Documents, tokenizer: Tokenizer, width: int) -> Iterator[np.ndarray]:
    """Rows [1, width] as `PackedText` describes them."""
    before = np.array([tokenizer.separator], np.int32)
    segments = (
        np.concatenate([before, tokens])
        for encoded in _encoded(documents, tokenizer)
        for tokens in encoded
    )
    for pieces in pack(segments, width):
        row_W = np.full(width, tokenizer.pad, np.int32)
        row_W[: sum(map(len, pieces))] = np.concatenate(pieces)
        yield row_W[None]


def pack(segments: Iterable[np.ndarray], width: int) -> Iterator[list[np.ndarray]]:
    """Rows of at most `width` tokens, as the pieces of segments that they hold, in order.

    See `PackedText`. A function of the segments alone, which it sees once.
    """
    rows: list[tuple[int, int, list[np.ndarray]]] = []  # (room, a number, pieces), fullest first
    for number, segment in enumerate(segments):
        cut = len(segment) // width * width
        for start in range(0, cut, width):
            yield [segment[start : start + width]]
        rest = segment[cut:]
        if not len(rest):
            continue
        place = len(rows) if cut else bisect_left(rows, (len(rest),))
        room, opened, pieces = rows.pop(place) if place < len(rows) else (width, number, [])
        insort(rows, (room - len(rest), opened, [*pieces, rest]))
        if rows[0][0] == 0 or len(rows) > _OPEN:
            yield rows.pop(0)[2]
    for _, _, pieces in rows:
        yield pieces


def _rows(
    corpus: TextSource,
    documents: Documents,
    tokenizer: Tokenizer,
    width: int,
    *,
    before: tuple[int, ...] = (),
    after: tuple[int, ...] = (),
    option: str | None = None,
) -> tuple[Windows, str]:
    """A document a row: `before`, its tokens, `after`, padding; and a digest of all.

    Args:
      option: the source's field to raise if a document does not fit; None: it is cut.

    Raises:
      UserError: a document does not fit, or has no tokens.
    """
    room = width - len(before) - len(after)
    first_tokens, last_tokens = np.array(before, np.int32), np.array(after, np.int32)

    def blocks() -> Iterator[np.ndarray]:
        number, first, longest = 0, 0, 0
        for encoded in _encoded(documents, tokenizer):
            block_NxW = np.full((len(encoded), width), tokenizer.pad, np.int32)
            for row_W, tokens in zip(block_NxW, encoded, strict=True):
                number += 1
                if not len(tokens):
                    raise UserError(f"{documents.name}: document {number} is empty; remove it")
                first = number if len(tokens) > room and not first else first
                longest = max(longest, len(tokens))
                whole = np.concatenate([first_tokens, tokens[:room], last_tokens])
                row_W[: len(whole)] = whole
            yield block_NxW
        if option and first:
            raise UserError(
                f"{documents.name}: document {first} does not fit; the longest needs "
                f"{option}={longest + len(after)}"
            )

    kind = "whole" if option else "cut"
    return _kept(f"{kind} {before} {after}", corpus, documents, tokenizer, width, blocks())
