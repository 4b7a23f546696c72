"""What an objective is: a configuration, where it thinks, and the terms of its loss. It knows no trainer, ranks or
logging, and hands out no losses: a `Term` is a sum with the count that it is to be divided by, so that whoever cuts a
batch into ranks and micro-batches adds up the counts first, and the update does not depend on the cut.

`objectives.driver` turns terms into losses.

Shapes: B rows, N text positions, M anchors, K thoughts.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from models.decoder import TextState
from models.logprobs import most_probable, token_logprobs
from models.philox import Rng
from models.rollout import EAGER, Engine
from models.thinking import ThinkingModel, TrainedThinking
from models.thoughts import Anchors, Text, Thoughts
from objectives.counterfactuals import Bodies
from objectives.metrics import METRICS, Means, Metric
from objectives.workload import Workload

# Settings


def setting(default: Any, description: str, free: bool = False, **constraints: float) -> Any:
    """A field of a configuration: its default, what `--help` says, and pydantic's constraints (ge, gt, le, lt).

    free: it changes nothing that a step computes, and may differ between a run and its continuation.
    Plain dataclasses, so that objectives can be used where pydantic is not installed; recipes validate them with it.
    """
    return field(
        default=default, metadata={"description": description, "json_schema_extra": {"free": free}, **constraints}
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Base of the objectives' settings. name: short name or import path (`package.module:Class`) of the objective."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    name: str = setting("", "short name or package.module:Class")

    def problems(self) -> list[str]:
        """What no single setting shows, one line each, naming the way out."""
        return []

    def cautions(self) -> dict[str, str]:
        """What these settings are known to do to a model of real text: one line each, by name. Said when a run begins.

        A laboratory's models are spared it: there they may be right.
        """
        return {}

    @property
    def shortest_row(self) -> int:
        """Tokens that a row must have at least."""
        return 2

    @property
    def thought_length(self) -> tuple[str, int] | None:
        """The setting that says how many tokens of a thought are sampled, and its value; None without thoughts."""
        return None

    def showing(self, length: int | None, temperature: float, positions: int) -> ObjectiveConfig | None:
        """The settings by which `sample` shows the thoughts at all of a text's `positions`; None if there are none.

        length: sampled tokens of a thought, by default as trained.
        """
        return None

    def replaced(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class ThinkingConfig(ObjectiveConfig):
    """Base of the settings of objectives that sample thoughts. None of these changes the update."""

    anchors_at_once: int | None = setting(
        None,
        "anchors of a row whose thoughts are held with gradient at once; default: all; auto: as many as fit",
        free=True,
        ge=1,
    )
    thoughts_at_once: int | None = setting(
        None,
        "thoughts of an anchor whose activations are held at once, where one anchor's are too many: backward computes "
        "each such part again; default: all; auto: as many as fit",
        free=True,
        ge=1,
    )
    sampled_at_once: int | None = setting(
        None,
        "anchors of a row whose thoughts are sampled at once; default: anchors_at_once; auto: as many as fit",
        free=True,
        ge=1,
    )

    @property
    def rollout_anchors(self) -> int | None:
        """`sampled_at_once` with its default."""
        return self.sampled_at_once or self.anchors_at_once


class SettingError(ValueError):
    """A setting that does not fit the tokenizer or model. The message begins with the setting's name."""


class Vocabulary(Protocol):
    """What an objective asks of a tokenizer."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def token_bytes(self) -> Sequence[bytes | None]:
        """The bytes of text that each id stands for; None for control tokens."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its exact name."""
        ...

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Needs:
    """What an objective needs besides a decoder.

    delimiters: texts whose first token's embedding the start and the end of a thought begin as; None: no delimiters.
    models: references of further models by the setting that names them, which must read the same tokens.
    """

    delimiters: tuple[str, str] | None = None
    mixing_head: bool = False
    models: Mapping[str, str] = field(default_factory=dict)


# What a step consists of

