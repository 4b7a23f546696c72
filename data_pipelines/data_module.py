"""Packed text for a Lightning Trainer."""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from data_pipelines.config import DataError
from data_pipelines.lanes import PackedRow, State
from data_pipelines.rows import PackedText
from data_pipelines.stream import READ, StreamText

Batch = dict[str, Any]
# Tokens that a worker may be ahead: lanes are encoded in bursts, and while one worker has one, the others must go on.
PREFETCHED = 2**17
MESSAGE = 2**15  # tokens that a worker sends at once, because a message costs the training process as much as ten rows


def _start_worker(worker: int) -> None:
    """A process group's signals reach workers, too; but when to end, their parent says, or its death."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker
    gc.freeze()  # a collection writes to every object, which would copy all that the parent holds


def _as_it_is(row: Any) -> Any:
    return row


class _Steps(Dataset[dict[str, Tensor]]):
    """One rank's rows for each step from `start` to `stop`."""

    def __init__(self, packed: PackedText, start: int, stop: int, rows_per_step: int, rank: int, world: int):
        self.packed = packed
        self.start, self.stop = start, stop
        self.rows_per_step = rows_per_step
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = self.rows_per_step // self.world
        return self.packed.rows((self.start + index) * self.rows_per_step + self.rank * rows, rows)


class _InOrder(DistributedSampler[int]):
    """In a distributed run Lightning would replace any other sampler with one that splits the steps among ranks. The
    range of them is not listed, which may be of billions."""

    def __init__(self, steps: _Steps):
        super().__init__(steps, num_replicas=1, rank=0, shuffle=False)
        self.steps = range(len(steps))

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)


NumberedRow = tuple[int, int, PackedRow]  # with its number and its lane's


class _Lanes(IterableDataset[list[NumberedRow] | str]):
    """A rank's rows of a stream: rank, rank + world, … of each step, `at_once` at a time; a mistake as text, last.

    Worker w of W gives every W-th of them, from the w-th on. The loader asks its workers in turn.
    """

    def __init__(
        self, text: StreamText, states: Mapping[int, State], start: int, stop: int, rank: int, world: int, at_once: int
    ):
        self.text, self.states, self.at_once = text, states, at_once
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __iter__(self) -> Iterator[list[NumberedRow] | str]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        first = self.start + self.rank + worker * self.world
        found: list[NumberedRow] = []
        try:
            for row in self.text.stream(first, self.world * workers, self.states, self.stop):
                found.append(row)
                if len(found) == self.at_once:
                    yield found
                    found = []
        except DataError as error:
            yield found
            # As a value: a loader would wrap an exception in its trace.
            yield str(error)
        else:
            yield found


class Position:
    """Lanes' states behind a batch. Opaque to whatever moves batches to a device."""

    def __init__(self, states: Mapping[int, State]):
        self.states = states


class _Batches:
    """A rank's batches, from the rows of a loader: `rows` a step, every `world`-th row from `first` to `stop`."""

    def __init__(
        self, text: StreamText, loader: Iterable[list[NumberedRow] | str], first: int, stop: int, rows: int, world: int
    ):
        self.text, self.loader, self.rows = text, loader, rows
        self.first, self.stop, self.world = first, stop, world

    def __iter__(self) -> Iterator[Batch]:
        waiting: dict[int, NumberedRow] = {}
        wanted = range(self.first, self.stop, self.world)
        found = self._checked()
        for at in range(0, len(wanted), self.rows):
            step = wanted[at : at + self.rows]
            while not all(number in waiting for number in step):
                waiting |= {row[0]: row for row in next(found)}
            rows = [waiting.pop(number) for number in step]
            batch: Batch = self.text.packed([(number, row) for number, _, row in rows])
            yield batch | {"position": Position({lane: row.state for _, lane, row in rows})}

    def _checked(self) -> Iterator[list[NumberedRow]]:
        try:
            for found in self.loader:
                if isinstance(found, str):
                    raise DataError(found)
                yield found
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            why = str(error).splitlines()[-1]
            raise DataError(
                f"a data worker ended unexpectedly ({why}); if it ran out of memory, lower data_workers; the same "
                "command continues"
            ) from error


