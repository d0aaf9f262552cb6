"""The bench's arithmetic on rates that are made up, and that its programs do the same work."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxeco import runtime
from jaxeco.errors import UserError

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def scripts():
    """The scripts' modules, by name, as they import one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS / "bench_workers"))
        patch.syspath_prepend(str(SCRIPTS))
        patch.setattr(sys, "argv", ["worker", "mlp", "1"])
        patch.setattr(runtime, "configure", lambda: None)  # JAX is awake
        yield importlib.import_module


@pytest.fixture(scope="module")
def of(scripts):
    return scripts("bench_report")


def result(workload: str, jax: str = "0.10.2", device: str = "a chip", flops=None, **programs):
    """`programs`: their rates, or what went wrong."""
    return {
        "workload": workload,
        "title": f"the {workload}",
        "unit": "starts" if workload == "start" else "images",
        "flops": flops,
        "device": device,
        "versions": {"JAX": jax},
        "command": f"scripts/bench.py --only {workload}",
        "rounds": 3,
        "seconds": 1.0,
        "programs": {
            name: {"error": got} if isinstance(got, str) else {"parameters": 7, "rates": got}
            for name, got in programs.items()
        },
    }


def test_a_ratio_is_that_of_medians_within_the_rounds_own(of) -> None:
    found = of.ratio([10.0, 30.0, 20.0], [10.0, 10.0, 5.0])
    assert found == of.Ratio(median=2.0, least=1.0, most=4.0)
    assert found.spread == 1.5


@pytest.mark.parametrize(
    ("stored", "now", "fell"),
    [
        ((2.0, 1.9, 2.1), (1.79, 1.74, 1.84), True),  # 0.21 lower, 0.15 allowed
        ((2.0, 1.9, 2.1), (1.86, 1.81, 1.91), False),  # 0.14 lower
        ((2.0, 1.0, 3.0), (1.1, 1.0, 1.2), False),  # the stored rounds were all over the place
        ((2.0, 2.0, 2.0), (1.91, 1.91, 1.91), False),  # no spread at all: 5 % are allowed
        ((2.0, 2.0, 2.0), (1.89, 1.89, 1.89), True),
        ((2.0, 1.9, 2.1), (3.0, 2.9, 3.1), False),  # it has risen
    ],
)
def test_a_ratio_falls_by_more_than_the_spread(of, stored, now, fell) -> None:
    assert of.fallen(of.Ratio(*stored), of.Ratio(*now)) == fell


def test_tables(of) -> None:
    net = result(
        "net", flops=2_000_000_000, ours=[40, 50, 60], pytorch=[25, 25, 20],
        pytorch_compile="no compiler", limit_numpy=[100, 190, 210], limit_xla=[200, 200, 250],
    )  # fmt: skip
    start = result("start", ours=[0.5, 0.25, 0.4], plain_flax=[0.2, 0.25, 0.1])
    matmul = result("matmul", limit_numpy=[100, 190, 210])
    text = of.section([matmul, start, net], ["net", "start", "matmul"], "bench.png")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert rows[1][:4] == [
        *("the net", "50 (40 to 60) images/s", "**2.00** (1.60 to 3.00)", "failed: no compiler")
    ]
    assert rows[1][4:] == ["", "3", "`scripts/bench.py --only net`"]
    assert rows[2][:5] == ["the start", "2.50 (2.00 to 4.00) s", "", "", "**2.00** (1.00 to 4.00)"]
    # 50 images of 2 GFLOP are half of XLA's median, the better one
    assert rows[4] == ["the net", "200", "100 (50 %)", "50 (25 %)"]
    assert rows[6][:3] == ["the matmul", "190 (100 to 210) images/s", "3"]
    assert "a chip, JAX 0.10.2" in text and "](bench.png)" in text


def test_results_replace_those_of_the_same_device_and_version_only(of, tmp_path) -> None:
    first = result("net", ours=[1, 1, 1])
    for measured in (
        first,
        result("net", ours=[2, 2, 2]),
        result("start", ours=[3, 3, 3]),
        result("net", jax="0.12.0", ours=[4, 4, 4]),
        result("net", device="another chip", ours=[5, 5, 5]),
    ):
        of.store(measured, tmp_path)
    stored = of.stored(tmp_path)
    assert sorted(of.rates(r, "ours")[0] for r in stored) == [2, 3, 4, 5]
    assert [r["workload"] for r in of.groups(stored)[0]] == ["net", "start"]  # the largest is first


def test_the_plot_has_a_bar_for_each_ratio(of, tmp_path) -> None:
    from matplotlib import image

    results = [
        result("net", ours=[40, 50, 60], pytorch=[25, 25, 20], pytorch_compile="no compiler"),
        result("start", ours=[0.5, 0.25, 0.4], plain_flax=[0.2, 0.25, 0.1]),
        result("matmul", limit_numpy=[100, 190, 210]),
    ]
    of.draw(results, ["net", "start", "matmul"], tmp_path / "images/bench.png")
    pixels = image.imread(tmp_path / "images/bench.png")[..., :3]
    red, blue = (
        (np.abs(pixels - np.array(colour) / 255).max(2) < 0.02).any((0, 1))
        for colour in ((0xC4, 0x4E, 0x52), (0x4C, 0x72, 0xB0))
    )
    assert red and blue