Counts = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One addend of a loss: `weight` · `sum` / count, with the count named `per` added up over the whole batch.

    Sum and count may be vectors [A], whose quotients are averaged. sum carries the gradient.
    """

    sum: Tensor
    per: str
    weight: float = 1.0

    def loss(self, counts: Counts) -> Tensor:
        """The scalar, 0 where there was nothing to count."""
        count = counts[self.per].clamp(min=1).to(self.sum.dtype)
        return self.weight * (self.sum / count).mean()


@dataclass(eq=False)
class Batch:
    """What sampling leaves behind for the updates that use it; subclasses add what they need.

    Tensors in their fields begin with the rows' axis B and end in the anchors' axis M, so that `rows` and `chunks` can
    cut them, like everything that has `rows` and `part`.
    """

    thoughts: Thoughts

    @property
    def anchors(self) -> Anchors:
        return self.thoughts.anchors

    def chunks(self, anchors_at_once: int | None) -> list[Self]:
        """Parts with the thoughts of so many of each row's anchors; itself for None."""
        return [self] if anchors_at_once is None else [self.part(cut) for cut in self.anchors.cuts(anchors_at_once)]

    def part(self, cut: slice) -> Self:
        """The thoughts of some of each row's anchors."""
        return self._cut("part", cut, (..., cut))

    def rows(self, cut: slice) -> Self:
        """The thoughts of some rows."""
        return self._cut("rows", cut, (cut,))

    def _cut(self, method: str, cut: slice, index: tuple[Any, ...]) -> Self:
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = value[index]
            elif hasattr(value, method):
                changed[name] = getattr(value, method)(cut)
        return dataclasses.replace(self, **changed)


@dataclass
class ThoughtState:
    """Thoughts that went through the model with gradient, and their hidden states [B, K, S, M, W]."""

    thoughts: Thoughts
    hidden_BKSMW: Tensor


@dataclass
class TextPart:
    """The text's own part of a step; subclasses add what its thoughts' part needs of it."""

    terms: list[Term] = field(default_factory=list)
    metrics: Means = field(default_factory=dict)


@dataclass
class ThoughtRecord:
    """Thoughts with what they earned, for people to read: reward and advantage [B, K, M]."""

    thoughts: Thoughts
    reward_BKM: Tensor
    advantage_BKM: Tensor

    @staticmethod
    def joined(parts: Sequence[ThoughtRecord], anchors: Anchors) -> ThoughtRecord:
        """The thoughts of all `anchors` from those of its parts, in order."""
        reward_BKM, advantage_BKM = (
            torch.cat([getattr(p, name) for p in parts], dim=-1) for name in ("reward_BKM", "advantage_BKM")
        )
        return ThoughtRecord(Thoughts.joined([p.thoughts for p in parts], anchors), reward_BKM, advantage_BKM)


@dataclass
class ThoughtPart:
    """The part of a step that a chunk of thoughts has."""

    terms: list[Term]
    metrics: Means
    record: ThoughtRecord


@dataclass
class TokenScores:
    """Scores of each token's successor [B, N], where `valid_BN`; without thoughts and, if there are any, with.

    nll: in nats. correct: bool, whether the most probable token is the true one. bodies: what the thoughts say, at the
    same places, for the counterfactual test.
    """

    text_nll_BN: Tensor
    text_correct_BN: Tensor
    valid_BN: Tensor
    thought_nll_BN: Tensor | None = None
    thought_correct_BN: Tensor | None = None
    thoughts: Thoughts | None = None
    bodies: Bodies | None = None


