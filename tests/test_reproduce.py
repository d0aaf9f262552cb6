"""Claims: that they are what docstrings and README say, and what becomes of them when run again."""

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from jaxeco import reproduce
from jaxeco.claims import Claim, read
from jaxeco.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.py"))
SHARE = Claim("test/accuracy", 0.90, 0.01, n=4, device="CPU")
LOSS = Claim("test/loss", 2.50, 0.10, n=3, device="CPU", unit="nats")
SINGLE = Claim("test/loss", 2.50, n=1, tolerance=0.2, device="CPU")

DIGITS = '''
"""Digits, in a second."""
from jaxeco import data, losses, metrics, models, optim
from jaxeco.claims import Claim
from jaxeco.experiment import Experiment, Steps
from jaxeco.pretrained import Pretrained

CLAIMS = (
    Claim("test/accuracy", {mean}, {sd}, n={n}, device="CPU"{more}),
)

def experiment(lr: float = 0.1, start: str | None = None) -> Experiment:
    return Experiment(
        name="{name}",
        train=data.Digits("train"),
        evals={{"test": data.Digits("test")}},
        preprocess=(data.Normalize(mean=(0.3,), sd=(0.35,), white=16),),
        model=models.MLP(widths=(), num_classes=10),
        start_from=Pretrained(start) if start else None,
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        optimizer=optim.SGD(lr),
        batch=32,
        length=Steps(60),
        eval_batch=360,
        best="test/accuracy",
    )
'''


def digits(path: Path, mean: float, sd: float | None, n: int, more: str = "") -> Path:
    text = DIGITS.format(mean=mean, sd=sd, n=n, more=more and f", {more}", name=path.stem)
    path.write_text(text)
    return path


def judged(claim: Claim, *values: float, lower: bool = False) -> tuple[str, str]:
    found = reproduce.judged(claim, values, lower, alpha=0.01)
    return found.outcome, found.why


