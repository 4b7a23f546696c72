"""Runs a study to its table and report: `run_study`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import yaml

from pretrain.callbacks import say
from pretrain.plan import sizes_that_fit
from pretrain.run import fit
from pretrain.run_directory import RunDirectory, write_durably
from pretrain.stopping import TrainingStopped
from pretrain.study.definition import Planned, load_study
from pretrain.study.processes import train_at_once
from pretrain.study.progress import Progress
from pretrain.study.report import write_report
from pretrain.study.results import Finished, markdown, results
from pretrain.study.scores import Scores, scores


def run_study(
    path: str,
    overrides: Sequence[str],
    run_dir: str | None,
    dry_run: bool = False,
    at_once: int | None = None,
    launch: str | None = None,
) -> None:
    """Trains what is not finished, scores what is not scored, and writes results.md, results.json and report.html into
    the study's directory. Raises what `fit` does.

    at_once: runs that are trained at the same time; default: one on each GPU, or all that can be if `launch` is given,
    the command that trains a recipe in place of `forethought fit`.
    """
    planned = load_study(path, overrides, run_dir, sizes_that_fit)
    if dry_run:
        for run in planned.runs:
            say(f"{run.recipe.run_dir}: {run.recipe.trained_with}")
        say(f"the study can be run: {len(planned.runs)} runs")
        return
    with RunDirectory(planned.directory).locked():
        write_durably(planned.directory / "study.yaml", yaml.safe_dump(planned.tree, sort_keys=False))
        if at_once is None:
            at_once = len(planned.runs) if launch is not None else max(1, torch.cuda.device_count())
        if at_once > 1 or launch is not None:
            train_at_once(planned, Progress(planned), at_once, launch)
        else:
            _train(planned, Progress(planned))
        found = results(*_scored(planned))
    write_durably(planned.directory / "results.json", json.dumps(found, indent=1) + "\n")
    said = markdown(planned.directory.name, found, _match(planned))
    write_durably(planned.directory / "results.md", said)
    print(said)
    say(f"report: {write_report(planned, found, _match(planned))}")


def _train(planned: Planned, progress: Progress) -> None:
    for number, run in enumerate(planned.runs):
        if progress.is_whole(run):
            continue
        recipe = planned.recipe(run)
        say(f"run {number + 1} of {len(planned.runs)}: {recipe.run_dir}{progress.left()}")
        try:
            fit(recipe, report=False)
        except TrainingStopped as stopped:
            raise TrainingStopped(f"{recipe.run_dir}, and the study with it: {stopped}") from None


def _scored(planned: Planned) -> tuple[list[Finished], Sequence[str], Scores]:
    """What `results` takes."""
    scoring, shifts = planned.scoring, planned.shifts
    before = scores(scoring, scoring, shifts, planned.directory / "before.scores.json", None)
    found = []
    for run in planned.runs:
        recipe, directory = planned.recipe(run), run.directory
        path = directory.path.with_name(f"{directory.path.name}.scores.json")
        last = directory.read(directory.metrics)[-1]
        spent = {name: last[name] for name in ("step", "tokens", "flops", "seconds")}
        missed = 0.0 if recipe.budget.unit == "steps" else abs(last[recipe.budget.unit] / recipe.budget.amount - 1)
        scored = scores(recipe, scoring, shifts, path, directory)
        found.append(Finished(run.cell, recipe.seed, spent, missed, scored))
    return found, planned.study.controls, before


def _match(planned: Planned) -> str:
    unit, budget = planned.study.match, planned.study.budget
    if unit is None:
        return "Each run is as long as its recipe says."
    amount = f"the {unit} of {budget}" if isinstance(budget, str) else f"{budget:.4g} {unit}"
    return f"All runs spent {amount}."
