"""Attention of text and thoughts from the kernels of the flash-attn packages, for CUDA: merged.py says how.

It uses the first of these that is installed and supports the GPU:

| package | compute capability | reached through |
|---|---|---|
| FlashAttention-3 (`flash_attn_interface`) | 9.0 | torch's flash operator, which torch reroutes |
| FlashAttention-4 (`flash-attn-4`) | 9.0 and 10.0 | torch's flash operator, which torch reroutes |
| flash-attn 2 (`flash-attn`, 2.8 or later) | 8.0 and above | its own functions |

Rerouting holds for the process: once `flash` has run FlashAttention-3 or -4, `aten` and torch's scaled dot product
attention run it too.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from models.attention import aten
from models.attention.merged import Kernels, MergedAttention, Sequences
from models.thoughts import Anchors, Text


def supports(
    q: Tensor, k: Tensor, anchors: Anchors | None, differentiable: bool, filled: bool = False
) -> tuple[bool, str]:
    """As aten.supports."""
    if q.device.type != "cuda":
        return False, f"the flash-attn packages run on CUDA, not on {q.device.type}"
    if filled:
        return False, "the flash-attn packages take the number of own tokens from the host"
    supported, reason = aten.supports(q, k, anchors, differentiable)
    if not supported:
        return False, reason
    package = _package(q.device, q.shape[-1])
    if package is None:
        return False, "no flash-attn package fits this GPU and head size; install the extra 'flash'"
    return True, package


@functools.cache
def _package(device: torch.device, head_size: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0) and importlib.util.find_spec("flash_attn_interface") is not None:
        return "FA3"
    if capability in ((9, 0), (10, 0)) and head_size <= 128 and _is_installed("flash-attn-4"):
        return "FA4"
    if importlib.util.find_spec("flash_attn_2_cuda") is not None:
        return "flash-attn 2"
    return None


def _is_installed(distribution: str) -> bool:
    # By its metadata: flash-attn 2 ships an early flash_attn.cute of its own.
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_interface

    settings = dict(dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=causal, **_NO_EXTRAS, return_softmax=False)
    if sequences is None:
        out, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, **settings)
    else:
        out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(q, k, v, *sequences, **settings)
    return out, lse


def _backward(grad, q, k, v, out, lse, causal, sequences: Sequences | None = None) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn import flash_attn_interface

    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    arguments = grad, q, k, v, out, lse.contiguous(), dq, dk, dv
    settings = dict(dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=causal, **_NO_EXTRAS)
    settings["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if sequences is None:
        flash_attn_interface._flash_attn_backward(*arguments, **settings)
    else:
        flash_attn_interface._flash_attn_varlen_backward(*arguments, *sequences, **settings)
    return dq, dk, dv


_NO_EXTRAS = dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)
FLASH_ATTN_2 = Kernels(_forward, _backward, varlen=True)


def _attention(package: str | None) -> MergedAttention:
    if package is None:
        raise ValueError("no flash-attn package fits this GPU and head size")
    if package == "flash-attn 2":
        return MergedAttention({"cuda": FLASH_ATTN_2})
    if torch.nn.attention.current_flash_attention_impl() != package:
        torch.nn.attention.activate_flash_attention_impl(package)
    return MergedAttention({"cuda": aten.CUDA})


def text_attention(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, text: Text) -> Tensor:
    """As reference.text_attention."""
    attention = _attention(_package(q_BNHD.device, q_BNHD.shape[-1]))
    return attention.text_attention(q_BNHD, k_BNGD, v_BNGD, text)


def thought_attention(
    q_BKSMHD: Tensor,
    k_BKTMGD: Tensor,
    v_BKTMGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    anchors: Anchors,
) -> Tensor:
    """As reference.thought_attention, for S = T (a whole thought) or S = 1 (its newest token)."""
    attention = _attention(_package(q_BKSMHD.device, q_BKSMHD.shape[-1]))
    return attention.thought_attention(q_BKSMHD, k_BKTMGD, v_BKTMGD, k_text_BNGD, v_text_BNGD, anchors)
