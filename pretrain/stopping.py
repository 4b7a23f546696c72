"""Why a run ends early: it gave up, or SIGTERM or SIGINT asked for it, then in training only after the step."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A command was asked to stop, and is unfinished. No Exception, so that no code takes it for a failure."""


class TrainingStopped(RuntimeError):
    """The run gave up; the message says why and what to do."""


class StopSignals:
    """Handles the signals while it is entered; as this module, it is there before anything large is imported.

    A first signal raises Stopped; or, while `deferred`, only sets `asked`: saving inside a handler can hang. A second
    one ends the process. announce: say that a signal was deferred.
    """

    def __init__(self, announce: bool = True):
        self.announce = announce
        self.asked = self.deferred = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Also after somebody else has installed handlers of theirs."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # forked just now, and not yet ignoring what was sent to the whole process group
        if self.asked:
            if os.isatty(2):
                os.write(2, b"\033[?25h")  # shows the cursor, which a progress bar hides
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        if not self.deferred:
            raise Stopped(f"stopped by {signal.Signals(number).name}; the same command starts again")
        if self.announce:
            os.write(2, b"stopping after this step; a second signal ends the run at once\n")