class TextDataModule(LightningDataModule):
    """Batches of each step in [start_step, steps), for as many ranks as divide a step's rows.

    Rows with random access are a pure function of (data, seed, step) and need no state. A stream's lanes have states,
    which come along with the batch that they follow: `state` is that of the last batch a step was made of, whatever
    workers had prefetched.
    """

    def __init__(
        self,
        packed: PackedText,
        steps: int,
        rows_per_step: int,
        start_step: int = 0,
        num_workers: int = 0,
        states: Mapping[int, State] | None = None,
    ):
        """states: of lanes behind `start_step`, from a run on any number of ranks and workers; without them a stream is
        read again from its beginning to get there."""
        super().__init__()
        self.packed = packed
        self.steps = steps
        self.rows_per_step = rows_per_step
        self.start_step = start_step
        self.num_workers = num_workers
        self._states = dict(states or {})

    def train_dataloader(self) -> Iterable[Batch]:
        """Raises DataError if ranks and workers do not divide a step's rows and the lanes."""
        # Ranks that shard one model read the same rows; the strategy counts data-parallel replicas.
        replicas = self.trainer.distributed_sampler_kwargs if self.trainer else None
        rank, world = (replicas["rank"], replicas["num_replicas"]) if replicas else (0, 1)
        return self.batches(rank, world)

    def batches(self, rank: int, world: int) -> Iterable[Batch]:
        """The batches of one of `world` ranks. Raises DataError as `train_dataloader`."""
        if self.rows_per_step % world:
            raise DataError(
                f"rows_per_step {self.rows_per_step} is not a multiple of the {world} data-parallel ranks; "
                f"use {-(-self.rows_per_step // world) * world}"
            )
        if isinstance(self.packed, StreamText):
            return self._stream(self.packed, rank, world)
        steps = _Steps(self.packed, self.start_step, self.steps, self.rows_per_step, rank, world)
        return DataLoader(
            steps,
            batch_size=None,
            sampler=_InOrder(steps),
            num_workers=self.num_workers,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else each iterator takes a seed from the global generator
        )

    def _stream(self, text: StreamText, rank: int, world: int) -> Iterable[Batch]:
        lanes, readers = text.config.lanes, world * max(self.num_workers, 1)
        if lanes % readers:
            raise DataError(
                f"{world} ranks × {max(self.num_workers, 1)} data_workers do not divide data.lanes {lanes}; change "
                "data_workers"
                + ("" if lanes % world else f" to one of {', '.join(str(n) for n in _divisors(lanes // world))}")
                + ", or begin a run with other lanes"
            )
        start, stop = (step * self.rows_per_step for step in (self.start_step, self.steps))
        rows = self.rows_per_step // world
        at_once = max(1, MESSAGE // text.length) if self.num_workers else 1
        lanes_of = _Lanes(text, self._states, start, stop, rank, world, at_once)
        loader: Iterable[list[NumberedRow] | str] = lanes_of
        if self.num_workers:
            loader = DataLoader(
                lanes_of,
                batch_size=None,
                num_workers=self.num_workers,
                prefetch_factor=max(2, PREFETCHED // (text.length * at_once)),
                # The default turns every array into a tensor, which takes longer than to pack a row.
                collate_fn=_as_it_is,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),
            )
        return _Batches(text, loader, start + rank, stop, rows, world)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Takes the position out of a batch that a step is about to be made of."""
        if (position := batch.pop("position", None)) is not None:
            self._states |= position.states
        return batch

    def state(self) -> dict[str, State]:
        """JSON-able states of all lanes; all ranks must call it."""
        return {str(lane): state for lane, state in sorted(self._gathered().items())}

    def counts(self) -> dict[str, int]:
        """What has been read so far, of documents, tokens and defects, by source; all ranks must call it."""
        text = self.packed
        if not isinstance(text, StreamText):
            return dict(text.counts)
        read: list[Counter[str]] = [Counter() for _ in text.lanes.sources]
        epochs = [0 for _ in read]
        for state in self._gathered().values():
            # A lane that begins anew with other data has no sources yet.
            for n, (epoch, *_, counts) in enumerate(state.get("sources", ())):
                read[n].update(counts)
                epochs[n] = max(epochs[n], epoch)
        found: dict[str, int] = {}
        for source, counts, epoch in zip(text.lanes.sources, read, epochs, strict=True):
            prefix = f"{source.name}/" if source.name else ""
            found |= {f"{prefix}{name}": counts[name] + text.counts[name] * (not prefix) for name in READ}
            found[f"{prefix}epoch"] = epoch
        return found

    def _gathered(self) -> dict[int, State]:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._states
        every: list[dict[int, State]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, self._states)
        # The newest of each lane: a rank has those of others only from the start.
        found: dict[int, State] = {}
        for lane, state in (item for states in every for item in states.items()):
            if lane not in found or state["rows"] > found[lane]["rows"]:
                found[lane] = state
        self._states |= found
        return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
