"""Held-out scores: the same whatever rows are scored at once, and means over what is known.

Shapes as in pretrain/evaluation.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.philox import Rng
from objectives import CounterfactualTest, Rlp, RlpConfig, Template
from pretrain.evaluation import HeldOutScores, parts_to_score, score_held_out, summarise
from tests.helpers import packed_text, tiny_model

RNG = Rng(4, 2)


def rlp() -> Rlp:
    return Rlp(RlpConfig(length=5, thoughts=4), Template((7, 8), (9,)))


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 9])
def test_the_counterfactual_test_is_whole_however_rows_are_cut(rows_at_once):
    """One anchor a row: a row scored by itself has no other thought to try."""
    model, source = tiny_model(), packed_text([[6], [1], [11]], 11)
    truth = score_held_out(rlp(), model, source, RNG, 3, CounterfactualTest(6))
    scores = score_held_out(rlp(), model, source, RNG, rows_at_once, CounterfactualTest(6))
    assert set(scores.counterfactual_E) == {"own", "other", "shuffled", "filler"}
    assert torch.equal(scores.document_E, truth.document_E)
    for condition, nll_E in scores.counterfactual_E.items():
        # Two anchors in all: there is but one other.
        assert torch.allclose(nll_E, truth.counterfactual_E[condition], rtol=1e-12), condition


def test_parts_hold_two_thoughts_each():
    source = packed_text([[6], [1], [11], [5], [5, 5], [4]], 11)
    assert parts_to_score(rlp(), source, 1) == [slice(0, 3), slice(3, 6)]
    assert parts_to_score(rlp(), source, 4) == [slice(0, 4), slice(4, 8)]
    assert parts_to_score(rlp(), packed_text([[6], [1]], 6), 1) == [slice(0, 2)]


def test_means_of_right_thoughts_are_over_the_known_ones():
    nll_E = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    own_E, document_E = nll_E / 2, torch.tensor([0, 0, 5, 9])
    counterfactual_E = {"own": own_E, "filler": nll_E, "right": nll_E - 1}
    right_E = torch.tensor([1.0, torch.nan, 0.0, torch.nan], dtype=torch.float64)
    scores = HeldOutScores(document_E, nll_E, nll_E, own_E, own_E, counterfactual_E, right_E)
    summary = summarise(scores, nll_E)
    assert summary["thought_right"] == 0.5
    assert summary["counterfactual"]["right"]["nll"] == 1.5  # of 0 and 3
    assert summary["counterfactual_minus_own"]["right"]["nll"] == 0.25  # of -0.5 and 1
    assert summary["counterfactual"]["filler"]["nll"] == 3.75
    assert (summary["counterfactual"]["right"]["low"], summary["counterfactual"]["right"]["high"]) == (0, 3)
    unknown = summarise(replace(scores, right_E=torch.full_like(right_E, torch.nan)), nll_E)
    assert "thought_right" not in unknown
    assert "right" not in unknown["counterfactual"].keys() | unknown["counterfactual_minus_own"].keys()
    assert unknown["counterfactual"]["filler"] == summary["counterfactual"]["filler"]


def test_an_empty_thought_is_not_right_where_no_right_one_is_known():
    """Thoughts that close at once: as right as a known empty one, as wrong as a known other one, else unknown."""
    model, source = tiny_model(), packed_text([[6], [5], [11]], 11)
    model.ban(0, ())  # nothing but the closing tag can be drawn
    index_BM = rlp().evaluate(model, source, RNG).thoughts.anchors.index_BM
    solutions = {(7, int(index_BM[0, 0])): (), (8, int(index_BM[1, 0])): (3, 4)}
    scores = score_held_out(rlp(), model, source, RNG, 2, CounterfactualTest(6, solutions))
    assert scores.right_E[:2].tolist() == [1, 0]
    assert scores.right_E[2].isnan()
    assert summarise(scores, scores.text_nll_E)["thought_right"] == 0.5
    nowhere = score_held_out(rlp(), model, source, RNG, 2, CounterfactualTest(6, {(99, 0): (3,)}))
    assert "thought_right" not in summarise(nowhere, nowhere.text_nll_E)
