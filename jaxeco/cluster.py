"""How several processes become one run, and how they end together.

`join` comes before anything else of JAX. First a roll call at the coordinator's address: JAX itself
aborts, with a stack trace that names nobody, if one is missing. Then `jax.distributed`. From then
on two threads watch: a process that is gone, or that fails alone, ends all others within a minute
or so, wherever they wait.

What XLA does by itself is kept as the last resort: it aborts a process with a stack trace.
"""

import contextlib
import ctypes
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Self

from jaxeco import hosts
from jaxeco.errors import UserError

TIMEOUT = 60  # s that a process has to arrive
SILENCE = 60  # s without a sign of life, at most, after which a process counts as gone
GRACE = 5.0  # s that an error waits for the same error of the others
FAILED = "jaxeco/failed"  # the key under which a process says that it fails alone


@dataclass(frozen=True)
class Place:
    """Where the processes meet, and which of them this is."""

    host: str
    port: int
    index: int
    count: int
    detected: bool = False  # by the environment's scheduler, not from the command line

    @classmethod
    def parse(cls, coordinator: str, process: str) -> Self:
        """From the words of --coordinator and --process.

        Raises:
          UserError: they are not HOST:PORT and I/N, or I is not below N.
        """
        host, _, port = coordinator.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator {coordinator}: expected HOST:PORT, such as 10.0.0.2:1234"
            )
        found = re.fullmatch("([0-9]+)/([0-9]+)", process)
        if not found or int(found[2]) < 1:
            raise UserError(f"--process {process}: expected I/N, such as 0/2 and 1/2 for two")
        index, count = int(found[1]), int(found[2])
        if index >= count:
            raise UserError(
                f"--process {process}: processes are counted from 0: expected 0/{count} to"
                f" {count - 1}/{count}"
            )
        return cls(host.strip("[]"), int(port), index, count)

    @classmethod
    def detect(cls, timeout: int) -> Self:
        """As JAX finds it around this process: a TPU pod, SLURM, Kubernetes, Open MPI.

        Raises:
          UserError: it finds nothing.
        """
        _hush()
        from jax._src.clusters import ClusterEnv

        try:
            address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, timeout
            )
        except Exception as error:  # of a metadata server, of Kubernetes, of a missing variable
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--multihost: {reason}; or say it: --coordinator HOST:PORT --process I/N"
            ) from error
        if address is None or count is None or index is None:
            raise UserError(
                "--multihost: found no TPU pod, SLURM or Kubernetes job around this process; say"
                " where the processes meet: --coordinator HOST:PORT --process I/N"
            )
        host, _, port = address.rpartition(":")
        return cls(host.strip("[]"), int(port), int(index), int(count), detected=True)

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def join(place: Place, timeout: int = TIMEOUT) -> None:
    """Returns when all processes are there, and JAX knows of them. One process joins nobody.

    Raises:
      UserError: some did not arrive, and which; nobody answers at the address; the port is in use.
    """
    if place.count == 1:
        return
    if place.index == 0:
        call_roll(place, timeout)
    else:
        answer_roll(place, timeout)
    _initialize(place, timeout)
    for watch in (_watch_lives, _watch_failures):
        threading.Thread(target=watch, daemon=True).start()


# The roll call: every process says a line to the first, which answers when it has heard all


def call_roll(place: Place, timeout: float) -> None:
    """The first process: waits for the others, and tells them whether all have come."""
    deadline = time.monotonic() + timeout
    there: dict[int, socket.socket] = {}
    verdict = None
    with _server(place) as server:
        while verdict is None and len(there) < place.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                caller = server.accept()[0]
            except TimeoutError:
                missing = [i for i in range(1, place.count) if i not in there]
                verdict = _missing(place, missing, timeout)
                break
            match _hear(caller, 2.0):
                case {"process": int(i), "of": int(n)} if n != place.count:
                    verdict = f"process {i} was started as one of {n}, the first as one of"
                    verdict += f" {place.count}: give all the same N in --process I/N"
                case {"process": int(i)} if i == 0 or (i in there and _open(there[i])):
                    verdict = f"two processes were started as --process {i}/{place.count}"
                case {"process": int(i)}:
                    there[i] = caller
                    continue
            _say(caller, verdict)  # or it was no process of ours
        for caller in there.values():
            _say(caller, verdict)
    if verdict is not None:
        raise UserError(verdict)


