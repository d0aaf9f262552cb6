"""Ctrl-C, SIGTERM and a cloud's notice of preemption, as a request honoured between two steps.

A notice comes to one process, and all must stop at the same step. So each counts the points at
which it asks; once they all know of a notice, they stop at the first point that none has passed.
(`multihost_utils.reached_preemption_sync_point` does so for SIGTERM alone, whose handler Python's
own one replaces.)
Threads see to that, so that it does not matter what the main one is waiting for: Python calls its
own signal handlers only when a compilation, say, is through.
"""

import contextlib
import http.client
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from types import FrameType, TracebackType

from jaxeco import hosts

MACHINE = Path("/sys/class/dmi/id/product_name")  # says whose machine it is, without a network
PREEMPTED = "/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=60&last_etag="


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one acts as usual.

    Use it in the main thread. Several processes enter it, ask and leave it together.

    Attributes:
      signal: the signal for which `asked` said to stop; None so far. A preemption is a SIGTERM.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted: signal.Signals | None = None  # what came to this process
        self._agreed: tuple[int, signal.Signals] | None = None  # the point to stop at, and why
        self._points = 0
        self._lock = threading.Lock()  # held while the processes agree, so that none goes on

    def __enter__(self) -> "Interrupt":
        self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        if hosts.count() > 1:
            self._key = hosts.unique("stop")
            self._pipe = os.pipe()  # Python writes to it at once which signal came
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._agreeing = threading.Thread(target=self._agree, daemon=True)
            self._agreeing.start()
            threading.Thread(target=self._listen, daemon=True).start()
        if server := metadata_server():
            threading.Thread(target=self._await_preemption, args=(server,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if hosts.count() > 1:
            signal.set_wakeup_fd(-1)
            if error is None:  # else the others may still be at work, and this process ends
                self._say("")  # from now on no notice counts, unless there was one before
                self._agreeing.join()

    def asked(self) -> bool:
        """Whether to stop here; once it says so, it always does. All processes ask together."""
        with self._lock:
            self._points += 1
            if hosts.count() == 1:
                self.signal = self._noted
            elif self._agreed is not None and self._points >= self._agreed[0]:
                self.signal = self._agreed[1]
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """What a shell reports of a process that this signal ended."""
        assert self.signal is not None
        return 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _listen(self) -> None:
        while True:
            for number in os.read(self._pipe[0], 1):
                if number in self.SIGNALS:
                    self._say(signal.Signals(number).name)

    def _say(self, why: str) -> None:
        """To all processes, unless one of them was quicker."""
        with contextlib.suppress(Exception):  # jaxlib's, for a key that is there
            hosts.client().key_value_set(self._key, why)

    def _agree(self) -> None:
        why = hosts.awaited(self._key)
        if why:
            with self._lock:
                points = hosts.gather(self._points, f"{self._key}/points")
                self._agreed = max(points) + 1, signal.Signals[why]

    def _await_preemption(self, server: str) -> None:
        """Asks Google's metadata server, which answers when the machine is to be taken away."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        version = "0"  # of the answer that is known: another is given at once
        while True:
            request = urllib.request.Request(
                f"http://{server}{PREEMPTED}{version}", headers={"Metadata-Flavor": "Google"}
            )
            with contextlib.suppress(OSError, http.client.HTTPException):  # it is asked again
                with opener.open(request, timeout=90) as answer:
                    version = answer.headers["ETag"] or "0"
                    if answer.read(100).strip() == b"TRUE":
                        self._noted = signal.SIGTERM
                        if hosts.count() > 1:
                            self._say("SIGTERM")
                        return
            time.sleep(1)


def metadata_server() -> str | None:
    """Where a machine of Google's cloud learns of itself; None on any other.

    $GCE_METADATA_HOST, as in Google's own libraries, names another.
    """
    if "GCE_METADATA_HOST" in os.environ:
        return os.environ["GCE_METADATA_HOST"]
    with contextlib.suppress(OSError):
        if MACHINE.read_text().startswith("Google"):
            return "metadata.google.internal"
    return None
