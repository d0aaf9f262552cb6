"""What slows a run down without a word: programs compiled anew, and devices that wait for data."""

import logging
import threading
import time
from types import TracebackType
from typing import Any, Self

import jax

from jaxeco.data.pipeline import Feed, Fields
from jaxeco.log import NOTICED, Log

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of jax.monitoring
LOWERING = logging.getLogger("jax._src.interpreters.pxla")  # where JAX tells of shapes
MOST = 5  # warnings of compilations; further ones are counted


class Watch:
    """Stands beside the loop of one run. Use it as a context manager.

    What is done for the first time may compile. Compiling where the same was done before is told
    with the shapes that are new: those of a call, of an evaluation, of what a user's code does.
    Lengths of calls follow from the experiment alone, so that each may compile once.

    Of data that is read while the run goes on, it measures how long the devices had nothing to do
    because it was not there yet.
    """

    def __init__(self, log: Log, feed: Feed) -> None:
        self._log, self._feed = log, feed
        self._lowered: dict[int, tuple[str, list[str]]] = {}  # by thread: what it compiles now
        self._shapes: dict[str, list[str]] = {}  # by function: shapes of its latest program
        self._new: list[tuple[float, str]] = []  # compilations since `compiled` was asked
        self._done: set[str] = set()
        self._again: list[float] = []  # seconds of every compilation that was not expected
        self._running: Any = None  # of the latest call: an array of its results
        self._calls = 0
        self._pace = 0.0  # seconds a step takes the devices
        self._sent = self._busy = 0.0  # when the latest call began; when it ends, by that pace
        self._waited, self._since = 0.0, time.perf_counter()
        self._total_waited = self._total = 0.0

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self._level, self._propagate = LOWERING.level, LOWERING.propagate
        LOWERING.addFilter(self._on_record)
        LOWERING.setLevel(logging.DEBUG)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        LOWERING.setLevel(self._level)
        LOWERING.removeFilter(self._on_record)
        if error is None:
            self._sum_up()

    # Compilations

    def compiled(self, doing: str, step: int, steps: int = 0) -> None:
        """Tells of what was compiled since the last time this was asked.

        Args:
          doing: what the run has just done. What it does for the first time may compile.
          step: steps taken before.
          steps: of a call: how many it took.
        """
        known = doing in self._done
        self._done.add(doing)
        if not self._new:
            return
        new, self._new = self._new, []
        if known:
            for seconds, what in new:
                self._again.append(seconds)
                if len(self._again) <= MOST:
                    self._log.warn(
                        f"compiled anew after step {step:,}, for {doing}: {what}; {seconds:.2f} s"
                    )
        elif steps and self._calls > 1:
            seconds = sum(seconds for seconds, _ in new)
            self._log.note(f"compiled {doing} after step {step:,}: {seconds:.2f} s")

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            name, shapes = self._lowered.pop(threading.get_ident(), ("a function", []))
            before = self._shapes.get(name)
            self._shapes[name] = shapes
            self._new.append((duration_secs, f"{name} of {_differences(before, shapes)}"))

    def _on_record(self, record: logging.LogRecord) -> bool:
        """Reads what JAX says of a program before it is compiled. Shows no more than was shown."""
        args: Any = record.args
        if record.msg.startswith("Compiling %s with global shapes"):
            name, avals = args[:2]
            shapes = [f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in avals]
            self._lowered[threading.get_ident()] = (str(name), shapes)
        return record.levelno >= max(self._level, logging.WARNING)

    # Data

    def fed(self, step: int, n: int) -> Fields:
        """`Feed.fed`, with an eye on the clock."""
        if self._feed.resident:
            return self._feed.fed(step, n)
        asked = time.perf_counter()
        fed = self._feed.fed(step, n)
        now = time.perf_counter()
        if self._running is None or self._running.is_ready():
            self._waited += max(0.0, now - max(asked, self._busy))
        self._sent, self._busy = now, max(self._busy, now) + n * self._pace
        return fed

    def called(self, step: int, n: int, sums: Any) -> None:
        """Is told of each call as soon as it is on its way; may wait for the second."""
        self._calls += 1
        self._running = sums["loss"].total
        if self._calls == 2 and not self._feed.resident:  # the first one's time was compilation
            jax.block_until_ready(sums)
            self._pace = (time.perf_counter() - self._sent) / n
        self.compiled(f"calls of {n} steps" if n > 1 else "calls of one step", step, n)

    def mark(self) -> None:
        """Restarts the clock: what passed before was no training."""
        self._waited, self._since = 0.0, time.perf_counter()

    def waiting(self) -> dict[str, float]:
        """{"data_wait": share of the time since `mark`, or the last line} of data that is read."""
        if self._feed.resident:
            return {}
        waited, elapsed = self._waited, time.perf_counter() - self._since
        self._total_waited, self._total = self._total_waited + waited, self._total + elapsed
        self.mark()
        return {"data_wait": round(min(1.0, waited / elapsed), 4)}

    def _sum_up(self) -> None:
        if len(self._again) > MOST:
            self._log.warn(
                f"compiled anew {len(self._again)} times, {sum(self._again):.1f} s in all: give"
                " what varies in shape one shape, by padding"
            )
        if self._total_waited > max(1.0, NOTICED * self._total):
            gib = self._feed.dataset.nbytes / 2**30
            self._log.note(
                f"{self._total_waited / self._total:.0%} of the training time went by waiting for"
                f" data: resident_gib={gib * 1.01:.2g} would keep it on the devices, if they have"
                " room; read_workers lets more processes decode it"
            )


def _differences(before: list[str] | None, shapes: list[str], most: int = 3) -> str:
    """Which shapes a program is new for."""
    if before is None or len(before) != len(shapes) or before == shapes:
        told = shapes
    else:
        told = [f"{new} (was {old})" for old, new in zip(before, shapes) if old != new]
    return ", ".join(told[:most] + ["..."] * (len(told) > most)) or "no arguments"
