"""Decoded arrays on disk: made once, checked whenever they are opened, shared between processes.

An entry is a folder `<cache>/data/<name>/` with one `.npy` file per field and `meta.json`. It is
written under another name and renamed when it is whole, so that a process that dies, or two that
start together, can never leave half an entry behind.
"""

import errno
import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxeco import runtime
from jaxeco.errors import UserError

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
Growing = Mapping[str, tuple[tuple[int | None, ...], np.dtype]]
Block = Mapping[str, np.ndarray]

# Checksums read at most this much of an array: about 0.3 s, whatever the size of the data.
CHECKED_BYTES = 512 * 2**20


def cached(
    name: str, source: Any, layout: Growing, blocks: Callable[[], Iterable[Block]]
) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of entry `name`, first decoded if they are not there, stale or damaged.

    Args:
      name: the entry's folder, unique to what it holds.
      source: what the arrays are made from, as JSON; an entry made from anything else is replaced.
      layout: shape and dtype of each field; None for a first dimension known only at the end.
      blocks: gives all examples in order, some at a time: {field: array [n, ...]}.

    Returns:
      Read-only memory maps by field, and a digest of their content.

    Raises:
      UserError: the cache cannot be written.
    """
    folder = runtime.cache_dir() / "data" / name
    with suppress(_Absent, _Damaged):
        return _load(folder, source, layout)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f"{name}.lock"):
            try:  # another process may have made it while we waited
                return _load(folder, source, layout)
            except _Absent:
                pass
            except _Damaged as damage:
                warnings.warn(f"{folder} is damaged ({damage}): decoding again", stacklevel=2)
            _write(folder, source, layout, blocks)
            return _load(folder, source, layout)
    except OSError as error:
        raise UserError(
            f"cannot keep decoded data in {folder.parent}: {error.strerror or error}; free some "
            "space there, or name another folder in the environment variable JAXECO_CACHE"
        ) from error


class _Absent(Exception):
    """No entry, or one made from another source."""


class _Damaged(Exception):
    """An entry that is not as it was written; the message says in what."""


def _load(folder: Path, source: Any, layout: Growing) -> tuple[dict[str, np.ndarray], str]:
    if not folder.exists():
        raise _Absent
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["source"] != source:
            raise _Absent
        arrays = {}
        for field, (shape, dtype) in layout.items():
            written = meta["fields"][field]
            array = np.load(folder / f"{field}.npy", mmap_mode="r")
            found = _description(array)
            if found != written:
                raise _Damaged(f"{field}.npy: expected {written}, found {found}")
            sizes = zip(array.shape, shape, strict=True)
            if array.dtype != dtype or any(want not in (None, has) for has, want in sizes):
                raise _Damaged(f"{field}.npy: expected {dtype}{list(shape)}, found {found}")
            arrays[field] = array
        return arrays, str(meta["digest"])
    except (_Absent, _Damaged):
        raise
    except Exception as error:  # numpy's parsers have some of their own
        raise _Damaged(f"{type(error).__name__}: {error}") from error


def _write(
    folder: Path, source: Any, layout: Growing, blocks: Callable[[], Iterable[Block]]
) -> None:
    for abandoned in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(abandoned, ignore_errors=True)  # of a killed process: we hold the lock
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        digests = {
            field: hashlib.blake2b(f"{shape} {dtype}".encode(), digest_size=16)
            for field, (shape, dtype) in layout.items()
        }
        with ExitStack() as stack:
            files, rows = {}, dict.fromkeys(layout, 0)
            for field in layout:
                files[field] = stack.enter_context((partial / f"{field}.npy").open("wb"))
                _write_header(files[field], *layout[field], rows=0)
            # Written in order rather than into a memory map, which a full disk would kill with
            # SIGBUS instead of an error.
            for block in blocks():
                for field, values in block.items():
                    data = np.ascontiguousarray(values, layout[field][1]).data
                    files[field].write(data)
                    digests[field].update(data)
                    rows[field] += len(values)
            for field, file in files.items():
                _write_header(file, *layout[field], rows=rows[field])
        written = {field: np.load(partial / f"{field}.npy", mmap_mode="r") for field in layout}
        meta = {
            "source": source,
            "digest": "".join(digest.hexdigest() for digest in digests.values()),
            "fields": {field: _description(array) for field, array in written.items()},
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp shuts others out
        try:
            partial.rename(folder)
        except OSError as error:  # without locks another process can have been first
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_header(
    file: BinaryIO, shape: tuple[int | None, ...], dtype: np.dtype, rows: int
) -> None:
    """The header has the same length for any number of rows: numpy leaves room for it to grow."""
    known = tuple(rows if size is None else size for size in shape)
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": known}
    file.seek(0)
    np.lib.format.write_array_header_2_0(file, header)


def _description(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": array.dtype.str, "crc32": _checksum(array)}


def _checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes; of blocks spread evenly over it if it exceeds CHECKED_BYTES."""
    flat = array.reshape(-1).view(np.uint8).data
    if len(flat) <= CHECKED_BYTES:
        return zlib.crc32(flat)
    crc, block = 0, CHECKED_BYTES // 512
    for start in np.linspace(0, len(flat) - block, 512).astype(np.int64):
        crc = zlib.crc32(flat[start : start + block], crc)
    return crc


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; the system frees it when its holder dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that holds {path}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: work may be done twice, but renaming is atomic
        yield


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far a job has come on stderr; gives `report(done)`, to be called at every chance.

    A terminal sees one line that changes; a file gets the first, the last, and one every 30 s.
    """
    live = sys.stderr.isatty()
    every, begun, last, unfinished = 0.2 if live else 30.0, time.monotonic(), -30.0, False

    def report(done: int) -> None:
        nonlocal last, unfinished
        now = time.monotonic() - begun
        if now - last < every and done != total:
            return
        share = f"{done / total:.0%}" if total else f"{done / 2**20:.0f} MiB" if done else "..."
        last, unfinished = now, live and done != total
        end = "" if unfinished else "\n"
        print(f"{chr(13) if live else ''}{label} {share}", end=end, file=sys.stderr, flush=True)

    try:
        report(0)
        yield report
    finally:
        if unfinished:  # so that what comes next starts on a line of its own
            print(file=sys.stderr, flush=True)
