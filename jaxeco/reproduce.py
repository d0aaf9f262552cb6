"""Runs what an experiment claims again: python -m jaxeco.reproduce experiments/FILE.py [options]"""

import argparse
import difflib
import math
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxeco import command, config, runtime, stats
from jaxeco.claims import Claim, read
from jaxeco.errors import UserError
from jaxeco.stats import Summary

if TYPE_CHECKING:
    from jaxeco.experiment import Experiment
    from jaxeco.population import Member, Outcome


GROSS = 0.1  # of alpha, for the spread: its test takes rare values for a larger spread


@dataclass(frozen=True)
class Trial:
    """Claims about the same runs, and these runs, which differ in their seeds.

    Attributes:
      before: runs that must come first, for these to start from.
    """

    claims: tuple[Claim, ...]
    before: tuple["Member", ...]
    members: tuple["Member", ...]


@dataclass(frozen=True)
class Verdict:
    """What has become of a claim. "better": it holds, and understates."""

    outcome: Literal["confirmed", "better", "refuted"]
    why: str

    def __str__(self) -> str:
        said = "better than claimed" if self.outcome == "better" else self.outcome
        return f"{said}: {self.why}"


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m jaxeco.reproduce",
        description=__doc__,
        epilog="Exit status 0: every claim is confirmed, or surpassed; 1: one is refuted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the experiment, such as experiments/digits_mlp.py")
    add("--seeds", type=int, metavar="N", help="runs of each claim (default: as many as it is of)")
    add("--workdir", type=Path, help="where they go (default: runs/<name>-reproduce)")
    add("--resume", action="store_true", help="go on with the runs that are there")
    what = "chance to refute what is true (%(default)s)"
    add("--alpha", type=float, default=0.01, help=what)
    add("--dry-run", action="store_true", help="show what would run only")
    options = parser.parse_args(words)
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected at least 1")
    if not 1e-6 <= options.alpha <= 0.5:
        parser.error(f"--alpha {options.alpha}: expected a chance of 0.5 at most, such as 0.01")
    if options.dry_run and options.resume:
        parser.error("--dry-run runs nothing: leave out --resume")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    loaded, claims = read(options.file)
    if not claims:
        raise UserError(f"{options.file} claims nothing: its CLAIMS are empty")
    workdir = options.workdir or Path("runs") / f"{loaded.experiment.name}-reproduce"
    trials = planned(options.file, claims, options.seeds, workdir)
    for trial in trials:
        check_metrics(options.file, trial.claims, trial.members[0].loaded.experiment)
    if options.dry_run:
        for trial in trials:
            print(*map(str, trial.claims), sep="\n")
            print(*(f"  {member.folder}" for member in (*trial.before, *trial.members)), sep="\n")
        return 0
    everyone = [member for trial in trials for member in (*trial.before, *trial.members)]
    if not options.resume:
        check_free(member.folder for member in everyone)
    return reproduced(trials, options.resume, options.alpha)


def planned(file: Path, claims: Sequence[Claim], seeds: int | None, workdir: Path) -> list[Trial]:
    """The runs that claims ask for: seeds from 0 on, as many as the most that any of them is of.

    Raises:
      UserError: a file does not load with the words of a claim.
    """
    from jaxeco.population import Member

    groups: dict[tuple[tuple[str, ...], str], list[Claim]] = {}
    for claim in claims:
        groups.setdefault((claim.words, claim.after), []).append(claim)
    trials = []
    for (words, after), group in groups.items():
        before, members = [], []
        for seed in range(seeds or max(claim.n for claim in group)):
            own = [*words, f"seed={seed}"]
            folder = workdir / re.sub(r"[^\w.,=+-]", "_", ",".join(own))
            if after:
                argument, _, name = after.partition("=")
                first = config.load(file.parent / name, [f"seed={seed}"])
                before.append(Member(first, workdir / f"{first.path.stem},seed={seed}"))
                own.append(f"{argument}={before[-1].folder}")
            members.append(Member(config.load(file, own), folder))
        trials.append(Trial(tuple(group), tuple(before), tuple(members)))
    return trials


