"""The bytes that a decoder takes, by arithmetic: what a pass keeps for its backward, keys and values, what backward
needs beside. Tests count the same with torch's own hooks.

Sizes are those of the dtype `activations` are in; what norms and attention keep beside them is fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch

from models.decoder import DecoderConfig
from models.precision import accumulation_dtype


def keys_and_values(config: DecoderConfig, activations: torch.dtype) -> int:
    """Of a token, in all layers."""
    return config.layers * 2 * config.kv_heads * config.head_dim * activations.itemsize


def kept_by_block(config: DecoderConfig, activations: torch.dtype) -> int:
    """Of a token that went through one block with gradient: the inputs of its norms and products, gate and up
    projection, queries, keys, values and what attention makes of them; of norms a factor each, of attention a
    log-sum-exp for each head. Where heads are normed, queries and keys before that, too."""
    c, element, wide = config, activations.itemsize, accumulation_dtype(activations).itemsize
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    kept = 4 * c.width + 2 * queries + 2 * keys + 3 * c.ffn_width
    factors = 2 + c.heads
    if c.qk_norm or c.qk_norm_all_heads:
        kept += queries + keys
        factors += c.heads + c.kv_heads if c.qk_norm else 2
    return kept * element + factors * wide


def kept(config: DecoderConfig, activations: torch.dtype, checkpointing: bool) -> int:
    """Of a token that went through all blocks and the last norm with gradient, with its id, its rotation and the hidden
    state that it ends as. With `checkpointing`, of each block its input, and its keys and values, which thoughts see:
    backward makes `kept_by_block` of one block at a time again."""
    c, element = config, activations.itemsize
    ends = 8 + (2 * c.head_dim + 2 * c.width) * element + accumulation_dtype(activations).itemsize
    if checkpointing:
        return c.layers * c.width * element + keys_and_values(c, activations) + ends
    return c.layers * kept_by_block(c, activations) + ends


def beside_backward(config: DecoderConfig, activations: torch.dtype) -> int:
    """Of a token, while backward is at the gate of a block, more than the block kept: the gradients of what the block
    gave, and of gate and up projection, beside the product that it has freed and the gate's activation."""
    return (config.width + 2 * config.ffn_width) * activations.itemsize
