"""The conditions of the counterfactual test by hand, and that each is scored as the explicit sequence it stands for.

Shapes as in objectives/counterfactuals.py.
"""

from __future__ import annotations

import dataclasses

import torch

from models.philox import Rng
from models.thoughts import END, PAD, START, Anchors, Thoughts
from objectives import Bodies, CounterfactualTest, QuietStar, QuietStarConfig, Rlp, RlpConfig, Template
from tests.helpers import document_numbers, explicit_hidden, packed_text, relative_error, tiny_model

RNG = Rng(4, 2)


def columns(body_BLM: torch.Tensor, b: int, m: int) -> list[int]:
    return [t for t in body_BLM[b, :, m].tolist() if t != PAD]


def test_conditions_by_hand():
    """Two rows of which the first's end and the second are one document."""
    source = packed_text([[3, 3], [6]], 6)
    document_BN = torch.tensor([[4, 4, 4, 9, 9, 9], [9] * 6])
    anchors = Anchors(source, torch.tensor([[1, 3], [2, -1]]))
    body = torch.tensor([[[21, 31], [22, PAD], [23, PAD]], [[41, 99], [42, 99], [PAD, 99]]])
    test = CounterfactualTest(5, {(7, 1): (1, 2), (8, 2): (3,)})
    own = Bodies(body, anchors, anchors.index_BM >= 0)

    def conditions(test: CounterfactualTest = test, own: Bodies = own, rng: Rng = RNG, document_BN=document_BN):
        return {name: body for name, (body,) in test.conditions([own], [document_BN], rng).items()}

    found = conditions()
    assert set(found) == {"other", "shuffled", "filler", "right"}
    # The first is given one of the other two, these are given the first: they are of one document.
    assert [columns(found["other"], *at) for at in ((0, 0), (0, 1), (1, 0))] == [[31], [21, 22, 23], [21, 22, 23]]
    assert [columns(found["filler"], *at) for at in ((0, 0), (0, 1), (1, 0))] == [[5, 5, 5], [5], [5, 5]]
    assert [columns(found["right"], *at) for at in ((0, 0), (0, 1), (1, 0))] == [[1, 2], [], [3]]
    assert test.known(anchors).tolist() == [[True, False], [True, False]]
    assert sorted(columns(found["shuffled"], 0, 0)) == [21, 22, 23]
    assert columns(found["shuffled"], 0, 1) == [31]

    def order(rng: Rng) -> tuple[int, ...]:
        return tuple(columns(conditions(rng=rng)["shuffled"], 0, 0))

    assert order(RNG) == tuple(columns(found["shuffled"], 0, 0))
    assert len({order(Rng(0, step)) for step in range(60)}) == 6
    assert "other" not in conditions(document_BN=torch.full((2, 6), 9))
    assert "right" not in conditions(CounterfactualTest(5))


