"""Tokenizers: round trips over all of Unicode, the libraries' own results, files, bad input."""

import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers as library

from jaxeco.data import tokenizers as module
from jaxeco.data.text import PydocTopics, TextFiles, Texts
from jaxeco.data.tokenizers import (
    MASK,
    PAD,
    SEPARATOR,
    Bpe,
    Bytes,
    Characters,
    TokenizerFile,
    load_tokenizer,
    pieces,
)
from jaxeco.errors import UserError

TEXT = "It is the east, and Juliet is the sun.\n\tnée Müller 12345 -------- aaaaaaaa 😀 don't\n"
CORPUS = PydocTopics("test[:4]")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXECO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bpe():
    return Bpe(600, CORPUS).open()


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 3, newline="")
    return TextFiles(str(tmp_path))


def unicode_text(seed, length=400):
    """Characters of all planes and kinds, in runs and alone, without surrogates."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(length):
        low, high = [(0, 0x80), (0x80, 0x800), (0x800, 0x10000), (0x10000, 0x110000), (9, 33)][
            rng.integers(5)
        ]
        code = int(rng.integers(low, high))
        if not 0xD800 <= code < 0xE000:
            parts.append(chr(code) * int(rng.choice([1, 1, 1, 2, 7])))
    return "".join(parts)


STRANGE = [
    "",
    "\0",
    "\x00\x01\x1f\x7f\x80\x9f",
    "\r\n\r \t\v\f\x1c\x1d\x1e\x85\u2028\u00a0 ",
    "e\u0301\u0327 \u0301",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "\ufeff\ufffe\uffff\U0010ffff\U0001ffff\ufffd",
    "<|endoftext|><|pad|> <|mask|> [MASK]</s>",
    "Ġ▁Ċ<0x0A>",
    "    indented\n\n\n  lines  \n",
]


@pytest.mark.parametrize("text", STRANGE + [unicode_text(seed) for seed in range(8)])
def test_ours_round_trip_any_text_and_count_its_bytes(bpe, text):
    for tokenizer in (Bytes().open(), bpe):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert not {SEPARATOR, PAD, MASK} & set(tokens.tolist())
        assert tokenizer.decode(tokens) == text
        assert tokenizer.token_bytes()[tokens].sum() == len(text.encode())


def test_bytes():
    tokenizer = Bytes().open()
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("aé\0").tolist() == [100, 0xC3 + 3, 0xA9 + 3, 3]
    assert tokenizer.token_bytes().tolist() == [0, 0, 0] + [1] * 256
    assert (tokenizer.separator, tokenizer.pad, tokenizer.mask) == (0, 1, 2)


def test_decoding_drops_special_tokens_and_survives_half_characters():
    tokenizer = Bytes().open()
    assert tokenizer.decode([0, 100, 1, 101, 2]) == "ab"
    assert tokenizer.decode(np.array([[100, 0xC3 + 3], [101, 102]])) == "a\ufffdbc"
    assert tokenizer.decode([]) == ""
    for wrong in ([259], [-1, 5]):
        with pytest.raises(ValueError, match="expected 0 to 258"):
            tokenizer.decode(wrong)


def test_characters(corpus):
    tokenizer = Characters(corpus).open()
    alphabet = sorted(set(TEXT))
    assert tokenizer.vocab_size == len(alphabet)
    assert tokenizer.encode(TEXT).tolist() == [alphabet.index(c) for c in TEXT]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.token_bytes()[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())
    assert (tokenizer.separator, tokenizer.pad, tokenizer.mask) == (None, None, None)
    special = Characters(corpus, specials=True).open()
    assert special.encode("\t").tolist() == [3] and special.decode([0, 3, 1]) == "\t"
    assert (special.separator, special.pad, special.mask) == (0, 1, 2)
    assert special.vocab_size == len(alphabet) + 3
    assert special.fingerprint != tokenizer.fingerprint


def test_a_character_outside_the_alphabet_is_named(corpus):
    with pytest.raises(UserError, match=r"'Ж' \(U\+0416\) at 4 of a text.*add text") as caught:
        Characters(corpus).open().encode("the Жuliet")
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_named(bpe, corpus):
    for tokenizer in (Bytes().open(), bpe, Characters(corpus).open()):
        with pytest.raises(UserError, match=r"U\+D83D at 2 of a text"):
            tokenizer.encode_batch(["It", "is\ud83d"])


# Byte pair encoding, against the library's own.


def library_bpe(texts, vocab_size):
    reference = library.Tokenizer(library.models.BPE())
    reference.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(texts, trainer)
    return reference


def test_bpe_splits_as_the_library_does(bpe):
    reference = library_bpe(list(CORPUS.documents()), 600 - 3)
    assert bpe.vocab_size == reference.get_vocab_size() + 3 == 600
    for text in [*STRANGE, TEXT, *(unicode_text(seed) for seed in range(4)), *CORPUS.documents()]:
        ours = [bpe.decode([token]) for token in bpe.encode(text)]
        theirs = [reference.decode([token]) for token in reference.encode(text).ids]
        assert ours == theirs


def test_first_tokens_of_bpe_are_bytes_then_merges(tmp_path):
    (tmp_path / "runs.txt").write_text("aaaaaaa " * 50)
    tokenizer = Bpe(10_000, TextFiles(str(tmp_path))).open()
    assert Bpe(259, CORPUS).open().encode(TEXT).tolist() == Bytes().open().encode(TEXT).tolist()
    assert tokenizer.decode([259]) == "aa"
    assert tokenizer.encode("aa").tolist() == [259]
    assert 259 < tokenizer.vocab_size < 275  # runs of one letter have few pairs
    assert tokenizer.decode(tokenizer.encode("aaaaaaa aaa")) == "aaaaaaa aaa"


@pytest.mark.parametrize("seed", range(4))
def test_pieces_encode_as_the_whole(bpe, seed):
    text = unicode_text(seed, 1500) + TEXT * 10
    parts = list(pieces(text, size=5))
    assert "".join(parts) == text and len(parts) > 50
    whole = bpe._library.encode(text).ids
    assert np.concatenate(bpe.encode_batch(parts)).tolist() == whole
    assert list(pieces("x" * 20, size=5)) == ["x" * 20]


def test_batches_are_encoded_in_order(bpe, monkeypatch):
    monkeypatch.setattr(module, "_GROUP", 3)
    texts = [TEXT[i:] for i in range(20)] + ["", "x" * 100]
    for tokenizer in (Bytes().open(), bpe):
        together = tokenizer.encode_batch(texts)
        assert [t.tolist() for t in together] == [tokenizer.encode(t).tolist() for t in texts]
    assert bpe.encode_batch([]) == []


def test_training_is_the_same_in_every_process_and_happens_once(bpe, monkeypatch, tmp_path):
    script = (
        "import sys; from jaxeco.data.tokenizers import Bpe; from jaxeco.data import PydocTopics;"
        "print(Bpe(600, PydocTopics('test[:4]')).open().fingerprint);"
        "assert not {'torch', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    environment = {**os.environ, "JAXECO_CACHE": str(tmp_path), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [bpe.fingerprint]
    assert Bpe(600, PydocTopics("test[:4]")).open() is bpe
    module._trained.cache_clear()
    monkeypatch.setattr(module, "_train", None)
    assert Bpe(600, CORPUS).open().fingerprint == bpe.fingerprint  # from disk


def test_a_damaged_cache_is_trained_again(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXECO_CACHE", str(tmp_path / "cache"))
    first = Bpe(262, corpus).open()
    (kept,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    kept.write_bytes(kept.read_bytes()[:-5])
    module._trained.cache_clear()
    with pytest.warns(UserWarning, match="training again"):
        assert Bpe(262, corpus).open().fingerprint == first.fingerprint
    module._trained.cache_clear()
    assert Bpe(262, corpus).open().vocab_size == 262


def test_a_changed_corpus_is_another_tokenizer(corpus, tmp_path):
    before = Characters(corpus).open()
    (tmp_path / "text.txt").write_text(TEXT + "Ж")
    assert Characters(corpus).open().vocab_size == before.vocab_size + 1
    both = Characters(Texts((corpus, CORPUS))).open()
    assert both.vocab_size > before.vocab_size + 1


def test_descriptions_check_themselves(tmp_path):
    with pytest.raises(ValueError, match=r"Bpe.vocab_size: got 258, expected at least 259"):
        Bpe(258, CORPUS)
    for corpus in ((), "text", 3):
        with pytest.raises(ValueError, match="expected a text source"):
            Characters(corpus)


# Files.


def saved(tokenizer, path):
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert again.token_bytes().tolist() == tokenizer.token_bytes().tolist()
    special = [(t.separator, t.pad, t.mask) for t in (tokenizer, again)]
    assert special[0] == special[1]
    assert TokenizerFile(str(path)).open() is again
    return again


def test_ours_are_saved_and_read(bpe, corpus, tmp_path):
    for tokenizer in (Bytes().open(), bpe, Characters(corpus, specials=True).open()):
        again = saved(tokenizer, tmp_path / "tokenizer.json")
        assert again.decode(again.encode(TEXT)) == TEXT
        assert type(json.loads((tmp_path / "tokenizer.json").read_text())) is dict
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "tokenizer.json"]


def test_a_save_that_fails_leaves_the_old_file(bpe, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    Bytes().open().save(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        bpe.save(path)
    assert load_tokenizer(path).vocab_size == 259
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(UserError, match="No such file"):
        Bytes().open().save(tmp_path / "nowhere" / "tokenizer.json")


def test_hugging_face_byte_level(tmp_path):
    reference = library_bpe([TEXT * 3], 300)
    reference.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    reference.enable_truncation(4)
    reference.enable_padding(length=50)
    reference.save(str(tmp_path / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert tokenizer.separator == reference.token_to_id("<|endoftext|>")
    assert tokenizer.pad == reference.token_to_id("<|padding|>")
    assert tokenizer.mask is None
    tokens = tokenizer.encode(TEXT)
    assert tokens.tolist() == reference.encode(TEXT).ids
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.token_bytes()[tokens].sum() == len(TEXT.encode())
    assert tokenizer.token_bytes()[[tokenizer.separator, tokenizer.pad]].tolist() == [0, 0]
    assert tokenizer.decode([tokenizer.separator, *tokens]) == TEXT
    saved(tokenizer, tmp_path / "ours.json")


def test_hugging_face_word_pieces(tmp_path):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sun", "##s", "né"]
    numbered = {token: i for i, token in enumerate(vocab)}
    model = library.models.WordPiece(vocab=numbered, unk_token="[UNK]")
    reference = library.Tokenizer(model)
    reference.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    reference.decoder = library.decoders.WordPiece()
    reference.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    reference.add_special_tokens(vocab[:5])
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.separator, tokenizer.pad, tokenizer.mask) == (3, 0, 4)
    assert tokenizer.encode("the suns né").tolist() == [5, 6, 7, 8]  # without [CLS] and [SEP]
    assert tokenizer.decode([5, 6, 7]) == "the suns"
    assert tokenizer.token_bytes().tolist() == [0, 0, 0, 0, 0, 3, 3, 1, 3]


def test_sentence_piece(tmp_path):
    (tmp_path / "text").write_text(TEXT * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=300,
        model_type="bpe", byte_fallback=True, pad_id=3, user_defined_symbols=["<mask>"],
        minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    tokenizer = load_tokenizer(tmp_path / "m.model")
    assert tokenizer.vocab_size == reference.vocab_size()
    assert tokenizer.separator == reference.eos_id() and tokenizer.pad == 3
    assert tokenizer.mask == reference.piece_to_id("<mask>")
    for text in (TEXT, "ﬁne  Жuliet"):
        tokens = tokenizer.encode(text)
        assert tokens.tolist() == reference.encode(text)
        assert tokenizer.decode(tokens) == reference.decode(tokens.tolist())
    plain = "It is the sun, née Juliet"
    tokens = tokenizer.encode(plain)
    assert tokenizer.decode(tokens) == unicodedata.normalize("NFKC", plain)
    # it puts one space before a text
    assert tokenizer.token_bytes()[tokens].sum() == len(plain.encode()) + 1
    assert tokenizer.decode([tokenizer.separator, *tokens, tokenizer.pad]) == plain
    with pytest.raises(UserError, match=r"U\+D800"):
        tokenizer.encode("\ud800")
    saved(tokenizer, tmp_path / "ours.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"just some text",
        b"{",
        b"{}",
        b"[1]",
        b'{"version": "1.0", "model": {"type": "BPE"}}',
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        bytes(100),
        b'{"jaxeco_tokenizer": "runes"}',
        b'{"jaxeco_tokenizer": "bpe", "merges": [[0, 5]]}',
        b'{"jaxeco_tokenizer": "bpe", "merges": [[9999, 5]]}',
        b'{"jaxeco_tokenizer": "bpe"}',
        b'{"jaxeco_tokenizer": "characters", "alphabet": "baa", "specials": false}',
        b'{"jaxeco_tokenizer": "sentencepiece", "model": ""}',
    ],
)
def test_files_that_hold_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer .*expected") as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"none.json: No such file.*expected"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(UserError, match="Is a directory"):
        load_tokenizer(tmp_path)


def test_fingerprints_follow_the_content(bpe, corpus, tmp_path):
    others = [Bytes().open(), Characters(corpus).open(), Bpe(300, corpus).open(), bpe]
    assert len({tokenizer.fingerprint for tokenizer in others}) == 4
    module._trained.cache_clear()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "another name.txt").write_text(TEXT * 3, newline="")
    again = Bpe(300, TextFiles(str(tmp_path / "other"))).open()
    assert again.fingerprint == others[2].fingerprint
