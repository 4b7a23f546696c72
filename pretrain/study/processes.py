"""Trains several of a study's runs at once, each in a process of its own: `train_at_once`."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.callbacks import say
from pretrain.recipe import RecipeError
from pretrain.recipe_files import recipe_to_yaml
from pretrain.run_directory import write_durably
from pretrain.stopping import TrainingStopped
from pretrain.study.definition import Planned, Run
from pretrain.study.progress import Progress

FIT = (sys.executable, "-m", "pretrain", "fit")
POLL = 0.2  # seconds


@dataclass(frozen=True)
class Started:
    """slot: its number among those at once."""

    run: Run
    slot: int
    process: subprocess.Popen[bytes]


def train_at_once(
    planned: Planned,
    progress: Progress,
    at_once: int,
    launch: str | None,
    in_time: Callable[[], bool] = lambda: True,
) -> None:
    """Trains what is asked for and not finished, `at_once` runs at a time. A run that fails leaves the others alone.

    launch: the command that is given a recipe, and ends when its run has; default: `forethought fit`, each on a GPU
    or with its share of the CPU. in_time: whether runs may still be begun. Raises TrainingStopped that names the runs
    that failed, RecipeError for a command that cannot be started. A signal is handed on, and ends this once all runs
    have saved.
    """
    waiting = [run for run in progress.asked if not progress.is_whole(run)]
    running: list[Started] = []
    failed: list[Run] = []
    try:
        while waiting or running:
            ended = [started for started in running if started.process.poll() is not None]
            running = [started for started in running if started not in ended]
            for started in ended:
                if started.process.returncode == 0 and progress.is_whole(started.run):
                    say(f"{started.run.directory.path} is finished: {progress}{progress.left(at_once)}")
                else:
                    failed.append(started.run)
                    say(_why(started))
            while len(running) < at_once and in_time():
                run = next(_ready(planned, waiting, progress), None)
                if run is None:
                    break
                waiting.remove(run)
                slot = next(n for n in itertools.count() if n not in {started.slot for started in running})
                number = planned.runs.index(run) + 1
                say(f"run {number} of {len(planned.runs)}: {run.directory.path}{progress.left(at_once)}")
                running.append(Started(run, slot, _start(planned, run, slot, at_once, launch)))
            if not running:
                break
            time.sleep(POLL)
    finally:
        for started in running:
            started.process.terminate()
        for started in running:
            started.process.wait()
    if failed:
        after = sum(planned.budget_of(run) in failed for run in waiting)
        also = f", and {after} that take their budget from them were not begun" if after else ""
        others = "all others are finished" if after == len(waiting) else "for some others there was no time"
        raise TrainingStopped(
            f"{', '.join(str(run.directory.path) for run in failed)} failed{also}; {others}. What a run "
            f"said is in {_log(failed[0])}; the same command goes on"
        )


def _ready(planned: Planned, waiting: Sequence[Run], progress: Progress) -> Iterator[Run]:
    """Those whose budget is known."""
    for run in waiting:
        of = planned.budget_of(run)
        if of is None or progress.is_whole(of):
            yield run


def _start(planned: Planned, run: Run, slot: int, at_once: int, launch: str | None) -> subprocess.Popen[bytes]:
    path, log = run.directory.path.with_name(f"{run.directory.path.name}.recipe.yaml"), _log(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.scores.unlink(missing_ok=True)  # of an older run, of which there is no more
    write_durably(path, recipe_to_yaml(planned.recipe(run)))
    command = [*(FIT if launch is None else shlex.split(launch)), str(path)]
    own = _share(slot, at_once) if launch is None else {}
    with log.open("ab") as file:
        try:
            # A group of its own: Ctrl-C at a terminal reaches it once, by us.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=os.environ | own, process_group=0
            )
        except OSError as error:
            raise RecipeError(f"--launch: {command[0]} cannot be started ({error.strerror}); check the path") from None


def _share(slot: int, at_once: int) -> Mapping[str, str]:
    """The environment of a slot's part of this machine."""
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]}
    threads = torch.get_num_threads() // at_once
    return {"OMP_NUM_THREADS": str(max(1, threads))}


def _log(run: Run) -> Path:
    return run.directory.path.with_name(f"{run.directory.path.name}.log")


def _why(started: Started) -> str:
    lines = _log(started.run).read_text(encoding="utf-8", errors="replace").splitlines()
    return f"{started.run.directory.path} failed, exit code {started.process.returncode}: {lines[-1] if lines else ''}"
