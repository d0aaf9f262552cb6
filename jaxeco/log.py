"""What a run says: to `metrics.jsonl`, to trackers such as TensorBoard, and on the terminal.

`metrics.jsonl` holds one JSON object a line:

    {"step": 100, "split": "train", "time": 12.3, "loss": 1.9, "accuracy": 0.31, ...}
    {"step": 390, "split": "test", "time": 45.6, "loss": 1.2, "per_class_accuracy": [0.6, ...], ...}

"time" is in seconds since the run was first started, without the pauses between being stopped and
resumed. Training lines also carry "examples_per_second", and of text "tokens_per_second"; of data
that is read meanwhile "data_wait", the share of the time in which the devices had to wait for it;
with a guard "skipped" steps, or how often the run was "rolled_back", since it began. JSON has
no NaN and no infinity: they are written as null, and come back as NaN from `read_metrics`.
"""

import json
import math
import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from jaxeco import hosts, storage
from jaxeco import trackers as kinds
from jaxeco.errors import UserError

FILE = "metrics.jsonl"
COUNTS = ("skipped", "rolled_back")  # what a guard has done so far
PACE = re.compile("step|time|learning_rate|data_wait|.*_per_second")  # in the log, but no result
NOTICED = 0.1  # share of the time spent waiting for data of which a person should know
WIDTH = 80  # columns that every line and table fits into, where its words allow


