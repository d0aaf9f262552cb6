"""The learning-rate range test: what rises, what is read from the losses, what it says."""

import csv
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import config, lr_find, optim, schedules
from jaxeco.errors import RunFailed, UserError

EXPERIMENT = """
import numpy as np
from jaxeco import data, losses, metrics, models, optim, schedules
from jaxeco.experiment import Epochs, Experiment, MeshShape

rng = np.random.default_rng(0)
Y = rng.integers(0, 2, 64).astype(np.int32)
X = (rng.normal(size=(64, 4)) + 2 * Y[:, None]).astype(np.float32)

def experiment(lr: float = 0.1, epochs: float = 1) -> Experiment:
    return Experiment(
        name="two",
        train=data.Arrays(X, Y),
        evals={},
        model=models.MLP(widths=(), num_classes=2),
        loss=losses.SoftmaxCrossEntropy(),
        optimizer=OPTIMIZER,
        batch=16,
        mesh=MeshShape(data=1),
        length=Epochs(epochs),
    )
"""


def test_a_ramp_rises_by_the_same_factor() -> None:
    ramp = lr_find.Ramp(10.0, span=1e4).build(5)
    assert [float(ramp(t)) for t in range(5)] == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])
    assert np.asarray(ramp(jnp.int32(2))) == pytest.approx(0.1, rel=1e-5)


def test_all_parts_of_an_optimizer_rise_together() -> None:
    adam = optim.AdamW(schedules.Cosine(0.02, warmup=0.1), weight_decay=0.3)
    parts = optim.Partition((("head/.*", optim.SGD(0.4)), ("frozen", None), (".*", adam)))
    whole = optim.Muon(0.1, rest=optim.Layerwise(parts, 0.5, 3), momentum=0.7)
    risen = lr_find.scaled(whole, lambda peak: schedules.Constant(10 * peak))
    assert risen.lr == schedules.Constant(1.0) and risen.momentum == 0.7
    head, frozen, rest = risen.rest.optimizer.rules
    assert head == ("head/.*", optim.SGD(schedules.Constant(4.0))) and frozen == ("frozen", None)
    assert rest[1] == optim.AdamW(schedules.Constant(0.2), weight_decay=0.3)
    assert lr_find.rate_of(whole) == pytest.approx(0.1)
    assert lr_find.rate_of(parts) == pytest.approx(0.4)  # that of the first rule, as is logged
    with pytest.raises(UserError, match="expected one above 0"):
        lr_find.rate_of(optim.SGD(0.0))


def test_what_losses_say() -> None:
    """A valley in x, the decades about 10^-2: 1 - exp(-x²/2), steepest at x = -1."""
    rates = np.geomspace(1e-7, 10, 200)
    decades = np.log10(rates) + 2
    losses = 1 - np.exp(-(decades**2) / 2)
    found = lr_find.read(rates, losses.tolist())
    assert found.least == pytest.approx(1e-2, rel=0.1)
    assert found.steepest == pytest.approx(1e-3, rel=0.15)
    assert found.suggested == pytest.approx(1e-3, rel=0.1)
    # what comes after a loss that is not finite says nothing
    cut = [*losses[:150], float("nan"), *losses[151:]]
    assert len(lr_find.read(rates, cut).loss_N) == 150
    for flat in ([1.0] * 200, list(np.linspace(1, 2, 200)), [float("inf")] * 9):
        with pytest.raises(RunFailed):
            lr_find.read(rates, flat)


def test_when_a_loss_has_blown_up() -> None:
    assert not lr_find.blown([2.0] * 50 + [1.0] * 50 + [3.0] * 50)
    assert lr_find.blown([2.0] * 50 + [1.0] * 50 + [4.1] * 50)
    assert lr_find.blown([1.0, float("nan")])


@pytest.mark.parametrize(
    ("optimizer", "word", "lines"),
    [
        ("optim.SGD(lr)", "lr", 1),
        ("optim.SGD(0.1)", "optimizer.lr", 1),
        ("optim.SGD(schedules.Cosine(0.1))", "optimizer.lr.peak", 1),
        ('optim.Partition(((".*", optim.SGD(0.1)),))', "optimizer.rules.0.1.lr", 1),
        ("optim.Muon(lr, rest=optim.SGD(3 * lr))", "lr", 2),
        ("optim.Muon(2 * lr, rest=optim.SGD(lr))", "", 1),
    ],
)
def test_how_a_rate_is_set(optimizer: str, word: str, lines: int, tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(EXPERIMENT.replace("OPTIMIZER", optimizer))
    said = lr_find.usage(config.load(path, ["epochs=2"]), 0.25)
    assert len(said) == lines
    if word:  # a run with these words has that rate
        assert said[0].endswith(f"two.py epochs=2 {word}=0.25")
        words = said[0].split("two.py ")[1].split()
        assert lr_find.rate_of(config.load(path, words).experiment.optimizer) == 0.25
    else:
        assert said == ["to use it, multiply the learning rates by 1.2"]  # 0.25 for 0.2


def test_it_finds_a_rate_and_leaves_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "two.py", tmp_path / "found"
    path.write_text(EXPERIMENT.replace("OPTIMIZER", "optim.SGD(lr)"))
    loaded = config.load(path)
    assert lr_find.run(loaded, folder) == 0
    shown = capsys.readouterr().out
    first = (folder / "lr_find.csv").read_text()
    assert lr_find.run(loaded, folder) == 0
    assert (folder / "lr_find.csv").read_text() == first  # a function of the experiment
    assert sorted(p.name for p in folder.iterdir()) == ["lr_find.csv", "lr_find.png"]
    rows = list(csv.DictReader(first.splitlines()))
    assert float(rows[0]["lr"]) == pytest.approx(1e-7, rel=1e-5)
    assert shown.startswith("suggested lr: ") and "a tenth of where the smoothed loss" in shown
    suggested = float(shown.split()[2].rstrip(","))
    assert 1e-3 < suggested < 10
    assert shown.splitlines()[1].endswith(f"two.py lr={suggested:g}")
