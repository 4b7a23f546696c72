"""What objectives share that think at a few anchors of a document: where, and how a thought is written.

`anchors` says where, `template` how a thought is written; here these meet settings. What is said there, and what it is
worth, is the objective's own: `policy` has what RLP and RPT share, `pause` says nothing.

Shapes: B rows, N text positions, M anchors of a row, K thoughts of an anchor, L tokens of a body, S all tokens of a
thought, H tokens behind an anchor, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from models.decoder import TextState
from models.logprobs import most_probable, token_logprobs, token_logprobs_where
from models.philox import Rng
from models.rollout import EAGER, Engine
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Text, Thoughts
from objectives.anchors import AnchorChoice, same_number_of_chunks
from objectives.base import (
    Counts,
    Objective,
    SettingError,
    TextPart,
    ThinkingConfig,
    TokenScores,
    Vocabulary,
    setting,
)
from objectives.counterfactuals import Bodies
from objectives.metrics import Mean
from objectives.next_token import next_token_part
from objectives.template import Template, checked_tag, encode_tag
from objectives.workload import Workload


@dataclass(frozen=True, kw_only=True)
class AnchoredConfig(ThinkingConfig):
    """Settings of objectives that think at a few anchors."""

    length: int = setting(2048, "L, sampled tokens of a thought at most", ge=1)
    open: str = setting("<think>", "opening tag, the prompt of every thought")
    close: str = setting("</think>", "ends a thought; appended to those that do not end by themselves", min_length=1)
    instruction: str = setting("", "text before the opening tag; predictions without a thought do not see it")
    anchors_per_document: int = setting(1, "anchors of a document at most", ge=1)
    min_prefix: int = setting(1, "tokens of its document before a target", ge=1)
    positions: Literal["random", "band", "entropy", "hard", "marker"] = setting(
        "random", "which positions may be anchors"
    )
    band: tuple[float, float] = setting((-6.0, -0.5), "for band: the target's no-think log-prob, in nats")
    entropy_quantile: float = setting(0.8, "for entropy: positions above this quantile of their document", ge=0, le=1)
    hard_entropy: float = setting(1.0, "for hard: least no-think entropy of the 16 likeliest tokens, in nats", ge=0)
    marker: str = setting("=", "for marker: targets follow this token")
    next_token_weight: float = setting(0.0, "of plain cross-entropy on the text, in the same update", ge=0)

    @property
    def thought_length(self) -> tuple[str, int]:
        return "length", self.length


class Anchored(Objective):
    """Base of objectives that think at a few anchors."""

    config: Any

    def __init__(self, config: AnchoredConfig, template: Template, marker_id: int | None = None):
        self.config, self.template = config, template
        self.choice = AnchorChoice(config, self.horizon, marker_id)

    @classmethod
    def build(cls, config: Any, vocabulary: Vocabulary) -> Self:
        return cls(config, Template(*tag_ids(config, vocabulary)), marker_id(config, vocabulary))

    @property
    def anchors_at_once(self) -> int | None:
        return self.config.anchors_at_once

    @property
    def thoughts_at_once(self) -> int | None:
        return self.config.thoughts_at_once

    @property
    def horizon(self) -> int:
        """True tokens that must follow an anchor."""
        return 1

    def counts(self, text: Text, batch: Any = None) -> Counts:
        """`thoughts`: those of all anchors before model-based filtering, one each; `text`: tokens to predict."""
        predicted = text.targets(1)[1].sum()
        return {"thoughts": torch.tensor(self.scored(text), device=predicted.device), "text": predicted}

    def scored(self, text: Text) -> int:
        return self.choice.count(text)

    def scoring_rule(self) -> str:
        c = self.config
        rule = [f"min_prefix {c.min_prefix}", f"positions {c.positions}"]
        rule += [f"horizon {self.horizon}"] if self.horizon > 1 else []
        rule += [f"marker {c.marker!r}"] if c.positions == "marker" else []
        return ", ".join(rule)

    def choose_anchors(
        self, model: ThinkingModel, text: Text, rng: Rng, no_think: TextState, by: ThinkingModel
    ) -> Anchors:
        """This step's anchors, by the predictions of the model `by`; as many chunks of them on every rank."""
        anchors = self.choice.choose(text, rng, no_think, by.head_weight_VW)
        return same_number_of_chunks(model, anchors, self.config.anchors_at_once)

    def text_terms(self, model: ThinkingModel, state: TextState, batch: Any) -> TextPart:
        """Plain cross-entropy, where the settings ask for a mixed update (2606.04272)."""
        part = TextPart(metrics={"documents_skipped": documents_skipped(state.text, batch.anchors)})
        if self.config.next_token_weight:
            part.terms = next_token_part(model, state, self.config.next_token_weight).terms
        return part

    def workload(self, length: int, documents: float) -> Workload:
        """One thought of `length` tokens at each anchor, which are anywhere in their document, behind its first
        `min_prefix` tokens."""
        c, t = self.config, self.template
        document = length / documents
        looks = c.positions in ("band", "entropy", "hard")
        return Workload(
            length,
            documents,
            anchors=documents * c.anchors_per_document,
            thoughts=1,
            prefix=max(1.0, (min(c.min_prefix, document) + document - self.horizon) / 2),
            prompt=len(t.open),
            sampled=c.length,
            text_predicted=length if c.next_token_weight else 0,
            looked_up=looks * length,
        )

    @torch.no_grad()
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng, engine: Engine = EAGER) -> TokenScores:
        """Scores of the targets of as many anchors as in training, from the text alone and after one thought.

        The anchors do not depend on the model, so that evaluations at different steps score the same tokens: where
        training chooses by the model's own predictions, any eligible position is scored.
        """
        state = model.read(text)
        anchors = self.choice.choose_without_model(text, rng)
        body_BLM = self.own_bodies(model, state, anchors, rng, engine)[:, 0]
        bodies = Bodies(body_BLM, anchors, anchors.index_BM >= 0)
        # Padding anchors point past the row's end and are cut off again.
        place_BM = torch.where(bodies.real_BM, anchors.index_BM, text.shape[1])

        def spread(x_BM: Tensor) -> Tensor:
            return x_BM.new_zeros(text.shape[0], text.shape[1] + 1).scatter(1, place_BM, x_BM)[:, :-1]

        def scored(hidden_BMW: Tensor) -> tuple[Tensor, Tensor]:
            correct_BM = most_probable(hidden_BMW, model.head_weight_VW) == anchors.next_BM
            return spread(-token_logprobs(hidden_BMW, model.head_weight_VW, anchors.next_BM)), spread(correct_BM)

        plain_BMW = gather_positions(state.hidden_BNW, anchors.index_BM.clamp(min=0))
        text_scores, own_scores = scored(plain_BMW), scored(self.hidden_after(model, state, bodies))
        thoughts = self.template.write(body_BLM[:, None], anchors)
        return TokenScores(*text_scores, spread(bodies.real_BM), *own_scores, thoughts, bodies)

    @torch.no_grad()
    def hidden_after(self, model: ThinkingModel, state: TextState, bodies: Bodies) -> Tensor:
        last = []
        for cut in bodies.anchors.cuts(self.anchors_at_once):
            thoughts = self.template.write(bodies.tokens_BLM[:, None, :, cut], bodies.anchors.part(cut)).trimmed()
            last.append(last_hidden(model.think(thoughts, state), thoughts)[:, 0])
        return torch.cat(last, dim=1)


