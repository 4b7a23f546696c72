"""Next-token prediction: the baseline of every table.

Shapes: B rows, N text positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from models.decoder import TextState
from models.logprobs import most_probable, token_logprobs
from models.philox import Rng
from models.rollout import EAGER, Engine
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives.base import Counts, Objective, ObjectiveConfig, Term, TextPart, TokenScores
from objectives.metrics import Mean
from objectives.workload import Workload


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy has no settings."""

    name: str = "next_token"


def next_token_part(model: ThinkingModel, state: TextState, weight: float = 1.0) -> TextPart:
    """Cross-entropy of every token that has a predecessor in its own document."""
    target_BN, valid_BN = state.text.targets(1)
    nll_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
    return TextPart([Term(nll_BN.sum(), "text", weight)], {"nll_text": Mean.over(nll_BN, valid_BN)})


class NextToken(Objective):
    """Mean cross-entropy."""

    Config = NextTokenConfig
    sentence: ClassVar[str] = "The model learns to predict the next token and does not think."

    def __init__(self, config: NextTokenConfig | None = None):
        self.config = config or NextTokenConfig()

    def counts(self, text: Text, batch: Any = None) -> Counts:
        return {"text": text.targets(1)[1].sum()}

    def text_terms(self, model: ThinkingModel, state: TextState, batch: Any = None) -> TextPart:
        return next_token_part(model, state)

    def workload(self, length: int, documents: float) -> Workload:
        return Workload(length, documents, text_predicted=length)

    @torch.no_grad()
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng, engine: Engine = EAGER) -> TokenScores:
        target_BN, valid_BN = text.targets(1)
        hidden_BNW = model.read(text).hidden_BNW
        nll_BN = -token_logprobs(hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
        correct_BN = most_probable(hidden_BNW, model.head_weight_VW) == target_BN
        return TokenScores(nll_BN, correct_BN & valid_BN, valid_BN)
