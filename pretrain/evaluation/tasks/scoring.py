"""What the task files beside it call: how answers are spelled, and how a document is scored.

Expected probability (Quiet-STaR, 2403.09629; eval_helpers.py of its public code): that the gold answer is written, and
a line break behind it, where at each place only the allowed pieces can be: the product of softmaxes over these. A piece
is a digit, or a letter with the space before it. It is computed from strings, so it needs a tokenizer that takes digits
one by one: then " 7" and " 8" differ in log-likelihood as "7" and "8" behind a space.

Needs nothing of this project, so that lm-eval can use the task files alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Document = dict[str, Any]
Result = tuple[float, bool]  # log-likelihood, and whether it is what greedy decoding writes


class Spelling:
    """Answers of certain pieces. before: what stands before the first; gold: a document's answer in pieces."""

    # No dataclass: lm-eval executes this file before it registers it as a module, which dataclasses look up.
    def __init__(self, allowed: Sequence[str], before: str, gold: Callable[[Document], list[str]]):
        self.allowed, self.before, self.gold = allowed, before, gold

    def choices(self, doc: Document) -> list[str]:
        """All allowed pieces behind each beginning of the gold answer."""
        gold = self.gold(doc)
        return [self.before + "".join(gold[:i]) + piece for i in range(len(gold)) for piece in self.allowed]

    def target(self, doc: Document) -> int:
        """The number of the choice that is the gold answer whole."""
        gold = self.gold(doc)
        return (len(gold) - 1) * len(self.allowed) + self.allowed.index(gold[-1])

    def results(self, doc: Document, results: Sequence[Result]) -> dict[str, float]:
        loglikelihoods = [loglikelihood for loglikelihood, _ in results]
        n, gold = len(self.allowed), [self.allowed.index(piece) for piece in self.gold(doc)]
        return spelled([loglikelihoods[i * n : (i + 1) * n] for i in range(len(gold))], gold)


def spelled(loglikelihoods: Sequence[Sequence[float]], gold: Sequence[int]) -> dict[str, float]:
    """Of the allowed pieces at each place of an answer. gold: the number of the right one there.

    exact_match: whether the answer is what greedy decoding writes with the allowed pieces.
    """
    probability, exact = 1.0, True
    for place, right in zip(loglikelihoods, gold, strict=True):
        most = max(place)
        probability *= math.exp(place[right] - most) / sum(math.exp(x - most) for x in place)
        exact &= place.index(most) == right
    return {"expected_probability": probability, "exact_match": float(exact)}


DIGITS = Spelling((*"0123456789", "\n"), " ", lambda doc: [*gsm8k_answer(doc), "\n"])
LETTERS = Spelling((" A", " B", " C", " D", " E", "\n"), "", lambda doc: [f" {doc['answerKey']}", "\n"])
# lm-eval finds functions by name, of a module.
digit_choices, digit_target, digit_results = DIGITS.choices, DIGITS.target, DIGITS.results
letter_choices, letter_target, letter_results = LETTERS.choices, LETTERS.target, LETTERS.results


def gsm8k_answer(doc: Document) -> str:
    """The digits of the number behind ####."""
    return "".join(character for character in doc["answer"].split("####")[-1] if character.isdigit())


def choice_results(doc: Document, results: Sequence[Result]) -> dict[str, float]:
    """Of one piece, of which the document lists the allowed ones as `choices` and the right one's number as `gold`."""
    found = spelled([[loglikelihood for loglikelihood, _ in results]], [doc["gold"]])
    return {"expected_probability": found["expected_probability"], "acc": found["exact_match"]}


def mathematics_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the last answer of a text is mathematically the document's (math-verify)."""
    from math_verify import parse, verify

    return {"exact_match": float(verify(parse(f"\\boxed{{{doc['answer']}}}"), parse(results[0])))}
