"""What a step does with each row of text, as far as that is known before it is taken, and what that costs by the
ledger's formulas: thoughts that can end early are taken to have the length that they are given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models import flops
from models.decoder import DecoderConfig


@dataclass(frozen=True)
class Workload:
    """Of a row of `length` tokens in `documents` documents; numbers are means over rows.

    readings: of the text without gradient by the model that is trained; other_readings: by another one.
    anchors, thoughts: of the row, of an anchor; everywhere: whether every position is an anchor. prefix: text tokens
    that an anchor sees.
    prompt, sampled, appended: tokens of a thought that are given, sampled at most, and appended once it has ended; all
    of them are scored: they go through the model with gradient. other_thinkings: passes of another model over the same;
    moved: of this one, without gradient.
    text_predicted, predicted: log-probs with gradient of tokens of the text, and of those behind each thought.
    rewarded: share of the sampled tokens whose log-probs are taken with gradient. looked_up: log-probs and entropies
    without gradient.
    mixed: predictions of the mixing head for each thought.
    teacher: whether there is a copy of the model beside it. updates: on the same thoughts.
    """

    length: int
    documents: float = 1.0
    readings: int = 0
    other_readings: int = 0
    anchors: float = 0.0
    thoughts: int = 0
    everywhere: bool = False
    prefix: float = 0.0
    prompt: int = 0
    sampled: float = 0.0
    appended: int = 0
    other_thinkings: int = 0
    moved: int = 0
    text_predicted: float = 0.0
    predicted: int = 0
    rewarded: float = 1.0
    looked_up: float = 0.0
    mixed: int = 0
    teacher: bool = False
    updates: int = 1

    @property
    def scored(self) -> float:
        """Tokens of a thought that go through the model with gradient."""
        return self.prompt + self.sampled + self.appended

    def ending_after(self, sampled: float) -> Workload:
        """The same with thoughts of so many sampled tokens, if that is fewer."""
        return replace(self, sampled=min(sampled, self.sampled))

    def flops(self, config: DecoderConfig, checkpointing: bool = False, divided: bool = False) -> dict[str, float]:
        """Of a row, by what the ledger calls them. divided: whether backward computes thoughts in parts again."""
        w, passes = self, 3 + checkpointing
        document = w.length / w.documents
        pairs = w.documents * document * (document + 1) / 2
        reading = flops.blocks(config, w.length) + flops.attention(config, pairs)
        thoughts = w.anchors * w.thoughts

        def thinking(tokens: float) -> float:
            seen = tokens * w.prefix + tokens * (tokens + 1) / 2
            return thoughts * (flops.blocks(config, tokens) + flops.attention(config, seen))

        differentiated = w.text_predicted + thoughts * (w.predicted + w.rewarded * w.sampled)
        compared = thoughts * w.other_thinkings * w.rewarded * w.sampled
        head = flops.vocabulary(config.vocab_size, config.width, 1)
        mixing = flops.mixing(config.width, w.mixed * w.anchors, w.mixed * thoughts)
        return {
            "text": (passes * w.updates + w.readings + w.other_readings) * reading,
            "rollout": (thinking(w.prompt + w.sampled - 1) + head * w.sampled * thoughts) if w.sampled else 0.0,
            "thoughts": ((passes + divided) * w.updates + w.other_thinkings + w.moved) * thinking(w.scored),
            "vocabulary": head * (4 * w.updates * differentiated + w.looked_up + compared),
            "mixing": 3 * w.updates * mixing,
        }
