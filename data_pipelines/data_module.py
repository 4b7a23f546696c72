"""Packed text for a Lightning Trainer."""

from __future__ import annotations

import signal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from data_pipelines.config import DataError
from data_pipelines.rows import PackedText


def _ignore_stop_signals(worker: int) -> None:
    """A process group's signals reach workers, too; but when to end, their parent says, or its death."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


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


class TextDataModule(LightningDataModule):
    """For each step in [start_step, steps), yields the rows [rank·B/W, (rank + 1)·B/W) of the step's B.

    There is no state to save: rows are a pure function of (data, seed, step), so a run resumes from its
    step number, whatever workers had prefetched when it stopped, on any number W of ranks that divides B.
    """

    def __init__(
        self,
        packed: PackedText,
        steps: int,
        rows_per_step: int,
        start_step: int = 0,
        num_workers: int = 0,
    ):
        super().__init__()
        self.packed = packed
        self.steps = steps
        self.rows_per_step = rows_per_step
        self.start_step = start_step
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Raises DataError if a step's rows cannot be divided evenly among the ranks."""
        # Ranks that shard one model read the same rows; the strategy counts data-parallel replicas.
        replicas = self.trainer.distributed_sampler_kwargs if self.trainer else None
        rank, world = (replicas["rank"], replicas["num_replicas"]) if replicas else (0, 1)
        if self.rows_per_step % world:
            raise DataError(
                f"rows_per_step {self.rows_per_step} is not a multiple of the {world} data-parallel ranks; "
                f"use {-(-self.rows_per_step // world) * world}"
            )
        steps = _Steps(self.packed, self.start_step, self.steps, self.rows_per_step, rank, world)
        return DataLoader(
            steps,
            batch_size=None,
            # In a distributed run Lightning would replace any other sampler with one that splits the steps among ranks.
            sampler=DistributedSampler(steps, num_replicas=1, rank=0, shuffle=False),
            num_workers=self.num_workers,
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator(),  # else each iterator takes a seed from the global generator
        )
