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
filtered or logged.

Shapes: B rows, N text positions, M anchors of a row, K = G thoughts of an anchor, P tokens given to a thought,
S tokens of a thought, H tokens predicted after it, W width, J sampled tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoder import TextState
from models.flops import Ledger
from models.logprobs import token_logprobs
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import PAD, Anchors, Text, Thoughts
from objectives.anchored import Anchored, AnchoredConfig, ThoughtBatch, gather_positions
from objectives.base import Denominators, Mean, ObjectiveOutput, TextScore, ThoughtRecord, at_least, divide
from objectives.credit import discounted, has_spread, information_gain, kl_to_reference, positive_part
from objectives.teacher import EmaTeacher


@dataclass(frozen=True)
class RlpConfig(AnchoredConfig):
    """Settings of RLP; defaults are the paper's, with its ε (not given there) as PPO's."""

    horizon: int = 1  # H, true tokens predicted after a thought
    discount: float = 1.0  # of their gains
    reward_clip: float | None = None  # rewards are cut to ± this many nats
    reward_positive: bool = False  # rewards below 0 count as 0
    ema_decay: float = 0.999  # τ
    kl_weight: float = 0.0  # of KL(π ‖ teacher's π)
    next_token_weight: float = 0.0  # of plain cross-entropy on the text
    train_predictor: float = 0.0  # of −S_pred with gradient, the term that the published gradient drops

    def problems(self) -> list[str]:
        found = super().problems() + at_least(1, horizon=self.horizon)
        found += at_least(
            0,
            kl_weight=self.kl_weight,
            next_token_weight=self.next_token_weight,
            train_predictor=self.train_predictor,
            reward_clip=self.reward_clip,
        )
        for name in ("discount", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        return found


@dataclass(kw_only=True)
class ReferenceScore(TextScore):
    """reference: the text as the teacher reads it."""

    reference: TextState


class Rlp(Anchored):
    config: RlpConfig

    def __init__(
        self, config: RlpConfig, open_ids: tuple[int, ...], close_ids: tuple[int, ...], marker_id: int | None = None
    ):
        super().__init__(config, open_ids, close_ids, marker_id)
        self.teacher = EmaTeacher(config.ema_decay)

    @property
    def horizon(self) -> int:
        return self.config.horizon

    @property
    def longest_thought(self) -> int:
        return len(self.open_ids) + self.config.length + len(self.close_ids) + self.config.horizon - 1

    def after_step(self, model: ThinkingModel) -> None:
        self.teacher.update(model)

    def other_models(self, model: ThinkingModel) -> list[ThinkingModel]:
        return [self.teacher.model(model)]

    def state(self) -> dict[str, Tensor]:
        return self.teacher.state()

    def load_state(self, model: ThinkingModel, state: dict[str, Tensor]) -> None:
        self.teacher.load(model, state)

    @torch.no_grad()
    def prepare(self, model: ThinkingModel, text: Text, rng: Rng) -> ThoughtBatch | None:
        """With a single update, sampling shares the update's reading of the text, and nothing is prepared."""
        if self.config.updates == 1:
            return None
        batch = self.think(model, text, model.read(text), rng)
        ledger = Ledger(model.decoder)
        ledger.read(text, backward=False)
        batch.flops += ledger.total
        return batch

    @torch.no_grad()
    def think(self, model: ThinkingModel, text: Text, state: TextState, rng: Rng) -> ThoughtBatch:
        """The rollout phase: anchors, thoughts, targets, and the teacher's no-think log-probs of these."""
        c = self.config
        teacher = self.teacher.model(model)
        no_think = teacher.read(text)
        anchors = self.agreed(model, self.choose_anchors(text, rng, no_think, teacher.head_weight_VW))
        drawn = self.roll_out(model, state.detached(), anchors, c.thoughts, rng)
        at_BM = anchors.index_BM.clamp(min=0)
        target_BHM = torch.stack([text.targets(h + 1)[0].gather(1, at_BM) for h in range(c.horizon)], dim=1)
        hidden = [gather_positions(no_think.hidden_BNW.roll(-h, 1), at_BM) for h in range(c.horizon)]
        base_BHM = token_logprobs(torch.stack(hidden, dim=1), teacher.head_weight_VW, target_BHM)
        ledger = Ledger(model.decoder)
        ledger.read(text, backward=False)
        ledger.vocabulary(self.looked_at(text) + base_BHM.numel(), backward=False)
        ledger.think(anchors, c.thoughts, drawn.thoughts.tokens_BKSM.shape[2] - 1, backward=False, stage="rollout")
        ledger.vocabulary(self.drawn_rows(drawn), backward=False, stage="rollout")
        return ThoughtBatch(ledger.total, drawn, target_BHM, base_BHM, anchors.index_BM >= 0)

    def closed_and_continued(self, batch: ThoughtBatch) -> tuple[Thoughts, Tensor]:
        """The thoughts with the close given to those that lack it, then the true tokens read while predicting the next.

        Also the slot whose hidden state predicts the first target [B, K, M].
        """
        drawn = batch.rollout
        B, K, _, M = drawn.thoughts.tokens_BKSM.shape
        close_T1 = torch.tensor(self.close_ids, device=batch.real_BM.device)[:, None]
        closing_BKTM = torch.where(drawn.closed_BKM[:, :, None], PAD, close_T1)
        closed = drawn.thoughts.followed_by(closing_BKTM)
        read_BKTM = batch.target_BHM[:, None, :-1].expand(B, K, -1, M)
        return closed.followed_by(read_BKTM), closed.lengths_BKM - 1

    def score(
        self,
        model: ThinkingModel,
        state: TextState,
        batch: ThoughtBatch,
        denominators: Denominators,
        rng: Rng,
        text_score: TextScore | None = None,
    ) -> ObjectiveOutput:
        """One update: S_pred and the policy's log-probs from a single pass, rewards, advantages, loss."""
        c, anchors = self.config, batch.rollout.thoughts.anchors
        thoughts, last_BKM = self.closed_and_continued(batch)
        hidden_BKSMW = model.think(thoughts, state)

        # S_pred(c): the hidden states behind the close and behind each true token but the last.
        slots_BKHM = last_BKM[:, :, None] + torch.arange(c.horizon, device=last_BKM.device)[:, None]
        index = slots_BKHM[..., None].expand(*slots_BKHM.shape, hidden_BKSMW.shape[-1])
        target_BKHM = batch.target_BHM[:, None].expand_as(slots_BKHM)
        predicted_BKHM = token_logprobs(hidden_BKSMW.gather(2, index), model.head_weight_VW, target_BKHM)
        gain_BKM = discounted(information_gain(predicted_BKHM, batch.base_BHM[:, None]), c.discount)

        weight_BKM = self.counting(batch)
        if batch.reward_BKM is None or batch.advantage_BKM is None:
            batch.reward_BKM = self._reward(gain_BKM)
            batch.advantage_BKM = self.advantages(batch.reward_BKM, weight_BKM, anchors, rng)
        policy = self.policy(model, hidden_BKSMW, batch.rollout, batch.advantage_BKM, weight_BKM)
        count = denominators["anchors"] * c.thoughts
        loss = divide(policy.loss, count)

        ledger = Ledger(model.decoder)
        scored = predicted_BKHM.numel() + policy.logprob_J.numel()
        if c.train_predictor:
            loss = loss - c.train_predictor * divide((predicted_BKHM.sum(dim=2) * weight_BKM).sum(), count)
        text_score = text_score or self.score_text(model, state, anchors, denominators)
        loss = loss + text_score.loss
        if c.kl_weight:
            assert isinstance(text_score, ReferenceScore)
            teacher = self.teacher.model(model)
            with torch.no_grad():
                reference_JW = self._predicting(teacher.think(thoughts, text_score.reference), policy.where_BKSM)
                reference_J = token_logprobs(
                    reference_JW, teacher.head_weight_VW, policy.tokens_J, c.temperature, self._banned(model)
                )
            kl_J = kl_to_reference(policy.logprob_J, reference_J)
            loss = loss + c.kl_weight * divide((kl_J * policy.weight_J).sum(), count)
            ledger.think(anchors, c.thoughts, hidden_BKSMW.shape[2], backward=False)
            ledger.vocabulary(len(reference_J), backward=False)
        ledger.think(anchors, c.thoughts, hidden_BKSMW.shape[2], backward=True)
        ledger.vocabulary(scored, backward=True)

        real_BKM = batch.real_BM[:, None].expand_as(gain_BKM)
        metrics = text_score.metrics | self.thought_metrics(batch, policy, gain_BKM)
        metrics |= {
            "flat_groups": Mean.over((~has_spread(batch.reward_BKM)[:, 0]).double(), batch.real_BM),
            "nll_thought": Mean.over(-predicted_BKHM[:, :, 0], real_BKM),
        }
        record = ThoughtRecord(batch.rollout.thoughts, gain_BKM, batch.advantage_BKM)
        return ObjectiveOutput(loss, metrics, text_score.flops + ledger.total, record)

    def score_text(
        self, model: ThinkingModel, state: TextState, anchors: Anchors, denominators: Denominators
    ) -> TextScore:
        """Plain cross-entropy and the teacher's reading, where the settings ask for them."""
        c, text, score = self.config, state.text, super().score_text(model, state, anchors, denominators)
        ledger = Ledger(model.decoder)
        if c.next_token_weight:
            target_BN, valid_BN = text.targets(1)
            nll_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
            score.loss = c.next_token_weight * divide(nll_BN.sum(), denominators["text"])
            ledger.vocabulary(nll_BN.numel(), backward=True)
        if c.kl_weight:
            with torch.no_grad():
                reference = self.teacher.model(model).read(text)
            score = ReferenceScore(score.loss, score.metrics, score.flops, reference=reference)
            ledger.read(text, backward=False)
        score.flops += ledger.total
        return score

    def _reward(self, gain_BKM: Tensor) -> Tensor:
        c, reward_BKM = self.config, gain_BKM
        if c.reward_clip is not None:
            reward_BKM = reward_BKM.clamp(-c.reward_clip, c.reward_clip)
        return positive_part(reward_BKM) if c.reward_positive else reward_BKM
