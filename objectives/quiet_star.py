"""Quiet-STaR (Zelikman et al., arXiv 2403.09629): a thought at every token, paid by the text that follows.

At every text position j, in parallel: `start`, L sampled tokens, `end`, and A − 1 true tokens, so that the thought
predicts the A tokens x_{j+1} … x_{j+A}. A mixing head weighs its prediction against the text's own. A thought is
rewarded by how much the mixed prediction improves on the text's, against the other thoughts of the same position.

Shapes: B rows, N text positions (each an anchor), M of them whose thoughts are held at once, K thoughts of a position,
S = L + 1 + A tokens of a thought, A tokens predicted after it, P paid thoughts, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.decoder import TextState, Trunk
from models.flops import Ledger
from models.logprobs import most_probable, token_logprobs
from models.philox import Rng
from models.rollout import rollout
from models.thinking import ThinkingModel
from models.thoughts import END, Anchors, Text, Thoughts
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
    divide,
)
from objectives.causal import CausalTest
from objectives.credit import group_mean_advantage, positive_part, reinforce


@dataclass(frozen=True)
class QuietStarConfig(ObjectiveConfig):
    """Settings of Quiet-STaR; defaults are the paper's (12, 4) run.

    Where paper and public code (ezelikman/quiet-star at 892446b) differ, `variant` names whom to follow; where the
    paper is silent both follow the code:

    - thoughts at evaluation: greedy (paper), sampled (code);
    - positions in the policy loss: all that have a token to predict (paper, Algorithm 1), or the first N − 1 − A of a
      row, padding included (code, which leaves out one position whose A tokens are all there).

    The delimiters' names differ, too, but here they are embeddings without names. The paper's mixing weight is one
    minus the code's; w here is the code's, the weight of the thought.
    """

    length: int | None = None  # L, sampled tokens of a thought; 9 unless n_ahead says otherwise
    lookahead: int | None = None  # A, true tokens predicted after a thought; 4 unless n_ahead_talk says otherwise
    n_ahead: int | None = None  # the code's count for L: L = n_ahead - 3
    n_ahead_talk: int | None = None  # the code's name for A
    thoughts: int = 2  # K, thoughts of a position
    temperature: float = 1.0  # of sampling
    policy_temperature: float = 3.0  # of the log-probs in the policy loss
    policy_weight: float = 1e6
    text_nll_weight: float = 0.5
    thought_nll_weight: float = 0.5
    variant: Literal["paper", "public_code"] = "paper"
    anchors_at_once: int | None = None  # positions of a row whose thoughts are held at once; default: all
    start_from: str = "---"  # text whose first token's embedding the start of a thought begins as (appendix A)
    end_from: str = "---"  # likewise its end

    @property
    def L(self) -> int:
        if self.length is not None:
            return self.length
        return 9 if self.n_ahead is None else self.n_ahead - 3

    @property
    def A(self) -> int:
        if self.lookahead is not None:
            return self.lookahead
        return 4 if self.n_ahead_talk is None else self.n_ahead_talk

    def problems(self) -> list[str]:
        found = at_least(1, length=self.length, lookahead=self.lookahead, n_ahead_talk=self.n_ahead_talk)
        found += at_least(1, thoughts=self.thoughts, anchors_at_once=self.anchors_at_once)
        found += at_least(4, n_ahead=self.n_ahead)
        found += at_least(
            0,
            policy_weight=self.policy_weight,
            text_nll_weight=self.text_nll_weight,
            thought_nll_weight=self.thought_nll_weight,
        )
        if self.temperature <= 0 or self.policy_temperature <= 0:
            found.append("temperature and policy_temperature must be above 0")
        if self.length is not None and self.n_ahead is not None:
            found.append("length and n_ahead are two ways of saying one thing; give one of them")
        if self.lookahead is not None and self.n_ahead_talk is not None:
            found.append("lookahead and n_ahead_talk are two names of one thing; give one of them")
        return found


@dataclass(kw_only=True)
class CrossEntropy(TextScore):
    """ce_BN: of each token's successor, 0 where there is none."""

    ce_BN: Tensor


