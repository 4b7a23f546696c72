"""Why a run ends early: it gave up, or a signal asked for it, which training heeds at the end of a step."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

UNFINISHED = 75  # the exit code, EX_TEMPFAIL of sysexits.h: worth another try
# What schedulers send before they kill (SLURM SIGUSR1, on request), and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """A command was asked to stop, and is unfinished. No Exception, so that no code takes it for a failure."""


class TrainingStopped(RuntimeError):
    """The run gave up; the message says why and what to do."""


def show_cursor() -> None:
    """Which a progress bar hides."""
    if os.isatty(2):
        os.write(2, b"\033[?25h")


def is_main_process() -> bool:
    """Whether this process speaks for the run, by what its launcher has set; also before anything is imported."""
    environ = os.environ
    return environ.get("RANK", environ.get("LOCAL_RANK", environ.get("SLURM_PROCID", "0"))) == "0"


class StopSignals:
    """Handles the signals while it is entered; as this module, it is there before anything large is imported.

    A first signal raises Stopped; or, while `deferred`, only sets `asked`: saving inside a handler can hang. Of further
    ones SIGINT ends the process; a scheduler's are ignored, since they come while the run is saving, and SIGKILL
    follows. announce: say that a signal was deferred.
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
            if number != signal.SIGINT:
                return
            show_cursor()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        if not self.deferred:
            raise Stopped(f"stopped by {signal.Signals(number).name}; the same command starts again")
        if self.announce:
            os.write(2, b"stopping after this step; Ctrl-C ends the run at once\n")
