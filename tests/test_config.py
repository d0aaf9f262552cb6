"""Experiment files: loading, arguments, overrides, descriptions, and what a mistake says."""

from functools import partial
from pathlib import Path

import pytest

from jaxeco import config
from jaxeco.description import describe, flatten
from jaxeco.errors import UserError

FILE = '''
"""A small experiment.

Its claim.
"""
from typing import Literal
from jaxeco import data, losses, metrics, models, optim, schedules
from jaxeco.experiment import Epochs, Experiment


def experiment(
    lr: float = 0.1,  # peak learning rate
    widths: tuple[int, ...] = (8, 4),
    batch: int = 16,  # examples a step
    act: Literal["relu", "tanh"] = "relu",
    clip: float | None = None,
    smooth: bool = False,
) -> Experiment:
    return Experiment(
        name="small",
        train=data.Digits("train"),
        evals={"test": data.Digits("test")},
        preprocess=(data.Normalize(mean=(0.3,), sd=(0.35,), white=16),),
        model=models.MLP(widths=widths, num_classes=10, activation=act),
        loss=losses.SoftmaxCrossEntropy(label_smoothing=0.1 if smooth else 0.0),
        metrics=(metrics.Accuracy(),),
        optimizer=optim.AdamW(lr=schedules.Cosine(lr, warmup=0.1)),
        batch=batch,
        length=Epochs(2),
        clip_norm=clip,
    )
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(FILE)
    return path


def test_arguments_bind_by_their_types_before_derived_values_exist(file: Path) -> None:
    words = ["lr=0.5", "widths=3,2", "act=tanh", "clip=1", "smooth=true", "batch=8"]
    ex = config.load(file, words).experiment
    assert ex.optimizer.lr.peak == 0.5
    assert ex.model.widths == (3, 2)
    assert ex.model.activation == "tanh"
    assert ex.clip_norm == 1.0 and isinstance(ex.clip_norm, float)
    assert ex.loss.label_smoothing == 0.1
    assert config.load(file, ["clip=none"]).experiment.clip_norm is None


def test_any_other_key_is_a_dotted_field(file: Path) -> None:
    words = [
        "seed=7",
        "model.widths=5",
        "optimizer.lr.peak=0.25",
        "preprocess.0.white=8",
        "evals.test.split=train",
        "length.count=3",
    ]
    ex = config.load(file, words).experiment
    assert ex.seed == 7
    assert ex.model.widths == (5,)
    assert ex.optimizer.lr.peak == 0.25
    assert ex.preprocess[0].white == 8
    assert ex.evals["test"].split == "train"
    assert ex.length.count == 3
    untouched = config.load(file).experiment
    assert untouched.model.widths == (8, 4)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("learning_rate=1", "no argument 'learning_rate'"),
        ("bach=8", "did you mean batch?"),
        ("model.width=8", "did you mean widths?"),
        ("model.widths.0.x=8", "has no fields"),
        ("optimiser.lr=1", "did you mean optimizer?"),
        ("preprocess.3.white=1", "entries 0 to 0"),
        ("model=x", "set one of its fields: model.widths"),
        ("lr=fast", "expected float"),
        ("batch=2.5", "expected int"),
        ("batch=0", "at least 1"),
        ("act=rleu", "did you mean relu?"),
        ("smooth=maybe", "expected bool"),
        ("widths=a,b", "expected tuple of int"),
        ("lr", "expected key=value"),
        ("parallel=jti", "did you mean jit?"),
        ("lr=-1", "lr"),
        ("seed=-1", "seed"),
        ("grad_accum=3", "not divisible"),
    ],
)
def test_a_mistake_is_one_line(file: Path, word: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        config.load(file, [word])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_key_twice(file: Path) -> None:
    with pytest.raises(UserError, match="lr is given twice"):
        config.load(file, ["lr=1", "lr=2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def experiment(:\n", ":1: syntax error"),
        ("x = 1\n", "defines no function `experiment`"),
        ("import nowhere_at_all\n", ":1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def experiment():\n    return 3\n", "returned 3, expected an Experiment"),
        ("def experiment():\n    return undefined\n", ":2: NameError"),
        (
            "from jaxeco import models\ndef experiment():\n    return models.MLP(wdths=3)\n",
            ":3: TypeError",
        ),
    ],
)
def test_a_file_that_does_not_load(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest(file: Path) -> None:
    with pytest.raises(UserError, match=r"no such experiment file.*did you mean .*small\.py"):
        config.load(file.with_name("smal.py"))


def test_a_bug_in_the_file_keeps_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bug.py"
    path.write_text("def experiment():\n    return {}['missing']\n")
    with pytest.raises(KeyError):
        config.load(path)


def test_a_variant_imports_its_neighbour(file: Path) -> None:
    variant = file.with_name("variant.py")
    variant.write_text(
        "import dataclasses\nfrom small import experiment as base\n"
        "def experiment(lr: float = 0.3):\n"
        "    return dataclasses.replace(base(lr=lr), name='variant')\n"
    )
    ex = config.load(variant).experiment
    assert (ex.name, ex.optimizer.lr.peak) == ("variant", 0.3)


def test_a_description_is_plain_and_its_paths_can_be_overridden(file: Path) -> None:
    import json

    ex = config.load(file).experiment
    description = describe(ex)
    assert json.loads(json.dumps(description)) == description
    flat = flatten(description)
    assert flat["model.widths"] == [8, 4]
    assert flat["optimizer"] == "AdamW"
    assert flat["optimizer.lr.peak"] == 0.1
    assert flat["preprocess.0.white"] == 16
    assert "model.parent" not in flat
    same = config.load(file, ["model.widths=8,4", "optimizer.lr.peak=0.1"]).experiment
    assert describe(same) == description


def scale(x: float, by: float) -> float:
    return x * by


def maker(by: float):  # type: ignore[no-untyped-def]
    return lambda x: x * by


def test_functions_are_described_with_what_they_hold() -> None:
    def described(value: object) -> object:
        return describe({"function": value})

    assert described(partial(scale, by=2.0)) == described(partial(scale, by=2.0))
    assert described(partial(scale, by=2.0)) != described(partial(scale, by=3.0))
    assert described(maker(2.0)) == described(maker(2.0))
    assert described(maker(2.0)) != described(maker(3.0))
    with pytest.raises(UserError, match="cannot be described"):
        described(object())


def test_help_shows_types_defaults_and_comments(file: Path) -> None:
    text = config.help_text(file)
    assert "A small experiment." in text
    line = next(line for line in text.splitlines() if line.strip().startswith("lr="))
    assert line.split() == ["lr=0.1", "float", "peak", "learning", "rate"]
    assert "relu | tanh" in text
