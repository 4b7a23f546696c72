"""RLP's Algorithm 1 (Hatamizadeh et al., arXiv 2510.01265) as a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from models.thinking import ThinkingModel
from objectives.naive.explicit import Document, log_probs, sample

POSITION = 2**31  # the "thought" whose draw at a position says how soon that position is picked


def rlp_loss(
    model: ThinkingModel,
    teacher: ThinkingModel,
    documents: Sequence[Document],
    *,
    G: int,
    length: int,
    temperature: float,
    opening: Sequence[int],
    closing: Sequence[int],
    banned: Sequence[int] = (),
    positions: int = 1,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Tensor:
    """The loss of a batch of documents, with θ = `model` and φ = `teacher`.

    G thoughts of up to `length` tokens at `positions` positions of each document, between the ids `opening` and
    `closing`, sampled and scored without the ids `banned`.
    """
    losses = []
    for document in documents:
        # Pick positions t; the anchor is t − 1.
        candidates = range(1, len(document.tokens))
        for t in sorted(candidates, key=lambda t: document.uniform(t - 1, POSITION, 0))[:positions]:
            context, target = document.tokens[:t], document.tokens[t]

            # S_base = log p̄_φ(x_t | x_<t)
            with torch.no_grad():
                S_base = log_probs(teacher, context)[-1, target]

            # c_i ~ π_θ(· | x_<t), S_pred = log p_θ(x_t | x_<t, c_i), r_i = S_pred − S_base
            thoughts, rewards = [], []
            for i in range(G):
                c = sample(
                    model,
                    [*context, *opening],
                    length,
                    partial(document.uniform, t - 1, i),
                    temperature,
                    banned,
                    end=closing,
                )
                closed = c if c[-len(closing) :] == list(closing) else [*c, *closing]
                with torch.no_grad():
                    S_pred = log_probs(model, [*context, *opening, *closed])[-1, target]
                thoughts.append(c)
                rewards.append(S_pred - S_base)

            # A_i = G/(G−1) · (r_i − r̄)
            mean = sum(rewards) / G
            for c, r in zip(thoughts, rewards, strict=True):
                A = G / (G - 1) * (r - mean)

                # −1/|c_i| Σ_u min(ρ_u A_i, clip(ρ_u, 1−ε_l, 1+ε_h) A_i), on the first update of a rollout
                before = len(context) + len(opening) - 1
                policy = log_probs(model, [*context, *opening, *c], temperature, banned)
                logprob = torch.stack([policy[before + u, token] for u, token in enumerate(c)])
                rho = (logprob - logprob.detach()).exp()
                surrogate = torch.minimum(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)
                losses.append(-surrogate.sum() / len(c))
    return torch.stack(losses).mean()


@torch.no_grad()
def update_teacher(teacher: ThinkingModel, model: ThinkingModel, tau: float = 0.999) -> None:
    """φ ← τφ + (1−τ)θ, after every optimizer step."""
    for phi, theta in zip(teacher.parameters(), model.parameters(), strict=True):
        phi.mul_(tau).add_((1 - tau) * theta)
