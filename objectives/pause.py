"""Pause tokens (Goyal et al., arXiv 2310.02226) where others think: as many tokens to compute on, and nothing in them.

For a batch of documents:

    pick a position t of each document, as RLP does; the anchor is t − 1
    read x_<t <think> f f … f </think>, L times the same filler f
    loss = −log p(x_t | x_<t, pause) + the text's own cross-entropy; none of the pause's tokens

In the paper pauses stand in the text itself, at random positions, and what follows them sees them; here they are
branches, like thoughts. The paper's pause is a token of its own; here it is one of the vocabulary, so that the model
stays a plain language model, and what it makes of the filler is the condition `filler` of the counterfactual test.

Shapes: B rows, M anchors of a row, L tokens of a pause, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from models.decoder import TextState
from models.logprobs import token_logprobs_where
from models.philox import Rng
from models.rollout import Engine
from models.thinking import ThinkingModel
from models.thoughts import Anchors
from objectives.anchored import (
    Anchored,
    AnchoredConfig,
    last_hidden,
    marker_id,
    single_token,
    tag_ids,
    without_thought,
)
from objectives.base import Batch, Term, ThoughtPart, ThoughtRecord, ThoughtState, Vocabulary, setting
from objectives.metrics import Mean
from objectives.template import Template
from objectives.workload import Workload


@dataclass(frozen=True, kw_only=True)
class PauseConfig(AnchoredConfig):
    """Settings of pauses. The paper pretrains with 10% of a sequence's tokens as pauses, and infers with 10 or 50."""

    name: str = "pause"
    length: int = setting(10, "L, filler tokens of a pause", ge=1)
    filler: str = setting(".", "the token that a pause consists of", min_length=1)
    next_token_weight: float = setting(1.0, "of plain cross-entropy on the text, in the same update", ge=0)


class Pause(Anchored):
    Config = PauseConfig
    config: PauseConfig
    sentence: ClassVar[str] = "At some tokens the model reads filler before it predicts the next one."

    def __init__(self, config: PauseConfig, template: Template, filler_id: int, marker_id: int | None = None):
        super().__init__(config, template, marker_id)
        self.filler_id = filler_id

    @classmethod
    def build(cls, config: PauseConfig, vocabulary: Vocabulary) -> Self:
        filler_id = single_token(vocabulary, "filler", config.filler)
        return cls(config, Template(*tag_ids(config, vocabulary)), filler_id, marker_id(config, vocabulary))

    @property
    def longest_thought(self) -> int:
        return len(self.template.open) + self.config.length + len(self.template.close)

    def workload(self, length: int, documents: float) -> Workload:
        w = super().workload(length, documents)
        looked_up = w.looked_up + w.anchors
        return replace(w, prompt=0, sampled=0, appended=self.longest_thought, predicted=1, looked_up=looked_up)

    def own_bodies(
        self, model: ThinkingModel, state: TextState, anchors: Anchors, rng: Rng, engine: Engine, thoughts: int = 1
    ) -> Tensor:
        filler_BM = torch.full_like(anchors.index_BM, self.filler_id)
        return filler_BM[:, None, None].expand(-1, thoughts, self.config.length, -1)

    def sample(self, model: ThinkingModel, state: TextState, rng: Rng, engine: Engine) -> Batch:
        """The pauses, of which nothing is sampled."""
        anchors = self.choose_anchors(model, state.text, rng, state, by=model)
        return Batch(self.template.write(self.own_bodies(model, state, anchors, rng, engine), anchors))

    def thought_terms(
        self, model: ThinkingModel, state: TextState, batch: Batch, thought: ThoughtState, text: Any
    ) -> ThoughtPart:
        """Cross-entropy of the true token behind each pause."""
        anchors = batch.anchors
        real_BM, target_B1M = anchors.index_BM >= 0, anchors.next_BM[:, None]
        hidden_B1MW = last_hidden(thought.hidden_BKSMW, thought.thoughts)
        logprob_B1M = token_logprobs_where(real_BM[:, None], hidden_B1MW, model.head_weight_VW, target_B1M)
        plain_B1M = without_thought(model, state, anchors, target_B1M)
        gain_B1M = logprob_B1M.detach() - plain_B1M
        metrics = {
            "nll_text": Mean.over(-plain_B1M[:, 0], real_BM),
            "nll_thought": Mean.over(-logprob_B1M[:, 0], real_BM),
            "gain_live": Mean.over(gain_B1M[:, 0], real_BM),
        }
        record = ThoughtRecord(batch.thoughts, gain_B1M, torch.zeros_like(gain_B1M))
        return ThoughtPart([Term(-logprob_B1M.sum(), "thoughts")], metrics, record)
