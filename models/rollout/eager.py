"""Sampling step by step: static caches, one counter-based uniform per token. `Eager` runs layer by layer, as training
does, and supports every request; the engines beside it replace its steps.

Log-probs are those of a pass over the finished thoughts: in the root mean square within 1e-5 nats in fp32, and in bf16
within that pass's own distance from fp32.

Shapes: B rows, M anchors, K thoughts, P prompt tokens, S all tokens of a thought, T tokens of a phase, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from models.decoder import ThoughtCache
from models.flops import count_rollout
from models.logprobs import sample_tokens
from models.precision import accumulation_dtype
from models.rollout.request import NextTokens, Rollout, RolloutRequest
from models.thoughts import PAD, Thoughts

# Tokens between two looks at whether every thought has ended; each look waits for the device.
LOOK_EVERY = 8
THINKING, PREDICTING, ENDED = 0, 1, 2


class Eager:
    """One pass of the decoder for each token."""

    reproducible: ClassVar[bool] = True

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        return True, ""

    def sample(self, request: RolloutRequest) -> Rollout:
        supported, reason = self.supports(request)
        if not supported:
            raise ValueError(
                f"the {type(self).__name__.lower()} rollout engine does not support this request: {reason}"
            )
        anchors = request.anchors
        cuts = anchors.cuts(request.anchors_at_once)
        if len(cuts) == 1:
            return _sample(request, self.steps(request))
        parts = [replace(request, anchors=anchors.part(cut)) for cut in cuts]
        return Rollout.joined([_sample(part, self.steps(part)) for part in parts], anchors)

    def steps(self, request: RolloutRequest) -> NextTokens:
        """Called first with the prompt, then with the newest token of each thought."""
        return decoder_steps(request)[0]


EAGER = Eager()


def decoder_steps(request: RolloutRequest) -> tuple[NextTokens, ThoughtCache]:
    """Steps that launch each layer, and the cache that they fill."""
    model, anchors, K = request.model, request.anchors, request.thoughts
    B, M = anchors.index_BM.shape
    state = request.state if anchors.window is not None else request.state.by_head()
    cache = ThoughtCache(model.decoder.config, B, K, request.slots, M, like=state.hidden_BNW)

    def step(tokens_BKSM: Tensor) -> Tensor:
        return model.continue_thoughts(tokens_BKSM, anchors, state, cache)

    return step, cache


@torch.no_grad()
def _sample(request: RolloutRequest, step: NextTokens) -> Rollout:
    """Slots that no thought needs, as all ended before, are cut off."""
    model, anchors, prediction = request.model, request.anchors, request.prediction
    close, length, rng = request.close, request.length, request.rng
    text, P, K, S = anchors.text, len(request.prompt), request.thoughts, request.slots
    B, M = anchors.index_BM.shape
    device = text.tokens_BN.device
    forced, end = request.forced, prediction.end if prediction is not None else ()
    shape = (B, K, S, M)
    tokens_BKSM = torch.full(shape, PAD, device=device)
    tokens_BKSM[:, :, :P] = torch.tensor(request.prompt, dtype=torch.int64, device=device)[:, None]
    logprobs_BKSM = request.state.hidden_BNW.new_zeros(shape, dtype=accumulation_dtype(request.state.hidden_BNW.dtype))
    sampled_BKSM, predicting_BKSM = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    phase_BKM = torch.full((B, K, M), THINKING if length or prediction else ENDED, device=device)
    # Tokens sampled in the current phase, and how many of `forced` are still to be appended.
    count_BKM, pending_BKM = (torch.zeros_like(phase_BKM) for _ in range(2))
    if prediction is not None and length == 0:
        phase_BKM.fill_(PREDICTING)
        pending_BKM.fill_(len(forced))
    # Where there is no anchor there is no thought, which others would have to wait for.
    padding_B1M = (anchors.index_BM < 0)[:, None]
    phase_BKM, pending_BKM = phase_BKM.masked_fill(padding_B1M, ENDED), pending_BKM.masked_fill(padding_B1M, 0)
    closed_BKM = torch.full_like(phase_BKM, not close, dtype=torch.bool)
    predicted_BKM = torch.full_like(phase_BKM, not end, dtype=torch.bool)
    forced_Q1 = torch.tensor([*forced, PAD], dtype=torch.int64, device=device)
    banned_V = model.banned_V.clone()
    banned_V[[*close, *end, *request.allowed]] = False

    may_end_early = bool(close) or prediction is not None
    thought_K11, draw_T1 = torch.arange(K, device=device)[:, None, None], torch.arange(S - P, device=device)[:, None]
    for s in range(P, S):
        newest = slice(0, P) if s == P else slice(s - 1, s)
        hidden_BKSMW = step(tokens_BKSM[:, :, newest])
        look, since = divmod(s - P, LOOK_EVERY)
        if since == 0:
            draws_T1 = draw_T1[look * LOOK_EVERY :][:LOOK_EVERY]
            uniforms_BKTM = rng.uniform(
                text.sample_id_B[:, None, None, None], anchors.index_BM[:, None, None], thought_K11, draws_T1
            )
        token_BKM, logprob_BKM = sample_tokens(
            hidden_BKSMW[:, :, -1], model.head_weight_VW, uniforms_BKTM[:, :, since], request.temperature, banned_V
        )
        forces_BKM = pending_BKM > 0
        samples_BKM = ~forces_BKM & (phase_BKM != ENDED)
        tokens_BKSM[:, :, s] = torch.where(
            forces_BKM, forced_Q1[len(forced) - pending_BKM], torch.where(samples_BKM, token_BKM, PAD)
        )
        sampled_BKSM[:, :, s] = samples_BKM
        logprobs_BKSM[:, :, s] = logprob_BKM * samples_BKM
        predicting_BKSM[:, :, s] = samples_BKM & (phase_BKM == PREDICTING)
        pending_BKM = (pending_BKM - 1).clamp(min=0)
        count_BKM = count_BKM + samples_BKM

        thinking_BKM = samples_BKM & (phase_BKM == THINKING)
        closes_BKM = thinking_BKM & _ends_with(tokens_BKSM, s, close, count_BKM)
        closed_BKM = closed_BKM | closes_BKM
        over_BKM = closes_BKM | (thinking_BKM & (count_BKM == length))
        if prediction is None:
            phase_BKM = torch.where(over_BKM, ENDED, phase_BKM)
        else:
            predicting_BKM = samples_BKM & (phase_BKM == PREDICTING)
            ends_BKM = predicting_BKM & _ends_with(tokens_BKSM, s, end, count_BKM)
            predicted_BKM = predicted_BKM | ends_BKM
            done_BKM = ends_BKM | (predicting_BKM & (count_BKM == prediction.length))
            phase_BKM = torch.where(over_BKM, PREDICTING, torch.where(done_BKM, ENDED, phase_BKM))
            pending_BKM = torch.where(over_BKM, len(forced) - closes_BKM * len(close), pending_BKM)
            count_BKM = count_BKM * ~over_BKM
        if may_end_early and since == LOOK_EVERY - 1 and model.all_agree((phase_BKM == ENDED).all()):
            S = s + 1
            break
    thoughts = Thoughts(tokens_BKSM, anchors)
    count_rollout(model.decoder, thoughts, sampled_BKSM)
    return Rollout(thoughts, sampled_BKSM, logprobs_BKSM, closed_BKM, predicting_BKSM, predicted_BKM, len(close)).slots(
        S
    )


def _ends_with(tokens_BKSM: Tensor, s: int, ending: tuple[int, ...], count_BKM: Tensor) -> Tensor:
    """bool [B, K, M]: whether the tokens up to slot s end with `ending`, all of it sampled in this phase."""
    first = s + 1 - len(ending)
    if not ending or first < 0:
        return torch.zeros_like(count_BKM, dtype=torch.bool)
    # Compared with numbers: a tensor of the ending would be copied to the device, and the copy waited for.
    same_BKM = count_BKM >= len(ending)
    for slot, token in enumerate(ending, first):
        same_BKM = same_BKM & (tokens_BKSM[:, :, slot] == token)
    return same_BKM
