"""Next-token prediction: the baseline of every table.

Shapes: B rows, N text positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.flops import Ledger
from models.logprobs import token_logprobs
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives.base import Denominators, Mean, Objective, ObjectiveConfig, ObjectiveOutput, TokenScores, divide


@dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy has no settings."""


class NextToken(Objective):
    """Mean cross-entropy of every token that has a predecessor in its own document."""

    def __init__(self, config: NextTokenConfig | None = None):
        self.config = config or NextTokenConfig()

    def denominators(self, text: Text) -> Denominators:
        return {"text": text.targets(1)[1].sum()}

    def __call__(
        self, model: ThinkingModel, text: Text, rng: Rng, denominators: Denominators | None = None
    ) -> ObjectiveOutput:
        denominators = denominators or self.denominators(text)
        target_BN, valid_BN = text.targets(1)
        state = model.read(text)
        nll_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
        ledger = Ledger(model.decoder.config)
        ledger.read(text, backward=True)
        ledger.vocabulary(valid_BN.numel(), backward=True)
        loss = divide(nll_BN.sum(), denominators["text"])
        return ObjectiveOutput(loss, {"nll_text": Mean.over(nll_BN, valid_BN)}, ledger.total)

    @torch.no_grad()
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng) -> TokenScores:
        target_BN, valid_BN = text.targets(1)
        state = model.read(text)
        nll_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
        ledger = Ledger(model.decoder.config)
        ledger.read(text, backward=False)
        ledger.vocabulary(valid_BN.numel(), backward=False)
        return TokenScores(nll_BN, valid_BN, flops=ledger.total)
