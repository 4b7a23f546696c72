"""The final scores of a run's model: of every document, kept as JSON beside the run, so that nothing is scored twice.

All runs of a study are scored alike: on the same documents at the same anchors, whatever they were trained on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.references import resolve
from checkpoints.snapshots import find_snapshot
from models.philox import Rng
from pretrain.assembly import assemble
from pretrain.callbacks import say
from pretrain.evaluation.held_out import HeldOutScores, score_held_out
from pretrain.opening import open_reference
from pretrain.recipe import Recipe
from pretrain.recipe_files import recipe_to_tree
from pretrain.run_directory import RunDirectory, write_durably
from pretrain.state import model_of
from pretrain.study.changed import Changed, changed
from pretrain.study.statistics import pass_at

# None of training's steps, and not that of evaluations in it.
STEP = 2**32 - 2


@dataclass(frozen=True)
class Scores:
    """nll: by condition of the counterfactual test, and "none" for that without a thought, the mean of each document's
    scored tokens [D]. correct: likewise, of "none" and "own", the share of them that the model finds likeliest.
    tokens_D: how many are scored. right: share of right thoughts, where right ones are known. changed: weights, by the
    run. passes: by k, the mean pass@k of each document's scored tokens [D]. shifts: on each shift's documents."""

    documents_D: Tensor
    tokens_D: Tensor
    nll: Mapping[str, Tensor]
    correct: Mapping[str, Tensor]
    right: float | None
    changed: Changed = field(default_factory=dict)
    passes: Mapping[int, Tensor] = field(default_factory=dict)
    shifts: Mapping[str, Scores] = field(default_factory=dict)


def scores(
    recipe: Recipe,
    scoring: Recipe,
    shifts: Mapping[str, Recipe],
    path: Path,
    run: RunDirectory | None,
    sampled: int | None = None,
) -> Scores:
    """The scores of a run's newest model, or, for None, of the one that training starts from; read from `path`, as far
    as they are there. Raises CheckpointError for a run whose weights are needed and gone.

    recipe: of the run. scoring: whose data and evaluation are used; shifts: and these, by name.
    sampled: thoughts for pass@k, which shifts have none of.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    anew = differing(kept, recipe, scoring, shifts, run, sampled)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(kept) + "\n")

    for shift in anew:
        found, (scored_by, n) = _place(kept, shift), (shifts[shift], None) if shift else (scoring, sampled)
        say(f"scoring {'the model before' if run is None else run.path}{f' on {shift}' if shift else ''}")
        found.pop("changed", None)
        found.update(how=_how(recipe, scored_by, run, n), **_scored(recipe, scored_by, run, n))
        write()
    if run is not None and "changed" not in kept:  # nor in still older ones
        start = open_reference(recipe.model, resolve(recipe.model), None, recipe.seed)
        kept["changed"] = changed(start, model_of(find_snapshot(run.path, ("model",)), None))
        write()
    return replace(_read(kept), shifts={shift: _read(kept["shifts"][shift]) for shift in shifts})


def _read(found: Mapping[str, Any]) -> Scores:
    nll, correct = (
        {condition: torch.tensor(values, dtype=torch.float64) for condition, values in found[name].items()}
        for name in ("nll", "correct")
    )
    weights = {name: (count, of) for name, (count, of) in found.get("changed", {}).items()}
    documents_D, tokens_D = torch.tensor(found["documents"]), torch.tensor(found["tokens"])
    n = found["how"].get("pass_at", 0) if "passes" in found else 0
    passes = {
        k: torch.stack([pass_at(k, torch.tensor(right), n).mean() for right in found["passes"]])
        for k in sorted({n, *(2**i for i in range(n.bit_length()))} if n else ())
    }
    return Scores(documents_D, tokens_D, nll, correct, found["right"], weights, passes)


