"""Which runs a command means, and where they go."""

import csv
import json
from pathlib import Path

import pytest
from test_population import SOURCE

from jaxeco import config, run
from jaxeco.errors import UserError
from jaxeco.grid import members, show


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "many.py"
    path.write_text(SOURCE)
    return path


def test_every_combination_and_each_with_so_many_seeds(file: Path) -> None:
    axes = [config.Axis.parse("lr=0.1,0.2"), config.Axis.parse("width=4;8")]
    found = members(file, ["seed=5", "decay=0"], axes, 2)
    assert [str(member.folder) for member in found] == [
        f"lr={lr},width={width},seed={seed}"
        for lr in ("0.1", "0.2")
        for width in (4, 8)
        for seed in (5, 6)
    ]
    last = found[-1]
    assert last.loaded.assignments == ("decay=0", "lr=0.2", "width=8", "seed=6")
    assert (last.ex.seed, last.ex.model.widths, last.ex.optimizer.lr.peak) == (6, (8,), 0.2)


def leave(folder: Path, seed: int, accuracy: float, ended: str = "complete") -> None:
    folder.mkdir(parents=True)
    resolved = {"name": "many", "seed": seed, "patience": None, "best": None}
    record = {"resolved": resolved, "assignments": [f"seed={seed}"], "sessions": [{}]}
    (folder / "run.json").write_text(json.dumps(record))
    line = {"step": 9, "split": "test", "time": 1.0, "loss": 0.5, "accuracy": accuracy}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    result = {"step": 9, "of": 9, "ended": ended}
    (folder / "result.json").write_text(json.dumps(result))


def test_the_table_is_of_all_runs_in_the_folder_but_those_that_diverged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, accuracy in ((0, 0.5), (2, 0.6), (10, 0.7)):
        leave(tmp_path / f"seed={seed}", seed, accuracy)
    leave(tmp_path / "seed=11", 11, 0.1, "diverged")
    show(tmp_path)
    shown = capsys.readouterr().out
    assert "4 runs, mean ± sd, without the 1 that diverged" in shown
    assert shown.splitlines()[4].split() == ["many", "3", "0.5", "±", "0", "0.60", "±", "0.10"]
    rows = list(csv.reader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["run", "seed=0", "seed=2", "seed=10", "seed=11"]
    assert rows[4] == ["seed=11", "11", "9", "diverged", "0.5", "0.1"]


def test_one_run_and_many_do_not_go_on_with_each_other(file: Path) -> None:
    leave(Path("runs/many/seed=0"), 0, 0.5)
    leave(Path("single"), 0, 0.5)
    with pytest.raises(UserError, match="holds many runs that were started as one"):
        run.main([str(file), "--resume"])
    with pytest.raises(UserError, match="single holds a single run: leave out --seeds"):
        run.main([str(file), "--resume", "--seeds", "2", "--workdir", "single"])
    assert not Path("runs/many/run.json").exists() and not Path("single/seed=0").exists()
