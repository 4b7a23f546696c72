"""Time and memory of variants, measured side by side in one process.

Variants take turns (ABAB…) after a warm-up, so that anything else the machine does affects all of them alike. Ratios
are taken round by round; their median and range are over the rounds.
"""

from __future__ import annotations

import ctypes
import functools
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

# One call does the work once and may return figures of its own, such as FLOPs.
Variant = Callable[[], "Mapping[str, float] | None"]
# Minimum seconds of a timed sample, reached by calling repeatedly, and the maximum number of calls in one.
LEAST_SAMPLE, MOST_CALLS = 0.02, 200
# Once reset, the peak counter is within this many bytes of resident memory; if not, it cannot be reset here.
RESET_WITHIN = 2**25
# Parameters of mallopt (malloc.h); then the sizes in bytes from which a block gets its own mapping and from which free
# memory at the top of the heap is returned: glibc's initial values, and the maxima that it raises them to by itself.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAPPED_FROM, TRIMMED_FROM = 2**17, 2**17
MAPPED_FROM_AT_MOST, TRIMMED_FROM_AT_MOST = 2**25, 2**26


class Unsupported(Exception):
    """Raised by a variant that is unsupported on this device; the message says why."""


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
    """The measurements of one variant.

    figures: one value per round; `seconds` per call, and whatever the call returned. peak_bytes: peak during a call, of
    the process (CPU: resident memory) or of the device's allocator; added_bytes: how much of that the call frees again;
    None if they cannot be measured. unsupported, failed: why there are no figures.
    """

    figures: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    added_bytes: int | None = None
    unsupported: str | None = None
    failed: str | None = None

    def rate(self, figure: str) -> list[float]:
        """The figure per second, in each round."""
        return [f / s for f, s in zip(self.figures[figure], self.figures["seconds"], strict=True)]

    def to_json(self) -> dict[str, Any]:
        known = {name: vars(Spread.of(values)) | {"all": values} for name, values in self.figures.items()}
        others = {name: value for name, value in vars(self).items() if name != "figures" and value is not None}
        return known | others


def race(
    variants: Mapping[str, Variant], device: torch.device, repeats: int, budget: float = math.inf
) -> dict[str, Measured]:
    """Runs each variant `repeats` times, taking turns; after `budget` seconds no further round begins. One always runs.

    Memory is measured in the warm-up, which is all that runs if `repeats` is 0. Of the peak, only what a call frees
    again counts as added: weight copies that the first call makes and keeps do not. A variant that raises does not
    affect the figures of the others.
    """
    measured = {name: Measured() for name in variants}
    calls: dict[str, int] = {}
    with memory_limit(device), _frozen_objects():
        for name, run in variants.items():
            try:
                calls[name] = _warm_up(run, device, measured[name])
            except Unsupported as reason:
                measured[name].unsupported = str(reason)
            except Exception as error:
                measured[name].failed = _one_line(error)
                _release_memory(device)
        started = time.perf_counter()
        for done in range(repeats):
            if done and time.perf_counter() - started > budget:
                break
            for name in list(calls):
                try:
                    _sample(variants[name], calls[name], device, measured[name])
                except Exception as error:
                    # Figures of a variant that failed midway would be paired with the wrong rounds.
                    measured[name] = Measured(failed=_one_line(error))
                    del calls[name]
                    _release_memory(device)
    return measured


@contextmanager
def _frozen_objects() -> Iterator[None]:
    """Objects that exist before are left out of collections, which otherwise take longer than what is measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _warm_up(run: Variant, device: torch.device, into: Measured) -> int:
    """Measures the memory of the last warm-up call; returns the number of calls per sample."""
    with _peak_read(device, into):
        took, _ = _timed(run, 1, device)
    if device.type == "cuda" or took < 50 * LEAST_SAMPLE:
        with _peak_read(device, into):
            took, _ = _timed(run, 1, device)  # the first call compiled kernels and filled caches
    return min(MOST_CALLS, math.ceil(LEAST_SAMPLE / took))


def _sample(run: Variant, calls: int, device: torch.device, into: Measured) -> None:
    seconds, own = _timed(run, calls, device)
    for name, value in {"seconds": seconds, **(own or {})}.items():
        into.figures.setdefault(name, []).append(value)


def _timed(run: Variant, calls: int, device: torch.device) -> tuple[float, Mapping[str, float] | None]:
    """Seconds per call, and the figures that the last one returned."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        own = run()
    synchronise(device)
    return (time.perf_counter() - started) / calls, own


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


# Peak memory. On CPU this is the peak of resident pages, which Linux resets on request.


@contextmanager
def _peak_read(device: torch.device, into: Measured) -> Iterator[None]:
    """Measures the memory of the call made inside."""
    with _freed_blocks_gone(device):
        known = reset_peak(device)
        yield
        if known:
            into.peak_bytes = peak_memory(device)
            into.added_bytes = max(0, into.peak_bytes - present_memory(device))


@contextmanager
def _freed_blocks_gone(device: torch.device) -> Iterator[None]:
    """On CPU: freed memory is no longer resident, whatever the process did before.

    glibc's malloc gives a large block its own mapping, unmapped when freed, unless the block fits into a hole in the
    heap. The size from which it does so grows as such blocks are freed; here it is that of a fresh process, and all
    holes of that size are filled first.
    """
    libc = _libc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, MAPPED_FROM)
    libc.mallopt(TRIM_THRESHOLD, TRIMMED_FROM)
    taken, heap_end = [], libc.sbrk(0)  # mapped blocks lie above it
    try:
        for size in (2**bits for bits in range(25, 16, -1)):
            while (block := libc.malloc(size)) and block < heap_end:
                taken.append(block)
            libc.free(block)
        yield
    finally:
        for block in taken:
            libc.free(block)
        libc.mallopt(MMAP_THRESHOLD, MAPPED_FROM_AT_MOST)
        libc.mallopt(TRIM_THRESHOLD, TRIMMED_FROM_AT_MOST)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """glibc, if that is the C library."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        _ = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return None
    return libc


def reset_peak(device: torch.device) -> bool:
    """Resets the peak counter; returns whether that worked."""
    try:
        present = present_memory(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
        return peak_memory(device) - present < RESET_WITHIN
    except (OSError, KeyError):
        return False


def present_memory(device: torch.device) -> int:
    """Bytes in use now, after everything that can be returned has been."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)
    return _status("VmRSS")


def peak_memory(device: torch.device) -> int:
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
    """On CPU: allocating more memory than is free raises, rather than making the system kill processes."""
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
        """None for fewer than three points, or if a cost is not above 0."""
        if len(x) < 3 or min(y) <= 0:
            return None
        power = statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y])
        line = statistics.linear_regression(x, y)
        worst = max(abs(line.intercept + line.slope * a - b) / b for a, b in zip(x, y, strict=True))
        return Growth(power.slope, worst)
