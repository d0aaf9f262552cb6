"""Sweeps: what is searched, who survives, files with other defaults, workers that share or die."""

import csv
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxeco import config, run
from jaxeco.config import Loaded
from jaxeco.description import describe
from jaxeco.errors import UserError
from jaxeco.sweeps import rewrite, space
from jaxeco.sweeps.space import Choice, Range

optuna = pytest.importorskip("optuna")

from jaxeco import sweep  # noqa: E402
from jaxeco.sweeps import study  # noqa: E402

TINY = '''
"""A line through two clouds."""

import os
import time

import numpy as np

from jaxeco import data, losses, metrics, models, optim
from jaxeco.experiment import Experiment, Steps

rng = np.random.default_rng(0)
Y = rng.integers(0, 2, 96).astype(np.int32)
X = (rng.normal(size=(96, 4)) + 2 * Y[:, None]).astype(np.float32)
calls = []


class Slow(metrics.Accuracy):
    """Hangs from its third call on, where a file says so; not for ever."""

    def result(self, sums):
        calls.append(1)
        end = time.monotonic() + 500
        held = os.environ.get("HOLD", "/nowhere")
        while len(calls) > 2 and os.path.exists(held) and time.monotonic() < end:
            time.sleep(0.1)
        return super().result(sums)


def experiment(
    lr: float = 0.1,  # of SGD
    *,
    widths: tuple[int, ...] = (),  # hidden
    steps: int = 6,
) -> Experiment:
    return Experiment(
        name="tiny",
        train=data.Arrays(X[:64], Y[:64]),
        evals={"valid": data.Arrays(X[64:], Y[64:])},
        model=models.MLP(widths=widths, num_classes=2),
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(Slow(),),
        optimizer=optim.SGD(lr=lr),
        batch=8,
        length=Steps(steps),
        eval_batch=32,
        eval_every=Steps(2),
        save_every=Steps(2),
    )
'''


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


# The space


