"""Profiles: what a trace says, by hand; which steps can be profiled; real runs with one."""

import csv
import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxeco import data, losses, models, optim, run
from jaxeco.errors import UserError
from jaxeco.experiment import Experiment, Steps
from jaxeco.log import read_metrics
from jaxeco.plan import plan
from jaxeco.profile import Window, window
from jaxeco.timeline import Instruction, Span, layer, own_times, parse, read, usage


def spans(*given: tuple[str, float, float], device: str = "cpu:0", call: int = 1) -> list[Span]:
    return [Span(device, "f", name, start, end, call) for name, start, end in given]


def times(given: list[Span]) -> dict[str, float]:
    own = own_times(given, lambda span: span.name.startswith(("while", "call")))
    return {name: ns for (_, name), ns in own.items()}


def test_a_loop_counts_only_while_nothing_runs_in_it() -> None:
    nested = spans(("while", 0, 100), ("call", 10, 60), ("dot", 20, 40), ("add", 45, 55))
    assert times(nested) == {"while": 10 + 40, "call": 10 + 5 + 5, "dot": 20, "add": 10}
    # its body may run in another thread, and go on when the loop's own event is over
    assert times(spans(("while", 0, 10), ("dot", 5, 30))) == {"while": 5, "dot": 25}


def test_operations_that_overlap_share_their_time() -> None:
    # 0-10 alone, 10-20 two, 20-30 three, 30-60 one; the second time of "a" follows on
    found = times(spans(("a", 0, 30), ("b", 10, 30), ("c", 20, 60), ("a", 60, 70), ("d", 5, 5)))
    assert found == pytest.approx({"a": 10 + 5 + 10 / 3 + 10, "b": 5 + 10 / 3, "c": 10 / 3 + 30})
    assert sum(found.values()) == pytest.approx(70)


def test_shares_of_a_step_add_up() -> None:
    # two steps of 100 ns on each of two devices; two calls, 20 ns apart
    one = [*spans(("dot", 10, 60), ("add", 60, 80)), *spans(("dot", 100, 150), call=2)]
    two = spans(("dot", 10, 60), device="cpu:1") + spans(("dot", 100, 190), device="cpu:1", call=2)
    program = "%main (a: f32[]) -> f32[] {\n  %dot = f32[2,2]{1,0} dot(%a, %b)\n}\n"
    used = usage([*one, *two], [("f", program)], ms=100e-6, n=2)
    shares = {o.name: (o.kind, o.share, o.calls) for o in used.operations}
    assert shares == {"dot": ("dot", pytest.approx(240 / 400), 1), "add": ("add", 20 / 400, 0.25)}
    assert used.operations[0].ms == pytest.approx(60e-6)
    assert used.busy == pytest.approx(260 / 400)
    assert used.between == pytest.approx(1 - (70 + 50 + 50 + 90) / 400)
    assert sum(used.by_kind().values()) == pytest.approx(used.busy)


def plane(name: str, line: str, events: str, names: dict[int, str], stats: dict[int, str]) -> str:
    """The text of a trace's plane."""
    tables = [
        f'{table} {{ key: {i} value {{ id: {i} name: "{text}" }} }}'
        for table, found in (("event_metadata", names), ("stat_metadata", stats))
        for i, text in found.items()
    ]
    return f'planes {{ name: "{name}" lines {{ name: "{line}" {events} }} {" ".join(tables)} }}'


def event(name: int, start_ns: int, ns: int, **stats: str | int) -> str:
    """The text of an event; a stat _7="a" has the id 7."""
    said = " ".join(
        f'stats {{ metadata_id: {key[1:]} str_value: "{value}" }}'
        if isinstance(value, str)
        else f"stats {{ metadata_id: {key[1:]} int64_value: {value} }}"
        for key, value in stats.items()
    )
    return f"events {{ metadata_id: {name} offset_ps: {start_ns}000 duration_ps: {ns}000 {said} }}"


STATS = {1: "hlo_op", 2: "hlo_module", 3: "_pt", 4: "_p", 5: "_ct", 6: "_c", 7: "run_id"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            plane(
                "/host:CPU",
                "a thread",
                event(1, 10, 5, _1="dot.1", _2="f", _3=0, _4=8, _7=3)
                + event(2, 90, 1, _5=0, _6=8)  # other threads have worked on it until 90
                + event(3, 20, 5, _1="add.2", _2="f", _3=0, _4=9, _7=3)
                + event(4, 0, 99),
                {1: "dot.1", 2: "end: dot.1", 3: "add.2", 4: "no operation"},
                STATS,
            ),
            [Span("cpu:0", "f", "dot.1", 10, 90, 3), Span("cpu:0", "f", "add.2", 20, 25, 3)],
            id="cpu",
        ),
        pytest.param(
            plane(
                "/device:GPU:1",
                "Stream #7(Compute)",
                event(1, 10, 5, _1="fusion.1", _2="f") + event(2, 20, 5),
                {1: "loop_fusion_kernel", 2: "MemcpyH2D"},
                STATS,
            ),
            [
                Span("/device:GPU:1", "f", "fusion.1", 10, 15),
                Span("/device:GPU:1", "", "MemcpyH2D", 20, 25),
            ],
            id="gpu",
        ),
        pytest.param(
            plane(
                "/device:TPU:0",
                "XLA Ops",
                event(1, 10, 5, _7=3),
                {1: "%fusion.1 = f32[8]{0} fusion(%p), kind=kLoop"},
                STATS,
            ),
            [Span("/device:TPU:0", "", "fusion.1", 10, 15, 3)],
            id="tpu",
        ),
    ],
)
def test_traces_of_each_kind_of_device(text: str, expected: list[Span]) -> None:
    assert read(jax.profiler.ProfileData.from_text_proto(text)) == expected


