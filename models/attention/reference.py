"""Attention of text and thoughts written densely: the definition every other backend is tested against.

Any dtype and device; memory of every query times every key.

Shapes: B rows, N text positions, M anchors, K thoughts, S query tokens, T key tokens of a thought, H query heads,
G key-value heads, R = H/G queries of a group, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.precision import accumulation_dtype
from models.thoughts import Anchors, Text


def supports(
    q: Tensor, k: Tensor, anchors: Anchors | None, differentiable: bool, filled: bool = False
) -> tuple[bool, str]:
    """As aten.supports: always."""
    return True, "the definition"


def text_attention(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, text: Text) -> Tensor:
    """A token sees the tokens of its own document up to itself; padding sees nothing and gets zeros."""
    B, N, H, D = q_BNHD.shape
    G = k_BNGD.shape[2]
    same_BNN = text.document_BN[:, :, None] == text.document_BN[:, None, :]
    visible_BNN = same_BNN.tril() & (text.document_BN >= 0)[:, :, None]
    q_BNGRD = q_BNHD.reshape(B, N, G, H // G, D)
    scores = torch.einsum("bngrd,bmgd->bgrnm", _exact(q_BNGRD), _exact(k_BNGD)) * D**-0.5
    weights = _softmax(scores, visible_BNN[:, None, None])
    return torch.einsum("bgrnm,bmgd->bngrd", weights, _exact(v_BNGD)).reshape(B, N, H, D).to(q_BNHD.dtype)


def thought_attention(
    q_BKSMHD: Tensor,
    k_BKTMGD: Tensor,
    v_BKTMGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    anchors: Anchors,
    filled_1: Tensor | None = None,
) -> Tensor:
    """A thought token sees the text of its document up to its anchor, and its own thought up to itself.

    filled_1: int32 [1], how many of the T tokens there are, the query being the newest of them (S = 1).
    """
    B, K, S, M, H, D = q_BKSMHD.shape
    T, G, N = k_BKTMGD.shape[2], k_BKTMGD.shape[4], k_text_BNGD.shape[1]
    q = _exact(q_BKSMHD).reshape(B, K, S, M, G, H // G, D)

    n_N = torch.arange(N, device=q.device)
    anchor_BM = anchors.index_BM.clamp(min=0)
    document_BM = anchors.text.document_BN.gather(1, anchor_BM)
    text_visible_BMN = (
        (anchors.text.document_BN[:, None, :] == document_BM[:, :, None])
        & (n_N <= anchors.index_BM[:, :, None])
        & (document_BM >= 0)[:, :, None]
    )
    if filled_1 is None:
        own_visible_ST = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    else:
        own_visible_ST = (torch.arange(T, device=q.device) < filled_1)[None]
        # What is not filled yet may be anything, NaN included.
        v_BKTMGD = v_BKTMGD.masked_fill(~own_visible_ST[0, :, None, None, None], 0.0)

    text_scores = torch.einsum("bksmgrd,bngd->bksmgrn", q, _exact(k_text_BNGD))
    own_scores = torch.einsum("bksmgrd,bktmgd->bksmgrt", q, _exact(k_BKTMGD))
    scores = torch.cat([text_scores, own_scores], dim=-1) * D**-0.5
    visible = torch.cat(
        [
            text_visible_BMN[:, None, None].expand(B, K, S, M, N),
            own_visible_ST[:, None].expand(B, K, S, M, T),
        ],
        dim=-1,
    )
    weights = _softmax(scores, visible[..., None, None, :])
    out = torch.einsum("bksmgrn,bngd->bksmgrd", weights[..., :N], _exact(v_text_BNGD))
    out = out + torch.einsum("bksmgrt,bktmgd->bksmgrd", weights[..., N:], _exact(v_BKTMGD))
    return out.reshape(B, K, S, M, H, D).to(q_BKSMHD.dtype)


def _exact(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys; zeros where none is."""
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return weights.masked_fill(~visible, 0.0)
