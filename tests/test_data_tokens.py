import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

from jaxeco.data import numbers, order, tokens
from jaxeco.data.numbers import NumberWords
from jaxeco.data.pipeline import Feed, assemble
from jaxeco.data.text import Documents, TextFiles
from jaxeco.data.tokenizers import Bytes
from jaxeco.data.tokens import (
    LabelledText,
    MaskTokens,
    PackedText,
    TextPairs,
    TextWindows,
    Translation,
)
from jaxeco.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXECO_CACHE", str(tmp_path))
    return tmp_path / "data"


@dataclass(frozen=True)
class Letters:
    """A tokenizer that is its own description: a is 3, b is 4, ...; it notes what it is given."""

    separator: int | None = 0
    pad: int | None = 1
    vocab_size: int = 30
    calls: ClassVar[list[int]] = []

    @property
    def fingerprint(self):
        return repr(self)

    def open(self):
        return self

    def encode_batch(self, texts):
        self.calls.append(len(texts))
        return [np.array([ord(letter) - ord("a") + 3 for letter in t], np.int32) for t in texts]


BARE = Letters(separator=None, pad=None)
WIDE = Letters(vocab_size=2**17)


@dataclass(frozen=True)
class Texts:
    texts: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    name: str = "toy"

    def documents(self):
        digest = hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()
        labels = None if self.labels is None else np.array(self.labels)
        return Documents(self.name, digest, lambda: iter(self.texts), labels, ("no", "yes"))


TOY = Texts(("abcdefg", "hij"))
STREAM = [0, 3, 4, 5, 6, 7, 8, 9, 0, 10, 11, 12]  # the same behind separators
LONG = Texts(tuple("abcdefghijklmnopqrstuvwxyz"[i % 5 : 7 + 3 * i % 17] for i in range(40)))


def batches(feed, steps):
    found = []
    for step in steps:
        fed = {name: value[0] for name, value in feed.fed(step).items()}
        found.append(jax.device_get(jax.jit(assemble)(feed.resident, fed)))
    return found


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda a: a.dtype, one) == jax.tree.map(lambda a: a.dtype, other)


def everything(data):
    return {name: np.asarray(field[np.arange(len(data))]) for name, field in data.fields.items()}


def test_windows_by_hand():
    data = TextWindows(TOY, Letters(), 4).open()
    assert (len(data), data.training_examples, data.eval_examples) == (11, 2, 3)
    assert (data.stride, data.unit, data.units, data.tokenizer) == (4, "tokens", 4, Letters())
    got = {name: field[np.array([0, 4, 8])] for name, field in data.fields.items()}
    expected = {
        "x": np.array([[0, 3, 4, 5], [6, 7, 8, 9], [0, 10, 11, 12]], np.int32),
        "y": np.array([[3, 4, 5, 6], [7, 8, 9, 0], [10, 11, 12, 1]], np.int32),
        "weights": np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], np.float32),
    }
    assert_same(got, expected)
    for name, field in data.fields.items():
        assert field.shape == (11, 4) and field.dtype == expected[name].dtype


def test_windows_of_the_same_tokens_and_without_specials():
    data = TextWindows(TOY, BARE, 4, targets="same").open()
    assert (len(data), data.eval_examples) == (10, 3)
    got = {name: field[np.array([0, 8])] for name, field in data.fields.items()}
    x = np.array([[3, 4, 5, 6], [11, 12, 0, 0]], np.int32)
    assert_same(got, {"x": x, "y": x, "weights": np.array([[1] * 4, [1, 1, 0, 0]], np.float32)})


@pytest.mark.parametrize("targets", ["next", "same"])
@pytest.mark.parametrize(("length", "batch"), [(1, 8), (4, 1), (5, 2), (11, 1)])
def test_an_evaluation_counts_every_target_once(length, batch, targets):
    data = TextWindows(TOY, Letters(), length, targets).open()
    counted = []
    with Feed.evaluation(data, batch, resident=True) as feed:
        for got in batches(feed, range(feed.steps)):
            counted += got["y"][got["weights"] * got["mask"][:, None] == 1].tolist()
    assert counted == STREAM[targets == "next" :]


