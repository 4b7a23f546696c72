"""Log-probs and samples from hidden states, without ever holding [tokens × vocabulary] logits.

Logits are fp32 (fp64 for fp64) from the product on: rounded to bf16 they would err by up to 2⁻⁹ of their size, as much
as all else that is bf16.

Both work through the rows in chunks; the differentiable one computes each chunk's logits again in backward.

Shapes: R rows (tokens), C rows of a chunk, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.flops import count_vocabulary
from models.precision import accumulation_dtype, bf16_products, operands, wide, wide_linear

# Logits held at once, in elements: 2²⁵ fp32 logits are 128 MiB. Each chunk adds to the whole gradient of the head, on
# which a GPU would spend most of its time if chunks were small: 2²⁸ are 1 GiB.
CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS = 2**25, 2**28
# What is done to logits is half a dozen passes over them, on CPU of so many at a time that they stay in a cache.
CACHED_ELEMENTS = 2**20


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(1, size))]


def _chunks(hidden_RW: Tensor, weight_VW: Tensor) -> list[slice]:
    elements = CUDA_CHUNK_ELEMENTS if hidden_RW.is_cuda else CHUNK_ELEMENTS
    return _slices(len(hidden_RW), max(1, elements // len(weight_VW)))


def _products(hidden_RW: Tensor, copy_VW: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each chunk with its hidden states in the copy's dtype and their logits, which the next one's are written over."""
    chunks = _chunks(hidden_RW, copy_VW)
    dtype = accumulation_dtype(hidden_RW.dtype)
    # One allocation: fresh pages cost a CPU about as long as a product in bf16.
    held_CV = hidden_RW.new_empty(max((c.stop - c.start for c in chunks), default=0), len(copy_VW), dtype=dtype)
    for c in chunks:
        hidden_CW, product_CV = hidden_RW[c].to(copy_VW.dtype), held_CV[: c.stop - c.start]
        with bf16_products(hidden_RW.dtype):
            wide(hidden_CW, copy_VW.t(), out=product_CV)
        yield c, hidden_CW, product_CV


