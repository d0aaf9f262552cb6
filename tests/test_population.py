"""Many runs at once come to what each comes to alone."""

import dataclasses
import json
import os
import resource
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from jaxeco import config, parallel, population, programs, run, session
from jaxeco.checkpoint import load
from jaxeco.errors import RunFailed, UserError
from jaxeco.grid import members
from jaxeco.groups import Group, How, grouped
from jaxeco.interrupt import Interrupt
from jaxeco.log import read_metrics
from jaxeco.population import Member, Outcome, train
from jaxeco.trees import named

SOURCE = """
import numpy as np
from jaxeco import data, losses, metrics, models, optim, schedules
from jaxeco.experiment import Epochs, Experiment, Steps

def noise(seed, n):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6, 6, 1)).astype(np.float32)
    return data.Arrays(x, (x[:, 2:4, 2:4].sum((1, 2, 3)) > 0).astype(np.int32))

def experiment(
    lr: float = 0.01,
    decay: float = 0.01,
    dropout: float = 0.1,
    smoothing: float = 0.0,
    clip: float = 1.0,
    warmup: float = 0.1,
    width: int = 8,
    conv: bool = False,
    patience: int | None = None,
    epochs: int = 4,
) -> Experiment:
    return Experiment(
        name="many",
        train=noise(0, 96),
        evals={"test": noise(1, 50)},
        model=models.ResNet(18, num_classes=2, stem="cifar", width=2) if conv
        else models.MLP(widths=(width,), num_classes=2, activation="relu", dropout=dropout),
        loss=losses.SoftmaxCrossEntropy(label_smoothing=smoothing),
        metrics=(metrics.Accuracy(),),
        optimizer=optim.AdamW(lr=schedules.Cosine(lr, warmup=warmup), weight_decay=decay),
        clip_norm=clip,
        batch=32,
        length=Epochs(epochs),
        eval_batch=25,
        log_every=Steps(2),
        best="test/accuracy",
        patience=patience,
    )
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "many.py"
    path.write_text(SOURCE)
    return path


def some(*args, folder: str = "all") -> list[Member]:
    found = members(*args)
    return [dataclasses.replace(member, folder=Path(folder) / member.folder) for member in found]


def experiments(found: list[Member]) -> list:
    return [member.ex for member in found]


def axes(*texts: str) -> list[config.Axis]:
    return [config.Axis.parse(text) for text in texts]


def trained(found: list[Member], **options) -> list[Outcome]:
    with Interrupt() as interrupt:
        options = {"resume": False, "interrupt": interrupt, "said": lambda text: None} | options
        return train(found, **options)


def params(folder: Path) -> dict[str, np.ndarray]:
    return named(load(folder / "checkpoints", which="newest").state["params"])


def assert_close(folder: Path, other: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = params(folder), params(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


def alone(member: Member, folder: Path) -> None:
    loaded = config.load(member.loaded.path, [*member.loaded.assignments, "mesh=data:1"])
    assert session.run(loaded, folder, False, None) == 0


def test_a_member_comes_to_what_it_comes_to_alone(file: Path) -> None:
    grid = axes("lr=0.01,0.03", "decay=0,0.1", "dropout=0,0.3", "smoothing=0.0,0.2", "clip=0.5,1")
    every = some(file, (), grid, 1)
    chosen = [every[i] for i in (0, 6, 13, 21, 31)]
    chosen += some(file, ["lr=0.02"], [], 2, folder="seeds")
    (group,) = grouped(experiments(chosen))
    assert len(group.inputs) == 5  # each of them is an input of one program
    for i in (0, 3, 6):
        alone(chosen[i], Path(f"alone{i}"))
    for how in get_args(How):
        those = [dataclasses.replace(member, folder=Path(how) / member.folder) for member in chosen]
        outcomes = trained(those, how=how)
        assert [o.ended for o in outcomes] == ["complete"] * len(chosen)
        for i in (0, 3, 6):
            assert_close(those[i].folder, Path(f"alone{i}"))
            ours, theirs = evaluations(those[i].folder), evaluations(Path(f"alone{i}"))
            assert ours.keys() == theirs.keys() == {3, 6, 9, 12}
            for step in ours:
                assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
                assert ours[step]["accuracy"] == theirs[step]["accuracy"]
            assert outcomes[i].scores["test/loss"] == pytest.approx(theirs[12]["loss"], rel=1e-5)
        losses = [o.scores["test/loss"] for o in outcomes]
        assert len(set(losses)) == len(losses)


def evaluations(folder: Path) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(folder) if line["split"] == "test"}


def test_what_is_no_input_of_a_program_parts_the_groups(file: Path) -> None:
    found = some(file, (), axes("width=4,8", "warmup=0.1,0.5", "lr=0.1,0.2"), 2)
    groups = grouped(experiments(found))
    assert [len(group.members) for group in groups] == [4, 4, 4, 4]
    assert {group.inputs for group in groups} == {("optimizer.lr.peak",)}
    assert sorted(i for group in groups for i in group.members) == list(range(16))


def test_a_number_just_below_1_stays_in_its_program(file: Path) -> None:
    # as an f32, 1 - 0.9999 is off by 2e-4, and with it Adam's steps
    groups = grouped(experiments(some(file, (), axes("optimizer.b2=0.9,0.95,0.999,0.9999"), 1)))
    assert [group.members for group in groups] == [(0, 1), (2,), (3,)]


def test_folders_have_names_that_a_file_system_takes(file: Path) -> None:
    text = "é" * 300
    found = members(file, (), axes(f"name={text}a;{text}b"), 1)
    names = [member.folder.name for member in found]
    assert len(set(names)) == 2 and all(len(name.encode()) <= 255 for name in names)


def test_members_may_hold_more_files_open_than_a_process_may_at_first(file: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 8, before[1]))
    try:
        outcomes = trained(some(file, ["epochs=1"], (), 4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert {o.ended for o in outcomes} == {"complete"}


def test_convolutions_train_in_turn(file: Path) -> None:
    (group,) = grouped(experiments(some(file, ["conv=true"], (), 2)))
    assert [part.how for part in group.fitting(None)] == ["in turn"]
    (group,) = grouped(experiments(some(file, (), (), 2)))
    assert [part.how for part in group.fitting(None)] == ["mapped"]


def test_a_group_is_split_to_fit(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = some(file, (), (), 10)
    (group,) = grouped(experiments(found))
    held = group.plan
    assert group.most() > 10
    (whole,) = group.fitting("mapped")
    assert whole.members == tuple(range(10))
    monkeypatch.setattr(parallel, "room", lambda device: 0.0)
    with pytest.raises(UserError, match="no room for a single member"):
        group.fitting("mapped")
    monkeypatch.setattr(Group, "most", lambda self: 4)
    parts = group.fitting("mapped")
    assert [part.members for part in parts] == [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
    assert held.train is parts[2].plan.train  # opened once
    outcomes = trained(found)
    assert [o.member for o in outcomes] == found
    assert {o.ended for o in outcomes} == {"complete"}


@pytest.mark.parametrize("how", ["mapped", "in turn"])
def test_some_end_and_the_others_do_not_notice(
    file: Path, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "dealt_to", jax.local_devices)  # as of accelerators
    found = some(file, (), (), 5)
    asked = []

    def stop(step: int, scores) -> list[int]:
        asked.extend((i, step) for i in scores)
        assert all(one.keys() == {"test/loss", "test/accuracy"} for one in scores.values())
        return [i for at, i in ((3, 0), (6, 2), (6, 4)) if at == step]

    outcomes = trained(found, stop=stop, how=how)
    assert [o.ended for o in outcomes] == ["stopped", "complete", "stopped", "complete", "stopped"]
    assert [o.step for o in outcomes] == [3, 12, 6, 12, 6]
    assert (0, 6) not in asked and (1, 9) in asked
    alone(found[3], Path("alone3"))
    assert_close(found[3].folder, Path("alone3"))
    result = json.loads((found[2].folder / "result.json").read_text())
    assert (result["ended"], result["step"], result["of"]) == ("stopped", 6, 12)
    again = trained(found, resume=True, how=how)
    assert [o.scores for o in again] == [o.scores for o in outcomes]
    assert [(o.step, o.ended) for o in again] == [(o.step, o.ended) for o in outcomes]


def test_one_that_diverges_is_named_and_the_others_go_on(file: Path, capsys) -> None:
    with pytest.raises(RunFailed, match=r"1 of 3 runs diverged.*lr=1e38,seed=0.*loss is nan"):
        run.main([str(file), "--grid", "lr=0.01,1e38,0.02"])
    results = (Path("runs/many/results.csv")).read_text().splitlines()
    assert [line.split(",")[:5] for line in results[1:]] == [
        ['"lr=0.01', 'seed=0"', "0", "12", "complete"],
        ['"lr=0.02', 'seed=0"', "0", "12", "complete"],
        ['"lr=1e38', 'seed=0"', "0", results[3].split(",")[3], "diverged"],
    ]
    shown = capsys.readouterr().out
    assert "many lr=0.02" in shown and "lr=1e38 " not in shown and "without the 1 that" in shown


def test_one_that_diverged_before_it_was_saved_is_not_taken_for_another(file: Path) -> None:
    words = [str(file), "--seeds", "2", "--workdir", "all"]
    with pytest.raises(RunFailed, match="2 of 2 runs diverged"):
        run.main([*words, "lr=1e38"])
    assert not any(Path("all").glob("seed=*/checkpoints/*"))
    with pytest.raises(UserError, match=r"another experiment(.|\n)*optimizer.lr.peak"):
        run.main([*words, "lr=0.01", "--resume"])


def test_a_resumed_member_shows_what_it_came_to(file: Path) -> None:
    words = [str(file), "--seeds", "2", "--workdir", "all", "epochs=2"]
    assert run.main(words) == 0
    before = Path("all/results.csv").read_text()
    assert before.count("complete") == 2
    Path("all/seed=0/result.json").unlink()  # as a kill at the very end leaves it
    Path("all/seed=1/run.json").write_text("{")
    with pytest.warns(UserWarning, match=r"run.json is damaged"):
        assert run.main([*words, "--resume"]) == 0
    assert Path("all/results.csv").read_text() == before


@pytest.mark.parametrize("how", ["mapped", "in-turn"])
def test_a_resumed_population_is_the_uninterrupted_one_and_may_grow(file: Path, how: str) -> None:
    words = [str(file), "--together", how, "--grid", "lr=0.01,0.02"]
    assert run.main([*words, "--seeds", "3", "--workdir", "whole"]) == 0
    assert run.main([*words, "--seeds", "2", "--workdir", "parts", "--steps", "6"]) == 0
    result = json.loads(Path("parts/lr=0.01,seed=0/result.json").read_text())
    assert (result["step"], result["ended"]) == (6, "interrupted")
    with pytest.raises(UserError, match="already holds a run"):
        run.main([*words, "--seeds", "3", "--workdir", "parts"])
    assert run.main([*words, "--seeds", "3", "--workdir", "parts", "--resume"]) == 0
    names = sorted(path.name for path in Path("whole").glob("lr=*"))
    assert len(names) == 6
    for name in names:
        ours, theirs = params(Path("parts") / name), params(Path("whole") / name)
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    # and a member goes on alone
    loaded = config.load(file, ["lr=0.01", "seed=0", "mesh=data:1"])
    assert session.run(loaded, Path("parts/lr=0.01,seed=0"), True, None) == 0


def test_patience_is_each_members_own(file: Path) -> None:
    found = some(file, ["patience=1", "epochs=12", "lr=0.3"], (), 4)
    outcomes = trained(found)
    for outcome in outcomes:
        history = [
            line["accuracy"]
            for line in read_metrics(outcome.member.folder)
            if line["split"] == "test"
        ]
        best = int(np.argmax(history))
        stalled = len(history) - 1 - best >= 1
        assert outcome.ended == ("stalled" if stalled and outcome.step < 36 else "complete")
        assert outcome.step == 3 * len(history)
        # no evaluation before the last one had stalled already
        assert all(np.argmax(history[:k]) == k - 1 for k in range(1, len(history)))


def test_seeds_draw_other_orders_from_the_same_data(file: Path) -> None:
    found = some(file, (), (), 2)
    (group,) = grouped(experiments(found))
    p = group.plan
    feeds = programs.Feeds(p, [0, 1, 0], lambda tree: jax.device_put(tree))
    fed = feeds.fed(3, 2)
    assert feeds.order == [0, 1, 0] and fed["row"].shape == (2, 2, 32)
    for u, seed in enumerate((0, 1)):
        one = p.of(dataclasses.replace(p.ex, seed=seed)).feed()
        np.testing.assert_array_equal(fed["row"][:, u], one.fed(3, 2)["row"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "expected at least 1"),
        (["--grid", "lr"], "expected key=value,value"),
        (["--grid", "lr=1,1"], "a value is given twice"),
        (["--grid", "lr=1e-3,0.001"], "the same run twice, of lr=1e-3 seed=0 and lr=0.001 seed=0"),
        (["--grid", "name=a b,a_b"], "the same folder twice, of name=a b seed=0 and name=a_b"),
        (["--grid", "lr=0.1", "lr=0.2"], "lr is given twice"),
        (["--grid", "rate=0.1"], "no argument 'rate'"),
        (["--grid", "width=a,b"], "width=a: expected int"),
        (["--seeds", "2", "mesh=data:2"], "mesh=data:2 is for a single run"),
        (["--seeds", "2", "parallel=pmap"], "parallel=pmap is for a single run"),
        (["--seeds", "2", "guard=rollback"], "guard=rollback,limit:10 is for a single run"),
        (["--seeds", "2", "--grid", "seed=1,2"], "leave out either"),
        (["--seeds", "2", "--profile"], "leave out --profile"),
        (["--together", "mapped"], "with --seeds or --grid"),
    ],
)
def test_mistakes_are_one_line(file: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        run.main([str(file), *words])
    assert "\n" not in str(error.value)
    assert not Path("runs").exists()


def test_a_dry_run_shows_the_groups(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(file), "--seeds", "2", "--grid", "width=4,8", "--dry-run"]) == 0
    assert capsys.readouterr().out == (
        "2 members mapped\n  width=4,seed=0\n  width=4,seed=1\n"
        "2 members mapped\n  width=8,seed=0\n  width=8,seed=1\n"
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("ends", "every_log", "stride"),
    [
        ((110, 220, 660), 50, 10),
        ((468, 468, 2340), 100, 39),  # gcd with the log's is 4: too short
        ((461, 461, 2305), 100, 50),  # a prime number of steps: calls are cut short at its end
        ((12, 12, 12), 2, 12),
    ],
)
def test_calls_are_alike_where_they_can_be(ends, every_log: int, stride: int) -> None:
    assert population.common_stride(ends, every_log, 50) == stride
