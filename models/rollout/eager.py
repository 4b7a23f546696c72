"""Sampling step by step: static caches, one counter-based uniform per token. `Eager` runs layer by layer, as training
does, and supports every request; the engines beside it replace its steps.

Log-probs are those of a pass over the finished thoughts: in the root mean square within 1e-5 nats in fp32, and in bf16
within that pass's own distance from fp32.

Thoughts that have ended leave the batch, and where some wait they take the rows. A draw is keyed by its place, so that
no token depends on what it was sampled beside.

Shapes: B rows of text, M anchors, K thoughts, P prompt tokens, S all tokens of a thought, W width; U thoughts of all
anchors, number (b K + k) M + m, and one more that stands for none; R rows of those that are sampled now, D draws.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from models.decoder import TextState, ThoughtCache
from models.flops import count_rollout
from models.logprobs import sample_tokens
from models.precision import accumulation_dtype
from models.rollout.request import Rollout, RolloutRequest
from models.thoughts import PAD, Anchors, Thoughts

# Steps between two looks at which thoughts have ended, where each look waits for the device.
LOOK_EVERY = 8
# Draws that are made at a time: hundreds of small operations, whatever their number.
DRAWS = 16
THINKING, PREDICTING, ENDED = 0, 1, 2


class InFlight(Protocol):
    """The thoughts that are sampled now, one in each row, their prompts read but for the last token.

    thought_R: int64, the number of each row's thought, U in rows without one. look_every: steps from one look at which
    thoughts have ended to the next.
    """

    look_every: int

    @property
    def thought_R(self) -> Tensor: ...

    def step(self, tokens_R: Tensor) -> Tensor:
        """The newest token of each row's thought → hidden states [R, W]."""
        ...

    def draw(self, hidden_RW: Tensor, uniforms_R: Tensor, banned_V: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probs [R], as `sample_tokens` has them."""
        ...

    def turn_over(self, ended_R: Tensor) -> bool:
        """Lets rows with ended thoughts go, or others take them, where that is worth it; whether rows changed."""
        ...


class Eager:
    """One pass of the decoder for each token."""

    reproducible: ClassVar[bool] = True
    name: ClassVar[str] = "eager"
    lag: ClassVar[int] = 0

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        return True, ""

    def sample(self, request: RolloutRequest) -> Rollout:
        supported, reason = self.supports(request)
        if not supported:
            raise ValueError(
                f"the {type(self).__name__.lower()} rollout engine does not support this request: {reason}"
            )
        return self._in_parts(request)

    def _in_parts(self, request: RolloutRequest) -> Rollout:
        anchors = request.anchors
        cuts = anchors.cuts(request.anchors_at_once)
        parts = [request] if len(cuts) == 1 else [replace(request, anchors=anchors.part(cut)) for cut in cuts]
        with torch.no_grad():
            rollouts = [sample_thoughts(part, AllAtOnce(part, self.steps(part))) for part in parts]
        return rollouts[0] if len(cuts) == 1 else Rollout.joined(rollouts, anchors)

    def steps(self, request: RolloutRequest) -> Steps:
        """Called with the next tokens of each thought, of which only the first call has several."""
        return Steps.of(request)


EAGER = Eager()


class Steps:
    """The next tokens of each thought [B, K, S, M] → hidden states [B, K, S, M, W], launched layer by layer."""

    def __init__(self, request: RolloutRequest, anchors: Anchors, state: TextState, cache: ThoughtCache):
        self.request, self.anchors, self.state, self.cache = request, anchors, state, cache

    @classmethod
    def of(cls, request: RolloutRequest) -> Steps:
        anchors, state = request.anchors, request.state
        state = state if anchors.window is not None else state.by_head()
        B, M = anchors.index_BM.shape
        config = request.model.decoder.config
        cache = ThoughtCache(config, B, request.thoughts, request.slots, M, like=state.hidden_BNW)
        return cls(request, anchors, state, cache)

    def __call__(self, tokens_BKSM: Tensor) -> Tensor:
        return self.request.model.continue_thoughts(tokens_BKSM, self.anchors, self.state, self.cache)

    def kept(self, row_B: Tensor, at_BM: Tensor, thought_BKM: Tensor) -> Steps:
        """Of thoughts number `thought_BKM` at the anchors number `at_BM` (-1: none) of some rows alone, going on."""
        m_BM = at_BM.clamp(min=0)
        text = self.anchors.text.rows(row_B)  # type: ignore[arg-type]
        index_BM = torch.where(at_BM < 0, -1, self.anchors.index_BM[row_B].gather(1, m_BM))
        (B, K, M), length = thought_BKM.shape, self.cache.length
        keys, values = ([x[row_B] for x in xs] for xs in (self.state.keys, self.state.values))
        state = TextState(text, self.state.hidden_BNW[row_B], keys, values)
        cache = ThoughtCache(self.request.model.decoder.config, B, K, self.request.slots, M, like=state.hidden_BNW)
        places = row_B[:, None, None], thought_BKM, slice(length), m_BM[:, None]
        for layer in range(len(cache.keys)):
            for old, new in ((self.cache.keys, cache.keys), (self.cache.values, cache.values)):
                # Indexing with a slice between tensors puts these first.
                new[layer, :, :, :length] = old[layer][places].movedim(3, 2)
        cache.length = length
        return type(self)(self.request, Anchors(text, index_BM), state, cache)


class AllAtOnce:
    """Rows [B, K, M] that all begin together: fewer, once half of them would do for the thoughts that go on."""

    def __init__(self, request: RolloutRequest, steps: Steps):
        self._request, self._steps = request, steps
        (B, M), K = request.anchors.index_BM.shape, request.thoughts
        device = request.state.hidden_BNW.device
        self._none = B * K * M
        may_end_early = bool(request.close) or request.prediction is not None
        waits = device.type != "cpu"
        self.look_every = (LOOK_EVERY if waits else 1) if may_end_early else max(1, request.slots - len(request.prompt))
        self._thought_BKM = torch.arange(self._none, device=device).view(B, K, M)
        prompt = torch.tensor(request.prompt[:-1], dtype=torch.int64, device=device)
        if len(prompt):
            steps(prompt[:, None].expand(B, K, -1, M))

    @property
    def thought_R(self) -> Tensor:
        return self._thought_BKM.flatten()

    def step(self, tokens_R: Tensor) -> Tensor:
        return self._steps(tokens_R.view(self._thought_BKM.shape)[:, :, None])[:, :, -1].flatten(0, 2)

    def draw(self, hidden_RW: Tensor, uniforms_R: Tensor, banned_V: Tensor) -> tuple[Tensor, Tensor]:
        head_VW = self._request.model.head_weight_VW
        return sample_tokens(hidden_RW, head_VW, uniforms_R, self._request.temperature, banned_V)

    def turn_over(self, ended_R: Tensor) -> bool:
        if self._steps.anchors.window is not None:
            return False
        goes_on = (~ended_R).view(self._thought_BKM.shape).tolist()
        B, K, M = self._thought_BKM.shape
        live = [[(m, ks) for m in range(M) if (ks := [k for k in range(K) if goes_on[b][k][m]])] for b in range(B)]
        rows = [b for b in range(B) if live[b]]
        most_M = max((len(live[b]) for b in rows), default=0)
        most_K = max((len(ks) for b in rows for _, ks in live[b]), default=0)
        if not rows or 2 * len(rows) * most_K * most_M > B * K * M:
            return False
        device = self._thought_BKM.device
        row_B = torch.tensor(rows, device=device)
        at_BM = torch.full((len(rows), most_M), -1)
        thought_BKM = torch.full((len(rows), most_K, most_M), -1)
        for b, row in enumerate(rows):
            for i, (m, ks) in enumerate(live[row]):
                at_BM[b, i] = m
                thought_BKM[b, : len(ks), i] = torch.tensor(ks)
        at_BM, thought_BKM = at_BM.to(device), thought_BKM.to(device)
        k_BKM, m_BM = thought_BKM.clamp(min=0), at_BM.clamp(min=0)
        self._steps = self._steps.kept(row_B, at_BM, k_BKM)
        number_BKM = self._thought_BKM[row_B[:, None, None], k_BKM, m_BM[:, None]]
        self._thought_BKM = torch.where(thought_BKM < 0, self._none, number_BKM)
        return True


@torch.no_grad()
def sample_thoughts(request: RolloutRequest, flight: InFlight) -> Rollout:
    """Slots that no thought needs are cut off."""
    model, anchors, prediction = request.model, request.anchors, request.prediction
    close, length, forced = request.close, request.length, request.forced
    end = prediction.end if prediction is not None else ()
    P, K, S = len(request.prompt), request.thoughts, request.slots
    (B, M), device = anchors.index_BM.shape, request.state.hidden_BNW.device
    U = B * K * M

    # One slot more than there is, which rows without a thought and thoughts that have ended write.
    tokens_US = torch.full((U + 1, S + 1), PAD, device=device)
    tokens_US[:, :P] = torch.tensor(request.prompt, dtype=torch.int64, device=device)
    dtype = accumulation_dtype(request.state.hidden_BNW.dtype)
    logprobs_US = torch.zeros(U + 1, S + 1, dtype=dtype, device=device)
    sampled_US, predicting_US = (torch.zeros(U + 1, S + 1, dtype=torch.bool, device=device) for _ in range(2))

    def of_all(x_BKM: Tensor, none: int) -> Tensor:
        return torch.nn.functional.pad(x_BKM.expand(B, K, M).flatten(), (0, 1), value=none)

    sample_U = of_all(anchors.text.sample_id_B[:, None, None], 0)
    anchor_U = of_all(anchors.index_BM[:, None], -1)
    k_U = of_all(torch.arange(K, device=device)[:, None], 0)
    exists_U = anchor_U >= 0
    phase = THINKING if length else ENDED if prediction is None else PREDICTING
    phase_U = torch.where(exists_U, phase, ENDED)
    pending_U = torch.where(phase_U == PREDICTING, len(forced), 0)
    # What is known of each thought: the slot that comes next, its phase, tokens sampled in that phase, how many of
    # `forced` are still to be appended, whether it and its prediction ended by themselves.
    state_XU = torch.stack([torch.full_like(phase_U, x) for x in (P, 0, 0, 0, not close, not end)])
    state_XU[1], state_XU[3] = phase_U, pending_U
    forced_Q1 = torch.tensor([*forced, PAD], dtype=torch.int64, device=device)
    banned_V = model.banned_V.clone()
    banned_V[[*close, *end, *request.allowed]] = False

    thought_R = flight.thought_R
    state_XR = state_XU[:, thought_R]
    drawn = DRAWS
    for number in itertools.count(1) if S > P and len(thought_R) else ():
        at_R, phase_R, count_R, pending_R, closed_R, predicted_R = state_XR
        hidden_RW = flight.step(tokens_US[thought_R, at_R - 1])
        if drawn == DRAWS:
            sample_R1, anchor_R1, k_R1 = (x_U[thought_R, None] for x_U in (sample_U, anchor_U, k_U))
            draw_RD = (at_R - P)[:, None] + torch.arange(DRAWS, device=device)
            uniforms_RD, drawn = request.rng.uniform(sample_R1, anchor_R1, k_R1, draw_RD), 0
        token_R, logprob_R = flight.draw(hidden_RW, uniforms_RD[:, drawn], banned_V)
        drawn += 1
        forces_R = pending_R > 0
        samples_R = ~forces_R & (phase_R != ENDED)
        predicts_R = samples_R & (phase_R == PREDICTING)
        here_R = thought_R, at_R
        tokens_US[here_R] = torch.where(
            forces_R, forced_Q1[len(forced) - pending_R], torch.where(samples_R, token_R, PAD)
        )
        sampled_US[here_R], predicting_US[here_R] = samples_R, predicts_R
        logprobs_US[here_R] = logprob_R * samples_R
        pending_R = (pending_R - 1).clamp(min=0)
        count_R = count_R + samples_R

        thinks_R = samples_R & (phase_R == THINKING)
        closes_R = thinks_R & _ends_with(tokens_US, here_R, close, count_R)
        over_R = closes_R | (thinks_R & (count_R == length))
        if prediction is None:
            phase_R = torch.where(over_R, ENDED, phase_R)
        else:
            ends_R = predicts_R & _ends_with(tokens_US, here_R, end, count_R)
            predicted_R = predicted_R | ends_R
            done_R = ends_R | (predicts_R & (count_R == prediction.length))
            phase_R = torch.where(over_R, PREDICTING, torch.where(done_R, ENDED, phase_R))
            pending_R = torch.where(over_R, len(forced) - closes_R * len(close), pending_R)
            count_R = count_R * ~over_R
        at_R = (at_R + 1).clamp(max=S)
        state_XR = torch.stack([at_R, phase_R, count_R, pending_R, closed_R | closes_R, predicted_R])
        if number % flight.look_every and number != S - P:
            continue
        ended_R = state_XR[1] == ENDED
        state_XU[:, thought_R] = state_XR
        if flight.turn_over(ended_R):
            thought_R, drawn = flight.thought_R, DRAWS
            state_XR = state_XU[:, thought_R]
            ended_R = state_XR[1] == ENDED
        if bool(ended_R.all()):
            break

    def by_anchor(x_U: Tensor) -> Tensor:
        """[U + 1, ...] → [B, K, ..., M]."""
        return x_U[:U].view(B, K, M, *x_U.shape[1:]).movedim(2, -1)

    tokens_BKSM = by_anchor(tokens_US[:, :S])
    thoughts, sampled_BKSM = Thoughts(tokens_BKSM, anchors), by_anchor(sampled_US[:, :S])
    count_rollout(model.decoder, thoughts, sampled_BKSM)
    closed_BKM, predicted_BKM = (by_anchor(x_U.bool()) for x_U in state_XU[4:])
    longest = int((tokens_BKSM != PAD).sum(2).max()) if U else P
    return Rollout(
        thoughts,
        sampled_BKSM,
        by_anchor(logprobs_US[:, :S]),
        closed_BKM,
        by_anchor(predicting_US[:, :S]),
        predicted_BKM,
        len(close),
    ).slots(longest)


def _ends_with(tokens_US: Tensor, here_R: tuple[Tensor, Tensor], ending: tuple[int, ...], count_R: Tensor) -> Tensor:
    """bool [R]: whether the tokens up to that slot of each thought end with `ending`, all sampled in this phase."""
    thought_R, at_R = here_R
    # Compared with numbers: a tensor of the ending would be copied to the device, and the copy waited for.
    same_R = (count_R >= len(ending)) & bool(ending)
    for before, token in enumerate(reversed(ending)):
        same_R = same_R & (tokens_US[thought_R, (at_R - before).clamp(min=0)] == token)
    return same_R
