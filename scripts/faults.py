"""Breaks real runs in every way we know of, and counts what was lost.

    python scripts/faults.py --kills 100         # all of it; writes docs/reliability.md
    python scripts/faults.py --only kill --kills 5

Each trial is `python -m jaxeco.run experiments/digits_mlp.py ...`, with a fault, and then resumed
until it ends. It has survived if

- it ended by itself or by the fault, or said in one line what was wrong; no traceback, no hang;
- it went on from the newest checkpoint that was there, and no more steps were gone than lie between
  three saves (one counts from when it is complete, and that it failed is known at the next);
- its end is that of a run which nothing ever happened to: parameters, optimizer state, random key
  and all, the same to the bit.

Exit status 0 if nothing was lost.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "reliability.md"
SAVE_EVERY = 22  # steps: an epoch
LONG = ("epochs=300", "eval_every.count=20")  # for what is interrupted often
SHORT = ("epochs=40", "eval_every.count=10", "eval_batch=4")  # its evaluations take a while
WORDS = ("save_every.count=1", "steps_per_call=1", "log_every.count=1")
PATIENCE = 300  # seconds after which a run counts as hanging


class Lost(Exception):
    """What a fault has destroyed; the message says how it shows."""


@dataclass
class Row:
    """What came of one kind of fault."""

    fault: str
    how: str
    wanted: int  # trials
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    gone: int = 0  # most steps that one fault has cost

    @contextmanager
    def trial(self) -> Iterator[None]:
        self.tried += 1
        try:
            yield
        except Lost as error:
            self.lost.append(str(error))
            print(f"LOST: {self.fault}: {error}", flush=True)


class Run:
    """A run in its own process.

    Args:
      words: of the experiment.
      before: called in the new process, before it becomes the run.
      prefix: a command that starts the run.
    """

    def __init__(
        self,
        folder: Path,
        *words: str,
        resume: bool = True,
        env: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ):
        self.folder = folder
        self.output = tempfile.TemporaryFile("w+")
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*command(folder, *words), *(["--resume"] if resume else [])],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=self.output,
            stderr=self.errors,
            preexec_fn=before,  # a fork, before this process starts a thread of its own
        )

    @property
    def going(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def complaint(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for a condition; False if the run ended first."""
        limit = time.monotonic() + PATIENCE
        while self.going and time.monotonic() < limit:
            if condition():
                return True
            time.sleep(0.0005)
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self, *statuses: int) -> int:
        """Its exit status. Raises Lost if it is none of `statuses`, or not explained in a line."""
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Lost("it hangs") from None
        complaint = self.complaint()
        if "Traceback" in complaint or status not in statuses:
            raise Lost(f"status {status}:\n{complaint}")
        last = complaint.splitlines()[-1:] or [""]
        if status == 2 and not last[0].startswith("error: "):
            raise Lost(f"no error in one line:\n{complaint}")
        return status


def command(folder: Path, *words: str) -> list[str]:
    run = [sys.executable, "-m", "jaxeco.run", "experiments/digits_mlp.py", *WORDS, *words]
    return [*run, "--workdir", str(folder)]


# What lies in a run's folder


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    steps = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.tmp"))