SOURCES = {
    "windows": TextWindows(LONG, Letters(), 16),
    "windows, uint32": TextWindows(LONG, WIDE, 16),
    "windows, bare": TextWindows(LONG, BARE, 16, "same"),
    "packed": PackedText(LONG, Letters(), 12),
    "labelled": LabelledText(Texts(LONG.texts, (0, 1) * 20), Letters(), 9),
    "pairs": TextPairs(LONG, LONG, Letters(), WIDE, 30, 30),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))
def test_streaming_equals_resident_bit_for_bit(source):
    data = source.open()
    kinds = [lambda r: Feed.training(data, 4, 1, resident=r)]
    kinds.append(lambda r: Feed.evaluation(data, 4, resident=r))
    for kind in kinds:
        with kind(True) as resident, kind(False) as streaming:
            steps = range(resident.steps)
            assert_same(batches(resident, steps), batches(streaming, steps))


def test_training_windows_are_those_of_the_order():
    data = TextWindows(LONG, Letters(), 8).open()
    stream = np.concatenate([data.fields["x"].tokens_U, np.full(9, 1)])
    with Feed.training(data, 3, seed=2, resident=True) as feed:
        for step in (0, feed.steps, 10**6):
            rows = order.indices(2, step, 3, len(data), 8)
            [got] = batches(feed, [step])
            places = rows[:, None] + np.arange(8)
            np.testing.assert_array_equal(got["x"], stream[places])
            np.testing.assert_array_equal(got["y"], stream[places + 1])


def test_windows_do_not_depend_on_the_number_of_devices():
    data = TextWindows(LONG, Letters(), 8).open()
    [expected] = batches(Feed.training(data, 8, seed=0, resident=True), [5])
    for devices in (2, 8):
        mesh = jax.make_mesh(
            (devices,),
            ("data",),
            axis_types=(jax.sharding.AxisType.Auto,),
            devices=jax.devices()[:devices],
        )
        split = NamedSharding(mesh, P("data"))
        place = lambda tree, mesh=mesh: jax.device_put(tree, NamedSharding(mesh, P()))  # noqa: E731
        feed = Feed.training(data, 8, seed=0, resident=True, place=place)
        x, y, weights = (feed.resident[name] for name in ("x", "y", "weights"))
        assert x.tokens_U is y.tokens_U is weights.windows.tokens_U
        fed = jax.device_put({name: value[0] for name, value in feed.fed(5).items()}, split)
        assert_same(
            jax.device_get(jax.jit(assemble, out_shardings=split)(feed.resident, fed)), expected
        )
        mapped = jax.shard_map(assemble, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        assert_same(jax.device_get(jax.jit(mapped)(feed.resident, fed)), expected)


def test_tokens_lie_once_and_small_in_a_memory_map():
    narrow, wide = (TextWindows(LONG, t, 8).open() for t in (Letters(), WIDE))
    tokens_U = narrow.fields["x"].tokens_U
    assert isinstance(tokens_U, np.memmap) and tokens_U.dtype == np.uint16
    assert narrow.nbytes == 2 * len(tokens_U) and wide.nbytes == 4 * len(tokens_U)


def test_text_is_tokenized_once_in_bounded_batches(monkeypatch, folder):
    whole = TextWindows(LONG, BARE, 8).open()
    monkeypatch.setattr(tokens, "_CHARACTERS", 50)
    Letters.calls.clear()
    data = TextWindows(LONG, Letters(), 8).open()
    calls = len(Letters.calls)
    assert calls > 5 and sum(Letters.calls) == 40 and max(Letters.calls) < 30
    stream = data.fields["x"].tokens_U
    np.testing.assert_array_equal(stream[stream != 0], whole.fields["x"].tokens_U)
    other = TextWindows(LONG, Letters(), 5, "same").open()  # any length has the same tokens
    assert other.fields["x"].tokens_U.filename == stream.filename
    assert len(Letters.calls) == calls
    assert sum(path.is_dir() for path in folder.iterdir()) == 2


def test_text_that_has_changed_takes_the_place_of_the_old(tmp_path, folder):
    source = TextWindows(TextFiles(str(tmp_path / "a.txt")), Letters(), 2)
    for text, tokens_U in (("abcd", [0, 3, 4, 5, 6]), ("bbb", [0, 4, 4, 4])):
        (tmp_path / "a.txt").write_text(text)
        assert source.open().fields["x"].tokens_U.tolist() == tokens_U
    assert sum(path.is_dir() for path in folder.iterdir()) == 1


def test_fingerprints_tell_text_tokenizer_length_and_targets():
    sources = [
        *(TextWindows(TOY, t, n) for t in (Letters(), WIDE, BARE) for n in (4, 5)),
        TextWindows(TOY, Letters(), 4, "same"),
        TextWindows(Texts(("abcdefg", "hik")), Letters(), 4),
        PackedText(TOY, Letters(), 4),
        PackedText(TOY, Letters(), 5),
        LabelledText(Texts(TOY.texts, (0, 1)), Letters(), 4),
        LabelledText(Texts(TOY.texts, (1, 0)), Letters(), 4),
    ]
    assert len({source.open().fingerprint for source in sources}) == len(sources)
    assert TextWindows(TOY, Letters(), 4).open().fingerprint == sources[0].open().fingerprint


def test_a_text_shorter_than_a_window_says_both_numbers():
    assert len(TextWindows(TOY, Letters(), 11).open()) == 11
    with pytest.raises(UserError, match=r"toy has 12 tokens, fewer than the 13 .* length=12"):
        TextWindows(TOY, Letters(), 12).open()
    assert len(TextWindows(TOY, Letters(), 12, "same").open()) == 12
    with pytest.raises(UserError, match="toy has no documents"):
        TextWindows(Texts(()), Letters(), 4).open()
    with pytest.raises(UserError, match="toy has 0 tokens"):
        TextWindows(Texts(("",)), BARE, 4).open()
    with pytest.raises(ValueError, match=r"TextWindows.length: got 0"):
        TextWindows(TOY, Letters(), 0)
    with pytest.raises(ValueError, match=r'targets: got "last"'):
        TextWindows(TOY, Letters(), 4, "last")


def segments(*lengths):
    """Segments of different numbers, so that each can be told wherever it turns up."""
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]


