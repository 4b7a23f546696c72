"""Held-out evaluation: NLL without and with thoughts, after counterfactual thoughts, and by difficulty of the token.

Difficulty is a token's NLL without thoughts before the run's first step; the bins stay fixed, whatever the model
learns. What thoughts gain in a bin is no evidence by itself: the bins are made of what the gain is taken from, and any
perturbation flattens a distribution, which helps hard tokens and hurts easy ones. What the content of thoughts gains in
a bin is own against shuffled and own against filler, which perturb as much.

Shapes: B rows, N text positions, E evaluated tokens, D documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
# With fewer documents a bootstrap over them is too narrow to be trusted.
ENOUGH_DOCUMENTS = 20


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out text. document_BN: int64, the number of the document that each token is from, -1 on padding: the same
    for all fragments of a document. fingerprint: of what is scored, and how."""

    text: Text
    document_BN: Tensor
    fingerprint: str = ""

    def to(self, device: torch.device | str) -> HeldOut:
        return replace(self, text=self.text.to(device))


@dataclass(frozen=True)
class HeldOutScores:
    """Scores of each evaluated token, fp64 on the CPU; those with thoughts are missing for objectives without.

    document_E: int64, the true documents' numbers. counterfactual_E: NLL by condition of the counterfactual test.
    right_E: 1 where the thought is the right one, nan where no right one is known; there counterfactual_E["right"] has
    no meaning. passes_E: int64, after how many of the sampled thoughts the true token is the likeliest.
    """

    document_E: Tensor
    text_nll_E: Tensor
    text_correct_E: Tensor
    thought_nll_E: Tensor | None = None
    thought_correct_E: Tensor | None = None
    counterfactual_E: dict[str, Tensor] = field(default_factory=dict)
    right_E: Tensor | None = None
    passes_E: Tensor | None = None


