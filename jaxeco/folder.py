"""A run's folder: which one, kept to one process, and the record of what ran in it."""

import contextlib
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxeco.config import Loaded, describe
from jaxeco.errors import UserError

RECORD = "run.json"
PACKAGES = ("jaxeco", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def choose(name: str, workdir: Path | None, resume: bool) -> Path:
    """The folder of this run: `workdir`, or runs/<name>, runs/<name>-2, ... so that none is lost.

    Raises:
      UserError: the given workdir holds a run already and this one does not resume it.
    """
    if workdir is None:
        taken = {}
        for record in Path("runs").glob(f"{name}*/{RECORD}"):
            if match := re.fullmatch(re.escape(name) + r"(?:-(\d+))?", record.parent.name):
                taken[int(match[1] or 1)] = record.parent
        if resume and taken:
            return taken[max(taken)]
        number = max(taken, default=0) + 1
        return Path("runs") / (name if number == 1 else f"{name}-{number}")
    if not resume and (workdir / RECORD).exists():
        raise UserError(
            f"{workdir} already holds a run; continue it with --resume, or choose another --workdir"
        )
    return workdir


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from running in it meanwhile.

    Raises:
      UserError: it cannot be made or written, or another process runs in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"cannot write to the run's folder {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by another run ({file.read().strip()}); "
                "choose another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def record(folder: Path, loaded: Loaded, **facts: Any) -> None:
    """Keeps the source, the words of the command line, the resolved experiment, versions, devices.

    A resumed run adds an entry to "sessions"; the rest is as the run began.
    """
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["python", "-m", "jaxeco.run", *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "xla_flags": os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else "",
        "git": _git(loaded.path.parent),
        **facts,
    }
    path = folder / RECORD
    if path.exists():
        contents = json.loads(path.read_text())
        contents["sessions"].append(session)
    else:
        contents = {
            "file": str(loaded.path),
            "assignments": list(loaded.assignments),
            "resolved": describe(loaded.experiment),
            "sessions": [session],
        }
        _write(folder / "experiment.py", loaded.source)
    _write(path, json.dumps(contents, indent=2) + "\n")


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """What a finished run came to, as result.json."""
    _write(folder / "result.json", json.dumps(result, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Whole or not at all, however the process ends."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path) -> str | None:
    """The commit that `folder` is at, with "+changes" if the tree differs from it."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")
