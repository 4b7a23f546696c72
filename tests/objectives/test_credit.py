"""Credit formulas against numbers worked out by hand."""

from __future__ import annotations

import torch

from objectives.credit import group_mean_advantage, positive_part, reinforce


def test_group_mean_advantage():
    reward = torch.tensor([[[1.0, 4.0], [3.0, -2.0], [5.0, 1.0]]], dtype=torch.float64)
    expected = torch.tensor([[[-2.0, 3.0], [0.0, -3.0], [2.0, 0.0]]], dtype=torch.float64)
    assert torch.equal(group_mean_advantage(reward), expected)
    assert torch.equal(group_mean_advantage(reward[:, :1]), reward[:, :1])


def test_positive_part():
    assert torch.equal(positive_part(torch.tensor([-1.0, 0.0, 2.0])), torch.tensor([0.0, 0.0, 2.0]))


def test_reinforce():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantage = torch.tensor([0.5, 3.0], requires_grad=True)
    loss = reinforce(logprobs, advantage)
    assert loss.item() == 6.5
    loss.backward()
    assert torch.equal(logprobs.grad, torch.tensor([-0.5, -3.0]))
    assert advantage.grad is None
