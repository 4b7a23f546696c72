"""Whole thoughts at every text position, in one pass: forward and backward.

A program serves a tile of rows. A row is one query: (position, token of the thought, query head of a key-value head),
packed in this order, whole positions only. Its keys are blocks of text, and one diagonal tile: the own keys of the
tile's positions, of which a row sees those of its position up to its token. So a thought's own keys belong to exactly
one tile, which alone writes their gradient. The text's gradient is summed by a program per block of text and split of
the rows behind it, then over the splits, in fp32: blocks alone would leave most of a GPU idle. Nothing is atomic, and
results do not depend on the order of programs.

Shapes: B rows of text, K thoughts, S tokens of a thought, N text positions, H query heads, G key-value heads,
R = H/G queries of a group, D head size, C splits. In kernels: P positions of a tile, ROWS ≥ P·S·R, OWN ≥ P·S own keys,
BLOCK text positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.attention.kernels.softmax import LOG2_E, NOTHING, fold

# The largest tile, and the most own keys in one.
MAX_ROWS, MAX_OWN = 128, 64
# Programs that fill a large GPU.
PROGRAMS = 264


def row_constants(S: int, R: int, D: int) -> dict[str, int]:
    """Constants of the kernels that serve tiles of rows.

    128 or 64 rows, whichever S·R uses better; 128 with more than 32 own keys spill registers, and so do 4 warps.
    """
    used = {ROWS: ROWS // (S * R) * S * R / ROWS for ROWS in (64, 128)}
    small = S * R <= 64 and (used[64] > used[128] or 128 // (S * R) * S > 32)
    ROWS = 64 if small else 128
    P = ROWS // (S * R)
    OWN = max(16, triton.next_power_of_2(P * S))
    return dict(S=S, R=R, D=D, P=P, ROWS=ROWS, OWN=OWN, BLOCK=64, num_warps=8, num_stages=2)


def text_constants(S: int, R: int, D: int) -> dict[str, int]:
    """Constants of the kernel that serves blocks of text. Fewer warps or a larger block spill at D = 128, and 64 rows
    do so in Triton 3.6."""
    return dict(S=S, R=R, D=D, ROWS=32, BLOCK=64, num_warps=8, num_stages=2)


def positions_of_a_split(N: int, heads: int, BLOCK: int) -> int:
    """Positions whose rows are one split, a multiple of BLOCK, for so many key-value heads of all rows of text.

    Twice the programs that fill a GPU, since about half of them have nothing to do: a block meets no rows before it.
    """
    blocks = triton.cdiv(N, BLOCK)
    splits = min(blocks, triton.cdiv(2 * PROGRAMS, blocks * heads))
    return triton.cdiv(blocks, splits) * BLOCK


@triton.jit
def _tile(
    tile, g, N, G,
    S: tl.constexpr, R: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Rows and own keys of a tile: position, offset and existence of each row [ROWS]; offsets [OWN, D] and existence
    [OWN] of the own keys; which of them a row sees [ROWS, OWN]."""
    packed = tl.arange(0, ROWS)
    position, token = tile * P + packed // (S * R), packed // R % S
    exists = (packed < P * S * R) & (position < N)
    row = (token * N + position) * (G * R) + g * R + packed % R

    key = tl.arange(0, OWN)
    own_position, own_token = tile * P + key // S, key % S
    own_exists = (key < P * S) & (own_position < N)
    own = ((own_token * N + own_position) * G + g)[:, None] * D + tl.arange(0, D)
    visible = (position[:, None] == own_position) & (own_token <= token[:, None]) & own_exists & exists[:, None]
    return position, row, exists, own, own_exists, visible


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, k_text_ptr, v_text_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    scale, K, N, G,
    S: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The last tiles have the most text to read, so they go first.
    tile, g, thought = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b = thought // K
    d = tl.arange(0, D)

    queries, keys, text = thought * S * N * G * R, thought * S * N * G * D, b * N * G * D
    position, row, exists, own, own_exists, own_visible = _tile(tile, g, N, G, S, R, D, P, ROWS, OWN)
    at = row[:, None] * D + d
    q = tl.load(q_ptr + queries * D + at, mask=exists[:, None], other=0.0)
    k_own = tl.load(k_ptr + keys + own, mask=own_exists[:, None], other=0.0)
    v_own = tl.load(v_ptr + keys + own, mask=own_exists[:, None], other=0.0)
    own_scores = tl.where(own_visible, tl.dot(q, k_own.T, input_precision="ieee") * scale, NOTHING)
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    top, total, acc = fold(top, total, acc, own_scores, v_own)

    start = tl.load(start_ptr + b * N + position, mask=exists, other=N)
    end = tl.load(end_ptr + b * N + position, mask=exists, other=0)
    last = tl.max(end)
    for first in range(tl.min(start), last, BLOCK):
        n = first + tl.arange(0, BLOCK)
        block = (n * G + g)[:, None] * D + d
        k = tl.load(k_text_ptr + text + block, mask=n[:, None] < last, other=0.0)
        v = tl.load(v_text_ptr + text + block, mask=n[:, None] < last, other=0.0)
        visible = (n >= start[:, None]) & (n < end[:, None])
        scores = tl.where(visible, tl.dot(q, k.T, input_precision="ieee") * scale, NOTHING)
        top, total, acc = fold(top, total, acc, scores, v)

    tl.store(out_ptr + queries * D + at, (acc / total[:, None]).to(q.dtype), mask=exists[:, None])
    tl.store(lse_ptr + queries + row, top + tl.log2(total), mask=exists)


