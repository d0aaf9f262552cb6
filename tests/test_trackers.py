"""Trackers: what the log hands them, and that none of them ends or delays a run."""

import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jaxeco import config, trackers
from jaxeco.description import describe, flatten
from jaxeco.errors import UserError
from jaxeco.log import Log

DIGITS = str(Path(__file__).parent.parent / "experiments" / "digits_mlp.py")


@dataclass(frozen=True, eq=False)
class Service:
    """A tracker whose service is a list in memory; `does` is asked before each of its calls."""

    does: Callable[[str], None] = lambda call: None
    held: dict[str, int] = field(default_factory=dict)  # what it says it holds
    got: list[Any] = field(default_factory=list)
    open_now: list[str] = field(default_factory=list)  # runs
    most: list[int] = field(default_factory=lambda: [0])  # that were open at once

    label: ClassVar[str] = "Service"
    package: ClassVar[str] = "json"
    install: ClassVar[str] = "json"

    def open(self, run: trackers.Run) -> trackers.Courier:
        def opened() -> trackers.Opened:
            self.does("open")
            self.open_now.append(run.name)
            self.most[0] = max(self.most[0], len(self.open_now))
            return _Session(self, run.name), defaultdict(int, self.held)

        return trackers.Courier(self, "in memory", run.earlier, opened)


class _Session:
    def __init__(self, service: Service, name: str):
        self.service, self.name = service, name

    def write(self, lines: Sequence[tuple[int, trackers.Scalars]]) -> None:
        self.service.does("write")
        self.service.got.extend((self.name, step, dict(scalars)) for step, scalars in lines)

    def close(self, failed: bool) -> None:
        self.service.does("close")
        self.service.open_now.remove(self.name)
        self.service.got.append((self.name, "failed" if failed else "ended"))


def make(folder: Path, *kinds: Any, **options: Any) -> Log:
    words: Any = {"total_steps": 100, "examples_per_step": 1, "stream": io.StringIO()} | options
    return Log(folder, trackers=kinds, **words)