def test_two_means_are_held_against_each_other_by_welchs_t() -> None:
    outcome, why = judged(SHARE, 0.88, 0.89, 0.90, 0.91)
    assert outcome == "confirmed"
    sd = math.sqrt((1.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 3) / 100
    p = stats.ttest_ind_from_stats(0.90, 0.01, 4, 0.895, sd, 4, equal_var=False).pvalue
    assert "claimed 90 ± 1 % (n = 4): a difference of -0.5 points" in why and f"p = {p:.2g}" in why
    assert judged(SHARE, 0.84, 0.85, 0.86, 0.85)[0] == "refuted"
    outcome, why = judged(SHARE, 0.94, 0.95, 0.96, 0.95)
    assert outcome == "better" and "+5.0 points" in why


def test_of_a_loss_less_is_better() -> None:
    assert judged(LOSS, 1.0, 1.01, 1.02, lower=True)[0] == "better"
    assert judged(LOSS, 4.0, 4.01, 4.02, lower=True)[0] == "refuted"


def test_one_run_is_held_against_the_spread_of_several() -> None:
    # t of 2 degrees of freedom and alpha 0.01 is 9.925; 0.1 · √(1 + 1/3) = 0.1155
    assert judged(LOSS, 2.50 + 9.8 * 0.1155, lower=True)[0] == "confirmed"
    assert judged(LOSS, 2.50 + 10.1 * 0.1155, lower=True)[0] == "refuted"
    assert judged(SINGLE, 2.4, 3.0, 3.6, lower=True)[0] == "confirmed"
    assert judged(SINGLE, 3.0, 3.01, 3.02, lower=True)[0] == "refuted"


def test_where_nothing_has_a_spread_the_tolerance_decides() -> None:
    assert judged(SINGLE, 2.69, lower=True)[0] == "confirmed"
    outcome, why = judged(SINGLE, 2.71, lower=True)
    assert outcome == "refuted" and "where 0.20 is allowed" in why
    assert judged(SINGLE, 2.69, 2.69, lower=True)[0] == "confirmed"
    assert judged(SINGLE, 2.2, lower=True)[0] == "better"


def test_what_rounding_hides_is_no_difference() -> None:
    exact = Claim("test/accuracy", 0.973, 0.0, n=3, device="CPU")
    assert judged(exact, 0.9734, 0.9734, 0.9734)[0] == "confirmed"
    assert judged(exact, 0.9724, 0.9724, 0.9724)[0] == "refuted"


def test_a_run_that_came_to_nothing_refutes() -> None:
    outcome, why = judged(SHARE, 0.9, float("nan"), 0.9)
    assert outcome == "refuted" and "1 of 3 runs came to no finite value" in why


def test_runs_of_which_one_fails_do_not_confirm() -> None:
    claim = Claim("test/accuracy", 0.9731, 0.0016, n=3, device="CPU")
    outcome, why = judged(claim, 0.9731, 0.9735, 0.5)  # Welch's p is 0.4
    assert outcome == "refuted" and "the runs spread more, p = 3e-05 (F test)" in why
    ratio = stats.f.ppf(0.999, 2, 2) ** 0.5  # at a tenth of alpha
    for times, expected in ((0.99, "confirmed"), (1.01, "refuted")):
        spread = times * ratio * claim.sd
        assert judged(claim, *(0.9731 + spread * i for i in (-1, 0, 1)))[0] == expected


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (SHARE, "test/accuracy 90 ± 1 % (n = 4)"),
        (LOSS, "test/loss 2.5 ± 0.1 nats (n = 3)"),
        (Claim("test/top5", 0.9111, 0.0010, n=3, device="CPU"), "test/top5 91.11 ± 0.10 % (n = 3)"),
        (Claim("test/f1", 0.790, 0.011, n=3, device="CPU"), "test/f1 0.790 ± 0.011 (n = 3)"),
    ],
)
def test_a_claim_is_shown_with_the_digits_that_it_has(claim: Claim, expected: str) -> None:
    assert str(claim) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n": 0}, "expected a number of runs"),
        ({"n": 1, "sd": 0.1}, "one run has none"),
        ({"n": 3}, "more have one"),
        ({"n": 1}, "one run needs a tolerance"),
        ({"n": 3, "sd": 0.1, "tolerance": 1.0}, "more have their sd"),
        ({"n": 3, "sd": 0.1, "metric": "loss"}, "expected one such as test/accuracy"),
        ({"n": 3, "sd": 0.1, "words": ("seed=1",)}, "leave out the seed"),
        ({"n": 3, "sd": 0.1, "after": "docs.py"}, "expected argument=FILE"),
        ({"n": 3, "sd": 0.1, "at": "end"}, "expected last or best"),
    ],
)
def test_claims_are_checked(fields: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Claim(**{"metric": "test/loss", "mean": 1.0, "device": "CPU", **fields})


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_docstrings_say_what_is_claimed(file: Path) -> None:
    loaded, claims = read(file)
    doc = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
    assert bool(claims) != ("No result is claimed" in doc)
    for claim in claims:
        assert re.search(rf"(?<![\d.]){re.escape(claim.value)}", doc), claim.value
        assert f"n = {claim.n}" in doc
        assert not claim.data or "JPEG" in doc
    by_words = {claim.words: claim for claim in claims}.values()
    for claim in by_words:
        (trial,) = reproduce.planned(file, [claim], 1, Path("anywhere"))
        reproduce.check_metrics(file, claims, trial.members[0].loaded.experiment)
        assert trial.members[0].loaded.experiment.seed == 0
    assert loaded.experiment.seed == 0


def test_the_readme_has_the_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("claims")
    copy = tmp_path / "README.md"
    copy.write_text("Before.\n\n<!-- claims: begin -->\nold\n<!-- claims: end -->\n\nBehind.\n")
    assert script.main(["--file", str(copy), "--check"]) == 1
    assert script.main(["--file", str(copy)]) == 0
    assert script.main(["--file", str(copy), "--check"]) == 0
    text = copy.read_text()
    assert text.startswith("Before.\n\n") and text.endswith("\n\nBehind.\n")
    assert "| test accuracy 98.24 ± 0.09 % (n = 3) | 12 s on a 2-core CPU |" in text
    both = "test macro f1 0.729 ± 0.027, test accuracy 75.2 ± 2.8 % (n = 3, at the best step)"
    assert f"| the same, with `start=none` | {both} |" in text
    assert script.main(["--check"]) == 0, capsys.readouterr().out


def test_claims_are_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # such a network reaches far more than chance, 0.1, and never all
    file, folder = digits(tmp_path / "mine.py", 0.8, 0.15, 3), tmp_path / "runs"
    more = ["9.0, 0.1, n=3", '-9.0, 0.1, n=3, at="best"']
    claims = "".join(f'    Claim("test/accuracy", {text}, device="CPU"),\n' for text in more)
    file.write_text(file.read_text().replace("\n)\n", f"\n{claims})\n", 1))
    words = [str(file), "--workdir", str(folder), "--seeds", "2"]
    assert reproduce.main([*words, "--dry-run"]) == 0
    assert str(folder / "seed=1") in capsys.readouterr().out and not folder.exists()
    assert reproduce.main(words) == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith("confirmed: test/accuracy ")
    assert "claimed 80 ± 15 % (n = 3)" in lines[0]
    assert lines[1].startswith("refuted: ") and lines[2].startswith("better than claimed: ")
    for seed in range(2):
        record = json.loads((folder / f"seed={seed}" / "run.json").read_text())
        assert record["resolved"]["seed"] == seed
    with pytest.raises(UserError, match=r"seed=0 holds a run already: go on with --resume"):
        reproduce.main(words)
    digits(file, 0.8, 0.15, 3)
    assert reproduce.main([*words, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[0]


def test_a_run_that_starts_from_anothers_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits(tmp_path / "first.py", 0.8, 0.15, 3)
    more = 'tolerance=0.5, after="start=first.py", words=("lr=0.01",)'
    file, folder = digits(tmp_path / "second.py", 0.8, None, 1, more), tmp_path / "runs"
    assert reproduce.main([str(file), "--workdir", str(folder)]) == 0
    assert "confirmed: lr=0.01: test/accuracy" in capsys.readouterr().out
    record = json.loads((folder / "lr=0.01,seed=0" / "run.json").read_text())
    assert record["resolved"]["start_from"]["path"] == str(folder / "first,seed=0")


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ("CLAIMS = ()", "claims nothing"),
        ("", "has no CLAIMS"),
        ("CLAIMS = [1]", "expected a tuple of Claim"),
        ('CLAIMS = (Claim("test/acc", 1.0, 0.1, n=2, device=""),)', "did you mean test/accuracy?"),
        ('CLAIMS = (Claim("accuracy", 1.0, 0.1, n=2, device=""),)', "such as test/accuracy"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, claims: str, expected: str) -> None:
    file = digits(tmp_path / "mine.py", 0.8, 0.15, 3)
    text = file.read_text()
    old = text[text.index("CLAIMS = (") : text.index("\n)\n") + 3]
    file.write_text(text.replace(old, claims + "\n"))
    with pytest.raises(UserError) as error:
        reproduce.main([str(file)])
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words", [["--seeds", "0"], ["--alpha", "0"], ["--dry-run", "--resume"], ["--seed", "3"]]
)
def test_mistakes_on_the_command_line(words: list[str]) -> None:
    with pytest.raises(UserError):
        reproduce.main([str(FILES[0]), *words])


def test_experiment_files_stay_light() -> None:
    """`jaxeco.claims` wakes up no more than `jaxeco.experiment` does."""
    code = "import jaxeco.claims, sys; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "flax", "scipy"} & set(shown.stdout.split())
