"""Which snapshots of a run are kept, and the removal of the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from checkpoints.snapshots.format import REPLACED, all_checkpoints, problem_of


def prune(
    directory: Path, keep: int, every: int | None = None, best: Collection[int] = (), known: Collection[str] = ()
) -> None:
    """Removes snapshots but the newest `keep` valid ones, those of every `every`-th step, and those of steps in `best`.

    known: names of snapshots that this process has written, or has read in full: of them only the sizes are compared,
    while others are read in full before they count as valid. So the newest valid one is never removed.
    """
    if keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, got {keep}")
    valid = 0
    for path in reversed(all_checkpoints(directory)):
        if valid < keep:
            valid += problem_of(path, read=path.name not in known) is None
        elif not (every is not None and step_of(path) % every == 0) and step_of(path) not in best:
            remove(path)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(".")[5:13])


def remove_after(directory: Path, step: int) -> None:
    """Removes the snapshots of later steps."""
    for path in all_checkpoints(directory):
        if step_of(path) > step:
            remove(path)


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes left half-written or half-removed; no other process may be writing there."""
    for path in directory.glob(".step-*"):
        replaced = REPLACED.fullmatch(path.name)
        # One whose successor was not renamed any more is a checkpoint.
        if replaced is None or (directory / replaced[1]).exists():
            shutil.rmtree(path)


def remove(path: Path) -> None:
    # Renamed first, so that an interrupted removal never leaves part of a snapshot under its name.
    doomed = path.with_name(f".{path.name}.{os.getpid()}.gone")
    path.rename(doomed)
    shutil.rmtree(doomed)