def said(warned: pytest.WarningsRecorder) -> list[str]:
    """What the log has warned of."""
    found = [str(one.message) for one in warned.list if one.filename.endswith("log.py")]
    warned.clear()
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_service_is_handed_every_finite_scalar_in_order(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    service = Service()
    with make(tmp_path / "net", service) as log:
        assert log.tracked == [("Service", "in memory")]
        log.train(10, {"loss": 0.5, "gap": math.nan})
        log.evaluation(10, "test", {"loss": 0.25, "per_class": [1.0], "top": math.inf})
        log.train(20, {"loss": 0.125})
    rate = {"train/examples_per_second": service.got[2][2]["train/examples_per_second"]}
    assert service.got == [
        ("net", 10, {"train/loss": 0.5}),
        ("net", 10, {"test/loss": 0.25}),
        ("net", 20, {"train/loss": 0.125} | rate),
        ("net", "ended"),
    ]
    assert not said(recwarn)


def test_what_a_service_holds_it_is_not_told_again(tmp_path: Path) -> None:
    """It missed the second evaluation; then the run was killed at 30, and resumed from 20."""
    with make(tmp_path) as log:
        for step in (10, 20, 30):
            log.train(step, {"loss": float(step)})
            log.evaluation(step, "test", {"loss": -float(step)})
    service = Service(held={"train/loss": 30, "test/loss": 10})
    with make(tmp_path, service, first_step=20) as log:
        for step in (30, 40):
            log.train(step, {"loss": float(step)})
            log.evaluation(step, "test", {"loss": -float(step)})
    told = [(step, name, values[name]) for _, step, values in service.got[:-1] for name in values]
    losses = [(step, name, value) for step, name, value in told if name.endswith("loss")]
    assert losses == [
        (20, "test/loss", -20.0),
        (30, "test/loss", -30.0),
        (40, "train/loss", 40.0),
        (40, "test/loss", -40.0),
    ]


def test_steps_taken_again_are_told_from_where_they_are_new(tmp_path: Path) -> None:
    service = Service()
    with make(tmp_path / "net", service) as log:
        log.evaluation(10, "test", {"loss": 1.0})
        log.evaluation(20, "test", {"loss": 2.0})
        log.rewind(10)
        log.evaluation(20, "test", {"loss": 3.0})
        log.evaluation(30, "test", {"loss": 4.0})
    assert [step for _, step, *_ in service.got[:-1]] == [10, 20, 30]


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_service_that_fails_is_told_of_in_one_line(
    tmp_path: Path, when: str, error: type[BaseException], recwarn: pytest.WarningsRecorder
) -> None:
    def fails(call: str) -> None:
        if call == when:
            raise error("no way\nto the server")

    service = Service(fails)
    with make(tmp_path, service) as log:
        log.evaluation(10, "test", {"loss": 1.0})
        if when != "close":
            (sink,) = log._sinks.values()
            wait_for(lambda: not sink._thread.is_alive())  # type: ignore[attr-defined]
        log.evaluation(20, "test", {"loss": 1.0})
        log.evaluation(30, "test", {"loss": 1.0})
    assert said(recwarn) == ["Service is left out: no way"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_service_that_hangs_delays_no_line_and_is_left_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    never = threading.Event()
    service = Service(lambda call: never.wait(60) and None)
    began = time.monotonic()
    with make(tmp_path, service) as log:
        for step in range(1, 1001):
            log.evaluation(step, "test", {"loss": 1.0})
    assert time.monotonic() - began < 20  # it would wait for a minute
    assert said(recwarn) == ["Service has not taken all of the run: it is left now"]
    never.set()


def test_a_run_that_ends_by_an_error(tmp_path: Path) -> None:
    service = Service()
    with pytest.raises(RuntimeError), make(tmp_path / "net", service):
        raise RuntimeError
    assert service.got == [("net", "failed")]


def test_a_population_takes_turns_and_whoever_ends_last_waits_for_all(tmp_path: Path) -> None:
    service = Service(lambda call: time.sleep(0.02) if call == "close" else None)
    count = trackers.AT_ONCE + 9
    logs = [make(tmp_path / f"seed={i}", service, group="net") for i in range(count)]
    for log in logs:
        log.evaluation(10, "test", {"loss": 1.0})
    wait_for(lambda: len(service.open_now) == trackers.AT_ONCE)
    for log in logs:
        log.close()
    assert sorted(service.got, key=str) == sorted(
        [
            what
            for i in range(count)
            for what in [(f"seed={i}", 10, {"test/loss": 1.0}), (f"seed={i}", "ended")]
        ],
        key=str,
    )
    assert service.most == [trackers.AT_ONCE]


def test_a_service_out_of_reach_is_tried_once_for_a_population(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    tried = []

    def fails(call: str) -> None:
        tried.append(call)
        raise ConnectionError("no way")

    service = Service(fails)
    runs = [make(tmp_path / f"seed={i}", service) for i in range(5)]
    for log in runs:
        log.close()
    assert tried == ["open"]
    assert said(recwarn) == ["Service is left out: no way"]


# The experiment's field


def test_an_experiment_names_its_trackers() -> None:
    from dataclasses import replace

    ex = config.load(DIGITS).experiment
    assert ex.trackers is None
    assert config.load(DIGITS, ["trackers=()"]).experiment.trackers == ()
    kinds = (trackers.TensorBoard(), trackers.WandB("digits", mode="offline"))
    described = flatten(describe(replace(ex, trackers=kinds)))
    assert described["trackers.0"] == "TensorBoard" and described["trackers.1"] == "WandB"
    assert described["trackers.1.mode"] == "offline"
    with pytest.raises(ValueError, match="trackers: expected one W&B, not several"):
        replace(ex, trackers=(trackers.WandB("a"), trackers.WandB("b")))
    with pytest.raises(ValueError, match="expected online or offline"):
        trackers.WandB("a", mode="disabled")  # type: ignore[arg-type]


def test_a_package_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.MLflow, "package", "no_such_package")
    with pytest.raises(UserError, match="MLflow needs no_such_package: pip install mlflow"):
        trackers.check((trackers.TensorBoard(), trackers.MLflow("digits")))
    trackers.check(None)


def test_one_tracker_of_a_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Service is there twice: expected one of a kind"):
        make(tmp_path, Service(), Service())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(trackers.MLflow, "package", "some_package")
    assert not trackers.installed(trackers.MLflow("digits"))


# TensorBoard


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of the scalars in the newest file; and the start, without a name."""
    from tensorboardX.proto.event_pb2 import Event

    data = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns).read_bytes()
    found = []
    while data:  # records: length u64, its checksum u32, the event, its checksum u32
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        if event.HasField("session_log"):
            found.append((event.step, "", event.session_log.status))
        data = data[16 + length :]
    return found


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with Log(tmp_path, total_steps=9, examples_per_step=1, stream=io.StringIO()) as log:
        assert log.tracked == [("TensorBoard", str(tmp_path / "tensorboard"))]
        log.train(10, {"loss": 0.5})
        log.evaluation(10, "test", {"loss": 0.25, "per_class": [1.0]})
    start = 1  # SessionLog.START
    expected = [(1, "", start), (10, "train/loss", 0.5), (10, "test/loss", 0.25)]
    assert events(tmp_path / "tensorboard") == expected
    with make(tmp_path, trackers.TensorBoard(), first_step=10) as log:
        log.evaluation(20, "test", {"loss": 0.125})
    assert events(tmp_path / "tensorboard") == [(11, "", start), (20, "test/loss", 0.125)]
    with make(tmp_path) as log:
        assert log.tracked == [("TensorBoard", "off")]
    assert "tensorflow" not in sys.modules


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.TensorBoard, "package", "no_such_package")
    with Log(tmp_path, total_steps=9, examples_per_step=1, stream=io.StringIO()) as log:
        log.train(1, {"loss": 1.0})
        assert log.tracked == [("TensorBoard", "off (pip install tensorboardX to have it)")]
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(UserError, match="pip install"):
        make(tmp_path, trackers.TensorBoard())


def test_events_that_cannot_be_written_any_more(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("tensorboardX")
    with make(tmp_path, trackers.TensorBoard()) as log:
        log._sinks["TensorBoard"]._file = open("/dev/full", "wb")  # type: ignore[attr-defined]
        log.evaluation(10, "test", {"loss": 1.0})
        log.evaluation(20, "test", {"loss": 1.0})
        log.rewind(10)
    assert said(recwarn) == ["TensorBoard's events end at step 10: No space left on device"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


# Services, if they are installed


SCRIPT = """
import io, sys
from jaxeco import trackers
from jaxeco.log import Log

folder, first, *steps = sys.argv[1:]
kind = trackers.WandB("digits", mode="offline")
with Log(
    folder, total_steps=30, examples_per_step=1, first_step=int(first), trackers=(kind,),
    settings={"optimizer.lr": 0.1}, group="rates", stream=io.StringIO(),
) as log:
    for step in map(int, steps):
        log.evaluation(step, "test", {"loss": 1 / step})
        log.evaluation(step, "valid", {"loss": 2 / step})
"""


def test_wandb_offline(tmp_path: Path) -> None:
    """Each session leaves a file with the whole run, under the same id."""
    pytest.importorskip("wandb")
    folder = tmp_path / "lr=0.1"
    for words in ("0 10 20", "10 20 30"):  # killed after 20, resumed from 10
        command = [sys.executable, "-c", SCRIPT, str(folder), *words.split()]
        env = {**os.environ, "HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    assert len(files) == 2 and len({path.name for path in files}) == 1
    run, config, history = wandb_run(files[1])
    assert (run.project, run.run_group, run.display_name) == ("digits", "rates", "lr=0.1")
    assert config == {"optimizer.lr": 0.1}
    assert history == {
        step: {"test/loss": 1 / step, "valid/loss": 2 / step} for step in (10, 20, 30)
    }


def wandb_run(path: Path) -> tuple[Any, dict[str, Any], dict[int, dict[str, float]]]:
    """The run, its settings and its history by step, from W&B's file.

    That is LevelDB's log format, of W&B's records: a header of 7 bytes, then for each record its
    checksum u32, length u16 and type u8; type 1 is a whole one.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()[7:]
    run, config, history = None, {}, {}
    while data:
        size, kind = int.from_bytes(data[4:6], "little"), data[6]
        assert kind == 1 and len(data) < 2**15
        record, data = Record.FromString(data[7 : 7 + size]), data[7 + size :]
        if record.HasField("run"):
            run = record.run
            config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        if record.HasField("history"):
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            history[items["_step"]] = {k: v for k, v in items.items() if not k.startswith("_")}
    return run, {k: v for k, v in config.items() if not k.startswith("_")}, history


def test_mlflow(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    kind, settings = trackers.MLflow("digits", uri), {f"model.{i}": i for i in range(150)}
    for first, steps in ((0, (10, 20)), (10, (20, 30))):
        options: Any = {"first_step": first, "settings": settings, "group": "rates"}
        with make(tmp_path / "lr=0.1", kind, **options) as log:
            for step in steps:
                log.evaluation(step, "test", {"loss": 1 / step})
    assert not said(recwarn)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("lr=0.1", "FINISHED")
    assert run.data.tags["group"] == "rates"
    assert run.data.params == {name: str(value) for name, value in settings.items()}
    history = client.get_metric_history(run.info.run_id, "test/loss")
    assert [(point.step, point.value) for point in history] == [(s, 1 / s) for s in (10, 20, 30)]
    with pytest.raises(RuntimeError), make(tmp_path / "bad", kind):
        raise RuntimeError
    runs = client.search_runs([experiment.experiment_id], "attributes.run_name = 'bad'")
    assert [run.info.status for run in runs] == ["FAILED"]


def test_mlflow_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with make(tmp_path, trackers.MLflow("digits", "http://127.0.0.1:9")) as log:
        log.evaluation(10, "test", {"loss": 1.0})
    (line,) = said(recwarn)
    assert line.startswith("MLflow is left out: ") and "127.0.0.1" in line