def check_metrics(file: Path, claims: Iterable[Claim], ex: "Experiment") -> None:
    """Raises UserError unless the experiment measures what is claimed."""
    names = ["loss", *(m.name for m in (*ex.metrics, *ex.eval_metrics))]
    known = [f"{split}/{name}" for split in ex.evals for name in names]
    for claim in claims:
        if claim.metric not in known:
            near = difflib.get_close_matches(claim.metric, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise UserError(f"{file} claims {claim.metric}, which it does not measure; {hint}")
        if claim.at == "best" and ex.best is None:
            raise UserError(f"{file} claims {claim.metric} at its best: give the Experiment a best")


def check_free(folders: Iterable[Path]) -> None:
    """Raises UserError if one of the folders holds a run."""
    from jaxeco.folder import holds_run

    for folder in folders:
        if holds_run(folder):
            raise UserError(
                f"{folder} holds a run already: go on with --resume, or choose another --workdir"
            )


def reproduced(trials: Sequence[Trial], resume: bool, alpha: float) -> int:
    """Trains, and says of each claim what has become of it; returns the exit status."""
    runtime.split_cpu()
    from jaxeco import population
    from jaxeco.interrupt import Interrupt

    first = {member.folder: member for trial in trials for member in trial.before}
    then = [member for trial in trials for member in trial.members]
    outcomes: list[Outcome] = []
    with Interrupt() as interrupt:
        for stage in (list(first.values()), then):
            if stage and not interrupt.signal:
                said = partial(print, flush=True)
                outcomes += population.train(stage, resume=resume, interrupt=interrupt, said=said)
    if interrupt.signal:
        print(f"{interrupt.signal.name}: --resume goes on")
        return interrupt.exit_status
    diverged = {outcome.member.folder for outcome in outcomes if outcome.ended == "diverged"}
    verdicts = [v for trial in trials for v in verdicts_of(trial, diverged, alpha)]
    print("", *verdicts, sep="\n")
    return int(any(verdict.outcome == "refuted" for verdict in verdicts))


def verdicts_of(trial: Trial, diverged: Container[Path], alpha: float) -> list[Verdict]:
    """By what the runs' folders tell; a run that has diverged has come to no value."""
    from jaxeco import runs

    found = [runs.read(member.folder) for member in trial.members]
    verdicts = []
    for claim in trial.claims:
        values = [
            run.last(claim.metric) if claim.at == "last" else run.best(claim.metric)
            for run in found
        ]
        whole = [
            math.nan if value is None or run.folder in diverged else value
            for run, value in zip(found, values, strict=True)
        ]
        verdicts.append(judged(claim, whole, found[0].lower_is_better(claim.metric), alpha))
    return verdicts


def judged(claim: Claim, values: Sequence[float], lower: bool, alpha: float) -> Verdict:
    """Whether values found anew are what the claim says, but for chance.

    Two means, each with its sd, are held against each other by Welch's t test. Where the claim or
    the trial is one run, it is held against the spread of the other; where there is no sd at all,
    against the claim's tolerance. What is within the rounding of the claim confirms it; but for
    runs that spread far more than is claimed, as where some fail: their mean says little.

    Args:
      lower: less is better.
    """
    found, stated = stats.summary(values), Summary(claim.n, claim.mean, claim.sd)
    unit = f" {claim.unit}" * bool(claim.unit)
    here = stats.plus_minus(found.mean, found.sd, claim.percent)
    words = "".join(f"{word}: " for word in [" ".join(claim.words)] if word)
    both = f"{words}{claim.metric} {here}{unit} (n = {found.n})"
    both += f", claimed {claim.value} (n = {claim.n})"
    if not math.isfinite(found.mean):
        bad = sum(not math.isfinite(value) for value in values)
        return Verdict("refuted", f"{both}: {bad} of {found.n} runs came to no finite value")
    difference = found.mean - claim.mean
    points = " points" * claim.percent
    size = f"a difference of {_number(difference, claim, '+')}{points}"
    error = stats.standard_error(stated, found)
    if claim.tolerance is not None and (error is None or error[0] == 0):
        agree = abs(difference) <= claim.tolerance
        how = f"{size}, where {_number(claim.tolerance, claim)}{points} is allowed"
    else:
        assert error is not None  # a claim of one run has a tolerance
        p, *ends = stats.t_test(difference, *error, alpha)
        agree = p > alpha
        interval = " to ".join(_number(end, claim, "+") for end in ends)
        how = f"{size} ({100 * (1 - alpha):g} % interval {interval}), p = {p:.2g}"
        if agree:
            least = _number(stats.noticeable(*error, alpha), claim)
            how += f"; these runs would show one of {least}{points} 4 times in 5"
    if agree or abs(difference) <= claim.rounding:
        if claim.sd is not None:
            rounded = replace(stated, sd=max(claim.sd, claim.rounding))
            if (p := stats.spread_p(rounded, found)) <= alpha * GROSS:
                return Verdict("refuted", f"{both}: the runs spread more, p = {p:.1g} (F test)")
        return Verdict("confirmed", f"{both}: {how}")
    if (difference < 0) == lower:
        return Verdict("better", f"{both}: {how}; let it claim that, once you know why")
    return Verdict("refuted", f"{both}: {how}")


def _number(value: float, claim: Claim, sign: str = "-") -> str:
    """A difference, with a digit more than the claim has; of a percentage in points."""
    scale = 100 if claim.percent else 1
    return f"{scale * value:{sign}.{claim.digits + 1}f}"


if __name__ == "__main__":
    command.start(main)
