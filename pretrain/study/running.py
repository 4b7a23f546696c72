"""Runs a study, one run after the other: `run_study`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence

import yaml

from checkpoints.snapshots import all_checkpoints, name_of
from pretrain.callbacks import say
from pretrain.plan import sizes_that_fit
from pretrain.recipe import Recipe
from pretrain.run import fit
from pretrain.run_directory import RunDirectory, write_durably
from pretrain.stopping import TrainingStopped
from pretrain.study.definition import Planned, Run, load_study
from pretrain.study.report import write_report
from pretrain.study.results import Finished, markdown, results
from pretrain.study.scores import Scores, scores


def run_study(path: str, overrides: Sequence[str], run_dir: str | None, dry_run: bool = False) -> None:
    """Trains what is not finished, scores what is not scored, and writes results.md, results.json and report.html into
    the study's directory. Raises what `fit` does."""
    planned = load_study(path, overrides, run_dir, sizes_that_fit)
    if dry_run:
        for run in planned.runs:
            say(f"{run.recipe.run_dir}: {run.recipe.trained_with}")
        say(f"the study can be run: {len(planned.runs)} runs")
        return
    with RunDirectory(planned.directory).locked():
        write_durably(planned.directory / "study.yaml", yaml.safe_dump(planned.tree, sort_keys=False))
        _train(planned)
        found = results(*_scored(planned))
    write_durably(planned.directory / "results.json", json.dumps(found, indent=1) + "\n")
    said = markdown(planned.directory.name, found, _match(planned))
    write_durably(planned.directory / "results.md", said)
    print(said)
    say(f"report: {write_report(planned, found, _match(planned))}")


def _train(planned: Planned) -> None:
    took: dict[str, list[float]] = {}  # seconds, by cell
    for number, run in enumerate(planned.runs):
        recipe, directory, started = planned.recipe(run), run.directory, time.perf_counter()
        if _is_whole(directory, recipe):
            seconds = directory.read(directory.metrics)[-1]["seconds"]
        else:
            say(f"run {number + 1} of {len(planned.runs)}: {recipe.run_dir}{_left(planned.runs[number:], took)}")
            try:
                fit(recipe, report=False)
            except TrainingStopped as stopped:
                raise TrainingStopped(f"{recipe.run_dir}, and the study with it: {stopped}") from None
            seconds = time.perf_counter() - started
        took.setdefault(run.cell.name, []).append(seconds)


def _is_whole(directory: RunDirectory, recipe: Recipe) -> bool:
    """Whether the run came to its end, and its last snapshot was written before anything killed it."""
    written = {path.name for path in all_checkpoints(directory.checkpoints)}
    return directory.is_finished(recipe) and name_of(directory.read(directory.metrics)[-1]["step"]) in written


def _left(runs: Sequence[Run], took: Mapping[str, Sequence[float]]) -> str:
    """How long they will take, by those that came to their end."""
    if not took:
        return ""
    usual = statistics.mean(seconds for of in took.values() for seconds in of)
    seconds = sum(statistics.mean(took.get(run.cell.name, [usual])) for run in runs)
    return f", about {seconds / 60:.0f} minutes left" if seconds > 90 else f", about {seconds:.0f} seconds left"


def _scored(planned: Planned) -> tuple[list[Finished], Sequence[str], Scores]:
    """What `results` takes."""
    scoring = planned.scoring
    before = scores(scoring, scoring, planned.directory / "before.scores.json", None)
    found = []
    for number, run in enumerate(planned.runs):
        recipe, directory = planned.recipe(run), run.directory
        path = directory.path.with_name(f"{directory.path.name}.scores.json")
        if not path.exists():
            say(f"scoring run {number + 1} of {len(planned.runs)}: {recipe.run_dir}")
        last = directory.read(directory.metrics)[-1]
        spent = {name: last[name] for name in ("step", "tokens", "flops", "seconds")}
        missed = 0.0 if recipe.budget.unit == "steps" else abs(last[recipe.budget.unit] / recipe.budget.amount - 1)
        found.append(Finished(run.cell, recipe.seed, spent, missed, scores(recipe, scoring, path, directory)))
    return found, planned.study.controls, before


def _match(planned: Planned) -> str:
    unit, budget = planned.study.match, planned.study.budget
    if unit is None:
        return "Each run is as long as its recipe says."
    amount = f"the {unit} of {budget}" if isinstance(budget, str) else f"{budget:.4g} {unit}"
    return f"All runs spent {amount}."