class Log:
    """Records one run, and shows it. Use it as a context manager, or `close()` it.

    Of several processes only the first writes and shows anything; what is on record, all know.

    On a terminal the progress is one live line; elsewhere, plain lines at most every two seconds.

    Args:
      folder: of the run; made if it does not exist.
      total_steps: where training ends.
      first_step: where it begins: the restored step. Lines beyond it are cut from the file, so that
        curves never overlap; 0 begins anew.
      examples_per_step: to turn steps into examples per second.
      trackers: are handed the same scalars; None: TensorBoard, where tensorboardX is installed.
      settings: of the experiment, by dotted path, for trackers.
      group: the population that the run is a member of, for trackers.
      unit, units: what a rate counts, and how many of it an example has: ("tokens", 256).
      stream: where the terminal's lines go; standard output if not given.

    Raises:
      UserError: `folder` cannot be written, or a tracker's package is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        total_steps: int,
        examples_per_step: int,
        first_step: int = 0,
        trackers: Sequence[kinds.Tracker] | None = None,
        settings: Mapping[str, Any] | None = None,
        group: str | None = None,
        unit: str = "examples",
        units: int = 1,
        stream: TextIO | None = None,
    ):
        self.path = Path(folder) / FILE
        self._total, self._unit, self._units = total_steps, unit, units
        self._examples = examples_per_step
        self._stream = sys.stdout if stream is None else stream
        if not hosts.first():
            self._stream, trackers = open(os.devnull, "w"), ()
        elif trackers is None:
            trackers = [kinds.TensorBoard()] if kinds.installed(kinds.TensorBoard()) else []
        kinds.check(trackers)
        earlier = self._begin(first_step)
        self._began = time.monotonic() - max((found["time"] for *_, found in earlier), default=0.0)
        told = [(step, _named(split, found)) for step, split, found in earlier]
        run = kinds.Run(self.path.parent, settings or {}, group, first_step, told)
        self._sinks = {tracker.label: tracker.open(run) for tracker in trackers}
        self._live = _Live(self._stream, total_steps) if _is_terminal(self._stream) else None
        # of every evaluation on record, by (step, split)
        self._scalars = {(step, split): found for step, split, found in earlier}
        self._printed = -math.inf
        self._mark: tuple[int, float] | None = None  # where the present stretch of training began
        self._start: tuple[int, float] | None = None  # where training began, once compiled
        self._rate: float | None = None  # examples per second

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)

    @property
    def tracked(self) -> list[tuple[str, str]]:
        """The trackers, and where each shows the run; for the start-up summary."""
        rows = [(label, sink.where) for label, sink in self._sinks.items()]
        missing = not kinds.installed(kinds.TensorBoard())
        hint = " (pip install tensorboardX to have it)" if missing else ""
        return rows or [("TensorBoard", f"off{hint}")]

    def mark(self, step: int) -> None:
        """Restarts the clock of the rate: what passed before is not training (a compilation, say).

        Done by every `evaluation`; call it when the first step is through.
        """
        now = time.monotonic()
        self._mark = (step, now)
        self._start = self._start or self._mark

    def rewind(self, step: int) -> None:
        """Forgets what is on record beyond `step`, from where the run goes on."""
        self._file.close()
        self._begin(step)
        self._scalars = {at: found for at, found in self._scalars.items() if at[0] <= step}
        self._track(lambda sink: sink.rewind(step))
        self._mark = self._start = None

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Records what training has come to: `values` averaged over the steps since the last call.

        The rate is measured from one call to the next, so that the first has none.
        """
        now = time.monotonic()
        if self._mark is not None and step > self._mark[0] and now > self._mark[1]:
            self._rate = (step - self._mark[0]) * self._examples / (now - self._mark[1])
        rate = {}
        if self._rate is not None:
            per_example = {"examples": 1, self._unit: self._units}
            rate = {f"{u}_per_second": round(self._rate * n, 3) for u, n in per_example.items()}
        self.mark(step)
        self._write(step, "train", {**values, **rate})
        if self._live is not None:
            self._live.show(step, self._line(step, values))
        elif now - self._printed >= 2 or step >= self._total:
            self._printed = now
            self._print(self._line(step, values))

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Records an exact evaluation. Lists and matrices go to the file only."""
        self._write(step, split, values)
        self._scalars[step, split] = _scalars(values)
        shown = [f"{split} at step {step:,}", *_fields(values)]
        self._print(_fit(shown))
        self.mark(step)

    def evaluated(self, step: int, split: str) -> bool:
        """Whether an evaluation of `split` at this step is on record, of whatever session."""
        return (step, split) in self._scalars

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every evaluation on record that has "split/metric", in order."""
        split, _, metric = name.rpartition("/")
        return sorted(
            (step, found[metric])
            for (step, of), found in self._scalars.items()
            if of == split and metric in found
        )

    def note(self, text: str) -> None:
        """Says something in passing."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Says something that ought to be noticed."""
        self._print(f"warning: {text}")

    def table(self, title: str, rows: Sequence[Sequence[object]]) -> None:
        """Prints rows of cells below a title, in columns; the last column wraps."""
        self._print(table(title, rows) + "\n")

    def finished(self) -> None:
        """Ends the live line: training is over, and what comes now are plain lines."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def close(self, failed: bool = False) -> None:
        """Ends the live line and closes the files. May be called twice.

        Args:
          failed: the run ends by an error, which trackers show.
        """
        self.finished()
        self._track(lambda sink: sink.close(failed))
        self._sinks = {}
        with suppress(OSError):  # every line was flushed, and raised if it could not be
            self._file.close()

    def _begin(self, step: int) -> list[tuple[int, str, dict[str, float]]]:
        """Cuts the file at `step` and opens it; (step, split, scalars) of every line that stays."""

        def cut() -> list[Any]:
            with self._writing():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lines = _cut(self.path, step)
            return [(line["step"], line["split"], _scalars(line)) for line in lines]

        kept = hosts.led(cut)
        with self._writing():
            path = self.path if hosts.first() else Path(os.devnull)
            self._file = path.open("a", encoding="utf-8")
        return kept

    def _write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        line = {"step": step, "split": split, "time": seconds}
        line |= {name: _plain(np.asarray(value).tolist()) for name, value in values.items()}
        with self._writing():
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            storage.persistent(self._file.flush)()
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise UserError(f"{self.path} was removed while the run wrote it: start anew")
        named = _named(split, _scalars(values))
        self._track(lambda sink: sink.write(step, named))

    def _track(self, action: Callable[[kinds.Sink], None]) -> None:
        for sink in self._sinks.values():
            try:
                action(sink)
            except kinds.Lost as lost:
                warnings.warn(str(lost), stacklevel=2)  # heard of a member of a population, too

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; "
                "make room or give a folder that can be written"
            ) from error

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        quiet = ("learning_rate", "data_wait")
        shown = {k: v for k, v in values.items() if k not in quiet and (k not in COUNTS or v)}
        fields = _fields(shown)
        last = []
        if self._rate is not None:
            last.append(f"{self._rate * self._units:,.0f} {self._unit}/s")
        if self._start is not None and step > self._start[0]:
            per_step = (time.monotonic() - self._start[1]) / (step - self._start[0])
            last.append(f"{_clock(per_step * (self._total - step))} left")
        if (wait := values.get("data_wait", 0.0)) >= NOTICED:
            last.append(f"waits for data {wait:.0%}")
        done = f"step {step:,}/{self._total:,}"
        return _fit([done, *fields], last, self._live.width if self._live else WIDTH)

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.print(text)
            return
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:  # nobody reads any more, as behind `| head`; the run goes on
            self._stream = open(os.devnull, "w")
            os.dup2(self._stream.fileno(), sys.stdout.fileno())


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; null becomes NaN.

    A half line, as a killed run may leave it, is passed over. Of two lines for the same step and
    split (a run stopped between an evaluation and its checkpoint evaluates again) the later counts.

    Raises:
      UserError: there is no such file.
    """
    path = Path(folder) / FILE
    lines = _lines(path)
    if lines is None:
        raise UserError(f"no {FILE} in {folder}: expected the folder of a run")
    latest = {(line["step"], line["split"]): line for line in lines}
    return [
        {name: _nan(value) for name, value in line.items()}
        for line in lines
        if latest[line["step"], line["split"]] is line
    ]


