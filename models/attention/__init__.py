"""Attention of text and thoughts: one definition, several backends, one place that chooses.

`reference` is the definition; `aten` the flash kernels inside torch. The choice is, in this order: the argument, the
environment variable FORETHOUGHT_ATTENTION, the first backend that serves the call. A backend that was asked for and
cannot serve raises; what is chosen is logged once.
"""

from __future__ import annotations

import functools
import logging
import os

from torch import Tensor

from models.attention import aten, reference
from models.thoughts import Anchors, Text

log = logging.getLogger(__name__)
BACKENDS = ("aten", "reference")


def text_attention(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, text: Text, backend: str | None = None) -> Tensor:
    """Causal attention of packed text within its documents.

    q [B, N, H, D], k and v [B, N, G, D], H a multiple of G → [B, N, H, D] in q's dtype; zeros on padding.
    """
    N = q_BNHD.shape[1]
    chosen = _choose(q_BNHD, N, N, backend)
    return chosen.text_attention(q_BNHD, k_BNGD, v_BNGD, text)


def thought_attention(
    q_BKSMHD: Tensor,
    k_BKTMGD: Tensor,
    v_BKTMGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    anchors: Anchors,
    backend: str | None = None,
) -> Tensor:
    """Attention of thoughts: each token sees its document's text up to its anchor and its own thought up to itself.

    q [B, K, S, M, H, D] are the last S of the T tokens of each thought; k and v [B, K, T, M, G, D] all T of them;
    k_text and v_text [B, N, G, D]. → [B, K, S, M, H, D] in q's dtype. Differentiable in all five.
    """
    chosen = _choose(q_BKSMHD, q_BKSMHD.shape[2], k_BKTMGD.shape[2], backend)
    return chosen.thought_attention(q_BKSMHD, k_BKTMGD, v_BKTMGD, k_text_BNGD, v_text_BNGD, anchors)


def _choose(q: Tensor, own_queries: int, own_keys: int, asked: str | None):
    asked = asked or os.environ.get("FORETHOUGHT_ATTENTION")
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"attention backend {asked!r} is not one of {', '.join(BACKENDS)}")
    if asked == "reference":
        return reference
    served, reason = aten.supports(q, own_queries, own_keys)
    if served:
        _say_once("aten", reason)
        return aten
    if asked == "aten":
        raise ValueError(f"attention backend 'aten' cannot serve this call: {reason}; unset it or use 'reference'")
    _say_once("reference", reason)
    return reference


@functools.cache
def _say_once(backend: str, reason: str) -> None:
    log.info("attention backend: %s (%s)", backend, reason)
