"""RLP, reinforcement as a pretraining objective (Hatamizadeh et al., arXiv 2510.01265): thoughts earn information.

Algorithm 1, for a batch of documents:

    pick a position t of each document; the anchor is t − 1
    sample G thoughts c_1 … c_G ~ π_θ(· | x_<t)
    S_pred(c) = log p_θ(x_t | x_<t, c)          policy and predictor share θ
    S_base    = log p̄_φ(x_t | x_<t)             no thought; φ is an exponential moving average of θ
    r(c)      = S_pred(c) − S_base               information gain, no gradient
    A_i       = G/(G−1) · (r_i − r̄)
    loss      = 1/(BG) Σ_i −1/|c_i| Σ_u min(ρ_u A_i, clip(ρ_u, 1−ε_l, 1+ε_h) A_i)
    after the optimizer step: φ ← τφ + (1−τ)θ

S_base is the same for a whole group, so as published it cancels in A: it matters only where raw rewards are clipped,
filtered or logged. objectives/naive/rlp.py is the same as a plain loop.

Shapes: B rows, M anchors of a row, K = G thoughts of an anchor, S tokens of a thought, H tokens predicted after it, W
width, J sampled tokens of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from models.decoder import TextState
from models.logprobs import token_logprobs, token_logprobs_where
from models.philox import Rng
from models.rollout import Engine
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Thoughts
from objectives.anchored import without_thought
from objectives.base import Term, TextPart, ThoughtPart, ThoughtRecord, ThoughtState, setting
from objectives.counterfactuals import elsewhere
from objectives.credit import (
    discounted,
    has_variance,
    information_gain,
    kl_to_reference,
    positive_part,
    probability_gain,
)
from objectives.metrics import Mean, policy_metrics, thought_metrics
from objectives.policy import AnchoredBatch, PolicyConfig, RewardedThoughts, predicting
from objectives.teacher import EmaTeacher
from objectives.template import Template
from objectives.workload import Workload


@dataclass(frozen=True, kw_only=True)
class RlpConfig(PolicyConfig):
    """Settings of RLP; defaults are the paper's, with its ε (not given there) as PPO's."""

    name: str = "rlp"
    horizon: int = setting(1, "H, true tokens predicted after a thought", ge=1)
    discount: float = setting(1.0, "of their gains", ge=0, le=1)
    scored: Literal["own", "other"] = setting(
        "own",
        "where a thought's gain is measured; other, a control: in another document of its row, 0 if there is none",
    )
    gain: Literal["log_probability", "probability"] = setting(
        "log_probability", "what rewards are the gain in; probability is an ablation"
    )
    reward_clip: float | None = setting(None, "rewards are clipped to ± this much", ge=0)
    reward_positive: bool = setting(False, "rewards below 0 count as 0")
    ema_decay: float = setting(0.999, "τ, of the teacher; 1: stays as it began; 0: the model as it is", ge=0, le=1)
    kl_weight: float = setting(0.0, "of KL(π ‖ teacher's π)", ge=0)
    train_predictor: float = setting(0.0, "of −S_pred with gradient, the term that the published gradient drops", ge=0)

    @property
    def shortest_row(self) -> int:
        return self.horizon + 1

    def cautions(self) -> dict[str, str]:
        if self.length >= 1024:
            return {}
        return {
            "short_thoughts": f"thoughts of at most {self.length} tokens: in the RLP paper (2510.01265 v2) "
            "training with short ones ruins a model: its average score, 34.0 before, is 11.5 / 10.0 / 14.1 / 24.7 / "
            "38.9 / 42.2 after thoughts of 64 / 128 / 256 / 512 / 1024 / 2048 tokens; try objective.length 1024 or more"
        }


@dataclass
class RlpTextPart(TextPart):
    """reference: the text as the teacher reads it, where the KL term asks for it."""

    reference: TextState | None = field(default=None)


class Rlp(RewardedThoughts):
    Config = RlpConfig
    config: RlpConfig
    sentence: ClassVar[str] = (
        "At some tokens the model thinks before the next one. A thought is rewarded by how much likelier it makes the "
        "true next token, and better rewarded thoughts become likelier."
    )

    def __init__(self, config: RlpConfig, template: Template, marker_id: int | None = None):
        super().__init__(config, template, marker_id)
        self.teacher = EmaTeacher(config.ema_decay)

    @property
    def horizon(self) -> int:
        return self.config.horizon

    @property
    def longest_thought(self) -> int:
        return len(self.template.open) + self.config.length + len(self.template.close) + self.config.horizon - 1

    def workload(self, length: int, documents: float) -> Workload:
        """With the closing tag appended to every thought."""
        c, w = self.config, super().workload(length, documents)
        compared, moved = c.updates * bool(c.kl_weight), int(c.scored == "other")
        return replace(
            w,
            other_readings=1 + compared,
            appended=len(self.template.close) + c.horizon - 1,
            other_thinkings=compared,
            moved=moved,
            predicted=c.horizon,
            looked_up=w.looked_up + w.anchors * c.horizon * (1 + c.updates + moved * c.thoughts),
            teacher=True,
        )

    def after_step(self, model: ThinkingModel) -> None:
        self.teacher.update(model)

    def begin(self, model: ThinkingModel) -> None:
        self.teacher.load(model, model.state_dict())

    def other_models(self, model: ThinkingModel) -> list[ThinkingModel]:
        return [self.teacher.model(model)]

    def state(self) -> dict[str, Tensor]:
        return self.teacher.state()

    def load_state(self, model: ThinkingModel, state: Mapping[str, Tensor]) -> None:
        self.teacher.load(model, state)

    def sample(self, model: ThinkingModel, state: TextState, rng: Rng, engine: Engine) -> AnchoredBatch:
        """Anchors, thoughts, targets, and S_base: the teacher's log-probs of the targets without a thought."""
        c, text, teacher = self.config, state.text, self.teacher.model(model)
        no_think = teacher.read(text)
        anchors = self.choose_anchors(model, text, rng, no_think, by=teacher)
        rollout = engine.sample(self.request(model, state, anchors, c.thoughts, rng))
        at_BM = anchors.index_BM.clamp(min=0)
        target_BHM = torch.stack([text.targets(h + 1)[0].gather(1, at_BM) for h in range(c.horizon)], dim=1)
        base_BHM = without_thought(teacher, no_think, anchors, target_BHM)
        batch = AnchoredBatch(rollout.thoughts, rollout, target_BHM, base_BHM, anchors.index_BM >= 0, rng)
        if c.scored == "own":
            return batch
        moved, there = _moved(batch), []
        for cut in anchors.cuts(self.anchors_at_once):
            thoughts = self.thoughts_to_score(moved.part(cut)).trimmed()
            hidden_BKSMW = model.think(thoughts, state, self.thoughts_at_once)
            there.append(self._gain(model, moved.part(cut), thoughts, hidden_BKSMW)[1])
        return replace(batch, gain_BKM=torch.cat(there, dim=-1) * moved.real_BM[:, None])

    def text_terms(self, model: ThinkingModel, state: TextState, batch: Any) -> RlpTextPart:
        """Besides, the teacher's reading, where the settings ask for it."""
        c, text = self.config, super().text_terms(model, state, batch)
        part = RlpTextPart(text.terms, text.metrics)
        if c.kl_weight:
            with torch.no_grad():
                part.reference = self.teacher.model(model).read(state.text)
        return part

    def thoughts_to_score(self, batch: AnchoredBatch) -> Thoughts:
        """The thoughts, all closed, and the true tokens that are read while the next ones are predicted."""
        K = batch.rollout.thoughts.tokens_BKSM.shape[1]
        read_BKTM = batch.target_BHM[:, None, :-1].expand(-1, K, -1, -1)
        return self.template.close_all(batch.rollout).followed_by(read_BKTM)

    def thought_terms(
        self, model: ThinkingModel, state: TextState, batch: AnchoredBatch, thought: ThoughtState, text: Any
    ) -> ThoughtPart:
        """S_pred and the policy's log-probs from a single pass, rewards, advantages, loss."""
        c, thoughts, hidden_BKSMW = self.config, thought.thoughts, thought.hidden_BKSMW
        predicted_BKHM, gain_BKM = self._gain(model, batch, thoughts, hidden_BKSMW)
        if batch.gain_BKM is not None:
            gain_BKM = batch.gain_BKM

        counts_BKM = self.rewardable(batch)
        if batch.reward_BKM is None or batch.advantage_BKM is None:
            batch.reward_BKM = self.reward(gain_BKM)
            batch.advantage_BKM = self.advantages(batch.reward_BKM, counts_BKM, batch)
        policy = self.policy(model, hidden_BKSMW, batch, batch.advantage_BKM, counts_BKM)
        terms = [Term(policy.surrogate, "thoughts")]
        if c.train_predictor:
            terms.append(Term(-(predicted_BKHM.sum(dim=2) * counts_BKM).sum(), "thoughts", c.train_predictor))
        if c.kl_weight:
            teacher, banned_V = self.teacher.model(model), self.template.banned(model.banned_V)
            with torch.no_grad():
                hidden_BKSMW = teacher.think(thoughts, text.reference, c.thoughts_at_once)
                reference_JW = predicting(hidden_BKSMW, policy.where_BKSM)
                reference_J = token_logprobs(
                    reference_JW, teacher.head_weight_VW, policy.tokens_J, c.temperature, banned_V
                )
            kl_J = kl_to_reference(policy.logprob_J, reference_J)
            terms.append(Term((kl_J * policy.weight_J).sum(), "thoughts", c.kl_weight))

        b, live_BHM = batch, without_thought(model, state, batch.anchors, batch.target_BHM)
        gain_live_BKM = discounted(information_gain(predicted_BKHM, live_BHM[:, None]), c.discount)
        metrics = thought_metrics(b.rollout, self.bodies(b.rollout), b.target_BHM, b.base_BHM, b.real_BM, gain_BKM)
        metrics |= policy_metrics(policy.logprob_J, policy.old_J, policy.sampler_J, c.eps_low, c.eps_high)
        metrics |= {
            "zero_variance_groups": Mean.over((~has_variance(batch.reward_BKM)[:, 0]).double(), b.real_BM),
            "nll_thought": Mean.over(-predicted_BKHM[:, :, 0], b.real_BM[:, None].expand_as(gain_BKM)),
            "gain_live": Mean.over(gain_live_BKM, b.real_BM[:, None]),
        }
        return ThoughtPart(terms, metrics, ThoughtRecord(b.rollout.thoughts, gain_BKM, batch.advantage_BKM))

    def _gain(
        self, model: ThinkingModel, batch: AnchoredBatch, thoughts: Thoughts, hidden_BKSMW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """S_pred(c) of each true token [B, K, H, M], with gradient, and the gain over S_base [B, K, M]."""
        c = self.config
        # The hidden states behind the close and behind each true token but the last.
        first_BKM = thoughts.lengths_BKM - c.horizon
        slots_BKHM = first_BKM[:, :, None] + torch.arange(c.horizon, device=first_BKM.device)[:, None]
        index = slots_BKHM[..., None].expand(*slots_BKHM.shape, hidden_BKSMW.shape[-1])
        target_BKHM = batch.target_BHM[:, None].expand_as(slots_BKHM)
        real_BKHM = batch.real_BM[:, None, None].expand_as(slots_BKHM)
        predicted_BKHM = token_logprobs_where(
            real_BKHM, hidden_BKSMW.gather(2, index), model.head_weight_VW, target_BKHM
        )
        gain = probability_gain if c.gain == "probability" else information_gain
        return predicted_BKHM, discounted(gain(predicted_BKHM, batch.base_BHM[:, None]), c.discount)

    def reward(self, gain_BKM: Tensor) -> Tensor:
        """r, clipped where the settings say so."""
        c, reward_BKM = self.config, gain_BKM
        if c.reward_clip is not None:
            reward_BKM = reward_BKM.clamp(-c.reward_clip, c.reward_clip)
        return positive_part(reward_BKM) if c.reward_positive else reward_BKM


def _moved(batch: AnchoredBatch) -> AnchoredBatch:
    """The same thoughts, each put at another anchor of its row, in another document; none where there is none."""
    anchors, rollout = batch.anchors, batch.rollout
    at_BM = anchors.index_BM.clamp(min=0)
    rows = zip(batch.real_BM.tolist(), anchors.text.document_BN.gather(1, at_BM).tolist(), strict=True)
    place_BM = torch.tensor([_places(real, document) for real, document in rows], device=at_BM.device)
    from_BM, real_BM = place_BM.clamp(min=0), place_BM >= 0
    there = Anchors(anchors.text, anchors.index_BM.gather(1, from_BM).masked_fill(~real_BM, -1))
    thoughts = replace(rollout.thoughts, anchors=there)
    target_BHM, base_BHM = (
        x_BHM.gather(2, from_BM[:, None].expand_as(x_BHM)) for x_BHM in (batch.target_BHM, batch.base_BHM)
    )
    rollout = replace(rollout, thoughts=thoughts)
    return replace(batch, thoughts=thoughts, rollout=rollout, target_BHM=target_BHM, base_BHM=base_BHM, real_BM=real_BM)


def _places(real: list[bool], document: list[int]) -> list[int]:
    """For each anchor of a row the number of another one, in another document; -1 if there is none."""
    slots = [m for m, there in enumerate(real) if there]
    others = elsewhere([document[m] for m in slots])
    place = dict(zip(slots, (slots[i] for i in others), strict=True)) if others is not None else {}
    return [place.get(m, -1) for m in range(len(real))]
