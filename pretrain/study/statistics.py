"""What a few seeds and a few hundred documents allow one to say of arms and of their differences.

There are two reasons why another study would come out differently. Its runs would draw other data orders and thoughts:
of that, a handful of seeds tell little, and Student's t says how little. And it would score other documents, whose
scores are far from Gaussian, but of which there are many: they are resampled. All seeds score the same documents, so
that the two are crossed, as readers and cases are in studies of radiologists (Hillis 2007, doi 10.1002/sim.2532).

To resample documents alone would ask whether *these* models differ, and find that two runs of one recipe with different
seeds do. To resample seeds as well, as a hierarchical or pigeonhole bootstrap does (Owen 2007, doi 10.1214/07-AOAS122),
takes more than a few of them: of three, the percentile interval goes from the least to the largest, which has the mean
between them three times out of four and not nineteen out of twenty.

Shapes: ... independent studies, S seeds, D documents, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor

# Enough for p of a hundred comparisons to be told from 0.05; so many at a time are held.
RESAMPLES, AT_ONCE = 20_000, 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, infinite where nothing can be said; n: of so many seeds."""

    mean: float
    low: float
    high: float
    n: int


def over_seeds(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean (1908): exact for Gaussian draws, of which there are two at least."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(student.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Differences:
    """Of paired scores, each [...]: their mean, its 95% interval, the two-sided probability of one at least as far from
    0 without a true difference, and Cohen's d over documents (1988, §2.3.5: the mean in standard deviations of a
    document's difference, seeds averaged; 0.2 is called small, 0.8 large)."""

    mean: Tensor
    low: Tensor
    high: Tensor
    p: Tensor
    effect: Tensor


def paired_differences(difference_SD: Tensor, tokens_D: Tensor | None = None) -> Differences:
    """The mean difference of arms whose runs are paired by seed and score the same documents.

    difference: [..., S, D], fp64, of a document's mean scores. tokens_D: how much each document weighs; default: alike.

    Documents are resampled whole, with all seeds' scores (Efron 1979), and each resampled mean is moved by the seeds'
    standard error times a draw of Student's t with S − 1 degrees of freedom. So the interval holds for other seeds and
    other documents, and is no narrower than with the variances added up. With one seed it holds for this one's models.
    The resamples are the same at every call.
    """
    S, D = difference_SD.shape[-2:]
    weight_D = torch.ones(D, dtype=torch.float64) if tokens_D is None else tokens_D.double()
    generator = torch.Generator().manual_seed(0)
    document_D = difference_SD.mean(dim=-2)
    mean_S = difference_SD @ (weight_D / weight_D.sum())
    mean = mean_S.mean(dim=-1)
    weights = (_resampled(weight_D, AT_ONCE, generator) for _ in range(RESAMPLES // AT_ONCE))
    resampled_R = torch.cat([document_D @ weight_RD.T for weight_RD in weights], dim=-1)
    if S > 1:
        error = mean_S.std(dim=-1) / math.sqrt(S)
        resampled_R = resampled_R + error[..., None] * _draws_of_t(S - 1, generator)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = resampled_R.quantile(tails, dim=-1)
    below, above = ((sign * resampled_R >= 0).sum(dim=-1) for sign in (-1, 1))
    p = (2 * (1 + torch.minimum(below, above)) / (1 + RESAMPLES)).clamp(max=1)
    return Differences(mean, low, high, p, document_D.mean(dim=-1) / document_D.std(dim=-1, correction=int(D > 1)))


def _resampled(weight_D: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, D], each row the weights of as many documents, drawn with replacement; their sum is 1."""
    drawn_RD = torch.randint(len(weight_D), (count, len(weight_D)), generator=generator)
    weight_RD = torch.zeros(drawn_RD.shape, dtype=torch.float64).scatter_add_(1, drawn_RD, weight_D[drawn_RD])
    return weight_RD / weight_RD.sum(dim=1, keepdim=True)


def _draws_of_t(freedom: int, generator: torch.Generator) -> Tensor:
    """Student's t at RESAMPLES even probabilities, in random order."""
    probability_R = (torch.arange(RESAMPLES, dtype=torch.float64) + 0.5) / RESAMPLES
    quantile_R = torch.from_numpy(student.ppf(probability_R.numpy(), freedom))
    return quantile_R[torch.randperm(RESAMPLES, generator=generator)]


def pass_at(k: int, right: Tensor, n: int) -> Tensor:
    """1 − C(n − c, k) / C(n, k), fp64: the probability that k of n samples hold one of the c right ones.

    right: int64, c. Unbiased for k fresh samples (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return torch.tensor([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)], dtype=torch.float64)[right]


def holm(probabilities: Sequence[float]) -> list[float]:
    """Adjusted so that with probability 0.95 none of all that are below 0.05 is so by chance (Holm 1979)."""
    n, largest = len(probabilities), 0.0
    adjusted = [0.0] * n
    for rank, i in enumerate(sorted(range(n), key=probabilities.__getitem__)):
        largest = max(largest, min(1.0, (n - rank) * probabilities[i]))
        adjusted[i] = largest
    return adjusted
