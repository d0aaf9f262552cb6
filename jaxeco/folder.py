"""A run's folder: which one, kept to one process, and the record of what ran in it."""

import contextlib
import difflib
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxeco import hosts, storage
from jaxeco.config import Loaded, load
from jaxeco.description import describe
from jaxeco.errors import UserError

RECORD = "run.json"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"  # says who runs here
TOKENIZER = "tokenizer.json"  # of a run on text
PACKAGES = (
    "jaxeco",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)


def check(name: str, workdir: Path | None, resume: bool) -> None:
    """Raises what `choose` raises, on all processes: to complain before the data is opened."""
    hosts.led(lambda: str(choose(name, workdir, resume)))


def choose(name: str, workdir: Path | None, resume: bool, many: bool = False) -> Path:
    """The folder of this run: `workdir`, or runs/<name>, runs/<name>-2, ... so that none is lost.

    Args:
      many: it is for many runs at once.

    Raises:
      UserError: the given workdir holds a run already and this one does not resume it; what is to
        be resumed is many runs, and this is one, or the reverse.
    """
    folder = _chosen(name, workdir, resume)
    if resume and many and (folder / RECORD).exists():
        raise UserError(
            f"{folder} holds a single run: leave out --seeds and --grid, or choose another"
            " --workdir"
        )
    if resume and not many and not (folder / RECORD).exists() and recorded(folder):
        count = len(list(folder.glob(f"*/{RECORD}")))
        raise UserError(
            f"{folder} holds many runs that were started as one ({count}): resume them with --seeds"
            " and --grid as before, or choose another --workdir"
        )
    return folder


def _chosen(name: str, workdir: Path | None, resume: bool) -> Path:
    if workdir is None:
        taken = {}
        for there in Path("runs").glob(f"{glob.escape(name)}*"):
            match = re.fullmatch(re.escape(name) + r"(?:-(\d+))?", there.name)
            if match and recorded(there):
                taken[int(match[1] or 1)] = there
        if resume and taken:
            return taken[max(taken)]
        number = max(taken, default=0) + 1
        return Path("runs") / (name if number == 1 else f"{name}-{number}")
    if not resume and holds_run(workdir):
        raise UserError(
            f"{workdir} already holds a run; continue it with --resume, or choose another --workdir"
        )
    return workdir


def holds_run(folder: Path) -> bool:
    """Whether there is a run in the folder, or many that were started as one."""
    return recorded(folder) or any(folder.glob(f"{CHECKPOINTS}/*"))


def recorded(folder: Path) -> bool:
    return (folder / RECORD).exists() or any(folder.glob(f"*/{RECORD}"))


@contextlib.contextmanager
def claimed(name: str, workdir: Path | None, resume: bool, many: bool = False) -> Iterator[Path]:
    """Chooses the folder, makes it, and keeps other runs out of it meanwhile.

    Of several processes the first does so, and the others are told which it is.

    Raises:
      UserError: as `choose` and `locked`; or a process does not see the folder.
    """
    with contextlib.ExitStack() as held:

        def claim() -> list[str]:
            folder = held.enter_context(_claimed(name, workdir, resume, many))
            return [str(folder), str(folder.absolute())]

        ours, absolute = hosts.led(claim)
        folder = Path(ours if hosts.count() == 1 else absolute)
        _check_shared(folder)
        yield folder


def _check_shared(folder: Path) -> None:
    """Raises UserError, on all processes, unless all of them see the first's lock in the folder."""
    expected = hosts.from_first(_text(folder / LOCK))
    deadline = time.monotonic() + 70  # s: so long a network's file system may know old contents
    while (seen := _text(folder / LOCK) == expected) is False and time.monotonic() < deadline:
        time.sleep(0.2)
    everyone = enumerate(hosts.gather([seen, platform.node()]))
    if blind := [f"process {i} on {node}" for i, (sees, node) in everyone if not sees]:
        raise UserError(
            f"{', '.join(blind)}: does not see {folder}, the run's folder that the first has made;"
            " choose a --workdir on a file system that all hosts share"
        )


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


@contextlib.contextmanager
def _claimed(name: str, workdir: Path | None, resume: bool, many: bool) -> Iterator[Path]:
    while True:
        folder = choose(name, workdir, resume, many)
        with locked(folder):
            if not resume and holds_run(folder):  # another run was quicker since we chose
                continue
            yield folder
            return


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from running in it meanwhile.

    Raises:
      UserError: it cannot be made or written, or another process runs in it.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 200).decode(errors="replace")
            raise UserError(
                f"{folder} is in use by another run ({owner}); choose another --workdir"
            ) from error
        with _writing(folder):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
            os.fsync(descriptor)  # so that other hosts may read it
        yield
    finally:
        os.close(descriptor)


