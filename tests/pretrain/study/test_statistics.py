"""Intervals and tests on synthetic studies whose effects are known: 1,000 of each, all at once.

A rate of 1,000 studies is within 0.014 of its expectation nineteen times out of twenty.

Shapes: N studies, S seeds, D documents.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pretrain.study.statistics import holm, over_seeds, paired_differences, pass_at

N, S, D = 1000, 3, 200
SLACK = 0.014


def differences(effect: float, of_seeds: float, seed: int = 0) -> torch.Tensor:
    """[N, S, D] of documents' differences: an effect, what a seed adds to all documents (standard deviation
    `of_seeds`), what a document adds in all seeds (skewed, 1), and noise (1)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    document_ND = draw(N, 1, D).exp()
    document_ND = (document_ND - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)
    return effect + of_seeds * draw(N, S, 1) + document_ND + draw(N, S, D)


def test_student_s_interval_against_a_printed_table():
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    assert found.low == pytest.approx(4 - found.high)
    one = over_seeds([1.0])
    assert (one.mean, one.low, one.high) == (1.0, -math.inf, math.inf)


def test_intervals_over_seeds_cover_at_their_rate():
    draws = torch.randn(N, S, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    found = [over_seeds(row) for row in draws.tolist()]
    assert sum(x.low <= 0.5 <= x.high for x in found) / N == pytest.approx(0.95, abs=SLACK)


@pytest.mark.parametrize("of_seeds", [0.0, 0.05, 0.3])
def test_paired_intervals_cover_and_invent_no_effect(of_seeds):
    """Whether documents or seeds are what differs most, or both alike: at their rate at least, and no use if always."""
    found = paired_differences(differences(0.0, of_seeds))
    covered = ((found.low <= 0) & (found.high >= 0)).double().mean().item()
    assert 0.95 - SLACK <= covered <= 0.995
    assert (found.p < 0.05).double().mean().item() <= 0.05 + SLACK


def test_documents_alone_would_invent_effects():
    """Why seeds count: the same models' differences are real, and another seed has others."""
    of_these_models = paired_differences(differences(0.0, 0.3).mean(dim=1, keepdim=True))
    assert (of_these_models.p < 0.05).double().mean().item() > 0.35


def test_an_effect_is_found_with_its_size():
    found = paired_differences(differences(0.5, 0.05))
    assert (found.p < 0.05).double().mean().item() > 0.9
    assert ((found.low <= 0.5) & (found.high >= 0.5)).double().mean().item() >= 0.95 - SLACK
    # In standard deviations of a document's mean over seeds: that of its own part, and a third of the noise.
    assert found.effect.median().item() == pytest.approx(0.5 / math.sqrt(1 + 1 / 3), rel=0.1)
    assert found.mean.mean().item() == pytest.approx(0.5, abs=0.01)


def test_documents_weigh_by_their_tokens():
    scores_SD = torch.tensor([[1.0, 4.0], [2.0, 5.0]], dtype=torch.float64)
    found = paired_differences(scores_SD, torch.tensor([3, 1]))
    assert found.mean.item() == pytest.approx((3 * 1.5 + 4.5) / 4)
    with_one_seed = paired_differences(scores_SD[:1], torch.tensor([3, 1]))
    assert 1 <= with_one_seed.low.item() < with_one_seed.high.item() <= 4  # no resample of documents is outside


def test_holm_against_an_example_and_by_its_rate():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    by_chance = torch.rand(N, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    assert sum(min(row) < 0.05 for row in by_chance) / N > 0.3
    assert sum(min(holm(row)) < 0.05 for row in by_chance) / N <= 0.05 + SLACK


@pytest.mark.parametrize("n", [1, 2, 6])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_sample(n):
    for k in range(1, n + 1):
        draws = [*itertools.combinations(range(n), k)]
        expected = [sum(any(i < c for i in draw) for draw in draws) / len(draws) for c in range(n + 1)]
        assert pass_at(k, torch.arange(n + 1), n).tolist() == pytest.approx(expected, abs=1e-15)
