"""Numbers over several samples of a problem, and their 95% intervals over problems.

Shapes: D problems (or documents), K samples of each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.evaluation.held_out import bootstrap

Z = 1.959963984540054  # of a normal distribution's central 95%
_UNANSWERED = {"", "[invalid]"}  # the latter is what lm-eval's filters make of a text without an answer
_BOX = re.compile(r"\\boxed\s*\{")


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Of a proportion (Wilson 1927): sensible also near 0 and 1, where a bootstrap sees no variation."""
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return centre - half, centre + half


def mean_interval(value_D: Tensor) -> tuple[float, float]:
    """Of a mean over problems: Wilson's where every value is 0 or 1, else a percentile bootstrap over problems."""
    value_D = value_D.double()
    if ((value_D == 0) | (value_D == 1)).all():
        return wilson(value_D.sum().item(), len(value_D))
    return bootstrap(value_D, torch.ones_like(value_D))


def pass_at_k(correct: int, n: int, k: int) -> float:
    """The probability that at least one of k samples is correct, from n of which `correct` are: unbiased
    (Chen et al., arXiv 2107.03374, equation 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_is_correct(answers: Sequence[str], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer is correct; of equally frequent ones, that sampled first. No answer has no vote.

    correct: of each sample. Answers that differ only as text count apart.
    """
    votes = Counter(answer for answer in answers if answer not in _UNANSWERED)
    return bool(votes) and correct[answers.index(votes.most_common(1)[0][0])]


def final_answer(text: str) -> str:
    """What is in the last \\boxed{…} of a text, else the whole of it, without white space around it."""
    *_, last = [None, *_BOX.finditer(text)]
    if last is None:
        return text.strip()
    depth, start = 1, last.end()
    for n in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[n], 0)
        if depth == 0:
            return text[start:n].strip()
    return text[start:].strip()


def sampled_metrics(correct_DK: Tensor, answers: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """By name, [D] each, of a metric that is 0 or 1: maj@K and pass@k for k = 2, 4, … and K."""
    D, K = correct_DK.shape
    counts = correct_DK.sum(dim=1).long().tolist()
    ks = sorted({K, *(2**i for i in range(1, K.bit_length()))})
    found = {f"pass@{k}": torch.tensor([pass_at_k(c, K, k) for c in counts], dtype=torch.float64) for k in ks}
    majorities = [majority_is_correct(list(a), c) for a, c in zip(answers, correct_DK.bool().tolist(), strict=True)]
    return {f"maj@{K}": torch.tensor(majorities, dtype=torch.float64)} | found
