"""From rewards to losses: pure functions on tensors, each with its formula and source.

Shapes: B rows, K thoughts of an anchor, M anchors, `...` any.
"""

from __future__ import annotations

from torch import Tensor


def group_mean_advantage(reward_BKM: Tensor) -> Tensor:
    """r − mean of r over the K thoughts of the same anchor, itself included, no standard deviation; r itself if K = 1.

    Quiet-STaR, 2403.09629 §4.4.3 eq. 5 (K = 1: the public code).
    """
    if reward_BKM.shape[1] == 1:
        return reward_BKM
    return reward_BKM - reward_BKM.mean(dim=1, keepdim=True)


def positive_part(advantage: Tensor) -> Tensor:
    """max(0, advantage): Quiet-STaR drops negative advantages, "more stable training, though it may bias"."""
    return advantage.clamp(min=0)


def reinforce(logprobs: Tensor, advantage: Tensor) -> Tensor:
    """−Σ advantage · log π(token), the advantage without gradient (Williams 1992). A sum, to be divided by a count."""
    return -(advantage.detach() * logprobs).sum()
