"""Files on storage that fails now and then: what is tried again, and what a user reads at last."""

import errno
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from jaxeco.errors import UserError

PAUSES = (0.1, 0.5, 2.0)  # seconds before each further attempt
# what disks and servers at the other end of a network report, and soon do not any more
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)

P = ParamSpec("P")
T = TypeVar("T")


def persistent(action: Callable[P, T]) -> Callable[P, T]:
    """`action`, called anew after a pause while storage fails; it must bear to be called again.

    Raises:
      OSError, or tensorstore's ValueError: the last attempt failed, too, or it is no error that
        passes.
    """

    @functools.wraps(action)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for pause in PAUSES:
            try:
                return action(*args, **kwargs)
            except (OSError, ValueError) as error:
                if not passing(error):
                    raise
            time.sleep(pause)
        return action(*args, **kwargs)

    return call


def passing(error: BaseException) -> bool:
    """Whether it is of the kind that passes, as far as its number tells."""
    return _number(error) in TRANSIENT


def reason(error: BaseException) -> str:
    """One short line: the operating system's own words if there are any."""
    number = _number(error)
    text = str(error) or type(error).__name__
    return os.strerror(number) if number else text.splitlines()[0][:120]


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, TimeoutError):  # orbax makes its own of one that had the number
        return errno.ETIMEDOUT
    # so tensorstore puts it, in a ValueError, after much else
    system = re.search(r"os_error_code='(\d+)'", str(error))
    return int(system[1]) if system else None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns a failure of the file system into a line that a user can act on.

    Raises:
      UserError: `what` could not be done, and why.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
        raise UserError(explanation(what, reason(error))) from error


def explanation(what: str, why: str) -> str:
    return f"{what}: {why}; make room or give a folder that can be written"


@persistent
def make_folder(path: Path, parents: bool = False) -> None:
    path.mkdir(parents=parents, exist_ok=True)


@persistent
def write_text(path: Path, text: str) -> None:
    """Returns when the text is on the disk itself: a machine may stop, and not only a process."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@persistent
def write_whole(path: Path, contents: str | bytes) -> None:
    """Whole or not at all, however the process ends; a machine that stops may still lose it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    part.replace(path)


@persistent
def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@persistent
def listed(folder: Path) -> list[Path]:
    """What is directly in a folder."""
    return list(folder.iterdir())


@persistent
def files(folder: Path) -> dict[str, Path]:
    """Every file below a folder, by its relative name with forward slashes."""
    found = [Path(at) / name for at, _, names in os.walk(folder, onerror=_raise) for name in names]
    whole = [path for path in found if path.is_file()]  # no pipe, which one could wait for
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in whole))


@persistent
def rename(path: Path, target: Path) -> None:
    try:
        path.rename(target)
    except FileNotFoundError:
        # an attempt that was reported as failed had been carried out
        if path.exists() or not target.exists():
            raise


@persistent
def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@persistent
def sha256(path: Path) -> str:
    """Reads piece by piece, however long the file is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _raise(error: OSError) -> None:
    raise error
