"""Comparing runs whose folders are written by hand: what is put together, and what is said."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats as theirs

from jaxeco import compare, metrics, ranking
from jaxeco.errors import UserError

METRIC = "test/accuracy"


def make_run(
    folder: Path,
    value: float | None,
    seed: int = 0,
    lr: float = 0.1,
    *,
    metric: str = METRIC,
    best: str | None = METRIC,
    step: int = 100,
    of: int = 100,
    fingerprint: str = "f",
    patience: int | None = None,
    history: Sequence[float] = (),
    **session: Any,
) -> None:
    """A run that has measured `history` and then `value` of `metric`."""
    split, _, name = metric.partition("/")
    resolved = {
        "name": "mine", "seed": seed, "best": best, "patience": patience, "evals": {split: {}},
        "optimizer": {"type": "SGD", "lr": lr},
    }  # fmt: skip
    data = {split: {"fingerprint": fingerprint}}
    record = {
        "assignments": [f"lr={lr}", f"seed={seed}"],
        "resolved": resolved,
        "sessions": [{"data": data, **session}],
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    values = [*history, value]
    lines = [
        {"step": step - len(values) + 1 + i, "split": split, "time": 1.0, "loss": 0.5, name: v}
        for i, v in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    top = max((v for v in values if v is not None), default=None)
    result = {"step": step, "of": of, "best": {"step": step, metric: top}}
    (folder / "result.json").write_text(json.dumps(result))


def population(folder: Path, values: Sequence[float | None], **fields: Any) -> Path:
    for seed, value in enumerate(values):
        make_run(folder / f"seed={seed}", value, seed, **fields)
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert compare.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> Mapping[str, Any]:
    return json.loads(said(capsys, "--json", *words))


def test_a_difference_is_one_clear_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = [0.900, 0.910, 0.920], [0.910, 0.922, 0.934]
    a, b = population(tmp_path / "a", first), population(tmp_path / "b", second, lr=0.2)
    text = said(capsys, a, b)
    p = theirs.ttest_rel(second, first).pvalue
    # differences 1.0, 1.2, 1.4 points: mean 1.2, sd 0.2, t = 4.303 of 2 degrees of freedom
    assert (
        "b is better than a by 1.20 points (95 % interval 0.70 to 1.70), "
        f"p = {p:.2g}, paired by 3 seeds, d_z = 6" in text
    )
    assert "each run's last value; more is better" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("a ", "b "))]
    assert rows[0][:5] == ["b", "3", "92.2", "±", "1.2"]  # the best first
    assert rows[1][:5] == ["a", "3", "91.0", "±", "1.0"]


def test_noise_has_no_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = population(tmp_path / "a", [0.90, 0.92, 0.91, 0.93, 0.89])
    b = population(tmp_path / "b", [0.92, 0.92, 0.93, 0.92, 0.895], lr=0.2)
    text = said(capsys, a, b, "--unpaired")
    assert "better than" not in text
    assert "b and a are not distinguishable at n = 5: b is ahead by 0.7 points" in text
    more = re.search(r"Welch's t, g = 0.\d+; about (\d+) more seeds each would settle", text)
    assert more is not None and 30 < int(more[1]) < 100
    near = population(tmp_path / "c", [0.90, 0.92, 0.91, 0.93, 0.8905], lr=0.3)
    text = said(capsys, a, near, "--unpaired")
    assert "no use: to settle it takes more than 100 seeds each" in text
    single = [tmp_path / "a" / "seed=0", tmp_path / "b" / "seed=1"]
    assert "one run of each setting says nothing of chance" in said(capsys, *single)


def test_pairs_need_the_same_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = population(tmp_path / "a", [0.90, 0.91, 0.92])
    make_run(tmp_path / "b" / "0", 0.96, seed=0, lr=0.2)
    make_run(tmp_path / "b" / "1", 0.95, seed=7, lr=0.2)
    (found,) = as_json(capsys, a, tmp_path / "b")["comparisons"]
    assert found["test"] == "Welch's t" and not found["paired"]
    assert found["n"] == [3, 2]  # of the one behind, and the one ahead
    make_run(tmp_path / "c", 0.99, seed=7, lr=0.3)
    text = said(capsys, a, tmp_path / "c")
    assert "one run against the spread of the others" in text


@pytest.mark.parametrize("recorded", [True, False])
def test_of_a_loss_less_is_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recorded: bool
) -> None:
    metric = "valid/brier" if recorded else "valid/perplexity"
    fields: dict[str, Any] = {"metric": metric, "best": metric}
    if recorded:
        fields["lower_is_better"] = ["loss", "brier"]
    a = population(tmp_path / "a", [0.50, 0.51, 0.52], **fields)
    b = population(tmp_path / "b", [0.40, 0.42, 0.43], lr=0.2, **fields)
    text = said(capsys, a, b)
    assert "less is better" in text
    # differences 0.10, 0.09, 0.09: mean 0.0933, sd 0.00577, ± 4.303 · sd / √3
    assert "b is better than a by 0.093 (95 % interval 0.079 to 0.108)" in text


def test_whether_less_is_better_is_asked_of_runs_that_have_measured_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brier: dict[str, Any] = {"metric": "test/brier", "best": "test/brier"}
    other = population(tmp_path / "a", [0.9], lower_is_better=["loss"])  # knows of no brier
    less = population(tmp_path / "b", [0.4], **brier, lower_is_better=["loss", "brier"])
    assert "less is better" in said(capsys, other, less, "--metric", "test/brier")
    more = population(tmp_path / "c", [0.4], **brier, lower_is_better=["loss"])
    with pytest.raises(UserError, match="less is better in some of these runs"):
        compare.main([str(less), str(more)])


def test_runs_of_one_setting_by_different_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        make_run(tmp_path / "a" / f"{seed}", 0.9, seed, code={"experiment": f"{seed // 2}"})
    assert "warning: a: its runs differ in code.experiment" in said(
        capsys, tmp_path / "a", population(tmp_path / "b", [0.8], code={"experiment": "0"})
    )


def test_names_that_are_known_to_be_better_when_less() -> None:
    """Of runs that have not recorded it. BitsPerByte needs a tokenizer to be made."""
    classes = [
        c
        for module in (metrics, ranking)
        for c in vars(module).values()
        if isinstance(c, type) and getattr(c, "lower_is_better", False)
    ]
    assert {c.__name__ for c in classes} == {"Perplexity", "BitsPerByte"}


def test_permutations_of_few_runs_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = population(tmp_path / "a", [0.1, 0.2, 0.3]), population(tmp_path / "b", [0.7, 0.8, 0.9])
    text = said(capsys, a, b, "--unpaired", "--test", "permutation")
    assert "(95 % interval -inf to inf), p = 0.1, permutation test" in text
    assert "3 against 3 runs cannot show it by a permutation test, whose p is 0.1 at least" in text
    assert "about 1 more seed each" in text  # 2 / 70 of four
    text = said(capsys, a, b, "--test", "permutation")
    assert "3 pairs of runs cannot show it by a permutation test, whose p is 0.25 at least" in text


def test_the_settings_of_one_folder_are_compared_and_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {0.1: [0.50, 0.52, 0.53], 0.2: [0.60, 0.61, 0.63], 0.3: [0.61, 0.60, 0.63]}
    for lr, found in values.items():
        for seed, value in enumerate(found):
            make_run(tmp_path / f"lr={lr},seed={seed}", value, seed, lr)
    shown = as_json(capsys, tmp_path)
    assert [s["label"] for s in shown["settings"]][-1] == "mine lr=0.1"
    assert len(shown["comparisons"]) == 3
    assert [s["n"] for s in shown["settings"]] == [3, 3, 3]
    least = min(c["p"] for c in shown["comparisons"])
    assert min(c["p_corrected"] for c in shown["comparisons"]) == pytest.approx(3 * least)
    assert "corrected for 3 comparisons" in said(capsys, tmp_path)


def test_of_many_settings_those_are_shown_that_have_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(6):
        for seed in range(2):
            make_run(tmp_path / f"{i}-{seed}", 0.1 * i + 0.01 * seed, seed, lr=i)
    text = said(capsys, tmp_path)
    assert text.count("paired by 2 seeds") == 5
    assert "corrected for all 15 pairs" in text


def test_what_makes_runs_hard_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = population(tmp_path / "a", [0.9, 0.91, None, 0.92, 0.93], patience=2)
    (a / "seed=3" / "diverged").mkdir()
    result = json.loads((a / "seed=3" / "result.json").read_text())
    (a / "seed=3" / "result.json").write_text(json.dumps({**result, "step": 50}))
    make_run(a / "again", 0.9, seed=0, patience=2)
    make_run(a / "early", 0.8, seed=9, step=40, patience=2)
    make_run(a / "patient", 0.8, seed=10, step=40, patience=2, history=(0.9, 0.7))
    b = population(tmp_path / "b", [0.9, 0.91], lr=0.2, fingerprint="g", of=90)
    text = said(capsys, a, b)
    for part in (
        "a: 1 of 8 runs, a/seed=3, diverged and is left out",
        f"a: 1 of 8 runs, a/seed=2, has no finite {METRIC} and is left out",
        "has the seed of one that counts already",
        "a: 1 of 8 runs, a/early, is unfinished",
        "the data of test is not the same in all",
        "the numbers of steps differ: a 100; b 90",
    ):
        assert part in text.replace(f"{tmp_path}/", ""), text
    shown = as_json(capsys, a, b)
    assert len(shown["warnings"]) == 6
    assert sorted(s["n"] for s in shown["settings"]) == [2, 5]


def test_a_run_that_a_sweep_has_stopped_is_unfinished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    population(tmp_path / "a", [0.9, 0.91])
    make_run(tmp_path / "a" / "stopped", 0.7, seed=2, step=40)
    path = tmp_path / "a" / "stopped" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ended": "stopped"}))
    assert f"1 of 3 runs, {path.parent}, is unfinished" in said(capsys, tmp_path / "a")


def test_nothing_is_said_of_runs_that_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = population(tmp_path / "a", [0.9, 0.91])
    b = population(tmp_path / "b", [0.8, 0.93])
    assert "warning" not in said(capsys, a, b)
    assert "nothing to compare it with" in said(capsys, a)


def test_json_has_no_infinity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = population(tmp_path / "a", [0.9]), population(tmp_path / "b", [0.8])
    (found,) = as_json(capsys, a, b)["comparisons"]
    assert found["low"] is None and found["high"] is None and found["p"] == 1
    assert found["distinguishable"] is False


def test_at_the_best_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = population(tmp_path / "a", [0.5, 0.6], history=(0.9,))
    b = population(tmp_path / "b", [0.7, 0.8])
    assert [s["label"] for s in as_json(capsys, a, b)["settings"]] == ["b", "a"]
    best = as_json(capsys, a, b, "--at", "best")
    assert [s["label"] for s in best["settings"]] == ["a", "b"]
    assert best["settings"][0]["values"] == [0.9, 0.9]


def test_the_metric_is_what_the_experiments_call_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = population(tmp_path / "a", [0.5]), population(tmp_path / "b", [0.7], best=None)
    assert as_json(capsys, b)["metric"] == METRIC  # the first behind the loss
    assert as_json(capsys, a)["metric"] == METRIC
    c = population(tmp_path / "c", [0.5], best="test/loss")
    with pytest.raises(UserError, match="best by test/accuracy, test/loss: choose one"):
        compare.main([str(a), str(c)])
    assert "test/loss" in said(capsys, a, c, "--metric", "test/loss")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "--metric", "test/acuracy"], "did you mean test/accuracy?"),
        (["nowhere"], "no such folder"),
        (["empty"], "holds no run"),
        (["a", "a/seed=0"], "is in two of the folders"),
        (["a", "--alpha", "2"], "--alpha 2.0"),
        (["none"], "has a finite test/accuracy"),
    ],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    population(tmp_path / "a", [0.5, 0.6])
    population(tmp_path / "none", [None])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        compare.main(words)
    assert "\n" not in str(error.value) and error.value.status == 2


def test_it_starts_without_jax(tmp_path: Path) -> None:
    a, b = population(tmp_path / "a", [0.5, 0.6]), population(tmp_path / "b", [0.7, 0.6])
    code = (
        "import sys; from jaxeco import compare; "
        f"compare.main([{str(a)!r}, {str(b)!r}]); print(sorted(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"'([^']*)'", shown.stdout.splitlines()[-1]))
    assert "jaxeco.stats" in loaded
    assert not {"jax", "flax", "scipy.stats", "matplotlib"} & loaded
