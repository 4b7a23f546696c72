"""Attention of text and thoughts from torch's FlexAttention, compiled, for CUDA.

One call over all keys a query may see, so nothing is merged: the keys are the text and, behind it, the tokens of all
thoughts of the row, anchor by anchor, and a mask says what is visible. Blocks of 128 × 128 of which nothing is visible
are skipped: useful are 43 %, 74 % and 85 % of what is computed for 16 tokens at each of 256, 1024 and 2048 positions.
Padding must hold numbers: what is hidden weighs 0, and 0 · NaN is NaN.

Shapes as in reference.py, and Q queries and J keys of a row.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.attention.caching import kept_with_first
from models.thoughts import Anchors, Text


def supports(
    q: Tensor, k: Tensor, anchors: Anchors | None, differentiable: bool, filled: bool = False
) -> tuple[bool, str]:
    """As aten.supports."""
    if q.device.type != "cuda":
        return False, f"FlexAttention is compiled for CUDA here, not for {q.device.type}"
    if filled:
        return False, "FlexAttention has the number of own tokens in its mask, which the host makes"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"FlexAttention takes fp32, bf16 and fp16, not {q.dtype}"
    if q.shape[-1] < 16:
        return False, f"FlexAttention takes head sizes from 16, not {q.shape[-1]}"
    if importlib.util.find_spec("triton") is None:
        return False, "FlexAttention needs triton; install the extra 'kernels'"
    return True, "FlexAttention"


def text_attention(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, text: Text) -> Tensor:
    """As reference.text_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BNGD, v_BNGD))
    return _attend(q, k, v, _text_mask(text)).transpose(1, 2)


def thought_attention(
    q_BKSMHD: Tensor,
    k_BKTMGD: Tensor,
    v_BKTMGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    anchors: Anchors,
) -> Tensor:
    """As reference.thought_attention."""
    B, K, S, M, H, D = q_BKSMHD.shape
    q_BHQD, k_own, v_own = (x.movedim(3, 1).flatten(1, 3).transpose(1, 2) for x in (q_BKSMHD, k_BKTMGD, v_BKTMGD))
    k_BGJD, v_BGJD = (
        torch.cat([text.transpose(1, 2), own], dim=2) for text, own in ((k_text_BNGD, k_own), (v_text_BNGD, v_own))
    )
    out_BHQD = _attend(q_BHQD, k_BGJD, v_BGJD, _thought_mask(anchors, K, S, k_BKTMGD.shape[2]))
    return out_BHQD.transpose(1, 2).unflatten(1, (M, K, S)).movedim(1, 3)


# Masks read what they compare from tensors: a mask that held the sizes as integers would be compiled anew at each
# length of a thought.


@kept_with_first
def _text_mask(text: Text) -> BlockMask:
    start_BQ, end_BQ = Anchors.everywhere(text).visible_BM

    def visible(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        return (start_BQ[b, q] <= j) & (j < end_BQ[b, q])

    B, N = text.shape
    return _block_mask(visible, B, N, N, start_BQ.device)


@kept_with_first
def _thought_mask(anchors: Anchors, K: int, S: int, T: int) -> BlockMask:
    (B, M), N, device = anchors.index_BM.shape, anchors.text.shape[1], anchors.index_BM.device
    start_BQ, end_BQ = (x.repeat_interleave(K * S, dim=1) for x in anchors.visible_BM)
    thought = torch.arange(M * K, device=device)
    thought_Q, slot_Q = thought.repeat_interleave(S), torch.arange(T - S, T, device=device).repeat(M * K)
    # Text belongs to no thought.
    thought_J = torch.cat([thought.new_full((N,), -1), thought.repeat_interleave(T)])
    slot_J = torch.cat([thought.new_zeros(N), torch.arange(T, device=device).repeat(M * K)])

    def visible(b: Tensor, h: Tensor, q: Tensor, j: Tensor) -> Tensor:
        text = (start_BQ[b, q] <= j) & (j < end_BQ[b, q])
        return text | ((thought_Q[q] == thought_J[j]) & (slot_J[j] <= slot_Q[q]))

    return _block_mask(visible, B, M * K * S, N + M * K * T, device)


def _block_mask(visible, B: int, Q: int, J: int, device: torch.device) -> BlockMask:
    # Uncompiled it would materialise the mask, [B, Q, J].
    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(visible, B, None, Q, J, device=device)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    attend = _compiled(flex_attention) if q.device.type == "cuda" else flex_attention
    return attend(q, k, v, block_mask=mask, enable_gqa=True)


@functools.cache
def _compiled(function):
    # Each head size, dtype and kind of mask is compiled by itself. Beyond the limit, eight, dynamo runs the definition
    # instead without a word, and that holds all scores.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)
