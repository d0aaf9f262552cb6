"""Many runs from one command: which they are, where they go, and what they come to together.

    --seeds 16                                      seeds s, s + 1, ..., from that of the experiment
    --grid lr=0.01,0.03 --grid 'widths=64;128,64'   every combination; ; where a value has commas

Each is an ordinary run, in a folder of its own below that of all: runs/<name>/lr=0.01,seed=0.
"""

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxeco import config
from jaxeco import folder as folders
from jaxeco.description import describe
from jaxeco.errors import RunFailed, UserError
from jaxeco.groups import How, grouped
from jaxeco.interrupt import Interrupt
from jaxeco.log import table
from jaxeco.population import Member, check, train
from jaxeco.runs import by_setting, find
from jaxeco.stats import plus_minus, summary

LONGEST = 200  # bytes of a folder's name; file systems take 255


def members(
    file: Path, words: Sequence[str], axes: Sequence[config.Axis], seeds: int
) -> list[Member]:
    """Every combination of values, and each with so many seeds; folders below that of all.

    Raises:
      UserError: a word or a value does not fit the experiment.
    """
    keys = [*(word.partition("=")[0] for word in words), *(axis.key for axis in axes)]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key} is given twice")
    if "seed" in keys[len(words) :] and seeds > 1:
        raise UserError("--grid seed=... and --seeds both say which seeds: leave out either")
    found = []
    for values in itertools.product(*(axis.values for axis in axes)):
        own = [f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True)]
        loaded = config.load(file, [*words, *own])
        if "seed" in keys[len(words) :]:
            found.append(Member(loaded, _folder(own)))
            continue
        rest = [word for word in words if not word.startswith("seed=")]
        for seed in range(loaded.experiment.seed, loaded.experiment.seed + seeds):
            one = config.load(file, [*rest, *own, f"seed={seed}"])
            found.append(Member(one, _folder([*own, f"seed={seed}"])))
    _check_distinct(found)
    return found


def _folder(words: Sequence[str]) -> Path:
    """A folder's name for the words that tell a run from the others; a long one is cut short."""
    name = re.sub(r"[^\w.,=+-]", "_", ",".join(words))
    if len(name.encode()) <= LONGEST:
        return Path(name)
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Path(name.encode()[: LONGEST - 17].decode(errors="ignore") + f"-{digest}")


def _check_distinct(members: Sequence[Member]) -> None:
    """Raises UserError if two are the same run, such as of lr=1e-3 and lr=0.001, or of one folder.

    One run that is counted as two makes a spread look smaller than it is.
    """
    for kind, keys in (
        ("folder", [str(member.folder) for member in members]),
        ("run", [json.dumps(describe(member.ex)) for member in members]),
    ):
        first: dict[str, Member] = {}
        for key, member in zip(keys, members, strict=True):
            if (other := first.setdefault(key, member)) is not member:
                words = [" ".join(one.loaded.assignments) for one in (other, member)]
                raise UserError(
                    f"the same {kind} twice, of {words[0]} and {words[1]}: leave out one"
                )


def run(
    file: Path,
    words: Sequence[str],
    axes: Sequence[config.Axis],
    seeds: int,
    *,
    workdir: Path | None,
    resume: bool,
    stop_at: int | None,
    how: How | None,
) -> int:
    """Trains all, shows what they come to, and returns the exit status.

    With `resume` those that are complete are left as they are, and new ones are added: --seeds 10
    after --seeds 5 trains five more.

    Raises:
      UserError: something does not fit; the folder holds other runs.
      RunFailed: some have diverged; the others are complete.
    """
    every = members(file, words, axes, seeds)
    check(every[0].ex)
    with folders.claimed(every[0].ex.name, workdir, resume, many=True) as folder:
        all_members = [replace(member, folder=folder / member.folder) for member in every]
        print(f"{len(all_members)} runs of {file} in {folder}", flush=True)
        with Interrupt() as interrupt:
            outcomes = train(
                all_members,
                resume=resume,
                interrupt=interrupt,
                said=lambda text: print(text, flush=True),
                stop_at=stop_at,
                how=how,
            )
        show(folder)
    early = [o for o in outcomes if o.ended == "interrupted"]
    if early:
        why = interrupt.signal.name if interrupt.signal else "--steps"
        print(f"{why}: {len(early)} of {len(outcomes)} are saved, to go on with --resume")
    if interrupt.signal:
        return interrupt.exit_status
    if bad := [o for o in outcomes if o.ended == "diverged"]:
        one = f"{bad[0].member.folder.name}: {bad[0].why}"
        raise RunFailed(f"{len(bad)} of {len(outcomes)} runs diverged, the others did not; {one}")
    return 0


def dry_run(
    file: Path, words: Sequence[str], axes: Sequence[config.Axis], seeds: int, how: How | None
) -> int:
    """Prints which runs there would be, and in which groups they would train."""
    found = members(file, words, axes, seeds)
    check(found[0].ex)
    whole = grouped([member.ex for member in found])
    for group in (part for one in whole for part in one.fitting(how)):
        print(group)
        for i in group.members:
            print(f"  {found[i].folder}")
    return 0


def show(folder: Path) -> None:
    """Writes results.csv, a line for each run in the folder, and prints a table of settings."""
    runs = find(folder)
    columns = dict.fromkeys(name for run in runs for name in run.scores)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["run", "seed", "step", "ended", *columns])
    for run in runs:
        cells = [run.scores[c] if c in run.scores else "" for c in columns]
        lines.writerow([run.folder.name, run.seed, run.step, run.ended, *cells])
    folders.write(folder / "results.csv", text.getvalue())
    rows: list[Sequence[object]] = [("setting", "n", *columns)]
    good = [run for run in runs if run.ended != "diverged"]
    for label, group in by_setting(good).items():
        found = [[run.scores[c] for run in group if c in run.scores] for c in columns]
        told = [summary(values) if values else None for values in found]
        rows.append((label, len(group), *(plus_minus(s.mean, s.sd) if s else "" for s in told)))
    without = f", without the {len(runs) - len(good)} that diverged" * (len(good) < len(runs))
    print("\n" + table(f"{len(runs)} runs, mean ± sd{without}", rows))
    print(f"\n{folder / 'results.csv'} has each; python -m jaxeco.report {folder} draws them")
