"""From rewards to losses: pure functions on tensors, each with its formula and source.

Shapes: B rows, K thoughts of an anchor (a group), M anchors, H tokens of a horizon, `...` any. Rewards and advantages
carry no gradient; log-probs do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from models.philox import Rng
from models.thoughts import Anchors

# Rewards


def information_gain(predicted: Tensor, baseline: Tensor) -> Tensor:
    """r = log p_θ(x_t | x_<t, c) − log p̄_φ(x_t | x_<t), without gradient. RLP, 2510.01265 eq. 2."""
    return (predicted - baseline).detach()


def probability_gain(predicted: Tensor, baseline: Tensor) -> Tensor:
    """p_θ(x_t | x_<t, c) − p̄_φ(x_t | x_<t) from log-probs, without gradient. An ablation: unlike the logarithm it goes
    flat where the target is unlikely either way (2602.03979)."""
    return (predicted.exp() - baseline.exp()).detach()


def discounted(gain_BKHM: Tensor, discount: float) -> Tensor:
    """R = Σ_h γ^h gain_h over the horizon [B, K, H, M] → [B, K, M]; h = 0 is the first token."""
    weight_H = discount ** torch.arange(gain_BKHM.shape[2], device=gain_BKHM.device, dtype=gain_BKHM.dtype)
    return (gain_BKHM * weight_H[:, None]).sum(dim=2)


def prefix_match(predicted: bytes | None, continuation: Iterable[bytes | None], goes_on: bool = False) -> bool | None:
    """Whether the prediction is a prefix of the true continuation that ends where one of its tokens ends: RPT's reward,
    2506.08007 §3.2 eq. 3. No prediction, or an empty one, is wrong.

    `continuation`: the bytes of each true token, None for one that is no text, read as far as the prediction goes.
    goes_on: the text goes on behind it, unknown how. The paper's completion x_≥t is always long enough; one that was
    cut off can leave a prediction undecided: None if that holds all of it and more.
    """
    if not predicted:
        return False
    end = 0
    for token in continuation:
        if token is None or not predicted.startswith(token, end):
            return False
        end += len(token)
        if end == len(predicted):
            return True
    return None if goes_on else False


# Advantages: over the K thoughts of the same anchor, dimension 1 of [B, K, M].


def group_mean_advantage(reward_BKM: Tensor) -> Tensor:
    """r − mean of r over the group, itself included, no standard deviation; r itself if K = 1.

    Quiet-STaR, 2403.09629 §4.4.3 eq. 5 (K = 1: the public code).
    """
    if reward_BKM.shape[1] == 1:
        return reward_BKM
    return reward_BKM - reward_BKM.mean(dim=1, keepdim=True)


def leave_one_out_advantage(reward_BKM: Tensor) -> Tensor:
    """G/(G − 1) · (r − mean r) = r − mean of the *other* thoughts' r. RLP eq. 6; RLOO, Ahmadian et al. 2402.14740.

    Raises ValueError for a group of one, which has no others.
    """
    G = reward_BKM.shape[1]
    if G == 1:
        raise ValueError("a group of one thought has no others to compare it with; use at least two")
    return (reward_BKM - reward_BKM.mean(dim=1, keepdim=True)) * (G / (G - 1))


def standardised_advantage(reward_BKM: Tensor, eps: float = 1e-6) -> Tensor:
    """(r − mean r) / (std r + eps), the group's own unbiased deviation. GRPO, Shao et al. 2402.03300 §4.1.2."""
    std = reward_BKM.std(dim=1, keepdim=True)
    return (reward_BKM - reward_BKM.mean(dim=1, keepdim=True)) / (std + eps)


def positive_part(advantage: Tensor) -> Tensor:
    """max(0, advantage): Quiet-STaR drops negative advantages, "more stable training, though it may bias"."""
    return advantage.clamp(min=0)


def has_variance(reward_BKM: Tensor) -> Tensor:
    """bool [B, 1, M]: whether a group's rewards differ at all; a zero-variance group teaches nothing.

    The filter of DAPO, Yu et al. 2503.14476 §3.2.
    """
    return reward_BKM.amax(dim=1, keepdim=True) > reward_BKM.amin(dim=1, keepdim=True)


ADVANTAGES = {
    "leave_one_out": leave_one_out_advantage,
    "mean": group_mean_advantage,
    "standardised": standardised_advantage,
}
# Draws of reward orders are keyed apart from those of tokens by thought indices that no thought has.
REWARD_ORDER_DRAW = 2**31 + 1


def shuffled_in_groups(reward_BKM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
    """A control: the rewards of each group, dealt out at random within it."""
    return reward_BKM.gather(1, _draws(reward_BKM, anchors, rng).argsort(dim=1))


def coin_flips(reward_BKM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
    """A control: 0 or 1 for each thought, whatever it says (Shao et al., "Spurious rewards", 2506.10947)."""
    return (_draws(reward_BKM, anchors, rng) >= 0.5).to(reward_BKM.dtype)


def constant(reward_BKM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
    """A control: 1 for every thought, and so no advantage for any."""
    return torch.ones_like(reward_BKM)


def _draws(reward_BKM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
    """One in [0, 1) for each thought."""
    K = torch.arange(reward_BKM.shape[1], device=reward_BKM.device)[:, None]
    sample_id_B11 = anchors.text.sample_id_B[:, None, None]
    return rng.uniform(sample_id_B11, anchors.index_BM[:, None], K + REWARD_ORDER_DRAW, 0)


# What is paid instead of what was earned.
CONTROLS = {"shuffled": shuffled_in_groups, "random": coin_flips, "constant": constant}


# Losses: sums, to be divided by a count.


def reinforce(logprobs: Tensor, advantage: Tensor) -> Tensor:
    """−Σ advantage · log π(token), the advantage without gradient (Williams 1992)."""
    return -(advantage.detach() * logprobs).sum()


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, eps_low: float, eps_high: float
) -> Tensor:
    """−min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high)A) of each token, ρ = exp(log π − log π_old). RLP eq. 7; 1707.06347."""
    ratio = (logprobs - old_logprobs.detach()).exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    advantage = advantage.detach()
    return -torch.minimum(ratio * advantage, clipped * advantage)


def truncated_importance(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(π_old / π_sampler, C) of each token, without gradient.

    Corrects the expectation for a sampler whose numbers differ from the trainer's, at the price of a bias by the cap.
    Ionides 2008, as used between sampler and trainer by Yao et al. 2025.
    """
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap).detach()


def kl_to_reference(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(d) − d − 1 with d = log π_ref − log π of each sampled token: unbiased for KL(π ‖ π_ref), never negative.

    Schulman's third estimator, as in GRPO eq. 4. Its gradient through the sampled tokens' log-probs alone is, in the
    mean, that of KL(π_ref ‖ π): E_π[(1 − π_ref / π) ∇log π].
    """
    d = reference_logprobs.detach() - logprobs
    return d.exp() - d - 1
