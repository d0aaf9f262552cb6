"""Ctrl-C and SIGTERM as a request that the training loop honours between two steps."""

import signal
from types import FrameType, TracebackType


class Interrupt:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one acts as usual.

    Attributes:
      signal: the signal that arrived, None so far.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    @property
    def exit_status(self) -> int:
        """What a shell reports of a process that this signal ended."""
        assert self.signal is not None
        return 128 + self.signal
