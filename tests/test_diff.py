"""What differs between runs: folders written by hand, and runs of an experiment."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxeco import diff, run
from jaxeco.errors import UserError

ROOT = Path(__file__).parent.parent
SOURCE = "def experiment(lr: float = 0.1):\n    return ...\n"
RESOLVED = {
    "type": "Experiment",
    "name": "net",
    "seed": 0,
    "train": {"type": "Digits", "split": "train"},
    "model": {"type": "MLP", "widths": [4]},
    "guard": None,
    "optimizer": {"type": "SGD", "lr": 0.1},
    "log_every": {"type": "Steps", "count": 10},
}
SESSION = {
    "started": "2026-01-01T00:00:00+0000",
    "command": ["python", "-m", "jaxeco.run", "net.py"],
    "python": "3.11.7",
    "platform": "Linux",
    "xla_flags": "",
    "git": "0123abc",
    "versions": {"jax": "0.10.2"},
    "code": {"experiment": "aa", "jaxeco": "bb"},
    "first_step": 0,
    "devices": ["cpu:0 cpu"],
    "data": {"train": {"name": "digits", "examples": 9, "fingerprint": "f0"}},
}


def changed(tree: Any, path: str, value: Any) -> Any:
    """A copy of a tree of dicts in which the entry at a dotted path is another."""
    head, _, rest = path.partition(".")
    return {**tree, head: changed(tree[head], rest, value) if rest else value}


def line(step: int, split: str = "test", **values: Any) -> dict[str, Any]:
    return {"step": step, "split": split, "time": 0.1 * step, **values}


LINES = [line(step, "train", loss=1 / step, examples_per_second=9.0) for step in (10, 20, 30, 40)]


def make(
    folder: Path,
    lines: Sequence[dict[str, Any]] = LINES,
    source: str = SOURCE,
    words: Sequence[str] = (),
    sessions: Sequence[dict[str, Any]] = (SESSION,),
    **resolved: Any,
) -> Path:
    """A run's folder; `resolved` are fields by dotted path, with __ for the dot."""
    fields: Any = RESOLVED
    for path, value in resolved.items():
        fields = changed(fields, path.replace("__", "."), value)
    folder.mkdir(parents=True)
    record = {"file": "net.py", "assignments": words, "resolved": fields, "sessions": sessions}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "experiment.py").write_text(source)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def said(capsys: pytest.CaptureFixture[str], status: int, *words: Any) -> str:
    assert diff.main([*map(str, words)]) == status
    return capsys.readouterr().out


def found(capsys: pytest.CaptureFixture[str], status: int, *words: Any) -> Any:
    text = said(capsys, status, *words, "--json")
    return json.loads(text, parse_constant=pytest.fail)


def test_a_run_and_its_repetition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # pace is no result: the second was twice as fast
    lines = [line | {"time": line["time"] / 2, "examples_per_second": 18.0} for line in LINES]
    pair = make(tmp_path / "a"), make(tmp_path / "b", lines)
    text = said(capsys, 0, *pair)
    assert "train/loss  the same to the bit (4 lines)\n" in text
    assert text.splitlines()[-1] == "they agree to the bit"
    assert all(
        f"\n{section}: the same\n" in text for section in diff.facts(diff.runs.read(pair[0]))
    )
    assert "replay" not in text and "second" not in text
    assert said(capsys, 0, *pair) == text


def test_a_run_that_is_not_as_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", LINES[:2])
    for pair in ((a, b), (b, a)):
        last = said(capsys, 0, *pair).splitlines()[-1]
        assert last == "they agree to the bit, as far as both have come: step 20"
    (b / "diverged").mkdir()
    assert said(capsys, 1, a, b).splitlines()[-1] == "they differ: a unfinished, b diverged"


