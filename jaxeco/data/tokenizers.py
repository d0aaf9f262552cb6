"""From text to tokens and back.

A description (`Bytes`, `Characters`, `Bpe`, `TokenizerFile`) stands in an experiment; `open()`
gives the fitted `Tokenizer`. Tokenizers of our own encode without loss: text that spells a special
token is text like any other, and `decode` of what `encode` gave is the text again.

Where ours have special tokens, these are SEPARATOR, PAD and MASK, and come first.
Shape suffixes: V vocabulary, N tokens.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxeco import runtime
from jaxeco.data.cache import locked
from jaxeco.data.text import TextSource
from jaxeco.errors import UserError

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>")
SEPARATOR, PAD, MASK = range(3)

# What others call theirs, most telling first.
_SEPARATORS = (SPECIALS[0], "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_PADS = (SPECIALS[1], "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")
_MASKS = (SPECIALS[2], "<mask>", "[MASK]")

_LARGEST = 2**24  # tokens of a vocabulary that others describe
_PIECE = 2**13  # characters encoded as one, more where no space is found
_GROUP = 256  # pieces handed over at once: what they become takes some 200 bytes a token
_SPACE = re.compile(r"(?<=\S)(?=[ \n])")


class Tokenizer:
    """A fitted tokenizer.

    Attributes:
      vocab_size: V; tokens are 0 to V - 1.
      separator: the token before each document of a stream, or None.
      pad: the token that fills rows up, or None.
      mask: the token that hides another from a masked language model, or None.
    """

    vocab_size: int
    separator: int | None = None
    pad: int | None = None
    mask: int | None = None

    def __init__(self, content: dict[str, Any]):
        """`content` is all there is to know of it, as JSON."""
        self._content = content

    @cached_property
    def fingerprint(self) -> str:
        """Differs whenever the tokenizer does, wherever it came from."""
        return _digest(json.dumps(self._content, sort_keys=True).encode())

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, i32[N].

        Raises:
          UserError: the text holds half a surrogate pair, or a character without a token.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, i32[N] each, by several threads where that is faster."""
        try:
            return self._encode(texts)
        except (UnicodeEncodeError, TypeError):  # TypeError is what the Rust library raises
            for text in texts:
                if lone := re.search("[\ud800-\udfff]", text):
                    raise UserError(
                        f"cannot encode U+{ord(lone[0]):04X} at {lone.start()} of a text: it is "
                        "half of a surrogate pair, no character; remove it"
                    ) from None
            raise

    def decode(self, tokens: Any) -> str:
        """The text of tokens, integers [N], without separator, pad and mask.

        Bytes that make no UTF-8, as where a character's tokens are cut apart, become U+FFFD.

        Raises:
          ValueError: a number is no token.
        """
        tokens_N = np.asarray(tokens).reshape(-1)
        if tokens_N.size and not 0 <= tokens_N.min() <= tokens_N.max() < self.vocab_size:
            raise ValueError(
                f"got tokens from {tokens_N.min()} to {tokens_N.max()}, expected 0 to "
                f"{self.vocab_size - 1}"
            )
        special = {self.separator, self.pad, self.mask}
        return self._decode([token for token in tokens_N.tolist() if token not in special])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, i32[V]; 0 for special tokens.

        For our own tokenizers the sum over a text's tokens is the text's length in UTF-8; for a
        `TokenizerFile` as nearly as its vocabulary tells: it may drop or add spaces, or know no
        token for a character.
        """
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file that `load_tokenizer` reads, whole or not at all.

        Raises:
          UserError: the file cannot be written.
        """
        path = Path(path)
        try:
            with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
                whole = Path(folder) / path.name
                with whole.open("w") as file:
                    json.dump(self._content, file, ensure_ascii=True)
                    file.flush()
                    os.fsync(file.fileno())
                whole.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _decode(self, tokens: list[int]) -> str:
        raise NotImplementedError


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a file: one of ours, of Hugging Face, or of SentencePiece.

    Raises:
      UserError: there is no such file, or it holds no tokenizer.
    """
    return TokenizerFile(os.fspath(path)).open()


class _Spelled(Tokenizer):
    """A tokenizer of ours: the tokens' bytes, joined, are the text."""

    def __init__(self, content: dict[str, Any], spelling: list[bytes], specials: bool = True):
        super().__init__(content)
        self._spelling = spelling
        self.vocab_size = len(spelling)
        if specials:
            self.separator, self.pad, self.mask = SEPARATOR, PAD, MASK

    def token_bytes(self) -> np.ndarray:
        return np.array([len(token) for token in self._spelling], np.int32)

    def _decode(self, tokens: list[int]) -> str:
        return b"".join([self._spelling[token] for token in tokens]).decode(errors="replace")