@triton.jit
def _score_gradients(q, k, v, grad, lse, delta, visible, scale):
    """(weights, gradient of the scores before scaling), both [rows, keys] in the dtype of the inputs."""
    scores = tl.dot(q, k.T, input_precision="ieee") * scale
    weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
    of_weights = tl.dot(grad, v.T, input_precision="ieee")
    return weights.to(q.dtype), (weights * (of_weights - delta[:, None])).to(q.dtype)


@triton.jit
def _backward_rows(
    q_ptr, k_ptr, v_ptr, k_text_ptr, v_text_ptr, start_ptr, end_ptr, out_ptr, lse_ptr, grad_ptr,
    dq_ptr, dk_ptr, dv_ptr, delta_ptr,
    scale, unscaled, K, N, G,
    S: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and own keys and values; leaves delta = rowsum(dO ∘ O) for the text's gradient."""
    tile, g, thought = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b = thought // K
    d = tl.arange(0, D)

    queries, keys, text = thought * S * N * G * R, thought * S * N * G * D, b * N * G * D
    position, row, exists, own, own_exists, own_visible = _tile(tile, g, N, G, S, R, D, P, ROWS, OWN)
    at = row[:, None] * D + d
    out = tl.load(out_ptr + queries * D + at, mask=exists[:, None], other=0.0)
    grad = tl.load(grad_ptr + queries * D + at, mask=exists[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + queries + row, delta, mask=exists)
    q = tl.load(q_ptr + queries * D + at, mask=exists[:, None], other=0.0)
    lse = tl.load(lse_ptr + queries + row, mask=exists, other=0.0)
    k_own = tl.load(k_ptr + keys + own, mask=own_exists[:, None], other=0.0)
    v_own = tl.load(v_ptr + keys + own, mask=own_exists[:, None], other=0.0)
    own_weights, of_own_scores = _score_gradients(q, k_own, v_own, grad, lse, delta, own_visible, scale)
    dv = tl.dot(own_weights.T, grad, input_precision="ieee")
    tl.store(dv_ptr + keys + own, dv.to(q.dtype), mask=own_exists[:, None])
    dk = tl.dot(of_own_scores.T, q, input_precision="ieee") * unscaled
    tl.store(dk_ptr + keys + own, dk.to(q.dtype), mask=own_exists[:, None])
    dq = tl.dot(of_own_scores, k_own, input_precision="ieee")

    start = tl.load(start_ptr + b * N + position, mask=exists, other=N)
    end = tl.load(end_ptr + b * N + position, mask=exists, other=0)
    last = tl.max(end)
    for first in range(tl.min(start), last, BLOCK):
        n = first + tl.arange(0, BLOCK)
        block = (n * G + g)[:, None] * D + d
        k = tl.load(k_text_ptr + text + block, mask=n[:, None] < last, other=0.0)
        v = tl.load(v_text_ptr + text + block, mask=n[:, None] < last, other=0.0)
        visible = (n >= start[:, None]) & (n < end[:, None])
        _, of_scores = _score_gradients(q, k, v, grad, lse, delta, visible, scale)
        dq = tl.dot(of_scores, k, dq, input_precision="ieee")
    tl.store(dq_ptr + queries * D + at, (dq * unscaled).to(q.dtype), mask=exists[:, None])


@triton.jit
def _backward_text(
    q_ptr, k_text_ptr, v_text_ptr, document_end_ptr, lse_ptr, delta_ptr, grad_ptr,
    dk_text_ptr, dv_text_ptr,
    scale, unscaled, B, K, N, G, span,
    S: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of text keys and values, in fp32, from the rows of one split at and behind it: those of
    `span` positions of every thought, the same for all blocks, so that no program has more to do than another and
    programs that run together read the same rows."""
    first, g, part = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    split, b = part // B, (part % B).to(tl.int64)
    d = tl.arange(0, D)
    n = first + tl.arange(0, BLOCK)
    text = b * N * G * D
    block = (n * G + g)[:, None] * D + d
    # Padding may hold anything, NaN included; it ends no document.
    document_end = tl.load(document_end_ptr + b * N + n, mask=n < N, other=0)
    real = document_end > n
    k = tl.load(k_text_ptr + text + block, mask=real[:, None], other=0.0)
    v = tl.load(v_text_ptr + text + block, mask=real[:, None], other=0.0)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)

    # In packed rows, a text token is seen from its own position up to the end of its document.
    since, until = n * (S * R), document_end * (S * R)
    first_row = tl.maximum(first, split * span) * (S * R)
    last_row = tl.minimum(tl.max(until), (split + 1) * span * (S * R))
    for thought in range(b * K, b * K + K):
        queries = thought * S * N * G * R
        for row_of_tile in range(first_row, last_row, ROWS):
            packed = row_of_tile + tl.arange(0, ROWS)
            exists = packed < last_row
            row = (packed // R % S * N + packed // (S * R)) * (G * R) + g * R + packed % R
            at = row[:, None] * D + d
            q = tl.load(q_ptr + queries * D + at, mask=exists[:, None], other=0.0)
            grad = tl.load(grad_ptr + queries * D + at, mask=exists[:, None], other=0.0)
            lse = tl.load(lse_ptr + queries + row, mask=exists, other=0.0)
            delta = tl.load(delta_ptr + queries + row, mask=exists, other=0.0)

            visible = (packed >= since[:, None]) & (packed < until[:, None])
            scores = tl.dot(k, q.T, input_precision="ieee") * scale
            weights = tl.where(visible, tl.exp2(scores - lse), 0.0)
            dv = tl.dot(weights.to(q.dtype), grad, dv, input_precision="ieee")
            of_scores = weights * (tl.dot(v, grad.T, input_precision="ieee") - delta)
            dk = tl.dot(of_scores.to(q.dtype), q, dk, input_precision="ieee")
    partial = part.to(tl.int64) * N * G * D + block
    tl.store(dk_text_ptr + partial, dk * unscaled, mask=n[:, None] < N)
    tl.store(dv_text_ptr + partial, dv, mask=n[:, None] < N)


def forward(
    q_BKSNHD: Tensor,
    k_BKSNGD: Tensor,
    v_BKSNGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    start_BN: Tensor,
    end_BN: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output like q and its log-sum-exp, in base 2, [B, K, S, N, H] in fp32.

    All contiguous and of one dtype; int32 [start, end) is the text that a position's thoughts see. S·R ≤ MAX_ROWS,
    S ≤ MAX_OWN, and a thought of all positions has fewer than 2³¹ numbers, since offsets within it are int32.
    """
    B, K, S, N, H, D = q_BKSNHD.shape
    G = k_text_BNGD.shape[2]
    out, lse = torch.empty_like(q_BKSNHD), q_BKSNHD.new_empty(q_BKSNHD.shape[:-1], dtype=torch.float32)
    constants = row_constants(S, H // G, D)
    with torch.cuda.device_of(out):
        _forward[triton.cdiv(N, constants["P"]), G, B * K](
            q_BKSNHD, k_BKSNGD, v_BKSNGD, k_text_BNGD, v_text_BNGD, start_BN, end_BN, out, lse,
            D**-0.5 * LOG2_E, K, N, G, **constants,
        )  # fmt: skip
    return out, lse


def backward(
    grad_BKSNHD: Tensor,
    q_BKSNHD: Tensor,
    k_BKSNGD: Tensor,
    v_BKSNGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    start_BN: Tensor,
    end_BN: Tensor,
    document_end_BN: Tensor,
    out_BKSNHD: Tensor,
    lse_BKSNH: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, k_text and v_text, each like its input; arguments as of `forward`."""
    B, K, S, N, H, D = q_BKSNHD.shape
    G = k_text_BNGD.shape[2]
    inputs = (q_BKSNHD, k_BKSNGD, v_BKSNGD, k_text_BNGD, v_text_BNGD)
    dq, dk, dv = (torch.empty_like(x) for x in inputs[:3])
    delta = torch.empty_like(lse_BKSNH)
    scale, unscaled = D**-0.5 * LOG2_E, D**-0.5
    rows, text = row_constants(S, H // G, D), text_constants(S, H // G, D)
    span = positions_of_a_split(N, G * B, text["BLOCK"])
    C = triton.cdiv(N, span)
    partial_2CBNGD = k_text_BNGD.new_empty((2, C, B, N, G, D), dtype=torch.float32)
    with torch.cuda.device_of(dq):
        _backward_rows[triton.cdiv(N, rows["P"]), G, B * K](
            *inputs, start_BN, end_BN, out_BKSNHD, lse_BKSNH, grad_BKSNHD, dq, dk, dv, delta,
            scale, unscaled, K, N, G, **rows,
        )  # fmt: skip
        _backward_text[triton.cdiv(N, text["BLOCK"]), G, C * B](
            q_BKSNHD, k_text_BNGD, v_text_BNGD, document_end_BN, lse_BKSNH, delta, grad_BKSNHD,
            *partial_2CBNGD, scale, unscaled, B, K, N, G, span, **text,
        )  # fmt: skip
    dk_text, dv_text = partial_2CBNGD.sum(1).to(k_text_BNGD.dtype)
    return dq, dk, dv, dk_text, dv_text