def test_ranges_are_read_and_become_words() -> None:
    lr, dropout, layers, width, widths = space.parse(
        ["lr=log(1e-4,1)", "p=uniform(0, 0.5)", "layers=int(1,6)", "width=logint(16,1024)",
         "model.widths=choice((64,32),(128,))"]
    )  # fmt: skip
    assert lr == Range("lr", 1e-4, 1, log=True)
    assert widths == Choice("model.widths", ("(64,32)", "(128,)"))
    # a third of the way over four decades, the middle, and the ends
    assert lr.at(0.25) == pytest.approx(1e-3) and lr.at(0) == pytest.approx(1e-4)
    assert dropout.at(0.5) == 0.25
    assert [layers.at(u / 6) for u in range(6)] == [1, 2, 3, 4, 5, 6]
    assert layers.at(0.999999) == 6 and width.at(0) == 16 and width.at(0.999999) == 1024
    assert layers.word(3) == "layers=3" and widths.word(widths.at(0.7)) == "model.widths=(128,)"
    value = lr.at(0.3)
    assert float(lr.word(value).removeprefix("lr=")) == value  # to the bit


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("lr", "expected a name and a range"),
        ("epochs=3", "stand before --space"),
        ("lr=lag(1,2)", "did you mean log?"),
        ("lr=log(0,1)", "above 0"),
        ("lr=uniform(1,0)", "lower one first"),
        ("lr=uniform(1)", "expected two numbers"),
        ("lr=log(a,b)", "expected two numbers"),
        ("n=int(1,2.5)", "whole numbers"),
        ("n=choice(1)", "two options or more"),
        ("n=choice(1,1)", "given twice"),
    ],
)
def test_a_range_that_is_none(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        space.parse([word])


def test_values_that_do_not_fit_are_refused_at_once(tiny: Path) -> None:
    loaded = config.load(tiny, ["steps=4"])
    for word, says in (
        ("lrr=log(1e-3,1)", "did you mean lr"),
        ("optimizer.weight_dcay=log(1e-3,1)", "did you mean weight_decay"),
        ("widths=uniform(0,1)", "expected tuple of int"),
        ("batch=uniform(8,16)", "expected int"),
        ("optimizer.l1=uniform(-1,1)", "at least 0"),
        ("steps=int(1,9)", "both given and in --space"),
        ("seed=int(0,9)", "see --seeds"),
    ):
        with pytest.raises(UserError, match=says):
            space.check(loaded, space.parse([word]))
    space.check(loaded, space.parse(["lr=log(1e-3,1)", "batch=int(8,16)", "optimizer.l2=log(1,2)"]))


def test_a_grid_has_all_points() -> None:
    points = space.grid(space.parse(["a=choice(x,y)", "n=int(1,3)"]))
    assert len(points) == 6 and points[1] == {"a": "x", "n": 2}
    with pytest.raises(UserError, match="lr has no end of values"):
        space.grid(space.parse(["lr=uniform(0,1)"]))


# Pruning


def test_who_survives_a_rung() -> None:
    # of 7, the best 7 // 3 = 2; of 2, the best one; equals live and die together
    assert [study.survives(v, [1, 2, 3, 4, 5, 6, 7]) for v in (5, 6, 7)] == [False, True, True]
    assert [study.survives(v, [1.0, 2.0]) for v in (1, 2)] == [False, True]
    assert study.survives(1, [1]) and study.survives(3, [3, 3, 1])


def test_brackets_of_hyperband() -> None:
    # η = 3 and 9 evaluations, s_max = 2: ceil(3/3·9), ceil(3/2·3), ceil(3/1·1)
    assert study.bracket_sizes(9) == [9, 5, 3]
    assert study.bracket_sizes(2) == [1]
    found = [study.bracket_of(i, [2, 1]) for i in range(6)]
    assert found == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("how", ["random", "qmc"])
def test_points_fill_the_space(how: str) -> None:
    dimensions = space.parse(["x=uniform(0,1)", "c=choice(a,b)"])
    point = study.points(how, dimensions)
    points = [point(i) for i in range(32)]
    assert points == [point(i) for i in range(32)]  # of the number alone
    quarters = [int(4 * float(p["x"])) for p in points]
    assert all(quarters.count(q) > 2 for q in range(4))
    if how == "qmc":  # of 2^k points as many in each half of each axis
        assert [p["c"] for p in points].count("a") == 16


# Files with other defaults


def rewritten(path: Path, *words: str) -> tuple[str, Loaded]:
    """The text of the file with these defaults, and what it loads as."""
    text = rewrite.with_defaults(config.load(path, words), "Found.")
    best = path.with_name("best.py")
    best.write_text(text)
    return text, config.load(best)


def test_defaults_are_put_in_place(tiny: Path) -> None:
    words = ("lr=0.30000000000000004", "widths=8,4")
    text, best = rewritten(tiny, *words)
    assert describe(best.experiment) == describe(config.load(tiny, words).experiment)
    assert "lr: float = 0.30000000000000004,  # of SGD\n" in text  # the comment stays
    assert "widths: tuple[int, ...] = (8, 4),  # hidden\n" in text
    assert text.splitlines()[1:5] == ['"""Found.', "", 'A line through two clouds."""', ""]
    changed = [a for a, b in zip(TINY.splitlines(), text.splitlines()[2:]) if a != b]
    assert len(changed) < 6  # all else is as it was


def test_fields_are_set_by_a_wrapper(tiny: Path) -> None:
    words = ("optimizer.l2=0.5", "lr=0.2", "batch=16")
    _, best = rewritten(tiny, *words)
    assert describe(best.experiment) == describe(config.load(tiny, words).experiment)
    # arguments and fields can still be written
    again = config.load(best.path, ["lr=0.7", "optimizer.l2=0.1"]).experiment
    assert (again.optimizer.lr, again.optimizer.l2, again.batch) == (0.7, 0.1, 16)  # type: ignore[attr-defined]
    assert "of SGD" in config.help_text(best.path)


@pytest.mark.parametrize(
    "source",
    [
        "from tiny import experiment\n",
        "'One line, \\'quoted\\'.'\nimport tiny\n\ndef experiment(lr: float, n=1): # ü\n"
        "    return tiny.experiment(lr=lr)\n",
        "#!/usr/bin/env python\nimport tiny\nCLAIMS = (\n    1,\n)\n\n"
        "def experiment(ü='ü', lr: float = (1.0)): return tiny.experiment(lr)\n",
    ],
)
def test_other_shapes_of_files(tiny: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tiny.parent)  # other tests have files of that name
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    path = tiny.with_name("other.py")
    path.write_text(source)
    text, best = rewritten(path, "lr=0.25")
    assert best.experiment.optimizer.lr == 0.25  # type: ignore[attr-defined]
    assert "CLAIMS" not in text and text.count("Found.") == 1
    assert (config.ast.get_docstring(config.ast.parse(text)) or "").startswith("Found.")


# Sweeps


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_to_its_end(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.parent / "sweep"
    words = [str(tiny), "steps=6", "--space", "lr=choice(0.3,0.01,1e-9,1e38)", "batch=choice(8,96)"]
    words += ["--metric", "valid/loss", "--workdir", str(folder), "--seeds", "2"]
    assert sweep.main([*words, "--sampler", "grid", "--pruner", "halving"]) == 0
    shown = capsys.readouterr().out
    rows = table(folder)
    assert len(rows) == 8 and len({(r["lr"], r["batch"]) for r in rows}) == 8
    by = {(r["lr"], r["batch"]): r for r in rows}
    # a batch above the 64 examples is refused, one by one; a run that diverges fails
    assert all("more than the 64 examples" in by[lr, "96"]["why"] for lr in ("0.3", "1e-9"))
    assert by["1e38", "8"]["state"] == "failed" and "valid/loss" in shown
    # of the three that are measured once, one goes on: the one that learns
    assert by["0.3", "8"]["state"] == "complete" and by["0.3", "8"]["seeds"] == "2"
    assert by["1e-9", "8"]["state"] == "pruned"
    assert "best: trial" in shown and "lr=0.3 batch=8" in shown
    for picture in ("history", "slices", "parallel"):
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    # the members are ordinary runs, and the value is the mean over them
    losses = [
        json.loads((folder / f"{by['0.3', '8']['folder']},seed={s}" / "result.json").read_text())
        for s in (0, 1)
    ]
    mean = sum(r["valid"]["loss"] for r in losses) / 2
    assert float(by["0.3", "8"]["valid/loss"]) == pytest.approx(mean, rel=1e-12)
    # the best runs
    assert run.main([str(folder / "best.py"), "--dry-run"]) == 0
    dry = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if line)
    assert (dry["optimizer.lr"], dry["batch"], dry["length.count"]) == ("0.3", "8", "6")
    same = [config.load(folder / "best.py"), config.load(tiny, ["lr=0.3", "batch=8"])]
    assert describe(same[0].experiment) == describe(same[1].experiment)
    # again: nothing is left to do; another search is refused
    assert sweep.main([*words, "--sampler", "grid", "--pruner", "halving"]) == 0
    assert table(folder) == rows
    with pytest.raises(UserError, match="differs in --seeds"):
        sweep.main([*words[:-1], "3"])


def test_what_is_refused_before_anything_trains(tiny: Path) -> None:
    words = [str(tiny), "--space", "lr=log(1e-3,1)", "--workdir", str(tiny.parent / "sweep")]
    for more, says in (
        (["--metric", "valid/acuracy"], "did you mean valid/accuracy"),
        ([], "has no `best`"),
        (["--metric", "valid/loss", "--trials", "0"], "at least 1"),
        (["--metric", "valid/loss", "--sampler", "grid"], "has no end of values"),
        (["--metric", "valid/loss", "--sampler", "cmaes"], "two names or more"),
        (["--metric", "valid/loss", "--storage", "what"], "expected a URL"),
    ):
        with pytest.raises(UserError, match=says):
            sweep.main([*words, *more])
    assert not list(tiny.parent.glob("sweep/trial*"))


def test_without_optuna_a_line_says_what_to_install(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install"):
        sweep.main([str(tiny), "--space", "lr=log(1e-3,1)", "--metric", "valid/loss"])


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [("tpe", "hyperband"), ("cmaes", "none"), ("qmc", "median"), ("random", "halving")],
)
def test_samplers_and_pruners_by_name(sampler: str, pruner: str, tmp_path: Path) -> None:
    """Of f(x, n) = (log10 x + 2)² + n, each finds better than 1 in 24 trials; 0 is the least."""
    dimensions = space.parse(["x=log(1e-4,1)", "n=int(0,3)"])
    args = (dimensions, "min", sampler, pruner, 9, {})
    with study.Study(tmp_path, None, *args) as one:
        while asked := one.ask(8, 24):
            for trial in asked:
                x, n = float(trial.params["x"]), int(trial.params["n"])
                assert 1e-4 <= x <= 1 and 0 <= n <= 3
                value = (math.log10(x) + 2) ** 2 + n
                one.report(trial, 1, value + 1)
                if one.judged(trial):
                    one.pruned(trial)
                else:
                    one.complete(trial, 9, [value])
        rows = one.rows()
    assert len(rows) == 24 and len({row.params["x"] for row in rows}) == 24
    assert min(row.value for row in rows if row.state == "complete" and row.value is not None) < 1
    assert any(row.state == "pruned" for row in rows) == (pruner != "none")


def test_which_way_is_better(tiny: Path) -> None:
    ex = config.load(tiny).experiment
    assert sweep.direction_of(ex, "valid/loss") == "min"
    assert sweep.direction_of(ex, "valid/accuracy") == "max"


def test_a_value_that_is_not_finite_never_wins(tmp_path: Path) -> None:
    """Neither as the value of a trial, nor as what it came to on the way."""
    dimensions = space.parse(["x=uniform(0,1)"])
    args = (tmp_path, None, dimensions, "min", "random", "halving", 9, {"a": 1})
    with study.Study(*args) as one:
        good, bad = one.ask(2, 2)
        one.complete(good, 9, [0.5, 0.7])
        one.report(bad, 1, 0.1)
        one.pruned(bad, "the loss is nan at step 3")
        rows = one.rows()
    assert [row.state for row in rows] == ["complete", "failed"]
    assert rows[0].value == pytest.approx(0.6) and rows[1].value is None


def test_what_workers_die_of_is_not_tried_for_ever(tmp_path: Path) -> None:
    """Of two trials, one kills whoever trains it."""
    dimensions = space.parse(["n=choice(good,bad)"])

    def batch(worker: study.Study) -> list[study.Asked]:
        """What the worker has to train. It never says what came of it."""
        with worker:
            return worker.ask(8, 2)

    def worker() -> study.Study:
        return study.Study(tmp_path, None, dimensions, "max", "grid", "none", 3, {})

    assert [sorted(str(one.params["n"]) for one in batch(worker())) for _ in range(2)] == [
        ["bad", "good"], ["bad", "good"]  # they may have been killed by anything
    ]  # fmt: skip
    with worker() as alive:
        (one,) = alive.ask(8, 2)
        assert one.params == {"n": "good"}
        alive.complete(one, 3, [1.0])
    (one,) = batch(worker())
    assert one.params == {"n": "bad"}
    with worker() as alive:
        assert alive.ask(8, 2) == []
        states = {str(row.params["n"]): (row.state, row.why) for row in alive.rows()}
    assert states["good"] == ("complete", "")
    assert states["bad"][0] == "failed" and "3 workers died with it" in states["bad"][1]


def test_a_trial_that_comes_farther_each_time_outlives_many_workers(tmp_path: Path) -> None:
    """As on machines that are taken away often."""
    dimensions = space.parse(["n=choice(1,2)"])
    for evaluation in range(1, 6):
        with study.Study(tmp_path, None, dimensions, "max", "grid", "none", 9, {}) as worker:
            (one,) = worker.ask(8, 1)
            assert one.folder == "trial=0000"
            worker.report(one, evaluation, 0.5)


def started(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """A worker of its own; started as it is, it would start itself anew for large pages."""
    command = [sys.executable, "-m", "jaxeco.sweep", *words]
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **environment}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def states(folder: Path) -> list[str]:
    """Of all trials, lost ones too, straight from the database."""
    try:
        with sqlite3.connect(folder / "study.db", timeout=10) as database:
            return [row[0] for row in database.execute("select state from trials order by number")]
    except sqlite3.OperationalError:
        return []


def test_workers_share_a_study_and_one_is_killed(tiny: Path) -> None:
    """Two start at the same moment; one hangs in an evaluation, and is killed there."""
    folder, hold = tiny.parent / "sweep", tiny.parent / "hold"
    hold.touch()
    words = [str(tiny), "--space", "lr=log(1e-3,1)", "--metric", "valid/accuracy", "--batch", "2"]
    words += ["--trials", "6", "--sampler", "random", "--workdir", str(folder)]
    hanging, other = started(words, HOLD=str(hold)), started(words)
    try:
        said, _ = other.communicate(timeout=400)
        assert other.returncode == 0, said
        deadline = time.monotonic() + 60
        while not any("valid" in p.read_text() for p in folder.glob("trial*/metrics.jsonl")):
            assert time.monotonic() < deadline and hanging.poll() is None
            time.sleep(0.1)
        # the other leaves to a living worker what it has, and trains all the rest
        assert sorted(states(folder)) == ["COMPLETE"] * 4 + ["RUNNING"] * 2
        assert "4 complete" in said and "2 running" in said
        before = {row["trial"]: row for row in table(folder)}
        os.kill(hanging.pid, signal.SIGKILL)
        hanging.wait()
    finally:
        hanging.kill()
        other.kill()
    assert sweep.main([*words, "--resume"]) == 0
    after = {row["trial"]: row for row in table(folder)}
    assert sorted(states(folder)) == ["COMPLETE"] * 6 + ["FAIL"] * 2
    assert len(after) == 6 and all(row["state"] == "complete" for row in after.values())
    finished = [n for n, row in before.items() if row["state"] == "complete"]
    lost = [row for row in before.values() if row["state"] == "running"]
    assert all(after[n] == before[n] for n in finished)
    # what was lost came back under another number, with its values, and in its folder
    new = [row for n, row in after.items() if n not in before]
    kept = [[(row["lr"], row["folder"]) for row in rows] for rows in (lost, new)]
    assert len(kept[0]) == 2 and sorted(kept[0]) == sorted(kept[1])
    assert len(list(folder.glob("trial=*"))) == 6


def test_a_worker_elsewhere_is_dead_when_it_counts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers with folders of their own, which share a database alone."""
    monkeypatch.setattr(study, "BEAT", 0.1)
    monkeypatch.setattr(study, "SILENCE", 1.5)
    url = f"sqlite:///{tmp_path / 'shared.db'}"

    def worker(name: str) -> study.Study:
        folder = tmp_path / name / "sweep"
        folder.mkdir(parents=True)
        dimensions = space.parse(["x=uniform(0,1)"])
        return study.Study(folder, url, dimensions, "max", "random", "none", 3, {})

    here = worker("here")
    with worker("there") as there:
        (gone,) = there.ask(1, 3)
        there.report(gone, 1, 0.25)
        with here:
            assert len(here.ask(8, 3)) == 2  # of three in all
            deadline = time.monotonic() + 10
            while here.undecided() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(2 * study.SILENCE)
            assert not here.undecided() and here.ask(8, 3) == []  # it lives, and has its trial
            there.__exit__()
            assert here.undecided() is False  # it was heard of a moment ago
            deadline = time.monotonic() + 30
            while not (found := here.ask(8, 3)) and time.monotonic() < deadline:
                time.sleep(0.1)
            (again,) = found
            assert again.params == gone.params and again.folder == gone.folder
            # it was not dead after all: what it says does not count
            assert there.judged(gone)
            there.complete(gone, 3, [1.0])
            here.complete(again, 3, [0.5])
            rows = {row.number: row for row in here.rows()}
            assert len(rows) == 3 and rows[again.number].value == 0.5
            assert rows[again.number].evaluations == 2  # with that before
