"""Metrics: how they add up over ranks and micro-batches, and what each name means.

`METRICS` is the one table of names. Reports and the page objectives/README.md read it (`python -m objectives.metrics`
prints the page's table); an objective of one's own brings its names in its `metrics`.

Shapes: B rows, M anchors of a row, K thoughts of an anchor, L tokens of a body, S all tokens of a thought, H tokens of
the horizon, J sampled tokens of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.rollout import Rollout
from models.thoughts import PAD

# Targets are called easy below the first NLL without a thought, hard from the second on, in nats.
EASY, HARD = 0.5, 1.5


@dataclass(frozen=True)
class Mean:
    """A metric that is a mean, kept as its sum and count (fp64 scalars) so that ranks and micro-batches add up."""

    sum: Tensor
    count: Tensor

    @staticmethod
    def over(values: Tensor, where: Tensor) -> Mean:
        """The mean of `values` where the bool `where` (broadcast) is set."""
        where = where.expand_as(values)
        return Mean((values.detach().double() * where).sum(), where.sum().double())

    @staticmethod
    def of(values: Sequence[float], device: torch.device) -> Mean:
        """The mean of numbers known on the host."""
        pair = torch.tensor([float(sum(values)), float(len(values))], dtype=torch.float64, device=device)
        return Mean(pair[0], pair[1])


Means = dict[str, Mean]


@dataclass(frozen=True)
class Metric:
    """meaning: what it says, in a few words with its unit. formula: how it is computed, what the mean is over."""

    meaning: str
    formula: str


METRICS: Mapping[str, Metric] = {
    "nll_text": Metric("loss without thoughts, nats per token", "−log p(next token), mean over scored tokens"),
    "nll_thought": Metric(
        "loss after a thought, nats per token",
        "the same after the thought; Quiet-STaR: of the mixed prediction",
    ),
    "reward": Metric(
        "reward before clipping", "Quiet-STaR: Σ_s CE_text − CE_mixed; RLP: information gain; RPT: 1 if right"
    ),
    "gain_live": Metric(
        "information gain over the model itself without a thought, nats",
        "RLP: log p_θ(x_t after the thought) − log p_θ(x_t), where the reward subtracts the teacher's log-prob",
    ),
    "reward_positive": Metric("share of thoughts with a reward above 0", "mean of 1[r > 0]"),
    "reward_std": Metric("spread of rewards within a group", "unbiased std over the thoughts of an anchor"),
    "advantage": Metric("advantage that weighs the policy's log-probs", "Quiet-STaR: max(0, r − mean r)"),
    "gain_easy": Metric("reward where the target is easy without a thought", f"mean of r where its NLL < {EASY} nats"),
    "gain_medium": Metric("reward where the target is neither", f"mean of r where {EASY} ≤ NLL < {HARD} nats"),
    "gain_hard": Metric("reward where the target is hard without a thought", f"mean of r where NLL ≥ {HARD} nats"),
    "mixing_weight": Metric("weight of a thought's prediction", "w of the mixing head for the next token"),
    "policy_loss": Metric("policy loss before its weight", "−A · log π, mean over positions, thoughts and tokens"),
    "thought_length": Metric("tokens between the tags", "mean over thoughts"),
    "thought_length_trend": Metric(
        "how thoughts grow or shrink, tokens per 100 steps", "least squares over 20 records"
    ),
    "thought_closed": Metric("share of thoughts that ended by themselves", "mean over thoughts"),
    "thought_distinct": Metric("share of thoughts unlike all earlier ones of their group", "mean over thoughts"),
    "target_in_thought": Metric("share of thoughts that contain the token to predict", "mean over thoughts"),
    "answered": Metric("share of responses that hold a complete prediction", "mean over responses"),
    "undecided": Metric(
        "share of responses that are right as far as their row goes, and longer",
        "mean over responses; each earns the mean of its group's others",
    ),
    "zero_variance_groups": Metric("share of groups whose thoughts all earn the same", "mean over anchors"),
    "kept_groups": Metric("share of groups that count", "mean over anchors"),
    "documents_skipped": Metric("share of documents without an anchor", "mean over documents"),
    "entropy": Metric("the policy's entropy, nats per token", "mean of −log π over sampled tokens"),
    "ratio": Metric("importance ratio ρ", "mean of π / π_old over sampled tokens"),
    "ratio_clipped": Metric("share of tokens whose ratio leaves [1 − ε_low, 1 + ε_high]", "mean over sampled tokens"),
    "sampler_gap": Metric(
        "how far the sampler's log-probs are from the trainer's, nats",
        "mean of abs(log π_old − log π_sampler) over sampled tokens",
    ),
}


def thought_metrics(
    rollout: Rollout,
    body_BKLM: Tensor,
    target_BHM: Tensor,
    base_BHM: Tensor,
    real_BM: Tensor,
    gain_BKM: Tensor,
) -> Means:
    """What thoughts at a few anchors look like and earned; `gain_BKM` is the reward before clipping, `base_BHM` the
    targets' log-probs without a thought."""
    real_BKM = real_BM[:, None].expand_as(gain_BKM)
    K = body_BKLM.shape[1]
    # A thought is distinct if no earlier thought of its group has the same tokens.
    same_BKKM = (body_BKLM[:, :, None] == body_BKLM[:, None]).all(dim=3)
    earlier_KK = torch.ones(K, K, dtype=torch.bool, device=body_BKLM.device).tril(-1)
    repeated_BKM = (same_BKKM & earlier_KK[:, :, None]).any(dim=2)
    leaks_BKM = (body_BKLM == target_BHM[:, None, :1]).any(dim=2)
    nll_B1M = -base_BHM[:, None, 0]
    return {
        "reward": Mean.over(gain_BKM, real_BKM),
        "reward_positive": Mean.over((gain_BKM > 0).double(), real_BKM),
        "reward_std": Mean.over(gain_BKM.std(dim=1), real_BM),
        "gain_easy": Mean.over(gain_BKM, real_BKM & (nll_B1M < EASY)),
        "gain_medium": Mean.over(gain_BKM, real_BKM & (nll_B1M >= EASY) & (nll_B1M < HARD)),
        "gain_hard": Mean.over(gain_BKM, real_BKM & (nll_B1M >= HARD)),
        "nll_text": Mean.over(nll_B1M[:, 0], real_BM),
        "thought_length": Mean.over((body_BKLM != PAD).sum(dim=2).double(), real_BKM),
        "thought_closed": Mean.over(rollout.closed_BKM.double(), real_BKM),
        "thought_distinct": Mean.over((~repeated_BKM).double(), real_BKM),
        "target_in_thought": Mean.over(leaks_BKM.double(), real_BKM),
    }


def policy_metrics(logprob_J: Tensor, old_J: Tensor, sampler_J: Tensor, eps_low: float, eps_high: float) -> Means:
    """How far the policy has moved since the first update, and how far it was from what sampled."""
    ratio_J = (logprob_J - old_J).exp().detach()
    all_J = torch.ones_like(ratio_J, dtype=torch.bool)
    clipped_J = (ratio_J > 1 + eps_high) | (ratio_J < 1 - eps_low)
    return {
        "entropy": Mean.over(-logprob_J, all_J),
        "ratio": Mean.over(ratio_J, all_J),
        "ratio_clipped": Mean.over(clipped_J.double(), all_J),
        "sampler_gap": Mean.over((old_J - sampler_J).abs(), all_J),
    }


def table(metrics: Mapping[str, Metric] = METRICS) -> str:
    """A Markdown table of names, meanings and formulas."""
    rows = [f"| `{name}` | {metric.meaning} | {metric.formula} |" for name, metric in metrics.items()]
    return "\n".join(["| name | meaning | formula |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