def answer_roll(place: Place, timeout: float) -> None:
    """Any other process: says that it is there, and waits to hear that all are."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            caller = socket.create_connection((place.host, place.port), timeout)
            break
        except socket.gaierror as error:
            raise UserError(
                f"{place.host}: no such host ({error.strerror}); mend the coordinator's address"
            ) from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"nobody answers at {place.address} for {timeout:g} s ({error}): start process"
                    f" 0 of {place.count} there, or mend the coordinator's address"
                ) from error
            time.sleep(0.1)
    with caller:
        caller.sendall(json.dumps({"process": place.index, "of": place.count}).encode() + b"\n")
        match _hear(caller, timeout + 5):  # its time may have begun later than ours
            case {"verdict": None}:
                return
            case {"verdict": str(verdict)}:
                raise UserError(verdict)
    raise UserError(
        f"what answers at {place.address} is not the first process of a run, or it ended: start"
        f" process 0 of {place.count} there, or mend the coordinator's address"
    )


def _server(place: Place) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", place.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
            )
        return socket.create_server(("", place.port), backlog=4096)
    except OSError as error:
        raise UserError(
            f"cannot listen on port {place.port} ({os.strerror(error.errno or 0)}): end the"
            " other run, or give all processes another port in --coordinator HOST:PORT"
        ) from error


def _missing(place: Place, missing: list[int], timeout: float) -> str:
    said = f"{_named(missing, place.count)} did not arrive within {timeout:g} s: "
    if place.detected:
        return said + "see what came of the start there"
    words = ", ".join(f"--process {i}/{place.count}" for i in missing[:8])
    return f"{said}start {'it' if len(missing) == 1 else 'them'} with {words}"


def _named(indices: list[int], count: int) -> str:
    """ "process 1 of 4", "processes 1, 3 of 4"."""
    more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    some = ", ".join(map(str, indices[:8])) + more
    return f"process{'es' if len(indices) > 1 else ''} {some} of {count}"


def _hear(caller: socket.socket, seconds: float) -> Any:
    """The JSON value of the line that comes; None if none does."""
    caller.settimeout(seconds)
    try:
        return json.loads(caller.makefile("rb").readline(1000))
    except (OSError, ValueError):
        return None


def _say(caller: socket.socket, verdict: str | None) -> None:
    try:
        caller.sendall(json.dumps({"verdict": verdict}).encode() + b"\n")
        caller.close()
    except OSError:  # it has gone; JAX will miss it
        pass


def _open(caller: socket.socket) -> bool:
    """Whether the other end has not closed: who has may come again."""
    caller.setblocking(False)
    try:
        return caller.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


# JAX's own distributed runtime


def _initialize(place: Place, timeout: int) -> None:
    _hush()
    import jax
    from jax._src import distributed

    global _silence
    _silence = min(timeout, SILENCE)
    # Its handler of SIGTERM is replaced by Python's, and so never hears of one: see interrupt.py.
    jax.config.update("jax_enable_preemption_service", False)
    # One process's death is not an error that XLA raises in all: `_watch_lives` says who it was.
    jax.config.update("jax_enable_recoverability", True)
    real = distributed._jax
    if _catch_terminate():
        distributed._jax = _Calling(real)
    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_silence,
        )
    except RuntimeError as error:
        alone = distributed.global_state
        alone.num_processes, alone.client, alone.service = 1, None, None
        raise UserError(
            f"process {place.index} of {place.count} could not join the others at {place.address}:"
            " one of them ended after the roll call; start all again"
        ) from error
    finally:
        distributed._jax = real


def _hush() -> None:
    """No errors from XLA's log, before it is loaded: of a lost process we speak ourselves."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


