"""Chains of elementwise ops: norms, rotary embedding, gating, and the merge of two attention parts.

As torch runs them each op is a pass over memory. On CUDA, wherever Triton is installed (it comes with torch for CUDA on
Linux), a chain is one kernel of pointwise_kernels.py, forward and backward.

Shapes: W any width, H heads, D head size; `_` leading axes of any number.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from models.precision import accumulation_dtype


def _kernels(x: Tensor) -> ModuleType | None:
    """The kernels, where there are any for x."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return _triton_kernels()


@functools.cache
def _triton_kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from models import pointwise_kernels

    return pointwise_kernels


def rms_norm(x_W: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """Zhang & Sennrich, 1910.07467; computed in fp32 (fp64 for fp64), returned in the dtype of x [_, W]."""
    if (kernels := _kernels(x_W)) and x_W.shape[-1] <= kernels.MAX_WIDTH:
        return kernels.rms_norm(x_W, weight_W, eps)
    if torch.is_grad_enabled() and x_W.device.type == "cpu":
        return _RMSNorm.apply(x_W, weight_W, eps)
    return _rms_norm(x_W, weight_W, eps)


class _RMSNorm(torch.autograd.Function):
    """On CPU torch puts the norm together from ten operations, which take twice as long and keep x a second time."""

    @staticmethod
    def forward(ctx, x_W, weight_W, eps):
        dtype = accumulation_dtype(x_W.dtype)
        mean_square_1 = torch.linalg.vector_norm(x_W, dim=-1, keepdim=True, dtype=dtype).square_().div_(x_W.shape[-1])
        inverse_1 = mean_square_1.add_(eps).rsqrt_()
        ctx.save_for_backward(x_W, weight_W, inverse_1)
        # Products of two dtypes are ten times slower than a conversion.
        return (x_W.to(dtype) * inverse_1).mul_(weight_W).to(x_W.dtype)

    @staticmethod
    def backward(ctx, grad_W):
        x_W, weight_W, inverse_1 = ctx.saved_tensors
        unit_W, grad = x_W.to(inverse_1.dtype) * inverse_1, grad_W.to(inverse_1.dtype)
        both_W, weight = grad * unit_W, weight_W.to(inverse_1.dtype)
        grad_weight = both_W.flatten(0, -2).sum(0).to(weight_W.dtype)
        along_1 = (both_W @ weight)[..., None] / x_W.shape[-1]
        grad_x = (grad * weight).sub_(unit_W.mul_(along_1)).mul_(inverse_1)
        return grad_x.to(x_W.dtype), grad_weight, None


def _rms_norm(x_W: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    dtype = accumulation_dtype(x_W.dtype)
    return F.rms_norm(x_W.to(dtype), weight_W.shape, weight_W.to(dtype), eps).to(x_W.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [_, H, D] by its position's cos and sin, broadcasting [_, 1, D], as rope.cos_and_sin gives them."""
    if (kernels := _kernels(x)) and not (cos.requires_grad or sin.requires_grad):
        return kernels.rotate(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def gated(gate_W: Tensor, up_W: Tensor) -> Tensor:
    """silu(gate) · up, of [_, W] each."""
    if kernels := _kernels(gate_W):
        return kernels.gated(gate_W, up_W)
    return _Gated.apply(gate_W, up_W) if torch.is_grad_enabled() else F.silu(gate_W) * up_W


class _Gated(torch.autograd.Function):
    """Keeps two tensors where autograd by itself would keep three."""

    @staticmethod
    def forward(ctx, gate_W, up_W):
        ctx.save_for_backward(gate_W, up_W)
        return F.silu(gate_W).mul_(up_W)

    @staticmethod
    def backward(ctx, grad_W):
        gate_W, up_W = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad_W * up_W, gate_W), F.silu(gate_W).mul_(grad_W)


def merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention over two disjoint sets of keys from its two parts: O [_, H, D] in their dtype, L [_, H].

    O = exp(L_a − L) O_a + exp(L_b − L) O_b with L = log(exp L_a + exp L_b); L_a must be finite.
    """
    # Attention has its own backward and merges without gradient.
    if (kernels := _kernels(out_a)) and not torch.is_grad_enabled():
        return kernels.merged(out_a, lse_a, out_b, lse_b)
    # Flat, and so contiguous, is a seventh faster than as it comes.
    arguments = (x.flatten(0, -2) for x in (out_a, lse_a[..., None], out_b, lse_b[..., None]))
    return _merged(*arguments).view(out_a.shape)


def _merged(out_a_D: Tensor, lse_a_1: Tensor, out_b_D: Tensor, lse_b_1: Tensor) -> Tensor:
    share_b_1 = (lse_b_1 - lse_a_1).sigmoid()
    # On CPU products of two dtypes are ten times slower than conversions.
    return torch.lerp(out_a_D.to(share_b_1.dtype), out_b_D.to(share_b_1.dtype), share_b_1).to(out_a_D.dtype)