def record(folder: Path, loaded: Loaded, **facts: Any) -> list[str]:
    """Keeps the source, the words of the command line, the resolved experiment, versions, devices.

    The source is the experiment file and what it imports from beside it, so that the copy loads as
    well. A resumed run adds an entry to "sessions", and its source if that has changed; the rest
    is as the run began.

    Returns:
      what a person should know of: that the code is not what the last session ran, say.
    """
    texts = _sources(loaded)
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["python", "-m", "jaxeco.run", *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "xla_flags": os.environ["XLA_FLAGS"] if "XLA_FLAGS" in os.environ else "",
        "git": _git(loaded.path.parent),
        **code(loaded),
        **facts,
    }
    path, notes, target = folder / RECORD, [], folder
    contents: dict[str, Any] = {
        "file": str(loaded.path),
        "assignments": list(loaded.assignments),
        "resolved": describe(loaded.experiment),
        "sessions": [],
    }
    if path.exists():
        try:
            with storage.explained(f"cannot read {path}"):
                text = storage.read_text(path)
            contents = json.loads(text)
            if changed := changes(contents["sessions"][-1], session):
                notes.append(
                    f"{' and '.join(changed)} changed since this run's last session:"
                    " it goes on, but not to the bit as it would have"
                )
            target = folder / f"session-{len(contents['sessions']) + 1}"
        except (ValueError, LookupError, TypeError) as error:
            notes.append(f"{path} is damaged ({error}); it is set aside as {RECORD}.damaged")
            with _writing(folder):
                path.replace(path.with_name(f"{RECORD}.damaged"))
    contents["sessions"].append(session)
    with _writing(folder):
        if target == folder or contents["sessions"][-2]["code"] != session["code"]:
            target.mkdir(exist_ok=True)
            for name, text in texts.items():
                storage.write_whole(target / name, text)
        storage.write_whole(path, json.dumps(contents, indent=2) + "\n")
    return notes


def code(loaded: Loaded) -> dict[str, dict[str, str | None]]:
    """What computes: versions of packages, and digests of the experiment's and of our own code."""
    from jaxeco import onednn  # here, since it wakes JAX up

    versions = {name: _version(name) for name in PACKAGES}
    if library := onednn.version():  # only where it is used
        versions["oneDNN"] = library
    return {
        "versions": versions,
        "code": {"experiment": _digest(_sources(loaded)), "jaxeco": _package_digest()},
    }


def changes(before: dict[str, Any], session: dict[str, Any]) -> list[str]:
    """Names of what `code` tells, where two sessions differ."""
    both = [(session[kind], before[kind]) for kind in ("versions", "code")]
    return [
        name
        for now, then in both
        for name in {**now, **then}
        if (now[name] if name in now else None) != (then[name] if name in then else None)
    ]


def _sources(loaded: Loaded) -> dict[str, str]:
    """The experiment file, as experiment.py, and the modules it has imported from beside it."""
    beside = os.path.dirname(os.path.realpath(loaded.path))
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    # folders first, of which there are few: to resolve every file takes a tenth of a second
    folders = {folder for file in files if file and (folder := os.path.dirname(file))}
    near = {folder for folder in folders if os.path.realpath(folder) == beside}
    paths = [Path(file) for file in files if file and os.path.dirname(file) in near]
    return {"experiment.py": loaded.source} | {p.name: p.read_text() for p in sorted(paths)}


@cache
def _package_digest() -> str:
    """Of this package as it was when it was first asked for, about when it was loaded."""
    root = Path(__file__).parent
    return _digest({str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*.py"))})


def _digest(texts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to the run's folder {folder}: {error.strerror}") from error


def open_run(folder: str | os.PathLike[str]) -> Loaded:
    """The experiment of a run, from the copy that its folder keeps and the words it was given.

    Raises:
      UserError: it is not the folder of a run.
    """
    folder = Path(folder)
    try:
        words = json.loads((folder / RECORD).read_text())["assignments"]
    except FileNotFoundError as error:
        runs = sorted(str(path.parent) for path in folder.parent.glob(f"*/{RECORD}"))
        near = difflib.get_close_matches(str(folder), runs, n=1)
        there = f"did you mean {near[0]}?" if near else f"there are: {', '.join(runs) or 'none'}"
        raise UserError(f"{folder} is not the folder of a run; {there}") from error
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{folder} is not the folder of a run: {error}") from error
    return load(folder / "experiment.py", words)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """What a run has come to, as result.json."""
    with _writing(folder):
        storage.write_whole(folder / RESULT, json.dumps(result, indent=2) + "\n")


def read_result(folder: Path) -> dict[str, Any] | None:
    """A run's result.json; None if there is none that can be read."""
    try:
        result = json.loads((folder / RESULT).read_text())
        result["step"], result["of"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return result


def write(path: Path, text: str) -> None:
    """A file of a run's folder, whole or not at all; raises UserError if it cannot be written."""
    with _writing(path.parent):
        storage.write_whole(path, text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
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