def differing(
    kept: dict[str, Any],
    recipe: Recipe,
    scoring: Recipe,
    shifts: Mapping[str, Recipe],
    run: RunDirectory | None,
    sampled: int | None = None,
) -> dict[str, list[str]]:
    """In what kept scores are not those that `scores` is asked for (step, model, start, data, evaluation, pass_at, or
    that there are any), by shift, or "" for those that are of none; empty where nothing is to be scored anew."""
    found = {}
    for shift, scored_by in {"": scoring, **shifts}.items():
        there = _place(kept, shift)
        how = _how(recipe, scored_by, run, None if shift else sampled)
        keys = [key for key, value in how.items() if there["how"].get(key) != value] if "how" in there else []
        if "correct" not in there:  # nor in older files
            keys.append("scores")
        if keys:
            found[shift] = keys
    return found


def _place(kept: dict[str, Any], shift: str) -> dict[str, Any]:
    """Where the scores of a shift are."""
    return kept.setdefault("shifts", {}).setdefault(shift, {}) if shift else kept


def _how(recipe: Recipe, scoring: Recipe, run: RunDirectory | None, sampled: int | None) -> dict[str, Any]:
    tree = recipe_to_tree(scoring)
    return {
        "step": 0 if run is None else run.read(run.metrics)[-1]["step"],
        "model": recipe.model,
        "start": _fingerprint(recipe.model, recipe.seed if recipe.model.startswith("random:") else 0),
        "data": tree["data"],
        "evaluation": tree["evaluation"],
        **({} if sampled is None else {"pass_at": sampled}),
    }


@functools.cache
def _fingerprint(model: str, seed: int) -> str:
    """Of the weights that a run starts from. A directory may be made anew while runs go on: those count that were there
    before."""
    return open_reference(model, resolve(model), None, seed).fingerprint()


def _scored(recipe: Recipe, scoring: Recipe, run: RunDirectory | None, sampled: int | None) -> dict[str, Any]:
    changes = {"data": scoring.data, "evaluation": scoring.evaluation, "data_changed": "begin", "seed": scoring.seed}
    parts = assemble(recipe.replaced(**changes), None if run is None else find_snapshot(run.path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts.load(device)
    rows = recipe.micro_batch_rows or recipe.rows_per_step
    held_out = parts.held_out.to(device)
    found = score_held_out(
        *(parts.evaluator, parts.model, held_out, Rng(scoring.seed, STEP), rows, parts.test, parts.engine),
        sampled=sampled or 0,
    )
    return by_document(found)


def by_document(scores: HeldOutScores) -> dict[str, Any]:
    """JSON-able: documents, their scored tokens, means of these by condition, the share of right thoughts, and, if any
    were sampled, after how many the true token is the likeliest, of each token.

    Where right thoughts are known of some tokens, as of a problem's answer, these alone are scored.
    """
    nll_E, correct_E = {"none": scores.text_nll_E, **scores.counterfactual_E}, {"none": scores.text_correct_E}
    if scores.thought_nll_E is not None and scores.thought_correct_E is not None:
        nll_E["own"], correct_E["own"] = scores.thought_nll_E, scores.thought_correct_E
    right_E = torch.full_like(scores.text_nll_E, torch.nan) if scores.right_E is None else scores.right_E
    known_E = ~right_E.isnan()
    if not known_E.any():
        nll_E.pop("right", None)
    scored_E = known_E if known_E.any() else torch.ones_like(known_E)
    documents_D, index_E, tokens_D = scores.document_E[scored_E].unique(return_inverse=True, return_counts=True)
    zeros_D = torch.zeros(len(documents_D), dtype=torch.float64)

    def means(of: Mapping[str, Tensor]) -> dict[str, list[float]]:
        return {name: (zeros_D.index_add(0, index_E, x_E[scored_E]) / tokens_D).tolist() for name, x_E in of.items()}

    passes_E = scores.passes_E
    passes = (
        {}
        if passes_E is None
        else {"passes": [passes_E[scored_E][index_E == d].tolist() for d in range(len(tokens_D))]}
    )
    return {
        **passes,
        "documents": documents_D.tolist(),
        "tokens": tokens_D.tolist(),
        "nll": means(nll_E),
        "correct": means(correct_E),
        "right": right_E[known_E].mean().item() if known_E.any() else None,
    }