def table(title: str, rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells below a title, in aligned columns: numbers to the right, the last one wraps."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = max(map(len, cells), default=0)
    cells = [row + [""] * (columns - len(row)) for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(columns)]
    numeric = [
        columns > 2 and i > 0 and _numeric([row[i] for row in cells[1:]]) for i in range(columns)
    ]
    lines = [title, "-" * len(title)]
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric)
        ]
        line = "  ".join(padded).rstrip()
        indent = sum(widths[:-1]) + 2 * (columns - 1)
        if len(line) > WIDTH and indent < WIDTH // 2:
            line = textwrap.fill(
                row[-1],
                WIDTH,
                initial_indent="  ".join([*padded[:-1], ""]),
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        lines.append(line)
    return "\n".join(lines)


# The file


def _lines(path: Path) -> list[dict[str, Any]] | None:
    """What can be read of the file; None if there is none."""
    try:
        with storage.explained(f"cannot read {path}"):
            text = storage.persistent(path.read_text)(encoding="utf-8", errors="replace")
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    lines = []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        match line:
            case {"step": int(), "split": str(), "time": int() | float()}:
                lines.append(line)
    return lines


@storage.persistent
def _cut(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Drops from the file what lies beyond `first_step`, and returns what stays."""
    lines = _lines(path)
    if lines is None:
        return []
    kept = [line for line in lines if first_step and line["step"] <= first_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nan(value: Any) -> Any:
    if isinstance(value, list):
        if value and isinstance(value[0], int) and None not in value:  # a row of counts: quickly
            return value
        return [_nan(item) for item in value]
    return math.nan if value is None else value


# The terminal


class _Live:
    """One line at the bottom of a terminal that is written anew; other output goes above it."""

    def __init__(self, stream: TextIO, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10),
            console=Console(file=stream, highlight=False),
            auto_refresh=False,  # no thread of its own: it is drawn when there is news
            transient=True,
        )
        self._task = self._progress.add_task("compiling", total=total)
        self._drawn = -math.inf
        self._progress.start()

    def show(self, step: int, line: str) -> None:
        self._progress.update(self._task, completed=step, description=line)
        if time.monotonic() - self._drawn >= 0.1:
            self._drawn = time.monotonic()
            self._progress.refresh()

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)
        self._progress.refresh()

    @property
    def width(self) -> int:
        """Columns for the text beside the bar."""
        return self._progress.console.width - 12

    def stop(self) -> None:
        self._progress.stop()


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _fields(values: Mapping[str, Any]) -> list[str]:
    """["loss 0.4321", "accuracy 86.12 %", ...] of the scalars."""
    scalars = _scalars(values).items()
    return [f"{name.replace('_', ' ')} {_say(name, value)}" for name, value in scalars]


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """What is a number, or the null that stands for NaN."""
    return {
        name: math.nan if value is None else float(value)
        for name, value in values.items()
        if np.ndim(value) == 0 and not isinstance(value, str)
    }


def _named(split: str, scalars: Mapping[str, float]) -> dict[str, float]:
    """Those that are finite, as trackers are handed them."""
    return {
        f"{split}/{name}": value
        for name, value in scalars.items()
        if name not in ("step", "time") and math.isfinite(value)
    }


def _say(name: str, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if name in COUNTS:
        return f"{value:.0f}"
    if "accuracy" in name or name.startswith("top"):
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _fit(fields: Sequence[str], last: Sequence[str] = (), width: int = WIDTH) -> str:
    """What fits on a line: first `fields` beyond the third go, then `last`, from its beginning."""
    kept, tail = list(fields), list(last)
    while len("  ".join([*kept, *tail])) >= width and (len(kept) > 3 or tail):
        if len(kept) > 3:
            kept.pop()
        else:
            tail.pop(0)
    return "  ".join([*kept, *tail])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _numeric(cells: Sequence[str]) -> bool:
    return bool(cells) and all(not cell or cell[0] in "-+.0123456789" for cell in cells)
