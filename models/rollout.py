"""Sampling thoughts: no gradient, static caches, one counter-based uniform per token.

Shapes: B rows, M anchors, K thoughts, P tokens given, S all tokens of a thought, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import TextState, ThoughtCache
from models.logprobs import sample_tokens
from models.native import NativeStep, takes_native_steps
from models.philox import Rng
from models.recorded import WORTH_RECORDING, RecordedStep
from models.thinking import ThinkingModel
from models.thoughts import PAD, START, Anchors, Thoughts

# Tokens between two looks at whether every thought has ended; each look waits for the device.
LOOK_EVERY = 8
THINKING, ANSWERING, ENDED = 0, 1, 2


@dataclass(frozen=True)
class Answer:
    """What a thought says once it has ended: the tokens `ask` given, then up to `length` sampled ones until `end`."""

    ask: tuple[int, ...] = ()
    length: int = 1
    end: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Rollout:
    """Sampled thoughts, with the tokens given to them.

    sampled_BKSM: bool, which tokens were drawn; the others were given, or are padding.
    logprobs_BKSM: of each drawn token under what it was drawn from, 0 elsewhere.
    closed_BKM: bool, whether the thought ended by itself; all True where there is nothing to end it.
    answering_BKSM: bool, tokens drawn as answer, those that end it included; all False without an answer.
    answered_BKM: bool, whether the answer ended by itself; all True where there is nothing to end it.
    closing: how many of a closed thought's tokens are those that close it.
    """

    thoughts: Thoughts
    sampled_BKSM: Tensor
    logprobs_BKSM: Tensor
    closed_BKM: Tensor
    answering_BKSM: Tensor
    answered_BKM: Tensor
    closing: int

    def part(self, cut: slice) -> Rollout:
        """The thoughts of some of each row's anchors."""
        sliced = {name: x[..., cut] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, thoughts=self.thoughts.part(cut), **sliced)  # type: ignore[arg-type]

    def slots(self, S: int) -> Rollout:
        """The same with S slots for tokens: the first, or empty ones behind."""
        more = S - self.sampled_BKSM.shape[2]
        if not more:
            return self
        changed = {
            name: F.pad(x, (0, 0, 0, more)) for name, x in vars(self).items() if isinstance(x, Tensor) and x.ndim == 4
        }
        return replace(self, thoughts=self.thoughts.slots(S), **changed)  # type: ignore[arg-type]

    @staticmethod
    def joined(parts: Sequence[Rollout], anchors: Anchors) -> Rollout:
        """The thoughts of all `anchors` from those of its parts, in order."""
        S = max(p.sampled_BKSM.shape[2] for p in parts)
        parts = [p.slots(S) for p in parts]
        names = [name for name, x in vars(parts[0]).items() if isinstance(x, Tensor)]
        whole = {name: torch.cat([getattr(p, name) for p in parts], dim=-1) for name in names}
        thoughts = Thoughts.joined([p.thoughts for p in parts], anchors)
        return replace(parts[0], thoughts=thoughts, **whole)  # type: ignore[arg-type]


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
    answer: Answer | None = None,
    allowed: tuple[int, ...] = (),
) -> Rollout:
    """Thoughts of the `given` tokens and up to `length` sampled ones at every anchor; greedy at temperature 0.

    A thought ends once its last sampled tokens are `close`; without `close` all have the full length. With an `answer`
    it goes on: `close` is given to those that have not written it, and then the answer is drawn. Banned ids are never
    drawn, except those of `close`, of the answer's end, and those `allowed`. The draw of a token is keyed by the run's
    seed, the step and the token's place (sample id, anchor, thought, token), so a thought is the same in whatever
    batch, chunk or rank it is sampled. Log-probs are those of a pass over the finished thoughts: in the
    root mean square within 1e-5 nats in fp32, and in bf16 within that pass's own distance from fp32. Slots that no
    thought needs, as all ended before, are cut off.
    """
    text, P = anchors.text, len(given)
    B, M, K = text.shape[0], anchors.index_BM.shape[1], thoughts_per_anchor
    device = text.tokens_BN.device
    forced = [*close, *answer.ask] if answer is not None else []
    S = P + length + len(forced) + (answer.length if answer is not None else 0)
    shape = (B, K, S, M)
    tokens_BKSM = torch.full(shape, PAD, device=device)
    tokens_BKSM[:, :, :P] = torch.tensor(given, dtype=torch.int64, device=device)[:, None]
    logprobs_BKSM = state.hidden_BNW.new_zeros(shape, dtype=model.head_weight_VW.dtype)
    sampled_BKSM, answering_BKSM = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    phase_BKM = torch.full((B, K, M), THINKING if length or answer else ENDED, device=device)
    # Tokens drawn in the current phase, and how many of `forced` are still to be given.
    drawn_BKM, pending_BKM = (torch.zeros_like(phase_BKM) for _ in range(2))
    if answer is not None and length == 0:
        phase_BKM.fill_(ANSWERING)
        pending_BKM.fill_(len(forced))
    closed_BKM = torch.full_like(phase_BKM, not close, dtype=torch.bool)
    answered_BKM = torch.full_like(phase_BKM, not _end(answer), dtype=torch.bool)
    forced_Q1 = torch.tensor([*forced, PAD], dtype=torch.int64, device=device)
    banned_V = model.banned_V.clone()
    banned_V[[*close, *_end(answer), *allowed]] = False

    may_end_early = bool(close) or answer is not None
    step: Callable[[Tensor], Tensor]
    if takes_native_steps(model, anchors, state):
        may_record, step = False, NativeStep(model, anchors, state, K, S)
    else:
        if anchors.window is None:
            state = state.by_head()
        cache = ThoughtCache(model.decoder.config, B, K, S, M, like=state.hidden_BNW)
        may_record = model.records_steps and anchors.window is None

        def each_layer_launched(tokens_BKSM: Tensor) -> Tensor:
            return model.continue_thoughts(tokens_BKSM, anchors, state, cache)

        step = each_layer_launched
    thought_K11, draw_T1 = torch.arange(K, device=device)[:, None, None], torch.arange(S - P, device=device)[:, None]
    for s in range(P, S):
        newest = slice(0, P) if s == P else slice(s - 1, s)
        if may_record and s == P + 1 and S - s >= WORTH_RECORDING:
            step = RecordedStep(model, anchors, state, cache)
        hidden_BKSMW = step(tokens_BKSM[:, :, newest])
        look, since = divmod(s - P, LOOK_EVERY)
        if since == 0:
            draws_T1 = draw_T1[look * LOOK_EVERY :][:LOOK_EVERY]
            uniforms_BKTM = rng.uniform(
                text.sample_id_B[:, None, None, None], anchors.index_BM[:, None, None], thought_K11, draws_T1
            )
        token_BKM, logprob_BKM = sample_tokens(
            hidden_BKSMW[:, :, -1], model.head_weight_VW, uniforms_BKTM[:, :, since], temperature, banned_V
        )
        given_BKM = pending_BKM > 0
        draws_BKM = ~given_BKM & (phase_BKM != ENDED)
        tokens_BKSM[:, :, s] = torch.where(
            given_BKM, forced_Q1[len(forced) - pending_BKM], torch.where(draws_BKM, token_BKM, PAD)
        )
        sampled_BKSM[:, :, s] = draws_BKM
        logprobs_BKSM[:, :, s] = logprob_BKM * draws_BKM
        answering_BKSM[:, :, s] = draws_BKM & (phase_BKM == ANSWERING)
        pending_BKM = (pending_BKM - 1).clamp(min=0)
        drawn_BKM = drawn_BKM + draws_BKM

        thinking_BKM = draws_BKM & (phase_BKM == THINKING)
        closes_BKM = thinking_BKM & _ends_with(tokens_BKSM, s, close, drawn_BKM)
        closed_BKM = closed_BKM | closes_BKM
        over_BKM = closes_BKM | (thinking_BKM & (drawn_BKM == length))
        if answer is None:
            phase_BKM = torch.where(over_BKM, ENDED, phase_BKM)
        else:
            answering_BKM = draws_BKM & (phase_BKM == ANSWERING)
            ends_BKM = answering_BKM & _ends_with(tokens_BKSM, s, answer.end, drawn_BKM)
            answered_BKM = answered_BKM | ends_BKM
            done_BKM = ends_BKM | (answering_BKM & (drawn_BKM == answer.length))
            phase_BKM = torch.where(over_BKM, ANSWERING, torch.where(done_BKM, ENDED, phase_BKM))
            pending_BKM = torch.where(over_BKM, len(forced) - closes_BKM * len(close), pending_BKM)
            drawn_BKM = drawn_BKM * ~over_BKM
        if may_end_early and since == LOOK_EVERY - 1 and model.all_agree((phase_BKM == ENDED).all()):
            S = s + 1
            break
    return Rollout(
        Thoughts(tokens_BKSM, anchors),
        sampled_BKSM,
        logprobs_BKSM,
        closed_BKM,
        answering_BKSM,
        answered_BKM,
        len(close),
    ).slots(S)


def _end(answer: Answer | None) -> tuple[int, ...]:
    return answer.end if answer is not None else ()


def _ends_with(tokens_BKSM: Tensor, s: int, ending: tuple[int, ...], drawn_BKM: Tensor) -> Tensor:
    """bool [B, K, M]: whether the tokens up to slot s end with `ending`, all of it drawn in this phase."""
    if not ending:
        return torch.zeros_like(drawn_BKM, dtype=torch.bool)
    first = s + 1 - len(ending)
    if first < 0:
        return torch.zeros_like(drawn_BKM, dtype=torch.bool)
    # Compared with numbers: a tensor of the ending would be copied to the device, and the copy waited for.
    same_BKM = drawn_BKM >= len(ending)
    for slot, token in enumerate(ending, first):
        same_BKM = same_BKM & (tokens_BKSM[:, :, slot] == token)
    return same_BKM
