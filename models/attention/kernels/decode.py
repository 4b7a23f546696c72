"""New tokens of thoughts at a few anchors: all thoughts of an anchor read its text together.

Two kernels. `_prefix`: the queries of all K thoughts and of all heads of a key-value head are the rows of one product
with the text that the anchor sees, so that this text is read once; it is cut into splits, a program each, because
anchors times key-value heads alone would leave most of a GPU idle. `_suffix`: each thought's own keys, causally, then
the splits are folded into the same softmax (FlashDecoding; Hydragen, 2402.05099, has the shared prefix as rows).

Shapes: B rows of text, M anchors, K thoughts, S newest of the T tokens of a thought, N text positions, H query heads,
G key-value heads, R = H/G queries of a group, D head size, C splits of the text.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.attention.kernels.softmax import LOG2_E, NOTHING, fold
from models.attention.kernels.step import own_keys

# Programs that fill a large GPU once, and the least text that is worth a program of its own.
PROGRAMS, LEAST_SPLIT = 264, 256


def constants(rows: int, R: int, D: int) -> dict[str, int]:
    """Constants of either kernel for so many rows that share keys."""
    ROWS = min(64, max(16, triton.next_power_of_2(rows)))
    # 4 warps of the largest tile spill on sm_80, larger blocks on sm_100.
    return dict(R=R, D=D, ROWS=ROWS, BLOCK=32, num_warps=8 if ROWS * D > 4096 else 4, num_stages=2)


@triton.jit
def _prefix(
    q_ptr, k_text_ptr, v_text_ptr, start_ptr, end_ptr, out_ptr, lse_ptr,
    scale, B, K, S, M, N, G, splits,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of the text for a tile of the K·S·R rows of an anchor and key-value head."""
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    g, anchor = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, m = anchor // M, anchor % M
    d = tl.arange(0, D)
    packed = tile * ROWS + tl.arange(0, ROWS)
    exists = packed < K * S * R
    thought_and_token = packed // R
    row = ((b * K * S + thought_and_token) * M + m) * (G * R) + g * R + packed % R
    q = tl.load(q_ptr + row[:, None] * D + d, mask=exists[:, None], other=0.0)

    start, end = tl.load(start_ptr + anchor), tl.load(end_ptr + anchor)
    length = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), splits), BLOCK) * BLOCK
    first = start + split * length
    last = tl.minimum(first + length, end)
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for at in range(first, last, BLOCK):
        n = at + tl.arange(0, BLOCK)
        text = ((b * N + n) * G + g)[:, None] * D + d
        k = tl.load(k_text_ptr + text, mask=n[:, None] < last, other=0.0)
        v = tl.load(v_text_ptr + text, mask=n[:, None] < last, other=0.0)
        scores = tl.where(n < last, tl.dot(q, k.T, input_precision="ieee") * scale, NOTHING)
        top, total, acc = fold(top, total, acc, scores, v)

    # A split without text leaves output 0 and log-sum-exp NOTHING, which weighs 0 in the merge.
    total = tl.where(total > 0, total, 1.0)
    row += split.to(tl.int64) * (B * K * S * M * G * R)
    tl.store(out_ptr + row[:, None] * D + d, acc / total[:, None], mask=exists[:, None])
    tl.store(lse_ptr + row, top + tl.log2(total), mask=exists)


@triton.jit
def _suffix(
    q_ptr, k_ptr, v_ptr, out_text_ptr, lse_text_ptr, out_ptr, lse_ptr, filled_ptr,
    scale, rows, S, T, M, G, thought_stride, splits,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Own keys for a tile of the S·R rows of a thought and key-value head, and the merge with all splits."""
    if filled_ptr is not None:
        T = tl.load(filled_ptr)
    thought, m = (tl.program_id(0) // M).to(tl.int64), tl.program_id(0) % M
    g, tile = tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)
    packed = tile * ROWS + tl.arange(0, ROWS)
    token = packed // R
    exists = token < S
    row = ((thought * S + token) * M + m) * (G * R) + g * R + packed % R
    q = tl.load(q_ptr + row[:, None] * D + d, mask=exists[:, None], other=0.0)

    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    seen = T - S + token + 1
    last = tl.minimum(tl.max(seen), T)
    for first in range(0, last, BLOCK):
        t = first + tl.arange(0, BLOCK)
        own = thought * thought_stride + ((t * M + m).to(tl.int64) * G + g)[:, None] * D + d
        k = tl.load(k_ptr + own, mask=t[:, None] < last, other=0.0)
        v = tl.load(v_ptr + own, mask=t[:, None] < last, other=0.0)
        visible = (t < seen[:, None]) & (t < last)
        scores = tl.where(visible, tl.dot(q, k.T, input_precision="ieee") * scale, NOTHING)
        top, total, acc = fold(top, total, acc, scores, v)

    part = row
    for _ in range(0, splits):
        lse = tl.load(lse_text_ptr + part, mask=exists, other=NOTHING)
        out = tl.load(out_text_ptr + part[:, None] * D + d, mask=exists[:, None], other=0.0)
        higher = tl.maximum(top, lse)
        shrink, weight = tl.exp2(top - higher), tl.exp2(lse - higher)
        top, total = higher, total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * out
        part += rows

    tl.store(out_ptr + row[:, None] * D + d, (acc / total[:, None]).to(q.dtype), mask=exists[:, None])
    tl.store(lse_ptr + row, top + tl.log2(total), mask=exists)


def decode(
    q_BKSMHD: Tensor,
    k_BKTMGD: Tensor,
    v_BKTMGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    start_BM: Tensor,
    end_BM: Tensor,
    filled_1: Tensor | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output like q and its log-sum-exp, in base 2, [B, K, S, M, H] in fp32, for the last S of T tokens.

    int32 [start, end) is the text that an anchor's thoughts see, empty where end is 0. Keys and values of thoughts may
    be the leading part of a longer cache; the rest is contiguous. `splits` is chosen by how much text there can be and
    how many programs there are without it. filled_1, int32 [1], is how many of the T tokens there are yet.
    """
    B, K, S, M, H, D = q_BKSMHD.shape
    T, N, G = k_BKTMGD.shape[2], k_text_BNGD.shape[1], k_text_BNGD.shape[2]
    R = H // G
    prefix, suffix = constants(K * S * R, R, D), constants(S * R, R, D)
    tiles = triton.cdiv(K * S * R, prefix["ROWS"])
    if splits is None:
        splits = max(1, min(triton.cdiv(PROGRAMS, tiles * G * B * M), triton.cdiv(N, LEAST_SPLIT)))
    k, v, thought_stride = own_keys(k_BKTMGD, v_BKTMGD)
    out, lse = torch.empty_like(q_BKSMHD), q_BKSMHD.new_empty(q_BKSMHD.shape[:-1], dtype=torch.float32)
    out_text = q_BKSMHD.new_empty((splits, *q_BKSMHD.shape), dtype=torch.float32)
    lse_text = lse.new_empty((splits, *lse.shape))
    scale = D**-0.5 * LOG2_E
    with torch.cuda.device_of(out):
        _prefix[tiles * splits, G, B * M](
            q_BKSMHD, k_text_BNGD, v_text_BNGD, start_BM, end_BM, out_text, lse_text,
            scale, B, K, S, M, N, G, splits, **prefix,
        )  # fmt: skip
        _suffix[B * K * M, G, triton.cdiv(S * R, suffix["ROWS"])](
            q_BKSMHD, k, v, out_text, lse_text, out, lse, filled_1,
            scale, lse.numel(), S, T, M, G, thought_stride, splits, **suffix,
        )  # fmt: skip
    return out, lse
