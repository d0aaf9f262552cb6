"""Where a run's scalars go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

An experiment names them in its field `trackers`:

    trackers=(trackers.TensorBoard(), trackers.WandB(project="digits", mode="offline"))

A tracker is a frozen description. It opens when its run starts, and the log hands it the finite
scalars of every line, as "split/metric". The services, W&B and MLflow, are served by a thread: one
that is slow or out of reach delays no step, and one that fails is left with a line that says so.
A service keeps what it has been told; a resumed run, or one that rolls back, tells it the rest.

Standard library only, until a run starts.
"""

import contextlib
import os
import platform
import queue
import secrets
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, Protocol

from jaxeco import hosts, storage
from jaxeco.errors import UserError

Scalars = Mapping[str, float]  # finite, by "split/metric"

AT_ONCE = 16  # runs of a process that a service has open; those of larger populations take turns
OPENING = 30  # s: so long a service may take to open a run,
CLOSING = 60  # to end one,
PATIENCE = 90  # and to do anything at all while only its rest is waited for


class Lost(Exception):
    """A tracker takes nothing more; the message says why, in one line."""


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run when it opens.

    Attributes:
      settings: the resolved experiment by dotted path.
      group: the population that the run is a member of, if it is.
      first_step: where this session begins.
      earlier: (step, scalars) of what is on record up to there, in order.
    """

    folder: Path
    settings: Mapping[str, Any]
    group: str | None
    first_step: int
    earlier: Sequence[tuple[int, Scalars]]

    @property
    def name(self) -> str:
        return self.folder.absolute().name


class Sink(Protocol):
    """A tracker that has been opened for a run.

    One that fails raises Lost, once, and does nothing from then on.
    """

    @property
    def where(self) -> str:
        """Where to look, for a person."""

    def write(self, step: int, scalars: Scalars) -> None: ...

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step."""

    def close(self, failed: bool) -> None: ...


class Tracker(Protocol):
    """Opens a sink for each run."""

    label: ClassVar[str]
    package: ClassVar[str]  # what to import
    install: ClassVar[str]  # what pip calls it

    def open(self, run: Run) -> Sink:
        """Raises UserError: the run's folder cannot be written."""


def check(trackers: Sequence[Tracker] | None) -> None:
    """Raises UserError, on all processes, if a tracker's package is not installed, or one is twice.

    Two of a kind would share what the run's folder keeps for it.
    """

    def missing() -> None:
        labels = [tracker.label for tracker in trackers or ()]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise UserError(f"trackers: {twice[0]} is there twice: expected one of a kind")
        for tracker in trackers or ():
            if not installed(tracker):
                needed = f"{tracker.label} needs {tracker.package}"
                raise UserError(f"{needed}: pip install {tracker.install}")

    hosts.led(missing)


def installed(tracker: Tracker) -> bool:
    spec = find_spec(tracker.package)
    return spec is not None and spec.origin is not None  # None: a mere folder, as W&B makes one


# TensorBoard


@dataclass(frozen=True)
class TensorBoard:
    """Events in the run's folder; what an experiment has, where tensorboardX is installed."""

    label: ClassVar[str] = "TensorBoard"
    package: ClassVar[str] = "tensorboardX"
    install: ClassVar[str] = "tensorboardX"

    def open(self, run: Run) -> "_Events":
        return _Events(run.folder / "tensorboard", run.first_step)


