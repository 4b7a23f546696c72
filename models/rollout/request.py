"""The request for a rollout, its result, and the protocol of engines.

Shapes: B rows, M anchors, K thoughts, S all tokens of a thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.decoder import TextState
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import START, Anchors, Thoughts


@dataclass(frozen=True)
class Prediction:
    """What follows a thought once it has ended: the `prompt` tokens, then up to `length` sampled ones until `end`."""

    prompt: tuple[int, ...] = ()
    length: int = 1
    end: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class RolloutRequest:
    """Thoughts of the `prompt` tokens and up to `length` sampled ones, `thoughts` of them at every anchor.

    A thought ends once its last sampled tokens are `close`; without `close` all have the full length. With a
    `prediction` it goes on: `close` is appended to those that have not written it, and then the prediction is sampled.
    Banned ids of the model are never sampled, except those of `close`, of the prediction's end, and those `allowed`.
    Temperature 0 is greedy. anchors_at_once: anchors of a row whose thoughts are sampled at once; default: all.
    """

    model: ThinkingModel
    state: TextState
    anchors: Anchors
    thoughts: int
    length: int
    rng: Rng
    temperature: float = 1.0
    prompt: tuple[int, ...] = (START,)
    close: tuple[int, ...] = ()
    prediction: Prediction | None = None
    allowed: tuple[int, ...] = ()
    anchors_at_once: int | None = None

    @property
    def forced(self) -> tuple[int, ...]:
        """Tokens between a thought that did not close and its prediction."""
        return () if self.prediction is None else (*self.close, *self.prediction.prompt)

    @property
    def slots(self) -> int:
        """S, tokens that a thought can have."""
        predicted = 0 if self.prediction is None else self.prediction.length
        return len(self.prompt) + self.length + len(self.forced) + predicted


@dataclass(frozen=True, eq=False)
class Rollout:
    """Sampled thoughts, prompt tokens included.

    sampled_BKSM: bool, which tokens were sampled; the others were prompts, or are padding.
    logprobs_BKSM: of each sampled token under what it was sampled from, 0 elsewhere.
    closed_BKM: bool, whether the thought ended by itself; all True where there is nothing to end it.
    predicting_BKSM: bool, tokens sampled as prediction, those that end it included; all False without one.
    predicted_BKM: bool, whether the prediction ended by itself; all True where there is nothing to end it.
    closing: how many of a closed thought's tokens are those that close it.
    """

    thoughts: Thoughts
    sampled_BKSM: Tensor
    logprobs_BKSM: Tensor
    closed_BKM: Tensor
    predicting_BKSM: Tensor
    predicted_BKM: Tensor
    closing: int

    def part(self, cut: slice) -> Rollout:
        """The thoughts of some of each row's anchors."""
        sliced = {name: x[..., cut] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, thoughts=self.thoughts.part(cut), **sliced)  # type: ignore[arg-type]

    def rows(self, part: slice) -> Rollout:
        """The thoughts of some rows."""
        sliced = {name: x[part] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, thoughts=self.thoughts.rows(part), **sliced)  # type: ignore[arg-type]

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


class Engine(Protocol):
    """Samples thoughts, without gradient.

    reproducible: the draw of a token is keyed by the run's seed, the step and the token's place (sample id, anchor,
    thought, token), so that a thought is the same in whatever batch, chunk or rank it is sampled.
    name: of what samples; of several engines, of the one that last did. lag: optimizer steps that its weights are
    behind the model's.
    """

    @property
    def reproducible(self) -> bool: ...

    @property
    def name(self) -> str: ...

    @property
    def lag(self) -> int: ...

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        """Whether the request can be sampled, and if not, why."""
        ...

    def sample(self, request: RolloutRequest) -> Rollout:
        """The thoughts. Raises ValueError for a request that it does not support."""
        ...


class Preferred:
    """The first of several engines that supports a request."""

    def __init__(self, *engines: Engine):
        self.engines = engines
        self._last = engines[0]

    @property
    def reproducible(self) -> bool:
        return all(engine.reproducible for engine in self.engines)

    @property
    def name(self) -> str:
        return self._last.name

    @property
    def lag(self) -> int:
        return self._last.lag

    def _choose(self, request: RolloutRequest) -> tuple[Engine | None, str]:
        reasons = []
        for engine in self.engines:
            supported, reason = engine.supports(request)
            if supported:
                return engine, ""
            reasons.append(f"{type(engine).__name__}: {reason}")
        return None, "; ".join(reasons)

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        engine, reason = self._choose(request)
        return engine is not None, reason

    def sample(self, request: RolloutRequest) -> Rollout:
        engine, reason = self._choose(request)
        if engine is None:
            raise ValueError(f"no rollout engine supports this request ({reason})")
        self._last = engine
        return engine.sample(request)