def test_where_an_operation_comes_from() -> None:
    for op_name, expected in {
        "jit(within)/while/body/closed_call/jvp(Net)/Conv_3/conv": ("Net/Conv_3", False),
        "jit(f)/transpose(jvp(Net))/Conv_3/jit(_where)/select_n": ("Net/Conv_3", True),
        "jit(f)/eval_jaxpr/vmap(jvp(Net))/block_2/block_2._attention/dot_general": (
            "Net/block_2/attention",
            False,
        ),
        "jit(f)/(transpose(jvp(Net))/Conv_0/add:jvp()/mul)": ("Net/Conv_0 and others", True),
        "jit(f)/while/body/mul": ("", False),
    }.items():
        assert layer(op_name) == expected, op_name


PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "/lib/python3/site-packages/optax/update.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=43 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%fused (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  %dot.9 = f32[8]{0} dot(%p.1, %p.1), metadata={op_name="jit(f)/jvp(Net)/Dense_0/dot_general"}
  ROOT %add.9 = f32[8]{0} add(%dot.9, %p.1)
}

%body (t.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t.1 = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %element = f32[8]{0} get-tuple-element(%t.1), index=1
  %copy.1 = f32[8]{0} copy(%element)
  ROOT %both = (s32[], f32[8]) tuple(%copy.1, %copy.1)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0), metadata={op_name="carry[\\'w\\']"}
  %fusion.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused
  %sum.1 = f32[8]{0} reduce(%fusion.1, %a), dimensions={0}, to_apply=%fused
  %mul.1 = f32[8]{0:T(256)} multiply(%a, %a), metadata={op_name="jit(f)/mul" stack_frame_id=1}
  %copy.2 = f32[8]{0} copy(%a)
  %gemm = (f32[8]{0}, s8[64]{0}) custom-call(%mul.1), custom_call_target="__cublas$gemm"
  ROOT %while.1 = (s32[], f32[8]) while(%mul.1), body=%body, \
metadata={op_name="jit(f)/jvp(Net)/RNN_0/while"}
}
"""


def test_a_program_says_what_its_instructions_are() -> None:
    found = parse(PROGRAM)
    assert found["fusion.1"] == Instruction("fusion dot", "Net/Dense_0", "")
    assert found["sum.1"] == Instruction("reduce", "after Net/Dense_0", "")
    assert found["mul.1"] == Instruction("multiply", "", "optax/update.py:42")
    assert found["gemm"] == Instruction("cublas$gemm", "", "optax/update.py:42")
    assert found["copy.2"].layer == "after carry['w']"
    assert found["while.1"] == Instruction("while", "Net/RNN_0", "")
    assert found["copy.1"].layer == "Net/RNN_0"  # nothing but the loop around it says so


rng = np.random.default_rng(0)
X = rng.normal(size=(80, 4)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.int32)


def small(**given: object) -> Experiment:
    """100 steps; an evaluation after each 40, a checkpoint after each 50."""
    fields = {
        "name": "small",
        "train": data.Arrays(X, Y, ("no", "yes")),
        "evals": {},
        "model": models.MLP(widths=(8,), num_classes=2),
        "loss": losses.SoftmaxCrossEntropy(),
        "optimizer": optim.SGD(lr=0.1),
        "batch": 8,
        "length": Steps(100),
        "eval_batch": 8,
        "eval_every": Steps(40),
        "save_every": Steps(50),
    }
    return Experiment(**fields | given)  # type: ignore[arg-type]


def test_which_steps_are_profiled() -> None:
    p = plan(small())
    assert window(p, 0, 100, ()) == Window(timed=1, first=11, end=21)
    assert window(p, 38, 100, ()) == Window(50, 60, 70)  # what is before is short
    assert window(p, 0, 100, (40, 50)) == Window(40, 40, 50)
    assert window(p, 0, 100, (52, 54)) == Window(50, 52, 54)
    assert window(p, 0, 6, ()) == Window(1, 1, 6)
    p = plan(small(steps_per_call=20))  # calls end at 20, 40, 50, 60, 80, 100
    assert window(p, 0, 100, ()) == Window(20, 20, 40)
    for (first, end), advice in {
        (0, 20): "such as 20:40",  # the first call compiles
        (25, 35): "such as 20:40",  # in the middle of one
        (20, 60): "such as 20:40",  # an evaluation between
        (40, 50): "such as 50:60",  # the first call of ten steps compiles
        (200, 220): "such as 80:100",  # never comes
    }.items():
        with pytest.raises(UserError, match=rf"--profile {first}:{end}: expected .*{advice}$"):
            window(p, 0, 100, (first, end))
    with pytest.raises(UserError, match="steps 0 to 20 have no call but those that compile"):
        window(p, 0, 20, ())


FILE = """
import numpy as np
from jaxeco import data, losses, models, optim
from jaxeco.experiment import Experiment, Guard, MeshShape, Steps