class _Events:
    """Events in a file of their own, written at once.

    tensorboardX's own writers hand them to a thread that ends at the first error of storage, after
    which whoever fills its queue waits for ever; or wait for the disk after each line.
    """

    def __init__(self, folder: Path, first_step: int):
        self.where = str(folder)
        self._folder = folder
        self._file: BinaryIO | None = None
        self._begin(first_step)

    def write(self, step: int, scalars: Scalars) -> None:
        from tensorboardX.summary import scalar

        if self._file is None:
            return
        try:
            for name, value in scalars.items():
                self._event(step=step, summary=scalar(name, value))
            self._file.flush()
        except OSError as error:
            self._file = None
            raise Lost(f"TensorBoard's events end at step {step:,}: {error.strerror}") from error

    def rewind(self, step: int) -> None:
        if self._file is not None:
            self.close(failed=False)
            self._begin(step)

    def close(self, failed: bool) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # every event was flushed, and complained of if not
                self._file.close()
            self._file = None

    def _begin(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{step}"
        with storage.explained(f"cannot write {self._folder}"):
            storage.make_folder(self._folder)
            self._file = file = (self._folder / name).open("ab")
            self._event(file_version="brain.Event:2")
            # Readers drop what an earlier attempt wrote beyond the restored step.
            self._event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
            file.flush()

    def _event(self, **fields: Any) -> None:
        """Writes an event as TFRecord has it: length, event, and the checksum of each."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        assert self._file is not None
        event = Event(wall_time=time.time(), **fields).SerializeToString()
        for data in (struct.pack("<Q", len(event)), event):
            self._file.write(data + struct.pack("<I", masked_crc32c(data)))


# Services


class Session(Protocol):
    """A run that a service has open. Its calls may take long, and raise anything."""

    def write(self, lines: Sequence[tuple[int, Scalars]]) -> None: ...

    def close(self, failed: bool) -> None: ...


# A session, and for each name the last step that the service holds already.
Opened = tuple[Session, defaultdict[str, int]]


@dataclass(frozen=True)
class WandB:
    """Weights & Biases: a run in a project; a population is a group of such runs.

    Offline, each session of a run leaves the whole of it in the run's folder, for `wandb sync`.
    Whoever is not logged in (`wandb login`, or $WANDB_API_KEY) is told so by one line.
    """

    project: str
    entity: str | None = None  # a team; None: as the account says
    mode: Literal["online", "offline"] = "online"

    label: ClassVar[str] = "W&B"
    package: ClassVar[str] = "wandb"
    install: ClassVar[str] = "wandb"

    def __post_init__(self) -> None:
        if self.mode not in ("online", "offline"):
            raise ValueError(f"mode={self.mode!r}: expected online or offline")

    def open(self, run: Run) -> "Courier":
        where = f"project {self.project}, {self.mode}"
        where += f" in {run.folder / 'wandb'}" if self.mode == "offline" else ""
        return Courier(self, where, run.earlier, partial(_WandBSession.opened, self, run))


class _WandBSession:
    def __init__(self, run: Any):
        self._run = run

    @classmethod
    def opened(cls, tracker: WandB, run: Run) -> Opened:
        import wandb

        path = run.folder / "wandb.id"
        known = storage.read_text(path) if path.exists() else None
        name = known or secrets.token_hex(8)
        online = tracker.mode == "online"
        wandb.setup(wandb.Settings(silent=True))  # or it asks for a key where a run is shown
        opened = wandb.init(
            project=tracker.project,
            entity=tracker.entity,
            mode=tracker.mode,
            id=name,
            resume="allow" if online else None,
            reinit="create_new",  # members of a population are open at the same time
            name=run.name,
            group=run.group,
            dir=str(run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                init_timeout=OPENING,
                finish_timeout=CLOSING,
                finish_timeout_raises=True,
                x_disable_stats=run.group is not None,  # of the machine, which members share
            ),
        )
        if known is None:
            storage.write_whole(path, name)
        held = max(0, opened.starting_step - 1) if online else 0
        return cls(opened), defaultdict(lambda: held)

    def write(self, lines: Sequence[tuple[int, Scalars]]) -> None:
        for step, scalars in lines:
            self._run.log(dict(scalars), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@dataclass(frozen=True)
class MLflow:
    """MLflow: a run of an experiment; a population's have a tag, "group", in common.

    A password does not belong into `uri`, which the run's record shows, but into MLflow's
    environment variables.
    """

    experiment: str
    uri: str | None = None  # "sqlite:///runs/mlflow.db", say; None: as $MLFLOW_TRACKING_URI says

    label: ClassVar[str] = "MLflow"
    package: ClassVar[str] = "mlflow"
    install: ClassVar[str] = "mlflow"

    def open(self, run: Run) -> "Courier":
        where = f"experiment {self.experiment}" + (f" at {self.uri}" if self.uri else "")
        return Courier(self, where, run.earlier, partial(_MLflowSession.opened, self, run))


class _MLflowSession:
    # its own is two minutes a call, seven more attempts, and two lines as a run ends
    ENVIRONMENT: ClassVar = {
        "HTTP_REQUEST_TIMEOUT": "15",
        "HTTP_REQUEST_MAX_RETRIES": "2",
        "SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    METRICS, PARAMS = 1000, 100  # that MLflow takes in one call
    LONGEST = 500  # letters of a parameter's value

    def __init__(self, client: Any, run: str):
        self._client, self._run = client, run

    @classmethod
    def opened(cls, tracker: MLflow, run: Run) -> Opened:
        for name, value in cls.ENVIRONMENT.items():
            os.environ.setdefault(f"MLFLOW_{name}", value)
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=tracker.uri)
        path = run.folder / "mlflow.id"
        if path.exists():
            name = storage.read_text(path)
            try:
                names = client.get_run(name).data.metrics
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # as where the uri is another
                    raise
            else:
                client.update_run(name, status="RUNNING")
                held = {
                    metric: max(point.step for point in client.get_metric_history(name, metric))
                    for metric in names
                }
                return cls(client, name), defaultdict(int, held)
        where = _experiment(client, tracker.experiment)
        tags = {"group": run.group} if run.group else {}
        name = client.create_run(where, run_name=run.name, tags=tags).info.run_id
        params = [Param(key, str(value)[: cls.LONGEST]) for key, value in run.settings.items()]
        for some in _parts(params, cls.PARAMS):
            client.log_batch(name, params=some)
        storage.write_whole(path, name)
        return cls(client, name), defaultdict(int)

    def write(self, lines: Sequence[tuple[int, Scalars]]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        points = [Metric(k, v, now, step) for step, scalars in lines for k, v in scalars.items()]
        for some in _parts(points, self.METRICS):
            self._client.log_batch(self._run, metrics=some)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _experiment(client: Any, name: str) -> str:
    """The id of MLflow's experiment with this name, made where there is none."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return client.create_experiment(name)
        except MlflowException:
            if (found := client.get_experiment_by_name(name)) is None:
                raise  # and no other process was quicker
    return found.experiment_id


def _parts(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    return [items[i : i + most] for i in range(0, len(items), most)]


class Courier:
    """Hands a run's scalars to a service in a thread of its own, in their order.

    Of the couriers of a process, AT_ONCE have a session at a time, and they open one after another.
    Once a tracker could not be opened, no other run of the process tries it again. Whoever is
    closed last waits for the rest of all, as long as something moves.

    Args:
      where: to look, for a person.
      earlier: what the service should hold from before; it is told what it does not.
      session: opens the service.
    """

    _turn = threading.BoundedSemaphore(AT_ONCE)
    _opening = threading.Lock()
    _given_up: ClassVar[set[Tracker]] = set()
    _open: ClassVar[list["Courier"]] = []  # that may still be told something
    _closing: ClassVar[list["Courier"]] = []  # that have been told all, and may not be done
    _moved: ClassVar[float] = 0.0  # when one of them last got something done

    def __init__(
        self,
        tracker: Tracker,
        where: str,
        earlier: Sequence[tuple[int, Scalars]],
        session: Callable[[], Opened],
    ):
        self.where = where
        self._tracker, self._session = tracker, session
        self._lost = ""  # why it ended early, until that is said
        self._lines: queue.SimpleQueue[tuple[int, Scalars] | bool] = queue.SimpleQueue()
        for line in earlier:
            self._lines.put(line)
        self._thread = threading.Thread(target=self._serve, name=tracker.label, daemon=True)
        self._thread.start()
        Courier._open.append(self)

    def write(self, step: int, scalars: Scalars) -> None:
        if self._thread.is_alive():
            self._lines.put((step, scalars))
        self._complain()

    def rewind(self, step: int) -> None:
        """Nothing: what comes again, the service holds already."""

    def close(self, failed: bool) -> None:
        self._lines.put(failed)
        Courier._open.remove(self)
        Courier._closing.append(self)
        if not Courier._open:
            Courier._moved = time.monotonic()
            rest, Courier._closing = Courier._closing, []
            while late := sum(courier._thread.is_alive() for courier in rest):
                if time.monotonic() > Courier._moved + PATIENCE:
                    runs = f"{late} runs" if late > 1 else "the run"
                    raise Lost(f"{self._tracker.label} has not taken all of {runs}: it is left now")
                time.sleep(0.05)
            for courier in rest:
                courier._complain()
        self._complain()

    def _complain(self) -> None:
        if self._lost:
            why, self._lost = self._lost, ""
            raise Lost(why)

    def _serve(self) -> None:
        try:
            with Courier._turn:
                if (opened := self._opened()) is not None:
                    self._deliver(*opened)
        except BaseException as error:  # whatever a service can think of, sys.exit too
            self._lost = f"{self._tracker.label} is left out: {storage.reason(error)}"

    def _opened(self) -> Opened | None:
        with Courier._opening:
            if self._tracker in Courier._given_up:
                return None
            try:
                return self._session()
            except BaseException:
                Courier._given_up.add(self._tracker)
                raise
            finally:
                Courier._moved = time.monotonic()

    def _deliver(self, session: Session, held: defaultdict[str, int]) -> None:
        failed = None
        while failed is None:
            lines, failed = self._waiting()
            news = []
            for step, scalars in lines:
                if fresh := {name: v for name, v in scalars.items() if step > held[name]}:
                    held.update(dict.fromkeys(fresh, step))
                    news.append((step, fresh))
            if news:
                session.write(news)
                Courier._moved = time.monotonic()
        session.close(failed)
        Courier._moved = time.monotonic()

    def _waiting(self) -> tuple[list[tuple[int, Scalars]], bool | None]:
        """All lines that wait, at least one, or how the run ended: whether it failed."""
        lines: list[tuple[int, Scalars]] = []
        item = self._lines.get()
        while not isinstance(item, bool):
            lines.append(item)
            try:
                item = self._lines.get_nowait()
            except queue.Empty:
                return lines, None
        return lines, item
