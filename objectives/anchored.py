"""What RLP and RPT share, which think at a few anchors of a document and differ in what they reward.

`anchors` says where, `template` how a thought is written, `credit` how rewards become losses; here these meet settings.

Shapes: B rows, N text positions, M anchors of a row, K thoughts of an anchor (the paper's G), L tokens of a body, S all
tokens of a thought, H tokens of the horizon, W width, V vocabulary, J sampled tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from models.decoder import TextState
from models.logprobs import most_probable, token_logprobs
from models.philox import Rng
from models.rollout import EAGER, Engine, Prediction, Rollout, RolloutRequest
from models.thinking import ThinkingModel, TrainedThinking
from models.thoughts import Anchors, Text, Thoughts
from objectives.anchors import AnchorChoice, same_number_of_chunks
from objectives.base import (
    Batch,
    Counts,
    Objective,
    ObjectiveConfig,
    SettingError,
    ThinkingConfig,
    TokenScores,
    Vocabulary,
    setting,
)
from objectives.counterfactuals import Bodies
from objectives.credit import ADVANTAGES, CONTROLS, clipped_surrogate, truncated_importance
from objectives.metrics import Mean
from objectives.template import Template, checked_tag, encode_tag
from objectives.workload import Workload


@dataclass(frozen=True, kw_only=True)
class AnchoredConfig(ThinkingConfig):
    """Settings of objectives that think at a few anchors."""

    length: int = setting(2048, "L, sampled tokens of a thought at most", ge=1)
    thoughts: int = setting(16, "G, thoughts of an anchor, which are compared with each other", ge=2)
    temperature: float = setting(0.7, "of sampling, and of the policy's log-probs", gt=0)
    open: str = setting("<think>", "opening tag, the prompt of every thought")
    close: str = setting("</think>", "ends a thought; appended to those that do not end by themselves", min_length=1)
    instruction: str = setting("", "text before the opening tag; predictions without a thought do not see it")
    anchors_per_document: int = setting(1, "anchors of a document at most", ge=1)
    min_prefix: int = setting(1, "tokens of its document before a target", ge=1)
    positions: Literal["random", "band", "entropy", "hard", "marker"] = setting(
        "random", "which positions may be anchors"
    )
    band: tuple[float, float] = setting((-6.0, -0.5), "for band: the target's no-think log-prob, in nats")
    entropy_quantile: float = setting(0.8, "for entropy: positions above this quantile of their document", ge=0, le=1)
    hard_entropy: float = setting(1.0, "for hard: least no-think entropy of the 16 likeliest tokens, in nats", ge=0)
    marker: str = setting("=", "for marker: targets follow this token")
    advantage: Literal["leave_one_out", "mean", "standardised"] = setting(
        "leave_one_out", "what rewards are compared with"
    )
    unclosed: Literal["score", "drop"] = setting(
        "score", "thoughts that do not end by themselves: rewarded by the same rule, or left out"
    )
    eps_low: float = setting(0.2, "ratios below 1 − ε_low are clipped", ge=0)
    eps_high: float = setting(0.2, "ratios above 1 + ε_high are clipped", ge=0)
    importance_cap: float | None = setting(
        None,
        "C, tokens weigh min(π_old / π_sampler, C), to correct for the sampler's own numbers; default: 1",
        gt=0,
    )
    updates: int = setting(1, "optimizer steps on the same thoughts, all with the first one's rewards", ge=1)
    rewards: Literal["earned", "shuffled", "random", "constant"] = setting(
        "earned", "controls: rewards dealt out at random within their group, 0 or 1 at random, 1 for all"
    )

    @property
    def thought_length(self) -> tuple[str, int]:
        return "length", self.length

    def showing(self, length: int | None, temperature: float, positions: int) -> ObjectiveConfig:
        # A marker says where to think; any other choice of positions is training's own.
        return self.replaced(
            length=length or self.length,
            temperature=temperature,
            anchors_per_document=positions,
            min_prefix=1,
            positions="marker" if self.positions == "marker" else "random",
        )


@dataclass(eq=False)
class AnchoredBatch(Batch):
    """What one rollout phase leaves behind for the updates that use it.

    target_BHM: int64, the H true tokens behind each anchor. base_BHM: their log-probs without a thought.
    real_BM: bool, whether there is an anchor at all. rng: of the step. reward_BKM, advantage_BKM, old_BKSM (the sampled
    tokens' log-probs): of the first update's pass, kept for the others. gain_BKM: where it is measured elsewhere.
    """

    rollout: Rollout
    target_BHM: Tensor
    base_BHM: Tensor
    real_BM: Tensor
    rng: Rng
    reward_BKM: Tensor | None = None
    advantage_BKM: Tensor | None = None
    old_BKSM: Tensor | None = None
    gain_BKM: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Policy:
    """The policy's part of a loss.

    surrogate: Σ_i 1/|c_i| Σ_u of the clipped surrogate. tokens_J, logprob_J (with gradient), old_J, sampler_J: of each
    sampled token that counts, which `where_BKSM` marks, under the policy, before the first update, and as it was
    sampled. weight_J: 1/|c_i|.
    """

    surrogate: Tensor
    tokens_J: Tensor
    logprob_J: Tensor
    old_J: Tensor
    sampler_J: Tensor
    weight_J: Tensor
    where_BKSM: Tensor


class Anchored(Objective):
    """Base of RLP and RPT."""

    config: Any

    def __init__(self, config: AnchoredConfig, template: Template, marker_id: int | None = None):
        self.config, self.template = config, template
        self.choice = AnchorChoice(config, self.horizon, marker_id)

    @classmethod
    def build(cls, config: Any, vocabulary: Vocabulary) -> Self:
        return cls(config, Template(*tag_ids(config, vocabulary)), marker_id(config, vocabulary))

    @property
    def updates(self) -> int:
        return self.config.updates

    @property
    def thinking(self) -> TrainedThinking:
        return TrainedThinking("before-answer", self.config.length, self.template.open, self.template.close)

    @property
    def anchors_at_once(self) -> int | None:
        return self.config.anchors_at_once

    @property
    def thoughts_at_once(self) -> int | None:
        return self.config.thoughts_at_once

    @property
    def horizon(self) -> int:
        """True tokens that must follow an anchor."""
        return 1

    def counts(self, text: Text, batch: Any = None) -> Counts:
        """`thoughts`: those of all anchors before model-based filtering; `text`: tokens to predict."""
        predicted = text.targets(1)[1].sum()
        thoughts = self.scored(text) * self.config.thoughts
        return {"thoughts": torch.tensor(thoughts, device=predicted.device), "text": predicted}

    def scored(self, text: Text) -> int:
        return self.choice.count(text)

    def scoring_rule(self) -> str:
        c = self.config
        rule = [f"min_prefix {c.min_prefix}", f"positions {c.positions}"]
        rule += [f"horizon {self.horizon}"] if self.horizon > 1 else []
        rule += [f"marker {c.marker!r}"] if c.positions == "marker" else []
        return ", ".join(rule)

    # Sampling

    def choose_anchors(
        self, model: ThinkingModel, text: Text, rng: Rng, no_think: TextState, by: ThinkingModel
    ) -> Anchors:
        """This step's anchors, by the predictions of the model `by`; as many chunks of them on every rank."""
        anchors = self.choice.choose(text, rng, no_think, by.head_weight_VW)
        return same_number_of_chunks(model, anchors, self.config.anchors_at_once)

    def request(
        self,
        model: ThinkingModel,
        state: TextState,
        anchors: Anchors,
        thoughts: int,
        rng: Rng,
        close: tuple[int, ...] | None = None,
        prediction: Prediction | None = None,
    ) -> RolloutRequest:
        """So many thoughts at every anchor, as the settings say; `close` is by default the closing tag."""
        c, t = self.config, self.template
        return RolloutRequest(
            model,
            state,
            anchors,
            thoughts,
            c.length,
            rng,
            c.temperature,
            t.open,
            t.close if close is None else close,
            prediction,
            (*t.close, *t.allowed),
            self.config.rollout_anchors,
        )

    def bodies(self, rollout: Rollout) -> Tensor:
        """The tokens between the tags [B, K, L, M], PAD behind them."""
        return self.template.bodies(rollout, self.config.length)

    def workload(self, length: int, documents: float) -> Workload:
        """Anchors are anywhere in their document, behind its first `min_prefix` tokens."""
        c, t = self.config, self.template
        document = length / documents
        looks = c.positions in ("band", "entropy", "hard")
        return Workload(
            length,
            documents,
            # Ahead of all losses where their counts depend on the thoughts, or several updates share them.
            readings=int(self.counts_thoughts or c.updates > 1),
            anchors=documents * c.anchors_per_document,
            thoughts=c.thoughts,
            prefix=max(1.0, (min(c.min_prefix, document) + document - self.horizon) / 2),
            prompt=len(t.open),
            sampled=c.length,
            looked_up=looks * length,
            updates=c.updates,
        )

    # How credit flows

    def rewardable(self, batch: AnchoredBatch) -> Tensor:
        """bool [B, K, M], the thoughts that can be rewarded."""
        real_BKM = batch.real_BM[:, None].expand_as(batch.rollout.closed_BKM)
        return real_BKM & batch.rollout.closed_BKM if self.config.unclosed == "drop" else real_BKM

    def advantages(self, reward_BKM: Tensor, counts_BKM: Tensor, batch: AnchoredBatch) -> Tensor:
        """The advantage of each thought over its group, 0 where bool `counts_BKM` says that it does not count."""
        if (control := CONTROLS.get(self.config.rewards)) is not None:
            reward_BKM = control(reward_BKM, batch.anchors, batch.rng)
        return ADVANTAGES[self.config.advantage](reward_BKM) * counts_BKM

    def policy(
        self,
        model: ThinkingModel,
        hidden_BKSMW: Tensor,
        batch: AnchoredBatch,
        advantage_BKM: Tensor,
        counts_BKM: Tensor,
    ) -> Policy:
        """The clipped surrogate of the sampled tokens of thoughts that count, at the temperature of sampling.

        hidden: of a pass over thoughts that begin with those of the rollout. π_old is this pass's own π at the first
        update, where ρ is 1 then: the sampler's log-probs, which come from other kernels, differ in bf16 by hundredths
        of a nat, and would clip tokens that no update has moved.
        """
        c, rollout = self.config, batch.rollout
        where_BKSM = rollout.sampled_BKSM & counts_BKM[:, :, None]
        hidden_JW = predicting(hidden_BKSMW, where_BKSM)
        tokens_J = rollout.thoughts.tokens_BKSM[where_BKSM]
        banned_V = self.template.banned(model.banned_V)
        logprob_J = token_logprobs(hidden_JW, model.head_weight_VW, tokens_J, c.temperature, banned_V)
        sampler_J = rollout.logprobs_BKSM[where_BKSM]
        if batch.old_BKSM is None:
            batch.old_BKSM = torch.zeros_like(rollout.logprobs_BKSM).masked_scatter(where_BKSM, logprob_J.detach())
        old_J = batch.old_BKSM[where_BKSM]
        length_BKM = rollout.sampled_BKSM.sum(dim=2).clamp(min=1)
        weight_J = length_BKM[:, :, None].expand_as(where_BKSM)[where_BKSM].to(logprob_J.dtype).reciprocal()
        advantage_J = advantage_BKM[:, :, None].expand_as(where_BKSM)[where_BKSM]
        surrogate_J = clipped_surrogate(logprob_J, old_J, advantage_J, c.eps_low, c.eps_high)
        if c.importance_cap is not None:
            surrogate_J = surrogate_J * truncated_importance(old_J, sampler_J, c.importance_cap)
        return Policy((surrogate_J * weight_J).sum(), tokens_J, logprob_J, old_J, sampler_J, weight_J, where_BKSM)

    @torch.no_grad()
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng, engine: Engine = EAGER) -> TokenScores:
        """Scores of the targets of as many anchors as in training, from the text alone and after one sampled thought.

        The anchors do not depend on the model, so that evaluations at different steps score the same tokens: where
        training chooses by the model's own predictions, any eligible position is scored.
        """
        state = model.read(text)
        anchors = self.choice.choose_without_model(text, rng)
        body_BLM = self.bodies(engine.sample(self.request(model, state, anchors, 1, rng)))[:, 0]
        bodies = Bodies(body_BLM, anchors, anchors.index_BM >= 0)
        # Padding anchors point past the row's end and are cut off again.
        place_BM = torch.where(bodies.real_BM, anchors.index_BM, text.shape[1])

        def spread(x_BM: Tensor) -> Tensor:
            return x_BM.new_zeros(text.shape[0], text.shape[1] + 1).scatter(1, place_BM, x_BM)[:, :-1]

        def scored(hidden_BMW: Tensor) -> tuple[Tensor, Tensor]:
            correct_BM = most_probable(hidden_BMW, model.head_weight_VW) == anchors.next_BM
            return spread(-token_logprobs(hidden_BMW, model.head_weight_VW, anchors.next_BM)), spread(correct_BM)

        plain_BMW = gather_positions(state.hidden_BNW, anchors.index_BM.clamp(min=0))
        text_scores, own_scores = scored(plain_BMW), scored(self.hidden_after(model, state, bodies))
        thoughts = self.template.write(body_BLM[:, None], anchors)
        return TokenScores(*text_scores, spread(bodies.real_BM), *own_scores, thoughts, bodies)

    @torch.no_grad()
    def hidden_after(self, model: ThinkingModel, state: TextState, bodies: Bodies) -> Tensor:
        last = []
        for cut in bodies.anchors.cuts(self.anchors_at_once):
            thoughts = self.template.write(bodies.tokens_BLM[:, None, :, cut], bodies.anchors.part(cut)).trimmed()
            last.append(last_hidden(model.think(thoughts, state), thoughts)[:, 0])
        return torch.cat(last, dim=1)


