"""The log: what lands in the file, what a resumed run does to it, and what a person sees."""

import io
import json
import math
import os
import pty
import re
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxeco.errors import UserError
from jaxeco.log import Log, read_metrics, table


def make(folder, **options):
    options = {"total_steps": 100, "examples_per_step": 32, "trackers": ()} | options
    return Log(folder, stream=options.pop("stream", io.StringIO()), **options)


def points(folder, *names):
    return [
        tuple(line[name] for name in ("split", "step", *names)) for line in read_metrics(folder)
    ]


def test_every_call_is_a_line_of_strict_json(tmp_path):
    with make(tmp_path) as log:
        log.train(10, {"loss": np.float32(0.5), "accuracy": 0.25})
        log.evaluation(
            10,
            "test",
            {"loss": float("nan"), "per_class": [0.5, math.inf], "confusion": np.eye(2, dtype=int)},
        )
        text = (tmp_path / "metrics.jsonl").read_text()  # already there, before the file is closed
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert first.pop("time") >= 0 and second.pop("time") >= 0
    assert first == {"step": 10, "split": "train", "loss": 0.5, "accuracy": 0.25}
    assert second == {
        "step": 10,
        "split": "test",
        "loss": None,
        "per_class": [0.5, None],
        "confusion": [[1, 0], [0, 1]],
    }
    back = read_metrics(tmp_path)[1]
    assert math.isnan(back["loss"]) and math.isnan(back["per_class"][1])
    assert back["confusion"] == [[1, 0], [0, 1]]


def test_resuming_cuts_back_to_the_restored_step(tmp_path):
    with make(tmp_path) as log:
        for step in (10, 20, 30):
            log.train(step, {"loss": step})
        log.evaluation(30, "test", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "split": "tr')  # killed in the middle of a line
    assert points(tmp_path) == [("train", 10), ("train", 20), ("train", 30), ("test", 30)]
    with make(tmp_path, first_step=20) as log:
        assert points(tmp_path) == [("train", 10), ("train", 20)]
        log.train(30, {"loss": -1})
    assert points(tmp_path, "loss") == [("train", 10, 10), ("train", 20, 20), ("train", 30, -1)]
    with make(tmp_path, first_step=0):  # anew
        assert points(tmp_path) == []


def test_a_half_line_does_not_spoil_the_next_one(tmp_path):
    with make(tmp_path) as log:
        log.train(10, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 20, "split": "train", "loss": 0.\xff')
    with make(tmp_path, first_step=10) as log:
        log.train(20, {"loss": 2.0})
    assert points(tmp_path, "loss") == [("train", 10, 1.0), ("train", 20, 2.0)]


def test_an_evaluation_done_again_replaces_the_earlier(tmp_path):
    for loss in (1.0, 2.0):
        with make(tmp_path, first_step=10) as log:
            log.evaluation(10, "test", {"loss": loss})
    assert points(tmp_path, "loss") == [("test", 10, 2.0)]


def test_evaluations_on_record_are_known_after_a_restart(tmp_path):
    with make(tmp_path) as log:
        log.train(10, {"loss": 1.0})
        assert not log.evaluated(10, "test")
        for step in (10, 20):
            log.evaluation(step, "test", {"loss": 1.0})
            assert log.evaluated(step, "test")
    with make(tmp_path, first_step=10) as log:
        assert log.evaluated(10, "test") and not log.evaluated(20, "test")


def test_lines_that_are_not_of_a_log_are_passed_over(tmp_path):
    good = {"step": 1, "split": "train", "time": 1, "loss": 0.5}
    odd = ["7", "[]", "null", "", '{"step": 1}', json.dumps(good | {"step": "x"}), "\0"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*odd, json.dumps(good), *odd]))
    assert read_metrics(tmp_path) == [good]
    with make(tmp_path, first_step=1):
        assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(good) + "\n"


