"""Online softmax in base 2 (Milakov & Gimelshein, 1805.02867; FlashAttention, 2205.14135), shared by the kernels."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = math.log2(math.e)

# The score of a key that is not visible. Finite, so that rows that see nothing at all make no NaN: they are never
# stored, and against any real score it weighs exactly 0.
NOTHING = tl.constexpr(-1e30)


@triton.jit
def fold(top, total, acc, scores, v):
    """Takes a block of keys into the running (maximum [rows], sum [rows], unnormalised output [rows, D]).

    scores [rows, keys] in base 2, v [keys, D].
    """
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc
