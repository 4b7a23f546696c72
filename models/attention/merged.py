"""Attention of text and thoughts from any flash kernel: its two parts, their merge and the exact backward.

A thought's keys are two disjoint sets: the text up to its anchor and its own tokens. Each part runs through an ordinary
flash kernel, and the parts combine by their log-sum-exps: L = log Σ exp Lᵢ, O = Σ exp(Lᵢ − L) Oᵢ.

Backward is exact and needs no kernel of its own: a flash backward recomputes P = exp(scores − L) and
delta = rowsum(dO ∘ O) from the O and L it is given, so each part is run with the *merged* O and L, and the parts'
dQ add up. Differentiating through the merge instead would need the gradient of each part's L, which stock flash
backwards drop without a word.

Shapes as in reference.py. Thoughts are laid out [B, K, S, M, heads, D], which makes both parts views: for anchors
everywhere a slice over M is a row of text; and folding M into the heads makes a thought a sequence of S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.pointwise import merged
from models.precision import accumulation_dtype
from models.thoughts import Anchors, Text


@dataclass(frozen=True)
class Kernels:
    """A flash kernel and its backward: q, O and dO [b, s, h, d], k and v [b, t, g, d], h a multiple of g;
    L [b, h, s] in fp32 (fp64 for fp64), natural logarithm.

    forward(q, k, v, causal) → (O, L). s = t where causal.
    backward(dO, q, k, v, O, L, causal) → (dQ, dK, dV), given the O and L of the whole attention, of which k and v may
    be a part.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class MergedAttention:
    """The attention of text and thoughts that runs on the given kernels, by type of device."""

    kernels: Mapping[str, Kernels]

    def text_attention(self, q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, text: Text) -> Tensor:
        """As reference.text_attention."""
        return _TextAttention.apply(q_BNHD, k_BNGD, v_BNGD, text, self.kernels[q_BNHD.device.type])

    def thought_attention(
        self,
        q_BKSMHD: Tensor,
        k_BKTMGD: Tensor,
        v_BKTMGD: Tensor,
        k_text_BNGD: Tensor,
        v_text_BNGD: Tensor,
        anchors: Anchors,
    ) -> Tensor:
        """As reference.thought_attention, for S = T (a whole thought) or S = 1 (its newest token)."""
        kernels = self.kernels[q_BKSMHD.device.type]
        return _ThoughtAttention.apply(q_BKSMHD, k_BKTMGD, v_BKTMGD, k_text_BNGD, v_text_BNGD, anchors, kernels)

    def dense_part(self, q: Tensor, k: Tensor, v: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """O [B, R, N, H, D] and L [B, R, H, N] of query rows q [B, R, N, H, D], each aligned with the text, whose keys
        and values are k and v [B, N, G, D]: causal within each document; zeros and -inf on padding."""
        return _dense_part(q, k, v, text, self.kernels[q.device.type])

    def thought_gradients(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_text: Tensor,
        v_text: Tensor,
        out: Tensor,
        lse: Tensor,
        anchors: Anchors,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, k_text and v_text given the O [B, K, S, M, H, D] and L [B, K, S, M, H] of thought
        attention, whoever computed them."""
        return _thought_gradients(grad, q, k, v, k_text, v_text, out, lse, anchors, self.kernels[q.device.type])


class _TextAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BNHD, k_BNGD, v_BNGD, text, kernels):
        out, lse = _dense_part(q_BNHD[:, None], k_BNGD, v_BNGD, text, kernels)
        ctx.save_for_backward(q_BNHD, k_BNGD, v_BNGD, out, lse)
        ctx.text, ctx.kernels = text, kernels
        return out[:, 0]

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _dense_part_backward(grad[:, None], q[:, None], k, v, out, lse, ctx.text, ctx.kernels)
        return dq[:, 0], dk, dv, None, None


class _ThoughtAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, k_text, v_text, anchors, kernels):
        out_own, lse_own = _own_part(q, k, v, kernels)
        if anchors.dense:
            out_text, lse_text = _dense_part(q.flatten(1, 2), k_text, v_text, anchors.text, kernels)
            out_text = out_text.view_as(q)
            lse_text = lse_text.view(*q.shape[:3], *lse_text.shape[2:]).transpose(-1, -2)
        else:
            out_text, lse_text = _prefix_part(q, k_text, v_text, anchors, kernels)
        lse = torch.logaddexp(lse_own, lse_text)
        out = merged(out_own, lse_own, out_text, lse_text)
        ctx.save_for_backward(q, k, v, k_text, v_text, out, lse)
        ctx.anchors, ctx.kernels = anchors, kernels
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, k_text, v_text, out, lse = ctx.saved_tensors
        grads = _thought_gradients(grad, q, k, v, k_text, v_text, out, lse, ctx.anchors, ctx.kernels)
        return *grads, None, None


def _thought_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    out: Tensor,
    lse: Tensor,
    anchors: Anchors,
    kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    dq, dk, dv = _own_part_backward(grad, q, k, v, out, lse, kernels)
    if anchors.dense:
        lse_rows = lse.flatten(1, 2).transpose(-1, -2)
        dq_text, dk_text, dv_text = _dense_part_backward(
            grad.flatten(1, 2), q.flatten(1, 2), k_text, v_text, out.flatten(1, 2), lse_rows, anchors.text, kernels
        )
        dq_text = dq_text.view_as(q)
    else:
        dq_text, dk_text, dv_text = _prefix_part_backward(grad, q, k_text, v_text, out, lse, anchors, kernels)
    return dq + dq_text, dk, dv, dk_text, dv_text


# Part 1, dense: query rows q [B, R, N, H, D], each aligned with the text, causal within each document.
# O [B, R, N, H, D]; L [B, R, H, N], -inf on padding.


def _dense_part(q: Tensor, k: Tensor, v: Tensor, text: Text, kernels: Kernels) -> tuple[Tensor, Tensor]:
    B, R, N, H, D = q.shape
    if R == 1 and text.whole_rows:
        out, lse = kernels.forward(q[:, 0], k, v, True)
        return out[:, None], lse[:, None]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_full((B, R, H, N), float("-inf"), dtype=accumulation_dtype(q.dtype))
    for b, start, end in text.spans:
        here = slice(start, end)
        k_rows, v_rows = (x[b, None, here].expand(R, -1, -1, -1) for x in (k, v))
        out[b, :, here], lse[b, :, :, here] = kernels.forward(q[b, :, here], k_rows, v_rows, True)
    return out, lse


def _dense_part_backward(grad, q, k, v, out, lse, text, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    R = q.shape[1]
    if R == 1 and text.whole_rows:
        dq, dk, dv = kernels.backward(grad[:, 0], q[:, 0], k, v, out[:, 0], lse[:, 0], True)
        return dq[:, None], dk, dv
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for b, start, end in text.spans:
        here = slice(start, end)
        k_rows, v_rows = (x[b, None, here].expand(R, -1, -1, -1) for x in (k, v))
        dq[b, :, here], dk_rows, dv_rows = kernels.backward(
            grad[b, :, here], q[b, :, here], k_rows, v_rows, out[b, :, here], lse[b, :, :, here], True
        )
        dk[b, here] = dk_rows.sum(0)
        dv[b, here] = dv_rows.sum(0)
    return dq, dk, dv


# Part 1, deep: the query tokens of one anchor are one sequence against the text the anchor sees, and the query heads of
# a group are tokens of it, so that a kernel lays out each key-value head once.
# q and O [B, K, S, M, H, D], as sequences [B, M, K·S·R, G, D]; L [B, K, S, M, H], as sequences [B, M, G, K·S·R].


def _to_sequences(x: Tensor, G: int) -> Tensor:
    return x.unflatten(-2, (G, -1)).permute(0, 3, 1, 2, 5, 4, 6).flatten(2, 4)


def _from_sequences(x: Tensor, like: Tensor) -> Tensor:
    B, K, S, M, H, D = like.shape
    return x.view(B, M, K, S, -1, x.shape[3], D).permute(0, 2, 3, 1, 5, 4, 6).reshape(like.shape)


def _prefix_part(q: Tensor, k: Tensor, v: Tensor, anchors: Anchors, kernels: Kernels) -> tuple[Tensor, Tensor]:
    B, K, S, M, H, D = q.shape
    G = k.shape[2]
    q_rows = _to_sequences(q, G)
    out = torch.zeros_like(q_rows)
    lse = q.new_full((B, M, G, q_rows.shape[2]), float("-inf"), dtype=accumulation_dtype(q.dtype))
    for b, m, start, end in anchors.prefixes:
        o, l = kernels.forward(q_rows[b, m, None], k[b, None, start:end], v[b, None, start:end], False)
        out[b, m], lse[b, m] = o[0], l[0]
    lse = lse.view(B, M, G, K, S, H // G).permute(0, 3, 4, 1, 2, 5).reshape(B, K, S, M, H)
    return _from_sequences(out, q), lse


def _prefix_part_backward(grad, q, k, v, out, lse, anchors, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    G = k.shape[2]
    grad_rows, q_rows, out_rows = (_to_sequences(x, G) for x in (grad, q, out))
    lse_rows = _to_sequences(lse[..., None], G)[..., 0].transpose(2, 3)
    dq = torch.zeros_like(q_rows)
    # Prefixes of one document overlap, so their gradients are summed in the accumulation dtype.
    dk = torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=lse.dtype, device=v.device)
    for b, m, start, end in anchors.prefixes:
        g, q_m, o, l = (x[b, m, None] for x in (grad_rows, q_rows, out_rows, lse_rows))
        dq_m, dk_m, dv_m = kernels.backward(g, q_m, k[b, None, start:end], v[b, None, start:end], o, l, False)
        dq[b, m] = dq_m[0]
        dk[b, start:end] += dk_m[0]
        dv[b, start:end] += dv_m[0]
    return _from_sequences(dq, q), dk.to(k.dtype), dv.to(v.dtype)


# Part 2: a thought's own tokens, [B, K, S, M, heads, D] seen as batch B·K, sequence S, heads M·heads. The newest token
# alone sees all, so that the query heads of a group can be its sequence.
# O like q; L [B, K, S, M, H].


def _as_sequences(x: Tensor) -> Tensor:
    return x.flatten(0, 1).flatten(2, 3)


def _own_part(q: Tensor, k: Tensor, v: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
    B, K, S, M, H, D = q.shape
    if S == 1:
        G = k.shape[4]
        q_rows = q.view(B * K, M * G, H // G, D).transpose(1, 2)
        out, lse = kernels.forward(q_rows, _as_sequences(k), _as_sequences(v), False)
        return out.transpose(1, 2).reshape(q.shape), lse.reshape(q.shape[:-1])
    out, lse = kernels.forward(_as_sequences(q), _as_sequences(k), _as_sequences(v), True)
    return out.reshape(q.shape), lse.transpose(1, 2).reshape(q.shape[:-1])


def _own_part_backward(grad, q, k, v, out, lse, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    lse_rows = lse.flatten(0, 1).flatten(2, 3).transpose(1, 2)
    grad, q_rows, k_rows, v_rows, out = (_as_sequences(x) for x in (grad, q, k, v, out))
    dq, dk, dv = kernels.backward(grad, q_rows, k_rows, v_rows, out, lse_rows, q.shape[2] == k.shape[2])
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