@pytest.mark.parametrize(
    ("section", "name", "status", "change"),
    [
        (diff.SOURCE, "experiment.py", 0, {"source": SOURCE + "# of the digits\n"}),
        (diff.WORDS, "name", 0, {"words": ["name=net"]}),
        (diff.FIELDS, "optimizer.lr", 1, {"optimizer__lr": 0.2}),
        (diff.FIELDS, "seed", 1, {"seed": 1}),
        (diff.FIELDS, "model.widths", 1, {"model__widths": [4, 4]}),
        (diff.FREE, "log_every.count", 0, {"log_every__count": 20}),
        (diff.FREE, "name", 0, {"name": "other"}),
        (diff.DATA, "train.fingerprint", 1, {"data.train.fingerprint": "f1"}),
        (diff.DATA, "train.name", 0, {"data.train.name": "the same, renamed"}),
        ("versions", "jax", 0, {"versions.jax": "0.12"}),
        ("versions", "python", 0, {"python": "3.12"}),
        ("code", "jaxeco", 0, {"code.jaxeco": "cc"}),
        ("git", "commit", 0, {"git": None}),
        ("machine", "devices", 0, {"devices": ["gpu:0 H200"]}),
        ("machine", "xla_flags", 0, {"xla_flags": "--xla_x=1"}),
    ],
)
def test_each_difference_is_told_in_its_section(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    section: str,
    name: str,
    status: int,
    change: dict[str, Any],
) -> None:
    path, value = next(iter(change.items()))
    if path.partition(".")[0] in SESSION:
        change = {"sessions": [changed(SESSION, path, value)]}
    pair = make(tmp_path / "a"), make(tmp_path / "b", **change)
    data = found(capsys, status, *pair)
    differing = {s: set(pairs) for s, pairs in data["differences"].items() if pairs}
    assert differing == {section: {name}}
    assert data["agree"] == (status == 0)
    text = said(capsys, status, *pair)
    assert f"\n{section}:\n" in text
    assert text.splitlines()[-1].startswith("they differ" if status else "they agree to the bit")