def packed(lengths, width):
    return [[len(piece) for piece in row] for row in tokens.pack(segments(*lengths), width)]


def test_packing_by_hand():
    # 6 and 7 open rows; 3 fits the 7 exactly, which is closed, as the 6 is with 4
    assert packed([6, 7, 3, 4], 10) == [[7, 3], [6, 4]]
    # best fit: 2 goes where it leaves least room, not where there is most
    assert packed([5, 7, 2, 3], 10) == [[7, 2], [5, 3]]
    # 23 fills two rows; its rest opens a third, which later segments share
    assert packed([6, 23, 6, 10], 10) == [[10], [10], [10], [3, 6], [6]]


def test_packing_keeps_a_bounded_number_of_rows_open():
    seen = []
    rows = tokens.pack((seen.append(n) or np.full(n, n) for n in range(100, 1100, 10)), 1100)
    next(rows)
    assert len(seen) <= tokens._OPEN + 1 + 40  # some share a row


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_token_once_and_in_order(seed):
    width = 17
    lengths = np.random.default_rng(seed).integers(1, 40, 600)
    whole = segments(*lengths)
    rows = list(tokens.pack(iter(whole), width))
    assert sorted(np.concatenate([piece for row in rows for piece in row])) == list(
        range(lengths.sum())
    )
    assert max(sum(map(len, row)) for row in rows) <= width
    starts = {int(segment[0]): segment for segment in whole}
    for row in rows:
        for place, piece in enumerate(row):
            segment = starts.get(int(piece[0]))
            if segment is None:  # what is left of a long one, which only begins a row
                assert place == 0
            elif len(segment) <= width:
                np.testing.assert_array_equal(piece, segment)
            else:
                np.testing.assert_array_equal(piece, segment[:width])
                assert len(row) == 1
            np.testing.assert_array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))


def test_packing_leaves_few_tokens_to_padding():
    lengths = np.random.default_rng(0).integers(1, 18, 2000)
    assert lengths.sum() / (17 * len(packed(lengths, 17))) > 0.95