class Objective(ABC):
    """A pretraining objective.

    Config: its settings. sentence: what it does, for the report. metrics: names that METRICS does not have.
    """

    Config: ClassVar[type[ObjectiveConfig]]
    sentence: ClassVar[str] = ""
    metrics: ClassVar[Mapping[str, Metric]] = {}
    config: Any

    @classmethod
    def build(cls, config: Any, vocabulary: Vocabulary) -> Self:
        """The objective for a tokenizer. Raises SettingError for settings that do not fit it."""
        return cls(config)  # type: ignore[call-arg]

    @property
    def needs(self) -> Needs:
        return Needs()

    def use_models(self, models: Mapping[str, ThinkingModel]) -> None:  # noqa: B027 - most need none
        """Receives the models that `needs` names, by setting."""

    @property
    def longest_thought(self) -> int:
        """Positions that a thought can take behind its anchor."""
        return 0

    @property
    def thinking(self) -> TrainedThinking | None:
        """How a model that was trained by it thinks when it is used; None for one that does not."""
        return None

    @property
    def updates(self) -> int:
        """Optimizer steps on the same thoughts."""
        return 1

    @property
    def anchors_at_once(self) -> int | None:
        """Anchors of a row whose thoughts are held with gradient at once; None: all."""
        return None

    @property
    def thoughts_at_once(self) -> int | None:
        """Thoughts of an anchor whose activations are held at once; None: all."""
        return None

    # Whether `counts` takes the sampled batch. Such an objective samples before all counts of a step are known.
    counts_thoughts: ClassVar[bool] = False

    @abstractmethod
    def counts(self, text: Text, batch: Any = None) -> Counts:
        """What this text's terms are divided by; they add up over the parts of a batch.

        Raises ValueError for a text that the objective cannot be applied to.
        """

    def sample(self, model: ThinkingModel, state: TextState, rng: Rng, engine: Engine) -> Any:
        """Anchors, thoughts and the parts of their rewards that do not depend on the update, as a `Batch`; called
        without gradient. None for an objective that does not think.
        """
        return None

    @abstractmethod
    def text_terms(self, model: ThinkingModel, state: TextState, batch: Any) -> TextPart:
        """The text's own part."""

    def thoughts_to_score(self, batch: Any) -> Thoughts:
        """What goes through the model with gradient, in a single pass, without slots that none of them fills: by
        default the batch's thoughts as they are."""
        return batch.thoughts

    def thought_terms(
        self, model: ThinkingModel, state: TextState, batch: Any, thought: ThoughtState, text: Any
    ) -> ThoughtPart:
        """The part of a batch, or of a chunk of one. thought: the pass over `thoughts_to_score`; text: what
        `text_terms` gave."""
        raise TypeError(f"{type(self).__name__} samples thoughts but has no thought_terms")

    def workload(self, length: int, documents: float) -> Workload | None:
        """What a step does with a row of so many tokens in so many documents, for plans; None where nobody knows."""
        return None

    def begin(self, model: ThinkingModel) -> None:  # noqa: B027 - most objectives keep nothing
        """Called where a run goes over from another objective to this one: as if training began with this model."""

    def after_step(self, model: ThinkingModel) -> None:  # noqa: B027 - most objectives have nothing to do here
        """Called after every optimizer step."""

    def other_models(self, model: ThinkingModel) -> list[ThinkingModel]:
        """Models kept beside the one that is trained, made now if they are not there yet: to be sharded like it.

        Called before the model has weights, on the meta device, and again once it has.
        """
        return []

    def state(self) -> dict[str, Tensor]:
        """What an objective keeps between steps, to continue a run exactly."""
        return {}

    def load_state(self, model: ThinkingModel, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Restores what `state` gave; a tensor is read when it is asked for, and sharded as `state` now has it."""

    def scored(self, text: Text) -> int:
        """How many tokens of a text `evaluate` scores."""
        return int(text.targets(1)[1].sum())

    def scoring_rule(self) -> str:
        """Which positions are scored, where that is not all: the settings that say so, for messages."""
        return ""

    @abstractmethod
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng, engine: Engine = EAGER) -> TokenScores:
        """Scores of held-out text, without gradient, with thoughts in chunks of `anchors_at_once`, as in training."""

    def hidden_after(self, model: ThinkingModel, state: TextState, bodies: Bodies) -> Tensor:
        """The hidden states [B, M, W] that predict each anchor's next token after a thought that says `bodies`, without
        gradient and in the same chunks; for objectives whose `evaluate` gives bodies."""
        raise TypeError(f"{type(self).__name__} evaluates thoughts but has no hidden_after")

    def own_bodies(
        self, model: ThinkingModel, state: TextState, anchors: Anchors, rng: Rng, engine: Engine, thoughts: int = 1
    ) -> Tensor:
        """What so many thoughts at each anchor say [B, K, L, M], PAD behind their ends, sampled at the temperature of
        training; for objectives whose `evaluate` gives bodies."""
        raise TypeError(f"{type(self).__name__} evaluates thoughts but has no own_bodies")

    @torch.no_grad()
    def right_after(self, model: ThinkingModel, state: TextState, bodies: Bodies) -> Tensor:
        """bool [B, M], whether the true next token is the likeliest after a thought that says `bodies`."""
        hidden_BMW = self.hidden_after(model, state, bodies)
        return (most_probable(hidden_BMW, model.head_weight_VW) == bodies.anchors.next_BM) & bodies.real_BM

    @torch.no_grad()
    def nll_after(self, model: ThinkingModel, state: TextState, bodies: Bodies) -> Tensor:
        """The NLL [B, M] of each anchor's next token after a thought that says `bodies`, 0 where none is scored."""
        hidden_BMW = self.hidden_after(model, state, bodies)
        return -token_logprobs(hidden_BMW, model.head_weight_VW, bodies.anchors.next_BM) * bodies.real_BM

    @classmethod
    def all_metrics(cls) -> dict[str, Metric]:
        """The meaning of every metric that the objective may log."""
        return {**METRICS, **cls.metrics}