class _Calling:
    """jaxlib's module, but its client of the coordination service has a callback for a lost one.

    Without it, XLA logs a stack trace and aborts. With it, jaxlib (0.10 to 0.12) fails to turn its
    argument into Python's, and so ends in std::terminate, which `_catch_terminate` catches.
    """

    def __init__(self, real: Any) -> None:
        self._real = real
        self.get_distributed_runtime_client = partial(
            real.get_distributed_runtime_client, missed_heartbeat_callback=lambda _: _lost()
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _catch_terminate() -> bool:
    """Has std::terminate say a line and exit with status 1; False where C++'s library is another.

    After `join` only one thing calls it: the first process, which holds the coordination service,
    is gone.
    """
    global _on_terminate
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        return False
    _on_terminate = ctypes.CFUNCTYPE(None)(_lost)
    set_terminate(_on_terminate)
    return True


_on_terminate: Any = None  # C++ calls it as long as the process lives

AGAIN = "start all of them again, with --resume"


# Watching


def _watch_lives() -> None:
    client, everyone = hosts.client(), list(range(hosts.count()))
    while True:
        try:
            alive = client.get_live_nodes(everyone)  # returns when all that live have asked
        except Exception:  # the first is gone, or this process is about to be
            time.sleep(_silence)
            _lost()
        if gone := [i for i in everyone if i not in alive]:
            are = "is" if len(gone) == 1 else "are"
            _end(f"{_named(gone, len(everyone))} {are} gone, without a sign of life; {AGAIN}")
        time.sleep(1)


def _lost() -> NoReturn:
    """Of the coordination service, and so of the first process."""
    _end(f"process 0 of {hosts.count()} is gone; {AGAIN}")


def _watch_failures() -> None:
    try:
        failed = hosts.awaited(FAILED)
    except Exception:  # as above, where the other thread sees to it
        return
    i, text = json.loads(failed)
    if i != hosts.index():
        _end(f"process {i} of {hosts.count()} ended: {text.removeprefix('error: ')}")


# what XLA raises where another process has left a collective operation
LOST = re.compile("(?i)gloo|nccl|connection|unavailable|peer|deadline|heartbeat|aborted")
_silence = SILENCE  # as `join` has set it
_ending = threading.Lock()  # held by the one that ends the process
_over: int | None = None  # the exit status, once this process is through


def _end(text: str) -> NoReturn:
    """Ends this process from whatever thread, though the main one may wait for ever."""
    if _over is not None:
        os._exit(_over)
    _ending.acquire()
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(1)


# The end


def leave(status: int) -> NoReturn:
    """Exits when all processes are through; the first last, since it holds the service."""
    global _over
    client = hosts.client()
    try:
        hosts.barrier("the end")
        _over = status
        if not hosts.first():
            client.key_value_set(f"jaxeco/left/{hosts.index()}", "")
        for i in range(1, hosts.count()) if hosts.first() else ():
            client.blocking_key_value_get(f"jaxeco/left/{i}", 10_000)
    except Exception:  # of jaxlib: somebody is gone before us
        if _over is None:
            _lost()
    _exit(status)


def fail(text: str, status: int, trace: str = "") -> NoReturn:
    """Exits with an error: said once if all processes have it, else with this one's number.

    The others end, too, if they do not come to an error of their own within `GRACE`.

    Args:
      text: the line, as one process alone would say it.
      trace: of a bug, said before it.
    """
    i, n = hosts.index(), hosts.count()
    said = _errors_of_all(text)
    if len(said) < n and trace and LOST.search(text):  # perhaps another's end, as it shows here
        time.sleep(_silence + GRACE)  # until `_watch_lives` knows who it was, and says so
    if len(said) < n or said["jaxeco/errors/0"] != text:
        alone = text.removeprefix("error: ")
        print(f"{trace}error: process {i} of {n}: {alone}", file=sys.stderr)
    elif i == 0:
        print(f"{trace}{text}", file=sys.stderr)
    if len(said) == n:
        leave(status)
    global _over
    _over = status  # the others end now, and the first of them takes the service along
    with contextlib.suppress(Exception):  # of jaxlib: two fail at a time, or all is over
        hosts.client().key_value_set(FAILED, json.dumps([i, text]))
    if i == 0:
        time.sleep(1)  # so that the others hear of it, and not only that the service is gone
    _exit(status)


def _errors_of_all(text: str) -> dict[str, str]:
    """Adds this process's error, and gives the others some time for theirs."""
    client = hosts.client()
    deadline = time.monotonic() + GRACE
    try:
        client.key_value_set(f"jaxeco/errors/{hosts.index()}", text)
        while len(said := dict(client.key_value_dir_get("jaxeco/errors/"))) < hosts.count():
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except Exception:  # of jaxlib
        _lost()
    return said


def crash(error: Exception) -> NoReturn:
    """Exits because of a bug, whose traceback is kept."""
    text = f"error: {type(error).__name__}: {error}".splitlines()[0]
    fail(text, 1, traceback.format_exc())


def _exit(status: int) -> NoReturn:
    """Without the interpreter's end: threads of ours wait in C++, and would not survive it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