def test_packed_text_by_hand():
    data = PackedText(Texts(("ab", "abcdefg", "c", "")), Letters(), 4).open()
    assert (len(data), data.stride, data.unit, data.units) == (3, 1, "tokens", 4)
    expected = {
        "x": np.array([[0, 3, 4, 5], [0, 3, 4, 0], [7, 8, 9, 0]], np.int32),
        "y": np.array([[3, 4, 5, 6], [3, 4, 0, 5], [8, 9, 0, 1]], np.int32),
        "weights": np.array([[1] * 4, [1] * 4, [1, 1, 1, 0]], np.float32),
    }
    assert_same(everything(data), expected)


def test_special_tokens_that_are_missing():
    with pytest.raises(UserError, match="PackedText needs a tokenizer with a separator token"):
        PackedText(TOY, BARE, 4).open()
    with pytest.raises(UserError, match="PackedText needs a tokenizer with a pad token"):
        PackedText(TOY, Letters(pad=None), 4).open()
    with pytest.raises(UserError, match="LabelledText needs a tokenizer with a pad token"):
        LabelledText(Texts(("a",), (0,)), BARE, 4).open()
    with pytest.raises(UserError, match="TextPairs needs a tokenizer with a separator token"):
        TextPairs(TOY, TOY, Letters(), Letters(separator=None), 9, 9).open()


def test_labelled_text_by_hand():
    data = LabelledText(Texts(("ab", "abcdefg", "abcd"), (1, 0, 1)), Letters(), 4).open()
    expected = {
        "x": np.array([[0, 3, 4, 1], [0, 3, 4, 5], [0, 3, 4, 5]], np.int32),
        "y": np.array([1, 0, 1], np.int32),
    }
    assert_same(everything(data), expected)
    assert data.classes == ("no", "yes") and data.name == "toy, first 4 tokens"
    assert (data.unit, data.units, data.stride) == ("examples", 1, 1)


def test_labelled_text_that_cannot_serve():
    with pytest.raises(UserError, match=r"toy has no labels; .*label="):
        LabelledText(TOY, Letters(), 4).open()
    with pytest.raises(UserError, match="document 2 is empty"):
        LabelledText(Texts(("a", ""), (0, 1)), Letters(), 4).open()
    with pytest.raises(UserError, match="2 texts, but 3 labels"):
        LabelledText(Texts(("a", "b"), (0, 1, 1)), Letters(), 4).open()


def test_pairs_by_hand():
    data = TextPairs(
        Texts(("ab", "c")), Texts(("d", "efg"), name="other"), Letters(), Letters(), 2, 4
    ).open()
    expected = {
        "source": np.array([[3, 4], [5, 1]], np.int32),
        "target": np.array([[0, 6, 0, 1, 1], [0, 7, 8, 9, 0]], np.int32),
    }
    assert_same(everything(data), expected)
    batch = Translation()(expected | {"mask": np.ones(2, np.float32)})
    assert sorted(batch) == ["mask", "weights", "x", "y"]
    np.testing.assert_array_equal(batch["x"]["source"], expected["source"])
    np.testing.assert_array_equal(batch["x"]["target"], [[0, 6, 0, 1], [0, 7, 8, 9]])
    np.testing.assert_array_equal(batch["y"], [[6, 0, 1, 1], [7, 8, 9, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 0, 0], [1, 1, 1, 1]])


def test_pairs_that_do_not_fit():
    one, three = Texts(("ab", "abc", "abcde")), Texts(("a", "bc", "d"), name="other")
    with pytest.raises(UserError, match=r"toy: document 2 does not fit.* source_length=5"):
        TextPairs(one, three, Letters(), Letters(), 2, 3).open()
    with pytest.raises(UserError, match=r"other: document 2 does not fit.* target_length=3"):
        TextPairs(one, three, Letters(), Letters(), 5, 2).open()
    assert len(TextPairs(one, three, Letters(), Letters(), 5, 3).open()) == 3
    with pytest.raises(UserError, match="toy has 3 texts, but toy has 2"):
        TextPairs(one, Texts(("a", "b")), Letters(), Letters(), 5, 5).open()


@dataclass(frozen=True)
class Thirteen:
    """A tokenizer, and its description, of 3 special tokens and 10 others."""

    mask: int | None = 2
    separator, pad, vocab_size = 0, 1, 13

    def open(self):
        return self


