"""Mixed precision without autocast: fp32 master weights, matrix products in the dtype of the activations.

Autocast caches a weight's cast per context, and a cast made under `no_grad` (a rollout) would be reused by the
differentiable pass that follows and lose its gradient. Here the low-precision copy of a weight is made once per
optimizer step, shared by rollout, text pass and thought pass, and never enters the graph: its gradient goes straight
to the fp32 master.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Attributes of a weight that hold (state, copy).
COPIES = ("_working_copy", "_wide_copy", "_packed_copy", "_native_copy")
_optimizer_steps = 0


def weights_changed(*_) -> None:
    """To be called where weights were written by other means than an optimizer, such as from a checkpoint."""
    global _optimizer_steps
    _optimizer_steps += 1


def optimizer_steps() -> int:
    """How many there have been in this process, and other changes of weights."""
    return _optimizer_steps


# Fused optimizers change weights without advancing their version counters, so every optimizer step counts as a change.
register_optimizer_step_post_hook(weights_changed)


def kept(weights: Sequence[Tensor], name: str, dtype: torch.dtype, make: Callable[..., Tensor]) -> Tensor:
    """What `make` makes of the weights, kept at the first; made again only after an optimizer step or another in-place
    change.

    Hazard: writing to `weight.data` by hand is neither.
    """
    state = ([weight._version for weight in weights], _optimizer_steps, dtype, weights[0].device)
    held = getattr(weights[0], name, None)
    if held is None or held[0] != state:
        held = (state, make(*(weight.detach() for weight in weights)))
        setattr(weights[0], name, held)
    return held[1]


def working_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, without gradient; itself where it is of that dtype."""
    if weight.dtype == dtype:
        return weight.detach()
    return kept([weight], "_working_copy", dtype, lambda master: master.to(dtype))


# Products with fewer rows than this are faster with weights packed for oneDNN: on two cores 1.6 to 2 times at 16 rows,
# 1.1 times at 256, no faster at 2048.
FEW_ROWS = 256


def _packs(x: Tensor) -> bool:
    few = x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
    return few and _onednn_takes(x.dtype)


@functools.cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed_linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x @ [weights]ᵀ + bias; the weights, one below the other, are kept a second time."""

    def pack(*masters: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(torch.cat(masters).to(x.dtype))

    packed = kept(weights, "_packed_copy", x.dtype, pack)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weightᵀ + bias in x.dtype, without gradient: what sampling runs."""
    bias = None if bias is None else bias.to(x.dtype)
    if _packs(x):
        return _packed_linear(x, [weight], bias)
    return F.linear(x, working_copy(weight, x.dtype), bias)


def operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and the weight in x's dtype, without gradient, as `wide` multiplies them: only CUDA hands out the fp32 sums of
    a product of bf16 operands, elsewhere these are held in fp32."""
    if x.is_cuda or x.dtype == accumulation_dtype(x.dtype):
        return x, working_copy(weight, x.dtype)
    return x.to(accumulation_dtype(x.dtype)), kept([weight], "_wide_copy", x.dtype, lambda w: w.to(x.dtype).float())


def wide(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two matrices in the accumulation dtype, never rounded to that of the `operands`."""
    dtype = accumulation_dtype(a.dtype)
    return torch.mm(a, b, out=out) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype, out=out)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ, without gradient, in the accumulation dtype; x [R, W]."""
    dtype, (x, weight) = x.dtype, operands(x, weight)
    if x.is_cuda:
        return wide(x, weight.t())
    with bf16_products(dtype):
        return linear(x, weight)


@contextmanager
def bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """Where `dtype` is bf16, and a CPU has instructions for it, it multiplies fp32 matrices in here as if they were
    rounded to bf16. Of numbers that are, the sums are the same, in a fraction of the time."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype == torch.bfloat16 and _onednn_takes(dtype):
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
        if not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        return _MasterWeightLinear.apply(x, self.weight, self.bias)


def together(x: Tensor, *layers: Linear) -> Sequence[Tensor]:
    """What each of the layers gives for x; as one product where a few rows make it faster."""
    if not _packs(x):
        return [layer(x) for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).to(x.dtype)
    product = _packed_linear(x, [layer.weight for layer in layers], bias)
    return product.split([layer.out_features for layer in layers], dim=-1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: what norms, softmax and log-probs are computed in."""
    return torch.promote_types(dtype, torch.float32)
