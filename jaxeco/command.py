"""How every command of jaxeco starts and ends: JAX's settings before, an exit status after."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from jaxeco import cluster, hosts, runtime
from jaxeco.errors import Hung, UserError


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a UserError, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def checkpoint(text: str) -> str | int:
    """The type of a --checkpoint option."""
    if not text.isdigit() and text not in ("best", "newest"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected best, newest or a step")
    return int(text) if text.isdigit() else text


def start(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs `main` on the words of the command line and exits with the status it returns.

    A UserError becomes one line on standard error and its own status; Ctrl-C, where nothing handles
    it, status 130; any other exception is a bug and keeps its traceback. Several processes end
    together (`jaxeco.cluster`).
    """
    runtime.restart_with_huge_pages()
    runtime.configure()
    warnings.showwarning = _warn
    said, hung = "", False
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        status, said, hung = error.status, f"error: {error}", isinstance(error, Hung)
    except KeyboardInterrupt:
        status, said = 130, "interrupted"
    except Exception as error:
        if hosts.count() > 1:
            cluster.crash(error)
        raise
    if hosts.count() > 1:
        cluster.fail(said, status) if said else cluster.leave(status)
    if said:
        print(said, file=sys.stderr, flush=True)
    if hung:
        os._exit(status)
    sys.exit(status)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    if hosts.first():
        print(f"warning: {message}", file=sys.stderr)
