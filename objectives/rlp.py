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
L tokens sampled at most, S tokens of a thought, H tokens predicted after it, W width, `J` sampled tokens of all thoughts.
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
from models.thoughts import PAD, Anchors, Text
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
    drop_flat_groups: bool = False  # leave groups without spread out of the mean, too
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
