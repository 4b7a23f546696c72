"""The FLOPs a step spends, counted from shapes: matrix products only, a multiply-add as two.

Attention counts the query-key pairs that may see each other, not what a kernel wastes. Backward costs twice its
forward, and the vocabulary's part three times: chunked log-probs compute their logits again. So do blocks under
activation checkpointing, counted whole: in mixed precision they are, in fp32 all but their last product.
"""

from __future__ import annotations

from collections import Counter

from models.decoder import Decoder
from models.thoughts import Anchors, Text


class Ledger:
    """Adds up a step's FLOPs by what they were spent on: `text`, `rollout`, `thoughts`, `vocabulary`, `mixing`."""

    def __init__(self, decoder: Decoder):
        self.config = decoder.config
        # Forward and backward of a block, in units of its forward.
        self.block_units = 4 if decoder.activation_checkpointing else 3
        self.spent: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.spent.values())

    def blocks(self, tokens: int) -> int:
        """Forward FLOPs of the linear layers of all blocks."""
        c = self.config
        attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
        return 2 * c.layers * (attention + 3 * c.width * c.ffn_width) * tokens

    def attention(self, pairs: int) -> int:
        """Forward FLOPs of attention over so many query-key pairs, in all layers and heads."""
        return 4 * self.config.layers * self.config.heads * self.config.head_dim * pairs

    def read(self, text: Text, backward: bool) -> None:
        B, N = text.shape
        pairs = sum((end - start) * (end - start + 1) // 2 for _, start, end in text.spans)
        self.spent["text"] += (self.blocks(B * N) + self.attention(pairs)) * (self.block_units if backward else 1)

    def think(self, anchors: Anchors, K: int, S: int, backward: bool, stage: str = "thoughts") -> None:
        """S tokens of each of K thoughts at every anchor, in one pass or step by step."""
        B, M = anchors.index_BM.shape
        text_pairs = K * S * sum(end - start for _, _, start, end in anchors.prefixes)
        own_pairs = B * M * K * S * (S + 1) // 2
        spent = self.blocks(B * M * K * S) + self.attention(text_pairs + own_pairs)
        self.spent[stage] += spent * (self.block_units if backward else 1)

    def vocabulary(self, rows: int, backward: bool, stage: str = "vocabulary") -> None:
        """Log-probs of, or samples for, so many hidden states."""
        self.spent[stage] += 2 * self.config.vocab_size * self.config.width * rows * (4 if backward else 1)

    def mixing(self, text_rows: int, thought_rows: int, backward: bool) -> None:
        """The mixing head: half its first layer on text hidden states, the rest on thought hidden states."""
        W = self.config.width
        forward = 2 * (W * W * text_rows + (2 * W * W + W) * thought_rows)
        self.spent["mixing"] += forward * (3 if backward else 1)
