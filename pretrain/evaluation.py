"""Held-out evaluation: NLL without thoughts, with them, and by how hard a token is.

The gain of thinking is expected on hard tokens, so tokens are binned by difficulty: the NLL that the model gave them,
without thoughts, before the run's first step. The bins stay fixed, whatever the model learns.

Shapes: B rows, N text positions, E evaluated tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives.base import Objective

DECILES = 10


@dataclass(frozen=True)
class HeldOutScores:
    """NLL in nats of each evaluated token; the one with thoughts is None for objectives that do not think."""

    text_nll_E: Tensor
    thought_nll_E: Tensor | None
    flops: int


@torch.no_grad()
def score_held_out(
    objective: Objective, model: ThinkingModel, text: Text, rng: Rng, rows_at_once: int
) -> HeldOutScores:
    """Scores of all tokens of held-out text that have a predecessor, in fp64 on the CPU."""
    text_nll, thought_nll, flops = [], [], 0
    for start in range(0, text.shape[0], rows_at_once):
        scores = objective.evaluate(model, text.rows(slice(start, start + rows_at_once)), rng)
        text_nll.append(scores.text_nll_BN[scores.valid_BN].double().cpu())
        if scores.thought_nll_BN is not None:
            thought_nll.append(scores.thought_nll_BN[scores.valid_BN].double().cpu())
        flops += scores.flops
    return HeldOutScores(torch.cat(text_nll), torch.cat(thought_nll) if thought_nll else None, flops)


def summarise(scores: HeldOutScores, difficulty_E: Tensor) -> dict[str, float | list[float]]:
    """Means over all tokens and over deciles of difficulty, easiest first; ties keep the order of the text."""
    order = difficulty_E.argsort(stable=True)
    summary: dict[str, float | list[float]] = {"tokens_scored": float(len(order))}
    for name, nll_E in (("nll_text", scores.text_nll_E), ("nll_thought", scores.thought_nll_E)):
        if nll_E is None:
            continue
        summary[name] = nll_E.mean().item()
        summary[f"{name}_deciles"] = [part.mean().item() for part in nll_E[order].tensor_split(DECILES)]
    return summary
