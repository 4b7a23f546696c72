"""RPT, reinforcement pre-training (Dong et al., arXiv 2506.08007): think, then say how the text goes on.

For a batch of documents:

    keep the positions whose next token a proxy model is unsure of
    sample G responses o_1 … o_G ~ π_θ(· | x_<t): a thought, then a prediction y in a box
    r(o) = 1 if y's bytes are a prefix of the true continuation x_t x_{t+1} … that ends where a token ends, else 0
    A_i  = (r_i − r̄) / std(r)                                                    GRPO, 2402.03300
    loss = 1/(BG) Σ_i −1/|o_i| Σ_u min(ρ_u A_i, clip(ρ_u, 1−ε_l, 1+ε_h) A_i)
    from some step on, groups whose rewards are all the same are left out          DAPO, 2503.14476

A model that follows instructions writes tags and box by itself (template `free`; the last box behind the closing tag
counts). A base model is given them (template `forced`): it writes the thought and what is in the box. With an empty
box the prediction is simply the next `answer_length` tokens.

Shapes: B rows, N text positions, M anchors of a row, K = G responses of an anchor, S tokens of a response, L of its
thought, W width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from models.decoder import TextState
from models.flops import Ledger
from models.logprobs import token_logprobs
from models.philox import Rng
from models.rollout import Answer, Rollout
from models.thinking import ThinkingModel
from models.thoughts import PAD, Text
from objectives.anchored import Anchored, AnchoredConfig, ThoughtBatch, gather_positions
from objectives.base import Denominators, Mean, ObjectiveOutput, Prepared, TextScore, ThoughtRecord, at_least, divide
from objectives.credit import has_spread, prefix_match


@dataclass(frozen=True)
class RptConfig(AnchoredConfig):
    """Settings of RPT; defaults are the paper's, with its ε and entropy threshold (not given there) PPO's and 1 nat."""

    length: int = 8192  # sampled tokens of a thought at most; of a whole response, if the template is free
    thoughts: int = 8  # G, responses of an anchor
    temperature: float = 0.8  # of sampling, and of the policy's log-probs
    positions: Literal["random", "band", "entropy", "hard", "marker"] = "hard"
    advantage: Literal["leave_one_out", "mean", "standardised"] = "standardised"
    template: Literal["free", "forced"] = "free"  # who writes closing tag and box
    box_open: str = "\\boxed{"
    box_close: str = "}"
    answer_length: int = 16  # sampled tokens of a forced template's prediction at most, its end included
    proxy: str | None = None  # model reference that chooses hard positions; none: the model itself
    drop_flat_from: int | None = 500  # step from which groups without spread are left out; none: never

    def problems(self) -> list[str]:
        found = super().problems() + at_least(1, answer_length=self.answer_length)
        found += at_least(0, drop_flat_from=self.drop_flat_from)
        if self.template == "free" and not (self.box_open and self.box_close):
            found.append("box_open and box_close cannot be empty in a free template; use template forced")
        return found


@dataclass(eq=False, kw_only=True)
class ResponseBatch(ThoughtBatch):
    """Responses with their rewards. kept_BM: bool, groups that count. answered_BKM: bool, who predicted anything."""

    kept_BM: Tensor
    answered_BKM: Tensor


class Rpt(Anchored):
    """RPT on a model whose tokens stand for `token_bytes` [V] (None: no text), with tags in the ids given.

    box_ids: opening and end of a forced template's box. end_ids: what ends a free response.
    """

    config: RptConfig

    def __init__(
        self,
        config: RptConfig,
        open_ids: tuple[int, ...],
        close_ids: tuple[int, ...],
        token_bytes: Sequence[bytes | None],
        box_ids: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
        end_ids: tuple[int, ...] = (),
        marker_id: int | None = None,
    ):
        super().__init__(config, open_ids, close_ids, marker_id, ask_ids=box_ids[0])
        self.token_bytes, self.box_ids, self.end_ids = token_bytes, box_ids, end_ids
        self.proxy: ThinkingModel | None = None

    @property
    def longest_thought(self) -> int:
        c = self.config
        closing = len(self.close_ids) + len(self.ask_ids)
        return len(self.open_ids) + c.length + closing + (c.answer_length if c.template == "forced" else 0)

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        return (*self.close_ids, *self.box_ids[1], *self.end_ids)

    def other_models(self, model: ThinkingModel) -> list[ThinkingModel]:
        return [self.proxy] if self.proxy is not None else []

    def eligible(self, text: Text) -> Tensor:
        """Positions as for any objective, but what cannot be written as text cannot be predicted as text."""
        target_BN, _ = text.targets(1)
        written_V = torch.tensor([b is not None for b in self.token_bytes], device=target_BN.device)
        return super().eligible(text) & written_V[target_BN]

    def denominators(self, text: Text, prepared: Prepared | None = None) -> Denominators:
        """`anchors`: those whose groups count."""
        counts = super().denominators(text)
        if prepared is not None:
            assert isinstance(prepared, ResponseBatch)
            counts["anchors"] = prepared.kept_BM.sum()
        return counts

    @torch.no_grad()
    def prepare(self, model: ThinkingModel, text: Text, rng: Rng) -> ResponseBatch:
        """The rollout phase: hard positions, responses, and what they earn."""
        c = self.config
        # Moved before it reads: moving a sharded model frees the weights that reading has gathered.
        proxy = model if self.proxy is None else self.proxy.to(text.tokens_BN.device)
        state = model.read(text)
        no_think = state if self.proxy is None else proxy.read(text)
        anchors = self.agreed(model, self.choose_anchors(text, rng, no_think, proxy.head_weight_VW))
        if c.template == "forced":
            answer = Answer(self.ask_ids, c.answer_length, self.box_ids[1])
            drawn = self.roll_out(model, state, anchors, c.thoughts, rng, answer=answer)
        else:
            drawn = self.roll_out(model, state, anchors, c.thoughts, rng, close=self.end_ids)
        at_BM, real_BM = anchors.index_BM.clamp(min=0), anchors.index_BM >= 0
        target_B1M = text.targets(1)[0].gather(1, at_BM)[:, None]
        hidden_B1MW = gather_positions(no_think.hidden_BNW, at_BM)[:, None]
        base_B1M = token_logprobs(hidden_B1MW, proxy.head_weight_VW, target_B1M)
        predictions = self.predictions(drawn)
        reward_BKM = self._rewards(predictions, drawn, base_B1M.dtype)
        kept_BM = real_BM
        if c.drop_flat_from is not None and rng.step >= c.drop_flat_from:
            kept_BM = kept_BM & has_spread(reward_BKM)[:, 0]

        ledger = Ledger(model.decoder)
        ledger.read(text, backward=False)
        if self.proxy is not None:
            read_by_proxy = Ledger(proxy.decoder)
            read_by_proxy.read(text, backward=False)
            ledger.spent["text"] += read_by_proxy.total
        ledger.vocabulary(self.looked_at(text) + target_B1M.numel(), backward=False)
        ledger.think(anchors, c.thoughts, drawn.thoughts.tokens_BKSM.shape[2] - 1, backward=False, stage="rollout")
        ledger.vocabulary(self.drawn_rows(drawn), backward=False, stage="rollout")
        answered = torch.tensor([[[p is not None for p in row] for row in group] for group in predictions])
        return ResponseBatch(
            ledger.total,
            drawn,
            target_B1M,
            base_B1M,
            real_BM,
            reward_BKM,
            kept_BM=kept_BM,
            answered_BKM=answered.to(real_BM.device),
        )

    def bodies(self, drawn: Rollout) -> Tensor:
        """Of a free response only what stands before its closing tag: the box behind it is no part of the thought."""
        body_BKLM = super().bodies(drawn)
        if self.config.template == "forced":
            return body_BKLM
        rows_XL = body_BKLM.transpose(2, 3).flatten(0, 2).tolist()
        lengths = [self._thought_length([token for token in row if token != PAD]) for row in rows_XL]
        length_BKM = torch.tensor(lengths, device=body_BKLM.device).view_as(drawn.closed_BKM)
        slot_L1 = torch.arange(body_BKLM.shape[2], device=body_BKLM.device)[:, None]
        return body_BKLM.masked_fill(slot_L1 >= length_BKM[:, :, None], PAD)

    def _thought_length(self, ids: list[int]) -> int:
        """The tokens of a response before its closing tag, however that is cut into tokens; all if there is none."""
        spelled = list(map(self._spelled, ids))
        thought, closed, _ = b"".join(spelled).rpartition(self.config.close.encode())
        return sum(end <= len(thought) for end in accumulate(map(len, spelled))) if closed else len(ids)

    # What is rewarded

    def predictions(self, drawn: Rollout) -> list[list[list[bytes | None]]]:
        """The bytes that each response [B][K][M] predicts; None where it predicts nothing."""
        B, K, S, M = drawn.thoughts.tokens_BKSM.shape
        forced = self.config.template == "forced"
        where = drawn.answering_BKSM if forced else drawn.sampled_BKSM
        said_BKMS = torch.where(where, drawn.thoughts.tokens_BKSM, PAD).transpose(2, 3).tolist()
        answered_BKM = drawn.answered_BKM.tolist()

        def prediction(said: list[int], answered: bool) -> bytes | None:
            ids = [token for token in said if token != PAD]
            if not forced:
                return self._boxed(b"".join(map(self._spelled, ids)))
            if not answered:
                return None
            return b"".join(self.token_bytes[token] or b"" for token in ids[: len(ids) - len(self.box_ids[1])])

        return [
            [[prediction(said_BKMS[b][k][m], answered_BKM[b][k][m]) for m in range(M)] for k in range(K)]
            for b in range(B)
        ]

    def _spelled(self, token: int) -> bytes:
        """A response's token as text. Closing tag and end of the box are read even where they are control tokens."""
        spelled = self.token_bytes[token]
        if spelled is None:
            for ids, text in ((self.close_ids, self.config.close), (self.box_ids[1], self.config.box_close)):
                if ids == (token,):
                    return text.encode()
        return spelled or b""

    def _boxed(self, response: bytes) -> bytes | None:
        """What stands in the last box behind the closing tag; brackets in it, as in `\\boxed{x^{2}}`, come in pairs."""
        opening, end = self.config.box_open.encode(), self.config.box_close.encode()
        _, closed, answer = response.rpartition(self.config.close.encode())
        _, boxed, content = answer.rpartition(opening)
        if not (closed and boxed):
            return None
        depth = 1
        # What the box opens with right before its content, `{` of `\boxed{`, opens another level.
        for bracket in re.finditer(b"|".join(map(re.escape, (end, opening[-len(end) :]))), content):
            depth += -1 if bracket[0] == end else 1
            if depth == 0:
                return content[: bracket.start()]
        return None

    def _rewards(self, predictions: list[list[list[bytes | None]]], drawn: Rollout, dtype: torch.dtype) -> Tensor:
        anchors = drawn.thoughts.anchors
        tokens, documents = anchors.text.tokens_BN.tolist(), anchors.text.document_BN.tolist()
        reward_BKM = torch.zeros(drawn.closed_BKM.shape, dtype=dtype)
        for b, row in enumerate(anchors.index_BM.tolist()):
            for m, anchor in enumerate(row):
                if anchor < 0:
                    continue
                continuation = []
                for n in range(anchor + 1, len(tokens[b])):
                    token_bytes = self.token_bytes[tokens[b][n]]
                    if documents[b][n] != documents[b][anchor] or token_bytes is None:
                        break
                    continuation.append(token_bytes)
                for k in range(reward_BKM.shape[1]):
                    reward_BKM[b, k, m] = float(prefix_match(predictions[b][k][m], continuation))
        return reward_BKM.to(drawn.closed_BKM.device)

    # The update

    def think(self, model: ThinkingModel, text: Text, state: TextState, rng: Rng) -> ResponseBatch:
        return self.prepare(model, text, rng)

    def score(
        self,
        model: ThinkingModel,
        state: TextState,
        batch: ThoughtBatch,
        denominators: Denominators,
        rng: Rng,
        text_score: TextScore | None = None,
    ) -> ObjectiveOutput:
        """One update: the policy's log-probs from a single pass, advantages, loss."""
        assert isinstance(batch, ResponseBatch) and batch.reward_BKM is not None
        c, anchors = self.config, batch.rollout.thoughts.anchors
        hidden_BKSMW = model.think(batch.rollout.thoughts, state)
        weight_BKM = self.counting(batch) & batch.kept_BM[:, None]
        advantage_BKM = self.advantages(batch.reward_BKM, weight_BKM, anchors, rng)
        policy = self.policy(model, hidden_BKSMW, batch.rollout, advantage_BKM, weight_BKM)
        text_score = text_score or self.score_text(model, state, anchors, denominators)
        loss = divide(policy.loss, denominators["anchors"] * c.thoughts) + text_score.loss

        ledger = Ledger(model.decoder)
        ledger.think(anchors, c.thoughts, hidden_BKSMW.shape[2], backward=True)
        ledger.vocabulary(len(policy.logprob_J), backward=True)
        real_BKM = batch.real_BM[:, None].expand_as(weight_BKM)
        metrics = text_score.metrics | self.thought_metrics(batch, policy, batch.reward_BKM)
        metrics |= {
            "answered": Mean.over(batch.answered_BKM.double(), real_BKM),
            "flat_groups": Mean.over((~has_spread(batch.reward_BKM)[:, 0]).double(), batch.real_BM),
            "kept_groups": Mean.over(batch.kept_BM.double(), batch.real_BM),
        }
        record = ThoughtRecord(batch.rollout.thoughts, batch.reward_BKM, advantage_BKM)
        return ObjectiveOutput(loss, metrics, text_score.flops + ledger.total, record)
