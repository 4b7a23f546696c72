"""The FLOPs that are spent, counted where the work is done: matrix products only, a multiply-add as two.

    with Ledger() as ledger:
        ...
    ledger.total

Attention counts the query-key pairs that may see each other, not what a kernel wastes. A pass with gradient counts its
backward too: twice its forward, and three times for the vocabulary, since chunked log-probs compute their logits again.
So do blocks under activation checkpointing, counted whole: in mixed precision they are, in fp32 all but their last
product. Counting reads shapes alone, and nothing is counted outside a ledger.
"""

from __future__ import annotations

from collections import Counter
from typing import Self

import torch
from torch import Tensor

from models.decoder import Decoder, DecoderConfig
from models.thoughts import Anchors, Text

_open: list[Ledger] = []


class Ledger:
    """Adds up the FLOPs of all that is done within it, by what they were spent on.

    `text`: reading; `rollout`: sampling thoughts, the head included; `thoughts`: passes over whole thoughts;
    `vocabulary`: log-probs, entropies and predictions; `mixing`: the mixing head. Ledgers may be nested: each counts.
    """

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.spent.values())

    def __enter__(self) -> Self:
        _open.append(self)
        return self

    def __exit__(self, *_) -> None:
        _open.remove(self)


def _spend(stage: str, flops: int) -> None:
    for ledger in _open:
        ledger.spent[stage] += flops


def blocks(config: DecoderConfig, tokens: int) -> int:
    """Forward FLOPs of the linear layers of all blocks."""
    c = config
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return 2 * c.layers * (attention + 3 * c.width * c.ffn_width) * tokens


def attention(config: DecoderConfig, pairs: int) -> int:
    """Forward FLOPs of attention over so many query-key pairs, in all layers and heads."""
    return 4 * config.layers * config.heads * config.head_dim * pairs


def _passes(decoder: Decoder) -> int:
    """Forward, backward and recomputation of a block, in units of its forward."""
    if not torch.is_grad_enabled():
        return 1
    return 4 if decoder.activation_checkpointing else 3


def count_read(decoder: Decoder, text: Text) -> None:
    """One pass over a text."""
    if _open:
        B, N = text.shape
        pairs = sum((end - start) * (end - start + 1) // 2 for _, start, end in text.spans)
        _spend("text", _passes(decoder) * (blocks(decoder.config, B * N) + attention(decoder.config, pairs)))


def _thinking(config: DecoderConfig, anchors: Anchors, K: int, S: int) -> int:
    """S tokens of each of K thoughts at every anchor, in one pass or step by step."""
    B, M = anchors.index_BM.shape
    text_pairs = K * S * sum(end - start for _, _, start, end in anchors.prefixes)
    own_pairs = B * M * K * S * (S + 1) // 2
    return blocks(config, B * M * K * S) + attention(config, text_pairs + own_pairs)


def count_think(decoder: Decoder, anchors: Anchors, K: int, S: int) -> None:
    """One pass over whole thoughts of S tokens."""
    if _open:
        _spend("thoughts", _passes(decoder) * _thinking(decoder.config, anchors, K, S))


def count_rollout(decoder: Decoder, anchors: Anchors, K: int, S: int, steps: int) -> None:
    """S tokens of each thought went through the model, and one was sampled for each thought at every step."""
    if _open:
        c = decoder.config
        head = 2 * c.vocab_size * c.width * anchors.index_BM.numel() * K * steps
        _spend("rollout", _thinking(c, anchors, K, S) + head)


def count_vocabulary(rows: int, head_weight_VW: Tensor) -> None:
    """The vocabulary's log-probs for so many hidden states."""
    _spend("vocabulary", 2 * head_weight_VW.numel() * rows * (4 if torch.is_grad_enabled() else 1))


def count_mixing(width: int, text_rows: int, thought_rows: int) -> None:
    """The mixing head: half its first layer on text hidden states, the rest on thought hidden states."""
    forward = 2 * (width * width * text_rows + (2 * width * width + width) * thought_rows)
    _spend("mixing", forward * (3 if torch.is_grad_enabled() else 1))
