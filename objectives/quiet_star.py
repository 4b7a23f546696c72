"""Quiet-STaR (Zelikman et al., arXiv 2403.09629): a thought at every token, rewarded by the text
that follows.

At every text position j, in parallel: `start`, L sampled tokens, `end`, and A − 1 true tokens, so that the thought
predicts the A tokens x_{j+1} … x_{j+A}. A mixing head weighs its prediction against the text's own. A thought is
rewarded by how much the mixed prediction improves on the text's, against the other thoughts of the same position.
objectives/naive/quiet_star.py is the same as a plain loop.

Shapes: B rows, N text positions (each an anchor), M of them whose thoughts are held at once, K thoughts of a position,
S = L + 1 + A tokens of a thought, A tokens predicted after it, P thoughts with an advantage, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from models.decoder import TextState
from models.logprobs import most_probable, token_logprobs
from models.philox import Rng
from models.rollout import EAGER, Engine, RolloutRequest
from models.thinking import ThinkingModel, TrainedThinking
from models.thoughts import END, START, Anchors, Text, Thoughts
from objectives.anchored import last_hidden
from objectives.base import (
    Batch,
    Counts,
    Needs,
    Objective,
    ObjectiveConfig,
    Term,
    TextPart,
    ThinkingConfig,
    ThoughtPart,
    ThoughtRecord,
    ThoughtState,
    TokenScores,
    setting,
)
from objectives.counterfactuals import Bodies
from objectives.credit import group_mean_advantage, positive_part, reinforce
from objectives.metrics import Mean
from objectives.workload import Workload


@dataclass(frozen=True, kw_only=True)
class QuietStarConfig(ThinkingConfig):
    """Settings of Quiet-STaR; defaults are the paper's (12, 4) run.

    Where paper and public code (ezelikman/quiet-star at 892446b) differ, `variant` names whom to follow; where the
    paper is silent both follow the code:

    - thoughts at evaluation: greedy (paper), sampled (code);
    - positions in the policy loss: all that have a token to predict (paper, Algorithm 1), or the first N − 1 − A of a
      row, padding included (code, which leaves out one position whose A tokens are all there).

    The delimiters' names differ, too, but here they are embeddings without names. The paper's mixing weight is one
    minus the code's; w here is the code's, the weight of the thought.
    """

    name: str = "quiet_star"
    length: int | None = setting(None, "L, sampled tokens of a thought; 9 unless n_ahead says otherwise", ge=1)
    lookahead: int | None = setting(
        None, "A, true tokens predicted after a thought; 4 unless n_ahead_talk says otherwise", ge=1
    )
    n_ahead: int | None = setting(None, "the public code's count for L: L = n_ahead - 3", ge=4)
    n_ahead_talk: int | None = setting(None, "the public code's name for A", ge=1)
    thoughts: int = setting(2, "K, thoughts of a position", ge=1)
    temperature: float = setting(1.0, "of sampling", gt=0)
    policy_temperature: float = setting(3.0, "of the log-probs in the policy loss", gt=0)
    policy_weight: float = setting(1e6, "of the policy loss", ge=0)
    text_nll_weight: float = setting(0.5, "of the text's own cross-entropy", ge=0)
    thought_nll_weight: float = setting(0.5, "of the mixed predictions' cross-entropy", ge=0)
    mixing_head: bool = setting(
        True, "mix the predictions with and without a thought; false, an ablation: those after it take the whole weight"
    )
    variant: Literal["paper", "public_code"] = setting("paper", "whom to follow where paper and public code differ")
    start_from: str = setting(
        "---", "text whose first token's embedding the start of a thought begins as (appendix A)", min_length=1
    )
    end_from: str = setting("---", "likewise its end", min_length=1)

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

    @property
    def shortest_row(self) -> int:
        return self.A + 2

    @property
    def thought_length(self) -> tuple[str, int]:
        return ("length", self.L) if self.n_ahead is None else ("n_ahead", self.n_ahead)

    def showing(self, length: int | None, temperature: float, positions: int) -> ObjectiveConfig:
        # The paper's evaluation is greedy, the code's samples.
        variant: Literal["paper", "public_code"] = "paper" if temperature == 0 else "public_code"
        return QuietStarConfig(
            length=length or self.L,
            lookahead=1,
            thoughts=1,
            temperature=temperature,
            mixing_head=self.mixing_head,
            variant=variant,
        )

    def problems(self) -> list[str]:
        found = []
        if self.length is not None and self.n_ahead is not None:
            found.append("length and n_ahead are two ways of saying one thing; give one of them")
        if self.lookahead is not None and self.n_ahead_talk is not None:
            found.append("lookahead and n_ahead_talk are two names of one thing; give one of them")
        return found


@dataclass(kw_only=True)
class QuietStarTextPart(TextPart):
    """ce_BN: of each token's successor, 0 where there is none."""

    ce_BN: Tensor