def test_time_goes_on_where_the_run_was_stopped(tmp_path):
    line = {"step": 10, "split": "train", "time": 1000.0, "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with make(tmp_path, first_step=10) as log:
        log.train(20, {"loss": 1.0})
    assert 1000 <= read_metrics(tmp_path)[1]["time"] < 1005


@pytest.fixture
def clock(monkeypatch):
    """The time as the log sees it, to be set by hand."""

    class Clock:
        now = 500.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_rate_and_time_left_leave_out_compiling_and_evaluating(tmp_path, clock):
    stream = io.StringIO()
    with make(tmp_path, total_steps=90, unit="images", stream=stream) as log:
        clock.now += 60  # compiles
        log.train(10, {"loss": 4.0})
        clock.now += 5
        log.train(20, {"loss": 3.0})  # 10 steps of 32 in 5 s
        clock.now += 2
        log.train(30, {"loss": 2.0})  # in 2 s
        clock.now += 100
        log.evaluation(30, "test", {"loss": 1.0})
        clock.now += 4
        log.train(40, {"loss": 1.0})  # in 4 s
    rates = [line.get("examples_per_second") for line in read_metrics(tmp_path)]
    assert rates == [None, 64.0, 160.0, None, 80.0]
    assert "images_per_second" in read_metrics(tmp_path)[1]
    assert stream.getvalue().splitlines() == [
        "step 10/90  loss 4.0000",
        "step 20/90  loss 3.0000  64 images/s  0:35 left",
        "step 30/90  loss 2.0000  160 images/s  0:21 left",
        "test at step 30  loss 1.0000",
        # evaluations belong to what is left: 111 s for the last 30 steps
        "step 40/90  loss 1.0000  80 images/s  3:05 left",
    ]


def test_the_rate_of_a_text_is_in_tokens(tmp_path, clock):
    stream = io.StringIO()
    with make(tmp_path, unit="tokens", units=64, stream=stream) as log:
        log.mark(1)
        clock.now += 9
        log.train(10, {"loss": 4.0})
    (line,) = read_metrics(tmp_path)
    assert (line["examples_per_second"], line["tokens_per_second"]) == (32.0, 2048.0)
    assert "2,048 tokens/s" in stream.getvalue()


def test_history_is_of_all_sessions(tmp_path):
    with make(tmp_path) as log:
        log.train(10, {"loss": 9.0})
        log.evaluation(10, "test", {"loss": 1.0, "curve": [1.0]})
        log.evaluation(20, "test", {"loss": math.nan})
        log.evaluation(30, "test", {"loss": 3.0})
    with make(tmp_path, first_step=20) as log:
        log.evaluation(30, "test", {"loss": np.float32(4.0)})
        (first, second, third) = log.history("test/loss")
        assert (first, third) == ((10, 1.0), (30, 4.0))
        assert second[0] == 20 and math.isnan(second[1])
        assert log.history("test/curve") == log.history("valid/loss") == []


def test_marking_the_compiled_step_gives_the_first_line_a_rate(tmp_path, clock):
    with make(tmp_path) as log:
        clock.now += 60
        log.mark(1)
        clock.now += 3
        log.train(10, {"loss": 4.0})
    assert read_metrics(tmp_path)[0]["examples_per_second"] == 96.0


def test_a_fast_run_does_not_flood_a_file_but_always_says_something(tmp_path, clock):
    stream = io.StringIO()
    with make(tmp_path, total_steps=1000, stream=stream) as log:
        for step in range(1, 1001):
            clock.now += 0.01
            log.train(step, {"loss": 1.0})
    steps = [int(re.match(r"step ([\d,]+)", line)[1].replace(",", "")) for line in
             stream.getvalue().splitlines()]  # fmt: skip
    assert steps[0] == 1 and steps[-1] == 1000
    assert 4 <= len(steps) <= 7
    assert len(read_metrics(tmp_path)) == 1000


def test_lines_fit_into_eighty_columns(tmp_path, clock):
    stream = io.StringIO()
    values = {"loss": 12.3456, "accuracy": 0.98765, "top5_accuracy": 1.0, "learning_rate": 0.1}
    values |= {f"metric_number_{i}": 1.0 for i in range(9)} | {"matrix": np.ones((3, 3))}
    with make(tmp_path, total_steps=1_000_000, stream=stream) as log:
        log.mark(1)
        clock.now += 9
        log.train(500_000, values)
        log.evaluation(500_000, "test", values)
        log.table("run", [("data", "words " * 30), ("folder", "short")])
    lines = stream.getvalue().splitlines()
    # too long for all of it: the rate goes before the accuracy
    assert lines[0] == "step 500,000/1,000,000  loss 12.3456  accuracy 98.77 %  0:09 left"
    assert lines[1].startswith("test at step 500,000  loss 12.3456  accuracy 98.77 %")
    assert max(map(len, lines)) <= 80
    assert "learning" not in lines[0] and "matrix" not in lines[1]


def test_notes_and_warnings(tmp_path):
    stream = io.StringIO()
    with make(tmp_path, stream=stream) as log:
        log.note("saved [bold]checkpoint[/bold] 10")
        log.warn("slow")
    log.close()
    assert stream.getvalue() == "saved [bold]checkpoint[/bold] 10\nwarning: slow\n"


def test_tables_align():
    rows = [("split", "loss", "accuracy"), ("train", "0.1", "98.76 %"), ("test", 12.25, "-")]
    assert table("result", rows).splitlines() == [
        "result",
        "------",
        "split   loss  accuracy",
        "train    0.1   98.76 %",
        "test   12.25         -",
    ]
    text = table("run", [("a", "one " * 30), ("longer", "two")]).splitlines()
    assert text[2].startswith("a       one one") and text[3].startswith("        one")
    assert text[-1] == "longer  two"
    assert table("empty", []).splitlines() == ["empty", "-----"]


def test_what_cannot_be_written_or_read_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: Not a directory"):
        make(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"no metrics.jsonl in"):
        read_metrics(tmp_path)


def test_a_full_disk_ends_the_run(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with make(tmp_path) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        try:
            with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: File too large"):
                log.train(1, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SCRIPT = """
import sys, warnings
from jaxeco.log import Log
assert "rich" not in sys.modules
with Log(sys.argv[1], total_steps=3, examples_per_step=8, trackers=()) as log:
    for step in (1, 2, 3):
        log.train(step, {"loss": 0.5, "accuracy": 0.25})
    log.evaluation(3, "test", {"accuracy": 1.0})
    warnings.warn("careful")
    log.note("over")
"""


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_on_a_terminal(tmp_path, environment):
    reading, writing = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=writing,
        stderr=writing,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"} | environment,
    )
    os.close(writing)
    shown = b""
    while True:
        try:
            piece = os.read(reading, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(reading)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "step 1/3  loss 0.5000  accuracy 25.00 %" in text
    assert "test at step 3  accuracy 100.00 %" in text
    assert "careful" in text and "over" in text
    colours = re.search(rb"\x1b\[[0-9;]*3[0-9][0-9;]*m", shown)
    assert bool(colours) == (not environment)
    assert bool(b"\x1b[?25h" in shown) == ("TERM" not in environment)  # the cursor is shown again