def tag_ids(config: AnchoredConfig, vocabulary: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of instruction and opening tag, and of the closing tag. Raises SettingError if they cannot be encoded."""
    opening = checked_tag(vocabulary, "open", config.open)
    return (*encode_tag(vocabulary, config.instruction), *opening), checked_tag(vocabulary, "close", config.close)


def marker_id(config: AnchoredConfig, vocabulary: Vocabulary) -> int | None:
    """The id of the marker, where positions ask for it. Raises SettingError if it is not a single token."""
    return single_token(vocabulary, "marker", config.marker) if config.positions == "marker" else None


def single_token(vocabulary: Vocabulary, name: str, text: str) -> int:
    """The id of the text of setting `name`. Raises SettingError if it is not a single token."""
    ids = checked_tag(vocabulary, name, text)
    if len(ids) != 1:
        raise SettingError(f"{name} {text!r} must be one token, the tokenizer makes {len(ids)} of it")
    return ids[0]


def gather_positions(hidden_BNW: Tensor, at_BM: Tensor) -> Tensor:
    """[B, M, W], the hidden states at positions of each row."""
    return hidden_BNW.gather(1, at_BM[..., None].expand(-1, -1, hidden_BNW.shape[-1]))


def last_hidden(hidden_BKSMW: Tensor, thoughts: Thoughts) -> Tensor:
    """[B, K, M, W], the hidden state of each thought's last token."""
    last_BK1M1 = thoughts.lengths_BKM[:, :, None, :, None] - 1
    return hidden_BKSMW.gather(2, last_BK1M1.expand(-1, -1, -1, -1, hidden_BKSMW.shape[-1]))[:, :, 0]


def documents_skipped(text: Text, anchors: Anchors) -> Mean:
    """The share of documents without any anchor: too short, or nothing eligible in them."""
    places = {(row, n) for row, index in enumerate(anchors.index_BM.tolist()) for n in index}
    skipped = [all((row, n) not in places for n in range(start, end)) for row, start, end in text.spans]
    return Mean.of(skipped, text.tokens_BN.device)


@torch.no_grad()
def without_thought(model: ThinkingModel, state: TextState, anchors: Anchors, target_BHM: Tensor) -> Tensor:
    """The log-probs [B, H, M] of the true tokens behind each anchor, by a model that has read the text and thought
    nothing; 0 where there is no anchor."""
    at_BM, real_BHM = anchors.index_BM.clamp(min=0), (anchors.index_BM >= 0)[:, None].expand_as(target_BHM)
    hidden = [gather_positions(state.hidden_BNW.roll(-h, 1), at_BM) for h in range(target_BHM.shape[1])]
    return token_logprobs_where(real_BHM, torch.stack(hidden, dim=1), model.head_weight_VW, target_BHM)