class QuietStar(Objective):
    Config = QuietStarConfig
    config: QuietStarConfig
    sentence: ClassVar[str] = (
        "At every token the model writes a short thought. Thoughts that make the tokens behind it less surprising "
        "become likelier, and the model learns to predict with them."
    )

    def __init__(self, config: QuietStarConfig | None = None):
        self.config = config or QuietStarConfig()

    @property
    def needs(self) -> Needs:
        return Needs((self.config.start_from, self.config.end_from), self.config.mixing_head)

    @property
    def longest_thought(self) -> int:
        return self.config.L + 1 + self.config.A

    @property
    def thinking(self) -> TrainedThinking | None:
        """A model without a mixing head thinks in training alone."""
        return TrainedThinking("every-token", self.config.L) if self.config.mixing_head else None

    @property
    def anchors_at_once(self) -> int | None:
        return self.config.anchors_at_once

    @property
    def thoughts_at_once(self) -> int | None:
        return self.config.thoughts_at_once

    def counts(self, text: Text, batch: Any = None) -> Counts:
        """`text`: tokens to predict; `ahead` [A]: predictions after thoughts at each lookahead; `policy`: tokens of
        thoughts in the policy loss."""
        c = self.config
        ahead_A = torch.stack([text.targets(s + 1)[1].sum() for s in range(c.A)])
        policy = self._policy_positions(text).sum() * c.thoughts * c.L
        return {"text": ahead_A[0], "ahead": ahead_A * c.thoughts, "policy": policy}

    def _policy_positions(self, text: Text) -> Tensor:
        """bool [B, N], the positions whose thoughts enter the policy loss."""
        if self.config.variant == "paper":
            return text.targets(1)[1]
        B, N = text.shape
        if N < self.config.shortest_row:
            raise ValueError(f"rows of {N} tokens are too short for a lookahead of {self.config.A}; use longer rows")
        return (torch.arange(N, device=text.tokens_BN.device) < N - 1 - self.config.A).expand(B, N)

    def sample(self, model: ThinkingModel, state: TextState, rng: Rng, engine: Engine) -> Batch:
        return Batch(self._sample(model, state, self.config.thoughts, rng, self.config.temperature, engine))

    def _sample(
        self, model: ThinkingModel, state: TextState, K: int, rng: Rng, temperature: float, engine: Engine
    ) -> Thoughts:
        c, anchors = self.config, Anchors.everywhere(state.text)
        request = RolloutRequest(model, state, anchors, K, c.L, rng, temperature, anchors_at_once=c.rollout_anchors)
        return engine.sample(request).thoughts

    def text_terms(self, model: ThinkingModel, state: TextState, batch: Any) -> QuietStarTextPart:
        """The text's own half of the NLL."""
        target_BN, valid_BN = state.text.targets(1)
        ce_BN = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
        term = Term(ce_BN.sum(), "text", self.config.text_nll_weight)
        return QuietStarTextPart([term], {"nll_text": Mean.over(ce_BN, valid_BN)}, ce_BN=ce_BN)

    def thoughts_to_score(self, batch: Batch) -> Thoughts:
        """The thoughts, their ends, and the true tokens that are read while the next ones are predicted."""
        thoughts, (target_BAM, _) = batch.thoughts, self._targets(batch.anchors)
        end_BK1M = torch.full_like(thoughts.tokens_BKSM[:, :, :1], END)
        true_BKTM = target_BAM[:, None, :-1].expand(-1, self.config.thoughts, -1, -1)
        return thoughts.followed_by(torch.cat([end_BK1M, true_BKTM], dim=2))

    def _targets(self, anchors: Anchors) -> tuple[Tensor, Tensor]:
        """The A tokens behind each anchor, and whether they are there, [B, A, M] each."""
        assert anchors.window is not None
        targets = [anchors.text.targets(s + 1) for s in range(self.config.A)]
        target_BAM, valid_BAM = (torch.stack(x, dim=1)[..., slice(*anchors.window)] for x in zip(*targets, strict=True))
        return target_BAM, valid_BAM

    def thought_terms(
        self, model: ThinkingModel, state: TextState, batch: Batch, thought: ThoughtState, text: Any
    ) -> ThoughtPart:
        """Mixed predictions of the tokens ahead, rewards, advantages and the policy's log-probs."""
        c, thoughts, hidden_BKSMW = self.config, batch.thoughts, thought.hidden_BKSMW
        assert batch.anchors.window is not None
        L, A, K, here = c.L, c.A, c.thoughts, slice(*batch.anchors.window)
        target_BAM, valid_BAM = self._targets(batch.anchors)

        mixed_BKAMW, w_BKAM = self._mix(model, state.hidden_BNW, hidden_BKSMW[:, :, L + 1 :], here)
        target_BKAM = target_BAM[:, None].expand_as(w_BKAM)
        mixed_ce_BKAM = -token_logprobs(mixed_BKAMW, model.head_weight_VW, target_BKAM) * valid_BAM[:, None]

        # r_j = Σ_s [CE_text(x_{j+s+1}) − CE_mixed,j(x_{j+s+1})], over the tokens that are there.
        text_ce_BAM = _ahead(text.ce_BN.detach(), A, here) * valid_BAM
        reward_BKM = (text_ce_BAM[:, None] - mixed_ce_BKAM.detach()).sum(dim=2)
        policy_B1M = self._policy_positions(state.text)[:, None, here]
        advantage_BKM = positive_part(group_mean_advantage(reward_BKM)) * policy_B1M

        # log-probs at the policy temperature of the sampled tokens; only of thoughts with an advantage, the others
        # weigh nothing.
        rewarded_BKM = advantage_BKM > 0
        hidden_PLW = hidden_BKSMW[:, :, :L].transpose(2, 3)[rewarded_BKM]
        sampled_PL = thoughts.tokens_BKSM[:, :, 1:].transpose(2, 3)[rewarded_BKM]
        logprobs_PL = token_logprobs(hidden_PLW, model.head_weight_VW, sampled_PL, c.policy_temperature, model.banned_V)
        policy_sum = reinforce(logprobs_PL, advantage_BKM[rewarded_BKM][:, None])
        terms = [
            Term(mixed_ce_BKAM.sum(dim=(0, 1, 3)), "ahead", c.thought_nll_weight),
            Term(policy_sum, "policy", c.policy_weight),
        ]

        real_BKM = valid_BAM[:, None, 0]
        metrics = {
            "nll_thought": Mean.over(mixed_ce_BKAM[:, :, 0], real_BKM),
            "reward": Mean.over(reward_BKM, real_BKM),
            "reward_positive": Mean.over((reward_BKM > 0).double(), real_BKM),
            "advantage": Mean.over(advantage_BKM, real_BKM),
            "mixing_weight": Mean.over(w_BKAM[:, :, 0], real_BKM),
            "policy_loss": Mean(policy_sum.detach().double(), (policy_B1M.sum() * K * L).double()),
        }
        return ThoughtPart(terms, metrics, ThoughtRecord(thoughts, reward_BKM, advantage_BKM))

    def _mix(
        self, model: ThinkingModel, text_BNW: Tensor, thought_BKAMW: Tensor, here: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Mixed hidden states (1 − w)·h_text + w·h_thought [B, K, A, M, W] and w [B, K, A, M], at positions `here`.

        The text hidden state for lookahead s is that of position j + s, and w is its own for each s.
        """
        if not self.config.mixing_head:
            return thought_BKAMW, thought_BKAMW.new_ones(thought_BKAMW.shape[:-1])
        assert model.mixing_head is not None
        text_BAMW = _ahead(text_BNW, thought_BKAMW.shape[2], here)[:, None]
        w_BKAM = model.mixing_head(text_BAMW, thought_BKAMW)
        w = w_BKAM[..., None]
        return ((1 - w) * text_BAMW + w * thought_BKAMW).to(text_BNW.dtype), w_BKAM

    def workload(self, length: int, documents: float) -> Workload:
        """Half of the thoughts are better than the mean of their position, and rewarded."""
        c = self.config
        return Workload(
            length,
            documents,
            anchors=length,
            thoughts=c.thoughts,
            everywhere=True,
            prefix=(length / documents + 1) / 2,
            prompt=1,
            sampled=c.L,
            appended=c.A,
            text_predicted=length,
            predicted=c.A,
            rewarded=0.5,
            mixed=c.A * c.mixing_head,
        )

    def own_bodies(
        self, model: ThinkingModel, state: TextState, anchors: Anchors, rng: Rng, engine: Engine, thoughts: int = 1
    ) -> Tensor:
        return self._sample(model, state, thoughts, rng, self.config.temperature, engine).tokens_BKSM[:, :, 1:]

    @torch.no_grad()
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng, engine: Engine = EAGER) -> TokenScores:
        """The next token's NLL from the text alone, and mixed with one thought, which is greedy in the paper's variant
        and sampled as in training in the code's."""
        c = self.config
        target_BN, valid_BN = text.targets(1)
        state = model.read(text)
        thoughts = self._sample(model, state, 1, rng, 0.0 if c.variant == "paper" else c.temperature, engine)
        bodies = Bodies(thoughts.tokens_BKSM[:, 0, 1:], thoughts.anchors, valid_BN)

        def scored(hidden_BNW: Tensor) -> tuple[Tensor, Tensor]:
            nll_BN = -token_logprobs(hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
            return nll_BN, (most_probable(hidden_BNW, model.head_weight_VW) == target_BN) & valid_BN

        text_scores, own_scores = scored(state.hidden_BNW), scored(self.hidden_after(model, state, bodies))
        closed = thoughts.followed_by(torch.full_like(thoughts.tokens_BKSM[:, :, :1], END))
        return TokenScores(*text_scores, valid_BN, *own_scores, closed, bodies)

    @torch.no_grad()
    def hidden_after(self, model: ThinkingModel, state: TextState, bodies: Bodies) -> Tensor:
        """Mixed with those of the text, so that the head gives the mixed prediction."""
        mixed = []
        for cut in bodies.anchors.cuts(self.anchors_at_once):
            anchors, body_BKLM = bodies.anchors.part(cut), bodies.tokens_BLM[:, None, :, cut]
            start_BK1M = torch.full_like(body_BKLM[:, :, :1], START)
            thoughts = Thoughts(torch.cat([start_BK1M, body_BKLM], dim=2), anchors)
            thoughts = thoughts.followed_by(torch.full_like(start_BK1M, END)).trimmed()
            assert anchors.window is not None
            last_BK1MW = last_hidden(model.think(thoughts, state), thoughts)[:, :, None]
            mixed.append(self._mix(model, state.hidden_BNW, last_BK1MW, slice(*anchors.window))[0][:, 0, 0])
        return torch.cat(mixed, dim=1)


def _ahead(x_BN: Tensor, A: int, here: slice) -> Tensor:
    """[B, A, M, ...] whose entry (s, j) is x at s behind the j-th position of `here`; what lies past the row's end
    wraps round and is never valid."""
    return torch.stack([x_BN.roll(-s, dims=1)[:, here] for s in range(A)], dim=1)
