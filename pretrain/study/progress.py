"""How far a study is, and how long its other runs will take: `Progress`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from checkpoints.snapshots import all_checkpoints, name_of
from pretrain.study.definition import Planned, Run


class Progress:
    """Over all runs of a study, whoever trains them. asked: those of them that are to be trained; default: all."""

    def __init__(self, planned: Planned, asked: Sequence[Run] | None = None):
        self.planned, self.asked = planned, planned.runs if asked is None else asked
        self._seconds: dict[Path, float] = {}  # of runs that are whole

    def is_whole(self, run: Run) -> bool:
        """Whether the run came to its end, and its last snapshot was written before anything killed it.

        Of a run that is scored, no weights are needed any more.
        """
        directory, of = run.directory, self.planned.budget_of(run)
        if directory.path in self._seconds:
            return True
        records = directory.read(directory.metrics)
        if not records or (of is not None and not of.directory.read(of.directory.metrics)):
            return False
        written = {path.name for path in all_checkpoints(directory.checkpoints)}
        if not (run.scores.exists() or name_of(records[-1]["step"]) in written):
            return False
        if not directory.is_finished(self.planned.recipe(run)):
            return False
        self._seconds[directory.path] = records[-1]["seconds"]
        return True

    def __str__(self) -> str:
        whole = sum(map(self.is_whole, self.planned.runs))
        return f"{whole} of {len(self.planned.runs)} runs finished"

    def left(self, at_once: int = 1) -> str:
        """How long the others will take, by those that came to their end."""
        whole = [run for run in self.planned.runs if self.is_whole(run)]
        others = [run for run in self.asked if not self.is_whole(run)]
        if not whole or not others:
            return ""
        took: dict[str, list[float]] = {}
        for run in whole:
            took.setdefault(run.cell.name, []).append(self._seconds[run.directory.path])
        usual = statistics.mean(self._seconds.values())
        seconds = sum(statistics.mean(took.get(run.cell.name, [usual])) for run in others) / min(at_once, len(others))
        return f", about {seconds / 60:.0f} minutes left" if seconds > 90 else f", about {seconds:.0f} seconds left"
