"""Held-out scores: the same whatever rows are scored at once, and means over what is known.

Shapes as in pretrain/evaluation/held_out.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.philox import Rng
from models.rollout import EAGER
from models.thoughts import PAD, Text
from objectives import CounterfactualTest, QuietStar, QuietStarConfig, Rlp, RlpConfig, Template
from pretrain.evaluation.held_out import HeldOut, HeldOutScores, interval, score_held_out, summarise
from tests.helpers import document_numbers, packed_text, tiny_model

RNG = Rng(4, 2)


def rlp(**changes) -> Rlp:
    return Rlp(RlpConfig(length=5, thoughts=4, **changes), Template((7, 8), (9,)))


def held_out(text: Text, document_BN: torch.Tensor | None = None) -> HeldOut:
    return HeldOut(text, document_numbers(text) if document_BN is None else document_BN)


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_passes_are_counted_over_the_sampled_thoughts(rows_at_once):
    """Each thought written into its text behind the anchor, and the prediction behind it."""
    n, objective = 8, rlp(anchors_per_document=3, temperature=1.5)
    model, source = tiny_model(vocab_size=10), packed_text([[5, 6], [11], [7, 4]], 11, vocab_size=10)
    state = model.read(source)
    anchors = objective.choice.choose_without_model(source, RNG)
    rollout = EAGER.sample(objective.request(model, state, anchors, n, RNG))
    expected = []
    for b, m in (anchors.index_BM >= 0).nonzero().tolist():
        at = int(anchors.index_BM[b, m])
        begin = at - int(source.position_BN[b, at])
        read = source.tokens_BN[b, begin : at + 1].tolist()
        right = 0
        for body_L in objective.bodies(rollout)[b, :, :, m].tolist():
            row = torch.tensor([[*read, 7, 8, *(token for token in body_L if token != PAD), 9]])
            hidden_W = model.read(Text.from_rows(row)).hidden_BNW[0, -1]
            right += int((model.head_weight_VW @ hidden_W).argmax() == source.tokens_BN[b, at + 1])
        expected.append(right)
    scores = score_held_out(objective, model, held_out(source), RNG, rows_at_once, sampled=n)
    assert scores.passes_E.tolist() == expected and {0, n} != {*expected} != {0}
    own = score_held_out(objective, model, held_out(source), RNG, rows_at_once, sampled=1)
    assert own.passes_E.tolist() == own.thought_correct_E.tolist()
    assert own.counterfactual_E == {} and score_held_out(objective, model, held_out(source), RNG, 3).passes_E is None


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 9])
@pytest.mark.parametrize("objective", ["rlp", "quiet_star"])
def test_the_counterfactual_test_is_the_same_however_rows_and_anchors_are_cut(objective, rows_at_once):
    """Row 0's end, row 2 and row 3 are one document, whose anchors must get thoughts of the others."""
    model, source = tiny_model(), packed_text([[5, 6], [1, 8], [11], [11], [7, 4]], 11)
    documents = document_numbers(source)
    documents[0, 5:] = documents[2] = documents[3] = 50
    whole, cut = (
        rlp(anchors_per_document=2, anchors_at_once=at_once)
        if objective == "rlp"
        else QuietStar(QuietStarConfig(length=3, lookahead=2, anchors_at_once=at_once))
        for at_once in (None, 2)
    )
    test, given = CounterfactualTest(6, {(8, 3): (1, 2)}), []
    conditions = CounterfactualTest.conditions

    def watched(self, own, document_BN, rng):
        found = conditions(self, own, document_BN, rng)
        given.append([x for bodies, other in zip(own, found["other"], strict=True) for x in said(bodies, other)])
        given.append([x for bodies in own for x in said(bodies, bodies.tokens_BLM)])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CounterfactualTest, "conditions", watched)
        truth = score_held_out(whole, model, held_out(source, documents), RNG, 5, test)
        scores = score_held_out(cut, model, held_out(source, documents), RNG, rows_at_once, test)
    assert set(scores.counterfactual_E) == {"own", "other", "shuffled", "filler", "right"}
    assert given[0] == given[2] and given[1] == given[3]  # other thoughts and own ones, to the token
    for other, document in zip(given[0], truth.document_E.tolist(), strict=True):
        from_documents = {d for d, own in zip(truth.document_E.tolist(), given[1], strict=True) if own == other}
        assert from_documents - {document}
    assert torch.equal(scores.document_E, truth.document_E) and (scores.document_E == 50).sum() > 2
    for condition, nll_E in scores.counterfactual_E.items():
        assert torch.allclose(nll_E, truth.counterfactual_E[condition], rtol=1e-11), condition


