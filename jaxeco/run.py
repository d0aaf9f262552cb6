"""Runs an experiment: python -m jaxeco.run experiments/cifar_cnn.py [key=value ...] [options]"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from jaxeco import config, runtime
from jaxeco.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m jaxeco.run --help")


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m jaxeco.run", description=__doc__, add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("file", nargs="?", type=Path, help="the experiment, such as experiments/digits_mlp.py")
    add("assignments", nargs="*", metavar="key=value", help="its arguments, or fields: lr=0.1")
    add("--workdir", type=Path, help="where the run goes (default: runs/<name>, or <name>-2, ...)")
    add(
        "--resume", action="store_true", help="continue from the newest checkpoint, if there is one"
    )
    add("--steps", type=int, help="stop after this step; --resume goes on from there")
    add(
        "--dry-run", action="store_true", help="show the resolved experiment and its cost, and stop"
    )
    add("-h", "--help", action="store_true", help="with FILE: the experiment's arguments")
    options = parser.parse_intermixed_args(words)
    if options.help and options.file is None:
        parser.print_help()
        raise SystemExit(0)
    if options.file is None:
        parser.error("no experiment file given")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: expected at least 1")
    return options


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    options = parse(words)
    if options.help:
        print(config.help_text(options.file))
        return 0
    loaded = config.load(options.file, options.assignments)
    from jaxeco import session  # from here on JAX is awake

    if options.dry_run:
        return session.dry_run(loaded)
    return session.run(loaded, options.workdir, options.resume, options.steps)


if __name__ == "__main__":
    runtime.configure()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        print("interrupted before training; nothing was saved", file=sys.stderr)
        status = 130
    sys.exit(status)
