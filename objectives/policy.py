"""What RLP and RPT share: thoughts are sampled, and rewarded ones become likelier. What is rewarded is their own.

`credit` has how rewards become losses; here that meets settings.

Shapes: B rows, M anchors of a row, K thoughts of an anchor (the paper's G), L tokens of a body, S all tokens of a
thought, H tokens of the horizon, W width, V vocabulary, J sampled tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from models.decoder import TextState
from models.logprobs import token_logprobs
from models.philox import Rng
from models.rollout import Engine, Prediction, Rollout, RolloutRequest
from models.thinking import ThinkingModel, TrainedThinking
from models.thoughts import Anchors, Text
from objectives.anchored import Anchored, AnchoredConfig
from objectives.base import Batch, Counts, ObjectiveConfig, setting
from objectives.credit import ADVANTAGES, CONTROLS, clipped_surrogate, truncated_importance
from objectives.workload import Workload


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(AnchoredConfig):
    """Settings of objectives whose thoughts are sampled and rewarded."""

    thoughts: int = setting(16, "G, thoughts of an anchor, which are compared with each other", ge=2)
    temperature: float = setting(0.7, "of sampling, and of the policy's log-probs", gt=0)
    advantage: Literal["leave_one_out", "mean", "standardised"] = setting(
        "leave_one_out", "what rewards are compared with"
    )
    unclosed: Literal["score", "drop"] = setting(
        "score", "thoughts that do not end by themselves: rewarded by the same rule, or left out"
    )
    eps_low: float = setting(0.2, "ratios below 1 − ε_low are clipped", ge=0)
    eps_high: float = setting(0.2, "ratios above 1 + ε_high are clipped", ge=0)
    importance_cap: float | None = setting(
        None,
        "C, tokens weigh min(π_old / π_sampler, C), to correct for the sampler's own numbers; default: 1",
        gt=0,
    )
    updates: int = setting(1, "optimizer steps on the same thoughts, all with the first one's rewards", ge=1)
    rewards: Literal["earned", "shuffled", "random", "constant"] = setting(
        "earned", "controls: rewards dealt out at random within their group, 0 or 1 at random, 1 for all"
    )

    def showing(self, length: int | None, temperature: float, positions: int) -> ObjectiveConfig:
        # A marker says where to think; any other choice of positions is training's own.
        return self.replaced(
            length=length or self.length,
            temperature=temperature,
            anchors_per_document=positions,
            min_prefix=1,
            positions="marker" if self.positions == "marker" else "random",
        )


@dataclass(eq=False)
class AnchoredBatch(Batch):
    """What one rollout phase leaves behind for the updates that use it.

    target_BHM: int64, the H true tokens behind each anchor. base_BHM: their log-probs without a thought.
    real_BM: bool, whether there is an anchor at all. rng: of the step. reward_BKM, advantage_BKM, old_BKSM (the sampled
    tokens' log-probs): of the first update's pass, kept for the others. gain_BKM: where it is measured elsewhere.
    """

    rollout: Rollout
    target_BHM: Tensor
    base_BHM: Tensor
    real_BM: Tensor
    rng: Rng
    reward_BKM: Tensor | None = None
    advantage_BKM: Tensor | None = None
    old_BKSM: Tensor | None = None
    gain_BKM: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Policy:
    """The policy's part of a loss.

    surrogate: Σ_i 1/|c_i| Σ_u of the clipped surrogate. tokens_J, logprob_J (with gradient), old_J, sampler_J: of each
    sampled token that counts, which `where_BKSM` marks, under the policy, before the first update, and as it was
    sampled. weight_J: 1/|c_i|.
    """

    surrogate: Tensor
    tokens_J: Tensor
    logprob_J: Tensor
    old_J: Tensor
    sampler_J: Tensor
    weight_J: Tensor
    where_BKSM: Tensor


class RewardedThoughts(Anchored):
    """Base of RLP and RPT."""

    config: Any

    @property
    def updates(self) -> int:
        return self.config.updates

    @property
    def thinking(self) -> TrainedThinking:
        return TrainedThinking("before-answer", self.config.length, self.template.open, self.template.close)

    def counts(self, text: Text, batch: Any = None) -> Counts:
        """`thoughts`: those of all anchors before model-based filtering; `text`: tokens to predict."""
        counts = super().counts(text)
        return counts | {"thoughts": counts["thoughts"] * self.config.thoughts}

    # Sampling

    def request(
        self,
        model: ThinkingModel,
        state: TextState,
        anchors: Anchors,
        thoughts: int,
        rng: Rng,
        close: tuple[int, ...] | None = None,
        prediction: Prediction | None = None,
    ) -> RolloutRequest:
        """So many thoughts at every anchor, as the settings say; `close` is by default the closing tag."""
        c, t = self.config, self.template
        return RolloutRequest(
            model,
            state,
            anchors,
            thoughts,
            c.length,
            rng,
            c.temperature,
            t.open,
            t.close if close is None else close,
            prediction,
            (*t.close, *t.allowed),
            self.config.rollout_anchors,
        )

    def bodies(self, rollout: Rollout) -> Tensor:
        """The tokens between the tags [B, K, L, M], PAD behind them."""
        return self.template.bodies(rollout, self.config.length)

    def own_bodies(
        self, model: ThinkingModel, state: TextState, anchors: Anchors, rng: Rng, engine: Engine, thoughts: int = 1
    ) -> Tensor:
        return self.bodies(engine.sample(self.request(model, state, anchors, thoughts, rng)))

    def workload(self, length: int, documents: float) -> Workload:
        c = self.config
        return replace(
            super().workload(length, documents),
            # Ahead of all losses where their counts depend on the thoughts, or several updates share them.
            readings=int(self.counts_thoughts or c.updates > 1),
            thoughts=c.thoughts,
            updates=c.updates,
        )

    # How credit flows

    def rewardable(self, batch: AnchoredBatch) -> Tensor:
        """bool [B, K, M], the thoughts that can be rewarded."""
        real_BKM = batch.real_BM[:, None].expand_as(batch.rollout.closed_BKM)
        return real_BKM & batch.rollout.closed_BKM if self.config.unclosed == "drop" else real_BKM

    def advantages(self, reward_BKM: Tensor, counts_BKM: Tensor, batch: AnchoredBatch) -> Tensor:
        """The advantage of each thought over its group, 0 where bool `counts_BKM` says that it does not count."""
        if (control := CONTROLS.get(self.config.rewards)) is not None:
            reward_BKM = control(reward_BKM, batch.anchors, batch.rng)
        return ADVANTAGES[self.config.advantage](reward_BKM) * counts_BKM

    def policy(
        self,
        model: ThinkingModel,
        hidden_BKSMW: Tensor,
        batch: AnchoredBatch,
        advantage_BKM: Tensor,
        counts_BKM: Tensor,
    ) -> Policy:
        """The clipped surrogate of the sampled tokens of thoughts that count, at the temperature of sampling.

        hidden: of a pass over thoughts that begin with those of the rollout. π_old is this pass's own π at the first
        update, where ρ is 1 then: the sampler's log-probs, which come from other kernels, differ in bf16 by hundredths
        of a nat, and would clip tokens that no update has moved.
        """
        c, rollout = self.config, batch.rollout
        where_BKSM = rollout.sampled_BKSM & counts_BKM[:, :, None]
        hidden_JW = predicting(hidden_BKSMW, where_BKSM)
        tokens_J = rollout.thoughts.tokens_BKSM[where_BKSM]
        banned_V = self.template.banned(model.banned_V)
        logprob_J = token_logprobs(hidden_JW, model.head_weight_VW, tokens_J, c.temperature, banned_V)
        sampler_J = rollout.logprobs_BKSM[where_BKSM]
        if batch.old_BKSM is None:
            batch.old_BKSM = torch.zeros_like(rollout.logprobs_BKSM).masked_scatter(where_BKSM, logprob_J.detach())
        old_J = batch.old_BKSM[where_BKSM]
        length_BKM = rollout.sampled_BKSM.sum(dim=2).clamp(min=1)
        weight_J = length_BKM[:, :, None].expand_as(where_BKSM)[where_BKSM].to(logprob_J.dtype).reciprocal()
        advantage_J = advantage_BKM[:, :, None].expand_as(where_BKSM)[where_BKSM]
        surrogate_J = clipped_surrogate(logprob_J, old_J, advantage_J, c.eps_low, c.eps_high)
        if c.importance_cap is not None:
            surrogate_J = surrogate_J * truncated_importance(old_J, sampler_J, c.importance_cap)
        return Policy((surrogate_J * weight_J).sum(), tokens_J, logprob_J, old_J, sampler_J, weight_J, where_BKSM)


def predicting(hidden_BKSMW: Tensor, where_BKSM: Tensor) -> Tensor:
    """The hidden states [J, W] that predict the marked tokens: those one slot before them.

    hidden may have fewer slots, where none behind them is marked.
    """
    S = min(hidden_BKSMW.shape[2], where_BKSM.shape[2] - 1)
    return hidden_BKSMW[:, :, :S][where_BKSM[:, :, 1 : S + 1]]