rng = np.random.default_rng(0)
X = rng.normal(size=(80, 4)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.int32)

def experiment(
    lr: float = 0.1, patience: int | None = None, poison: bool = False
) -> Experiment:
    names = ("no", "yes")
    if poison:
        X[7] = np.nan  # in the first epoch's eight steps, once
    return Experiment(
        name="small",
        train=data.Arrays(X[:64], Y[:64], names),
        evals={"test": data.Arrays(X[64:], Y[64:], names)},
        model=models.MLP(widths=(8,), num_classes=2),
        loss=losses.SoftmaxCrossEntropy(),
        optimizer=optim.SGD(lr=lr),
        batch=8,
        length=Steps(60),
        eval_batch=8,
        eval_every=Steps(20),
        save_every=Steps(20),
        log_every=Steps(5),
        best="test/loss",
        patience=patience,
        guard=Guard("rollback", limit=1) if poison else None,
        mesh=MeshShape(data=2),
    )
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "small.py").write_text(FILE)
    return [str(tmp_path / "small.py"), "--workdir", str(tmp_path / "run")]


def losses_of(folder: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line["split"], line["loss"]) for line in read_metrics(folder)]


def test_a_run_with_a_profile(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run.main([*words, "--profile", "--steps", "20"]) == 0
    shown = capsys.readouterr().out
    assert "profile of steps 10 to 20" in shown and "ms without a profiler" in shown
    assert "the most expensive operations" in shown
    rows = list(csv.DictReader((folder / "profile" / "operations.csv").open()))
    shares = [float(row["share"]) for row in rows]
    assert 0 < sum(shares) <= 1 and shares == sorted(shares, reverse=True)
    layers = {row["layer"] for row in rows if row["kind"] == "dot" and row["calls"] == "1.0"}
    assert {"MLP/Dense_0", "MLP/Dense_1", "MLP/Dense_1 (backward)"} <= layers
    assert not any("jit(" in row["layer"] for row in rows)
    (trace,) = folder.glob("profile/plugins/profile/*/*.trace.json.gz")
    assert json.loads(gzip.open(trace).read())["traceEvents"]
    # it goes on, with a second profile, and comes to what a run without any does
    assert run.main([*words, "--profile", "45:50", "--resume"]) == 0
    assert "profile of steps 45 to 50" in capsys.readouterr().out
    assert len(list(folder.glob("profile/plugins/profile/*/*.xplane.pb"))) == 2
    words[words.index(str(folder))] = str(tmp_path / "plain")
    assert run.main(words) == 0
    assert losses_of(folder) == losses_of(tmp_path / "plain")
    assert "profile of" not in capsys.readouterr().out
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_run_that_ends_before_its_profile(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*words, "lr=1e-30", "patience=1", "--profile", "45:50"]) == 0
    shown = capsys.readouterr().out
    assert "warning: no profile of steps 45 to 50: the run ended before them" in shown
    assert "stopped early" in shown


def test_a_run_that_goes_back_within_its_profile(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="after 1 roll-backs"):
        run.main([*words, "poison=true", "--profile", "1:20", "--steps", "20"])
    shown = capsys.readouterr().out
    assert "warning: no profile of steps 1 to 20: the run went back to step 0" in shown
    with jax.profiler.trace(str(Path(words[-1]) / "another")):  # nothing goes on from before
        pass


def test_mistakes(words: list[str], tmp_path: Path) -> None:
    for given, says in {
        ("--profile", "5"): "'5': expected FIRST:END, such as 100:110",
        ("--profile=9:9",): "'9:9': expected FIRST:END",
        ("--profile", "100:110"): "--profile 100:110: expected steps of this session",
        ("--profile", "--steps", "1"): "steps 0 to 1 have no call but those",
    }.items():
        with pytest.raises(UserError, match=says):
            run.main([*words, *given])
    with pytest.raises(UserError, match="--dry-run runs nothing: leave out --profile"):
        run.main([words[0], "--profile", "--dry-run"])
    with pytest.raises(UserError, match="lr=x: expected float"):
        run.main([*words, "--profile", "lr=x"])  # which is not the window
    assert not (tmp_path / "run" / "run.json").exists()
