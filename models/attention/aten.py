"""Attention of text and thoughts from the flash kernels inside torch, for CPU and CUDA: merged.py says how.

Shapes as in merged.Kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.attention.merged import Kernels, MergedAttention, Sequences
from models.precision import accumulation_dtype
from models.thoughts import Anchors


def supports(
    q: Tensor, k: Tensor, anchors: Anchors | None, differentiable: bool, filled: bool = False
) -> tuple[bool, str]:
    """Whether these kernels support a call, and why not: thoughts q [B, K, S, M, H, D] and k [B, K, T, M, G, D] at
    `anchors`, or text q [B, N, H, D] and k [B, N, G, D] without; `differentiable` if a gradient may be needed,
    `filled` if the number of own tokens is on the device."""
    if anchors is not None and q.shape[2] not in (1, k.shape[2]):
        S, T = q.shape[2], k.shape[2]
        return False, f"{S} query tokens for {T} key tokens: neither one step nor the whole thought"
    if filled and (q.device.type != "cuda" or anchors is None or anchors.window is not None):
        return False, "the number of own tokens is read on the device by CUDA kernels for a few anchors"
    if q.device.type == "cpu":
        if q.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return True, "flash kernel for CPU"
        return False, f"no CPU flash kernel for {q.dtype}"
    if q.device.type == "cuda":
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            return False, "the CUDA flash kernel takes GPUs of compute capability 8.0 and above"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return False, f"the CUDA flash kernel takes bf16 and fp16, not {q.dtype}"
        if q.shape[-1] % 8 or q.shape[-1] > 256:
            return False, f"the CUDA flash kernel takes head sizes that are multiples of 8 up to 256, not {q.shape[-1]}"
        return True, "flash kernel for CUDA"
    return False, f"no flash kernel for {q.device.type}"


SHORT = 192


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal
    )
    return out.transpose(1, 2), lse


def _cpu_backward(grad, q, k, v, out, lse, causal) -> tuple[Tensor, Tensor, Tensor]:
    # Backward of many short sequences takes this kernel longer in bf16 than in fp32: nine times as long at 16 tokens,
    # four times at 66, no longer at 192.
    dtype = accumulation_dtype(q.dtype) if q.shape[1] <= SHORT else q.dtype
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2).to(dtype) for x in (grad, q, k, v, out)), lse, 0.0, causal
    )
    dq, dk, dv = (g.transpose(1, 2).to(q.dtype) for g in grads)
    return dq, dk, dv


def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    sequences: Sequences | None = None,
    filled_1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if filled_1 is not None:
        return _cuda_filled(q, k, v, filled_1)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *(sequences or (None, None, q.shape[1], k.shape[1])), 0.0, causal, False
    )
    return out, lse


def _cuda_filled(q: Tensor, k: Tensor, v: Tensor, filled_1: Tensor) -> tuple[Tensor, Tensor]:
    # Only sequences of several lengths may use fewer keys than there are.
    b, s, t = *q.shape[:2], k.shape[1]
    starts = torch.arange(b + 1, dtype=torch.int32, device=q.device)
    rows = (x.flatten(0, 1) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *rows, starts * s, starts * t, s, t, 0.0, False, False, seqused_k=filled_1.expand(b).contiguous()
    )
    return out.unflatten(0, (b, s)), lse.unflatten(1, (b, s)).transpose(0, 1)


def _cuda_backward(
    grad, q, k, v, out, lse, causal, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = sequences or (None, None, q.shape[1], k.shape[1])
    no_rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), *lengths, 0.0, causal, no_rng, no_rng
    )


CUDA = Kernels(_cuda, _cuda_backward, varlen=True)
_attention = MergedAttention({"cpu": Kernels(_cpu, _cpu_backward), "cuda": CUDA})
text_attention = _attention.text_attention
thought_attention = _attention.thought_attention
dense_part = _attention.dense_part
thought_gradients = _attention.thought_gradients