_BYTES = [b"", b"", b"", *(bytes([byte]) for byte in range(256))]


class _Bytes(_Spelled):
    def __init__(self, content: dict[str, Any]):
        super().__init__(content, _BYTES)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) + np.int32(len(SPECIALS)) for text in texts]


class _Characters(_Spelled):
    def __init__(self, content: dict[str, Any]):
        alphabet, specials = content["alphabet"], content["specials"]
        if alphabet != "".join(sorted(set(alphabet))):
            raise ValueError("its alphabet is not sorted")
        characters = [character.encode() for character in alphabet]
        first = len(SPECIALS) if specials else 0
        super().__init__(content, [b""] * first + characters, specials)
        self._token = np.full(0x110000, -1, np.int32)  # by code point
        self._token[_code_points(alphabet)] = np.arange(len(alphabet)) + first

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._characters(text) for text in texts]

    def _characters(self, text: str) -> np.ndarray:
        tokens_N = self._token[_code_points(text)]
        if tokens_N.size and tokens_N.min() < 0:
            at = int(np.argmin(tokens_N))
            raise UserError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at {at} of a text is not among "
                f"the {len(self._content['alphabet'])} of Characters' corpus; add text that has "
                "it to the corpus, or use Bytes or Bpe, which know every character"
            )
        return tokens_N


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


class _Bpe(_Spelled):
    """Byte-level BPE: token 3 + b is byte b; each merge joins two tokens to the next one.

    A later merge may spell what an earlier one did (a + aa after aa + a) and then gives that token.
    """

    def __init__(self, content: dict[str, Any]):
        from tokenizers import Tokenizer as Library
        from tokenizers import models

        tokens, known = list(_BYTES), set(_BYTES)
        for left, right in content["merges"]:
            if not len(SPECIALS) <= min(left, right) <= max(left, right) < len(tokens):
                raise ValueError(f"it merges {left} and {right}, which are no tokens before it")
            if (joined := tokens[left] + tokens[right]) not in known:
                tokens.append(joined)
                known.add(joined)
        super().__init__(content, tokens)
        # Spelled in the library's letters for bytes. Special tokens are left out of it, so that no
        # text can be taken for one.
        spelled = ["".join(_LETTERS[byte] for byte in token) for token in tokens]
        vocab = {spelled[i]: i for i in range(len(SPECIALS), len(tokens))}
        merges = [(spelled[left], spelled[right]) for left, right in content["merges"]]
        self._library = Library(models.BPE(vocab=vocab, merges=merges))
        self._library.pre_tokenizer = _words()

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return _encoded(self._library, ((i, p) for i, t in enumerate(texts) for p in pieces(t)))


# GPT-2's printable stand-ins for bytes, in which the library writes its vocabulary (Radford et al.
# 2019, "Language models are unsupervised multitask learners", §2.2).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_LETTERS = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}


def _words() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False, use_regex=True)


def pieces(text: str, size: int = _PIECE) -> Iterator[str]:
    """A text cut, every `size` characters or more, into pieces that GPT-2's words respect.

    A word of byte-level BPE never holds a space or a newline after anything but white space, so
    that the pieces, encoded one by one, give the tokens of the whole.
    """
    start = 0
    while space := _SPACE.search(text, start + size):
        yield text[start : space.start()]
        start = space.start()
    yield text[start:]


def _encoded(library: Any, numbered: Iterable[tuple[int, str]]) -> list[np.ndarray]:
    """Joins the tokens of pieces with the same number; every text has one at least."""
    parts: list[list[np.ndarray]] = []
    numbered = iter(numbered)
    while group := list(islice(numbered, _GROUP)):
        encoded = library.encode_batch_fast([p for _, p in group], add_special_tokens=False)
        for (i, _), encoding in zip(group, encoded, strict=True):
            if i == len(parts):
                parts.append([])
            parts[i].append(np.array(encoding.ids, np.int32))
    return [np.concatenate(part) for part in parts]