class QuietStar(Objective):
    uses_delimiters = True
    uses_mixing_head = True

    def __init__(self, config: QuietStarConfig | None = None):
        self.config = config or QuietStarConfig()

    @property
    def longest_thought(self) -> int:
        return self.config.L + 1 + self.config.A

    def denominators(self, text: Text, prepared: Prepared | None = None) -> Denominators:
        """`text`: tokens to predict; `ahead` [A]: those at each lookahead; `policy`: positions that are paid."""
        ahead_A = torch.stack([text.targets(s + 1)[1].sum() for s in range(self.config.A)])
        return {"text": ahead_A[0], "ahead": ahead_A, "policy": self._policy_positions(text).sum()}

    def _policy_positions(self, text: Text) -> Tensor:
        """bool [B, N], the positions whose thoughts enter the policy loss."""
        if self.config.variant == "paper":
            return text.targets(1)[1]
        B, N = text.shape
        if N < self.config.A + 2:
            raise ValueError(f"rows of {N} tokens are too short for a lookahead of {self.config.A}; use longer rows")
        return (torch.arange(N, device=text.tokens_BN.device) < N - 1 - self.config.A).expand(B, N)

    def __call__(
        self,
        model: ThinkingModel,
        text: Text,
        rng: Rng,
        denominators: Denominators | None = None,
        prepared: Prepared | None = None,
    ) -> ObjectiveOutput:
        state = model.read(text)
        thoughts = self._sample(model, state, Anchors.everywhere(text), rng)
        return self.score(model, state, thoughts, denominators or self.denominators(text))

    def losses(
        self,
        model: ThinkingModel,
        text: Text,
        rng: Rng,
        denominators: Denominators | None = None,
        prepared: Prepared | None = None,
    ) -> Iterator[ObjectiveOutput]:
        """The thoughts of `anchors_at_once` positions after the other, then the text with the gradient they leave."""
        if self.config.anchors_at_once is None:
            yield self(model, text, rng, denominators)
            return
        denominators, everywhere = denominators or self.denominators(text), Anchors.everywhere(text)
        state = model.read(text)
        trunk, text_score = Trunk(state), self.score_text(model, state, denominators)
        records = []
        for cut in everywhere.cuts(self.config.anchors_at_once):
            thoughts = self._sample(model, trunk.state, everywhere.part(cut), rng)
            output = self.score(model, trunk.state, thoughts, denominators, text_score.apart)
            assert output.record is not None
            records.append(output.record)
            output.record = None
            yield output
        record = ThoughtRecord.joined(records, everywhere)
        yield ObjectiveOutput(text_score.loss + trunk.carry(), text_score.metrics, text_score.flops, record)

    def _sample(self, model: ThinkingModel, state: TextState, anchors: Anchors, rng: Rng) -> Thoughts:
        c = self.config
        return rollout(model, state.detached(), anchors, c.thoughts, c.L, rng, c.temperature).thoughts

    def score_text(self, model: ThinkingModel, state: TextState, denominators: Denominators) -> CrossEntropy:
        """What the text alone has to do with the loss."""
        target_BN, valid_BN = state.text.targets(1)
        ce_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
        loss = self.config.text_nll_weight * divide(ce_BN.sum(), denominators["text"])
        ledger = Ledger(model.decoder)
        ledger.read(state.text, backward=True)
        ledger.vocabulary(ce_BN.numel(), backward=True)
        return CrossEntropy(loss, {"nll_text": Mean.over(ce_BN, valid_BN)}, ledger.total, ce_BN=ce_BN)

    def score(
        self,
        model: ThinkingModel,
        state: TextState,
        thoughts: Thoughts,
        denominators: Denominators,
        text_score: CrossEntropy | None = None,
    ) -> ObjectiveOutput:
        """Everything after sampling: `thoughts` are `start` and L tokens at every position of the text in `state`, or
        at a window of them. `text_score` is by default what `score_text` gives.
        """
        c, text, window = self.config, state.text, thoughts.anchors.window
        assert window is not None
        L, A, K, here = c.L, c.A, c.thoughts, slice(*window)
        targets = [text.targets(s + 1) for s in range(A)]
        target_BAM, valid_BAM = (torch.stack(x, dim=1)[..., here] for x in zip(*targets, strict=True))

        # The thought, its end, and the true tokens that it reads while it predicts the next ones.
        end_BK1M = torch.full_like(thoughts.tokens_BKSM[:, :, :1], END)
        true_BKTM = target_BAM[:, None, : A - 1].expand(-1, K, -1, -1)
        hidden_BKSMW = model.think(thoughts.followed_by(torch.cat([end_BK1M, true_BKTM], dim=2)), state)

        text_score = text_score or self.score_text(model, state, denominators)
        mixed_BKAMW, w_BKAM = self._mix(model, state.hidden_BNW, hidden_BKSMW[:, :, L + 1 :], here)
        target_BKAM = target_BAM[:, None].expand_as(w_BKAM)
        mixed_ce_BKAM = -token_logprobs(mixed_BKAMW, model.head_weight_VW, target_BKAM) * valid_BAM[:, None]

        # r_j = Σ_s [CE_text(x_{j+s+1}) − CE_mixed,j(x_{j+s+1})], over the tokens that are there.
        text_ce_BAM = _ahead(text_score.ce_BN.detach(), A, here) * valid_BAM
        reward_BKM = (text_ce_BAM[:, None] - mixed_ce_BKAM.detach()).sum(dim=2)
        policy_B1M = self._policy_positions(text)[:, None, here]
        advantage_BKM = positive_part(group_mean_advantage(reward_BKM)) * policy_B1M

        # log-probs at the policy temperature of the sampled tokens; only of paid thoughts, the others weigh nothing.
        paid_BKM = advantage_BKM > 0
        hidden_PLW = hidden_BKSMW[:, :, :L].transpose(2, 3)[paid_BKM]
        sampled_PL = thoughts.tokens_BKSM[:, :, 1:].transpose(2, 3)[paid_BKM]
        logprobs_PL = token_logprobs(hidden_PLW, model.head_weight_VW, sampled_PL, c.policy_temperature, model.banned_V)
        policy_sum = reinforce(logprobs_PL, advantage_BKM[paid_BKM][:, None])
        policy = divide(policy_sum, denominators["policy"] * K * L)

        nll_thought = divide(mixed_ce_BKAM.sum(dim=(0, 1, 3)), denominators["ahead"] * K).mean()
        loss = text_score.loss + c.thought_nll_weight * nll_thought + c.policy_weight * policy

        ledger = Ledger(model.decoder)
        ledger.think(thoughts.anchors, K, L, backward=False, stage="rollout")
        ledger.vocabulary(w_BKAM[:, :, 0].numel() * L, backward=False, stage="rollout")
        ledger.think(thoughts.anchors, K, hidden_BKSMW.shape[2], backward=True)
        ledger.vocabulary(mixed_ce_BKAM.numel() + logprobs_PL.numel(), backward=True)
        ledger.mixing(target_BAM.numel(), w_BKAM.numel(), backward=True)

        real_BKM = valid_BAM[:, None, 0]
        metrics = text_score.metrics | {
            "nll_thought": Mean.over(mixed_ce_BKAM[:, :, 0], real_BKM),
            "reward": Mean.over(reward_BKM, real_BKM),
            "reward_positive": Mean.over((reward_BKM > 0).double(), real_BKM),
            "advantage": Mean.over(advantage_BKM, real_BKM),
            "mixing_weight": Mean.over(w_BKAM[:, :, 0], real_BKM),
            "policy_loss": Mean(policy_sum.detach().double(), (policy_B1M.sum() * K * L).double()),
        }
        record = ThoughtRecord(thoughts, reward_BKM, advantage_BKM)
        return ObjectiveOutput(loss, metrics, text_score.flops + ledger.total, record)

    @staticmethod
    def _mix(
        model: ThinkingModel, text_BNW: Tensor, thought_BKAMW: Tensor, here: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Mixed hidden states (1 − w)·h_text + w·h_thought [B, K, A, M, W] and w [B, K, A, M], at positions `here`.

        The text hidden state for lookahead s is that of position j + s, and w is its own for each s.
        """
        assert model.mixing_head is not None
        text_BAMW = _ahead(text_BNW, thought_BKAMW.shape[2], here)[:, None]
        w_BKAM = model.mixing_head(text_BAMW, thought_BKAMW)
        w = w_BKAM[..., None]
        return ((1 - w) * text_BAMW + w * thought_BKAMW).to(text_BNW.dtype), w_BKAM

    @torch.no_grad()
    def evaluate(
        self,
        model: ThinkingModel,
        text: Text,
        rng: Rng,
        test: CausalTest | None = None,
        temperature: float | None = None,
    ) -> TokenScores:
        """The next token's NLL from the text alone, and mixed with one thought.

        The temperature of the thought is by default 0 (greedy) in the paper's variant, that of training in the code's.
        """
        c = self.config
        target_BN, valid_BN = text.targets(1)
        state, anchors = model.read(text), Anchors.everywhere(text)
        if temperature is None:
            temperature = 0.0 if c.variant == "paper" else c.temperature
        sampled = rollout(model, state, anchors, 1, c.L, rng, temperature).thoughts
        ledger = Ledger(model.decoder)
        ledger.read(text, backward=False)
        ledger.think(anchors, 1, c.L, backward=False, stage="rollout")
        ledger.vocabulary(c.L * valid_BN.numel(), backward=False, stage="rollout")

        def mixed(tokens_BKSN: Tensor) -> tuple[Thoughts, Tensor]:
            closed = Thoughts(tokens_BKSN, anchors).followed_by(torch.full_like(tokens_BKSN[:, :, :1], END))
            hidden_BKSNW = model.think(closed, state)
            ledger.think(anchors, 1, c.L + 2, backward=False)
            ledger.mixing(valid_BN.numel(), valid_BN.numel(), backward=False)
            return closed, self._mix(model, state.hidden_BNW, hidden_BKSNW[:, :, -1:])[0][:, 0, 0]

        def nll(hidden_BNW: Tensor) -> Tensor:
            ledger.vocabulary(valid_BN.numel(), backward=False)
            return -token_logprobs(hidden_BNW, model.head_weight_VW, target_BN) * valid_BN

        def correct(hidden_BNW: Tensor) -> Tensor:
            ledger.vocabulary(valid_BN.numel(), backward=False)
            return (most_probable(hidden_BNW, model.head_weight_VW) == target_BN) & valid_BN

        thoughts, own_BNW = mixed(sampled.tokens_BKSM)
        own_nll_BN = nll(own_BNW)
        causal = {}
        if test is not None:
            start_BK1N = sampled.tokens_BKSM[:, :, :1]
            bodies = test.conditions(sampled.tokens_BKSM[:, 0, 1:], anchors, valid_BN, rng)
            causal = {"own": own_nll_BN} | {
                condition: nll(mixed(torch.cat([start_BK1N, bodies[condition][:, None]], dim=2))[1])
                for condition in ("other", "shuffled", "filler")
                if condition in bodies
            }
        return TokenScores(
            nll(state.hidden_BNW),
            correct(state.hidden_BNW),
            valid_BN,
            own_nll_BN,
            correct(own_BNW),
            thoughts,
            causal,
            flops=ledger.total,
        )


def _ahead(x_BN: Tensor, A: int, here: slice) -> Tensor:
    """[B, A, M, ...] whose entry (s, j) is x at s behind the j-th position of `here`; what lies past the row's end
    wraps round and is never valid."""
    return torch.stack([x_BN.roll(-s, dims=1)[:, here] for s in range(A)], dim=1)
