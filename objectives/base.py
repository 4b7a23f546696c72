"""What every objective is: (model, text, rng) → loss and metrics, without trainer, ranks or logging.

Losses are sums divided by *global* counts. `denominators` gives a text's own counts; whoever cuts a batch into ranks
and micro-batches adds them up first and hands the totals in, so that the update does not depend on the cut.

Shapes: B rows, N text positions, M anchors, K thoughts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Text, Thoughts
from objectives.causal import CausalTest

Denominators = dict[str, Tensor]


@dataclass(frozen=True)
class Mean:
    """A metric that is a mean, kept as its sum and count (fp64 scalars) so that ranks and micro-batches add up."""

    sum: Tensor
    count: Tensor

    @staticmethod
    def over(values: Tensor, where: Tensor) -> Mean:
        """The mean of `values` where the bool `where` (broadcast) is set."""
        where = where.expand_as(values)
        return Mean((values.detach().double() * where).sum(), where.sum().double())

    @staticmethod
    def of(values: Sequence[float], device: torch.device) -> Mean:
        """The mean of numbers known on the host."""
        pair = torch.tensor([float(sum(values)), float(len(values))], dtype=torch.float64, device=device)
        return Mean(pair[0], pair[1])


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
class ObjectiveOutput:
    """loss: scalar with gradient, already divided by the global counts. flops: spent so far and by its backward."""

    loss: Tensor
    metrics: dict[str, Mean]
    flops: int
    record: ThoughtRecord | None = None


@dataclass
class TextScore(ObjectiveOutput):
    """The text's own part of a loss; subclasses add what its thoughts' part needs of it."""

    @property
    def apart(self) -> Self:
        """For scores of thoughts that are to hold nothing of the text's own."""
        return replace(self, loss=torch.zeros_like(self.loss), metrics={}, flops=0)


@dataclass
class TokenScores:
    """Scores of each token's successor [B, N], where `valid_BN`; without thoughts and, if there are any, with.

    nll: in nats. correct: bool, whether the most probable token is the true one. causal_nll_BN: by condition of the
    causal test. right_BN: 1 where the thought is exactly the right one, else 0; nan where the test knows no right one,
    after which causal_nll_BN has no meaning.
    """

    text_nll_BN: Tensor
    text_correct_BN: Tensor
    valid_BN: Tensor
    thought_nll_BN: Tensor | None = None
    thought_correct_BN: Tensor | None = None
    thoughts: Thoughts | None = None
    causal_nll_BN: dict[str, Tensor] = field(default_factory=dict)
    right_BN: Tensor | None = None
    flops: int = 0


@dataclass(eq=False)
class Prepared:
    """What a step draws before its first update, for all its updates. flops: what that took."""

    flops: int


class Objective(ABC):
    """A pretraining objective. Subclasses say which parts of a ThinkingModel they use."""

    uses_delimiters = False
    uses_mixing_head = False

    @property
    def longest_thought(self) -> int:
        """Positions that a thought can take behind its anchor."""
        return 0

    @property
    def updates(self) -> int:
        """Optimizer steps on the same thoughts."""
        return 1

    def prepare(self, model: ThinkingModel, text: Text, rng: Rng) -> Prepared | None:
        """The thoughts of a text, sampled ahead; None where `__call__` samples them itself."""
        return None

    @abstractmethod
    def denominators(self, text: Text, prepared: Prepared | None = None) -> Denominators:
        """The counts that this text's losses are divided by; they add up over the parts of a batch.

        Raises ValueError for a text the objective cannot be applied to.
        """

    @abstractmethod
    def __call__(
        self,
        model: ThinkingModel,
        text: Text,
        rng: Rng,
        denominators: Denominators | None = None,
        prepared: Prepared | None = None,
    ) -> ObjectiveOutput:
        """Loss and metrics of a text.

        `denominators` defaults to the text's own, `prepared` to what `prepare` gives, whose FLOPs then count here.
        """

    def losses(
        self,
        model: ThinkingModel,
        text: Text,
        rng: Rng,
        denominators: Denominators | None = None,
        prepared: Prepared | None = None,
    ) -> Iterator[ObjectiveOutput]:
        """What `__call__` gives, in parts that need less memory one after the other.

        Losses, their gradients, metrics and FLOPs add up to the whole's; the last part has the record. Take each part's
        backward before you ask for the next, all with the same factor on the loss.
        """
        yield self(model, text, rng, denominators, prepared)

    def after_step(self, model: ThinkingModel) -> None:  # noqa: B027 - most objectives have nothing to do here
        """Called after every optimizer step."""

    def other_models(self, model: ThinkingModel) -> list[ThinkingModel]:
        """Models kept beside the one that is trained, made now if they are not there yet: to be sharded like it."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What an objective keeps between steps, to continue a run exactly."""
        return {}

    def load_state(self, model: ThinkingModel, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restores what `state` gave."""

    def scored(self, text: Text) -> int:
        """How many tokens of a text `evaluate` scores."""
        return int(text.targets(1)[1].sum())

    @abstractmethod
    def evaluate(self, model: ThinkingModel, text: Text, rng: Rng, test: CausalTest | None = None) -> TokenScores:
        """Scores of held-out text, without gradient; those of the causal test where thoughts can be put to one."""


def divide(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and 0 where there was nothing to count."""
    return total / count.clamp(min=1).to(total.dtype)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Base of the objectives' settings."""

    def problems(self) -> list[str]:
        """Every setting that cannot be, one line each, naming the way out."""
        return []


def at_least(minimum: float, **values: float | None) -> list[str]:
    return [
        f"{name} must be at least {minimum}, got {value}"
        for name, value in values.items()
        if value is not None and value < minimum
    ]
