"""RPT, reinforcement pre-training (Dong et al., arXiv 2506.08007): think, then say how the text goes on.

For a batch of documents:

    keep the positions whose next token a proxy model is unsure of
    sample G responses o_1 … o_G ~ π_θ(· | x_<t): a thought, then a prediction y in a box
    r(o) = 1 if y's bytes are a prefix of the true continuation x_t x_{t+1} … that ends where a token ends, else 0
    A_i  = (r_i − r̄) / std(r)                                                    GRPO, 2402.03300
    loss = 1/(BG) Σ_i −1/|o_i| Σ_u min(ρ_u A_i, clip(ρ_u, 1−ε_l, 1+ε_h) A_i)
    from some step on, groups whose rewards are all the same are left out          DAPO, 2503.14476

A model that follows instructions writes tags and box by itself (template `free`; the last box behind the closing tag
counts). A base model has them forced upon it (template `forced`): it writes the thought and what is in the box. With an
empty box the prediction is simply the next `answer_length` tokens.

The paper's continuation (§3.2 eq. 3) is the rest of the document. Here a row of packed text may cut a document off, and
a prediction that is right up to the cut and longer is neither right nor wrong: it is undecided. It gets the mean reward
of its group's decided responses, so that its advantage is 0 and it moves nobody's baseline. A document that ends in its
row, by its end-of-document token or before another document or padding, has really ended: what is longer is wrong.

objectives/naive/rpt.py is the same as a plain loop.

Shapes: B rows, N text positions, M anchors of a row, K = G responses of an anchor, S tokens of a response, L of its
thought, V vocabulary, X responses of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from models.decoder import TextState
from models.philox import Rng
from models.rollout import Engine, Prediction, Rollout
from models.thinking import ThinkingModel
from models.thoughts import PAD, Text
from objectives.anchored import marker_id, tag_ids, without_thought
from objectives.anchors import AnchorChoice
from objectives.base import (
    Counts,
    Needs,
    SettingError,
    Term,
    ThoughtPart,
    ThoughtRecord,
    ThoughtState,
    Vocabulary,
    setting,
)
from objectives.credit import has_variance, prefix_match
from objectives.metrics import Mean, policy_metrics, thought_metrics
from objectives.policy import AnchoredBatch, PolicyConfig, RewardedThoughts
from objectives.template import Template, checked_tag
from objectives.workload import Workload


@dataclass(frozen=True, kw_only=True)
class RptConfig(PolicyConfig):
    """Settings of RPT; defaults are the paper's, with its ε and entropy threshold (not given there) PPO's and 1 nat."""

    name: str = "rpt"
    length: int = setting(
        8192, "sampled tokens of a thought at most; of a whole response, if the template is free", ge=1
    )
    thoughts: int = setting(8, "G, responses of an anchor, which are compared with each other", ge=2)
    temperature: float = setting(0.8, "of sampling, and of the policy's log-probs", gt=0)
    positions: Literal["random", "band", "entropy", "hard", "marker"] = setting(
        "hard", "which positions may be anchors"
    )
    advantage: Literal["leave_one_out", "mean", "standardised"] = setting(
        "standardised", "what rewards are compared with"
    )
    template: Literal["free", "forced"] = setting(
        "free", "who writes closing tag and box: the model, or they are forced"
    )
    box_open: str = setting("\\boxed{", "what opens a prediction")
    box_close: str = setting("}", "what ends a prediction")
    answer_length: int = setting(16, "for forced: sampled tokens of a prediction at most, its end included", ge=1)
    proxy: str | None = setting(None, "model reference that chooses hard positions; default: the model itself")
    drop_zero_variance_from: int | None = setting(
        500, "step from which groups whose thoughts all earn the same are left out; null: never", ge=0
    )

    def problems(self) -> list[str]:
        if self.template == "free" and not (self.box_open and self.box_close):
            return ["box_open and box_close cannot be empty in a free template; use template forced"]
        return []


@dataclass(eq=False, kw_only=True)
class ResponseBatch(AnchoredBatch):
    """Responses with their rewards. kept_BM: bool, groups that count. answered_BKM: bool, who predicted anything.
    undecided_BKM: bool, whose prediction is right as far as the row goes, and longer."""

    kept_BM: Tensor
    answered_BKM: Tensor
    undecided_BKM: Tensor


# How a control token is spelled in a prediction: a byte that UTF-8 does not have, and so no text.
NO_TEXT = b"\xff"


class Rpt(RewardedThoughts):
    """RPT on a model whose tokens stand for `token_bytes` [V] (None: no text).

    box_ids: opening and end of a forced template's box. end_ids: what ends a free response.
    """

    Config = RptConfig
    config: RptConfig
    sentence: ClassVar[str] = (
        "At some tokens the model thinks and then says how the text goes on. A thought is rewarded when that is right, "
        "and rewarded thoughts become likelier."
    )
    counts_thoughts = True  # the groups that are kept

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
        super().__init__(config, Template(open_ids, close_ids, box_ids[0], (*box_ids[1], *end_ids)), marker_id)
        # What cannot be written as text cannot be predicted as text.
        written_V = torch.tensor([b is not None for b in token_bytes])
        self.choice = AnchorChoice(config, self.horizon, marker_id, written_V)
        self.token_bytes, self.box_ids, self.end_ids = token_bytes, box_ids, end_ids
        self.proxy: ThinkingModel | None = None

    @classmethod
    def build(cls, config: RptConfig, vocabulary: Vocabulary) -> Self:
        tags = tag_ids(config, vocabulary)
        box = [
            checked_tag(vocabulary, name, text) if text else ()
            for name, text in (("box_open", config.box_open), ("box_close", config.box_close))
        ]
        end: tuple[int, ...] = ()
        if config.template == "free":
            if vocabulary.eos_id is None:
                raise SettingError(
                    "template free takes an end-of-sequence token to end a response; use template forced"
                )
            end = (vocabulary.eos_id,)
        return cls(config, *tags, vocabulary.token_bytes, (box[0], box[1]), end, marker_id(config, vocabulary))

    @property
    def needs(self) -> Needs:
        return Needs(models={"proxy": self.config.proxy} if self.config.proxy else {})

    def use_models(self, models: Mapping[str, ThinkingModel]) -> None:
        self.proxy = models.get("proxy")

    @property
    def longest_thought(self) -> int:
        c, t = self.config, self.template
        closing = len(t.close) + len(t.ask)
        return len(t.open) + c.length + closing + (c.answer_length if c.template == "forced" else 0)

    def workload(self, length: int, documents: float) -> Workload:
        """A forced template's closing tag and box are given, its prediction is sampled."""
        c, t, w = self.config, self.template, super().workload(length, documents)
        forced = c.template == "forced"
        return replace(
            w,
            other_readings=int(c.proxy is not None),
            prompt=w.prompt + forced * len((*t.close, *t.ask)),
            sampled=w.sampled + forced * c.answer_length,
            looked_up=w.looked_up + w.anchors,
            teacher=c.proxy is not None,
        )

    def other_models(self, model: ThinkingModel) -> list[ThinkingModel]:
        return [self.proxy] if self.proxy is not None else []

    def counts(self, text: Text, batch: ResponseBatch | None = None) -> Counts:
        """`thoughts`: those of the groups that count."""
        counts = super().counts(text)
        if batch is not None:
            counts["thoughts"] = batch.kept_BM.sum() * self.config.thoughts
        return counts

    def sample(self, model: ThinkingModel, state: TextState, rng: Rng, engine: Engine) -> ResponseBatch:
        """Hard positions, responses, and what they earn."""
        c, text = self.config, state.text
        # Moved before it reads: moving a sharded model frees the weights that reading has gathered.
        proxy = model if self.proxy is None else self.proxy.to(text.tokens_BN.device)
        no_think = state if self.proxy is None else proxy.read(text)
        anchors = self.choose_anchors(model, text, rng, no_think, by=proxy)
        if c.template == "forced":
            prediction = Prediction(self.template.ask, c.answer_length, self.box_ids[1])
            request = self.request(model, state, anchors, c.thoughts, rng, prediction=prediction)
        else:
            request = self.request(model, state, anchors, c.thoughts, rng, close=self.end_ids)
        rollout = engine.sample(request)
        at_BM, real_BM = anchors.index_BM.clamp(min=0), anchors.index_BM >= 0
        target_B1M = text.targets(1)[0].gather(1, at_BM)[:, None]
        base_B1M = without_thought(proxy, no_think, anchors, target_B1M)
        predictions = self.predictions(rollout)
        reward_BKM, undecided_BKM = self._rewards(predictions, rollout, base_B1M.dtype)
        kept_BM = real_BM
        if c.drop_zero_variance_from is not None and rng.step >= c.drop_zero_variance_from:
            kept_BM = kept_BM & has_variance(reward_BKM)[:, 0]
        answered_BKM = torch.tensor([[[p is not None for p in row] for row in group] for group in predictions])
        return ResponseBatch(
            rollout.thoughts,
            rollout,
            target_B1M,
            base_B1M,
            real_BM,
            rng,
            reward_BKM,
            kept_BM=kept_BM,
            answered_BKM=answered_BKM.to(real_BM.device),
            undecided_BKM=undecided_BKM,
        )

    def bodies(self, rollout: Rollout) -> Tensor:
        """Of a free response only what stands before its closing tag: the box behind it is no part of the thought."""
        body_BKLM = super().bodies(rollout)
        if self.config.template == "forced":
            return body_BKLM
        rows_XL = body_BKLM.transpose(2, 3).flatten(0, 2).tolist()
        lengths = [self._thought_length([token for token in row if token != PAD]) for row in rows_XL]
        length_BKM = torch.tensor(lengths, device=body_BKLM.device).view_as(rollout.closed_BKM)
        slot_L1 = torch.arange(body_BKLM.shape[2], device=body_BKLM.device)[:, None]
        return body_BKLM.masked_fill(slot_L1 >= length_BKM[:, :, None], PAD)

    def _thought_length(self, ids: list[int]) -> int:
        """The tokens of a response before its closing tag, however that is cut into tokens; all if there is none."""
        spelled = list(map(self._spelled, ids))
        thought, closed, _ = b"".join(spelled).rpartition(self.config.close.encode())
        return sum(end <= len(thought) for end in accumulate(map(len, spelled))) if closed else len(ids)

    # What is rewarded

    def predictions(self, rollout: Rollout) -> list[list[list[bytes | None]]]:
        """The bytes that each response [B][K][M] predicts; None where it predicts none, or not text alone."""
        B, K, S, M = rollout.thoughts.tokens_BKSM.shape
        forced = self.config.template == "forced"
        where = rollout.predicting_BKSM if forced else rollout.sampled_BKSM
        said_BKMS = torch.where(where, rollout.thoughts.tokens_BKSM, PAD).transpose(2, 3).tolist()
        answered_BKM = rollout.predicted_BKM.tolist()

        def prediction(said: list[int], answered: bool) -> bytes | None:
            ids = [token for token in said if token != PAD]
            if not forced:
                predicted = self._boxed(b"".join(map(self._spelled, ids)))
            else:
                # A tag that is a control token is no text here, where nothing is found by it.
                spelled = [self.token_bytes[token] for token in ids[: len(ids) - len(self.box_ids[1])]]
                predicted = b"".join(NO_TEXT if s is None else s for s in spelled) if answered else None
            return None if predicted is None or NO_TEXT in predicted else predicted

        return [
            [[prediction(said_BKMS[b][k][m], answered_BKM[b][k][m]) for m in range(M)] for k in range(K)]
            for b in range(B)
        ]

    def _spelled(self, token: int) -> bytes:
        """A response's token as text. Closing tag and end of the box are read even where they are control tokens."""
        spelled = self.token_bytes[token]
        if spelled is None:
            for ids, text in ((self.template.close, self.config.close), (self.box_ids[1], self.config.box_close)):
                if ids == (token,):
                    return text.encode()
        return NO_TEXT if spelled is None else spelled

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

    def _rewards(
        self, predictions: list[list[list[bytes | None]]], rollout: Rollout, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """What each response [B, K, M] earns, and bool, whether it is undecided."""
        anchors = rollout.thoughts.anchors
        text, at_BM = anchors.text, anchors.index_BM.clamp(min=0)
        tokens, end_BM = text.tokens_BN.tolist(), text.document_end_BN.gather(1, at_BM).tolist()
        reward_BKM = torch.zeros(rollout.closed_BKM.shape, dtype=dtype)
        for b, row in enumerate(anchors.index_BM.tolist()):
            for m, anchor in enumerate(row):
                end = end_BM[b][m]
                for k in range(reward_BKM.shape[1] if anchor >= 0 else 0):
                    continuation = (self.token_bytes[tokens[b][n]] for n in range(anchor + 1, end))
                    right = prefix_match(predictions[b][k][m], continuation, goes_on=end == text.shape[1])
                    reward_BKM[b, k, m] = torch.nan if right is None else right
        undecided_BKM = reward_BKM.isnan()
        mean_B1M = reward_BKM.nanmean(dim=1, keepdim=True).nan_to_num()
        device = rollout.closed_BKM.device
        return torch.where(undecided_BKM, mean_B1M, reward_BKM).to(device), undecided_BKM.to(device)

    # The update

    def thought_terms(
        self, model: ThinkingModel, state: TextState, batch: ResponseBatch, thought: ThoughtState, text: Any
    ) -> ThoughtPart:
        """The policy's log-probs from a single pass, advantages, loss."""
        c, b = self.config, batch
        assert b.reward_BKM is not None
        counts_BKM = self.rewardable(b) & b.kept_BM[:, None]
        advantage_BKM = self.advantages(b.reward_BKM, counts_BKM, b)
        policy = self.policy(model, thought.hidden_BKSMW, b, advantage_BKM, counts_BKM)
        metrics = thought_metrics(b.rollout, self.bodies(b.rollout), b.target_BHM, b.base_BHM, b.real_BM, b.reward_BKM)
        metrics |= policy_metrics(policy.logprob_J, policy.old_J, policy.sampler_J, c.eps_low, c.eps_high)
        metrics |= {
            "answered": Mean.over(b.answered_BKM.double(), b.real_BM[:, None].expand_as(counts_BKM)),
            "undecided": Mean.over(b.undecided_BKM.double(), b.real_BM[:, None].expand_as(counts_BKM)),
            "zero_variance_groups": Mean.over((~has_variance(b.reward_BKM)[:, 0]).double(), b.real_BM),
            "kept_groups": Mean.over(b.kept_BM.double(), b.real_BM),
        }
        record = ThoughtRecord(b.rollout.thoughts, b.reward_BKM, advantage_BKM)
        return ThoughtPart([Term(policy.surrogate, "thoughts")], metrics, record)
