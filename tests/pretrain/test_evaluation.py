"""Held-out scores: the same whatever rows are scored at once, and means over what is known.

Shapes as in pretrain/evaluation.py.
"""

from __future__ import annotations

import pytest
import torch

from models.philox import Rng
from objectives.causal import CausalTest
from objectives.rlp import Rlp, RlpConfig
from pretrain.evaluation import parts_to_score, score_held_out
from tests.helpers import packed_text, tiny_model

RNG = Rng(4, 2)


def rlp() -> Rlp:
    return Rlp(RlpConfig(length=5, thoughts=4), (7, 8), (9,))


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 9])
def test_the_causal_test_is_whole_however_rows_are_cut(rows_at_once):
    """One anchor a row: a row scored by itself has no other thought to try."""
    model, source = tiny_model(), packed_text([[6], [1], [11]], 11)
    truth = score_held_out(rlp(), model, source, RNG, 3, CausalTest(6))
    scores = score_held_out(rlp(), model, source, RNG, rows_at_once, CausalTest(6))
    assert set(scores.causal_E) == {"own", "other", "shuffled", "filler"}
    assert torch.equal(scores.document_E, truth.document_E)
    for condition, nll_E in scores.causal_E.items():
        # Two anchors in all: there is but one other.
        assert torch.allclose(nll_E, truth.causal_E[condition], rtol=1e-12), condition


def test_parts_hold_two_thoughts_each():
    source = packed_text([[6], [1], [11], [5], [5, 5], [4]], 11)
    assert parts_to_score(rlp(), source, 1) == [slice(0, 3), slice(3, 6)]
    assert parts_to_score(rlp(), source, 4) == [slice(0, 4), slice(4, 8)]
    assert parts_to_score(rlp(), packed_text([[6], [1]], 6), 1) == [slice(0, 2)]
