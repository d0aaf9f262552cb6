"""Sessions as a person sees them, through the real entry point: a text, and a classifier."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxeco import run
from jaxeco.data import load_tokenizer
from jaxeco.errors import UserError
from jaxeco.folder import changes
from jaxeco.log import read_metrics

TEXT = """
from pathlib import Path
from jaxeco import data, losses, metrics, models, optim
from jaxeco.experiment import Epochs, Experiment, Steps

def experiment(lr: float = 1e-30, vocab_size: int = 7, context: int = 8) -> Experiment:
    folder = Path(__file__).parent
    train, test = data.TextFiles(f"{folder}/a.txt"), data.TextFiles(f"{folder}/b.txt")
    words = data.Characters(train)
    trunk = models.Transformer(
        vocab_size=vocab_size, context=context, layers=1, heads=1, width=8, mlp_width=8
    )
    return Experiment(
        name="text",
        train=data.TextWindows(train, words, length=8),
        evals={"test": data.TextWindows(test, words, length=8)},
        model=models.LanguageModel(trunk),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        eval_metrics=(metrics.BitsPerByte(words),),
        optimizer=optim.SGD(lr=lr),
        batch=8,
        length=Steps(20),
        eval_batch=8,
        eval_every=Steps(2),
        save_every=Steps(10),
        log_every=Steps(1),
        best="test/bits_per_byte",
        patience=2,
    )
"""


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """Words for the command line: an experiment on a text of six letters and the newline."""
    rng = np.random.default_rng(0)
    for name, size in (("a", 200), ("b", 45)):
        letters = "".join(rng.permutation([*"abcdef\n" * (size // 7 + 1)]))
        (tmp_path / f"{name}.txt").write_text(letters[:size])
    (tmp_path / "text.py").write_text(TEXT)
    return [str(tmp_path / "text.py"), "--workdir", str(tmp_path / "run")]


def test_a_text_stops_early_and_is_complete(
    text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run.main(text) == 0
    shown = capsys.readouterr().out
    assert "199 examples" not in shown and "24 examples of 8 tokens" in shown
    assert any("tokens_per_second" in line for line in read_metrics(folder))
    assert "stopped early: no better test/bits_per_byte since step 2" in shown
    result = json.loads((folder / "result.json").read_text())
    assert (result["step"], result["of"]) == (6, 20)
    best = result["best"]
    assert best["step"] == 6 and best.keys() == {  # the newest of equals: its checkpoint is kept
        "step", "test/loss", "test/accuracy", "test/bits_per_byte"
    }  # fmt: skip
    assert best["test/bits_per_byte"] == result["test"]["bits_per_byte"]
    assert "tokens_per_second" not in result["train"]
    # all letters are a byte each, and each that has one before it is predicted once
    assert best["test/bits_per_byte"] == pytest.approx(best["test/loss"] / np.log(2), rel=1e-6)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.vocab_size == 7 and tokenizer.decode(tokenizer.encode("fade")) == "fade"
    assert run.main([*text, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "this run was complete already; stopped early: no better" in shown
    assert json.loads((folder / "result.json").read_text())["step"] == 6
    assert [line["step"] for line in read_metrics(folder) if line["split"] == "test"] == [2, 4, 6]


def test_a_model_without_room_for_the_text(text: list[str]) -> None:
    for words, says in (
        (("vocab_size=5",), "7 tokens, the model room for 5: set model.trunk.vocab_size=7"),
        (("context=4",), "texts of 8 tokens, but the model's context is 4"),
    ):
        with pytest.raises(UserError, match=says):
            run.main([*text, *words])


CLASSES = """
import numpy as np
from jaxeco import data, losses, metrics, models, optim, ranking
from jaxeco.experiment import Experiment, Steps

rng = np.random.default_rng(0)
Y = rng.integers(0, 3, 90).astype(np.int32)
X = (rng.normal(size=(90, 4)) + Y[:, None]).astype(np.float32)

def experiment() -> Experiment:
    names = ("low", "middle", "high")
    return Experiment(
        name="classes",
        train=data.Arrays(X[:64], Y[:64], names),
        evals={"test": data.Arrays(X[64:], Y[64:], names)},
        model=models.MLP(widths=(), num_classes=3),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        eval_metrics=(
            metrics.F1("macro"),
            ranking.RocAuc(),
            ranking.RocCurve(),
            ranking.PrecisionRecallCurve(),
        ),
        optimizer=optim.SGD(lr=0.1),
        batch=8,
        length=Steps(16),
        eval_batch=8,
        eval_every=Steps(8),
        best="test/roc_auc",
    )
"""


def test_a_classifier_leaves_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.py").write_text(CLASSES)
    folder = tmp_path / "run"
    assert run.main([str(tmp_path / "classes.py"), "--workdir", str(folder)]) == 0
    assert {"curves.png", "roc.png", "pr.png"} <= {path.name for path in folder.iterdir()}
    last = read_metrics(folder)[-1]
    assert np.shape(last["roc_curve"]) == np.shape(last["pr_curve"]) == (3, 200, 2)
    result = json.loads((folder / "result.json").read_text())
    assert result["test"].keys() == {"step", "loss", "accuracy", "macro_f1", "roc_auc"}
    assert result["best"]["test/roc_auc"] == max(
        line["roc_auc"] for line in read_metrics(folder) if "roc_auc" in line
    )
    assert f"test/roc_auc  {result['best']['test/roc_auc']:.4f}" in capsys.readouterr().out


def test_what_has_changed_since_a_session() -> None:
    before = {"versions": {"jax": "1", "flax": None}, "code": {"jaxeco": "a"}}
    assert changes(before, before) == []
    with_library = {"versions": {"jax": "1", "oneDNN": "3.2"}, "code": {"jaxeco": "b"}}
    assert changes(before, with_library) == ["oneDNN", "jaxeco"]  # a name of today, in old records
    assert changes(with_library, before) == ["oneDNN", "jaxeco"]
