"""Runs a study to its table and report: `run_study`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from pretrain.callbacks import say
from pretrain.plan import sizes_that_fit
from pretrain.run import fit
from pretrain.run_directory import RunDirectory, write_durably
from pretrain.stopping import TrainingStopped
from pretrain.study.definition import Planned, Run, load_study, study_error
from pretrain.study.kept import check_scored, keep, take
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
    kept: str | None = None,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    minutes: float | None = None,
) -> None:
    """Trains what is not finished, scores what is not scored, and writes results.md, results.json and report.html into
    the study's directory: of the runs that are finished, and they say which are missing. Raises what `fit` does.

    at_once: runs that are trained at the same time; default: one on each GPU, or all that can be if `launch` is given,
    the command that trains a recipe in place of `forethought fit`. kept: directory of records of finished runs, which
    are taken from there, and added once they are scored. only, seeds: arms and seeds to train; default: all. minutes:
    after which no run is begun.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    planned = load_study(path, overrides, run_dir, sizes_that_fit)
    asked = _asked(planned, only, seeds)
    if dry_run:
        for run in asked:
            say(f"{run.recipe.run_dir}: {run.recipe.trained_with}")
        say(f"the study can be run: {len(asked)} runs")
        return

    def score(run: Run | None) -> Scores:
        found = _scores(planned, run)
        if kept is not None:
            keep(planned, run, Path(kept))
        return found

    def in_time() -> bool:
        return end is None or time.monotonic() < end

    with RunDirectory(planned.directory).locked():
        if kept is not None:
            take(planned, Path(kept))
        check_scored(planned)
        progress = Progress(planned, asked)
        if lines := list(_without_budget(planned, progress)):
            raise study_error(lines)
        write_durably(planned.directory / "study.yaml", yaml.safe_dump(planned.tree, sort_keys=False))
        before = score(None)
        if at_once is None:
            at_once = len(planned.runs) if launch is not None else max(1, torch.cuda.device_count())
        if at_once > 1 or launch is not None:
            train_at_once(planned, progress, at_once, launch, in_time)
        else:
            _train(planned, progress, score, in_time)
        whole = [run for run in planned.runs if progress.is_whole(run)]
        if not whole:
            raise TrainingStopped("no run of the study is finished, and there is nothing to show; give it more time")
        finished = [_finished(planned, run, score(run)) for run in whole]
    missing = [(run.cell, run.recipe.seed) for run in planned.runs if run not in whole]
    found = results(finished, planned.study.controls, before, missing)
    write_durably(planned.directory / "results.json", json.dumps(found, indent=1) + "\n")
    said = markdown(planned.directory.name, found, _match(planned))
    write_durably(planned.directory / "results.md", said)
    print(said)
    say(f"report: {write_report(replace(planned, runs=whole), found, _match(planned))}")


def _asked(planned: Planned, only: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    """The runs to train. Raises RecipeError."""
    arms, of_study = planned.study.arms, planned.study.seeds
    found = [f"--only: {name!r} is no arm; arms: {', '.join(arms)}" for name in only or () if name not in arms]
    given = ", ".join(map(str, of_study))
    found += [
        f"--seeds: {seed} is none of the study's, which are {given}" for seed in seeds or () if seed not in of_study
    ]
    if found:
        raise study_error(found)
    of_arms = [run for run in planned.runs if only is None or run.cell.arm in only]
    return [run for run in of_arms if seeds is None or run.recipe.seed in seeds]


def _without_budget(planned: Planned, progress: Progress) -> Iterator[str]:
    """Why runs that were asked for could never begin."""
    for run in progress.asked:
        of = planned.budget_of(run)
        if of is not None and of not in progress.asked and not progress.is_whole(of):
            yield f"--only: {run.directory.path} takes its budget from {of.directory.path}; run {of.cell.arm} as well"


def _train(planned: Planned, progress: Progress, score: Callable[[Run], Scores], in_time: Callable[[], bool]) -> None:
    for run in progress.asked:
        if not progress.is_whole(run):
            if not in_time():
                continue
            recipe, number = planned.recipe(run), planned.runs.index(run) + 1
            say(f"run {number} of {len(planned.runs)}: {recipe.run_dir}{progress.left()}")
            run.scores.unlink(missing_ok=True)  # of an older run, of which there is no more
            try:
                fit(recipe, report=False)
            except TrainingStopped as stopped:
                raise TrainingStopped(f"{recipe.run_dir}, and the study with it: {stopped}") from None
        if progress.is_whole(run):
            score(run)


def _scores(planned: Planned, run: Run | None) -> Scores:
    if run is None:
        return scores(planned.scoring, planned.scoring, planned.shifts, planned.before, None, planned.study.pass_at)
    return scores(
        planned.recipe(run), planned.scoring, planned.shifts, run.scores, run.directory, planned.study.pass_at
    )


def _finished(planned: Planned, run: Run, scored: Scores) -> Finished:
    budget = planned.recipe(run).budget
    last = run.directory.read(run.directory.metrics)[-1]
    spent = {name: last[name] for name in ("step", "tokens", "flops", "seconds")}
    missed = 0.0 if budget.unit == "steps" else abs(last[budget.unit] / budget.amount - 1)
    return Finished(run.cell, run.recipe.seed, spent, missed, scored)


def _match(planned: Planned) -> str:
    unit, budget = planned.study.match, planned.study.budget
    if unit is None:
        return "Each run is as long as its recipe says."
    named = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}[unit]
    if isinstance(budget, str):
        return f"Each run spent as many {named} as {budget} with its seed."
    return f"Each run spent {budget:.4g} {named}."
