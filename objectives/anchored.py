"""What objectives share that think at a few anchors of a document: where, how a thought looks, what comes after it.

A thought is an opening tag, sampled tokens, and a closing tag, which is given to those that do not write it:

    text up to the anchor <think> the body </think> the true tokens

RLP and RPT differ in what they pay for it.

Shapes: B rows, N text positions, M anchors of a row, K thoughts of an anchor (the paper's G), P tokens given to a
thought, L tokens of a body, S all tokens of a thought, W width, J sampled tokens of all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from models.decoder import TextState, Trunk
from models.flops import Ledger
from models.logprobs import most_probable, token_entropies, token_logprobs
from models.philox import Rng
from models.precision import accumulation_dtype
from models.rollout import Answer, Rollout, rollout
from models.thinking import ThinkingModel
from models.thoughts import PAD, Anchors, Text, Thoughts
from objectives.base import (
    Denominators,
    Mean,
    Objective,
    ObjectiveConfig,
    ObjectiveOutput,
    Prepared,
    TextScore,
    ThoughtRecord,
    TokenScores,
    at_least,
)
from objectives.causal import CausalTest
from objectives.credit import (
    clipped_surrogate,
    group_mean_advantage,
    leave_one_out_advantage,
    standardised_advantage,
)

ADVANTAGES = {
    "leave_one_out": leave_one_out_advantage,
    "mean": group_mean_advantage,
    "standardised": standardised_advantage,
}
# Draws of positions and of shuffled rewards are keyed apart from draws of tokens by thought indices no thought has.
POSITION_DRAW = 2**31
SHUFFLE_DRAW = 2**31 + 1
# RPT's proxy entropies look at so many tokens (2506.08007 §3.2).
TOP = 16
# Targets are called easy below the first NLL without a thought, hard from the second on, in nats.
EASY, HARD = 0.5, 1.5


@dataclass(frozen=True)
class AnchoredConfig(ObjectiveConfig):
    """Settings of objectives that think at a few anchors."""

    length: int = 2048  # L, sampled tokens of a thought at most
    thoughts: int = 16  # G, thoughts of an anchor
    temperature: float = 0.7  # of sampling, and of the policy's log-probs
    open: str = "<think>"  # given to every thought
    close: str = "</think>"  # ends a thought; given to those that do not end by themselves
    instruction: str = ""  # text put before `open`; predictions without a thought do not see it
    anchors_per_document: int = 1
    min_prefix: int = 1  # tokens of its document before a target
    positions: Literal["random", "band", "entropy", "hard", "marker"] = "random"
    band: tuple[float, float] = (-6.0, -0.5)  # for `band`: the target's no-think log-prob, in nats
    entropy_quantile: float = 0.8  # for `entropy`: positions of a document above it in no-think entropy
    hard_entropy: float = 1.0  # for `hard`: positions with at least this no-think entropy of the 16 likeliest tokens
    marker: str = "="  # for `marker`: targets follow this token
    advantage: Literal["leave_one_out", "mean", "standardised"] = "leave_one_out"
    unclosed: Literal["score", "drop"] = "score"  # thoughts that do not end: paid by the same rule, or not at all
    eps_low: float = 0.2
    eps_high: float = 0.2
    anchors_at_once: int | None = None  # anchors of a row whose thoughts are held at once; default: all
    updates: int = 1  # optimizer steps on the same thoughts, all with the first one's rewards
    shuffle_rewards: bool = False  # a control: rewards are dealt out at random within their group

    def problems(self) -> list[str]:
        found = at_least(1, length=self.length, min_prefix=self.min_prefix, updates=self.updates)
        found += at_least(1, anchors_per_document=self.anchors_per_document, anchors_at_once=self.anchors_at_once)
        if self.thoughts < 2:
            found.append(f"thoughts must be at least 2 to be compared with each other, got {self.thoughts}")
        found += at_least(0, eps_low=self.eps_low, eps_high=self.eps_high, hard_entropy=self.hard_entropy)
        if not 0 <= self.entropy_quantile <= 1:
            found.append(f"entropy_quantile must lie between 0 and 1, got {self.entropy_quantile}")
        if self.temperature <= 0:
            found.append("temperature must be above 0")
        if not self.close:
            found.append("close is empty; name the text that ends a thought")
        return found


@dataclass(eq=False)
class ThoughtBatch(Prepared):
    """What one rollout phase leaves behind for the updates that use it.

    target_BHM: int64, the H true tokens behind each anchor. base_BHM: their log-probs without a thought.
    real_BM: bool, whether there is an anchor at all. reward_BKM, advantage_BKM: of the first update, kept for the
    others.
    """

    rollout: Rollout
    target_BHM: Tensor
    base_BHM: Tensor
    real_BM: Tensor
    reward_BKM: Tensor | None = None
    advantage_BKM: Tensor | None = None

    def part(self, cut: slice) -> Self:
        """The thoughts of some of each row's anchors; what they took to draw stays with the whole."""
        sliced = {name: x[..., cut] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, flops=0, rollout=self.rollout.part(cut), **sliced)


