"""The one way from a text to losses, for all objectives:

    state = model.read(text)                          one pass, shared by all thoughts
    batch = objective.sample(state)                   anchors and thoughts, without gradient, by an engine
    for chunk in batch.chunks(anchors_at_once):
        thought = model.think(chunk)                  one differentiable pass over the chunk's thoughts
        objective.thought_terms(chunk, thought)
    objective.text_terms(state)                       which backpropagates the chunks' accumulated gradient as well

Terms become losses once the counts of the whole batch, over micro-batches and ranks, are known.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.decoder import TextState, Trunk
from models.philox import Rng
from models.rollout import EAGER, Engine
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives.base import Batch, Counts, Objective, ThoughtRecord, ThoughtState
from objectives.metrics import Means


@dataclass
class StepOutput:
    """loss: scalar with gradient, divided by the counts of the whole batch. Losses, gradients and metrics of a step's
    outputs add up; the last one of each micro-batch has the record of its thoughts."""

    loss: Tensor
    metrics: Means
    record: ThoughtRecord | None = None


class Step:
    """One step of training on the micro-batches `parts`: `updates` times all `losses`, an optimizer step behind each.

    Thoughts are sampled here, ahead of all updates, where these share them or the counts depend on them; otherwise
    within `losses`, which then reads each text once for both.
    """

    def __init__(
        self,
        objective: Objective,
        model: ThinkingModel,
        parts: Sequence[Text],
        rng: Rng,
        engine: Engine = EAGER,
    ):
        self.objective, self.model, self.parts, self.rng, self.engine = objective, model, parts, rng, engine
        self.updates = objective.updates
        self._sampled: list[Sampled] | None = None
        if objective.counts_thoughts or self.updates > 1:
            with torch.no_grad():
                # Kept over the updates: the first one leaves its rewards there.
                self._sampled = [self._sample(model.read(part)) for part in parts]
        batches = [None] * len(parts) if self._sampled is None else [sampled.batch for sampled in self._sampled]
        counts = [objective.counts(part, batch) for part, batch in zip(parts, batches, strict=True)]
        self.counts: Counts = {name: torch.stack([c[name] for c in counts]).sum(dim=0) for name in counts[0]}

    def losses(self, counts: Counts | None = None) -> Iterator[StepOutput]:
        """The losses of one update. Take each one's backward before you ask for the next, all with the same factor.

        counts: of all ranks; by default this step's own.
        """
        counts = self.counts if counts is None else counts
        for i, part in enumerate(self.parts):
            if self.objective.anchors_at_once is None:
                # A function of its own, so that nothing but the loss's graph is alive during its backward.
                yield self._at_once(i, part, counts)
            else:
                state, sampled = self._read(i, part)
                yield from in_chunks(self.objective, self.model, state, sampled, counts)

    def _at_once(self, i: int, part: Text, counts: Counts) -> StepOutput:
        state, sampled = self._read(i, part)
        return at_once(self.objective, self.model, state, sampled, counts)

    def _read(self, i: int, part: Text) -> tuple[TextState, Sampled]:
        state = self.model.read(part)
        return state, self._sample(state.detached()) if self._sampled is None else self._sampled[i]

    @torch.no_grad()
    def _sample(self, state: TextState) -> Sampled:
        return Sampled.of(self.objective, self.objective.sample(self.model, state, self.rng, self.engine))


@dataclass
class Sampled:
    """A batch of thoughts, None for an objective that does not think, and the chunks that it is differentiated in."""

    batch: Any
    chunks: Sequence[Any]

    @staticmethod
    def of(objective: Objective, batch: Any) -> Sampled:
        return Sampled(batch, [] if batch is None else batch.chunks(objective.anchors_at_once))


def at_once(
    objective: Objective, model: ThinkingModel, state: TextState, sampled: Sampled, counts: Counts
) -> StepOutput:
    """The loss of a text that was read, with all of its thoughts."""
    thoughts = [_think(objective, model, state, chunk) for chunk in sampled.chunks]
    text = objective.text_terms(model, state, sampled.batch)
    terms, metrics, record = text.terms, text.metrics, None
    for chunk, thought in zip(sampled.chunks, thoughts, strict=True):
        part = objective.thought_terms(model, state, chunk, thought, text)
        terms, metrics, record = terms + part.terms, metrics | part.metrics, part.record
    return StepOutput(_sum(term.loss(counts) for term in terms), metrics, record)


def in_chunks(
    objective: Objective, model: ThinkingModel, state: TextState, sampled: Sampled, counts: Counts
) -> Iterator[StepOutput]:
    """One loss per chunk of anchors, then the text's, which backpropagates their accumulated gradient."""
    text = objective.text_terms(model, state, sampled.batch)
    trunk, records = Trunk(state), []
    for chunk in sampled.chunks:
        thought = _think(objective, model, trunk.state, chunk)
        part = objective.thought_terms(model, trunk.state, chunk, thought, text)
        del thought  # its graph is the loss's alone
        records.append(part.record)
        yield StepOutput(_sum(term.loss(counts) for term in part.terms), part.metrics)
    loss = _sum([*(term.loss(counts) for term in text.terms), trunk.accumulated_gradient()])
    yield StepOutput(loss, text.metrics, ThoughtRecord.joined(records, sampled.batch.anchors))


def _think(objective: Objective, model: ThinkingModel, state: TextState, chunk: Batch) -> ThoughtState:
    # A chunk has as many slots as the longest thought of all of them.
    thoughts = objective.thoughts_to_score(chunk).trimmed()
    return ThoughtState(thoughts, model.think(thoughts, state))


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, losses)