def test_rlps_conditions_are_scored_as_explicit_sequences():
    model, source = tiny_model(), packed_text([[6, 5], [11], [2, 1, 8]], 11)
    model.ban(14, (0, 1, 9))
    rlp = Rlp(RlpConfig(length=5, thoughts=4, anchors_per_document=2), Template((7, 8), (9,)))
    index = rlp.evaluate(model, source, RNG).thoughts.anchors.index_BM
    places = [(b, m, int(index[b, m])) for b, m in (index >= 0).nonzero().tolist()]
    # Of the first anchor the right thought is what the model says anyway; of the others it is not.
    plain = rlp.evaluate(model, source, RNG)
    own = {(b, m): [t for t in plain.thoughts.tokens_BKSM[b, 0, :, m].tolist() if t != PAD][2:-1] for b, m, _ in places}
    solutions = {(7 + b, n): tuple(own[b, m]) if i == 0 else (3, 4, 5) for i, (b, m, n) in enumerate(places)}
    test = CounterfactualTest(6, solutions)
    conditions = test.conditions([plain.bodies], [document_numbers(source)], RNG)
    assert set(conditions) == {"other", "shuffled", "filler", "right"}
    target_BN, _ = source.targets(1)
    width = max(map(len, own.values()))
    body = torch.full((3, width, index.shape[1]), PAD)
    for (b, m), tokens in own.items():
        body[b, : len(tokens), m] = torch.tensor(tokens)
    assert torch.equal(plain.bodies.tokens_BLM[:, :width], body)
    for condition, (body_BLM,) in {"own": [plain.bodies.tokens_BLM], **conditions}.items():
        nll_BM = rlp.nll_after(model, model.read(source), dataclasses.replace(plain.bodies, tokens_BLM=body_BLM))
        for b, m, n in places:
            tokens = [7, 8, *columns(body_BLM, b, m), 9]
            whole = torch.zeros(3, 1, len(tokens), index.shape[1], dtype=torch.int64)
            whole[b, 0, :, m] = torch.tensor(tokens)
            hidden = explicit_hidden(model, source, Thoughts(whole, plain.thoughts.anchors), b, 0, m)[-1]
            logits = (hidden @ model.head_weight_VW.T).log_softmax(-1)
            truth = -logits[target_BN[b, n]]
            assert relative_error(nll_BM[b, m], truth) <= 1e-12, condition
            if condition == "own":
                assert relative_error(plain.thought_nll_BN[b, n], truth) <= 1e-12
                assert bool(plain.thought_correct_BN[b, n]) == (logits.argmax() == target_BN[b, n]).item()
    for i, (b, m, _) in enumerate(places):
        assert bool(test.is_right(plain.bodies)[b, m]) == (i == 0)
    logits = model.read(source).hidden_BNW @ model.head_weight_VW.T
    assert torch.equal(plain.text_correct_BN, (logits.argmax(-1) == target_BN) & plain.valid_BN)


def test_quiet_stars_conditions_swap_whole_thoughts():
    """After another position's thought: the same as a model forced to think it there. A right one has any length."""
    model, source = tiny_model(), packed_text([[6, 5], [11]], 11)
    quiet = QuietStar(QuietStarConfig(length=3, lookahead=2))
    plain = quiet.evaluate(model, source, RNG)
    own = tuple(plain.thoughts.tokens_BKSM[1, 0, 1:4, 4].tolist())
    test = CounterfactualTest(6, {(7, 2): (3, 4, 5, 9, 9), (7, 7): (), (8, 4): own})
    right_BN = test.is_right(plain.bodies)
    known = {(b, n): right_BN[b, n].item() for b, n in (~right_BN.isnan()).nonzero().tolist()}
    assert known == {(0, 2): 0.0, (0, 7): 0.0, (1, 4): 1.0}
    thoughts, state = plain.thoughts, model.read(source)
    target_BN, valid_BN = source.targets(1)
    bodies = test.conditions([plain.bodies], [document_numbers(source)], RNG)
    assert set(bodies) == {"other", "shuffled", "filler", "right"}
    text_BNW = state.hidden_BNW
    for condition, (body_BLN,) in {"own": [plain.bodies.tokens_BLM], **bodies}.items():
        nll_BN = quiet.nll_after(model, state, dataclasses.replace(plain.bodies, tokens_BLM=body_BLN))
        for b, n in valid_BN.nonzero().tolist():
            written = torch.tensor([START, *columns(body_BLN, b, n), END])
            tokens = torch.zeros(2, 1, len(written), 11, dtype=torch.int64)
            tokens[b, 0, :, n] = written
            hidden = explicit_hidden(model, source, Thoughts(tokens, thoughts.anchors), b, 0, n)[-1]
            w = model.mixing_head(text_BNW[b, n], hidden)
            mixed = (1 - w) * text_BNW[b, n] + w * hidden
            truth = -(mixed @ model.head_weight_VW.T).log_softmax(-1)[target_BN[b, n]]
            assert relative_error(nll_BN[b, n], truth) <= 1e-11, condition
            if condition == "own":
                assert relative_error(plain.thought_nll_BN[b, n], truth) <= 1e-11
