"""The records of a study's finished runs in a directory of their own: laid out like a study's, without weights, and
small enough to be committed, so that runs may be made in several sittings and on several machines.
"""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints.snapshots import all_checkpoints
from pretrain.callbacks import say
from pretrain.recipe import UNITS, Recipe, free_keys
from pretrain.run_directory import RunDirectory, write_durably
from pretrain.study.definition import Planned, Run, study_error
from pretrain.study.progress import Progress
from pretrain.study.scores import differing


def keep(planned: Planned, run: Run | None, directory: Path) -> None:
    """Copies the records of a run that is scored; for None, the scores of the model that training starts from."""
    if run is None:
        _copy_text(planned.before, planned.at(directory).before)
    else:
        _copy(run, run.at(directory))


def take(planned: Planned, directory: Path) -> None:
    """Copies the records of kept runs that are not finished here. Raises RecipeError, before anything is copied, if one
    of them is not the planned run, or not the one that was made here."""
    kept, progress = planned.at(directory), Progress(planned)
    pairs = [(run, its) for run, its in zip(planned.runs, kept.runs, strict=True) if _is_kept(its)]
    if found := [why for run, its in pairs if (why := _why_not(kept, its, run if progress.is_whole(run) else None))]:
        raise study_error(found)
    if not planned.before.exists():
        _copy_text(kept.before, planned.before)
    for run, its in pairs:
        if not progress.is_whole(run):
            say(f"{run.directory.path} is finished: it is in {its.directory.path}")
            run.directory.clear()
            _copy(its, run)


def check_scored(planned: Planned) -> None:
    """Raises RecipeError if the directory's scores are of runs that began from other weights than are there now, or
    cannot be made anew as the study now wants them."""
    progress = Progress(planned)
    before = _unlike(planned, planned.before, planned.scoring, None, True)
    of_runs = [
        _unlike(planned, run.scores, run.recipe, run.directory, bool(all_checkpoints(run.directory.checkpoints)))
        for run in planned.runs
        if progress.is_whole(run)
    ]
    if found := [line for line in (before, *of_runs) if line]:
        raise study_error(found)


def _why_not(kept: Planned, its: Run, here: Run | None) -> str | None:
    """Why a kept run cannot stand for the planned one. here: the same run, if it is finished here as well."""
    path, budget = its.directory.path, kept.budget_of(its)
    if budget is not None and not _is_kept(budget):
        return f"{path} takes its budget from {budget.directory.path}, which is not there; bring that back or move both"
    recipe = its.directory.settle(kept.recipe(its))
    # Those that differ from machine to machine. The text read may not, nor how much of it.
    free = {key for key in free_keys(recipe) if key not in UNITS and not key.startswith("data.")} | {"data.patience"}
    if keys := its.directory.differing(recipe, free):
        return f"{path} is a run of another recipe ({', '.join(keys)} differ); move it away, or keep runs elsewhere"
    if here is None:
        return _unlike(kept, its.scores, recipe, its.directory, False)
    if here.directory.metrics.read_bytes() != its.directory.metrics.read_bytes():
        return f"{path} and {here.directory.path} are two runs of one recipe; move one of them away"
    return None


def _unlike(planned: Planned, path: Path, recipe: Recipe, run: RunDirectory | None, weights: bool) -> str | None:
    """What makes scores another model's, or others than are wanted of a run whose weights are gone."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    of_places = differing(found, recipe, planned.scoring, planned.shifts, run, planned.study.pass_at)
    keys = [f"{shift}: {key}" if shift else key for shift, of in of_places.items() for key in of]
    # Older scores do not say.
    if "start" in found.get("how", {}) and "start" in keys and "model" not in keys:
        return (
            f"{path} is of a run from other weights than {recipe.model} has now; bring those back, or move the run away"
        )
    if keys and not weights:
        return (
            f"{path} was scored in another way ({', '.join(keys)} differ), and has no weights to be scored anew; "
            "move the run away to train it again"
        )
    return None


def _is_kept(run: Run) -> bool:
    return all(path.exists() for path in (run.directory.recipe, run.directory.metrics, run.scores))


def _copy(run: Run, to: Run) -> None:
    """Scores last: a run without them is not kept."""
    for path in (run.directory.recipe, *run.directory.records):
        _copy_text(path, to.directory.path / path.name)
    _copy_text(run.scores, to.scores)


def _copy_text(path: Path, to: Path) -> None:
    if path.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        write_durably(to, path.read_text(encoding="utf-8"))
