"""Held-out evaluation: NLL without and with thoughts, by difficulty of the token, and after counterfactual thoughts.

Thinking should help on hard tokens, so tokens are binned by difficulty: their NLL without thoughts before the run's
first step. The bins stay fixed, whatever the model learns.

Shapes: B rows, N text positions, E evaluated tokens, D documents, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.philox import Rng
from models.rollout import EAGER, Engine
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives import CounterfactualTest, Objective

DECILES = 10
RESAMPLES = 2000
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class HeldOutScores:
    """Scores of each evaluated token, fp64 on the CPU; those with thoughts are missing for objectives without.

    document_E: int64, numbers the documents. counterfactual_E: NLL by condition of the counterfactual test. right_E: 1
    where the thought is the right one, nan where no right one is known; there counterfactual_E["right"] has no meaning.
    """

    document_E: Tensor
    text_nll_E: Tensor
    text_correct_E: Tensor
    thought_nll_E: Tensor | None = None
    thought_correct_E: Tensor | None = None
    counterfactual_E: dict[str, Tensor] = field(default_factory=dict)
    right_E: Tensor | None = None


@torch.no_grad()
def score_held_out(
    objective: Objective,
    model: ThinkingModel,
    text: Text,
    rng: Rng,
    rows_at_once: int,
    test: CounterfactualTest | None = None,
    engine: Engine = EAGER,
) -> HeldOutScores:
    """Scores of all tokens of held-out text that the objective evaluates."""
    cuts = parts_to_score(objective, text, rows_at_once)
    scores = [objective.evaluate(model, text.rows(cut), rng, test, engine) for cut in cuts]

    def gathered(values: list[Tensor | None]) -> Tensor | None:
        picked = [v[s.valid_BN].double().cpu() for v, s in zip(values, scores, strict=True) if v is not None]
        return torch.cat(picked) if picked else None

    def required(values: list[Tensor]) -> Tensor:
        return torch.cat([v[s.valid_BN].double().cpu() for v, s in zip(values, scores, strict=True)])

    valid_BN = torch.cat([s.valid_BN for s in scores]).cpu()
    return HeldOutScores(
        document_numbers(text).cpu()[valid_BN],
        required([s.text_nll_BN for s in scores]),
        required([s.text_correct_BN for s in scores]),
        gathered([s.thought_nll_BN for s in scores]),
        gathered([s.thought_correct_BN for s in scores]),
        {c: required([s.counterfactual_nll_BN[c] for s in scores]) for c in scores[0].counterfactual_nll_BN},
        gathered([s.right_BN for s in scores]),
    )


def parts_to_score(objective: Objective, text: Text, rows_at_once: int) -> list[slice]:
    """Parts of `rows_at_once` rows, or of more where these hold no two thoughts to be exchanged."""
    cuts, start, end = [], 0, text.shape[0]
    for stop in range(rows_at_once, end + rows_at_once, rows_at_once):
        if objective.scored(text.rows(slice(start, stop))) > 1:
            cuts.append(slice(start, stop))
            start = stop
    if start < end:
        # What is left joins the part before it.
        cuts.append(slice(cuts.pop().start if cuts else 0, end))
    return cuts


def document_numbers(text: Text) -> Tensor:
    """int64 [B, N]: a number of its own for each document of a text."""
    row_B1 = torch.arange(text.shape[0], device=text.tokens_BN.device)[:, None]
    return row_B1 * text.shape[1] + text.document_start_BN


def interval(values_E: Tensor, document_E: Tensor) -> dict[str, float]:
    """{"nll": mean, "low": …, "high": …}: the mean over tokens and its 95% interval.

    By a percentile bootstrap over documents, whose tokens are not independent of each other (Efron 1979). The
    resamples are the same at every call.
    """
    numbers_D, index_E = document_E.unique(return_inverse=True)
    D = len(numbers_D)
    sum_D = torch.zeros(D, dtype=torch.float64).index_add_(0, index_E, values_E)
    count_D = torch.zeros(D, dtype=torch.float64).index_add_(0, index_E, torch.ones_like(values_E))
    resampled_RD = torch.randint(D, (RESAMPLES, D), generator=torch.Generator().manual_seed(0))
    mean_R = sum_D[resampled_RD].sum(dim=1) / count_D[resampled_RD].sum(dim=1)
    low, high = mean_R.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return {"nll": values_E.mean().item(), "low": low, "high": high}


def summarise(scores: HeldOutScores, difficulty_E: Tensor) -> dict[str, Any]:
    """Means over all tokens and over deciles of difficulty, easiest first; ties keep the order of the text.

    The counterfactual test's conditions come with intervals: of their NLL, and of their difference to the own
    thought's. What needs right thoughts is over the tokens where they are known, and left out where none is.
    """
    order = difficulty_E.argsort(stable=True)
    summary: dict[str, Any] = {"tokens_scored": float(len(order))}
    for name, nll_E in (("nll_text", scores.text_nll_E), ("nll_thought", scores.thought_nll_E)):
        if nll_E is not None:
            summary[name] = nll_E.mean().item()
            summary[f"{name}_deciles"] = [part.mean().item() for part in nll_E[order].tensor_split(DECILES)]
    for name, share_E in (
        ("accuracy_text", scores.text_correct_E),
        ("accuracy_thought", scores.thought_correct_E),
    ):
        if share_E is not None:
            summary[name] = share_E.mean().item()
    everywhere_E = torch.ones_like(scores.document_E, dtype=torch.bool)
    known_E = ~everywhere_E if scores.right_E is None else ~scores.right_E.isnan()
    if scores.right_E is not None and known_E.any():
        summary["thought_right"] = scores.right_E[known_E].mean().item()
    if scores.counterfactual_E:
        summary["counterfactual"], summary["counterfactual_minus_own"] = {}, {}
        for condition, nll_E in (scores.counterfactual_E | {"none": scores.text_nll_E}).items():
            where_E = known_E if condition == "right" else everywhere_E
            if not where_E.any():
                continue
            document_E, minus_own_E = scores.document_E[where_E], nll_E - scores.counterfactual_E["own"]
            summary["counterfactual"][condition] = interval(nll_E[where_E], document_E)
            if condition != "own":
                summary["counterfactual_minus_own"][condition] = interval(minus_own_E[where_E], document_E)
    return summary
