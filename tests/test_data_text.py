"""Text sources: tfds's builders without TensorFlow, files and their mistakes, Python's own text."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_tfds import (
    Server,
    serve_ag_news,
    serve_imdb_reviews,
    serve_lm1b,
    serve_tiny_shakespeare,
)

from jaxeco.data import text as module
from jaxeco.data.text import (
    PACKAGES,
    JsonLines,
    PydocTopics,
    StdlibDocstrings,
    TextFiles,
    Texts,
    TfdsText,
)
from jaxeco.errors import UserError


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    server = Server()
    yield server
    server.close()


def texts(source):
    documents = source.documents()
    first = list(documents)
    assert list(documents) == first  # they can be read again
    return first


def fingerprint(source):
    return source.documents().fingerprint


def refused(source):
    """The one line that opening and reading end with."""
    with pytest.raises(UserError) as caught:
        list(source.documents())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# tfds.


def test_tiny_shakespeare_is_prepared_without_tensorflow(server, monkeypatch, tmp_path):
    play = "".join(f"ROMEO:\nLine {i}, née 😀.\n\n" for i in range(40))
    serve_tiny_shakespeare(server, monkeypatch, play)
    source = TfdsText("tiny_shakespeare", "train", data_dir=tmp_path)
    cut, rest = int(len(play) * 0.9), len(play) - int(len(play) * 0.9)
    assert texts(source) == [play[:cut]]
    splits = "train+validation+test"
    whole = TfdsText("tiny_shakespeare", splits, data_dir=tmp_path)
    assert texts(whole) == [play[:cut], play[cut : cut + rest // 2], play[cut + rest // 2 :]]
    documents = source.documents()
    assert documents.name == "tiny_shakespeare:1.0.0 train (tfds)"
    assert documents.labels is None and documents.classes == ()
    assert documents.fingerprint != fingerprint(whole)
    assert server.requests == 1 and "tensorflow" not in sys.modules


REVIEWS = [(f"Review {i}: good<br /><br />né", "pos" if i % 3 else "neg") for i in range(20)]


def test_imdb_reviews(server, monkeypatch, tmp_path):
    serve_imdb_reviews(server, monkeypatch, REVIEWS, REVIEWS[:5], ["no label"] * 3)

    def reviews(split):
        source = TfdsText("imdb_reviews", split, label="label", data_dir=tmp_path)
        documents = source.documents()
        assert documents.classes == ("neg", "pos") and documents.labels.dtype == np.int32
        names = [documents.classes[label] for label in documents.labels]
        return list(zip(documents, names, strict=True)), documents.fingerprint

    train, whole = reviews("train")
    assert Counter(train) == Counter(REVIEWS)  # tfds shuffles
    assert reviews("train[3:7]+test[:2]")[0] == train[3:7] + reviews("test")[0][:2]
    assert reviews("train[:19]")[1] != whole == reviews("train[:100%]")[1]
    plain = TfdsText("imdb_reviews", "unsupervised", data_dir=tmp_path)
    assert texts(plain) == ["no label"] * 3
    labelled = TfdsText("imdb_reviews", "unsupervised", label="label", data_dir=tmp_path)
    assert "3 documents have no label (it is -1)" in refused(labelled)


def test_fingerprints_of_large_sets_follow_files_and_slices(server, monkeypatch, tmp_path):
    serve_imdb_reviews(server, monkeypatch, REVIEWS, REVIEWS[:5], ["no label"])
    monkeypatch.setattr(module, "HASHED_BYTES", 10)
    sources = [
        TfdsText("imdb_reviews", split, label=label, data_dir=tmp_path)
        for split in ("train", "train[1:]", "test")
        for label in (None, "label")
    ]
    assert len({fingerprint(source) for source in sources}) == 6
    assert [fingerprint(source) for source in sources] == [fingerprint(s) for s in sources]


def test_ag_news_and_lm1b(server, monkeypatch, tmp_path):
    articles = [(1 + i % 4, f"Title {i}", f'Say "{i}", née') for i in range(8)]
    serve_ag_news(server, monkeypatch, articles, articles[:2])
    news = TfdsText("ag_news_subset", "train", "description", "label", tmp_path).documents()
    assert news.classes == ("World", "Sports", "Business", "Sci/Tech")
    expected = Counter((text, label - 1) for label, _, text in articles)
    assert Counter(zip(news, news.labels.tolist(), strict=True)) == expected
    serve_lm1b(server, monkeypatch, ["A line .", "Another one ."], ["Held out ."])
    assert sorted(texts(TfdsText("lm1b", "train", data_dir=tmp_path))) == [
        "A line .",
        "Another one .",
    ]
    assert texts(TfdsText("lm1b", "test", data_dir=tmp_path)) == ["Held out ."]


def test_mistakes_with_tfds_are_named(server, monkeypatch, tmp_path):
    serve_imdb_reviews(server, monkeypatch, REVIEWS, REVIEWS[:5], ["no label"])

    def imdb(**options):
        return TfdsText(
            **{"name": "imdb_reviews", "split": "train", "data_dir": tmp_path} | options
        )

    assert "did you mean imdb_reviews" in refused(imdb(name="imdb_review"))
    assert "no feature 'txt'; did you mean text" in refused(imdb(text="txt"))
    assert "text must be a feature of text" in refused(imdb(text="label"))
    assert "label must be a class or an integer" in refused(imdb(label="text"))
    assert server.requests == 0  # found before the download
    assert "selects no examples" in refused(imdb(split="train[3:3]"))
    assert "Should be one of ['train', 'test'" in refused(imdb(split="validation"))


# Files.


@pytest.fixture
def folder(tmp_path):
    """Forty files, some deeper, and some that are no text files."""
    for i in range(40):
        path = tmp_path / ("deep/er" if i % 4 == 0 else ".") / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"Document {i}\r\nné".encode())
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def test_text_files_of_a_folder_and_a_pattern(folder):
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("??.txt"))
    expected = [(folder / name).read_bytes().decode() for name in names]
    assert len(expected) == 40
    assert texts(TextFiles(str(folder))) == expected
    assert texts(TextFiles(str(folder / "**" / "*.txt"))) == expected
    assert texts(TextFiles(str(folder / "0?.txt"))) == [
        f"Document {i}\r\nné" for i in range(10) if i % 4
    ]


def test_splits_of_files_follow_their_names(folder, tmp_path_factory):
    parts = [texts(TextFiles(str(folder), split)) for split in ("train", "test")]
    assert [len(part) for part in parts] == [36, 4]
    assert sorted(parts[0] + parts[1]) == sorted(texts(TextFiles(str(folder))))
    assert texts(TextFiles(str(folder / "**" / "*.txt"), "test")) == parts[1]
    first, second = (texts(TextFiles(str(folder), s)) for s in ("train[:50%]", "train[50%:]"))
    assert len(first) == len(second) == 18 and sorted(first + second) == sorted(parts[0])
    (folder / "new.txt").write_text("new")
    moved = set(texts(TextFiles(str(folder), "test"))) ^ set(parts[1])
    assert len(moved - {"new"}) <= 1


def test_fingerprints_of_files(folder, tmp_path_factory, monkeypatch):
    before = fingerprint(TextFiles(str(folder)))
    assert fingerprint(TextFiles(str(folder), "train")) != before
    os.utime(folder / "01.txt", ns=(1, 1))
    assert fingerprint(TextFiles(str(folder))) == before  # small: the content alone
    (folder / "01.txt").write_text("Document 1\r\nnö", newline="")
    assert fingerprint(TextFiles(str(folder))) != before
    monkeypatch.setattr(module, "HASHED_BYTES", 10)
    large = fingerprint(TextFiles(str(folder)))
    assert fingerprint(TextFiles(str(folder))) == large
    os.utime(folder / "01.txt", ns=(1, 1))
    assert fingerprint(TextFiles(str(folder))) != large


def test_a_single_file_is_cut_between_lines(tmp_path):
    lines = [f"{i} " + "né" * (i % 7) + "\n" for i in range(200)]
    path = tmp_path / "one.txt"
    path.write_text("".join(lines))
    (train,), (test,) = (texts(TextFiles(str(path), split)) for split in ("train", "test"))
    assert train + test == "".join(lines)
    assert train.endswith("\n") and test.split()[0].isdigit()
    size = len("".join(lines).encode())
    assert 0.9 * size <= len(train.encode()) < 0.9 * size + 40
    halves = [texts(TextFiles(str(path), s))[0] for s in ("train[:50%]", "train[50%:]", "test")]
    assert "".join(halves) == "".join(lines) and all(halves)
    assert texts(TextFiles(str(tmp_path))) == ["".join(lines)]
    path.write_text("one line only")
    assert texts(TextFiles(str(path), "train")) == ["one line only"]
    assert "no line begins in the part 'test'" in refused(TextFiles(str(path), "test"))


def test_text_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"TextFiles\.split"):
        TextFiles("x", "trian")
    assert "no such files" in refused(TextFiles(str(tmp_path / "nothing")))
    assert "a folder of .txt files" in refused(TextFiles(str(tmp_path)))
    path = tmp_path / "a.txt"
    path.write_bytes(b"")
    assert f"{path}: the file is empty" in refused(TextFiles(str(tmp_path)))
    path.write_bytes("né\n".encode() * 10 + b"caf\xe9 noir\n")
    said = refused(TextFiles(str(path)))
    assert f"{path}: byte 43 (0xe9) is not UTF-8" in said and "iconv" in said
    assert "byte 43" in refused(TextFiles(str(path), "train[50%:]"))
    assert texts(TextFiles(str(path), "train[:50%]")) == ["né\n" * 6]
    (tmp_path / "b.txt").write_text("good")
    documents = iter(TextFiles(str(tmp_path)).documents())
    with pytest.raises(UserError, match="byte 43"):
        next(documents)


def test_a_folder_with_a_bracket_in_its_name(tmp_path):
    (tmp_path / "odd [1]").mkdir()
    (tmp_path / "odd [1]" / "a[2].txt").write_text("a")
    assert texts(TextFiles(str(tmp_path / "odd [1]"))) == ["a"]
    assert texts(TextFiles(str(tmp_path / "odd [1]" / "a[2].txt"))) == ["a"]


# JSON lines.

ROWS = [{"text": f"Text {i} né 😀", "label": "abc"[i % 3], "n": i % 4} for i in range(50)]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_json_lines(tmp_path):
    path = written(tmp_path / "a.jsonl", ROWS)
    assert texts(JsonLines(path)) == [row["text"] for row in ROWS]
    documents = JsonLines(path, label="label").documents()
    assert documents.classes == ("a", "b", "c")
    assert documents.labels.tolist() == [i % 3 for i in range(50)]
    numbers = JsonLines(path, label="n").documents()
    assert numbers.classes == ("0", "1", "2", "3") and numbers.labels.tolist()[:5] == [
        0,
        1,
        2,
        3,
        0,
    ]
    assert numbers.fingerprint != documents.fingerprint
    written(tmp_path / "b.jsonl", ROWS[:2])
    assert len(texts(JsonLines(str(tmp_path)))) == len(texts(JsonLines(f"{tmp_path}/*l"))) == 52


def test_json_labels_keep_the_order_of_numbers_and_of_given_classes(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"text": "x", "label": k} for k in (10, 9, 10)])
    documents = JsonLines(path, label="label").documents()
    assert documents.classes == ("9", "10") and documents.labels.tolist() == [1, 0, 1]
    given = JsonLines(path, label="label", classes=("10", "9", "8")).documents()
    assert given.classes == ("10", "9", "8") and given.labels.tolist() == [0, 1, 0]
    assert "a.jsonl:2: 9 is not one of classes: 10" in refused(
        JsonLines(path, label="label", classes=("10",))
    )
    with pytest.raises(ValueError, match="no label"):
        JsonLines(path, classes=("a",))


def test_splits_of_json_lines_follow_the_text(tmp_path):
    path = written(tmp_path / "a.jsonl", ROWS + ROWS)
    train, test = (JsonLines(path, label="n", split=s).documents() for s in ("train", "test"))
    assert len(list(train)) == len(train.labels) == 90 and len(list(test)) == 10
    assert not set(train) & set(test)  # 10 is even: no pair of equals is parted
    number = {row["text"]: row["n"] for row in ROWS}
    for part in (train, test):
        assert [number[text] for text in part] == part.labels.tolist()
        assert part.classes == ("0", "1", "2", "3")
    assert train.fingerprint != test.fingerprint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "list is not an object"),
        ('{"txt": "a", "label": 1}', "no 'text' in it; it has txt, label"),
        ('{"text": "a"}', "no 'label' in it"),
        ('{"text": null, "label": 1}', "'text' is None; expected a string"),
        ('{"text": "a", "label": 1.5}', "'label' is 1.5"),
        ('{"text": "a", "label": true}', "'label' is True"),
        ('{"text": "é\\ud83d", "label": 1}', r"half a surrogate pair, U\+D83D, at 1"),
        (b'{"text": "caf\xe9", "label": 1}', "not JSON"),
        ("[" * 200_000, "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "label": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=f"a.jsonl:3: .*{message}") as caught:
        JsonLines(str(tmp_path / "a.jsonl"), label="label").documents()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_json_files_without_lines_or_with_mixed_labels(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "no lines" in refused(JsonLines(str(tmp_path / "a.jsonl")))
    path = written(tmp_path / "b.jsonl", [{"text": "x", "label": k} for k in ("1", 2)])
    assert "'label' is int or str" in refused(JsonLines(path, label="label"))
    assert "no such files" in refused(JsonLines(str(tmp_path / "c.jsonl")))


# What comes with Python.


def test_pydoc_topics():
    train, test = texts(PydocTopics("train")), texts(PydocTopics("test"))
    assert not set(train) & set(test)
    assert sum(map(len, train)) > 300_000 and sum(map(len, test)) > 10_000
    assert any("The standard type hierarchy" in text for text in train + test)
    assert len(train) == len(train + test) * 9 // 10
    assert fingerprint(PydocTopics("train")) == fingerprint(PydocTopics("train"))


def test_stdlib_docstrings():
    train, test = StdlibDocstrings("train").documents(), StdlibDocstrings("test").documents()
    assert train.classes == PACKAGES
    found = [*train, *test]
    assert len(set(found)) == len(found) > 1800
    assert len(list(train)) == len(train.labels) == len(found) * 4 // 5
    assert min(map(len, found)) >= 40
    assert np.bincount(train.labels, minlength=len(PACKAGES)).min() >= 40
    assert np.bincount(test.labels, minlength=len(PACKAGES)).min() >= 8

    import asyncio
    import inspect

    labels = dict(zip(found, [*train.labels, *test.labels], strict=True))
    assert labels[inspect.getdoc(asyncio.gather)] == PACKAGES.index("asyncio")


def test_python_without_the_source_of_its_library(monkeypatch, tmp_path):
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"{tmp_path} has no source of asyncio" in refused(StdlibDocstrings())
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "without pydoc_data" in refused(PydocTopics())


def test_reading_text_imports_nothing_heavy():
    script = (
        "import sys; from jaxeco import data; list(data.PydocTopics('test').documents());"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'torch', 'tokenizers', 'sentencepiece',"
        " 'safetensors', 'sklearn'}; assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_real_tiny_shakespeare():
    real = os.environ.get("TFDS_DATA_DIR", "")
    if not real or not (Path(real) / "tiny_shakespeare").is_dir():
        pytest.skip("$TFDS_DATA_DIR holds no tiny_shakespeare")
    (train,) = TfdsText("tiny_shakespeare", "train").documents()
    assert len(train) == 1_003_854 and train.startswith("First Citizen:\n")


def test_texts_follow_one_another():
    topics, docstrings = PydocTopics("test"), StdlibDocstrings("test")
    both = Texts((topics, docstrings)).documents()
    assert list(both) == [*topics.documents(), *docstrings.documents()] == list(both)
    assert both.labels is None
    other = Texts((docstrings, topics)).documents()
    assert other.fingerprint != both.fingerprint
    with pytest.raises(ValueError, match="expected one text source"):
        Texts(())


def test_equal_texts_stay_together(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i // 3}"}) + "\n" for i in range(65)))
    for cut in ("", "[:90%]", "[50%:]"):
        train = set(JsonLines(str(path), split=f"train{cut}").documents())
        assert train and not train & set(JsonLines(str(path), split="test").documents())
    first = set(JsonLines(str(path), split="all[:50%]").documents())
    rest = set(JsonLines(str(path), split="all[50%:]").documents())
    assert not first & rest and len(first | rest) == 22