def test_a_section_is_replaced_and_its_markers_stay(scripts, tmp_path) -> None:
    write = scripts("report").write_section
    path = tmp_path / "a.md"
    path.write_text("above\n<!-- a: begin -->\n<!-- a: end -->\nbelow\n")
    write(path, "a", "old \\1\n")
    write(path, "a", "new \\1\n")
    text = "above\n<!-- a: begin -->\n\nnew \\1\n\n<!-- a: end -->\nbelow\n"
    assert path.read_text() == text
    for broken in (
        "no markers",
        "<!-- b: end -->\n<!-- b: begin -->",
        text.replace("a:", "b:") * 2,
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match="expected the line <!-- b: begin --> once"):
            write(path, "b", "more")
        assert path.read_text() == broken


def test_the_document_has_the_sections(scripts, tmp_path) -> None:
    copy = tmp_path / "copy.md"
    copy.write_text((SCRIPTS.parent / "docs/benchmarks.md").read_text())
    for name in ("bench", "growth"):
        scripts("report").write_section(copy, name, f"of {name}")
        assert f"of {name}" in copy.read_text()


def flops(jaxpr) -> int:
    """Of the convolutions and products in it, read off their shapes."""
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        if eqn.primitive.name == "conv_general_dilated":
            _, (i, j, c, _), out = shapes
            total += 2 * i * j * c * int(np.prod(out))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * int(np.prod([shapes[0][i] for i in contracted])) * int(np.prod(shapes[2]))
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner, "jaxpr"):
                total += flops(inner.jaxpr)
    return total


def test_plain_flax_has_our_work(scripts) -> None:
    ours, theirs = scripts("ours"), scripts("plain_flax")
    half = {name for name in ours.EXPERIMENTS if name.endswith("_bf16")}
    inputs = {"input_resident", "input_streamed"}
    many = {"digits_1", "digits_16", "mlp_16", "lenet_4_16"}
    assert theirs.WORKLOADS.keys() == ours.EXPERIMENTS.keys() - half - inputs - many
    for name, (model, _, batch, shape, _) in theirs.WORKLOADS.items():
        ex = ours.EXPERIMENTS[name]()
        assert name == "generate" or (
            ex.batch == batch and ex.train.open().fields["x"].shape[1:] == shape
        )
        if name in ("lenet_128", "airbench_256", "airbench_2000"):
            continue  # as with other batches
        params, _ = jax.eval_shape(lambda model=model, shape=shape: theirs.initial(model, shape))
        p = ours.plan(ex, jax.devices()[:1])
        assert sum(a.size for a in jax.tree.leaves(params)) == ours.learnt(p), name


@pytest.mark.parametrize("name", ["airbench_256", "resnet18", "gpt2", "char_gpt"])
def test_flops_are_those_of_plain_flax(scripts, name: str) -> None:
    """Three times forward, but for what has no gradient."""
    model, _, _, shape, _ = scripts("plain_flax").WORKLOADS[name]
    one = jax.numpy.zeros((1, *shape), int if len(shape) == 1 else float)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), one, False))
    jaxpr = jax.make_jaxpr(lambda v: model.apply(v, one, False))(variables).jaxpr
    bench = scripts("bench")
    less = {
        "airbench_256": 2 * bench.convolution(31, 2, 3, 24),  # nothing backward
        "resnet18": bench.convolution(32, 3, 3, 64),  # no gradient of the image
    }
    units = shape[0] if len(shape) == 1 else 1
    expected = 3 * flops(jaxpr) - (less[name] if name in less else 0)
    assert bench.WORKLOADS[name].flops * units == expected


def test_a_program_that_fails_is_a_row_of_the_table(scripts, of, monkeypatch) -> None:
    bench = scripts("bench")
    about = {"parameters": 7, "versions": {"JAX": "1", "device": "cpu"}}
    failed = {"pytorch": "no module named torch"}

    def asked(name, programs, rounds, seconds, torch):
        assert "limit_xla" not in programs  # only where FLOPs are counted
        worked = {program: about for program in programs if program not in failed}
        return worked, {program: [1.0, 2.0] for program in worked}, failed

    monkeypatch.setattr(bench, "asked", asked)
    measured = bench.measure("mlp", 2, 1.0, "python")
    assert of.cell(measured, "pytorch") == "failed: no module named torch"
    assert of.against(measured, "plain_flax") == of.Ratio(1, 1, 1)
    failed["ours"] = "a bug"
    with pytest.raises(UserError, match="mlp: ours failed: a bug"):
        bench.measure("mlp", 2, 1.0, "python")


def test_an_error_is_said_without_the_machines_paths(scripts) -> None:
    why = scripts("bench").why
    said = "Traceback\na.b.SomeError: /home/me/x.so: file too short\n\nSet VERBOSE=1 for more\n"
    assert why(said) == "a.b.SomeError: x.so: file too short"
    assert why("") == ""


def test_quick_ends_with_1_when_a_ratio_fell(scripts, monkeypatch, tmp_path, capsys) -> None:
    bench, table = scripts("bench"), tmp_path / "ratios.json"
    monkeypatch.setattr(bench, "RATIOS", table)
    speed = 2.0

    def measure(name, rounds, seconds, torch):
        return result(name, ours=[speed, speed * 1.01, speed * 0.99], plain_flax=[1, 1, 1])

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main(["--quick"]) == 0  # nothing to compare with
    assert not table.exists()
    assert bench.main(["--quick", "--store"]) == 0
    stored = json.loads(table.read_text())
    assert stored["ratios"].keys() == set(bench.QUICK)
    assert bench.main(["--quick"]) == 0
    speed = 1.8
    capsys.readouterr()
    assert bench.main(["--quick"]) == 1
    assert capsys.readouterr().out.count("FELL") == len(bench.QUICK)
    assert bench.main(["--quick", "--store"]) == 0  # it is what is wanted now
    assert bench.main(["--quick"]) == 0