class _HuggingFace(Tokenizer):
    """What a tokenizer.json describes, without the tokens that its post-processor would add."""

    def __init__(self, content: dict[str, Any]):
        from tokenizers import Tokenizer as Library

        super().__init__(content)
        self._library = Library.from_str(json.dumps(content["tokenizer"]))
        self._library.no_truncation()
        self._library.no_padding()
        vocab = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > _LARGEST:  # gaps in a vocabulary take memory, too
            raise ValueError(f"its largest token is {self.vocab_size - 1}, expected < {_LARGEST}")
        self.separator, self.pad, self.mask = _specials(vocab)

    def token_bytes(self) -> np.ndarray:
        described = json.loads(self._library.to_str())
        bytes_V = np.zeros(self.vocab_size, np.int32)
        letters = '"ByteLevel"' in json.dumps([described["decoder"], described["pre_tokenizer"]])
        for token, i in self._library.get_vocab(with_added_tokens=False).items():
            bytes_V[i] = len(token) if letters else _spelled_bytes(token)
        for i, added in self._library.get_added_tokens_decoder().items():
            bytes_V[i] = 0 if added.special else len(added.content.encode())
        return bytes_V

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return _encoded(self._library, enumerate(texts))
        except Exception as error:  # the library has no other kind
            raise UserError(
                f"the tokenizer cannot encode this text ({error}): it needs a token for what it"
                " does not know"
            ) from error

    def _decode(self, tokens: list[int]) -> str:
        return self._library.decode(tokens, skip_special_tokens=True)


class _SentencePiece(Tokenizer):
    """A SentencePiece model; decoding gives the text as its normalisation leaves it."""

    def __init__(self, content: dict[str, Any]):
        from sentencepiece import SentencePieceProcessor

        super().__init__(content)
        model = base64.b64decode(content["model"], validate=True)
        if not model:  # which the library would take for no model given
            raise ValueError("it is empty")
        self._library = SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._library.vocab_size()
        tokens = (self._library.id_to_piece(i) for i in range(self.vocab_size))
        self.separator, self.pad, self.mask = _specials({t: i for i, t in enumerate(tokens)})

    def token_bytes(self) -> np.ndarray:
        library, bytes_V = self._library, np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if not (library.is_control(i) or library.is_unknown(i)):
                bytes_V[i] = _spelled_bytes(library.id_to_piece(i))
        return bytes_V

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(row, np.int32) for row in self._library.encode(list(texts), out_type=int)]

    def _decode(self, tokens: list[int]) -> str:
        return self._library.decode(tokens)


def _specials(vocab: dict[str, int]) -> tuple[int | None, ...]:
    """Separator, pad and mask by their usual names."""
    names = (_SEPARATORS, _PADS, _MASKS)
    return tuple(next((vocab[name] for name in usual if name in vocab), None) for usual in names)


