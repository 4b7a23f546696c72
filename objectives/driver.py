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
from dataclasses import dataclass, replace
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
    outputs add up; the last one of each micro-batch has the record of its thoughts. last: of the update's."""

    loss: Tensor
    metrics: Means
    record: ThoughtRecord | None = None
    last: bool = False


class Step:
    """One step of training on the micro-batches `parts`: `updates` times all `losses`, an optimizer step behind each.

    Thoughts are sampled here, ahead of all updates, where these share them, the counts depend on them, or those of
    several micro-batches are sampled together; otherwise within `losses`, which then reads each text once for both.
    sampled_rows: how many rows' thoughts are sampled together, if that is more than a micro-batch has.
    """

    def __init__(
        self,
        objective: Objective,
        model: ThinkingModel,
        parts: Sequence[Text],
        rng: Rng,
        engine: Engine = EAGER,
        sampled_rows: int | None = None,
    ):
        self.objective, self.model, self.parts, self.rng, self.engine = objective, model, parts, rng, engine
        self.updates = objective.updates
        self._sampled: list[Sampled] | None = None
        together = max(1, (sampled_rows or 0) // parts[0].shape[0])
        if objective.counts_thoughts or self.updates > 1 or (together > 1 and objective.longest_thought > 0):
            # Kept over the updates: the first one leaves its rewards there.
            groups = [parts[first : first + together] for first in range(0, len(parts), together)]
            self._sampled = [sampled for group in groups for sampled in self._sample_ahead(group)]
        batches = [None] * len(parts) if self._sampled is None else [sampled.batch for sampled in self._sampled]
        counts = [objective.counts(part, batch) for part, batch in zip(parts, batches, strict=True)]
        self.counts: Counts = {name: torch.stack([c[name] for c in counts]).sum(dim=0) for name in counts[0]}

    def losses(self, counts: Counts | None = None) -> Iterator[StepOutput]:
        """The losses of one update. Take each one's backward before you ask for the next, all with the same factor.

        counts: of all ranks; by default this step's own.
        """
        counts = self.counts if counts is None else counts
        for i, part in enumerate(self.parts):
            last = i == len(self.parts) - 1
            if self.objective.anchors_at_once is None:
                # A function of its own, so that nothing but the loss's graph is alive during its backward.
                yield replace(self._at_once(i, part, counts), last=last)
            else:
                state, sampled = self._read(i, part)
                for output in in_chunks(self.objective, self.model, state, sampled, counts):
                    yield replace(output, last=last and output.last)

    def _at_once(self, i: int, part: Text, counts: Counts) -> StepOutput:
        state, sampled = self._read(i, part)
        return at_once(self.objective, self.model, state, sampled, counts)

    def _read(self, i: int, part: Text) -> tuple[TextState, Sampled]:
        state = self.model.read(part)
        return state, self._sample(state.detached()) if self._sampled is None else self._sampled[i]

    @torch.no_grad()
    def _sample_ahead(self, parts: Sequence[Text]) -> list[Sampled]:
        """The thoughts of several micro-batches, sampled at once."""
        if len(parts) == 1:
            return [self._sample(self.model.read(parts[0]))]
        batch, first, found = self._sample(self.model.read(Text.joined(parts))).batch, 0, []
        for part in parts:
            found.append(Sampled.of(self.objective, batch.rows(slice(first, first + part.shape[0]))))
            first += part.shape[0]
        return found

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
    yield StepOutput(loss, text.metrics, ThoughtRecord.joined(records, sampled.batch.anchors), last=True)


def _think(objective: Objective, model: ThinkingModel, state: TextState, chunk: Batch) -> ThoughtState:
    # A chunk has as many slots as the longest thought of all of them.
    thoughts = objective.thoughts_to_score(chunk).trimmed()
    return ThoughtState(thoughts, model.think(thoughts, state, objective.thoughts_at_once))


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, losses)