def test_none_is_as_good_as_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record does not know of fields that came after it."""
    pair = make(tmp_path / "a"), make(tmp_path / "b")
    record = json.loads((pair[1] / "run.json").read_text())
    del record["resolved"]["guard"]
    (pair[1] / "run.json").write_text(json.dumps(record))
    assert not found(capsys, 0, *pair)["differences"][diff.FIELDS]


def test_sources_are_of_the_latest_session(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = changed(SESSION, "code.experiment", "cc") | {"first_step": 20}
    a = make(tmp_path / "a", sessions=[SESSION, later, later])
    (a / "session-2").mkdir()
    (a / "session-2" / "experiment.py").write_text(SOURCE.replace("0.1", "0.3"))
    (a / "session-2" / "layers.py").write_text("WIDTH = 3\n")
    (a / "session-4").mkdir()  # of a run that was here before
    (a / "session-4" / "experiment.py").write_text("")
    b = make(tmp_path / "b", source=SOURCE.replace("0.1", "0.2"))
    text = said(capsys, 0, a, b)
    assert "\n-def experiment(lr: float = 0.3):\n+def experiment(lr: float = 0.2):\n" in text
    assert f"\n--- {a}/layers.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-WIDTH = 3\n" in text
    assert "in 3 sessions" in text and "from the steps  [0, 20, 20]" in text
    assert "\nwithin a, sessions differ in: experiment\n" in text


# Metrics


def parted(a: Sequence[float], b: Sequence[float], rtol: float) -> diff.Parting | None:
    return diff.parting([(10 * i, x, y) for i, (x, y) in enumerate(zip(a, b), 1)], rtol)


def test_the_first_step_at_which_a_metric_parts() -> None:
    a, b = [0.5, 0.45, 0.43126, 0.4], [0.5, 0.45, 0.43134, 0.41]
    at = parted(a, b, 1e-5)
    assert at == diff.Parting(step=30, after=20, a=0.43126, b=0.43134, entry="", before=2)
    assert f"{at}" == "step 30: 0.43126 and 0.43134"
    assert parted(a, b, 0.001) == diff.Parting(40, 30, 0.4, 0.41, "", 3)
    assert parted(a, b, 0.1) is None
    assert parted(a, a, 0.0) is None


def test_digits_as_needed() -> None:
    assert diff.Parting(1, 0, 0.43121, 0.43129, "", 0).values == "0.4312 and 0.4313"
    near = float(np.nextafter(0.1, 1))
    at = diff.Parting(1, 0, 0.1, near, "", 0)
    assert at.values == "0.10000000000000001 and 0.10000000000000002"
    assert diff.Parting(1, 0, 1.0, float("nan"), "", 0).values == "1 and nan"


@pytest.mark.parametrize(
    ("x", "y", "rtol", "same"),
    [
        (1.0, 1.0 + 1e-5, 1e-5, True),  # of the larger
        (1.0, 1.0 + 1.1e-5, 1e-5, False),
        (-1.0, -1.0 - 1.1e-5, 1e-5, False),
        (0.0, 1e-30, 1e-5, False),  # nothing is near 0 but 0
        (0.0, -0.0, 0.0, True),
        (np.nan, np.nan, 0.0, True),
        (np.nan, 1.0, 1e-5, False),
        (1e300, -1e300, 1e-5, False),
    ],
)
def test_what_is_alike(x: float, y: float, rtol: float, same: bool) -> None:
    assert bool(diff.alike(np.float64(x), np.float64(y), rtol)) is same
    assert bool(diff.alike(np.float64(y), np.float64(x), rtol)) is same


def test_entries_of_lists_and_their_shapes() -> None:
    ones = [[1.0, 1.0], [1.0, 1.0]]
    at = diff.parting([(5, ones, ones), (9, ones, [[1.0, 1.0], [2.0, 1.0]])], 1e-5)
    assert f"{at}" == "step 9: [1, 0] 1 and 2"
    at = diff.parting([(5, [1.0], [1.0, 2.0])], 1e-5)
    assert f"{at}" == "step 5: numbers of shape (1,) and numbers of shape (2,)"


def test_beyond_the_tolerance_and_in_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(*losses: float | None) -> list[dict[str, Any]]:
        return [line(10 * i, loss=loss, accuracy=0.5) for i, loss in enumerate(losses, 1)]

    a = make(tmp_path / "a", lines(2.0, 1.0, 0.5, None))
    b = make(tmp_path / "b", lines(2.0, 1.0 + 1e-7, 0.6, None))
    text = said(capsys, 1, a, b)
    bits = "bits part at step 20: 1 and 1.0000001 (equal to the bit before, 1 line)"
    assert f"test/loss      parts at step 30: 0.5 and 0.6; {bits}\n" in text
    assert "test/accuracy  the same to the bit (4 lines)" in text
    assert "they differ: test/loss parts at step 30: 0.5 and 0.6\n" in text
    commands = [f"  python -m jaxeco.replay {folder} 30" for folder in (a, b)]
    assert text.splitlines()[-3:] == ["in one of the steps 21 to 30; to take one anew:", *commands]
    text = said(capsys, 0, a, b, "--rtol", "0.2")
    assert f"test/loss      the same within 0.2 (4 lines); {bits}\n" in text
    assert "\nthey agree within 0.2; bits part at step 20\n" in text
    data = found(capsys, 1, a, b)["metrics"]["test/loss"]
    assert data["beyond"] == {
        "step": 30, "after": 20, "a": 0.5, "b": 0.6, "entry": "", "before": 2
    }  # fmt: skip
    assert data["exact"]["step"] == 20 and data["lines"] == 4


def test_lines_of_training_are_compared_over_the_same_steps_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs that are the same step by step, and log at other steps."""
    losses = 1 / np.arange(1, 61)

    def training(*steps: int) -> list[dict[str, Any]]:
        begun = zip([0, *steps], steps)
        return [line(end, "train", loss=float(losses[first:end].mean())) for first, end in begun]

    tests = [line(step, loss=float(losses[step - 1])) for step in (30, 60)]
    a = make(tmp_path / "a", [*training(10, 20, 30, 40, 50, 60), *tests])
    b = make(tmp_path / "b", [*training(20, 30, 60), *tests])
    text = said(capsys, 0, a, b)
    assert "train/loss  the same to the bit (1 line)" in text  # the steps 21 to 30
    assert "test/loss   the same to the bit (2 lines)" in text
    a_has, b_has = "a has 10, 20, 30, ..., 60", "b has 20, 30, 60"
    assert f"train: 1 line in common: {a_has}; {b_has}; a line is the mean of" in text
    later = make(tmp_path / "later", [line(30, loss=9.0), *tests[1:]])
    assert "parts at step 30: 0.03333 and 9 (the first line)\n" in said(capsys, 1, a, later)
    c = make(tmp_path / "c", training(20, 40, 60))
    text = said(capsys, 1, a, c)
    assert "metrics: none to compare\n  train: 0 lines in common" in text
    assert "only in a: test/loss\n" in text
    assert text.splitlines()[-1] == "they differ: no metric could be compared"


def test_a_run_that_stands_earlier_agrees_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make(tmp_path / "a"), make(tmp_path / "b", LINES[:2])
    text = said(capsys, 0, *pair)
    assert "40 steps in 1 session" in text and "20 steps in 1 session" in text
    assert "train: 2 lines in common: a has 10, 20, 30, 40; b has 10, 20" in text


# Populations


def population(folder: Path, rates: Sequence[float], **fields: Any) -> Path:
    for rate in rates:
        for seed in (0, 1):
            make(
                folder / f"lr={rate},seed={seed}",
                words=[f"lr={rate}", f"seed={seed}", *(f"{k}={v}" for k, v in fields.items())],
                optimizer__lr=rate,
                seed=seed,
                **fields,
            )
    return folder


