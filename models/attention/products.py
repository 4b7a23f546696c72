"""The newest token of a few thoughts on CPU: plain products, with the scores of all keys held.

A flash kernel spares memory by going through the keys in blocks, and pays for it. The queries of one step are so few
that their scores fit into a cache, and in bf16 the products alone take half the time of the kernel, its parts and
their merge (two cores without AMX, 16 thoughts behind 1,024 tokens: 0.35 ms a layer instead of 0.9; in fp32 nothing is
gained).

Shapes as in reference.py, and P tokens of text seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.thoughts import Anchors


def newest_token(
    q_BK1MHD: Tensor, k_BKTMGD: Tensor, v_BKTMGD: Tensor, k_text_BNGD: Tensor, v_text_BNGD: Tensor, anchors: Anchors
) -> Tensor:
    """As reference.thought_attention for S = 1, without gradient. Scores are rounded to the dtype of q.

    Fastest where each head's keys and values lie in one piece, as TextState.by_head and ThoughtCache have them.
    """
    seen = {(b, m): slice(start, end) for b, m, start, end in anchors.prefixes}
    B, M = anchors.index_BM.shape
    out = [
        _one_anchor(
            q_BK1MHD[b, :, 0, m],
            k_BKTMGD[b, :, :, m],
            v_BKTMGD[b, :, :, m],
            k_text_BNGD[b, seen.get((b, m), slice(0))],
            v_text_BNGD[b, seen.get((b, m), slice(0))],
        )
        for b in range(B)
        for m in range(M)
    ]
    return torch.stack(out).unflatten(0, (B, M)).transpose(1, 2)[:, :, None]


def _one_anchor(q_KHD: Tensor, k_KTGD: Tensor, v_KTGD: Tensor, k_text_PGD: Tensor, v_text_PGD: Tensor) -> Tensor:
    """[K, H, D]. The query heads of a group are rows of one product, over the text those of all thoughts."""
    (K, H, D), (P, G, _) = q_KHD.shape, k_text_PGD.shape
    q_own = q_KHD.reshape(K * G, H // G, D)
    q_text = q_KHD.view(K, G, -1, D).transpose(0, 1).reshape(G, -1, D)
    k_own, v_own = (x.transpose(1, 2).flatten(0, 1) for x in (k_KTGD, v_KTGD))
    k_text, v_text = (x.transpose(0, 1) for x in (k_text_PGD, v_text_PGD))

    own = _scores(q_own, k_own).view(K, G, H // G, -1).transpose(0, 1).reshape(G, K * H // G, -1)
    weights = torch.cat([_scores(q_text, k_text), own], dim=-1).softmax(-1)
    weights_own = weights[..., P:].unflatten(1, (K, -1)).transpose(0, 1).flatten(0, 1)
    out_text = torch.bmm(weights[..., :P], v_text).view(G, K, -1, D).transpose(0, 1).reshape(K * G, -1, D)
    return torch.baddbmm(out_text, weights_own, v_own).view(K, H, D)


def _scores(q_XRD: Tensor, k_XTD: Tensor) -> Tensor:
    nothing = q_XRD.new_empty(1, 1, 1)
    return torch.baddbmm(nothing, q_XRD, k_XTD.transpose(1, 2), beta=0, alpha=q_XRD.shape[-1] ** -0.5)
