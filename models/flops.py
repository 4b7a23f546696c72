"""The FLOPs that are spent, counted where the work is done: matrix products only, a multiply-add as two.

    with Ledger() as ledger:
        ...
    ledger.total

Attention counts the query-key pairs that may see each other, not what a kernel wastes, and a thought counts until it
ends: the padding behind it, and anchors that are padding, cost nothing here. So a step costs the same however it is
cut, and a control at equal FLOPs is not given compute that no thought had.

A pass with gradient counts its backward too: twice its forward, and three times for the vocabulary, since chunked
log-probs compute their logits again. So do blocks under activation checkpointing, counted whole: in mixed precision
they are, in fp32 all but their last product. Counting reads shapes and lengths alone, and nothing is counted outside a
ledger.
"""

from __future__ import annotations

from collections import Counter
from typing import Self, TypeVar

import torch
from torch import Tensor

from models.decoder import Decoder, DecoderConfig
from models.thoughts import Anchors, Text, Thoughts

_open: list[Ledger] = []


class Ledger:
    """Adds up the FLOPs of all that is done within it, by what they were spent on.

    `text`: reading; `rollout`: sampling thoughts, the head included; `thoughts`: passes over whole thoughts;
    `vocabulary`: log-probs, entropies and predictions; `mixing`: the mixing head. Ledgers may be nested: each counts.
    """

    recomputed: int  # of the total, so much computes again what was computed before: a model's FLOPs are the rest

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.recomputed = 0

    @property
    def total(self) -> int:
        return sum(self.spent.values())

    def __enter__(self) -> Self:
        _open.append(self)
        return self

    def __exit__(self, *_) -> None:
        _open.remove(self)


def _spend(stage: str, forward: int, passes: int = 1) -> None:
    for ledger in _open:
        ledger.spent[stage] += passes * forward
        ledger.recomputed += max(0, passes - 3) * forward


Number = TypeVar("Number", int, float)


def blocks(config: DecoderConfig, tokens: Number) -> Number:
    """Forward FLOPs of the linear layers of all blocks."""
    c = config
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return 2 * c.layers * (attention + 3 * c.width * c.ffn_width) * tokens


def attention(config: DecoderConfig, pairs: Number) -> Number:
    """Forward FLOPs of attention over so many query-key pairs, in all layers and heads."""
    return 4 * config.layers * config.heads * config.head_dim * pairs


def vocabulary(size: int, width: int, rows: Number) -> Number:
    """Forward FLOPs of the logits of so many hidden states."""
    return 2 * size * width * rows


def mixing(width: int, text_rows: Number, thought_rows: Number) -> Number:
    """Forward FLOPs of the mixing head: half its first layer on text hidden states, the rest on those of thoughts."""
    return 2 * (width * width * text_rows + (2 * width * width + width) * thought_rows)


def _passes(decoder: Decoder, again: bool = False) -> int:
    """Forward, backward and recomputation of a block, in units of its forward; `again`: of the whole pass, too."""
    if not torch.is_grad_enabled():
        return 1
    return 3 + decoder.activation_checkpointing + again


def count_read(decoder: Decoder, text: Text) -> None:
    """One pass over a text."""
    if _open:
        B, N = text.shape
        pairs = sum((end - start) * (end - start + 1) // 2 for _, start, end in text.spans)
        _spend("text", blocks(decoder.config, B * N) + attention(decoder.config, pairs), _passes(decoder))


def _thinking(config: DecoderConfig, anchors: Anchors, tokens_BKM: Tensor) -> int:
    """So many tokens of each thought, in one pass or step by step."""
    start_BM, end_BM = anchors.visible_BM
    prefix_B1M = (end_BM - start_BM).clamp(min=0)[:, None]
    tokens_BKM = tokens_BKM * (anchors.index_BM >= 0)[:, None]
    pairs_BKM = tokens_BKM * prefix_B1M + tokens_BKM * (tokens_BKM + 1) // 2
    tokens, pairs = torch.stack([tokens_BKM.sum(), pairs_BKM.sum()]).tolist()
    return blocks(config, tokens) + attention(config, pairs)


def count_think(decoder: Decoder, thoughts: Thoughts, again: bool = False) -> None:
    """One pass over whole thoughts, which backward computes `again`. Synchronises with the host."""
    if _open:
        forward = _thinking(decoder.config, thoughts.anchors, thoughts.lengths_BKM)
        _spend("thoughts", forward, _passes(decoder, again))


def count_rollout(decoder: Decoder, thoughts: Thoughts, sampled_BKSM: Tensor) -> None:
    """Thoughts were sampled: all their tokens but the last went through the model, and the vocabulary for each that is
    marked. Synchronises with the host."""
    if _open:
        c = decoder.config
        head = vocabulary(c.vocab_size, c.width, int(sampled_BKSM.sum()))
        _spend("rollout", _thinking(c, thoughts.anchors, thoughts.lengths_BKM - 1) + head)


def count_vocabulary(rows: int, head_weight_VW: Tensor) -> None:
    """The vocabulary's log-probs for so many hidden states."""
    V, W = head_weight_VW.shape
    _spend("vocabulary", vocabulary(V, W, rows), 4 if torch.is_grad_enabled() else 1)


def count_mixing(width: int, text_rows: int, thought_rows: int) -> None:
    """The mixing head on text and thought hidden states."""
    _spend("mixing", mixing(width, text_rows, thought_rows), 3 if torch.is_grad_enabled() else 1)
