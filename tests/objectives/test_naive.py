"""The plain loops of objectives/naive are the library: loss and every gradient, in fp64, sampling included.

Packed documents, thoughts of different lengths, several anchors of a row.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.philox import Rng
from models.thoughts import Text
from objectives import QuietStar, QuietStarConfig, Rlp, RlpConfig, Rpt, RptConfig, Step, Template, naive
from objectives.naive.explicit import Document
from objectives.naive.quiet_star import quiet_star_loss
from objectives.naive.rlp import rlp_loss, update_teacher
from objectives.naive.rpt import rpt_loss
from objectives.teacher import EmaTeacher
from tests.helpers import packed_text, relative_error, sampled, tiny_model

RNG = Rng(seed=3, step=1)
OPEN, CLOSE, BOX = (7, 8), (9, 10), ((11,), (12,))
# The first token of the closing tag is no text, but can be sampled.
BYTES = [None if token in (9, 60) else b"aa" if token == 6 else b"aab"[token % 3 :][:1] for token in range(61)]
# Few tokens can be sampled, so that thoughts end early, late and not at all.
ALLOWED = (2, 3, 6, 9, 10, 12)
BANNED = tuple(token for token in range(61) if token not in ALLOWED)


def model_of_few_words(seed: int = 0):
    model = tiny_model(seed=seed)
    model.ban(61, BANNED)
    return model


def packed(seed: int = 1) -> Text:
    return packed_text([[6, 5], [11], [2, 1, 7]], 11, seed=seed)


def documents(text: Text) -> list[Document]:
    def document(row: int, start: int, end: int) -> Document:
        def uniform(position: int, thought: int, token: int) -> float:
            place = (torch.tensor(x) for x in (int(text.sample_id_B[row]), start + position, thought, token))
            return RNG.uniform(*place).item()

        return Document(text.tokens_BN[row, start:end].tolist(), uniform, goes_on=end == text.shape[1])

    return [document(*span) for span in text.spans]


def gradients(model, losses) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, objective, naive_loss, micro_batches: list[Text]) -> None:
    loss, expected = gradients(model, [naive_loss])
    got_loss, got = gradients(model, (o.loss for o in Step(objective, model, micro_batches, RNG).losses()))
    assert got_loss == pytest.approx(loss, rel=1e-10, abs=1e-10)
    assert got.keys() == expected.keys()
    assert sum(g.norm() for g in expected.values()) > 1e-3
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-10, errors


def cut(text: Text, micro_batches: int) -> list[Text]:
    return [text] if micro_batches == 1 else [text.rows(slice(0, 1)), text.rows(slice(1, 3))]


@pytest.mark.parametrize(("anchors_at_once", "micro_batches"), [(None, 1), (1, 2)])
def test_rlp(anchors_at_once, micro_batches):
    model, teacher, text = model_of_few_words(), tiny_model(seed=4), packed()
    settings = dict(length=6, temperature=0.9)
    config = RlpConfig(thoughts=4, anchors_per_document=2, anchors_at_once=anchors_at_once, **settings)
    rlp = Rlp(config, Template(OPEN, CLOSE))
    rlp.teacher._model = teacher
    closed = sampled(rlp, model, text, RNG).rollout.closed_BKM
    assert 0 < closed.sum() < closed.numel()
    tags = dict(opening=OPEN, closing=CLOSE, banned=BANNED)
    loss = rlp_loss(model, teacher, documents(text), G=4, positions=2, **tags, **settings)
    assert_equal(model, rlp, loss, cut(text, micro_batches))


def test_rlps_teacher():
    teacher, student, plain = EmaTeacher(0.9), tiny_model(seed=1), tiny_model(seed=2)
    teacher._model = tiny_model(seed=2).requires_grad_(False)
    for _ in range(3):
        teacher.update(student)
        update_teacher(plain, student, 0.9)
    ours = dict(teacher.model(student).named_parameters())
    assert all(relative_error(ours[name], p) <= 1e-14 for name, p in plain.named_parameters())


@pytest.mark.parametrize(("anchors_at_once", "micro_batches"), [(None, 1), (3, 2)])
@pytest.mark.parametrize("K", [1, 2])
def test_quiet_star(K, anchors_at_once, micro_batches):
    model, text = model_of_few_words(), packed()
    quiet = QuietStar(
        QuietStarConfig(length=3, lookahead=3, thoughts=K, policy_weight=10.0, anchors_at_once=anchors_at_once)
    )
    loss = quiet_star_loss(model, documents(text), K=K, L=3, A=3, banned=BANNED, policy_weight=10.0)
    assert_equal(model, quiet, loss, cut(text, micro_batches))


@pytest.mark.parametrize(("anchors_at_once", "micro_batches"), [(None, 1), (2, 2)])
@pytest.mark.parametrize("drop", [False, True])
def test_rpt(drop, anchors_at_once, micro_batches):
    model, text = model_of_few_words(), packed(seed=10)
    settings = dict(length=5, answer_length=3, temperature=3.0, hard_entropy=2.0)
    config = RptConfig(
        thoughts=4,
        anchors_per_document=2,
        anchors_at_once=anchors_at_once,
        template="forced",
        drop_zero_variance_from=0 if drop else None,
        **settings,
    )
    rpt = Rpt(config, OPEN, CLOSE, BYTES, BOX)
    batch = sampled(rpt, model, text, RNG)
    assert 0 < batch.rollout.closed_BKM.sum() < batch.rollout.closed_BKM.numel()
    assert 0 < batch.reward_BKM.sum() < batch.reward_BKM.numel()
    assert (batch.undecided_BKM & (batch.reward_BKM > 0)).any()
    loss = rpt_loss(
        model,
        documents(text),
        BYTES,
        G=4,
        opening=OPEN,
        closing=CLOSE,
        box=BOX,
        banned=BANNED,
        positions=2,
        drop_zero_variance=drop,
        **settings,
    )
    assert_equal(model, rpt, loss, cut(text, micro_batches))


def test_each_is_one_short_loop():
    for path in Path(naive.__file__).parent.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, path
