"""The chains of pointwise.py as Triton kernels for CUDA: one launch forward and one backward.

All compute in fp32 and round once. The gradient of a norm's weight is summed per program, then over programs by a
second launch: nothing is atomic, and results do not depend on the order of programs. Tensors are contiguous, as the
decoder's are; any other is copied.

Block sizes follow from the sizes of a row alone, and numbers of rows are not specialised on, so that no shape is tuned
or compiled for anew: a step launches hundreds of these, and is soon bound by the host.

Shapes: as in pointwise.py. In kernels: ROWS or UNITS of a program, BLOCK ≥ the numbers of one.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# The widest row that a program holds without spilling.
MAX_WIDTH = 8192
# Programs that fill a large GPU, and the fewest tiles of rows that are worth a partial sum of the weight's gradient.
PROGRAMS, LEAST_TILES = 528, 4


@functools.cache
def norm_constants(W: int) -> dict[str, int]:
    BLOCK = triton.next_power_of_2(W)
    ROWS = max(1, 2048 // BLOCK)
    return dict(W=W, ROWS=ROWS, BLOCK=BLOCK, num_warps=min(16, ROWS * BLOCK // 256))


@functools.cache
def rotate_constants(H: int, D: int) -> dict[str, int]:
    BLOCK = triton.next_power_of_2(D // 2)
    return dict(H=H, D=D, UNITS=max(1, 1024 // BLOCK), BLOCK=BLOCK, num_warps=4)


@functools.cache
def merge_constants(D: int) -> dict[str, int]:
    BLOCK = triton.next_power_of_2(D)
    return dict(D=D, UNITS=max(1, 1024 // BLOCK), BLOCK=BLOCK, num_warps=4)


GATE_CONSTANTS = dict(BLOCK=1024, num_warps=4)


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x_ptr, weight_ptr, out_ptr, inverse_ptr, eps, rows,
    W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = tl.arange(0, BLOCK)
    real = (row < rows)[:, None] & (w < W)
    at = row[:, None] * W + w
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / W + eps)
    tl.store(out_ptr + at, (x * inverse[:, None] * weight).to(out_ptr.dtype.element_ty), mask=real)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "span"])
def _norm_backward(
    x_ptr, weight_ptr, inverse_ptr, grad_ptr, dx_ptr, partial_ptr, rows, span,
    W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of `span` rows, a multiple of ROWS: gradients of x, and the sum of the weight's, in fp32."""
    first = tl.program_id(0).to(tl.int64) * span + tl.arange(0, ROWS)
    w = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for further in range(0, span, ROWS):
        row = first + further
        real = (row < rows)[:, None] & (w < W)
        at = row[:, None] * W + w
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=real, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=row < rows, other=0.0)[:, None]
        unit = x * inverse
        of_weight += grad * unit
        of_unit = grad * weight
        along = tl.sum(of_unit * unit, 1)[:, None] / W
        dx = (of_unit - unit * along) * inverse
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=real)
    tl.store(partial_ptr + tl.program_id(0) * W + w, tl.sum(of_weight, 0), mask=w < W)


@triton.jit(do_not_specialize=["units", "span", "inner"])
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, units, span, inner,
    H: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """A unit is a head of a row; see `_broadcast` for span and inner. BACK turns by the opposite angle."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    d = tl.arange(0, BLOCK)
    real = (unit < units)[:, None] & (d < D // 2)
    row = unit // H
    angle = (row // span * inner + row % inner).to(tl.int64)[:, None] * D + d
    # cos is twice the same; of sin, the first half is the second with the sign changed.
    cos = tl.load(cos_ptr + angle, mask=real, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle + D // 2, mask=real, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    at = unit.to(tl.int64)[:, None] * D + d
    left = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    right = tl.load(x_ptr + at + D // 2, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (left * cos - right * sin).to(out_ptr.dtype.element_ty), mask=real)
    tl.store(out_ptr + at + D // 2, (right * cos + left * sin).to(out_ptr.dtype.element_ty), mask=real)


# Whether `numbers` is a multiple of 16 must be known here: else no 16 bytes share a mask and could be read at a time.
@triton.jit
def _gate(gate_ptr, up_ptr, out_ptr, numbers, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < numbers, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < numbers, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=at < numbers)


@triton.jit
def _gate_backward(gate_ptr, up_ptr, grad_ptr, dgate_ptr, dup_ptr, numbers, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < numbers, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < numbers, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=at < numbers, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = grad * up * share * (1.0 + gate * (1.0 - share))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=at < numbers)
    tl.store(dup_ptr + at, (grad * gate * share).to(dup_ptr.dtype.element_ty), mask=at < numbers)


@triton.jit(do_not_specialize=["units"])
def _merge(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, units,
    D: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    d = tl.arange(0, BLOCK)
    real = (unit < units)[:, None] & (d < D)
    at = unit[:, None] * D + d
    lse_a = tl.load(lse_a_ptr + unit, mask=unit < units, other=0.0).to(tl.float32)
    lse_b = tl.load(lse_b_ptr + unit, mask=unit < units, other=0.0).to(tl.float32)
    a = tl.load(out_a_ptr + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(out_b_ptr + at, mask=real, other=0.0).to(tl.float32)
    merged = a + (b - a) * tl.sigmoid(lse_b - lse_a)[:, None]
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=real)


def rms_norm(x_W: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """As pointwise.rms_norm, for W ≤ MAX_WIDTH."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x_W, weight_W, eps)
    return _normed(x_W.contiguous(), weight_W.contiguous(), eps, None)