@dataclass(frozen=True, eq=False)
class Policy:
    """The policy's part of a loss.

    loss: Σ_i 1/|c_i| Σ_u of the clipped surrogate, to be divided by the number of thoughts. tokens_J, logprob_J (with
    gradient), old_J: of each sampled token that counts, which `where_BKSM` marks, under the policy and when it was
    sampled. weight_J: 1/|c_i|.
    """

    loss: Tensor
    tokens_J: Tensor
    logprob_J: Tensor
    old_J: Tensor
    weight_J: Tensor
    where_BKSM: Tensor


class Anchored(Objective):
    """Base of RLP and RPT, for a model whose tags are the ids `open_ids` and `close_ids`.

    marker_id: for positions=marker. ask_ids: what stands between the closing tag and a prediction.
    """

    def __init__(
        self,
        config: AnchoredConfig,
        open_ids: tuple[int, ...],
        close_ids: tuple[int, ...],
        marker_id: int | None = None,
        ask_ids: tuple[int, ...] = (),
    ):
        self.config = config
        self.open_ids, self.close_ids, self.marker_id, self.ask_ids = open_ids, close_ids, marker_id, ask_ids

    @property
    def updates(self) -> int:
        return self.config.updates

    @property
    def horizon(self) -> int:
        """True tokens that must follow an anchor."""
        return 1

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        """Ids that a thought may contain though they are control tokens."""
        return self.close_ids

    # Where to think

    def eligible(self, text: Text) -> Tensor:
        """bool [B, N]: positions that can be anchors, with a long enough prefix and the whole horizon behind them."""
        long_enough_BN = text.position_BN + 1 >= self.config.min_prefix
        eligible_BN = long_enough_BN & text.targets(self.horizon)[1]
        if self.config.positions == "marker":
            eligible_BN = eligible_BN & (text.tokens_BN == self.marker_id)
        return eligible_BN

    def denominators(self, text: Text, prepared: Prepared | None = None) -> Denominators:
        """`anchors`: those the documents have room for, whether or not a filter by the model then leaves some out;
        `text`: tokens to predict."""
        predicted = text.targets(1)[1].sum()
        return {"anchors": torch.tensor(self.scored(text), device=predicted.device), "text": predicted}

    def scored(self, text: Text) -> int:
        eligible_BN, most = self.eligible(text).cpu(), self.config.anchors_per_document
        return sum(min(most, int(eligible_BN[row, start:end].sum())) for row, start, end in text.spans)

    def choose_anchors(self, text: Text, rng: Rng, no_think: TextState, head_weight_VW: Tensor) -> Anchors:
        """Anchors [B, M], up to `anchors_per_document` of each document in the order of a draw of their own; −1 pads.

        A document without an eligible position has none.
        """
        c = self.config
        eligible_BN = self.eligible(text)
        if c.positions == "band":
            logprob_BN = token_logprobs(no_think.hidden_BNW, head_weight_VW, text.targets(1)[0])
            eligible_BN = eligible_BN & (logprob_BN >= c.band[0]) & (logprob_BN <= c.band[1])
        if c.positions == "hard":
            eligible_BN = eligible_BN & (token_entropies(no_think.hidden_BNW, head_weight_VW, TOP) >= c.hard_entropy)
        if c.positions == "entropy":
            entropy_BN = token_entropies(no_think.hidden_BNW, head_weight_VW)
            for row, start, end in text.spans:
                here = eligible_BN[row, start:end]
                if here.any():
                    threshold = entropy_BN[row, start:end][here].quantile(c.entropy_quantile)
                    eligible_BN[row, start:end] = here & (entropy_BN[row, start:end] >= threshold)
        return self._draw_anchors(eligible_BN, text, rng)

    def looked_at(self, text: Text) -> int:
        """Hidden states whose next token `choose_anchors` asks for."""
        return text.tokens_BN.numel() if self.config.positions in ("band", "entropy", "hard") else 0

    def drawn_rows(self, drawn: Rollout) -> int:
        """Hidden states that tokens were drawn from, whether or not their thoughts had ended."""
        B, K, S, M = drawn.sampled_BKSM.shape
        return B * K * (S - len(self.open_ids)) * M

    def _draw_anchors(self, eligible_BN: Tensor, text: Text, rng: Rng) -> Anchors:
        device = text.tokens_BN.device
        place_BN = torch.arange(text.shape[1], device=device).expand(text.shape)
        draw_BN = rng.uniform(text.sample_id_B[:, None], place_BN, torch.tensor(POSITION_DRAW, device=device), 0)
        draw_BN = draw_BN.masked_fill(~eligible_BN, 2.0).cpu()
        count_BN = eligible_BN.cpu()
        chosen: list[list[int]] = [[] for _ in range(text.shape[0])]
        for row, start, end in text.spans:
            count = min(self.config.anchors_per_document, int(count_BN[row, start:end].sum()))
            chosen[row] += sorted((draw_BN[row, start:end].argsort()[:count] + start).tolist())
        M = max(1, *map(len, chosen))
        return Anchors(text, torch.tensor([row + [-1] * (M - len(row)) for row in chosen], device=device))

    def agreed(self, model: ThinkingModel, anchors: Anchors) -> Anchors:
        """The anchors, none added until every rank has as many parts: a sharded model's passes are collective."""
        at_once, (_, M) = self.config.anchors_at_once, anchors.index_BM.shape
        if at_once is None:
            return anchors
        parts = 1
        while not model.all_agree(torch.tensor(parts * at_once >= M, device=anchors.index_BM.device)):
            parts += 1
        return anchors.padded((parts - 1) * at_once + 1)

    # How a thought looks

    def roll_out(
        self,
        model: ThinkingModel,
        state: TextState,
        anchors: Anchors,
        K: int,
        rng: Rng,
        close: tuple[int, ...] | None = None,
        answer: Answer | None = None,
    ) -> Rollout:
        """K thoughts at every anchor, as the settings say; `close` is by default the closing tag."""
        c = self.config
        close = self.close_ids if close is None else close
        parts = [
            rollout(
                model,
                state,
                anchors.part(cut),
                K,
                c.length,
                rng,
                c.temperature,
                self.open_ids,
                close,
                answer,
                self.allowed_ids,
            )
            for cut in anchors.cuts(c.anchors_at_once)
        ]
        return Rollout.joined(parts, anchors)

    def bodies(self, drawn: Rollout) -> Tensor:
        """The tokens between the tags [B, K, L, M], PAD behind them."""
        P = len(self.open_ids)
        inside_BKSM = drawn.sampled_BKSM & ~drawn.answering_BKSM
        length_BKM = inside_BKSM.sum(dim=2) - drawn.closed_BKM * drawn.closing
        tokens_BKLM = drawn.thoughts.tokens_BKSM[:, :, P : P + self.config.length]
        slot_L1 = torch.arange(tokens_BKLM.shape[2], device=tokens_BKLM.device)[:, None]
        return tokens_BKLM.masked_fill(slot_L1 >= length_BKM[:, :, None], PAD)

    def written(self, body_BKLM: Tensor, anchors: Anchors) -> Thoughts:
        """Whole thoughts with these bodies: tags around them, and what asks for a prediction behind."""
        B, K, _, M = body_BKLM.shape

        def everywhere(ids: tuple[int, ...]) -> Tensor:
            tokens_T1 = torch.tensor(ids, dtype=torch.int64, device=body_BKLM.device)[:, None]
            return tokens_T1.expand(B, K, -1, M)

        opened = Thoughts(everywhere(self.open_ids), anchors)
        return opened.followed_by(body_BKLM).followed_by(everywhere((*self.close_ids, *self.ask_ids)))

    # The update

    @abstractmethod
    def think(self, model: ThinkingModel, text: Text, state: TextState, rng: Rng) -> ThoughtBatch:
        """The rollout phase on a text that was read; what it spends counts in the batch."""

    @abstractmethod
    def score(
        self,
        model: ThinkingModel,
        state: TextState,
        batch: ThoughtBatch,
        denominators: Denominators,
        rng: Rng,
        text_score: TextScore | None = None,
    ) -> ObjectiveOutput:
        """One update of a batch, or of a part of it. `text_score` is by default what `score_text` gives."""

    def score_text(
        self, model: ThinkingModel, state: TextState, anchors: Anchors, denominators: Denominators
    ) -> TextScore:
        """What the text alone has to do with the loss: here nothing, but it is read."""
        ledger = Ledger(model.decoder)
        ledger.read(state.text, backward=True)
        places = {(row, n) for row, index in enumerate(anchors.index_BM.tolist()) for n in index}
        skipped = [all((row, n) not in places for n in range(start, end)) for row, start, end in state.text.spans]
        zero = state.hidden_BNW.new_zeros((), dtype=accumulation_dtype(state.hidden_BNW.dtype))
        # Documents without any anchor: too short, or nothing eligible in them.
        return TextScore(zero, {"documents_skipped": Mean.of(skipped, zero.device)}, ledger.total)

    def __call__(
        self,
        model: ThinkingModel,
        text: Text,
        rng: Rng,
        denominators: Denominators | None = None,
        prepared: Prepared | None = None,
    ) -> ObjectiveOutput:
        assert prepared is None or isinstance(prepared, ThoughtBatch)
        state = model.read(text)
        batch = prepared or self.think(model, text, state, rng)
        output = self.score(model, state, batch, denominators or self.denominators(text, batch), rng)
        if prepared is None:
            output.flops += batch.flops
        return output

    def losses(
        self,
        model: ThinkingModel,
        text: Text,
        rng: Rng,
        denominators: Denominators | None = None,
        prepared: Prepared | None = None,
    ) -> Iterator[ObjectiveOutput]:
        """The thoughts of `anchors_at_once` anchors after the other, then the text with the gradient they leave."""
        if self.config.anchors_at_once is None:
            yield self(model, text, rng, denominators, prepared)
            return
        assert prepared is None or isinstance(prepared, ThoughtBatch)
        state = model.read(text)
        batch = prepared or self.think(model, text, state, rng)
        denominators, anchors = denominators or self.denominators(text, batch), batch.rollout.thoughts.anchors
        trunk, text_score = Trunk(state), self.score_text(model, state, anchors, denominators)
        parts = [batch.part(cut) for cut in anchors.cuts(self.config.anchors_at_once)]
        records = []
        for part in parts:
            output = self.score(model, trunk.state, part, denominators, rng, text_score.apart)
            assert output.record is not None
            records.append(output.record)
            output.record = None
            yield output
        if batch.reward_BKM is None:
            batch.reward_BKM, batch.advantage_BKM = (
                torch.cat([getattr(part, name) for part in parts], dim=-1) for name in ("reward_BKM", "advantage_BKM")
            )
        flops = text_score.flops + (batch.flops if prepared is None else 0)
        record = ThoughtRecord.joined(records, anchors)
        yield ObjectiveOutput(text_score.loss + trunk.carry(), text_score.metrics, flops, record)

    # How credit flows

    def advantages(self, reward_BKM: Tensor, weight_BKM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
        """The advantage of each thought over its group, 0 where bool `weight_BKM` says that it does not count."""
        if self.config.shuffle_rewards:
            reward_BKM = self._shuffled(reward_BKM, anchors, rng)
        return ADVANTAGES[self.config.advantage](reward_BKM) * weight_BKM

    @staticmethod
    def _shuffled(reward_BKM: Tensor, anchors: Anchors, rng: Rng) -> Tensor:
        """The rewards of each group in an order drawn for it."""
        K = torch.arange(reward_BKM.shape[1], device=reward_BKM.device)[:, None]
        sample_id_B11 = anchors.text.sample_id_B[:, None, None]
        order_BKM = rng.uniform(sample_id_B11, anchors.index_BM[:, None], K + SHUFFLE_DRAW, 0).argsort(dim=1)
        return reward_BKM.gather(1, order_BKM)

    def counting(self, batch: ThoughtBatch) -> Tensor:
        """bool [B, K, M], the thoughts that can be paid."""
        real_BKM = batch.real_BM[:, None].expand_as(batch.rollout.closed_BKM)
        return real_BKM & batch.rollout.closed_BKM if self.config.unclosed == "drop" else real_BKM

    def policy(
        self, model: ThinkingModel, hidden_BKSMW: Tensor, drawn: Rollout, advantage_BKM: Tensor, weight_BKM: Tensor
    ) -> Policy:
        """The clipped surrogate of the sampled tokens of thoughts that count, at the temperature of sampling.

        hidden: of a pass over thoughts that begin with those of `drawn`.
        """
        c = self.config
        where_BKSM = drawn.sampled_BKSM & weight_BKM[:, :, None]
        hidden_JW = self._predicting(hidden_BKSMW, where_BKSM)
        tokens_J = drawn.thoughts.tokens_BKSM[where_BKSM]
        logprob_J = token_logprobs(hidden_JW, model.head_weight_VW, tokens_J, c.temperature, self._banned(model))
        old_J = drawn.logprobs_BKSM[where_BKSM]
        length_BKM = drawn.sampled_BKSM.sum(dim=2).clamp(min=1)
        weight_J = length_BKM[:, :, None].expand_as(where_BKSM)[where_BKSM].to(logprob_J.dtype).reciprocal()
        advantage_J = advantage_BKM[:, :, None].expand_as(where_BKSM)[where_BKSM]
        surrogate_J = clipped_surrogate(logprob_J, old_J, advantage_J, c.eps_low, c.eps_high)
        return Policy((surrogate_J * weight_J).sum(), tokens_J, logprob_J, old_J, weight_J, where_BKSM)

    @staticmethod
    def _predicting(hidden_BKSMW: Tensor, where_BKSM: Tensor) -> Tensor:
        """The hidden states [J, W] that predict the marked tokens: those one slot before them."""
        return hidden_BKSMW[:, :, : where_BKSM.shape[2] - 1][where_BKSM[:, :, 1:]]

    def _banned(self, model: ThinkingModel) -> Tensor:
        """bool [V], what a thought cannot contain."""
        banned_V = model.banned_V.clone()
        banned_V[list(self.allowed_ids)] = False
        return banned_V

    # What is watched

    def thought_metrics(self, batch: ThoughtBatch, policy: Policy, gain_BKM: Tensor) -> dict[str, Mean]:
        """What the thoughts look like and earned, before any clip; `gain_BKM` is the unclipped reward."""
        c, drawn = self.config, batch.rollout
        real_BKM = batch.real_BM[:, None].expand_as(gain_BKM)
        body_BKLM = self.bodies(drawn)
        K = body_BKLM.shape[1]
        # A thought is distinct if no earlier thought of its group has the same tokens.
        same_BKKM = (body_BKLM[:, :, None] == body_BKLM[:, None]).all(dim=3)
        earlier_KK = torch.ones(K, K, dtype=torch.bool, device=body_BKLM.device).tril(-1)
        repeated_BKM = (same_BKKM & earlier_KK[:, :, None]).any(dim=2)
        leaks_BKM = (body_BKLM == batch.target_BHM[:, None, :1]).any(dim=2)
        nll_B1M = -batch.base_BHM[:, None, 0]
        ratio_J = (policy.logprob_J - policy.old_J).exp().detach()
        all_J = torch.ones_like(ratio_J, dtype=torch.bool)
        clipped_J = (ratio_J > 1 + c.eps_high) | (ratio_J < 1 - c.eps_low)
        return {
            "reward": Mean.over(gain_BKM, real_BKM),
            "reward_positive": Mean.over((gain_BKM > 0).double(), real_BKM),
            "reward_spread": Mean.over(gain_BKM.std(dim=1), batch.real_BM),
            "gain_easy": Mean.over(gain_BKM, real_BKM & (nll_B1M < EASY)),
            "gain_medium": Mean.over(gain_BKM, real_BKM & (nll_B1M >= EASY) & (nll_B1M < HARD)),
            "gain_hard": Mean.over(gain_BKM, real_BKM & (nll_B1M >= HARD)),
            "nll_text": Mean.over(nll_B1M[:, 0], batch.real_BM),
            "thought_length": Mean.over((body_BKLM != PAD).sum(dim=2).double(), real_BKM),
            "thought_closed": Mean.over(drawn.closed_BKM.double(), real_BKM),
            "thought_distinct": Mean.over((~repeated_BKM).double(), real_BKM),
            "target_in_thought": Mean.over(leaks_BKM.double(), real_BKM),
            "entropy": Mean.over(-policy.logprob_J, all_J),
            "ratio": Mean.over(ratio_J, all_J),
            "ratio_clipped": Mean.over(clipped_J.double(), all_J),
        }

    @torch.no_grad()
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng, test: CausalTest | None = None) -> TokenScores:
        """Scores of the targets of as many anchors as in training, from the text alone and after one sampled thought.

        The anchors do not depend on the model, so that evaluations at different steps score the same tokens: where
        training chooses by the model's own predictions, any eligible position is scored.
        """
        state = model.read(text)
        anchors = self._draw_anchors(self.eligible(text), text, rng)
        drawn = self.roll_out(model, state, anchors, 1, rng)
        body_BLM = self.bodies(drawn)[:, 0]
        real_BM, at_BM = anchors.index_BM >= 0, anchors.index_BM.clamp(min=0)
        target_BM = text.targets(1)[0].gather(1, at_BM)
        ledger = Ledger(model.decoder)
        ledger.read(text, backward=False)
        ledger.think(anchors, 1, drawn.thoughts.tokens_BKSM.shape[2] - 1, backward=False, stage="rollout")
        ledger.vocabulary(self.drawn_rows(drawn), backward=False, stage="rollout")

        def predict(hidden_BMW: Tensor) -> tuple[Tensor, Tensor]:
            ledger.vocabulary(2 * real_BM.numel(), backward=False)
            nll_BM = -token_logprobs(hidden_BMW, model.head_weight_VW, target_BM)
            return nll_BM, most_probable(hidden_BMW, model.head_weight_VW) == target_BM

        def after(body_BLM: Tensor) -> tuple[Thoughts, Tensor, Tensor]:
            thoughts = self.written(body_BLM[:, None], anchors)
            hidden_B1SMW = model.think(thoughts, state)
            ledger.think(anchors, 1, hidden_B1SMW.shape[2], backward=False)
            last_B11M1 = thoughts.lengths_BKM[:, :, None, :, None] - 1
            hidden_BMW = hidden_B1SMW.gather(2, last_B11M1.expand(-1, -1, -1, -1, hidden_B1SMW.shape[-1]))[:, 0, 0]
            return thoughts, *predict(hidden_BMW)

        # Padding anchors point past the row's end and are cut off again.
        place_BM = torch.where(real_BM, anchors.index_BM, text.shape[1])

        def spread(x_BM: Tensor) -> Tensor:
            return x_BM.new_zeros(text.shape[0], text.shape[1] + 1).scatter(1, place_BM, x_BM)[:, :-1]

        text_nll_BM, text_correct_BM = predict(gather_positions(state.hidden_BNW, at_BM))
        thoughts, own_nll_BM, own_correct_BM = after(body_BLM)
        causal, right_BN = {}, None
        if test is not None:
            causal["own"] = spread(own_nll_BM)
            conditions = test.conditions(body_BLM, anchors, real_BM, rng)
            for condition, other_BLM in conditions.items():
                if condition != "own":
                    causal[condition] = spread(after(other_BLM)[1])
            if "right" in conditions:
                same_BM = _same(body_BLM, conditions["right"]).double()
                right_BN = spread(same_BM.masked_fill(~test.known(anchors), torch.nan))
        return TokenScores(
            spread(text_nll_BM),
            spread(text_correct_BM),
            spread(real_BM),
            spread(own_nll_BM),
            spread(own_correct_BM),
            thoughts,
            causal,
            right_BN,
            ledger.total,
        )


def gather_positions(hidden_BNW: Tensor, at_BM: Tensor) -> Tensor:
    """[B, M, W], the hidden states at positions of each row."""
    return hidden_BNW.gather(1, at_BM[..., None].expand(-1, -1, hidden_BNW.shape[-1]))


def _same(a_BLM: Tensor, b_BTM: Tensor) -> Tensor:
    """bool [B, M]: whether two bodies, padded to different lengths, are the same."""
    longest = max(a_BLM.shape[1], b_BTM.shape[1])
    a, b = (torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1]), value=PAD) for x in (a_BLM, b_BTM))
    return (a == b).all(dim=1)
