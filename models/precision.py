"""Mixed precision without autocast: fp32 master weights, matrix products in the dtype of the activations.

Autocast caches a weight's cast per context, and a cast made under `no_grad` (a rollout) would be reused by the
differentiable pass that follows and lose its gradient. Here the low-precision copy of a weight is made once per
optimizer step, shared by rollout, text pass and thought pass, and never enters the graph: its gradient goes straight
to the fp32 master.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_optimizer_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers change weights without advancing their version counters, so every optimizer step counts as a change.
register_optimizer_step_post_hook(_count_optimizer_step)


def working_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, without gradient; made again only after an optimizer step or another in-place change.

    Hazard: writing to `weight.data` by hand is neither.
    """
    if weight.dtype == dtype:
        return weight.detach()
    state = (weight._version, _optimizer_steps, dtype)
    cached = getattr(weight, "_working_copy", None)
    if cached is None or cached[0] != state:
        cached = (state, weight.detach().to(dtype))
        weight._working_copy = cached  # type: ignore[attr-defined]
    return cached[1]


class _MasterWeightLinear(torch.autograd.Function):
    """x @ weightᵀ + bias in x.dtype, with the weight's gradient in the master's dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        copy = working_copy(weight, x.dtype)
        ctx.save_for_backward(x, copy)
        ctx.master_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, copy, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, copy = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ copy if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = (flat.t() @ x.reshape(-1, x.shape[-1])).to(ctx.master_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input, whatever the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        return _MasterWeightLinear.apply(x, self.weight, self.bias)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: what norms, softmax and log-probs are computed in."""
    return torch.promote_types(dtype, torch.float32)
