"""A profile of a few steps of a run: a trace to look at, and a table of what they spend time on.

The run is the same as without. In its folder, `profile/` is a folder that TensorBoard opens (with
its profile plug-in); the trace.json.gz in it, https://ui.perfetto.dev does; `operations.csv` is the
whole of the table, of which the terminal shows ten rows.
"""

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from jaxeco import hosts, timeline
from jaxeco.errors import UserError
from jaxeco.log import Log
from jaxeco.plan import Plan
from jaxeco.timeline import Operation, Usage

FOLDER = "profile"
STEPS = 10  # that a profile has, at least, where nothing else is said
SHOWN = 10  # rows of the table in the terminal


@dataclass(frozen=True)
class Window:
    """Steps to profile. Nothing compiles, evaluates or saves between its steps."""

    timed: int  # first of the steps just before, which are only timed
    first: int
    end: int  # the step after the last


def window(plan: Plan, first: int, end: int, asked: Sequence[int]) -> Window:
    """What to profile in a session that trains from step `first` to `end`.

    A call of a length that has not run before compiles; so a stretch that can be profiled consists
    of calls whose length is known, without an evaluation or a checkpoint between. If nothing is
    asked for, it is the end of the first stretch of 2 * STEPS steps, or of the longest that there
    is.

    Raises:
      UserError: there is no such stretch, or it does not hold what is asked for.
    """
    ex, epoch = plan.ex, plan.steps_per_epoch
    pauses = ex.eval_every.steps(epoch), ex.save_every.steps(epoch)
    stretches: list[list[int]] = [[]]  # of each, where its calls begin and end
    known: set[int] = set()
    step = first
    while step < end:
        n = plan.call_length(step, end)
        if n not in known:
            known.add(n)
            stretches.append([])
        elif not stretches[-1] or any(step % every == 0 for every in pauses):
            stretches.append([step, step + n])
        else:
            stretches[-1].append(step + n)
        step += n
        if not asked and stretches[-1] and step - stretches[-1][0] >= 2 * STEPS:
            break
    stretches = [ends for ends in stretches if ends]
    if not stretches:
        raise UserError(
            f"--profile: steps {first} to {end} have no call but those that compile: train for more"
            " steps, or set a smaller steps_per_call"
        )
    if not asked:
        chosen = max(stretches, key=lambda ends: ends[-1] - ends[0])
        last = chosen[-1]
        begin = max((at for at in chosen if last - at >= STEPS), default=chosen[0])
    else:
        begin, last = asked
        whole = [ends for ends in stretches if begin in ends and last in ends]
        if not whole:
            raise UserError(f"--profile {begin}:{last}: {_instead(stretches, begin)}")
        chosen = whole[0]
    timed = max((at for at in chosen if begin - at >= last - begin), default=chosen[0])
    return Window(timed, begin, last)


def _instead(stretches: Sequence[Sequence[int]], begin: int) -> str:
    """What can be profiled in the place of steps that cannot: the nearest, as they lie together."""
    near = min(stretches, key=lambda ends: max(ends[0] - begin, begin - ends[-2]))
    first = max((at for at in near[:-1] if at <= begin), default=near[0])
    last = min((at for at in near if at >= first + STEPS), default=near[-1])
    return (
        "expected steps of this session, in whole calls that do not compile and between which it"
        f" neither evaluates nor saves, such as {first}:{last}"
    )