def tag_ids(config: AnchoredConfig, vocabulary: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of instruction and opening tag, and of the closing tag. Raises SettingError if they cannot be encoded."""
    opening = checked_tag(vocabulary, "open", config.open)
    return (*encode_tag(vocabulary, config.instruction), *opening), checked_tag(vocabulary, "close", config.close)


def marker_id(config: AnchoredConfig, vocabulary: Vocabulary) -> int | None:
    """The id of the marker, None if it is not a single token. Raises SettingError if that is needed."""
    ids = encode_tag(vocabulary, config.marker)
    if config.positions == "marker" and len(ids) != 1:
        raise SettingError(f"marker {config.marker!r} must be one token, the tokenizer makes {len(ids)} of it")
    return ids[0] if len(ids) == 1 else None


def gather_positions(hidden_BNW: Tensor, at_BM: Tensor) -> Tensor:
    """[B, M, W], the hidden states at positions of each row."""
    return hidden_BNW.gather(1, at_BM[..., None].expand(-1, -1, hidden_BNW.shape[-1]))


def last_hidden(hidden_BKSMW: Tensor, thoughts: Thoughts) -> Tensor:
    """[B, K, M, W], the hidden state of each thought's last token."""
    last_BK1M1 = thoughts.lengths_BKM[:, :, None, :, None] - 1
    return hidden_BKSMW.gather(2, last_BK1M1.expand(-1, -1, -1, -1, hidden_BKSMW.shape[-1]))[:, :, 0]


def predicting(hidden_BKSMW: Tensor, where_BKSM: Tensor) -> Tensor:
    """The hidden states [J, W] that predict the marked tokens: those one slot before them.

    hidden may have fewer slots, where none behind them is marked.
    """
    S = min(hidden_BKSMW.shape[2], where_BKSM.shape[2] - 1)
    return hidden_BKSMW[:, :, :S][where_BKSM[:, :, 1 : S + 1]]


def documents_skipped(text: Text, anchors: Anchors) -> Mean:
    """The share of documents without any anchor: too short, or nothing eligible in them."""
    places = {(row, n) for row, index in enumerate(anchors.index_BM.tolist()) for n in index}
    skipped = [all((row, n) not in places for n in range(start, end)) for row, start, end in text.spans]
    return Mean.of(skipped, text.tokens_BN.device)
