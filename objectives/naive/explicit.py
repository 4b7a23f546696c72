"""What the loops need: documents as lists of token ids, and a language model on one explicit sequence at a time.

Shapes: S tokens of a sequence, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.thinking import ThinkingModel
from models.thoughts import Text


@dataclass(frozen=True)
class Document:
    """tokens: of one document. uniform: (position, thought, token) → the draw in (0, 1) that belongs to that place.
    goes_on: behind its tokens it goes on, unknown how."""

    tokens: list[int]
    uniform: Callable[[int, int, int], float]
    goes_on: bool = False


def hidden_states(model: ThinkingModel, tokens: Sequence[int]) -> Tensor:
    """[S, W], one causal pass over the sequence alone; START and END stand for the delimiters."""
    sequence = Text.from_rows(torch.tensor([list(tokens)]))
    x_1SW = model.embed_thoughts(sequence.tokens_BN[:, None, :, None])[:, 0, :, 0]
    return model.decoder.read_embedded(x_1SW, sequence).hidden_BNW[0]


def log_probs(
    model: ThinkingModel, tokens: Sequence[int], temperature: float = 1.0, banned: Sequence[int] = ()
) -> Tensor:
    """[S, V], of the token that follows each token of the sequence."""
    logits_SV = hidden_states(model, tokens) @ model.head_weight_VW.T / temperature
    logits_SV[:, list(banned)] = -torch.inf
    return logits_SV.log_softmax(-1)


@torch.no_grad()
def sample(
    model: ThinkingModel,
    context: Sequence[int],
    length: int,
    draw: Callable[[int], float],
    temperature: float = 1.0,
    banned: Sequence[int] = (),
    end: Sequence[int] = (),
) -> list[int]:
    """Up to `length` tokens behind the context, until the last of them are `end`, by inverting the distribution at
    draw(0), draw(1), …"""
    sampled: list[int] = []
    for i in range(length):
        probabilities_V = log_probs(model, [*context, *sampled], temperature, banned)[-1].exp()
        sampled.append(int((probabilities_V.cumsum(0) <= draw(i)).sum()))
        if end and sampled[-len(end) :] == list(end):
            break
    return sampled
