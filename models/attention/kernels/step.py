"""The newest token of thoughts at every text position: private keys on top of a finished text part. No gradient.

Every position has keys of its own, so there is no matrix product to be had: a program serves a tile of rows, a row
being one query (position, query head of a key-value head), and walks over the tokens of the thoughts. Its online
softmax starts where the text part ended, from that part's output and log-sum-exp.

Shapes: B rows of text, K thoughts, T tokens of a thought so far, N text positions, H query heads, G key-value heads,
R = H/G queries of a group, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.attention.kernels.softmax import LOG2_E


def constants(R: int, D: int) -> dict[str, int]:
    return dict(R=R, D=D, ROWS=max(8, 2048 // D), num_warps=4, num_stages=2)


@triton.jit
def _private_keys(
    q_ptr, k_ptr, v_ptr, out_text_ptr, lse_text_ptr, out_ptr,
    scale, log2_e, T, N, G, thought_stride,
    R: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile, g, thought = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    packed = tile * ROWS + tl.arange(0, ROWS)
    position, head = packed // R, g * R + packed % R
    exists = position < N
    row = ((thought * N + position) * (G * R) + head)[:, None] * D + d
    q = tl.load(q_ptr + row, mask=exists[:, None], other=0.0).to(tl.float32) * scale

    top = tl.load(lse_text_ptr + (thought * G * R + head) * N + position, mask=exists, other=0.0) * log2_e
    total = tl.full([ROWS], 1.0, tl.float32)
    acc = tl.load(out_text_ptr + row, mask=exists[:, None], other=0.0).to(tl.float32)
    for t in range(0, T):
        own = thought * thought_stride + ((t * N + position) * G + g)[:, None] * D + d
        k = tl.load(k_ptr + own, mask=exists[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + own, mask=exists[:, None], other=0.0).to(tl.float32)
        scores = tl.sum(q * k, 1)
        # Where no text is seen, `top` starts at -inf; the first own key makes it finite.
        higher = tl.maximum(top, scores)
        shrink, weights = tl.exp2(top - higher), tl.exp2(scores - higher)
        top, total = higher, total * shrink + weights
        acc = acc * shrink[:, None] + weights[:, None] * v
    tl.store(out_ptr + row, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=exists[:, None])


def add_private_keys(
    q_BKNHD: Tensor, k_BKTNGD: Tensor, v_BKTNGD: Tensor, out_text_BKNHD: Tensor, lse_text_BKHN: Tensor
) -> Tensor:
    """The attention [B, K, N, H, D] of queries over their text and T ≥ 1 own keys, from the attention over the text.

    The text part's output is like q, its natural log-sum-exp fp32, -inf where no text is seen and the output is 0.
    Keys and values may be the leading part of a longer cache; the rest is contiguous.
    """
    B, K, N, H, D = q_BKNHD.shape
    T, G = k_BKTNGD.shape[2], k_BKTNGD.shape[4]
    k, v, thought_stride = own_keys(k_BKTNGD, v_BKTNGD)
    out = torch.empty_like(q_BKNHD)
    sizes = constants(H // G, D)
    with torch.cuda.device_of(out):
        _private_keys[triton.cdiv(N * (H // G), sizes["ROWS"]), G, B * K](
            q_BKNHD, k, v, out_text_BKNHD, lse_text_BKHN, out,
            D**-0.5 * LOG2_E, LOG2_E, T, N, G, thought_stride, **sizes,
        )  # fmt: skip
    return out


def own_keys(k_BKTMGD: Tensor, v_BKTMGD: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values of thoughts as the kernels read them, and the distance between two thoughts.

    The part of a cache that is filled so far is read where it lies; any other layout is copied.
    """
    k, v = k_BKTMGD.flatten(0, 1), v_BKTMGD.flatten(0, 1)
    if not (k[0].is_contiguous() and v[0].is_contiguous() and k.stride(0) == v.stride(0)):
        k, v = k.contiguous(), v.contiguous()
    return k, v, k.stride(0)
