"""Sampling thoughts: no gradient, static caches, one counter-based uniform per token.

Shapes: B rows, M anchors, K thoughts, S tokens of a thought, W width.
"""

from __future__ import annotations

import torch

from models.decoder import TextState, ThoughtCache
from models.logprobs import sample_tokens
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import START, Anchors, Thoughts


@torch.no_grad()
def rollout(
    model: ThinkingModel,
    state: TextState,
    anchors: Anchors,
    thoughts_per_anchor: int,
    length: int,
    rng: Rng,
    temperature: float = 1.0,
) -> Thoughts:
    """Thoughts of `start` and `length` sampled tokens at every anchor; greedy at temperature 0.

    Banned ids are never drawn. The draw of a token is keyed by the run's seed, the step and the token's place
    (sample id, anchor, thought, token), so a thought is the same in whatever batch, chunk or rank it is sampled.
    """
    text = anchors.text
    B, M, K = text.shape[0], anchors.index_BM.shape[1], thoughts_per_anchor
    tokens_BKSM = torch.full((B, K, 1 + length, M), START, device=text.tokens_BN.device)
    if length == 0:
        return Thoughts(tokens_BKSM, anchors)
    cache = ThoughtCache(model.decoder.config, B, K, length, M, like=state.hidden_BNW)
    thought_K1 = torch.arange(K, device=tokens_BKSM.device)[:, None]
    sample_id_B11 = text.sample_id_B[:, None, None]
    anchor_B1M = anchors.index_BM[:, None, :]
    for s in range(length):
        hidden_BK1MW = model.continue_thoughts(tokens_BKSM[:, :, s : s + 1], anchors, state, cache)
        uniforms_BKM = rng.uniform(sample_id_B11, anchor_B1M, thought_K1, s)
        tokens_BKSM[:, :, s + 1] = sample_tokens(
            hidden_BK1MW[:, :, 0], model.head_weight_VW, uniforms_BKM, temperature, model.banned_V
        )
    return Thoughts(tokens_BKSM, anchors)
