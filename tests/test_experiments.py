"""Every experiment file, shrunk, through the real entry point; and that one's own manners."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_tfds import Server, serve_cifar10, serve_mnist, serve_tiny_shakespeare

from jaxeco import config, run
from jaxeco.data import Tfds, TfdsText
from jaxeco.data.text import PACKAGES
from jaxeco.errors import UserError
from jaxeco.log import read_metrics

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.py"))
DIGITS = str(ROOT / "experiments" / "digits_mlp.py")
TINY = ("batch=8", "eval_batch=8", "steps_per_call=1")
TRUNK = ("model.trunk.layers=1", "model.trunk.heads=2", "model.trunk.width=16")
# beside TINY: what makes each small enough for a test
SHRUNK = {
    "cifar_speedrun": ("widths=8,8,8",),
    "docs_bpe": TRUNK,
    "finetune_classifier": (*TRUNK, "start=none", "optimizer.layers=1"),
    "finetune_lora": ("start=none", "model.model.trunk.layers=1"),
    "gpt2_124m": (*TRUNK, "data_set=tiny_shakespeare", "context=16", "micro_batches=1"),
    "gpt2_small": TRUNK,
    "masked_lm": TRUNK,
    "number_words": (
        "layers=1",
        "width=16",
        "train.sources.split=test",
        "train.targets.split=test",
    ),
    "shakespeare_char": TRUNK,
    "shakespeare_fast": TRUNK,
}
PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 and MNIST with a handful of noise images, and a play, prepared as a user's are."""
    folder, server = tmp_path_factory.mktemp("tfds"), Server()
    with pytest.MonkeyPatch.context() as patch:
        serve_cifar10(server, patch)
        serve_mnist(server, patch)
        serve_tiny_shakespeare(server, patch, PLAY * 60)
        for name in ("cifar10", "mnist"):
            for split in ("train", "test"):
                Tfds(name, split, data_dir=str(folder)).open()
        TfdsText("tiny_shakespeare", "train", data_dir=str(folder)).documents()
    server.close()
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_an_experiment_takes_a_step(
    file: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_data))
    folder = tmp_path / "run"
    words = [*TINY, *(SHRUNK[file.stem] if file.stem in SHRUNK else ())]
    assert run.main([str(file), *words, "--steps", "1", "--workdir", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["step"] == 1
    record = json.loads((folder / "run.json").read_text())
    assert record["resolved"]["batch"] == 8
    for split in record["resolved"]["evals"]:
        assert 0 < result[split]["loss"] < 100
    assert (folder / "experiment.py").read_text() == file.read_text()
    classes = record["sessions"][0]["data"]["train"]["classes"]
    fields = record["sessions"][0]["data"]["train"]["fields"]
    images = any(shape.count(",") == 2 for shape in fields.values())
    names = ["experiment.py", "run.json", "metrics.jsonl", "curves.png"]
    names += ["confusion.png"] * bool(classes) + ["examples.png"] * images
    for name in names:
        assert (folder / name).stat().st_size > 0


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_an_experiment_opens_with_its_claim(file: Path) -> None:
    doc = file.read_text().split('"""')[1]
    assert "python -m jaxeco.run experiments/" + file.name in doc
    assert ("n = " in doc and "±" in doc) or "No result is claimed" in doc


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    use, experiment, text, fine_tuning, classify, model, loss = blocks
    exec(text, {})
    exec(fine_tuning, {})
    (tmp_path / "mine.py").write_text(experiment)
    assert config.load(tmp_path / "mine.py", ["lr=0.1"]).experiment.optimizer.lr.peak == 0.1
    names: dict[str, Any] = {"__name__": "readme"}
    exec(model, names)
    net, x = names["Net"](), np.ones((4, 8, 8, 1), np.float32)
    variables = net.init(jax.random.key(0), x, train=False)
    assert net.apply(variables, x, train=False).shape == (4, 10)
    exec(loss, names)
    y, outputs = np.arange(4), np.eye(4, 10, dtype=np.float32) * 20
    assert float(names["Brier"]().mean(outputs, y, np.ones(4)).value()) < 1e-6
    assert float(names["Confidence"]()(outputs, y, np.ones(4)).value()) > 0.999
    monkeypatch.chdir(tmp_path)
    assert run.main([DIGITS, "epochs=1", "eval_batch=8", "batch=8", "model.widths=24"]) == 0
    exec(use, {})
    assert re.fullmatch(r"\[(\d ){4}\d\]", capsys.readouterr().out.splitlines()[-1])
    classifier = [str(ROOT / "experiments" / "finetune_classifier.py"), *TINY]
    words = [*classifier, *SHRUNK["finetune_classifier"], "--steps", "1"]
    assert run.main([*words, "--workdir", "runs/finetune_classifier"]) == 0
    exec(classify, {})
    assert capsys.readouterr().out.splitlines()[-1] in PACKAGES


def test_help_and_dry_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.main([DIGITS, "--help"]) == 0
    assert "peak learning rate" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert run.main([DIGITS, "batch=16", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for word in ("optimizer.lr.peak", "parameters", "17,226", "FLOPs", "KiB"):
        assert word in shown  # 64*128+128 + 128*64+64 + 64*10+10 = 17,226
    assert list(tmp_path.iterdir()) == []


def command(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxeco.run", *words],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((DIGITS, "lrr=0.1"), "did you mean lr?"),
        ((DIGITS, "--workdri", "x"), "--workdri"),
        ((DIGITS, "--lr=0.1"), "written lr=0.1"),
        ((DIGITS, "--dry-run", "--steps", "3"), "leave out"),
        ((DIGITS, "model.num_classes=7"), "7 outputs"),
        ((DIGITS, "best=test/acuracy"), "expected one of test/loss, test/accuracy"),
        ((), "no experiment file given"),
        ((DIGITS + "x",), "no such experiment file"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words: tuple[str, ...], expected: str) -> None:
    status, out, err = outcome(command(*words))
    assert status == 2
    assert out == ""
    assert expected in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_batch_that_does_not_fit_the_devices_is_refused_before_compiling(tmp_path: Path) -> None:
    flags = "--xla_force_host_platform_device_count=8"
    process = command(
        DIGITS, "batch=12", "--workdir", str(tmp_path / "run"),
        XLA_FLAGS=flags, JAX_LOG_COMPILES="1",
    )  # fmt: skip
    status, _, err = outcome(process)
    assert status == 2
    assert "batch=12 is not divisible by 8 devices" in err
    assert "Compiling" not in err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_so_and_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    folder = tmp_path / "run"
    words = (DIGITS, "epochs=2000", "eval_every.count=500", "--workdir", str(folder))
    process = command(*words)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("step "):  # of the progress
        assert line, process.communicate()[1]
    process.send_signal(number)
    got, out, _ = outcome(process)
    assert got == status
    assert f"{number.name}: saved step" in out
    saved = json.loads((folder / "result.json").read_text())["step"]
    assert 0 < saved < 44000
    got, out, err = outcome(command(*words, "--resume", "--steps", str(saved + 1)))
    assert got == 0, err
    assert f"from step {saved:,}" in out
    assert json.loads((folder / "result.json").read_text())["step"] == saved + 1
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == sorted(steps)


def test_a_folder_in_use_and_a_folder_with_a_run(tmp_path: Path) -> None:
    from jaxeco import folder as folders

    with folders.locked(tmp_path / "run"):
        status, _, err = outcome(command(DIGITS, "--workdir", str(tmp_path / "run")))
        assert status == 2 and "in use by another run (process" in err
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        run.main([DIGITS, "--workdir", str(tmp_path / "run")])


def test_another_experiments_checkpoint_is_refused(tmp_path: Path) -> None:
    words = [DIGITS, *TINY, "--steps", "1", "--workdir", str(tmp_path)]
    assert run.main(words) == 0
    with pytest.raises(UserError) as error:
        run.main([*words, "--resume", "lr=0.5"])
    assert "optimizer.lr.peak" in str(error.value)
    assert "0.003" in str(error.value) and "0.5" in str(error.value)


def test_divergence_names_the_step_and_what_is_left(tmp_path: Path) -> None:
    begun = time.monotonic()
    process = command(DIGITS, "lr=1e30", "--workdir", str(tmp_path / "run"))
    status, _, err = outcome(process)
    assert status == 1
    assert err.startswith("error: the loss is") and err.count("\n") == 1
    assert "at step" in err and "clip_norm" in err
    assert list((tmp_path / "run" / "diverged").iterdir())
    assert time.monotonic() - begun < 60


def test_no_tensorflow_in_a_training_process(tmp_path: Path) -> None:
    code = (
        "import sys; from jaxeco import runtime; runtime.configure(); from jaxeco import run;"
        f"run.main([{DIGITS!r}, '--steps', '1', '--workdir', {str(tmp_path)!r}]);"
        "print('found', [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'torch')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "found []" in shown.stdout
