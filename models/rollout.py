"""Sampling thoughts: no gradient, static caches, one counter-based uniform per token.

Shapes: B rows, M anchors, K thoughts, P tokens given, L tokens sampled at most, S = P + L, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.decoder import TextState, ThoughtCache
from models.logprobs import sample_tokens
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import PAD, START, Anchors, Thoughts

# Tokens between two looks at whether every thought has closed; each look waits for the device.
LOOK_EVERY = 8


@dataclass(frozen=True, eq=False)
class Rollout:
    """Sampled thoughts: the tokens given, then those sampled, the closing ones included.

    logprobs_BKLM: of each sampled token under what it was drawn from, 0 behind the end.
    closed_BKM: bool, whether the thought ended by itself; all True where there is nothing to end it.
    """

    thoughts: Thoughts
    logprobs_BKLM: Tensor
    closed_BKM: Tensor


@torch.no_grad()
def rollout(
    model: ThinkingModel,
    state: TextState,
    anchors: Anchors,
    thoughts_per_anchor: int,
    length: int,
    rng: Rng,
    temperature: float = 1.0,
    given: tuple[int, ...] = (START,),
    close: tuple[int, ...] = (),
) -> Rollout:
    """Thoughts of the `given` tokens and up to `length` sampled ones at every anchor; greedy at temperature 0.

    A thought ends once its last sampled tokens are `close`; without `close` all have the full length. Banned ids are
    never drawn, except those of `close`. The draw of a token is keyed by the run's seed, the step and the token's
    place (sample id, anchor, thought, token), so a thought is the same in whatever batch, chunk or rank it is sampled.
    """
    text, P = anchors.text, len(given)
    B, M, K = text.shape[0], anchors.index_BM.shape[1], thoughts_per_anchor
    device = text.tokens_BN.device
    tokens_BKSM = torch.full((B, K, P + length, M), PAD, device=device)
    tokens_BKSM[:, :, :P] = torch.tensor(given, device=device)[:, None]
    logprobs_BKLM = state.hidden_BNW.new_zeros((B, K, length, M), dtype=model.head_weight_VW.dtype)
    open_BKM = torch.ones(B, K, M, dtype=torch.bool, device=device)
    banned_V = model.banned_V
    if close:
        banned_V = banned_V.clone()
        banned_V[list(close)] = False
    cache = ThoughtCache(model.decoder.config, B, K, P + length, M, like=state.hidden_BNW)
    thought_K1 = torch.arange(K, device=device)[:, None]
    closing_T1 = torch.tensor(close, device=device)[:, None]
    for s in range(length):
        newest = slice(0, P) if s == 0 else slice(P + s - 1, P + s)
        hidden_BKSMW = model.continue_thoughts(tokens_BKSM[:, :, newest], anchors, state, cache)
        uniforms_BKM = rng.uniform(text.sample_id_B[:, None, None], anchors.index_BM[:, None], thought_K1, s)
        drawn_BKM, logprobs_BKM = sample_tokens(
            hidden_BKSMW[:, :, -1], model.head_weight_VW, uniforms_BKM, temperature, banned_V
        )
        tokens_BKSM[:, :, P + s] = torch.where(open_BKM, drawn_BKM, PAD)
        logprobs_BKLM[:, :, s] = logprobs_BKM * open_BKM
        if close and s + 1 >= len(close):
            last_BKTM = tokens_BKSM[:, :, P + s + 1 - len(close) : P + s + 1]
            open_BKM = open_BKM & ~(last_BKTM == closing_T1).all(dim=2)
            if (s + 1) % LOOK_EVERY == 0 and not open_BKM.any():
                break
    closed_BKM = ~open_BKM if close else torch.ones_like(open_BKM)
    return Rollout(Thoughts(tokens_BKSM, anchors), logprobs_BKLM, closed_BKM)