def logged(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def reached(folder: Path) -> int:
    """The step that training had come to, by its log."""
    return max((line["step"] for line in logged(folder)), default=0)


def final_state(folder: Path) -> dict[str, bytes]:
    import jax

    from jaxeco.checkpoint import load
    from jaxeco.trees import named

    def bits(leaf: Any) -> bytes:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    loaded = load(folder / "checkpoints")
    state = {name: bits(leaf) for name, leaf in named(loaded.state).items()}
    return {"": str(loaded.step).encode(), **state}


class Trials:
    """What all kinds of trials share: a place, random numbers, runs that nothing happened to."""

    def __init__(self, place: Path, seed: int):
        self.place, self.random, self._folders = place, random.Random(seed), 0
        self.victim = self.folder()  # what is killed again and again
        self._wholes: dict[tuple[str, ...], dict[str, bytes]] = {}

    def folder(self) -> Path:
        self._folders += 1
        return self.place / f"run-{self._folders}"

    def whole(self, words: tuple[str, ...]) -> dict[str, bytes]:
        """The end of a run that nothing happened to."""
        if words not in self._wholes:
            folder, began = self.folder(), time.monotonic()
            Run(folder, *words).end(0)
            print(f"uninterrupted, {words[0]}: {time.monotonic() - began:.1f} s", flush=True)
            self._wholes[words] = final_state(folder)
        return self._wholes[words]

    def compare(self, folder: Path, words: tuple[str, ...]) -> None:
        """Raises Lost unless the end of this run is that of one which nothing happened to."""
        whole, ours = self.whole(words), final_state(folder)
        if differ := [name for name in whole if whole[name] != ours.get(name)]:
            raise Lost(f"another end: {', '.join(differ[:3])} differ")
        shutil.rmtree(folder)

    def resumed(self, folder: Path, words: tuple[str, ...]) -> None:
        """Resumes to the end and compares. Raises Lost if it began elsewhere, or ends elsewhere."""
        there, run = newest(folder), Run(folder, *words)
        run.end(0)
        if there and f"from step {there:,}" not in run.said():
            raise Lost(f"checkpoint {there} was there, but the run did not go on from it")
        self.compare(folder, words)


# The trials


def kill(trials: Trials, row: Row) -> None:
    """SIGKILL at a random moment, every other one while a checkpoint is being written."""
    folder, going = trials.victim, False
    while not going:
        before, run = newest(folder), Run(folder, *LONG)
        if row.tried % 4:  # else while it starts, or soon after
            run.until(lambda before=before: newest(trials.victim) > before)
        time.sleep(trials.random.uniform(0, 4))
        if row.tried % 2:
            run.until(lambda: saving(trials.victim))
        going = run.going
        run.kill()
        if not going:  # it had come to its end: the next one
            trials.compare(folder, LONG)
            folder = trials.victim = trials.folder()
    check_loss(row, folder, before)
    print(f"kill {row.tried}: newest checkpoint {newest(folder)}", flush=True)
    if row.tried == row.wanted:
        trials.resumed(folder, LONG)


def check_loss(row: Row, folder: Path, before: int, saves: int = 2) -> None:
    """Raises Lost if more is gone than what lies between so many saves."""
    there, gone = newest(folder), reached(folder) - newest(folder)
    row.gone = max(row.gone, gone)
    if there < before:
        raise Lost(f"checkpoint {before} was there before, now the newest is {there}")
    if gone > saves * SAVE_EVERY:
        raise Lost(f"{gone} steps are gone")


def terminate(phase: str) -> Callable[[Trials, Row], None]:
    """SIGTERM in one phase of a run: status 143, the state of that very step saved."""

    def compiling(run: Run) -> bool:
        return "TensorBoard" in run.said() and not logged(run.folder)

    def training(run: Run) -> bool:
        return bool(logged(run.folder))

    def evaluating(run: Run) -> bool:
        lines = logged(run.folder)
        return bool(lines) and lines[-1]["split"] == "train" and lines[-1]["step"] % 220 == 0

    conditions = {
        "compilation": compiling,
        "training": training,
        "evaluation": evaluating,
        "saving": lambda run: saving(run.folder),
    }

    def trial(trials: Trials, row: Row) -> None:
        folder = trials.folder()
        cold = {"JAXECO_CACHE": str(trials.folder())} if phase == "compilation" else {}
        run = Run(folder, *SHORT, env=cold)
        if phase != "compilation":
            run.until(lambda: bool(logged(folder)))
            time.sleep(trials.random.uniform(0, 1))
        if not run.until(lambda: conditions[phase](run)):
            raise Lost(f"never in {phase}: {run.complaint()}")
        run.process.send_signal(signal.SIGTERM)
        run.end(143)
        said = re.search(r"SIGTERM: saved step ([\d,]+)", run.said())
        if said is None or int(said[1].replace(",", "")) != newest(folder):
            raise Lost(f"newest checkpoint {newest(folder)}; it said: {run.said()[-300:]}")
        row.gone = max(row.gone, reached(folder) - newest(folder))
        trials.resumed(folder, SHORT)

    return trial


def full(trials: Trials, row: Row) -> None:
    """A file system of its own, too small; later it is made larger."""
    place, copy = trials.folder(), trials.folder()
    place.mkdir()
    size = trials.random.randint(30, 900)
    run = " ".join(command(place / "run", *SHORT, "--resume"))
    script = f"""
        mount -t tmpfs -o size={size}k tmpfs {place} || exit 99
        {run} > /dev/null || status=$?
        mount -o remount,size=1g {place}
        cp -r {place}/run {copy} || mkdir {copy}
        exit ${{status:-0}}"""
    space = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    done = subprocess.run([*space, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 99:
        raise NotHere("no file system can be mounted here")
    errors = done.stderr
    print(f"full at {size} KiB: newest {newest(copy)}: {errors.strip()[-200:]}", flush=True)
    explained = done.returncode == 0 or (done.returncode == 2 and "error: " in errors)
    if "Traceback" in errors or not explained:
        raise Lost(f"status {done.returncode}:\n{errors}")
    check_loss(row, copy, 0)
    trials.resumed(copy, SHORT)


def readonly(trials: Trials, row: Row) -> None:
    """A folder that may not be written: from the start, or from some moment on."""
    place = trials.folder()
    place.mkdir()
    folder = place / "run"
    if row.tried % 2:
        place.chmod(0o555)
        Run(folder, *SHORT, before=powerless).end(2)
        if any(place.iterdir()):
            raise Lost("it has written nevertheless")
        place.chmod(0o755)
    else:
        run = Run(folder, *SHORT, before=powerless)
        run.until(lambda: newest(folder) > 0)
        (folder / "checkpoints").chmod(0o555)
        run.end(2)
        check_loss(row, folder, 0)
        (folder / "checkpoints").chmod(0o755)
    trials.resumed(folder, SHORT)


def powerless() -> None:
    """In a child: root, too, is bound by a folder's permissions from the next program on."""
    libc, drop_from_bounding_set = ctypes.CDLL(None), 24
    for capability in (1, 2):  # to write, and to read, what permissions deny
        libc.prctl(drop_from_bounding_set, capability, 0, 0, 0)


def flaky(trials: Trials, row: Row) -> None:
    """Storage that fails now and then; a run that has given up is started again."""
    library = compiled(trials)
    folder, attempts = trials.folder(), 0
    while True:
        attempts += 1
        env = {
            "LD_PRELOAD": str(library),
            "FAULTS_FOLDER": str(folder),
            "FAULTS_ONE_IN": "300",
            "FAULTS_SEED": str(trials.random.randrange(2**30)),
        }
        before, run = newest(folder), Run(folder, *SHORT, env=env)
        if run.end(0, 2) == 0:
            break
        print(f"flaky {row.tried}, attempt {attempts}: {run.complaint().strip()}", flush=True)
        check_loss(row, folder, before, saves=4)
        if attempts == 20:
            raise Lost("it never came to its end")
    warned = run.complaint().count("warning: ")
    print(f"flaky {row.tried}: {attempts} attempts; warnings in the last: {warned}", flush=True)
    trials.compare(folder, SHORT)


def clock(trials: Trials, row: Row) -> None:
    """The clock on the wall jumps while a run trains and saves; some time later it is killed."""
    library, folder, there = compiled(trials), trials.folder(), 0
    for days in (10, -10, 1, -1):
        after = trials.random.randrange(4000, 7000)  # a start takes about 3 s
        jump = {"FAULTS_CLOCK": str(days * 86400), "FAULTS_AFTER": str(after)}
        run = Run(folder, *LONG, env={"LD_PRELOAD": str(library), **jump})
        time.sleep(after / 1000)
        then = newest(folder)
        if not run.until(lambda then=then: newest(folder) > then + 2 * SAVE_EVERY):
            if run.going or "clock was set" not in run.complaint():
                raise Lost(f"no save after a jump by {days} days: {run.complaint()}")
            run.end(1)
        run.kill()
        check_loss(row, folder, there)
        if there and f"from step {there:,}" not in run.said():
            raise Lost(f"it did not go on from step {there}")
        there = newest(folder)
    Run(folder, *LONG).end(0)
    times = [line["time"] for line in logged(folder)]
    if times != sorted(times):
        raise Lost("the log's times go backwards")
    trials.compare(folder, LONG)


def compiled(trials: Trials) -> Path:
    """The library that makes calls fail and clocks jump."""
    library, source = trials.place / "faults.so", Path(__file__).with_suffix(".c")
    if not library.exists():
        if shutil.which("cc") is None:
            raise NotHere("no C compiler here")
        words = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"]
        subprocess.run(words, check=True)
    return library


def twice(trials: Trials, row: Row) -> None:
    """Two runs that start in one folder at the same moment: one runs, the other says why not."""
    folder, resume = trials.folder(), bool(row.tried % 2)
    runs = [Run(folder, *SHORT, resume=resume) for _ in range(2)]
    statuses = [run.end(0, 2) for run in runs]
    if sorted(statuses) != [0, 2]:
        raise Lost(f"they ended with {statuses}")
    trials.compare(folder, SHORT)


class NotHere(Exception):
    """A kind of fault that this machine does not allow to make."""


TERM = "status 143, the very step saved; then resumed"
KINDS: dict[str, list[tuple[str, str, Callable[[Trials, Row], None]]]] = {
    "kill": [("SIGKILL", "at random moments, every other one during a save", kill)],
    "term": [
        (f"SIGTERM in {phase}", TERM, terminate(phase))
        for phase in ("compilation", "training", "evaluation", "saving")
    ],
    "full": [("disk full", "a tmpfs of 30 to 900 KiB, later made larger", full)],
    "readonly": [("folder read-only", "from the start, or from the first save on", readonly)],
    "flaky": [
        ("storage that fails now and then", "1 in 300 calls: EIO, ESTALE or ETIMEDOUT", flaky)
    ],
    "clock": [
        ("clock jumps", "four in a run, by 1 and 10 days to and fro; each then killed", clock)
    ],
    "twice": [("two runs in one folder", "started at the same moment", twice)],
}


def table(rows: Sequence[Row | str]) -> str:
    lines = [
        "| fault | how it is made | tried | survived | lost | most steps to do again |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if isinstance(row, str):
            lines.append(f"| {row} | | 0 | | | |")
        else:
            lost = min(len(row.lost), row.tried)
            cells = (row.fault, row.how, row.tried, row.tried - lost, lost, row.gone)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def report(rows: Sequence[Row | str], words: Sequence[str]) -> str:
    import jax

    names = ("jaxeco", "jax", "orbax-checkpoint", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    return f"""# Reliability

What was done to running experiments, and what came of it. Written by

    python scripts/faults.py {" ".join(words)}

on {device}, {platform.system()}, Python {platform.python_version()}, {versions}.

{table(rows)}

Every trial is a real run from the command line, on handwritten digits, which saves every
{SAVE_EVERY} steps and keeps two checkpoints. It counts as survived if it ended as it should, or
with one line that says what is wrong; if it then went on from its newest checkpoint; and if its
end is the same, to the bit, as that of a run which nothing ever happened to.

The last column is what a fault has cost at most: the steps between the newest complete checkpoint
and where training stood. A save is complete some time after it began, and that it failed is known
at the next, so that this can be up to twice {SAVE_EVERY}. Where storage does not take a save, the
next stands in for it, at most two in a row, before the run ends.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="by SIGKILL")
    parser.add_argument("--each", type=int, default=5, help="trials of every other kind")
    parser.add_argument("--seed", type=int, default=0, help="of moments and sizes")
    parser.add_argument("--only", choices=KINDS, help="one kind; the report stays as it is")
    options = parser.parse_args()
    rows: list[Row | str] = []
    with tempfile.TemporaryDirectory() as place:
        trials = Trials(Path(place), options.seed)
        for name in [options.only] if options.only else KINDS:
            for fault, how, trial in KINDS[name]:
                row = Row(fault, how, options.kills if name == "kill" else options.each)
                rows.append(row)
                try:
                    while row.tried < row.wanted:
                        with row.trial():
                            trial(trials, row)
                except NotHere as reason:
                    rows[-1] = f"{fault}: not tried, {reason}"
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if not options.only:
        REPORT.write_text(report(rows, sys.argv[1:]))
    return 1 if any(isinstance(row, Row) and row.lost for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