def _in_cache(product_CV: Tensor) -> list[slice]:
    """Rows of a chunk to go through one after the other."""
    C, V = product_CV.shape
    return _slices(C, C if product_CV.is_cuda else max(1, CACHED_ELEMENTS // V))


def _logits(product_CV: Tensor, temperature: float, banned_V: Tensor | None) -> Tensor:
    """Written over the head's product."""
    if temperature != 1.0:
        product_CV /= temperature
    if banned_V is not None:
        # Many times faster than masked_fill with a mask that is broadcast.
        product_CV += torch.zeros_like(banned_V, dtype=product_CV.dtype).masked_fill_(banned_V, float("-inf"))
    return product_CV


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RW, weight_VW, targets_R, temperature, banned_V):
        copy = operands(hidden_RW[:0], weight_VW)[1]
        logprobs_R = hidden_RW.new_empty(len(targets_R), dtype=accumulation_dtype(hidden_RW.dtype))
        lse_R = torch.empty_like(logprobs_R)
        for c, _, product_CV in _products(hidden_RW, copy):
            targets_C1 = targets_R[c, None]
            for r in _in_cache(product_CV):
                logits_rV = _logits(product_CV[r], temperature, banned_V)
                target_r, highest_r1 = logits_rV.gather(-1, targets_C1[r])[:, 0], logits_rV.amax(-1, keepdim=True)
                # In place, where logsumexp would hold the logits a second time.
                lse_r = logits_rV.sub_(highest_r1).exp_().sum(-1).log_() + highest_r1[:, 0]
                lse_R[c][r], logprobs_R[c][r] = lse_r, target_r - lse_r
        ctx.save_for_backward(hidden_RW, copy, targets_R, lse_R, banned_V)
        ctx.temperature, ctx.master_dtype = temperature, weight_VW.dtype
        return logprobs_R

    @staticmethod
    def backward(ctx, grad_R):
        hidden_RW, copy, targets_R, lse_R, banned_V = ctx.saved_tensors
        scale_R1, temperature = grad_R[:, None] / ctx.temperature, ctx.temperature
        grad_hidden = torch.empty_like(hidden_RW) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for c, hidden_CW, product_CV in _products(hidden_RW, copy):
            targets_C1, lse_C1, scale_C1 = targets_R[c, None], lse_R[c, None], scale_R1[c]
            for r in _in_cache(product_CV):
                # d logprob / d logits = (onehot − softmax) / temperature, which takes the place of the product.
                grad_rV = _logits(product_CV[r], temperature, banned_V).sub_(lse_C1[r]).exp_().mul_(-scale_C1[r])
                grad_rV.scatter_add_(-1, targets_C1[r], scale_C1[r])
            grad_CV = product_CV.to(copy.dtype)
            with bf16_products(hidden_RW.dtype):
                if grad_hidden is not None:
                    grad_hidden[c] = grad_CV @ copy
                if ctx.needs_input_grad[1]:
                    part_VW = wide(grad_CV.t(), hidden_CW)
                    grad_weight = part_VW if grad_weight is None else grad_weight.add_(part_VW)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(copy) if grad_weight is None else grad_weight
            grad_weight = grad_weight.to(ctx.master_dtype)
        return grad_hidden, grad_weight, None, None, None


def token_logprobs(
    hidden: Tensor, weight_VW: Tensor, targets: Tensor, temperature: float = 1.0, banned_V: Tensor | None = None
) -> Tensor:
    """log softmax(hidden @ weightᵀ / temperature)[target] of each row, in fp32 (fp64 for fp64).

    hidden [..., W] in the compute dtype, targets int64 [...] → [...]. Ids where bool `banned_V` [V] is set have
    probability zero and must not be targets. Cross-entropy is its negative.
    """
    count_vocabulary(targets.numel(), weight_VW)
    flat = _TokenLogprobs.apply(hidden.flatten(0, -2), weight_VW, targets.flatten(), temperature, banned_V)
    return flat.view(targets.shape)


def token_logprobs_where(where: Tensor, hidden: Tensor, weight_VW: Tensor, targets: Tensor) -> Tensor:
    """`token_logprobs` of the rows that bool `where` [...] marks, 0 elsewhere, where nothing is computed."""
    found = token_logprobs(hidden[where], weight_VW, targets[where])
    return found.new_zeros(targets.shape).masked_scatter(where, found)


@torch.no_grad()
def sample_tokens(
    hidden: Tensor, weight_VW: Tensor, uniforms: Tensor, temperature: float, banned_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the distribution function at that row's uniform; greedy at temperature 0.

    hidden [..., W], uniforms fp32 in (0, 1) [...] → int64 tokens [...], and their log-probs under what they were drawn
    from [...] (greedy: at temperature 1), fp32 (fp64 for fp64). A row whose logits are not finite gives token 0 with
    log-prob nan: a step that goes wrong is to be seen in its loss, not to end in an index out of range.
    """
    hidden_RW, uniforms_R = hidden.flatten(0, -2), uniforms.flatten()
    tokens_R = torch.empty(len(uniforms_R), dtype=torch.int64, device=hidden.device)
    logprobs_R = torch.empty(len(uniforms_R), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    for c in _chunks(hidden_RW, weight_VW):
        product_CV = wide_linear(hidden_RW[c], weight_VW)
        for r in _in_cache(product_CV):
            logits_rV = _logits(product_CV[r], temperature or 1.0, banned_V)
            masses_rV = logits_rV.sub_(logits_rV.amax(-1, keepdim=True)).exp_()
            tokens_r = masses_rV.argmax(-1) if temperature == 0 else _drawn(masses_rV, uniforms_R[c][r])
            sum_r = masses_rV.sum(-1)
            tokens_R[c][r] = tokens_r = tokens_r.where(sum_r.isfinite(), 0)
            logprobs_R[c][r] = masses_rV.gather(-1, tokens_r[:, None])[:, 0].log() - sum_r.log()
    return tokens_R.view(uniforms.shape), logprobs_R.view(uniforms.shape)


# Tokens whose masses are summed before they are cumulated.
BLOCK = 256


def _drawn(masses_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """int64 [R], the first token up to which there is more than so much of a row's mass; never one of mass zero.

    In a large vocabulary first the block of tokens, then the token in it: to cumulate all masses takes a third of a
    draw, and on a GPU memory of twice the logits.
    """
    V = masses_RV.shape[1]
    # A GPU sums in a tree, and in fp32 a cumulated sum can fall, or rise where a mass is zero.
    dtype = torch.float64 if masses_RV.is_cuda else masses_RV.dtype
    if V <= 16 * BLOCK:
        cumulative_RV = masses_RV.cumsum(-1, dtype=dtype)
        return _first_above(cumulative_RV, uniforms_R[:, None].to(dtype) * cumulative_RV[:, -1:])[:, 0]
    whole = V // BLOCK * BLOCK
    blocks_RX = masses_RV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1, dtype=dtype)
    if whole < V:
        blocks_RX = torch.cat([blocks_RX, masses_RV[:, whole:].sum(-1, keepdim=True, dtype=dtype)], dim=1)
    cumulative_RX = blocks_RX.cumsum(-1)
    threshold_R1 = uniforms_R[:, None].to(dtype) * cumulative_RX[:, -1:]
    block_R1 = _first_above(cumulative_RX, threshold_R1)
    before_R1 = F.pad(cumulative_RX, (1, 0)).gather(1, block_R1)
    token_RT = block_R1 * BLOCK + torch.arange(BLOCK, device=block_R1.device)
    inside_RT = masses_RV.gather(1, token_RT.clamp(max=V - 1)) * (token_RT < V)
    return (block_R1 * BLOCK + _first_above(inside_RT.cumsum(-1, dtype=dtype), threshold_R1 - before_R1))[:, 0]


def _first_above(cumulative_RX: Tensor, threshold_R1: Tensor) -> Tensor:
    """int64 [R, 1], where the sums first exceed the threshold, which rounding may have brought up to the last one; some
    place among them where they are nan."""
    below_R1 = cumulative_RX[:, -1:] * (1 - torch.finfo(cumulative_RX.dtype).eps)
    found_R1 = torch.searchsorted(cumulative_RX, torch.minimum(threshold_R1, below_R1), right=True)
    return found_R1.clamp_(max=cumulative_RX.shape[1] - 1)


@torch.no_grad()
def token_entropies(hidden: Tensor, weight_VW: Tensor, top: int | None = None) -> Tensor:
    """Entropy in nats of each row's next-token distribution; hidden [..., W] → [...], fp32 (fp64 for fp64).

    With `top`, that of the distribution over only so many most probable tokens.
    """
    hidden_RW = hidden.flatten(0, -2)
    count_vocabulary(len(hidden_RW), weight_VW)
    entropy_R = torch.empty(len(hidden_RW), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    for c in _chunks(hidden_RW, weight_VW):
        logits_CV = wide_linear(hidden_RW[c], weight_VW)
        if top is not None:
            logits_CV = logits_CV.topk(min(top, logits_CV.shape[-1])).values
        logprobs_CV = logits_CV.log_softmax(-1)
        entropy_R[c] = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    return entropy_R.view(hidden.shape[:-1])


@torch.no_grad()
def most_probable(hidden: Tensor, weight_VW: Tensor) -> Tensor:
    """The token of highest probability of each row; hidden [..., W] → int64 [...]."""
    hidden_RW = hidden.flatten(0, -2)
    count_vocabulary(len(hidden_RW), weight_VW)
    tokens_R = torch.empty(len(hidden_RW), dtype=torch.int64, device=hidden.device)
    for c in _chunks(hidden_RW, weight_VW):
        tokens_R[c] = wide_linear(hidden_RW[c], weight_VW).argmax(-1)
    return tokens_R.view(hidden.shape[:-1])


@torch.no_grad()
def top_tokens(hidden: Tensor, weight_VW: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens of each row, the likeliest first, and their log-probs; hidden [..., W] → int64
    [..., count] and fp32 (fp64 for fp64) [..., count]. Fewer where the vocabulary is smaller."""
    hidden_RW = hidden.flatten(0, -2)
    count_vocabulary(len(hidden_RW), weight_VW)
    parts = [
        wide_linear(hidden_RW[c], weight_VW).log_softmax(-1).topk(min(count, len(weight_VW)))
        for c in _chunks(hidden_RW, weight_VW)
    ]
    logprobs_RT, tokens_RT = (torch.cat(x) for x in zip(*parts, strict=True))
    return tokens_RT.unflatten(0, hidden.shape[:-1]), logprobs_RT.unflatten(0, hidden.shape[:-1])
