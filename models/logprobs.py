"""Log-probs and samples from hidden states, without ever holding [tokens × vocabulary] logits.

Both work through the rows in chunks; the differentiable one computes each chunk's logits again in backward.

Shapes: R rows (tokens), C rows of a chunk, W width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.precision import accumulation_dtype, linear, working_copy

# Logits held at once, in elements: 2²⁵ fp32 logits are 128 MiB. Each chunk adds to the whole gradient of the head, on
# which a GPU would spend most of its time if chunks were small: 2²⁸ are 1 GiB.
CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS = 2**25, 2**28


def _chunks(hidden_RW: Tensor, weight_VW: Tensor) -> list[slice]:
    elements = CUDA_CHUNK_ELEMENTS if hidden_RW.is_cuda else CHUNK_ELEMENTS
    rows, size = len(hidden_RW), max(1, elements // len(weight_VW))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(product_CV: Tensor, temperature: float, banned_V: Tensor | None) -> Tensor:
    """The head's product in fp32 (fp64 for fp64), written over where it is that already."""
    logits_CV = product_CV.to(accumulation_dtype(product_CV.dtype))
    if temperature != 1.0:
        logits_CV /= temperature
    if banned_V is not None:
        # Many times faster than masked_fill with a mask that is broadcast.
        logits_CV += torch.zeros_like(banned_V, dtype=logits_CV.dtype).masked_fill_(banned_V, float("-inf"))
    return logits_CV


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RW, weight_VW, targets_R, temperature, banned_V):
        copy = working_copy(weight_VW, hidden_RW.dtype)
        logprobs_R = hidden_RW.new_empty(len(targets_R), dtype=accumulation_dtype(hidden_RW.dtype))
        lse_R = torch.empty_like(logprobs_R)
        for c in _chunks(hidden_RW, weight_VW):
            logits_CV = _logits(F.linear(hidden_RW[c], copy), temperature, banned_V)
            lse_R[c] = logits_CV.logsumexp(-1)
            logprobs_R[c] = logits_CV.gather(-1, targets_R[c, None])[:, 0] - lse_R[c]
        ctx.save_for_backward(hidden_RW, copy, targets_R, lse_R, banned_V)
        ctx.temperature, ctx.master_dtype = temperature, weight_VW.dtype
        return logprobs_R

    @staticmethod
    def backward(ctx, grad_R):
        hidden_RW, copy, targets_R, lse_R, banned_V = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_RW) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(copy, dtype=ctx.master_dtype) if ctx.needs_input_grad[1] else None
        for c in _chunks(hidden_RW, copy):
            logits_CV = _logits(F.linear(hidden_RW[c], copy), ctx.temperature, banned_V)
            # d logprob / d logits = (onehot − softmax) / temperature
            grad_CV = logits_CV.sub_(lse_R[c, None]).exp_().mul_(-grad_R[c, None] / ctx.temperature)
            grad_CV.scatter_add_(-1, targets_R[c, None], grad_R[c, None] / ctx.temperature)
            grad_CV = grad_CV.to(copy.dtype)
            if grad_hidden is not None:
                grad_hidden[c] = grad_CV @ copy
            if grad_weight is not None:
                grad_weight += grad_CV.t() @ hidden_RW[c]
        return grad_hidden, grad_weight, None, None, None


def token_logprobs(
    hidden: Tensor, weight_VW: Tensor, targets: Tensor, temperature: float = 1.0, banned_V: Tensor | None = None
) -> Tensor:
    """log softmax(hidden @ weightᵀ / temperature)[target] of each row, in fp32 (fp64 for fp64).

    hidden [..., W] in the compute dtype, targets int64 [...] → [...]. Ids where bool `banned_V` [V] is set have
    probability zero and must not be targets. Cross-entropy is its negative.
    """
    flat = _TokenLogprobs.apply(hidden.flatten(0, -2), weight_VW, targets.flatten(), temperature, banned_V)
    return flat.view(targets.shape)


@torch.no_grad()
def sample_tokens(
    hidden: Tensor, weight_VW: Tensor, uniforms: Tensor, temperature: float, banned_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the distribution function at that row's uniform; greedy at temperature 0.

    hidden [..., W], uniforms fp32 in (0, 1) [...] → int64 tokens [...], and their log-probs under what they were drawn
    from [...] (greedy: at temperature 1), fp32 (fp64 for fp64).
    """
    hidden_RW, uniforms_R = hidden.flatten(0, -2), uniforms.flatten()
    tokens_R = torch.empty(len(uniforms_R), dtype=torch.int64, device=hidden.device)
    logprobs_R = torch.empty(len(uniforms_R), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    for c in _chunks(hidden_RW, weight_VW):
        logits_CV = _logits(linear(hidden_RW[c], weight_VW), temperature or 1.0, banned_V)
        masses_CV = logits_CV.sub_(logits_CV.amax(-1, keepdim=True)).exp_()
        if temperature == 0:
            tokens_R[c] = masses_CV.argmax(-1)
        else:
            # A GPU sums in a tree, and in fp32 the sum can fall, or rise where a mass is zero.
            cumulative_CV = masses_CV.cumsum(-1, dtype=torch.float64 if masses_CV.is_cuda else None)
            threshold_C1 = uniforms_R[c, None].to(cumulative_CV.dtype) * cumulative_CV[:, -1:]
            # The first token whose cumulated mass exceeds the threshold, hence never one of mass zero.
            tokens_R[c] = torch.searchsorted(cumulative_CV, threshold_C1, right=True)[:, 0]
        logprobs_R[c] = masses_CV.gather(-1, tokens_R[c, None])[:, 0].log() - masses_CV.sum(-1).log()
    return tokens_R.view(uniforms.shape), logprobs_R.view(uniforms.shape)


@torch.no_grad()
def token_entropies(hidden: Tensor, weight_VW: Tensor, top: int | None = None) -> Tensor:
    """Entropy in nats of each row's next-token distribution; hidden [..., W] → [...], fp32 (fp64 for fp64).

    With `top`, that of the distribution over only so many most probable tokens.
    """
    hidden_RW = hidden.flatten(0, -2)
    entropy_R = torch.empty(len(hidden_RW), dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    for c in _chunks(hidden_RW, weight_VW):
        logits_CV = _logits(linear(hidden_RW[c], weight_VW), 1.0, None)
        if top is not None:
            logits_CV = logits_CV.topk(min(top, logits_CV.shape[-1])).values
        logprobs_CV = logits_CV.log_softmax(-1)
        entropy_R[c] = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    return entropy_R.view(hidden.shape[:-1])


@torch.no_grad()
def most_probable(hidden: Tensor, weight_VW: Tensor) -> Tensor:
    """The token of highest probability of each row; hidden [..., W] → int64 [...]."""
    hidden_RW = hidden.flatten(0, -2)
    tokens_R = torch.empty(len(hidden_RW), dtype=torch.int64, device=hidden.device)
    for c in _chunks(hidden_RW, weight_VW):
        tokens_R[c] = _logits(linear(hidden_RW[c], weight_VW), 1.0, None).argmax(-1)
    return tokens_R.view(hidden.shape[:-1])