class Profile:
    """Stands beside the loop of one run, and profiles its window. Use it as a context manager.

    Of several processes each writes a trace of its devices, and the first shows its own.
    """

    def __init__(self, window: Window, plan: Plan, folder: Path, log: Log) -> None:
        self._window, self._plan, self._log = window, plan, log
        self._folder = folder / FOLDER
        if hosts.count() > 1:
            self._folder /= f"process-{hosts.index()}"
        self._since: float | None = None  # when the steps that are timed began
        self._before: float | None = None  # ms a step, not profiled
        self._tracing = self._done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tracing:
            self._give_up("the run ended within them")
        elif not self._done:
            self._give_up("the run ended before them")

    def went_back(self, step: int) -> None:
        """Is told that the run goes on from an earlier step."""
        self._since = None
        if self._tracing:
            self._give_up(f"the run went back to step {step}")

    def _give_up(self, why: str) -> None:
        at = self._window
        self._log.warn(f"no profile of steps {at.first} to {at.end}: {why}")
        self._done = True
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def begins(self, step: int, state: Any) -> None:
        """Is told before each call."""
        at = self._window
        if self._done or step not in (at.timed, at.first):
            return
        jax.block_until_ready(state)
        now = time.perf_counter()
        if step == at.first:
            if self._since is not None:
                self._before = 1e3 * (now - self._since) / (at.first - at.timed)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # an event for each function would slow the host down
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._tracing = True
        self._since = time.perf_counter()

    def ended(self, step: int, state: Any) -> bool:
        """Is told after each call. Whether it was the window's last: then time has gone by."""
        at = self._window
        if not self._tracing or self._since is None or step < at.end:
            return False
        jax.block_until_ready(state)
        ms = 1e3 * (time.perf_counter() - self._since) / (at.end - at.first)
        self._tracing, self._done = False, True
        try:
            jax.profiler.stop_trace()
            self._tell(ms)
        except (OSError, RuntimeError, ValueError) as error:  # the run goes on
            said = " ".join(str(error).split())
            self._log.warn(f"no profile of steps {at.first} to {at.end}: {said}")
        return True

    def _tell(self, ms: float) -> None:
        """Reads the trace and shows what is in it."""
        traces = self._folder.glob("plugins/profile/*/*.xplane.pb")
        path = max(traces, key=lambda path: path.stat().st_mtime_ns)
        spans = timeline.read(jax.profiler.ProfileData.from_file(str(path)))
        if not spans:
            raise ValueError(f"no operation was found in the trace, {path}")
        client = self._plan.mesh.local_devices[0].client
        modules = [executable.hlo_modules()[0] for executable in client.live_executables()]
        programs = ((module.name, module.to_string()) for module in modules)
        at = self._window
        used = timeline.usage(spans, programs, ms, at.end - at.first)
        everything = self._folder / "operations.csv"
        with everything.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(field.name for field in fields(Operation))
            rows.writerows(map(astuple, used.operations))
        before = f"; {self._before:.3f} ms without a profiler" if self._before else ""
        title = f"profile of steps {at.first:,} to {at.end:,}"
        summary = [
            ("a step", f"{ms:.3f} ms{before}"),
            ("in operations", f"{used.busy:.1%}"),
            *(
                [("between calls", f"{used.between:.1%}, with nothing to do")]
                if used.between is not None
                else []
            ),
            ("by kind", most(used.by_kind())),
            ("by layer", most(used.by_layer())),
            ("trace", str(path.with_name(path.name.replace(".xplane.pb", ".trace.json.gz")))),
            ("all operations", f"{everything}, of which {len(used.operations)}"),
        ]
        self._log.table(title, summary)
        self._log.table(*shown(used))


def most(shares: Mapping[str, float], n: int = 6) -> str:
    """The largest, in words."""
    return ", ".join(f"{name or 'unknown'} {share:.1%}" for name, share in [*shares.items()][:n])


def shown(used: Usage) -> tuple[str, list[Sequence[str]]]:
    """The most expensive operations: a title and rows."""
    top = used.operations[:SHOWN]
    rows: list[Sequence[str]] = [("kind", "ms", "share", "calls", "operation")]
    rows += [
        (o.kind, f"{o.ms:.3f}", f"{o.share:.1%}", f"{o.calls:.3g}", f"{o.name}, {o.source}")
        for o in top
    ]
    return f"the most expensive operations, in a step: {sum(o.share for o in top):.1%} of it", rows
