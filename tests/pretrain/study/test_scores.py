"""Scores by document, against figures worked out here."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.evaluation.held_out import HeldOutScores
from pretrain.study.scores import by_document


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_scores_by_document():
    scores = HeldOutScores(
        document_E=torch.tensor([7, 3, 7, 7]),
        text_nll_E=doubles(1, 2, 3, 5),
        text_correct_E=doubles(1, 0, 0, 0),
        thought_nll_E=doubles(1, 1, 1, 4),
        thought_correct_E=doubles(1, 1, 1, 0),
        counterfactual_E={"own": doubles(1, 1, 1, 4), "filler": doubles(2, 4, 6, 1), "right": doubles(9, 9, 9, 9)},
    )
    found = by_document(scores)
    assert found["documents"] == [3, 7] and found["tokens"] == [1, 3] and found["right"] is None
    assert found["nll"] == {"none": [2.0, 3.0], "own": [1.0, 2.0], "filler": [4.0, 3.0]}
    assert found["correct"]["none"] == pytest.approx([0, 1 / 3]) and found["correct"]["own"] == pytest.approx(
        [1, 2 / 3]
    )

    # Known answers are all that is scored.
    known = by_document(HeldOutScores(**vars(scores) | {"right_E": doubles(math.nan, 0, 1, math.nan)}))
    assert known["documents"] == [3, 7] and known["tokens"] == [1, 1] and known["right"] == 0.5
    assert known["nll"] == {"none": [2.0, 3.0], "own": [1.0, 1.0], "filler": [4.0, 6.0], "right": [9.0, 9.0]}
    assert known["correct"] == {"none": [0.0, 0.0], "own": [1.0, 1.0]}

    # After how many of the sampled thoughts it is right, by token.
    counted = HeldOutScores(**vars(scores) | {"passes_E": torch.tensor([4, 0, 2, 1])})
    assert by_document(counted)["passes"] == [[0], [4, 2, 1]] and "passes" not in found

    # Of an objective that does not think.
    plain = by_document(HeldOutScores(scores.document_E, scores.text_nll_E, scores.text_correct_E))
    assert set(plain["nll"]) == set(plain["correct"]) == {"none"}
