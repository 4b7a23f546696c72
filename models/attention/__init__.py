"""Attention of text and thoughts: one definition, several backends, one place that chooses.

`reference` is the definition; `aten` the flash kernels inside torch; `flex` torch's FlexAttention; `flash` the kernels
of the flash-attn packages; `triton` this project's own. The choice is, in this order: the argument, the environment
variable FORETHOUGHT_ATTENTION, `triton` on CUDA for whole thoughts at every position and for the newest token of
thoughts at several anchors, `aten`, `reference`: the first of these that supports the call. Asking for a backend that
does not support a call raises; the choice is logged once.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

from models.attention import aten, flash, flex, reference, triton
from models.thoughts import Anchors, Text

log = logging.getLogger(__name__)
BACKENDS = {"reference": reference, "aten": aten, "flex": flex, "flash": flash, "triton": triton}


class UnsupportedCall(ValueError):
    """A backend that was asked for does not support a call; `reason` says why."""

    def __init__(self, backend: str, reason: str):
        super().__init__(
            f"attention backend {backend!r} does not support this call: {reason}; unset it or use 'reference'"
        )
        self.reason = reason


def text_attention(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, text: Text, backend: str | None = None) -> Tensor:
    """Causal attention of packed text within its documents.

    q [B, N, H, D], k and v [B, N, G, D], H a multiple of G → [B, N, H, D] in q's dtype; zeros on padding.
    """
    chosen = _choose(q_BNHD, k_BNGD, v_BNGD, backend=backend)
    return chosen.text_attention(q_BNHD, k_BNGD, v_BNGD, text)


def thought_attention(
    q_BKSMHD: Tensor,
    k_BKTMGD: Tensor,
    v_BKTMGD: Tensor,
    k_text_BNGD: Tensor,
    v_text_BNGD: Tensor,
    anchors: Anchors,
    backend: str | None = None,
    filled_1: Tensor | None = None,
) -> Tensor:
    """Attention of thoughts: each token sees its document's text up to its anchor and its own thought up to itself.

    q [B, K, S, M, H, D] are the last S of the T tokens of each thought; k and v [B, K, T, M, G, D] all T of them;
    k_text and v_text [B, N, G, D]. → [B, K, S, M, H, D] in q's dtype. Differentiable in all five.

    filled_1: int32 [1], how many of the T tokens there are yet, of which q is the newest (S = 1): a number that the
    host never sees, so that a recorded call works at every length. Without gradient.
    """
    arguments = q_BKSMHD, k_BKTMGD, v_BKTMGD, k_text_BNGD, v_text_BNGD
    chosen = _choose(*arguments, anchors=anchors, backend=backend, filled=filled_1 is not None)
    if filled_1 is None:
        return chosen.thought_attention(*arguments, anchors)
    return chosen.thought_attention(*arguments, anchors, filled_1)


def asked_backend(backend: str | None = None) -> str | None:
    """The backend named by the argument or the environment, if any. Raises ValueError for one that does not exist."""
    asked = backend or os.environ.get("FORETHOUGHT_ATTENTION") or None
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"attention backend {asked!r} is not one of {', '.join(BACKENDS)}")
    return asked


def _choose(
    q: Tensor,
    k: Tensor,
    *others: Tensor,
    anchors: Anchors | None = None,
    backend: str | None = None,
    filled: bool = False,
):
    """The backend for text, or for thoughts where there are anchors."""
    asked = asked_backend(backend)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, *others))
    for chosen in (asked,) if asked else _preferred(q, anchors, differentiable):
        supported, reason = BACKENDS[chosen].supports(q, k, anchors, differentiable, filled)
        if supported:
            break
    if not supported and asked is not None:
        raise UnsupportedCall(asked, reason)
    if not supported:
        chosen = "reference"
    _say_once(chosen, reason, slow=not supported and q.device.type == "cuda")
    return BACKENDS[chosen]


def _preferred(q: Tensor, anchors: Anchors | None, differentiable: bool) -> tuple[str, ...]:
    """The backends to try, the best first, where none was asked for."""
    if anchors is None or q.device.type != "cuda":
        return ("aten",)
    if q.shape[2] > 1:
        # One pass in half the time of aten's two parts at every position; windows share text between their anchors.
        return ("triton", "aten") if anchors.dense else ("aten",)
    several = anchors.window is None and anchors.index_BM.numel() > 1
    # aten copies the text that each anchor sees, end to end, in every layer and for every token.
    return ("triton", "aten") if several and not differentiable else ("aten",)


@functools.cache
def _say_once(backend: str, reason: str, slow: bool) -> None:
    if slow:
        log.warning("attention runs on its dense definition, which is slow and holds all pairs: %s", reason)
    else:
        log.info("attention backend: %s (%s)", backend, reason)
