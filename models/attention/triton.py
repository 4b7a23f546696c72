"""Attention of thoughts from the Triton kernels of this project, for CUDA and, in fp32 and fp16, Triton's interpreter.

Text attention uses the flash kernels of `aten`, and so does the text part of a dense rollout step. The kernel that
runs thought attention:

| anchors | call | forward | backward |
|---|---|---|---|
| everywhere | whole thoughts | `kernels.dense` | `kernels.dense` |
| everywhere | newest token | `aten` for the text, then `kernels.step` | none |
| a few | any | `kernels.decode` | `aten`, part by part, given the merged output and log-sum-exp |

Shapes as in reference.py. Triton is optional: it is not imported before the first call.
"""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from models.attention import aten
from models.attention.merged import MOST_AT_ONCE
from models.thoughts import Anchors, Text

HEAD_SIZES = (16, 32, 64, 128)
# What kernels.dense can hold of a position in one tile: queries and own keys.
MAX_ROWS, MAX_OWN = 128, 64


def supports(
    q: Tensor, k: Tensor, anchors: Anchors | None, differentiable: bool, filled: bool = False
) -> tuple[bool, str]:
    """As aten.supports."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; install the extra 'kernels'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreted):
        return False, f"triton kernels run on CUDA, or on CPU under TRITON_INTERPRET=1, not on {q.device.type}"
    if interpreted and q.dtype == torch.bfloat16:
        return False, "Triton's interpreter computes nonsense in bf16"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"the triton kernels take fp32, bf16 and fp16, not {q.dtype}"
    if anchors is None:
        return aten.supports(q, k, anchors, differentiable)
    if filled and anchors.dense:
        return False, "the triton kernel for a step at every position takes the number of own tokens from the host"
    if q.shape[-1] not in HEAD_SIZES:
        return False, f"the triton kernels take head sizes {', '.join(map(str, HEAD_SIZES))}, not {q.shape[-1]}"
    S, T, group = q.shape[2], k.shape[2], q.shape[4] // k.shape[4]
    if not anchors.dense:
        if anchors.index_BM.numel() > MOST_AT_ONCE:
            return (
                False,
                f"{anchors.index_BM.numel()} anchors are more than a grid takes; try objective.anchors_at_once",
            )
        if differentiable:
            return aten.supports(q, k, anchors, differentiable)
        return True, "triton kernels for thoughts at a few anchors"
    if S == T:
        if S * group > MAX_ROWS or S > MAX_OWN:
            return False, f"{S} tokens × {group} query heads of a group exceed a tile of {MAX_OWN} × {MAX_ROWS}"
        if math.prod(q.shape[2:]) >= 2**31:
            return False, "the queries of one thought of all positions exceed 32-bit offsets"
        return True, "triton kernel for whole thoughts at every position"
    if S > 1:
        return False, f"{S} query tokens for {T} key tokens: neither one step nor the whole thought"
    if differentiable:
        return False, "the triton kernel for a single step has no backward"
    return aten.supports(q, k, anchors, differentiable)


def text_attention(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, text: Text) -> Tensor:
    """As reference.text_attention."""
    return aten.text_attention(q_BNHD, k_BNGD, v_BNGD, text)


def thought_attention(
    q_BKSMHD: Tensor,
    k_BKTMGD: Tensor,
    v_BKTMGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    anchors: Anchors,
    filled_1: Tensor | None = None,
) -> Tensor:
    """As reference.thought_attention, where `supports` says so."""
    arguments = q_BKSMHD, k_BKTMGD, v_BKTMGD, k_text_BNGD, v_text_BNGD
    if not anchors.dense:
        if torch.is_grad_enabled():
            return _AtAFewAnchors.apply(*arguments, anchors)
        return _at_a_few_anchors(*arguments, anchors, filled_1)[0]
    if q_BKSMHD.shape[2] == k_BKTMGD.shape[2]:
        return _AtEveryPosition.apply(*arguments, anchors)
    return _step(*arguments, anchors)


class _AtEveryPosition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, k_text, v_text, anchors):
        from models.attention.kernels import dense

        inputs = tuple(x.contiguous() for x in (q, k, v, k_text, v_text))
        out, lse = dense.forward(*inputs, *anchors.visible_BM)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.anchors = anchors
        return out

    @staticmethod
    def backward(ctx, grad):
        from models.attention.kernels import dense

        q, k, v, k_text, v_text, out, lse = ctx.saved_tensors
        start, end = ctx.anchors.visible_BM
        document_end = ctx.anchors.text.document_end_BN
        grads = dense.backward(grad.contiguous(), q, k, v, k_text, v_text, start, end, document_end, out, lse)
        return *grads, None


class _AtAFewAnchors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, k_text, v_text, anchors):
        q, k_text, v_text = q.contiguous(), k_text.contiguous(), v_text.contiguous()
        out, lse = _at_a_few_anchors(q, k, v, k_text, v_text, anchors)
        ctx.save_for_backward(q, k, v, k_text, v_text, out, lse)
        ctx.anchors = anchors
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, k_text, v_text, out, lse = ctx.saved_tensors
        natural = lse * math.log(2.0)
        return *aten.thought_gradients(grad, q, k, v, k_text, v_text, out, natural, ctx.anchors), None


def _at_a_few_anchors(q, k, v, k_text, v_text, anchors, filled_1=None) -> tuple[Tensor, Tensor]:
    from models.attention.kernels import decode

    start_BM, end_BM = anchors.visible_BM
    q, k_text, v_text = q.contiguous(), k_text.contiguous(), v_text.contiguous()
    return decode.decode(q, k, v, k_text, v_text, start_BM, end_BM, filled_1)


def _step(q, k, v, k_text, v_text, anchors) -> Tensor:
    from models.attention.kernels import step

    B, K, _, N, H, D = q.shape
    out_text, lse_text = aten.dense_part(q.flatten(1, 2), k_text, v_text, anchors.text)
    out = step.add_private_keys(q[:, :, 0].contiguous(), k, v, out_text.contiguous(), lse_text.contiguous())
    return out[:, :, None]
