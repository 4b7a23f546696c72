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

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention.caching import kept_with_first
from models.pointwise import merged
from models.precision import accumulation_dtype
from models.thoughts import Anchors, Text

# Sequences, and heads, of one call: they are the y and z axes of the grid of a CUDA flash kernel.
MOST_AT_ONCE = 2**16 - 1
# A CUDA flash backward holds the queries' gradients in fp32, each sequence filled up to 128 tokens: so many elements.
PADDED_TOKENS, MOST_PADDED = 128, 2**27


class Sequences(NamedTuple):
    """Sequences of several lengths, none empty, one behind the other.

    q_starts, k_starts: int32 [sequences + 1], where each begins, and the total.
    q_longest, k_longest: the greatest lengths.
    """

    q_starts: Tensor
    k_starts: Tensor
    q_longest: int
    k_longest: int

    @staticmethod
    def of_lengths(q_lengths: list[int], k_lengths: list[int], device: torch.device) -> Sequences:
        q_starts, k_starts = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (q_lengths, k_lengths)
        )
        return Sequences(q_starts, k_starts, max(q_lengths), max(k_lengths))


@dataclass(frozen=True)
class Kernels:
    """A flash kernel and its backward: q, O and dO [b, s, h, d], k and v [b, t, g, d], h a multiple of g;
    L [b, h, s] in fp32 (fp64 for fp64), natural logarithm.

    forward(q, k, v, causal, sequences, filled_1) → (O, L). s = t where causal. With filled_1, int32 [1], only so many
    of the t keys of each sequence count; kernels that cannot do so are never asked.
    backward(dO, q, k, v, O, L, causal, sequences) → (dQ, dK, dV), given the O and L of the whole attention, of which
    k and v may be a part.
    varlen: whether they take `sequences`. Then q, O and dO are [all s, h, d], k and v [all t, g, d], L [h, all s].
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    varlen: bool = False


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
        filled_1: Tensor | None = None,
    ) -> Tensor:
        """As reference.thought_attention, for S = T (a whole thought) or S = 1 (its newest token)."""
        kernels = self.kernels[q_BKSMHD.device.type]
        if not torch.is_grad_enabled():
            return _thoughts(q_BKSMHD, k_BKTMGD, v_BKTMGD, k_text_BNGD, v_text_BNGD, anchors, kernels, filled_1)[0]
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
        out, lse = _thoughts(q, k, v, k_text, v_text, anchors, kernels)
        ctx.save_for_backward(q, k, v, k_text, v_text, out, lse)
        ctx.anchors, ctx.kernels = anchors, kernels
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, k_text, v_text, out, lse = ctx.saved_tensors
        grads = _thought_gradients(grad, q, k, v, k_text, v_text, out, lse, ctx.anchors, ctx.kernels)
        return *grads, None, None


def _thoughts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    anchors: Anchors,
    kernels: Kernels,
    filled_1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """O [B, K, S, M, H, D] and L [B, K, S, M, H]."""
    out_own, lse_own = _own_part(q, k, v, kernels, filled_1)
    if anchors.window is not None:
        out_text, lse_text = _window_part(q.flatten(1, 2), k_text, v_text, anchors, kernels)
        out_text = out_text.view_as(q)
        lse_text = lse_text.view(*q.shape[:3], *lse_text.shape[2:]).transpose(-1, -2)
    else:
        out_text, lse_text = _prefix_part(q, k_text, v_text, anchors, kernels)
    return merged(out_own, lse_own, out_text, lse_text), torch.logaddexp(lse_own, lse_text)


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
    if anchors.window is not None:
        lse_rows = lse.flatten(1, 2).transpose(-1, -2)
        dq_text, dk_text, dv_text = _window_part_backward(
            grad.flatten(1, 2), q.flatten(1, 2), k_text, v_text, out.flatten(1, 2), lse_rows, anchors, kernels
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
    if kernels.varlen:
        parts = [_dense_rows(rows, k, v, text, kernels) for (rows,) in _few_rows(text, q)]
        out, lse = (_joined(x, dim=1) for x in zip(*parts, strict=True))
        return out, lse
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
    if kernels.varlen:
        parts = [
            _dense_rows_backward(g, rows, k, v, o, l, text, kernels)
            for g, rows, o, l in _few_rows(text, grad, q, out, lse)
        ]
        dq, dk, dv = parts[0]
        for _, dk_part, dv_part in parts[1:]:
            dk, dv = dk + dk_part, dv + dv_part
        return _joined([part[0] for part in parts], dim=1), dk, dv
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


# The same as one call. So that nothing but k and v is copied, what follows the last document of a row is a sequence
# too; it reaches no other, and what comes of it is overwritten.


@kept_with_first
def _documents(text: Text, R: int) -> tuple[Sequences, Tensor | None]:
    """The documents and padding of every row, R times each, and where padding is [B, 1, N], if anywhere."""
    B, N = text.shape
    lengths: list[list[int]] = [[] for _ in range(B)]
    for b, start, end in text.spans:
        lengths[b].append(end - start)
    padding = [N - sum(row) for row in lengths]
    every = [n for row, rest in zip(lengths, padding, strict=True) for n in R * (row + [rest] * (rest > 0))]
    padding_B1N = (text.document_BN < 0)[:, None] if any(padding) else None
    return Sequences.of_lengths(every, every, text.document_BN.device), padding_B1N


def _few_rows(text: Text, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors [B, R, …] in parts over R that have no more documents than one call takes."""
    once = _documents(text, 1)[0].q_starts.shape[0] - 1
    return zip(*(x.split(max(1, MOST_AT_ONCE // once), dim=1) for x in tensors), strict=True)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _dense_rows(q: Tensor, k: Tensor, v: Tensor, text: Text, kernels: Kernels) -> tuple[Tensor, Tensor]:
    B, R, N, H, D = q.shape
    sequences, padding_B1N = _documents(text, R)
    k_rows, v_rows = (x[:, None].expand(B, R, N, -1, D).flatten(0, 2) for x in (k, v))
    out, lse = kernels.forward(q.flatten(0, 2), k_rows, v_rows, True, sequences)
    out, lse = out.view(q.shape), lse.view(H, B, R, N).permute(1, 2, 0, 3)
    if padding_B1N is not None:
        out = out.masked_fill(padding_B1N[..., None, None], 0.0)
        lse = lse.masked_fill(padding_B1N[:, :, None], float("-inf"))
    return out, lse


def _dense_rows_backward(grad, q, k, v, out, lse, text, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    B, R, N, H, D = q.shape
    sequences, padding_B1N = _documents(text, R)
    k_rows, v_rows = (x[:, None].expand(B, R, N, -1, D).flatten(0, 2) for x in (k, v))
    grad, q_rows, out = (x.flatten(0, 2) for x in (grad, q, out))
    lse_rows = lse.permute(2, 0, 1, 3).reshape(H, B * R * N)
    dq, dk_rows, dv_rows = kernels.backward(grad, q_rows, k_rows, v_rows, out, lse_rows, True, sequences)
    dq, dk, dv = dq.view(q.shape), dk_rows.view(B, R, *k.shape[1:]).sum(1), dv_rows.view(B, R, *v.shape[1:]).sum(1)
    if padding_B1N is not None:
        dq = dq.masked_fill(padding_B1N[..., None, None], 0.0)
        dk, dv = (x.masked_fill(padding_B1N[:, 0, :, None, None], 0.0) for x in (dk, dv))
    return dq, dk, dv


# Part 1, anchors in a window of positions: the text inside the window is dense; what its first document has before the
# window is seen whole by all of that document's query rows in it.
# q and O [B, R, M, H, D]; L [B, R, H, M].


def _window_part(q: Tensor, k: Tensor, v: Tensor, anchors: Anchors, kernels: Kernels) -> tuple[Tensor, Tensor]:
    assert anchors.window is not None
    first, last = anchors.window
    out, lse = _dense_part(q, k[:, first:last], v[:, first:last], anchors.window_text, kernels)
    for b, start, queries in anchors.before_window:
        here, R, G = q[b, :, :queries], q.shape[1], k.shape[2]
        rows = _rows_to_sequence(here, G)
        o, l = kernels.forward(rows, k[b, None, start:first], v[b, None, start:first], False)
        o, l = _sequence_to_rows(o, here), l.view(G, R, queries, -1).permute(1, 0, 3, 2).reshape(R, -1, queries)
        inside, l_inside = out[b, :, :queries], lse[b, :, :, :queries]
        out[b, :, :queries] = merged(inside, l_inside.transpose(1, 2), o, l.transpose(1, 2))
        lse[b, :, :, :queries] = torch.logaddexp(l_inside, l)
    return out, lse


def _window_part_backward(grad, q, k, v, out, lse, anchors, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    first, last = anchors.window
    inside = slice(first, last)
    dq, dk_inside, dv_inside = _dense_part_backward(
        grad, q, k[:, inside], v[:, inside], out, lse, anchors.window_text, kernels
    )
    if anchors.dense:
        return dq, dk_inside, dv_inside
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dk[:, inside], dv[:, inside] = dk_inside, dv_inside
    for b, start, queries in anchors.before_window:
        here, G = q[b, :, :queries], k.shape[2]
        g, rows, o = (_rows_to_sequence(x[b, :, :queries], G) for x in (grad, q, out))
        l = _rows_to_sequence(lse[b, :, :, :queries].transpose(1, 2)[..., None], G)[..., 0].transpose(1, 2)
        dq_rows, dk_rows, dv_rows = kernels.backward(
            g, rows, k[b, None, start:first], v[b, None, start:first], o, l, False
        )
        dq[b, :, :queries] += _sequence_to_rows(dq_rows, here)
        dk[b, start:first], dv[b, start:first] = dk_rows[0], dv_rows[0]
    return dq, dk, dv


def _rows_to_sequence(x: Tensor, G: int) -> Tensor:
    """[1, R·n·(H/G), G, D] of x [R, n, H, D]."""
    return x.unflatten(2, (G, -1)).transpose(2, 3).flatten(0, 2)[None]


def _sequence_to_rows(x: Tensor, like: Tensor) -> Tensor:
    R, n, H, D = like.shape
    return x.view(R, n, -1, x.shape[2], D).transpose(2, 3).reshape(like.shape)


# Part 1, deep: the query tokens of one anchor are one sequence against the text the anchor sees, and the query heads of
# a group are tokens of it, so that a kernel lays out each key-value head once.
# q and O [B, K, S, M, H, D], as sequences [B, M, K·S·R, G, D]; L [B, K, S, M, H], as sequences [B, M, G, K·S·R], -inf
# where an anchor sees no text.


def _to_sequences(x: Tensor, G: int) -> Tensor:
    return x.unflatten(-2, (G, -1)).permute(0, 3, 1, 2, 5, 4, 6).flatten(2, 4)


def _from_sequences(x: Tensor, like: Tensor) -> Tensor:
    B, K, S, M, H, D = like.shape
    return x.reshape(B, M, K, S, -1, x.shape[-2], D).permute(0, 2, 3, 1, 5, 4, 6).reshape(like.shape)


def _prefix_part(q: Tensor, k: Tensor, v: Tensor, anchors: Anchors, kernels: Kernels) -> tuple[Tensor, Tensor]:
    B, K, S, M, H, D = q.shape
    G = k.shape[2]
    q_rows = _to_sequences(q, G)
    if B * M == len(anchors.prefixes) == 1:
        # The one call gives all there is, and nothing has to be filled in for anchors without text.
        ((_, _, start, end),) = anchors.prefixes
        out, lse = kernels.forward(q_rows[0], k[:, start:end], v[:, start:end], False)
        return _from_sequences(out, q), lse.view(G, K, S, 1, H // G).permute(1, 2, 3, 0, 4).reshape(B, K, S, M, H)
    out = torch.zeros_like(q_rows)
    lse = q.new_full((B, M, G, q_rows.shape[2]), float("-inf"), dtype=accumulation_dtype(q.dtype))
    if kernels.varlen and anchors.prefixes:
        p = _prefixes(anchors, q_rows.shape[2])
        o, l = kernels.forward(p.queries(q_rows), p.keys(k), p.keys(v), False, p.sequences)
        out[p.row_P, p.number_P] = o.unflatten(0, (-1, q_rows.shape[2]))
        lse[p.row_P, p.number_P] = l.unflatten(1, (-1, q_rows.shape[2])).transpose(0, 1)
    else:
        for b, m, start, end in anchors.prefixes:
            o, l = kernels.forward(q_rows[b, m, None], k[b, None, start:end], v[b, None, start:end], False)
            out[b, m], lse[b, m] = o[0], l[0]
    lse = lse.view(B, M, G, K, S, H // G).permute(0, 3, 4, 1, 2, 5).reshape(B, K, S, M, H)
    return _from_sequences(out, q), lse


def _prefix_part_backward(grad, q, k, v, out, lse, anchors, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    G = k.shape[2]
    grad_rows, q_rows, out_rows = (_to_sequences(x, G) for x in (grad, q, out))
    lse_rows = _to_sequences(lse[..., None], G)[..., 0]
    dq = torch.zeros_like(q_rows)
    # Prefixes of one document overlap, so their gradients are summed in the accumulation dtype.
    dk = torch.zeros(k.shape, dtype=lse.dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=lse.dtype, device=v.device)
    if kernels.varlen and anchors.prefixes:
        p = _prefixes(anchors, q_rows.shape[2])
        g, q_p, o, l = (p.queries(x) for x in (grad_rows, q_rows, out_rows, lse_rows))
        dq_p, dk_p, dv_p = kernels.backward(g, q_p, p.keys(k), p.keys(v), o, l.t(), False, p.sequences)
        dq[p.row_P, p.number_P] = dq_p.unflatten(0, (-1, q_rows.shape[2]))
        for total, rows in ((dk, dk_p), (dv, dv_p)):
            total.flatten(0, 1).index_add_(0, p.key, rows.to(total.dtype))
    else:
        for b, m, start, end in anchors.prefixes:
            g, q_m, o = (x[b, m, None] for x in (grad_rows, q_rows, out_rows))
            l = lse_rows[b, m].t()[None]
            dq_m, dk_m, dv_m = kernels.backward(g, q_m, k[b, None, start:end], v[b, None, start:end], o, l, False)
            dq[b, m] = dq_m[0]
            dk[b, start:end] += dk_m[0]
            dv[b, start:end] += dv_m[0]
    return _from_sequences(dq, q), dk.to(k.dtype), dv.to(v.dtype)


@dataclass(frozen=True)
class _Prefixes:
    """The P anchors that see text, as the sequences of one call, whose keys are their prefixes, gathered.

    row_P, number_P: int64, row and number of each. key: int64, the tokens of all prefixes, counted through all rows.
    """

    row_P: Tensor
    number_P: Tensor
    key: Tensor
    sequences: Sequences

    def queries(self, x: Tensor) -> Tensor:
        """[all q, …] of sequences x [B, M, q, …]."""
        return x[self.row_P, self.number_P].flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """[all t, …] of x [B, N, …]."""
        return x.flatten(0, 1)[self.key]


@kept_with_first
def _prefixes(anchors: Anchors, queries: int) -> _Prefixes:
    N, device = anchors.text.shape[1], anchors.index_BM.device
    rows, numbers, starts, ends = (torch.tensor(x) for x in zip(*anchors.prefixes, strict=True))
    key = torch.cat([torch.arange(r * N + s, r * N + e) for r, s, e in zip(rows, starts, ends, strict=True)])
    sequences = Sequences.of_lengths([queries] * len(rows), (ends - starts).tolist(), device)
    return _Prefixes(rows.to(device), numbers.to(device), key.to(device), sequences)


# Part 2: a thought's own tokens, [B, K, S, M, heads, D] seen as batch B·K, sequence S, heads M·heads. The newest token
# alone sees all, so that the query heads of a group can be its sequence.
# O like q; L [B, K, S, M, H].


def _own_part(
    q: Tensor, k: Tensor, v: Tensor, kernels: Kernels, filled_1: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    B, K, S, M, H, D = q.shape
    if M * H > MOST_AT_ONCE:
        few = _few_anchors(MOST_AT_ONCE // H, q, k, v)
        parts = [_own_part(q_m, k_m, v_m, kernels, filled_1) for q_m, k_m, v_m in few]
        out, lse = (_joined(x, dim=3) for x in zip(*parts, strict=True))
        return out, lse
    if S == 1:
        G = k.shape[4]
        q_rows = q.reshape(B * K, M * G, H // G, D).transpose(1, 2)
        count = {} if filled_1 is None else {"filled_1": filled_1}
        out, lse = kernels.forward(q_rows, _as_sequences(k), _as_sequences(v), False, **count)
        return out.transpose(1, 2).reshape(q.shape), lse.reshape(q.shape[:-1])
    out, lse = kernels.forward(_as_sequences(q), _as_sequences(k), _as_sequences(v), True)
    return out.reshape(q.shape), lse.transpose(1, 2).reshape(q.shape[:-1])


def _own_part_backward(grad, q, k, v, out, lse, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    B, K, S, M, H, D = q.shape
    T = k.shape[2]
    most = MOST_AT_ONCE
    if kernels.varlen:
        most = min(most, max(H, MOST_PADDED // (B * K * max(S, PADDED_TOKENS) * D)))
    if M * H > most:
        parts = [
            _own_part_backward(g, q_m, k_m, v_m, o, l, kernels)
            for g, q_m, k_m, v_m, o, l in _few_anchors(most // H, grad, q, k, v, out, lse)
        ]
        dq, dk, dv = (_joined(x, dim=3) for x in zip(*parts, strict=True))
        return dq, dk, dv
    lse_rows = lse.flatten(0, 1).flatten(2, 3).transpose(1, 2)
    grad, q_rows, k_rows, v_rows, out = (_as_sequences(x) for x in (grad, q, k, v, out))
    dq, dk, dv = kernels.backward(grad, q_rows, k_rows, v_rows, out, lse_rows, S == T)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _few_anchors(most: int, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors [B, K, S, M, …] in parts over M, which is at most `most` in each."""
    return zip(*(x.split(max(1, most), dim=3) for x in tensors), strict=True)


def _as_sequences(x: Tensor) -> Tensor:
    return x.flatten(0, 1).flatten(2, 3)