@torch.no_grad()
def score_held_out(
    objective: Objective,
    model: ThinkingModel,
    held_out: HeldOut,
    rng: Rng,
    rows_at_once: int,
    test: CounterfactualTest | None = None,
    engine: Engine = EAGER,
    before_each: Callable[[], None] = lambda: None,
    sampled: int = 0,
) -> HeldOutScores:
    """Scores of all tokens of held-out text that the objective evaluates; up to rounding the same however it is cut.

    sampled: thoughts at each anchor for `passes_E`; 0: it is not counted.
    before_each: called before each pass over `rows_at_once` rows, where it may raise.
    """
    rows = range(0, held_out.text.shape[0], rows_at_once)
    parts = [held_out.text.rows(slice(first, first + rows_at_once)) for first in rows]
    document_BN = held_out.document_BN.split(rows_at_once)
    scores = []
    for part in parts:
        before_each()
        scores.append(objective.evaluate(model, part, rng, engine))

    def gathered(values: Sequence[Tensor | None], where: Sequence[Tensor]) -> Tensor | None:
        picked = [v[w].double().cpu() for v, w in zip(values, where, strict=True) if v is not None]
        return torch.cat(picked) if picked else None

    def required(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([v[s.valid_BN].double().cpu() for v, s in zip(values, scores, strict=True)])

    valid_BN = [s.valid_BN for s in scores]
    found = HeldOutScores(
        required([x.to(v.device) for x, v in zip(document_BN, valid_BN, strict=True)]).long(),
        required([s.text_nll_BN for s in scores]),
        required([s.text_correct_BN for s in scores]),
        gathered([s.thought_nll_BN for s in scores], valid_BN),
        gathered([s.thought_correct_BN for s in scores], valid_BN),
    )
    own = [s.bodies for s in scores if s.bodies is not None]
    if sampled and own:
        passes_E = []
        for part, bodies in zip(parts, own, strict=True):
            before_each()
            state = model.read(part)
            body_BKLM = objective.own_bodies(model, state, bodies.anchors, rng, engine, sampled)
            said = [replace(bodies, tokens_BLM=body_BLM) for body_BLM in body_BKLM.unbind(1)]
            right_BM = torch.stack([objective.right_after(model, state, x) for x in said]).sum(0)
            passes_E.append(right_BM[bodies.real_BM].cpu())
        found = replace(found, passes_E=torch.cat(passes_E))
    if test is None or not own or found.thought_nll_E is None:
        return found
    conditions = test.conditions(own, document_BN, rng)
    nll: dict[str, list[Tensor]] = {condition: [] for condition in conditions}
    for i, (part, bodies) in enumerate(zip(parts, own, strict=True)):
        state = model.read(part)
        for condition, body_BLM in conditions.items():
            before_each()
            nll_BM = objective.nll_after(model, state, replace(bodies, tokens_BLM=body_BLM[i]))
            nll[condition].append(nll_BM[bodies.real_BM].double().cpu())
    counterfactual_E = {"own": found.thought_nll_E} | {condition: torch.cat(parts) for condition, parts in nll.items()}
    right_E = gathered([test.is_right(x) for x in own], [x.real_BM for x in own]) if "right" in conditions else None
    return replace(found, counterfactual_E=counterfactual_E, right_E=right_E)


def interval(values_E: Tensor, document_E: Tensor) -> dict[str, float]:
    """{"nll": mean, "low": …, "high": …, "documents": D}: the mean over tokens and its 95% interval.

    By a percentile bootstrap over documents, whose tokens are not independent of each other (Efron 1979). The
    resamples are the same at every call.
    """
    numbers_D, index_E = document_E.unique(return_inverse=True)
    sum_D = torch.zeros(len(numbers_D), dtype=torch.float64).index_add_(0, index_E, values_E)
    count_D = torch.zeros_like(sum_D).index_add_(0, index_E, torch.ones_like(values_E))
    low, high = bootstrap(sum_D, count_D)
    return {"nll": values_E.mean().item(), "low": low, "high": high, "documents": len(numbers_D)}


def bootstrap(sum_D: Tensor, count_D: Tensor) -> tuple[float, float]:
    """The 95% interval of Σ sum / Σ count, fp64 both, over D documents resampled whole: percentiles (Efron 1979)."""
    D = len(sum_D)
    resampled_RD = torch.randint(D, (RESAMPLES, D), generator=torch.Generator().manual_seed(0))
    ratio_R = sum_D[resampled_RD].sum(dim=1) / count_D[resampled_RD].sum(dim=1)
    low, high = ratio_R.quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    return low, high


def summarise(scores: HeldOutScores, difficulty_E: Tensor) -> dict[str, Any]:
    """Means over all tokens and over deciles of difficulty, easiest first; ties keep the order of the text.

    The counterfactual test's conditions come with intervals: of their NLL, and of their difference to the own
    thought's, the latter by decile, too. What needs right thoughts is over the tokens where they are known, and left
    out where none is.
    """
    deciles = difficulty_E.argsort(stable=True).tensor_split(DECILES)
    summary: dict[str, Any] = {
        "tokens_scored": float(len(difficulty_E)),
        "documents_scored": float(len(scores.document_E.unique())),
    }
    for name, nll_E in (("nll_text", scores.text_nll_E), ("nll_thought", scores.thought_nll_E)):
        if nll_E is not None:
            summary[name] = nll_E.mean().item()
            summary[f"{name}_deciles"] = [nll_E[decile].mean().item() for decile in deciles]
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
        nlls, differences, by_decile = (
            summary.setdefault(name, {})
            for name in ("counterfactual", "counterfactual_minus_own", "counterfactual_minus_own_deciles")
        )
        for condition, nll_E in (scores.counterfactual_E | {"none": scores.text_nll_E}).items():
            where_E = known_E if condition == "right" else everywhere_E
            if not where_E.any():
                continue
            document_E, minus_own_E = scores.document_E[where_E], nll_E - scores.counterfactual_E["own"]
            nlls[condition] = interval(nll_E[where_E], document_E)
            if condition != "own":
                differences[condition] = interval(minus_own_E[where_E], document_E)
            if condition in ("other", "shuffled", "filler"):
                by_decile[condition] = [
                    interval(minus_own_E[decile], scores.document_E[decile]) if len(decile) else None
                    for decile in deciles
                ]
    return summary