def _spelled_bytes(token: str) -> int:
    """UTF-8 bytes of a token spelled as by SentencePiece (▁ is a space, <0x0A> a byte) or BERT."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode())


@dataclass(frozen=True)
class Bytes:
    """UTF-8: byte b is token b + 3, after the special tokens; V is 259."""

    def open(self) -> Tokenizer:
        return _Bytes({"jaxeco_tokenizer": "bytes"})


def _check_corpus(owner: str, corpus: Any) -> None:
    if not hasattr(corpus, "documents"):
        raise ValueError(
            f'{owner}.corpus: got {corpus!r}, expected a text source such as TextFiles("texts")'
        )


@dataclass(frozen=True)
class Characters:
    """One token for each character of the corpus, sorted by code point.

    Encoding another character raises UserError: fit on all text that is to be encoded.

    Attributes:
      corpus: a text source.
      specials: whether the special tokens come before the characters.
    """

    corpus: TextSource
    specials: bool = False

    def __post_init__(self) -> None:
        _check_corpus("Characters", self.corpus)

    def open(self) -> Tokenizer:
        """Reads the corpus, once in a process.

        Raises:
          UserError: the corpus cannot be read, or is empty.
        """
        return _alphabet(self, self.corpus.documents().fingerprint)


@lru_cache(maxsize=8)
def _alphabet(of: Characters, _: str) -> Tokenizer:
    found: set[str] = set()
    for text in of.corpus.documents():
        found.update(text)
    if not found:
        raise UserError("Characters: the corpus holds no text; expected at least one character")
    content = {"alphabet": "".join(sorted(found)), "specials": of.specials}
    return _Characters({"jaxeco_tokenizer": "characters", **content})


@dataclass(frozen=True)
class Bpe:
    """Byte-level byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909), in GPT-2's words.

    Token 3 + b is byte b, then comes what pairs merge to, the most frequent first. A corpus with
    too few pairs gives fewer tokens than `vocab_size`.

    Attributes:
      vocab_size: V, with 3 special tokens and 256 bytes; at least 259.
      corpus: a text source.
    """

    vocab_size: int
    corpus: TextSource

    def __post_init__(self) -> None:
        _check_corpus("Bpe", self.corpus)
        if self.vocab_size < len(_BYTES):
            raise ValueError(
                f"Bpe.vocab_size: got {self.vocab_size}, expected at least {len(_BYTES)}: 3 "
                "special tokens and 256 bytes"
            )

    def open(self) -> Tokenizer:
        """Trains, once for a corpus: the result is kept in the cache.

        Raises:
          UserError: the corpus cannot be read or is empty, or the cache cannot be written.
        """
        return _trained(self, self.corpus.documents().fingerprint)


@lru_cache(maxsize=8)
def _trained(of: Bpe, corpus: str) -> Tokenizer:
    key = json.dumps([of.vocab_size, corpus, version("tokenizers")])
    path = runtime.cache_dir() / "tokenizers" / f"bpe{of.vocab_size}-{_digest(key.encode())}.json"
    with suppress(UserError):  # a cache may be there for reading only
        return load_tokenizer(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            if path.exists():
                try:
                    return load_tokenizer(path)
                except UserError as damage:
                    warnings.warn(f"{damage}: training again", stacklevel=2)
            tokenizer = _train(of)
            tokenizer.save(path)
            return tokenizer
    except OSError as error:
        raise UserError(
            f"cannot keep a tokenizer in {path.parent}: {error.strerror or error}; name another "
            "folder in the environment variable JAXECO_CACHE"
        ) from error


def _train(of: Bpe) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = _words()
    trainer = trainers.BpeTrainer(
        vocab_size=of.vocab_size - len(SPECIALS),
        initial_alphabet=list(_LETTERS.values()),
        show_progress=False,
    )
    texts = (piece for text in of.corpus.documents() for piece in pieces(text) if piece)
    if (first := next(texts, None)) is None:
        raise UserError("Bpe: the corpus holds no text; expected at least one character")
    library.train_from_iterator(chain([first], texts), trainer)
    number = {letter: len(SPECIALS) + byte for byte, letter in sorted(_LETTERS.items())}
    merges = []
    for left, right in json.loads(library.to_str())["model"]["merges"]:
        merges.append([number[left], number[right]])
        number.setdefault(left + right, len(SPECIALS) + len(number))
    return _Bpe({"jaxeco_tokenizer": "bpe", "merges": merges})


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer from a file: Hugging Face's tokenizer.json, SentencePiece's .model, or our own.

    Special tokens are found by their usual names: <|endoftext|>, </s>, [SEP], <pad>, [MASK] ...
    Others' tokenizers encode a document in one go, and keep their own ways: a special token that
    a text spells out is that token, and what their normalisation drops does not come back.

    Attributes:
      path: "~" is understood, a relative path starts at the working directory.
    """

    path: str

    def open(self) -> Tokenizer:
        """Reads the file, once in a process while it does not change.

        Raises:
          UserError: there is no such file, or it holds no tokenizer.
        """
        path = Path(self.path).expanduser()
        try:
            status = path.stat()
            return _read(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; expected a tokenizer.json, a SentencePiece .model, or "
                "a file that a tokenizer's save() wrote"
            ) from error


@lru_cache(maxsize=8)
def _read(path: Path, *_: int) -> Tokenizer:
    data = path.read_bytes()
    try:
        if data.lstrip()[:1] != b"{":
            model = base64.b64encode(data).decode()
            return _made({"jaxeco_tokenizer": "sentencepiece", "model": model})
        content = json.loads(data)
        if "jaxeco_tokenizer" not in content:
            content = {"jaxeco_tokenizer": "huggingface", "tokenizer": content}
        return _made(content)
    except BaseException as error:  # a panic of the Rust library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{path}: not a tokenizer ({type(error).__name__}: {' '.join(str(error).split())}); "
            "expected a tokenizer.json, a SentencePiece .model, or a file that a tokenizer's "
            "save() wrote"
        ) from error


def _made(content: dict[str, Any]) -> Tokenizer:
    match content["jaxeco_tokenizer"]:
        case "bytes":
            return _Bytes(content)
        case "characters":
            return _Characters(content)
        case "bpe":
            return _Bpe(content)
        case "huggingface":
            return _HuggingFace(content)
        case "sentencepiece":
            return _SentencePiece(content)
        case kind:
            raise ValueError(f"a jaxeco tokenizer of unknown kind {kind!r}")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
