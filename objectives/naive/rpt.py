"""RPT (Dong et al., arXiv 2506.08007) as a plain loop, with GRPO's loss (2402.03300).

The model is a base model that is given its tags: it writes the thought, and then what is in the box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.thinking import ThinkingModel
from objectives.naive.explicit import Document, log_probs, sample

POSITION = 2**31  # the "thought" whose draw at a position says how soon that position is picked


def rpt_loss(
    model: ThinkingModel,
    documents: Sequence[Document],
    token_bytes: Sequence[bytes | None],
    *,
    G: int,
    length: int,
    answer_length: int,
    temperature: float,
    opening: Sequence[int],
    closing: Sequence[int],
    box: tuple[Sequence[int], Sequence[int]] = ((), ()),
    banned: Sequence[int] = (),
    positions: int = 1,
    hard_entropy: float = 1.0,
    drop_zero_variance: bool = False,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Tensor:
    """The loss of a batch of documents: G responses at each of up to `positions` hard positions of a document."""
    losses = []
    for document in documents:
        for t in hard_positions(model, document, token_bytes, hard_entropy)[:positions]:
            context, truth = document.tokens[:t], document.tokens[t:]
            responses, rewards = [], []
            for i in range(G):
                response = Response(model, document, t, i, list(opening), temperature, banned)
                if not response.go_on(length, closing):
                    response.tokens += closing
                response.tokens += box[0]
                first = len(response.tokens)
                complete = response.go_on(answer_length, box[1])
                said = response.tokens[first : len(response.tokens) - len(box[1])]
                responses.append(response)
                rewards.append(reward(said, truth, document.goes_on, token_bytes) if complete else 0.0)

            # A_i = (r_i − r̄) / std(r); what is undecided has the mean of the others as its reward.
            r = torch.tensor(rewards, dtype=torch.float64)
            r = torch.where(r.isnan(), r.nanmean().nan_to_num(), r)
            if drop_zero_variance and r.min() == r.max():
                continue
            advantages = (r - r.mean()) / (r.std() + 1e-6)
            for o, A in zip(responses, advantages, strict=True):
                policy = log_probs(model, [*context, *o.tokens], temperature, banned)
                logprob = torch.stack([policy[len(context) + u - 1, o.tokens[u]] for u in o.sampled])
                rho = (logprob - logprob.detach()).exp()
                surrogate = torch.minimum(rho * A, rho.clamp(1 - eps_low, 1 + eps_high) * A)
                losses.append(-surrogate.sum() / len(o.sampled))
    return torch.stack(losses).mean()


@torch.no_grad()
def hard_positions(
    model: ThinkingModel, document: Document, token_bytes: Sequence[bytes | None], least: float
) -> list[int]:
    """Positions whose next token has at least that entropy over the 16 likeliest, in an order drawn for them."""
    found = []
    for t in range(1, len(document.tokens)):
        top = log_probs(model, document.tokens[:t])[-1].topk(16).values.log_softmax(-1)
        if -(top.exp() * top).sum() >= least and token_bytes[document.tokens[t]] is not None:
            found.append(t)
    return sorted(found, key=lambda t: document.uniform(t - 1, POSITION, 0))


def reward(said: Sequence[int], truth: Sequence[int], goes_on: bool, token_bytes: Sequence[bytes | None]) -> float:
    """1 for a prefix of the true continuation that ends where one of its tokens ends, else 0; nan, undecided, for what
    is longer than a continuation that `goes_on`, and right up to there."""
    spelled = [token_bytes[token] for token in said]
    prediction, text = b"".join(b for b in spelled if b is not None), b""
    if prediction == b"" or None in spelled:
        return 0.0
    for token in truth:
        token_text = token_bytes[token]
        if token_text is None:
            return 0.0
        text += token_text
        if prediction == text:
            return 1.0
    return torch.nan if goes_on and prediction.startswith(text) else 0.0


@dataclass
class Response:
    """Response i at position t as far as it is written. sampled: which of its tokens were."""

    model: ThinkingModel
    document: Document
    t: int
    i: int
    tokens: list[int]
    temperature: float
    banned: Sequence[int]
    sampled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.opening = len(self.tokens)

    def go_on(self, length: int, end: Sequence[int]) -> bool:
        """Samples up to so many tokens; whether the end was reached. A draw belongs to its token's place."""
        first, context = len(self.tokens), self.document.tokens[: self.t]

        def draw(u: int) -> float:
            return self.document.uniform(self.t - 1, self.i, first - self.opening + u)

        more = sample(self.model, [*context, *self.tokens], length, draw, self.temperature, self.banned, end)
        self.tokens += more
        self.sampled += range(first, len(self.tokens))
        return not end or more[-len(end) :] == list(end)
