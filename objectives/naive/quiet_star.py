"""Quiet-STaR (Zelikman et al., arXiv 2403.09629, Algorithm 1) as a plain loop.

Where the paper is silent, it does what the public code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from models.thinking import ThinkingModel
from models.thoughts import END, START
from objectives.naive.explicit import Document, hidden_states, log_probs, sample


def quiet_star_loss(
    model: ThinkingModel,
    documents: Sequence[Document],
    *,
    K: int,
    L: int,
    A: int,
    banned: Sequence[int] = (),
    policy_temperature: float = 3.0,
    policy_weight: float = 1e6,
) -> Tensor:
    """The loss of a batch of documents: K thoughts of L sampled tokens at every token, each predicting A tokens."""
    assert model.mixing_head is not None
    text_ce: list[Tensor] = []
    mixed_ce: list[list[Tensor]] = [[] for _ in range(A)]  # by lookahead
    policy: list[Tensor] = []
    for document in documents:
        tokens = document.tokens
        h_text = hidden_states(model, tokens)

        def cross_entropy(h: Tensor, token: int) -> Tensor:
            return -(h @ model.head_weight_VW.T).log_softmax(-1)[token]

        ce = [cross_entropy(h_text[n], token) for n, token in enumerate(tokens[1:])]
        text_ce += ce
        for j in range(len(tokens) - 1):
            context, ahead = tokens[: j + 1], tokens[j + 1 : j + 1 + A]
            thoughts, rewards = [], []
            for k in range(K):
                # start, L sampled tokens, end, and the true tokens that are read while the next ones are predicted
                c = sample(model, [*context, START], L, partial(document.uniform, j, k), banned=banned)
                h_thought = hidden_states(model, [*context, START, *c, END, *ahead[:-1]])[len(context) + L + 1 :]
                reward = torch.zeros(())
                for s, token in enumerate(ahead):
                    # h = (1 − w)·h_text + w·h_thought, with the text hidden state of position j + s
                    w = model.mixing_head(h_text[j + s], h_thought[s])
                    mixed = cross_entropy((1 - w) * h_text[j + s] + w * h_thought[s], token)
                    mixed_ce[s].append(mixed)
                    reward = reward + (ce[j + s] - mixed).detach()
                thoughts.append(c)
                rewards.append(reward)

            # advantage = max(0, r − mean over the K thoughts of the position)
            baseline = sum(rewards) / K if K > 1 else 0.0
            for c, reward in zip(thoughts, rewards, strict=True):
                advantage = (reward - baseline).clamp(min=0)
                logprobs = log_probs(model, [*context, START, *c], policy_temperature, banned)
                for i, token in enumerate(c):
                    policy.append(-advantage * logprobs[len(context) + i, token])

    nll_text = torch.stack(text_ce).mean()
    nll_thought = torch.stack([torch.stack(by_lookahead).mean() for by_lookahead in mixed_ce if by_lookahead]).sum() / A
    return 0.5 * nll_text + 0.5 * nll_thought + policy_weight * torch.stack(policy).mean()
