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
L tokens sampled at most, S tokens of a thought, H tokens predicted after it, W width, J sampled tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.decoder import TextState
from models.flops import Ledger
from models.logprobs import token_entropies, token_logprobs
from models.philox import Rng
from models.rollout import Rollout, rollout
from models.thinking import ThinkingModel
from models.thoughts import PAD, Anchors, Text, Thoughts
from objectives.base import (
    Denominators,
    Mean,
    Objective,
    ObjectiveConfig,
    ObjectiveOutput,
    ThoughtRecord,
    TokenScores,
    at_least,
    divide,
)
from objectives.credit import (
    clipped_surrogate,
    discounted,
    group_mean_advantage,
    has_spread,
    information_gain,
    kl_to_reference,
    leave_one_out_advantage,
    positive_part,
    standardised_advantage,
)
from objectives.teacher import EmaTeacher

ADVANTAGES = {
    "leave_one_out": leave_one_out_advantage,
    "mean": group_mean_advantage,
    "standardised": standardised_advantage,
}
# Draws of positions are keyed apart from draws of tokens by a thought index that no thought has.
POSITION_DRAW = 2**31


@dataclass(frozen=True)
class RlpConfig(ObjectiveConfig):
    """Settings of RLP; defaults are the paper's, with its ε (not given there) as PPO's."""

    length: int = 2048  # L, sampled tokens of a thought at most
    thoughts: int = 16  # G, thoughts of an anchor
    temperature: float = 0.7  # of sampling, and of the policy's log-probs
    open: str = "<think>"  # given to every thought
    close: str = "</think>"  # ends a thought; given to those that do not end by themselves
    instruction: str = ""  # text put before `open`; the baseline does not see it
    anchors_per_document: int = 1
    min_prefix: int = 1  # tokens of its document before a target
    positions: Literal["random", "band", "entropy", "marker"] = "random"
    band: tuple[float, float] = (-6.0, -0.5)  # for `band`: the target's no-think log-prob, in nats
    entropy_quantile: float = 0.8  # for `entropy`: positions of a document above it in no-think entropy
    marker: str = "="  # for `marker`: targets follow this token
    horizon: int = 1  # H, true tokens predicted after a thought
    discount: float = 1.0  # of their gains
    advantage: Literal["leave_one_out", "mean", "standardised"] = "leave_one_out"
    reward_clip: float | None = None  # rewards are cut to ± this many nats
    reward_positive: bool = False  # rewards below 0 count as 0
    unclosed: Literal["score", "drop"] = "score"  # thoughts that do not end: paid by the same rule, or not at all
    eps_low: float = 0.2
    eps_high: float = 0.2
    ema_decay: float = 0.999  # τ
    kl_weight: float = 0.0  # of KL(π ‖ teacher's π)
    next_token_weight: float = 0.0  # of plain cross-entropy on the text
    train_predictor: float = 0.0  # of −S_pred with gradient, the term that the published gradient drops
    shuffle_rewards: bool = False  # a control: rewards are dealt out at random within their group

    def problems(self) -> list[str]:
        found = at_least(1, length=self.length, min_prefix=self.min_prefix, horizon=self.horizon)
        found += at_least(1, anchors_per_document=self.anchors_per_document)
        if self.thoughts < 2:
            found.append(f"thoughts must be at least 2 to be compared with each other, got {self.thoughts}")
        found += at_least(
            0,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
            kl_weight=self.kl_weight,
            next_token_weight=self.next_token_weight,
            train_predictor=self.train_predictor,
            reward_clip=self.reward_clip,
        )
        for name in ("discount", "ema_decay", "entropy_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            found.append("temperature must be above 0")
        if not self.close:
            found.append("close is empty; name the text that ends a thought")
        return found


@dataclass(frozen=True, eq=False)
class ThoughtBatch:
    """What one rollout phase leaves behind for the updates that use it.

    rollout: the thoughts as sampled. target_BHM: int64, the H true tokens behind each anchor. base_BHM: their no-think
    log-probs under the teacher, S_base. real_BM: bool, whether there is an anchor at all.
    """

    rollout: Rollout
    target_BHM: Tensor
    base_BHM: Tensor
    real_BM: Tensor


class Rlp(Objective):
    """RLP on a model whose tags are the token ids `open_ids` and `close_ids`; `marker_id` is for positions=marker."""

    def __init__(
        self, config: RlpConfig, open_ids: tuple[int, ...], close_ids: tuple[int, ...], marker_id: int | None = None
    ):
        self.config = config
        self.open_ids, self.close_ids, self.marker_id = open_ids, close_ids, marker_id
        self.teacher = EmaTeacher(config.ema_decay)

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

    # Where to think

    def eligible(self, text: Text) -> Tensor:
        """bool [B, N]: positions that can be anchors, with a long enough prefix and the whole horizon behind them."""
        long_enough_BN = text.position_BN + 1 >= self.config.min_prefix
        eligible_BN = long_enough_BN & text.targets(self.config.horizon)[1]
        if self.config.positions == "marker":
            eligible_BN = eligible_BN & (text.tokens_BN == self.marker_id)
        return eligible_BN

    def denominators(self, text: Text) -> Denominators:
        """`anchors`: those the documents have room for, whether or not a filter by the model then leaves some out;
        `text`: tokens to predict."""
        eligible = self.eligible(text)
        wanted = sum(
            min(self.config.anchors_per_document, int(eligible[row, start:end].sum())) for row, start, end in text.spans
        )
        return {"anchors": torch.tensor(wanted, device=eligible.device), "text": text.targets(1)[1].sum()}

    def choose_anchors(self, text: Text, rng: Rng, no_think: TextState, head_weight_VW: Tensor) -> Anchors:
        """Anchors [B, M], up to `anchors_per_document` of each document in the order of a draw of their own; −1 pads.

        A document without an eligible position has none.
        """
        c = self.config
        eligible_BN = self.eligible(text)
        if c.positions == "band":
            logprob_BN = token_logprobs(no_think.hidden_BNW, head_weight_VW, text.targets(1)[0])
            eligible_BN = eligible_BN & (logprob_BN >= c.band[0]) & (logprob_BN <= c.band[1])
        if c.positions == "entropy":
            entropy_BN = token_entropies(no_think.hidden_BNW, head_weight_VW)
            for row, start, end in text.spans:
                here = eligible_BN[row, start:end]
                if here.any():
                    threshold = entropy_BN[row, start:end][here].quantile(c.entropy_quantile)
                    eligible_BN[row, start:end] = here & (entropy_BN[row, start:end] >= threshold)
        return self._draw_anchors(eligible_BN, text, rng)

    def _draw_anchors(self, eligible_BN: Tensor, text: Text, rng: Rng) -> Anchors:
        device = text.tokens_BN.device
        place_BN = torch.arange(text.shape[1], device=device).expand(text.shape)
        draw_BN = rng.uniform(text.sample_id_B[:, None], place_BN, torch.tensor(POSITION_DRAW, device=device), 0)
        draw_BN = draw_BN.masked_fill(~eligible_BN, 2.0)
        chosen: list[list[int]] = [[] for _ in range(text.shape[0])]
        for row, start, end in text.spans:
            count = min(self.config.anchors_per_document, int(eligible_BN[row, start:end].sum()))
            chosen[row] += sorted((draw_BN[row, start:end].argsort()[:count] + start).tolist())
        M = max(1, *map(len, chosen))
        return Anchors(text, torch.tensor([row + [-1] * (M - len(row)) for row in chosen], device=device))

    # How much, and what is rewarded

    @torch.no_grad()
    def think(self, model: ThinkingModel, text: Text, state: TextState, rng: Rng) -> ThoughtBatch:
        """The rollout phase: anchors, thoughts, targets, and the teacher's no-think log-probs of these."""
        c = self.config
        teacher = self.teacher.model(model)
        no_think = teacher.read(text)
        anchors = self.choose_anchors(text, rng, no_think, teacher.head_weight_VW)
        thoughts = rollout(
            model, state.detached(), anchors, c.thoughts, c.length, rng, c.temperature, self.open_ids, self.close_ids
        )
        at_BM = anchors.index_BM.clamp(min=0)
        target_BHM = torch.stack([text.targets(h + 1)[0].gather(1, at_BM) for h in range(c.horizon)], dim=1)
        hidden_BHMW = torch.stack([_gather(no_think.hidden_BNW.roll(-h, 1), at_BM) for h in range(c.horizon)], dim=1)
        base_BHM = token_logprobs(hidden_BHMW, teacher.head_weight_VW, target_BHM)
        return ThoughtBatch(thoughts, target_BHM, base_BHM, anchors.index_BM >= 0)

    def closed_and_continued(self, batch: ThoughtBatch, K: int) -> tuple[Thoughts, Tensor]:
        """The thoughts with the close given to those that lack it, then the true tokens read while predicting the next.

        Also the slot whose hidden state predicts the first target [B, K, M].
        """
        thoughts = batch.rollout.thoughts
        B, M = batch.real_BM.shape
        close_T1 = torch.tensor(self.close_ids, device=batch.real_BM.device)[:, None]
        closing_BKTM = torch.where(batch.rollout.closed_BKM[:, :, None], PAD, close_T1)
        closed = thoughts.followed_by(closing_BKTM)
        read_BKTM = batch.target_BHM[:, None, :-1].expand(B, K, -1, M)
        return closed.followed_by(read_BKTM), closed.lengths_BKM - 1

    def score(
        self,
        model: ThinkingModel,
        state: TextState,
        batch: ThoughtBatch,
        denominators: Denominators,
        rng: Rng,
    ) -> ObjectiveOutput:
        """One update: S_pred and the policy's log-probs from a single pass, rewards, advantages, loss."""
        c, text = self.config, state.text
        P, K, H = len(self.open_ids), c.thoughts, c.horizon
        sampled = batch.rollout.thoughts
        thoughts, last_BKM = self.closed_and_continued(batch, K)
        hidden_BKSMW = model.think(thoughts, state)

        # S_pred(c): the hidden states behind the close and behind each true token but the last.
        slots_BKHM = last_BKM[:, :, None] + torch.arange(H, device=last_BKM.device)[:, None]
        index = slots_BKHM[..., None].expand(*slots_BKHM.shape, hidden_BKSMW.shape[-1])
        target_BKHM = batch.target_BHM[:, None].expand_as(slots_BKHM)
        predicted_BKHM = token_logprobs(hidden_BKSMW.gather(2, index), model.head_weight_VW, target_BKHM)

        gain_BKHM = information_gain(predicted_BKHM, batch.base_BHM[:, None])
        raw_BKM = discounted(gain_BKHM, c.discount)
        reward_BKM = raw_BKM
        if c.reward_clip is not None:
            reward_BKM = reward_BKM.clamp(-c.reward_clip, c.reward_clip)
        if c.reward_positive:
            reward_BKM = positive_part(reward_BKM)
        if c.shuffle_rewards:
            reward_BKM = self._shuffled(reward_BKM, sampled.anchors, rng)

        weight_BKM = batch.real_BM[:, None].expand_as(reward_BKM)
        if c.unclosed == "drop":
            weight_BKM = weight_BKM & batch.rollout.closed_BKM
        anchors = denominators["anchors"]
        advantage_BKM = ADVANTAGES[c.advantage](reward_BKM) * weight_BKM

        # The policy's log-probs of the sampled tokens, at the temperature they were sampled at.
        is_sampled_BKLM = (sampled.tokens_BKSM[:, :, P:] != PAD) & weight_BKM[:, :, None]
        L = is_sampled_BKLM.shape[2]
        hidden_JW = hidden_BKSMW[:, :, P - 1 : P - 1 + L][is_sampled_BKLM]
        token_J = sampled.tokens_BKSM[:, :, P:][is_sampled_BKLM]
        logprob_J = token_logprobs(hidden_JW, model.head_weight_VW, token_J, c.temperature, self._banned(model))
        old_J = batch.rollout.logprobs_BKLM[is_sampled_BKLM]
        length_BKM = (sampled.lengths_BKM - P).clamp(min=1)

        def per_sampled(x_BKM: Tensor) -> Tensor:
            return x_BKM[:, :, None].expand_as(is_sampled_BKLM)[is_sampled_BKLM]

        weight_J = per_sampled(length_BKM).to(logprob_J.dtype).reciprocal()
        surrogate_J = clipped_surrogate(logprob_J, old_J, per_sampled(advantage_BKM), c.eps_low, c.eps_high)
        loss = divide((surrogate_J * weight_J).sum(), anchors * K)

        ledger = Ledger(model.decoder.config)
        scored = predicted_BKHM.numel() + logprob_J.numel()
        if c.train_predictor:
            weighted = (predicted_BKHM.sum(dim=2) * weight_BKM).sum()
            loss = loss - c.train_predictor * divide(weighted, anchors * K)
        if c.next_token_weight:
            target_BN, valid_BN = text.targets(1)
            nll_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
            loss = loss + c.next_token_weight * divide(nll_BN.sum(), denominators["text"])
            scored += nll_BN.numel()
        if c.kl_weight:
            teacher = self.teacher.model(model)
            with torch.no_grad():
                hidden = teacher.think(thoughts, teacher.read(text))[:, :, P - 1 : P - 1 + L][is_sampled_BKLM]
                reference_J = token_logprobs(
                    hidden, teacher.head_weight_VW, token_J, c.temperature, self._banned(model)
                )
            kl = (kl_to_reference(logprob_J, reference_J) * weight_J).sum()
            loss = loss + c.kl_weight * divide(kl, anchors * K)
            ledger.think(thoughts.anchors, K, hidden_BKSMW.shape[2], backward=False)

        ledger.read(text, backward=True)
        ledger.read(text, backward=False)
        ledger.vocabulary(batch.base_BHM.numel(), backward=False)
        ledger.think(sampled.anchors, K, P + L, backward=False, stage="rollout")
        ledger.vocabulary(weight_BKM.numel() * L, backward=False, stage="rollout")
        ledger.think(thoughts.anchors, K, hidden_BKSMW.shape[2], backward=True)
        ledger.vocabulary(scored, backward=True)
        real_BKM = batch.real_BM[:, None].expand_as(raw_BKM)
        ratio_J, all_J = (logprob_J - old_J).exp().detach(), torch.ones_like(logprob_J, dtype=torch.bool)
        metrics = self._thought_metrics(batch, real_BKM) | {
            "reward": Mean.over(raw_BKM, real_BKM),
            "reward_positive": Mean.over((raw_BKM > 0).double(), real_BKM),
            "reward_spread": Mean.over(raw_BKM.std(dim=1), batch.real_BM),
            "flat_groups": Mean.over((~has_spread(reward_BKM)[:, 0]).double(), batch.real_BM),
            "nll_text": Mean.over(-batch.base_BHM[:, 0], batch.real_BM),
            "nll_thought": Mean.over(-predicted_BKHM[:, :, 0], real_BKM),
            "entropy": Mean.over(-logprob_J, all_J),
            "ratio": Mean.over(ratio_J, all_J),
            "ratio_clipped": Mean.over(((ratio_J > 1 + c.eps_high) | (ratio_J < 1 - c.eps_low)).double(), all_J),
        }
        return ObjectiveOutput(loss, metrics, ledger.total, ThoughtRecord(sampled, raw_BKM, advantage_BKM))

    def __call__(
        self, model: ThinkingModel, text: Text, rng: Rng, denominators: Denominators | None = None
    ) -> ObjectiveOutput:
        state = model.read(text)
        batch = self.think(model, text, state, rng)
        return self.score(model, state, batch, denominators or self.denominators(text), rng)

    def _thought_metrics(self, batch: ThoughtBatch, real_BKM: Tensor) -> dict[str, Mean]:
        """What the thoughts look like, whatever they earned."""
        sampled, P = batch.rollout.thoughts, len(self.open_ids)
        body_BKLM = sampled.tokens_BKSM[:, :, P:]
        # A thought is distinct if no earlier thought of its group has the same tokens.
        same_BKKM = (body_BKLM[:, :, None] == body_BKLM[:, None]).all(dim=3)
        K = body_BKLM.shape[1]
        earlier_KK = torch.ones(K, K, dtype=torch.bool, device=body_BKLM.device).tril(-1)
        repeated_BKM = (same_BKKM & earlier_KK[:, :, None]).any(dim=2)
        leaks_BKM = (body_BKLM == batch.target_BHM[:, None, :1]).any(dim=2)
        return {
            "thought_length": Mean.over((sampled.lengths_BKM - P).double(), real_BKM),
            "thought_closed": Mean.over(batch.rollout.closed_BKM.double(), real_BKM),
            "thought_distinct": Mean.over((~repeated_BKM).double(), real_BKM),
            "target_in_thought": Mean.over(leaks_BKM.double(), real_BKM),
        }

    @torch.no_grad()
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng) -> TokenScores:
        """NLL of the targets of as many anchors as in training, from the text alone and after one sampled thought.

        The anchors do not depend on the model, so that evaluations at different steps score the same tokens.
        """
        c = self.config
        state = model.read(text)
        anchors = self._draw_anchors(self.eligible(text), text, rng)
        thoughts = rollout(model, state, anchors, 1, c.length, rng, c.temperature, self.open_ids, self.close_ids)
        real_BM, at_BM = anchors.index_BM >= 0, anchors.index_BM.clamp(min=0)
        target_BN, _ = text.targets(1)
        target_BHM = target_BN.gather(1, at_BM)[:, None]
        batch = ThoughtBatch(thoughts, target_BHM, torch.zeros_like(target_BHM, dtype=torch.float32), real_BM)
        closed, last_B1M = self.closed_and_continued(batch, 1)
        hidden_BSMW = model.think(closed, state)[:, 0]
        hidden_BMW = hidden_BSMW.gather(1, last_B1M[..., None].expand(-1, -1, -1, hidden_BSMW.shape[-1]))[:, 0]
        thought_BM = -token_logprobs(hidden_BMW, model.head_weight_VW, target_BHM[:, 0])
        text_nll_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN)
        # Padding anchors point past the row's end and are cut off again.
        place_BM = torch.where(real_BM, anchors.index_BM, text.shape[1])
        wide_BN = text_nll_BN.new_zeros(text.shape[0], text.shape[1] + 1)
        thought_nll_BN = wide_BN.scatter(1, place_BM, thought_BM)[:, :-1]
        valid_BN = wide_BN.scatter(1, place_BM, 1.0)[:, :-1] > 0
        ledger = Ledger(model.decoder.config)
        ledger.read(text, backward=False)
        ledger.think(anchors, 1, thoughts.thoughts.tokens_BKSM.shape[2], backward=False, stage="rollout")
        ledger.think(anchors, 1, closed.tokens_BKSM.shape[2], backward=False)
        ledger.vocabulary(c.length * real_BM.numel() + text_nll_BN.numel() + real_BM.numel(), backward=False)
        return TokenScores(text_nll_BN * valid_BN, valid_BN, thought_nll_BN, closed, ledger.total)

    def _banned(self, model: ThinkingModel) -> Tensor:
        banned_V = model.banned_V.clone()
        banned_V[list(self.close_ids)] = False
        return banned_V

    @staticmethod
    def _shuffled(reward_BKM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
        """The rewards of each group in an order drawn for it."""
        K = torch.arange(reward_BKM.shape[1], device=reward_BKM.device)[:, None]
        sample_id_B11 = anchors.text.sample_id_B[:, None, None]
        order_BKM = rng.uniform(sample_id_B11, anchors.index_BM[:, None], K + POSITION_DRAW + 1, 0).argsort(dim=1)
        return reward_BKM.gather(1, order_BKM)


def _gather(hidden_BNW: Tensor, at_BM: Tensor) -> Tensor:
    """[B, M, W], the hidden states at positions of each row."""
    return hidden_BNW.gather(1, at_BM[..., None].expand(-1, -1, hidden_BNW.shape[-1]))
