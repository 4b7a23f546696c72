"""Next-token prediction: the baseline of every table.

Shapes: B rows, N text positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.flops import Ledger
from models.logprobs import most_probable, token_logprobs
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives.base import (
    Denominators,
    Mean,
    Objective,
    ObjectiveConfig,
    ObjectiveOutput,
    Prepared,
    TokenScores,
    divide,
)
from objectives.causal import CausalTest


@dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy has no settings."""


class NextToken(Objective):
    """Mean cross-entropy of every token that has a predecessor in its own document."""

    def __init__(self, config: NextTokenConfig | None = None):
        self.config = config or NextTokenConfig()

    def denominators(self, text: Text, prepared: Prepared | None = None) -> Denominators:
        return {"text": text.targets(1)[1].sum()}

    def __call__(
        self,
        model: ThinkingModel,
        text: Text,
        rng: Rng,
        denominators: Denominators | None = None,
        prepared: Prepared | None = None,
    ) -> ObjectiveOutput:
        nll_BN, valid_BN, _ = self._nll(model, text)
        loss = divide(nll_BN.sum(), (denominators or self.denominators(text))["text"])
        metrics = {"nll_text": Mean.over(nll_BN, valid_BN)}
        return ObjectiveOutput(loss, metrics, self._flops(model, text, backward=True))

    @torch.no_grad()
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng, test: CausalTest | None = None) -> TokenScores:
        nll_BN, valid_BN, hidden_BNW = self._nll(model, text)
        correct_BN = most_probable(hidden_BNW, model.head_weight_VW) == text.targets(1)[0]
        flops = self._flops(model, text, backward=False)
        return TokenScores(nll_BN, correct_BN & valid_BN, valid_BN, flops=flops)

    @staticmethod
    def _nll(model: ThinkingModel, text: Text) -> tuple[Tensor, Tensor, Tensor]:
        target_BN, valid_BN = text.targets(1)
        hidden_BNW = model.read(text).hidden_BNW
        return -token_logprobs(hidden_BNW, model.head_weight_VW, target_BN) * valid_BN, valid_BN, hidden_BNW

    @staticmethod
    def _flops(model: ThinkingModel, text: Text, backward: bool) -> int:
        ledger = Ledger(model.decoder)
        ledger.read(text, backward)
        ledger.vocabulary(text.tokens_BN.numel(), backward)
        return ledger.total