def test_masked_tokens_follow_berts_shares():
    B, T, V = 64, 500, 13
    x_BxT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    given_BxT = np.ones((B, T), np.float32)
    given_BxT[:, -50:] = 0
    keys_B = jax.random.split(jax.random.key(1), B)
    batch = {"x": x_BxT, "weights": given_BxT}
    got = jax.device_get(jax.jit(MaskTokens(Thirteen(), rate=0.3))(keys_B, batch))
    np.testing.assert_array_equal(got["y"], x_BxT)
    assert got["x"].dtype == np.int32 and got["weights"].dtype == np.float32
    special = x_BxT < 3
    np.testing.assert_array_equal(got["x"][special], x_BxT[special])
    assert not got["weights"][special].any() and not got["weights"][:, -50:].any()
    free = ~special[:, :-50]
    chosen = got["weights"][:, :-50][free] == 1
    new, old = got["x"][:, :-50][free], x_BxT[:, :-50][free]
    np.testing.assert_array_equal(new[~chosen], old[~chosen])
    assert stats.binomtest(int(chosen.sum()), int(free.sum()), 0.3).pvalue > 1e-3
    new, old = new[chosen], old[chosen]
    hidden, kept = new == 2, new == old
    # a random token is the one that there was in one case of ten
    assert stats.binomtest(int(hidden.sum()), len(new), 0.8).pvalue > 1e-3
    assert stats.binomtest(int(kept.sum()), len(new), 0.11).pvalue > 1e-3
    drawn = np.bincount(new[~hidden & ~kept], minlength=V)
    assert not drawn[:3].any() and stats.chisquare(drawn[3:]).pvalue > 1e-3


def test_masks_belong_to_an_examples_own_key():
    mask = jax.jit(MaskTokens(Bytes()))
    x_BxT = jnp.full((4, 50), 7)
    keys_B = jax.random.split(jax.random.key(0), 4)
    batch = mask(keys_B, {"x": x_BxT})
    assert_same(mask(keys_B[::-1], {"x": x_BxT}), jax.tree.map(lambda a: a[::-1], batch))
    assert len(np.unique(batch["x"], axis=0)) == 4
    with pytest.raises(ValueError, match=r"got x float32\[4, 50\], expected tokens"):
        mask(keys_B, {"x": jnp.ones((4, 50))})


def test_masks_that_make_no_sense():
    with pytest.raises(ValueError, match=r"rate: got 0.0"):
        MaskTokens(Bytes(), rate=0.0)
    with pytest.raises(UserError, match="needs a tokenizer with a mask token"):
        MaskTokens(Thirteen(mask=None))(None, {"x": jnp.zeros((2, 5), int)})


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (7, "seven", "sieben"),
        (12, "twelve", "zwölf"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (66, "sixty-six", "sechsundsechzig"),
        (77, "seventy-seven", "siebenundsiebzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred one", "einhunderteins"),
        (111, "one hundred eleven", "einhundertelf"),
        (1_000, "one thousand", "eintausend"),
        (1_001, "one thousand one", "eintausendeins"),
        (21_000, "twenty-one thousand", "einundzwanzigtausend"),
        (100_000, "one hundred thousand", "einhunderttausend"),
        (101_000, "one hundred one thousand", "einhunderteintausend"),
        (201_121, "two hundred one thousand one hundred twenty-one",
         "zweihunderteintausendeinhunderteinundzwanzig"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine",
         "neunhundertneunundneunzigtausendneunhundertneunundneunzig"),
    ],
)  # fmt: skip
def test_numbers_in_words(number, english, german):
    assert (numbers.english(number), numbers.german(number)) == (english, german)


def test_number_words_split():
    train, test = numbers.numbers("train"), numbers.numbers("test")
    assert len(set(train)) == 50_000 and len(set(test)) == 2_000 and not set(train) & set(test)
    assert set(range(100)) <= set(train)
    digits = [np.bincount([len(str(n)) for n in part])[1:].tolist() for part in (train, test)]
    assert digits == [[10, 90, 700, 8400, 20400, 20400], [0, 0, 200, 600, 600, 600]]
    english, german = (NumberWords("test", name).documents() for name in ("english", "german"))
    assert list(english) == [numbers.english(int(n)) for n in test] == list(english)
    assert len(set(german)) == 2_000 and english.fingerprint != german.fingerprint
    with pytest.raises(ValueError, match="language: got 'french'"):
        NumberWords("test", "french")