def test_members_are_paired_by_setting_and_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = population(tmp_path / "a", [0.1, 0.3])
    b = population(tmp_path / "b", [0.3, 0.1])
    assert said(capsys, 0, a, b).splitlines() == [
        *(
            f"lr={rate} seed={seed}: they agree to the bit"
            for rate in (0.1, 0.3)
            for seed in (0, 1)
        ),
        "",
        "of 4 pairs none differ; 0 runs alone",
    ]
    with (b / "lr=0.3,seed=1" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(40, "train", loss=9.0)) + "\n")
    shown = said(capsys, 1, a, b).splitlines()
    assert shown[3] == "lr=0.3 seed=1: they differ: train/loss parts at step 40: 0.025 and 9"
    assert shown[-2] == "of 4 pairs 1 differ; 0 runs alone"
    assert shown[-1].endswith(f"jaxeco.diff {a}/lr=0.3,seed=1 {b}/lr=0.3,seed=1")
    c = population(tmp_path / "c", [0.1])
    assert said(capsys, 1, a, c).splitlines()[2:] == [
        *(f"only in a: {a}/lr=0.3,seed={seed}" for seed in (0, 1)),
        "",
        "of 2 pairs none differ; 2 runs alone",
    ]
    data = found(capsys, 1, c, a)
    assert data["only"] == {"a": [], "b": [f"{a}/lr=0.3,seed={seed}" for seed in (0, 1)]}
    assert [pair["agree"] for pair in data["pairs"].values()] == [True, True]


def test_populations_that_differ_throughout_are_paired_by_their_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = population(tmp_path / "a", [0.1, 0.3])
    b = population(tmp_path / "b", [0.1, 0.3], batch=32)
    assert said(capsys, 1, a, b).splitlines()[:4] == [
        f"lr={rate} seed={seed}: they differ: fields (batch)"
        for rate in (0.1, 0.3)
        for seed in (0, 1)
    ]


def test_repetitions_are_paired_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in "ab":
        for number in (1, 2):
            make(tmp_path / side / f"net-{number}", LINES[:number])
    data = found(capsys, 0, tmp_path / "a", tmp_path / "b")
    assert [(Path(p["a"]).name, Path(p["b"]).name) for p in data["pairs"].values()] == [
        ("net-1", "net-1"),
        ("net-2", "net-2"),
    ]


# The command


def test_mistakes(tmp_path: Path) -> None:
    a = str(make(tmp_path / "a"))
    for words, message in (
        ([a], "the following arguments are required: B"),
        ([a, f"{tmp_path}/none"], "no such folder"),
        ([a, str(ROOT / "docs")], "holds no run"),
        ([a, a, "--rtol", "-1"], "expected 0 or more"),
        ([a, a, "--rtol", "nan"], "expected 0 or more"),
    ):
        with pytest.raises(UserError, match=message):
            diff.main(words)


def test_its_status_and_that_it_leaves_jax_asleep(tmp_path: Path) -> None:
    pair = str(make(tmp_path / "a")), str(make(tmp_path / "b", seed=1))
    code = (
        "import sys; from jaxeco import diff\n"
        "status = diff.main(sys.argv[1:]); assert 'jax' not in sys.modules; sys.exit(status)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    asleep = subprocess.run([sys.executable, "-c", code, *pair], env=env, capture_output=True)
    assert (asleep.returncode, asleep.stderr) == (1, b"")
    command = [sys.executable, "-m", "jaxeco.diff", pair[0]]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: the following arguments")


def test_an_interrupted_run_beside_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / "experiments/digits_mlp.py"), "epochs=1", "steps_per_call=1"]
    assert run.main([*words, "log_every.count=5", "--workdir", "a"]) == 0
    stopped = [*words, "log_every.count=4", "--workdir", "b"]
    assert run.main([*stopped, "--steps", "8"]) == 0
    assert run.main([*stopped, "--resume"]) == 0
    capsys.readouterr()
    text = said(capsys, 0, "a", "b")
    assert "fields that change the result: the same" in text
    assert "\nsource: the same\n" in text and "\ndata: the same\n" in text
    assert "log_every.count  5  4" in text and "from the steps  [0]  [0, 8]" in text
    assert "test/confusion_matrix  the same to the bit (1 line)" in text
    assert text.splitlines()[-1] == "they agree to the bit"
