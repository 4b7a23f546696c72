"""Time and memory of things that are compared with each other, side by side in one process.

Contestants take turns (ABAB…) after a warm-up, so that whatever else the machine does meets all of them, and a ratio is
taken round by round: its median and range are those of the rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# What a contestant is: one call does its work once, and may return figures of its own, such as FLOPs.
Contestant = Callable[[], "Mapping[str, float] | None"]
# Seconds that a timed sample takes at least, by calling more than once, and calls of a sample at most.
LEAST_SAMPLE, MOST_CALLS = 0.02, 200
# A peak counter that was reset lies this close to what is resident, in bytes; elsewhere it cannot be reset.
RESET_WITHIN = 2**25


class Unserved(Exception):
    """Raised by a contestant that this machine or this call has no place for; the message says why."""


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


@dataclass
class Measured:
    """What one contestant took.

    figures: per round; `seconds` of a call, and whatever it returned. peak_bytes: of the process (CPU: resident) or
    the device's allocator; added_bytes: above what was there before; None where that cannot be known. unserved, failed:
    why there are no figures.
    """

    figures: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    added_bytes: int | None = None
    unserved: str | None = None
    failed: str | None = None

    def rate(self, figure: str) -> list[float]:
        """That figure per second, by round."""
        return [f / s for f, s in zip(self.figures[figure], self.figures["seconds"], strict=True)]

    def to_json(self) -> dict[str, Any]:
        known = {name: vars(Spread.of(values)) | {"all": values} for name, values in self.figures.items()}
        others = {name: value for name, value in vars(self).items() if name != "figures" and value is not None}
        return known | others


def race(
    contestants: Mapping[str, Contestant], device: torch.device, repeats: int, budget: float = math.inf
) -> dict[str, Measured]:
    """Each contestant `repeats` times in turns, or as many whole rounds as begin within `budget` seconds, at least one.

    Memory is read in the first round. A contestant that raises leaves the others their figures.
    """
    measured = {name: Measured() for name in contestants}
    calls: dict[str, int] = {}
    with memory_limit(device):
        for name, run in contestants.items():
            try:
                calls[name] = _calls(run, device)
            except Unserved as reason:
                measured[name].unserved = str(reason)
            except Exception as error:
                measured[name].failed = _one_line(error)
                _forget(device)
        started = time.perf_counter()
        for done in range(repeats):
            if done and time.perf_counter() - started > budget:
                break
            for name in list(calls):
                try:
                    _sample(contestants[name], calls[name], device, measured[name], with_memory=done == 0)
                except Exception as error:
                    # Figures of a contestant that broke down half way would be paired with the wrong rounds.
                    measured[name] = Measured(failed=_one_line(error))
                    del calls[name]
                    _forget(device)
    return measured


def _calls(run: Contestant, device: torch.device) -> int:
    """How often to call it in a sample. Warms it up."""
    took, _ = _timed(run, 1, device)
    if device.type == "cuda" or took < 50 * LEAST_SAMPLE:
        took, _ = _timed(run, 1, device)  # the first call compiled kernels and filled caches
    return min(MOST_CALLS, math.ceil(LEAST_SAMPLE / took))


def _sample(run: Contestant, calls: int, device: torch.device, into: Measured, with_memory: bool) -> None:
    if with_memory:
        before = _start_peak(device)
    seconds, own = _timed(run, calls, device)
    if with_memory and before is not None:
        into.peak_bytes = _peak(device)
        into.added_bytes = max(0, into.peak_bytes - before)
    for name, value in {"seconds": seconds, **(own or {})}.items():
        into.figures.setdefault(name, []).append(value)


def _timed(run: Contestant, calls: int, device: torch.device) -> tuple[float, Mapping[str, float] | None]:
    """Seconds of a call, and the figures that the last one returned."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        own = run()
    synchronise(device)
    return (time.perf_counter() - started) / calls, own


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


# Peak memory. On CPU it is that of resident pages, whose peak Linux resets on request.


def peak_of(run: Contestant, device: torch.device) -> int | None:
    """Bytes that one call adds at its peak to what was there before, None where that cannot be known."""
    before = _start_peak(device)
    run()
    return None if before is None else max(0, _peak(device) - before)


def _start_peak(device: torch.device) -> int | None:
    """Forgets the peak; what is there now, or None where the peak cannot be forgotten."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # Freed blocks that the allocator keeps would hide what is allocated into them.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident, peak = _status("VmRSS"), _status("VmHWM")
    except (OSError, AttributeError, KeyError):
        return None
    return resident if peak - resident < RESET_WITHIN else None


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """On CPU: asking for more memory than is free raises, instead of having the system end processes."""
    try:
        available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
        limit = _status("VmData") + int(0.92 * int(available.split()[1]) * 1024)
    except (OSError, StopIteration, KeyError):
        limit = None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type != "cpu" or limit is None or soft != resource.RLIM_INFINITY:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


# How a cost grows


@dataclass(frozen=True)
class Growth:
    """exponent: of the least-squares power law y ∝ x^exponent. line_worst: largest relative deviation from the
    least-squares line y = a + b·x."""

    exponent: float
    line_worst: float

    @staticmethod
    def of(x: Sequence[float], y: Sequence[float]) -> Growth | None:
        """None where there are fewer than three points or a cost that is not above 0."""
        if len(x) < 3 or min(y) <= 0:
            return None
        power = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y])
        line = statistics.linear_regression(x, y)
        worst = max(abs(line.intercept + line.slope * a - b) / b for a, b in zip(x, y, strict=True))
        return Growth(power.slope, worst)