def _normed(x_W: Tensor, weight_W: Tensor, eps: float, inverse: Tensor | None) -> Tensor:
    out_W, W = torch.empty_like(x_W), x_W.shape[-1]
    constants, rows = norm_constants(W), x_W.numel() // W
    with torch.cuda.device_of(x_W):
        _norm[triton.cdiv(rows, constants["ROWS"]),](x_W, weight_W, out_W, inverse, eps, rows, **constants)
    return out_W


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_W, weight_W, eps):
        x_W, weight_W = x_W.contiguous(), weight_W.contiguous()
        inverse = torch.empty(x_W.shape[:-1], dtype=torch.float32, device=x_W.device)
        ctx.save_for_backward(x_W, weight_W, inverse)
        return _normed(x_W, weight_W, eps, inverse)

    @staticmethod
    def backward(ctx, grad_W):
        x_W, weight_W, inverse = ctx.saved_tensors
        grad_W, dx_W = grad_W.contiguous(), torch.empty_like(x_W)
        constants, rows = norm_constants(len(weight_W)), inverse.numel()
        ROWS = constants["ROWS"]
        span = ROWS * max(LEAST_TILES, triton.cdiv(rows, ROWS * PROGRAMS))
        programs = triton.cdiv(rows, span)
        partial_W = torch.empty((programs, len(weight_W)), dtype=torch.float32, device=x_W.device)
        with torch.cuda.device_of(x_W):
            _norm_backward[programs,](x_W, weight_W, inverse, grad_W, dx_W, partial_W, rows, span, **constants)
        return dx_W, partial_W.sum(0).to(weight_W.dtype), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As pointwise.rotate, without gradient for cos and sin."""
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin)
    return _rotated(False, x, cos, sin)


def _rotated(BACK: bool, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    *leading, H, D = x.shape
    broadcast = _broadcast(x.shape, cos.shape)
    if broadcast is None:
        cos, sin = cos.expand(*leading, 1, D), sin.expand(*leading, 1, D)
        broadcast = _broadcast(x.shape, cos.shape)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    assert broadcast is not None and sin.shape == cos.shape
    out, units, constants = torch.empty_like(x), math.prod(leading) * H, rotate_constants(H, D)
    with torch.cuda.device_of(x):
        _rotate[triton.cdiv(units, constants["UNITS"]),](x, cos, sin, out, units, *broadcast, BACK=BACK, **constants)
    return out


@functools.lru_cache
def _broadcast(shape: tuple[int, ...], of: tuple[int, ...]) -> tuple[int, int] | None:
    """(span, inner) such that row r of x [_, H, D] has the angle of row r // span · inner + r % inner of cos [_, 1, D].

    None if no numbers say so: where axes that broadcast have others between them, or none fit.
    """
    if of[-2:] != (1, shape[-1]) or len(of) > len(shape):
        return None
    rows, angles = shape[:-2], (1,) * (len(shape) - len(of)) + of[:-2]
    repeated = [i for i, (n, m) in enumerate(zip(rows, angles, strict=True)) if n != m]
    if not repeated:
        return math.prod(rows), math.prod(rows)
    first, last = repeated[0], repeated[-1] + 1
    if any(m != 1 for m in angles[first:last]):
        return None
    return math.prod(rows[first:]), math.prod(rows[last:])


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(False, x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        return _rotated(True, grad, *ctx.saved_tensors), None, None


def gated(gate_W: Tensor, up_W: Tensor) -> Tensor:
    """As pointwise.gated."""
    if torch.is_grad_enabled():
        return _Gated.apply(gate_W, up_W)
    return _gated(gate_W.contiguous(), up_W.contiguous())


def _gated(gate_W: Tensor, up_W: Tensor) -> Tensor:
    assert gate_W.shape == up_W.shape
    out_W, numbers = torch.empty_like(gate_W), gate_W.numel()
    with torch.cuda.device_of(gate_W):
        _gate[triton.cdiv(numbers, GATE_CONSTANTS["BLOCK"]),](gate_W, up_W, out_W, numbers, **GATE_CONSTANTS)
    return out_W


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_W, up_W):
        gate_W, up_W = gate_W.contiguous(), up_W.contiguous()
        ctx.save_for_backward(gate_W, up_W)
        return _gated(gate_W, up_W)

    @staticmethod
    def backward(ctx, grad_W):
        gate_W, up_W = ctx.saved_tensors
        grad_W, dgate_W, dup_W = grad_W.contiguous(), torch.empty_like(gate_W), torch.empty_like(up_W)
        numbers = gate_W.numel()
        with torch.cuda.device_of(gate_W):
            _gate_backward[triton.cdiv(numbers, GATE_CONSTANTS["BLOCK"]),](
                gate_W, up_W, grad_W, dgate_W, dup_W, numbers, **GATE_CONSTANTS
            )
        return dgate_W, dup_W


def merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """As pointwise.merged, without gradient."""
    out_a, lse_a, out_b, lse_b = (x.contiguous() for x in (out_a, lse_a, out_b, lse_b))
    assert out_a.shape == out_b.shape and lse_a.shape == lse_b.shape == out_a.shape[:-1]
    out, constants = torch.empty_like(out_a), merge_constants(out_a.shape[-1])
    with torch.cuda.device_of(out):
        _merge[triton.cdiv(lse_a.numel(), constants["UNITS"]),](
            out_a, lse_a, out_b, lse_b, out, lse_a.numel(), **constants
        )
    return out
