"""Searches arguments: python -m jaxeco.sweep FILE [key=value ...] --space 'lr=log(1e-4,1)' [...]"""

import argparse
import contextlib
import csv
import difflib
import fcntl
import io
import math
import os
import re
import shlex
import statistics
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxeco import command, config, runtime, storage
from jaxeco.config import Loaded
from jaxeco.description import describe
from jaxeco.errors import RunFailed, UserError
from jaxeco.experiment import IDENTITY, Experiment
from jaxeco.sweeps import space
from jaxeco.sweeps.space import Dimension

if TYPE_CHECKING:
    from jaxeco.interrupt import Interrupt
    from jaxeco.plan import Plan
    from jaxeco.population import Member, Outcome
    from jaxeco.sweeps.study import Asked, Row, Study

SAMPLERS = ("tpe", "random", "grid", "cmaes", "qmc")
PRUNERS = ("none", "median", "halving", "hyperband")
TRIALS = 32  # where --trials is not given; of a grid, all
SHOWN = 12  # trials in the table


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m jaxeco.sweep",
        description=__doc__,
        epilog="Started twice with the same --workdir or --storage, two workers share the trials;"
        " started again, it goes on with them. Ranges: log(1e-4,1) uniform(0,0.5) int(1,6)"
        " logint(16,1024) choice(64,128). More: docs/sweeps.md",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the experiment, such as experiments/digits_mlp.py")
    add("assignments", nargs="*", metavar="key=value", help="the same for all trials: epochs=2")
    add("--space", nargs="+", action="extend", required=True, metavar="key=RANGE", help="searched")
    what = "such as valid/accuracy (default: the experiment's `best`)"
    add("--metric", metavar="SPLIT/NAME", help=what)
    add("--direction", choices=("max", "min"), help="of the metric (default: as it is known)")
    add("--trials", type=int, metavar="N", help=f"of all workers together ({TRIALS}; a grid: all)")
    add("--seeds", type=int, default=1, metavar="K", help="a trial is the mean of K runs (1)")
    add("--batch", type=int, default=8, metavar="N", help="trials trained at once (8)")
    add("--sampler", choices=SAMPLERS, default="tpe", help="what proposes them (%(default)s)")
    add("--pruner", choices=PRUNERS, default="none", help="what ends bad ones early (%(default)s)")
    add("--workdir", type=Path, help="default: runs/<name>-sweep, or <name>-sweep-2, ...")
    add("--resume", action="store_true", help="go on with the newest of these, if there is one")
    add("--storage", metavar="URL", help="a database for several machines (default: SQLite)")
    options = parser.parse_intermixed_args(words)
    for name in ("trials", "seeds", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    dimensions = space.parse(options.space)
    if find_spec("optuna") is None:
        raise UserError("sweeps need Optuna: pip install 'jaxeco[sweep]', or optuna")
    loaded = config.load(options.file, options.assignments)
    space.check(loaded, dimensions)
    metric = options.metric or loaded.experiment.best
    if metric is None:
        raise UserError("the experiment has no `best`: say by --metric what is searched for")
    direction = options.direction or direction_of(loaded.experiment, metric)
    trials = options.trials or TRIALS
    if options.sampler == "grid":
        points = len(space.grid(dimensions))
        trials = min(options.trials or points, points)
    runtime.split_cpu()
    import jax  # from here on it is awake

    from jaxeco.interrupt import Interrupt
    from jaxeco.log import table
    from jaxeco.plan import plan
    from jaxeco.sweeps.study import Study, check_sampler

    check_sampler(options.sampler, dimensions)
    if metric.startswith("test/"):
        warnings.warn(
            f"{metric} chooses by the test set, which then no longer tests what is chosen:"
            " better hold out a part of the training data",
            stacklevel=2,
        )
    p = plan(loaded.experiment, jax.local_devices()[:1])  # as each member has one
    every, total = cadence(p, loaded.experiment)
    if options.pruner != "none" and every >= total:
        warnings.warn(
            "each run is evaluated once: nothing to prune by; see eval_every", stacklevel=2
        )
    folder = choose(loaded.experiment.name, options.workdir, options.resume, options.storage)
    _make(folder)
    search = Search(loaded, dimensions, metric, direction, options.seeds, folder, p)
    study = Study(
        folder,
        options.storage and os.path.expandvars(options.storage),  # for a password
        dimensions,
        direction,
        options.sampler,
        options.pruner,
        math.ceil(total / every),
        search.about(),
    )
    rows = [(d.name, word.partition("=")[2]) for d, word in zip(dimensions, options.space)]
    rows += [("metric", f"{metric}, {direction}imum"), ("folder", str(folder))]
    there = sum(row.state != "waiting" for row in study.rows())
    rows.append(("trials", f"{trials}, of which {there} are there" if there else f"{trials}"))
    say(table(f"a sweep of {options.file}", rows) + "\n")
    with study, Interrupt() as interrupt:
        while not interrupt.asked():
            asked = study.ask(options.batch, trials)
            if asked:
                train(search, study, asked, interrupt)
                record(search, study)
            elif not study.undecided():
                break
            else:
                time.sleep(1)
    conclude(search, study)
    return interrupt.exit_status if interrupt.signal else 0


@dataclass(frozen=True)
class Search:
    """What is searched, and where.

    Attributes:
      plan: of the experiment as it is without a trial's words.
    """

    loaded: Loaded
    dimensions: tuple[Dimension, ...]
    metric: str
    direction: Literal["max", "min"]
    seeds: int
    folder: Path
    plan: "Plan"

    def words(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """A trial as words of the command line, without its seed."""
        return (*self.loaded.assignments, *space.words(self.dimensions, params))

    def members(self, one: "Asked") -> "list[Member]":
        """The runs that a trial consists of, one a seed.

        Raises:
          UserError: the experiment refuses these values.
        """
        from jaxeco.population import Member

        words = [word for word in self.words(one.params) if not word.startswith("seed=")]
        first = self.loaded.experiment.seed
        found = []
        for seed in range(first, first + self.seeds):
            name = one.folder + (f",seed={seed}" if self.seeds > 1 else "")
            loaded = config.load(self.loaded.path, [*words, f"seed={seed}"])
            found.append(Member(loaded, self.folder / name))
        return found

    def about(self) -> dict[str, Any]:
        """What must be the same for all trials of a study, to compare them."""
        resolved = describe(self.loaded.experiment)
        return {
            "--space": {d.name: describe(d) for d in self.dimensions},
            "--metric": self.metric,
            "--direction": self.direction,
            "--seeds": self.seeds,
            "the data": self.plan.train.fingerprint,
            **{name: resolved[name] for name in IDENTITY},
        }


def direction_of(ex: Experiment, metric: str) -> Literal["max", "min"]:
    """Whether more or less of "split/name" is better.

    Raises:
      UserError: the experiment does not measure it.
    """
    names = ("loss", *(m.name for m in (*ex.metrics, *ex.eval_metrics)))
    known = [f"{split}/{name}" for split in ex.evals for name in names]
    if metric not in known:
        near = difflib.get_close_matches(metric, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        raise UserError(f"--metric {metric}: the experiment does not measure that; {hint}")
    return replace(ex, best=metric).best_mode


def cadence(p: "Plan", ex: Experiment) -> tuple[int, int]:
    """Steps from one evaluation to the next, and of the whole run, of an experiment like p's."""
    train = p.train if describe(ex.train) == describe(p.ex.train) else ex.train.open()
    steps_per_epoch = train.training_examples // ex.batch
    return ex.eval_every.steps(steps_per_epoch), ex.length.steps(steps_per_epoch)


def choose(name: str, workdir: Path | None, resume: bool, storage: str | None) -> Path:
    """The folder of this sweep.

    A `workdir` is what it is; workers that share a storage have one of the same name; any other
    sweep has runs/<name>-sweep, or the next number that is free, so that none is lost.

    Raises:
      UserError: `workdir` has other contents.
    """
    if workdir is not None:
        found = [path.name for path in workdir.iterdir()] if workdir.is_dir() else []
        if found and not any(name.startswith((".", "study.db")) for name in found):
            raise UserError(f"{workdir} holds other things than a sweep: choose another --workdir")
        return workdir
    base = Path("runs") / f"{name}-sweep"
    if storage is not None:
        return base
    taken = {}
    for path in base.parent.glob("*/study.db"):
        if match := re.fullmatch(re.escape(base.name) + r"(?:-(\d+))?", path.parent.name):
            taken[int(match[1] or 1)] = path.parent
    if resume and taken:
        return taken[max(taken)]
    number = max(taken, default=0) + 1
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def train(search: Search, study: "Study", asked: "Sequence[Asked]", interrupt: "Interrupt") -> None:
    """Trains a batch of trials as one population, and tells the study what they came to.

    A trial that cannot be trained, since its batch is above the data, say, or the memory too small
    for it, has failed. The others of the batch have not: which it was is found out by halves, where
    a plan does not show it.

    Raises:
      UserError: what is wrong is not a trial's: the disk is full, say.
    """
    import jax

    from jaxeco import population

    owners: list[Asked] = []  # of each member
    members: list[Member] = []
    for one in asked:
        try:
            theirs = search.members(one)
        except UserError as error:
            fail(study, one, str(error))
            continue
        members += theirs
        owners += [one] * len(theirs)
    try:
        judge = Judge(study, search, owners, members)
        outcomes = population.train(members, resume=True, interrupt=interrupt, said=say, stop=judge)
    except (UserError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, NoNumber) or isinstance(error.__cause__, OSError):
            raise
        distinct = list(dict.fromkeys(owners))
        half = len(distinct) // 2
        unfit = refused(owners, members)
        if not unfit and not half:
            unfit = {distinct[0]: str(error).splitlines()[0]}
        for one, why in unfit.items():
            fail(study, one, why)
        fit = [one for one in distinct if one not in unfit]
        for part in [fit] if unfit else [distinct[:half], distinct[half:]]:
            if part:
                train(search, study, part, interrupt)
        return
    for one in dict.fromkeys(owners):
        settle(search, study, one, [o for o, owner in zip(outcomes, owners) if owner is one])


def refused(owners: "Sequence[Asked]", members: "Sequence[Member]") -> "dict[Asked, str]":
    """Trials that a plan refuses, and why."""
    import jax

    from jaxeco.plan import plan

    found = {}
    for one, member in dict(zip(owners, members)).items():
        try:
            plan(member.loaded.experiment, jax.local_devices()[:1])
        except UserError as error:
            found[one] = str(error)
    return found


def settle(search: Search, study: "Study", one: "Asked", outcomes: "Sequence[Outcome]") -> None:
    """Tells the study how a trial has ended, by its seeds; says so.

    The value is what stands in the runs' logs: what was complete before a kill is not trained anew.
    """
    from jaxeco import runs

    if any(o.ended == "interrupted" for o in outcomes):
        study.give_back(one)
        return
    if diverged := [o for o in outcomes if o.ended == "diverged"]:
        fail(study, one, diverged[0].why)
        return
    if any(o.ended == "stopped" for o in outcomes):
        study.pruned(one)
        say(f"trial {one.number}: pruned at step {max(o.step for o in outcomes):,}")
        return
    found = [runs.read(o.member.folder).last(search.metric) for o in outcomes]
    values = [math.nan if value is None else value for value in found]
    if not all(map(math.isfinite, values)):
        fail(study, one, f"{search.metric} is {next(v for v in values if not math.isfinite(v))}")
        return
    every, _ = cadence(search.plan, outcomes[0].member.loaded.experiment)
    study.complete(one, math.ceil(max(o.step for o in outcomes) / every), values)
    say(f"trial {one.number}: {search.metric} {shown(values)}")


def fail(study: "Study", one: "Asked", why: str) -> None:
    study.pruned(one, why)
    say(f"trial {one.number}: failed: {why}")


class NoNumber(UserError):
    """The metric cannot be compared."""


class Judge:
    """Hears every evaluation of the members of a batch, and says who ends there.

    A trial is judged by the mean over its seeds once all of them have come so far; not at its end,
    where nothing is saved.
    """

    def __init__(
        self,
        study: "Study",
        search: Search,
        owners: "Sequence[Asked]",
        members: "Sequence[Member]",
    ):
        self._study, self._search, self._owners = study, search, owners
        self._cadences = [cadence(search.plan, m.loaded.experiment) for m in members]
        self._values: dict[tuple[int, int], list[float]] = {}
        self._over: set[int] = set()  # numbers of trials

    def __call__(self, step: int, scores: Mapping[int, Mapping[str, float]]) -> Collection[int]:
        """Which of the members ends after this step; `scores` has those just evaluated."""
        due = []
        for i, found in scores.items():
            every, total = self._cadences[i]
            one, evaluation = self._owners[i], math.ceil(step / every)
            if self._search.metric not in found:
                raise NoNumber(f"--metric {self._search.metric} is not a single number")
            values = self._values.setdefault((one.number, evaluation), [])
            values.append(found[self._search.metric])
            mean = math.fsum(values) / len(values)
            if len(values) == self._search.seeds and math.isfinite(mean):
                self._study.report(one, evaluation, mean)
                due += [one] if step < total else []
        self._over |= {one.number for one in due if self._study.judged(one)}
        return [i for i in scores if self._owners[i].number in self._over]


# What a sweep leaves behind


def record(search: Search, study: "Study") -> None:
    """Writes results.csv, and the best trial so far as best.py."""
    from jaxeco.sweeps.plots import best

    rows = study.rows()
    with _alone(search.folder):
        storage.write_whole(search.folder / "results.csv", as_csv(search, rows))
        if first := best(rows, search.direction):
            write_best(search, first, rows)


def conclude(search: Search, study: "Study") -> None:
    """Shows the best trials, and draws the sweep.

    Raises:
      RunFailed: all trials have failed.
    """
    from jaxeco.log import table
    from jaxeco.sweeps import plots

    rows = study.rows()
    record(search, study)
    say("\n" + table(count(rows), listed(search, rows)) + "\n")
    if left := sum(row.state in ("running", "waiting") for row in rows):
        say(f"{left} trials are under way or waiting: the same command with --resume takes them up")
    first = plots.best(rows, search.direction)
    if first is None:
        if rows and all(row.state == "failed" for row in rows):
            raise RunFailed(f"all {len(rows)} trials failed; the first: {rows[0].why}")
        return
    with _alone(search.folder):
        about = (search.metric, search.direction)
        plots.history(rows, *about, search.folder / "history.png")
        plots.slices(rows, search.dimensions, *about, search.folder / "slices.png")
        plots.parallel(rows, search.dimensions, *about, search.folder / "parallel.png")
        if shares := study.importances():
            done = sum(row.state == "complete" for row in rows)
            plots.importance(shares, done, search.metric, search.folder / "importance.png")
    where = search.folder / first.folder
    say(f"best: trial {first.number}, {search.metric} {shown(first.values)}, in {where}")
    command_line = ["python", "-m", "jaxeco.run", str(search.loaded.path)]
    say("  " + shlex.join([*command_line, *search.words(first.params)]))
    if (path := search.folder / "best.py").exists():
        say(f"  python -m jaxeco.run {path}")
        fresh = search.loaded.experiment.seed + max(1, search.seeds)
        say("It is the best of many, and in part by luck. To know, run it with other seeds:")
        say(f"  python -m jaxeco.run {path} --seeds 8 seed={fresh}")


def count(rows: "Sequence[Row]") -> str:
    """ "20 trials: 12 complete, 6 pruned, 2 failed"."""
    states = ("complete", "pruned", "failed", "running", "waiting")
    numbers = {state: sum(row.state == state for row in rows) for state in states}
    parts = [f"{n} {state}" for state, n in numbers.items() if n or state in states[:3]]
    return f"{len(rows)} trials: {', '.join(parts)}"


def listed(search: Search, rows: "Sequence[Row]") -> list[Sequence[str]]:
    """Rows of the table in the terminal: the best first."""
    found: list[Sequence[str]] = [("trial", search.metric, "evaluations", "with")]
    for row in ordered(rows, search.direction)[:SHOWN]:
        value = "" if row.value is None else shown(row.values or (row.value,))
        state = (
            f"{row.evaluations}" if row.state == "complete" else f"{row.evaluations}, {row.state}"
        )
        words = " ".join(brief(d, row.params[d.name]) for d in search.dimensions)
        found.append((f"{row.number}", value, state, f"{words}{': ' * bool(row.why)}{row.why}"))
    if len(rows) > SHOWN:
        found.append(("...", "", "", f"the rest: {search.folder / 'results.csv'}"))
    return found


def ordered(rows: "Sequence[Row]", direction: str) -> "list[Row]":
    """The best first; then the pruned, those that came farthest first; then all others."""
    states = ("complete", "pruned", "failed", "running", "waiting")
    sign = -1 if direction == "max" else 1

    def key(row: "Row") -> tuple[float, ...]:
        value = math.inf if row.value is None else sign * row.value
        came = -row.evaluations if row.state == "pruned" else 0
        return states.index(row.state), came, value, row.number

    return sorted(rows, key=key)


def shown(values: Sequence[float]) -> str:
    """A mean over seeds, with its standard deviation if there are several."""
    mean = f"{math.fsum(values) / len(values):.5g}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2g}"


def brief(d: Dimension, value: Any) -> str:
    """A word as a person would round it; to the bit it stands in results.csv."""
    return f"{d.name}={value:.4g}" if isinstance(value, float) else d.word(value)


def as_csv(search: Search, rows: "Sequence[Row]") -> str:
    """All trials by number: what they came to, and a column for each name."""
    names = [d.name for d in search.dimensions]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", "state", search.metric, "sd", "seeds", "evaluations", *names, "folder", "why"]
    )
    for row in rows:
        sd = statistics.stdev(row.values) if len(row.values) > 1 else ""
        value = "" if row.value is None else row.value
        words = space.words(search.dimensions, row.params) if row.params else [""] * len(names)
        values = [word.partition("=")[2] for word in words]
        seeds = len(row.values) or ""
        ends = (row.folder, row.why)
        writer.writerow([row.number, row.state, value, sd, seeds, row.evaluations, *values, *ends])
    return text.getvalue()


def write_best(search: Search, row: "Row", rows: "Sequence[Row]") -> None:
    """best.py: the experiment's file with the best trial's values as its defaults.

    It lies beside copies of what it imports from its own folder. A file that does not come to the
    same experiment there, since it looks for something beside itself, say, is not left behind.
    """
    from jaxeco import folder as folders
    from jaxeco.sweeps import rewrite

    found = replace(search.loaded, assignments=search.words(row.params))
    wanted = config.load(found.path, found.assignments)
    said = (
        f"The best of {len(rows)} trials of {search.loaded.path} by {search.metric}:"
        f" {shown(row.values)}, trial {row.number} of {search.folder}."
    )
    path, part = search.folder / "best.py", search.folder / ".best.py"
    try:
        for name, text in folders._sources(found).items():
            if name not in ("experiment.py", "best.py"):
                storage.write_whole(search.folder / name, text)
        storage.write_whole(part, rewrite.with_defaults(found, said))
        if describe(config.load(part).experiment) != describe(wanted.experiment):
            raise UserError("it comes to another experiment there")
    except UserError as error:
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        say(f"best.py is not written: {error}")
        return
    part.replace(path)


def say(text: str) -> None:
    print(text, flush=True)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the sweep's folder {folder}: {error.strerror}") from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other workers from writing results meanwhile."""
    try:
        with (folder / ".results.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


if __name__ == "__main__":
    command.start(main)