def said(bodies, tokens_BLM) -> list[tuple[int, ...]]:
    rows = tokens_BLM.transpose(1, 2)[bodies.real_BM].tolist()
    return [tuple(token for token in row if token >= 0) for row in rows]


def test_no_thought_is_another_texts_where_there_is_one_text():
    model, source = tiny_model(), packed_text([[11], [11]], 11)
    one = held_out(source, torch.zeros(2, 11, dtype=torch.int64))
    scores = score_held_out(rlp(anchors_per_document=2), model, one, RNG, 1, CounterfactualTest(6))
    assert set(scores.counterfactual_E) == {"own", "shuffled", "filler"}


@pytest.mark.parametrize("objective", ["rlp", "quiet_star"])
def test_evaluation_is_cut_as_training_is(objective):
    """No pass holds the thoughts of more rows or anchors than asked for."""
    model, source, seen = tiny_model(), packed_text([[11]] * 4, 11), []
    config = QuietStarConfig(length=3, lookahead=2, anchors_at_once=3)
    evaluator = QuietStar(config) if objective == "quiet_star" else rlp(anchors_per_document=6, anchors_at_once=3)
    for name in ("think", "continue_thoughts"):
        forward = getattr(model, name)

        def watched(first, *more, forward=forward):
            tokens_BKSM = first if isinstance(first, torch.Tensor) else first.tokens_BKSM
            seen.append((tokens_BKSM.shape[0], tokens_BKSM.shape[3]))
            return forward(first, *more)

        setattr(model, name, watched)
    score_held_out(evaluator, model, held_out(source), RNG, 2, CounterfactualTest(6))
    assert max(rows for rows, _ in seen) == 2 and max(anchors for _, anchors in seen) == 3


def test_intervals_are_over_true_documents():
    """Six fragments of two documents: resampled by hand, the mean is a, b or their mean weighted by tokens."""
    values_E = torch.tensor([1.0, 1, 1, 1, 4, 4], dtype=torch.float64)
    found = interval(values_E, torch.tensor([3, 3, 3, 3, 8, 8]))
    assert (found["nll"], found["low"], found["high"], found["documents"]) == (2.0, 1.0, 4.0, 2)
    fragments = interval(values_E, torch.arange(6))
    assert fragments["high"] - fragments["low"] < 3.0


def test_content_gains_nothing_in_any_bin_of_random_text():
    """Random weights on random text: the raw gain by decile is far from 0, and what thoughts say gains nothing."""
    model = tiny_model()
    source = packed_text([[15, 15]] * 40, 30)
    scores = score_held_out(rlp(anchors_per_document=10), model, held_out(source), RNG, 40, CounterfactualTest(6))
    summary = summarise(scores, scores.text_nll_E)
    raw = [a - b for a, b in zip(summary["nll_text_deciles"], summary["nll_thought_deciles"], strict=True)]
    assert raw[0] < -0.5 and raw[-1] > 0.5
    for condition in ("shuffled", "filler", "other"):
        bins = summary["counterfactual_minus_own_deciles"][condition]
        assert len(bins) == 10 and all(b["documents"] >= 20 for b in bins)
        # Of ten intervals at 95% one may miss.
        assert sum(b["low"] <= 0 <= b["high"] for b in bins) >= 9, (condition, bins)
        assert max(abs(b["nll"]) for b in bins) < 0.5 * max(map(abs, raw))
        mean = sum(b["nll"] for b in bins) / 10
        assert mean == pytest.approx(summary["counterfactual_minus_own"][condition]["nll"])


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
    scores = score_held_out(rlp(), model, held_out(source), RNG, 2, CounterfactualTest(6, solutions))
    assert scores.right_E[:2].tolist() == [1, 0]
    assert scores.right_E[2].isnan()
    assert summarise(scores, scores.text_nll_E)["thought_right"] == 0.5
    nowhere = score_held_out(rlp(), model, held_out(source), RNG, 2, CounterfactualTest(6, {(99, 0): (3,)}))
    assert "thought_right" not in summarise(nowhere, nowhere.text_nll_E)
