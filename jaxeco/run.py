"""Runs an experiment: python -m jaxeco.run experiments/cifar_cnn.py [key=value ...] [options]"""

import argparse
import re
from pathlib import Path
from typing import Any

from jaxeco import cluster, command, config, runtime


def steps(text: str) -> tuple[int, ...]:
    """The type of --profile: first step and end, or none."""
    match = re.fullmatch(r"(\d+):(\d+)|", text)
    if match is None or (text and int(match[1]) >= int(match[2])):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:END, such as 100:110")
    return tuple(int(n) for n in match.groups() if n)


def axis(text: str) -> config.Axis:
    """The type of --grid."""
    try:
        return config.Axis.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse(words: list[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m jaxeco.run", description=__doc__, add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("file", nargs="?", type=Path, help="the experiment, such as experiments/digits_mlp.py")
    add("assignments", nargs="*", metavar="key=value", help="its arguments, or fields: lr=0.1")
    add("--workdir", type=Path, help="where the run goes (default: runs/<name>, or <name>-2, ...)")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--steps", type=int, help="stop after this step; --resume goes on from there")
    add("--seeds", type=int, metavar="N", help="N runs at once, with seeds from seed=... on")
    add(
        "--grid",
        type=axis,
        action="append",
        default=[],
        metavar="lr=0.1,0.3",
        help="a run for each value; twice: for every combination",
    )
    add("--lr-find", action="store_true", help="try rising learning rates in 200 steps: which?")
    add("--together", choices=("mapped", "in-turn"), help="how many runs train (default: chosen)")
    add("--dry-run", action="store_true", help="show the resolved experiment and its cost only")
    add(
        "--profile",
        type=steps,
        metavar="100:110",
        help="show what takes time; without 100:110, in some steps",
    )
    add("--multihost", action="store_true", help="one of a TPU pod's, SLURM's, Kubernetes' hosts")
    add("--coordinator", metavar="HOST:PORT", help="or say where the first of them listens ...")
    add("--process", metavar="I/N", help="... and which of how many this is, from 0")
    add("--timeout", type=int, help=f"s, to arrive or give a sign of life ({cluster.TIMEOUT})")
    add("-h", "--help", action="store_true", help="with FILE: the experiment's arguments")
    own = ("--workdir=", "--steps=", "--coordinator=", "--process=", "--timeout=", "--profile=")
    followers = [*words[1:], ""]  # --profile takes the next word only if that is a window
    words = [
        "--profile=" if word == "--profile" and not re.match(r"\d+(:|$)", after) else word
        for word, after in zip(words, followers)
    ]
    for word in words:
        if word.startswith("--") and "=" in word and not word.startswith(own):
            parser.error(f"{word}: arguments of the experiment are written {word.lstrip('-')}")
    options = parser.parse_intermixed_args(words)
    if options.help and options.file is None:
        parser.print_help()
        raise SystemExit(0)
    if options.file is None:
        parser.error("no experiment file given")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: expected at least 1")
    if options.dry_run:
        given = {"--resume": options.resume, "--steps": options.steps, "--workdir": options.workdir}
        given["--profile"] = options.profile is not None
        surplus = " and ".join(word for word, value in given.items() if value)
        if surplus:
            parser.error(f"--dry-run runs nothing: leave out {surplus}")
    options.many = bool(options.grid) or options.seeds is not None
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: expected at least 1")
    if options.together and not options.many:
        parser.error("--together is for many runs: with --seeds or --grid")
    if options.lr_find:
        given = {"--seeds": options.seeds, "--grid": options.grid, "--resume": options.resume}
        given |= {"--steps": options.steps, "--dry-run": options.dry_run}
        given |= {"--profile": options.profile is not None}
        if surplus := " and ".join(word for word, value in given.items() if value):
            parser.error(f"--lr-find is a test of its own: leave out {surplus}")
    if options.many:
        given = {"--profile": options.profile is not None, "--multihost": options.multihost}
        given["--coordinator"] = options.coordinator is not None
        surplus = " and ".join(word for word, value in given.items() if value)
        if surplus:
            parser.error(f"--seeds and --grid run in one process, unprofiled: leave out {surplus}")
    if (options.coordinator is None) != (options.process is None):
        parser.error("--coordinator HOST:PORT and --process I/N go together")
    if options.multihost and options.coordinator is not None:
        parser.error("--multihost finds out what --coordinator and --process say: leave out either")
    if options.timeout is not None:
        if not (options.multihost or options.coordinator):
            parser.error("--timeout is for several processes: with --multihost or --coordinator")
        if options.timeout < 5:
            parser.error(f"--timeout {options.timeout}: expected at least 5 seconds")
    return options


def join(options: argparse.Namespace) -> None:
    """Makes this process one of several, if it is to be; before anything else of JAX."""
    timeout = options.timeout or cluster.TIMEOUT
    if options.multihost:
        cluster.join(cluster.Place.detect(timeout), timeout)
    if options.coordinator is not None:
        cluster.join(cluster.Place.parse(options.coordinator, options.process), timeout)


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    if options.help:
        print(config.help_text(options.file))
        return 0
    join(options)
    if options.many:
        return many(options)
    loaded = config.load(options.file, options.assignments)
    from jaxeco import lr_find, session  # from here on JAX is awake

    if options.lr_find:
        return lr_find.run(loaded, options.workdir)
    if options.dry_run:
        return session.dry_run(loaded)
    return session.run(loaded, options.workdir, options.resume, options.steps, options.profile)


def many(options: argparse.Namespace) -> int:
    runtime.split_cpu()
    from jaxeco import grid

    what = options.file, options.assignments, options.grid, options.seeds or 1
    how: Any = options.together and options.together.replace("-", " ")
    if options.dry_run:
        return grid.dry_run(*what, how)
    return grid.run(
        *what, workdir=options.workdir, resume=options.resume, stop_at=options.steps, how=how
    )


if __name__ == "__main__":
    command.start(main)
