"""Snapshots written in the background, by all ranks of a run, while training goes on.

    save: the main thread copies what this rank holds to buffers on the host, which are used again
    then, in a thread of each rank: its files, hashed as they are written and fsynced, and a note of them
    rank 0's thread: once all notes are there, layout.json, state.json and manifest.json, fsync, rename, fsync

Ranks meet in the directory, which they all must see, and never by collectives of a thread, which would collide with
those of training. Until the rename there is no snapshot of the step; from then on it is durable.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.snapshots.format import (
    LAYOUT,
    MANIFEST,
    STATE,
    Layout,
    Tensors,
    file_name,
    layout_entry,
    manifest_text,
    merged,
    name_of,
)
from checkpoints.tensors import is_written_here, local_part, write_tensors

# Groups of which every rank has tensors of its own, under names of its own.
PER_RANK = ("random",)
# Seconds that rank 0 waits for the files of the others.
PATIENCE = 1800.0
POLL = 0.05
Files = dict[str, dict[str, Any]]
Staged = dict[str, dict[str, Tensor]]


class SnapshotWriter:
    """Writes the snapshots of a run, one at a time. `save` is called by all ranks, with the same step.

    committed: called by rank 0's thread with the path of each snapshot once it is durable.
    """

    def __init__(self, directory: Path, rank: int = 0, ranks: int = 1, committed: Callable[[Path], None] | None = None):
        self.directory, self.rank, self.ranks = directory, rank, ranks
        self._committed = committed
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._pool = ThreadPoolExecutor(1, "snapshots")
        # Its own files, and on rank 0 the commit behind them.
        self._jobs: list[Future[None]] = []
        self._abandoned = threading.Event()

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Stages a snapshot and begins to write it. The one before must have been waited for.

        state: JSON-serialisable; that of rank 0 is kept.
        """
        assert all(job.done() for job in self._jobs)
        staged, layout = self._stage(tensors)
        final = self.directory / name_of(step)
        self._jobs = [self._pool.submit(self._write_own, final, staged, layout)]
        if self.rank == 0:
            self._jobs.append(self._pool.submit(self._commit, final, self._jobs[0], json.dumps(state)))

    def own_error(self) -> BaseException | None:
        """Waits until this rank has written its files; why it could not."""
        return self._jobs[0].exception() if self._jobs else None

    def error(self) -> BaseException | None:
        """Waits until the snapshot is durable, on other ranks than 0 for their part of it; why it could not be."""
        return self._jobs[-1].exception() if self._jobs else None

    @property
    def failed(self) -> bool:
        """Whether it is known by now that the last snapshot could not be written."""
        return any(job.done() and job.exception() is not None for job in self._jobs)

    def abandon(self, patience: float) -> None:
        """Waits as `error` does, but after so many seconds no longer for the files of other ranks."""
        concurrent.futures.wait(self._jobs, patience)
        self._abandoned.set()
        concurrent.futures.wait(self._jobs)

    def _stage(self, tensors: Tensors) -> tuple[Staged, Layout]:
        """Copies of what this rank writes, on the host, and where in each tensor it lies."""
        staged: Staged = {}
        layout: Layout = {}
        cuda = False
        for group, named in tensors.items():
            file = file_name(group, self.rank, self.ranks)
            for name, tensor in named.items():
                if group not in PER_RANK and not is_written_here(tensor, self.rank):
                    continue
                local, offset = local_part(tensor)
                buffer = self._buffers.get((group, name))
                if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                    buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                    self._buffers[group, name] = buffer
                buffer.copy_(local, non_blocking=True)
                cuda |= local.is_cuda
                staged.setdefault(group, {})[name] = buffer
                layout.setdefault(group, {})[name] = layout_entry(tensor, local, offset, file)
        if cuda:
            torch.cuda.synchronize()
        return staged, layout

    def _write_own(self, final: Path, staged: Staged, layout: Layout) -> None:
        with _explained(final):
            temporary = temporary_of(final)
            temporary.mkdir(parents=True, exist_ok=True)
            files: Files = {}
            for group, tensors in staged.items():
                name = file_name(group, self.rank, self.ranks)
                files[name] = write_tensors(temporary / name, tensors)
            note = self._note(temporary, self.rank)
            # Renamed, so that it is there as a whole or not at all.
            note.with_suffix(".part").write_text(json.dumps([files, layout]))
            note.with_suffix(".part").replace(note)

    def _commit(self, final: Path, own: Future[None], state: str) -> None:
        temporary = temporary_of(final)
        try:
            with _explained(final):
                own.result()
                commit(temporary, final, *self._gather(temporary), state)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if self._committed is not None:
            self._committed(final)

    def _note(self, temporary: Path, rank: int) -> Path:
        return temporary / f"rank-{rank:05d}.json"

    def _gather(self, temporary: Path) -> tuple[Files, Layout]:
        """What all ranks have written, once they have; their notes are removed."""
        missing = [self._note(temporary, rank) for rank in range(self.ranks)]
        deadline = time.monotonic() + PATIENCE
        files: Files = {}
        layouts: list[Layout] = []
        while missing:
            if missing[0].exists():
                note = missing.pop(0)
                its_files, layout = json.loads(note.read_text())
                files |= its_files
                layouts.append(layout)
                note.unlink()
            elif self._abandoned.is_set() or time.monotonic() > deadline:
                raise _Abandoned(f"no {missing[0].name} from another process; all of them must see this directory")
            else:
                time.sleep(POLL)
        return files, merged(layouts)


class _Abandoned(Exception):
    """Other ranks have not written their files."""


@contextmanager
def _explained(final: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, _Abandoned) as error:
        raise CheckpointError(
            f"checkpoint {final} cannot be written ({error}); make room or give it write access, and repeat the "
            "command: it continues from the checkpoint before"
        ) from None


def temporary_of(final: Path) -> Path:
    """Where a snapshot is written; the same on all ranks."""
    return final.with_name(f".{final.name}.tmp")


def commit(temporary: Path, final: Path, files: Files, layout: Layout, state: str) -> None:
    """Makes a snapshot of a directory with all its tensors; when this returns, it is durable.

    One of the same step is replaced.
    """
    for name, text in ((LAYOUT, json.dumps(layout)), (STATE, state)):
        (temporary / name).write_text(text, encoding="utf-8")
        files[name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        flush(temporary / name)
    (temporary / MANIFEST).write_text(manifest_text(files), encoding="utf-8")
    flush(temporary / MANIFEST)
    flush(temporary)
    if final.exists():
        replaced = final.with_name(f".{final.name}.{os.getpid()}.old")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    flush(final.parent)
    for replaced in final.parent.glob(f".{final.name}.*.old"):
        shutil.rmtree(replaced)


def save_checkpoint(directory: Path, step: int, tensors: Tensors, state: Mapping[str, Any]) -> Path:
    """Writes the snapshot `directory/step-<step>` of whole tensors, in groups, and a JSON-serialisable state.

    An existing snapshot of the same step is replaced. When this returns, it is durable. Raises CheckpointError, and
    leaves nothing behind, if it cannot be written.
    """
    writer = SnapshotWriter(directory)
    writer.save(step, tensors, state)
    if (error := writer.error()) is not None:
        raise error
    return directory / name_of(step)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
