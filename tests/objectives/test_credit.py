"""Credit formulas against numbers worked out by hand, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from objectives.credit import (
    clipped_surrogate,
    discounted,
    group_mean_advantage,
    has_variance,
    information_gain,
    kl_to_reference,
    leave_one_out_advantage,
    positive_part,
    prefix_match,
    reinforce,
    standardised_advantage,
)
from tests.helpers import relative_error


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


REWARD_BKM = tensor([[1.0, 4.0], [3.0, -2.0], [5.0, 1.0]])


def test_information_gain_has_no_gradient():
    predicted = tensor(math.log(0.5), math.log(0.1)).requires_grad_()
    gain = information_gain(predicted, tensor(math.log(0.25), math.log(0.4)))
    assert relative_error(gain, tensor(math.log(2.0), math.log(0.25))) <= 1e-15
    assert not gain.requires_grad


def test_discounted():
    gain_BKHM = tensor([[[1.0, 2.0], [10.0, 0.0], [100.0, -4.0]]])
    assert torch.equal(discounted(gain_BKHM, 0.5), tensor([[1 + 5 + 25, 2 - 1]]))
    assert torch.equal(discounted(gain_BKHM, 1.0), gain_BKHM.sum(2))
    assert torch.equal(discounted(gain_BKHM[:, :, :1], 0.3), gain_BKHM[:, :, 0])


def test_group_mean_advantage():
    assert torch.equal(group_mean_advantage(REWARD_BKM), tensor([[-2.0, 3.0], [0.0, -3.0], [2.0, 0.0]]))
    assert torch.equal(group_mean_advantage(REWARD_BKM[:, :1]), REWARD_BKM[:, :1])


def test_leave_one_out_is_rloo():
    """Each reward against the mean of the others, written as a loop."""
    got = leave_one_out_advantage(REWARD_BKM)
    assert relative_error(got, tensor([[-3.0, 4.5], [0.0, -4.5], [3.0, 0.0]])) <= 1e-15
    reward = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rloo = torch.stack([reward[:, i] - reward[:, [j for j in range(7) if j != i]].mean(1) for i in range(7)], dim=1)
    assert relative_error(leave_one_out_advantage(reward), rloo) <= 1e-14
    with pytest.raises(ValueError, match="use at least two"):
        leave_one_out_advantage(reward[:, :1])


def test_a_constant_cancels_in_every_advantage():
    """Hence RLP's baseline, the same for a group, cannot change the published gradient; after a clip it can."""
    shift = tensor([[0.7, -3.0]])
    for advantage in (leave_one_out_advantage, group_mean_advantage, standardised_advantage):
        assert relative_error(advantage(REWARD_BKM + shift), advantage(REWARD_BKM)) <= 1e-14
        clipped = (advantage((REWARD_BKM + s).clamp(-2, 2)) for s in (0.0, shift))
        assert relative_error(*clipped) > 0.1


def test_standardised_advantage():
    got = standardised_advantage(REWARD_BKM, eps=0.0)
    deviation = math.sqrt((9 + 9) / 2)
    expected = tensor([[-1.0, 3 / deviation], [0.0, -3 / deviation], [1.0, 0.0]])
    assert relative_error(got, expected) <= 1e-15
    assert torch.equal(standardised_advantage(torch.ones(1, 4, 1)), torch.zeros(1, 4, 1))


def test_positive_part():
    assert torch.equal(positive_part(tensor(-1.0, 0.0, 2.0)), tensor(0.0, 0.0, 2.0))


def test_has_variance():
    assert has_variance(tensor([[1.0, 4.0], [1.0, 5.0]])).tolist() == [[[False, True]]]


def test_reinforce():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantage = torch.tensor([0.5, 3.0], requires_grad=True)
    loss = reinforce(logprobs, advantage)
    assert loss.item() == 6.5
    loss.backward()
    assert torch.equal(logprobs.grad, torch.tensor([-0.5, -3.0]))
    assert advantage.grad is None


def test_clipped_surrogate():
    """Ratios 0.5, 0.9, 1, 1.2, 2 with ε_low = 0.2, ε_high = 0.3, for a positive and a negative advantage."""
    ratio = tensor(0.5, 0.9, 1.0, 1.2, 2.0)
    old = tensor(-1.0, -2.0, -0.5, -3.0, -1.5)
    for advantage, expected, flows in (
        (2.0, [-1.0, -1.8, -2.0, -2.4, -2.6], [1, 1, 1, 1, 0]),
        (-2.0, [1.6, 1.8, 2.0, 2.4, 4.0], [0, 1, 1, 1, 1]),
    ):
        logprobs = (old + ratio.log()).requires_grad_()
        surrogate = clipped_surrogate(logprobs, old, tensor(advantage), 0.2, 0.3)
        assert relative_error(surrogate, tensor(*expected)) <= 1e-14
        (gradient,) = torch.autograd.grad(surrogate.sum(), logprobs)
        assert relative_error(gradient, -advantage * ratio * tensor(*flows)) <= 1e-14


def test_kl_to_reference_is_unbiased():
    """Its mean over the policy is the exact divergence, and its gradient at equality zero."""
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    mean = (policy * kl_to_reference(policy.log(), reference.log())).sum()
    exact = (policy * (policy / reference).log()).sum()
    assert relative_error(mean, exact) <= 1e-14
    logprobs = policy.log().requires_grad_()
    (gradient,) = torch.autograd.grad(kl_to_reference(logprobs, policy.log()).sum(), logprobs)
    assert gradient.abs().max() <= 1e-15


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (b" the", True),
        (b" the cat", True),
        (b" the c", True),
        (b" the ca", False),  # ends inside a token
        (b" the cat sat", True),
        (b" the cat sat on", False),  # longer than what there is
        (b"the", False),
        (b"", False),
        (None, False),
        (" the cat sat é".encode()[:-1], False),
    ],
)
def test_prefix_match(predicted, expected):
    assert prefix_match(predicted, [b" the", b" c", b"at", b" sat"]) is expected
    # Cut off there, it cannot be told; but what already differs is wrong.
    cut = None if predicted and len(predicted) > len(b" the cat sat") else expected
    assert prefix_match(predicted, [b" the", b" c", b"at", b" sat"], goes_on=True) is cut


def test_prefix_match_ends_before_a_control_token_and_reads_no_further_than_the_prediction():
    assert prefix_match(b" the cat", [b" the", None, b" cat"], goes_on=True) is False
    assert prefix_match(b" the", [b" the", None]) is True

    def endless():
        yield from [b" the", b" cat", b" sat"]
        raise AssertionError("read on")

    assert [prefix_match(p, endless()) for p in (b" the cat sat", b" the cats", b"no")] == [True, False, False]


def test_prefix_match_compares_bytes_not_characters():
    halves = ["é".encode()[:1], "é".encode()[1:], b"!"]
    assert prefix_match(halves[0], halves)
    assert prefix_match("é".encode(), halves)
    assert not prefix_match("e\N{COMBINING ACUTE ACCENT}".encode(), halves)
    assert not prefix_match("é".encode(), [])
