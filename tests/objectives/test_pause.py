"""Pause tokens against explicit sequences in fp64.

Shapes as in objectives/pause.py.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from checkpoints.references import LAB
from data_pipelines import Tokenizer
from models import Rng, Text
from objectives import Pause, PauseConfig, SettingError, Step, Template
from tests.helpers import packed_text, relative_error, tiny_model

RNG, OPEN, CLOSE, FILLER = Rng(seed=3, step=1), (7, 8), (9,), 5
SMALL = PauseConfig(length=3, anchors_per_document=2, next_token_weight=0.5)


def objective(config: PauseConfig = SMALL) -> Pause:
    return Pause(config, Template(OPEN, CLOSE), FILLER)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("anchors_at_once", [None, 1])
def test_what_follows_a_pause_is_learned_and_the_pause_is_not(anchors_at_once):
    """Loss, every gradient and the evaluation, by whole sequences [text, <think>, filler, </think>]."""
    model, text = tiny_model(), packed_text([[6, 5], [11], [2, 1, 8]], 11)
    pause = objective(dataclasses.replace(SMALL, anchors_at_once=anchors_at_once))
    model.zero_grad()
    outputs = []
    for output in Step(pause, model, [text], RNG).losses():
        output.loss.backward()
        outputs.append(output)
    found = gradients(model)
    scores = pause.evaluate(model, text, RNG)

    index_BM = outputs[-1].record.thoughts.anchors.index_BM
    after = []
    for b, n in ((b, n) for b, row in enumerate(index_BM.tolist()) for n in row if n >= 0):
        before = text.tokens_BN[b, int(text.document_start_BN[b, n]) : n + 1].tolist()
        hidden_W = model.read(Text.from_rows(torch.tensor([[*before, *OPEN, *[FILLER] * 3, *CLOSE]]))).hidden_BNW[0, -1]
        after.append(-(hidden_W @ model.head_weight_VW.T).log_softmax(-1)[text.tokens_BN[b, n + 1]])
        assert relative_error(scores.thought_nll_BN[b, n], after[-1]) <= 1e-12
    target_BN, valid_BN = text.targets(1)
    logits_BNV = model.read(text).hidden_BNW @ model.head_weight_VW.T
    plain = torch.nn.functional.cross_entropy(logits_BNV[valid_BN], target_BN[valid_BN])
    expected = sum(after) / len(after) + 0.5 * plain
    assert len(after) == 9 and sum(o.loss.item() for o in outputs) == pytest.approx(expected.item(), rel=1e-12)
    model.zero_grad()
    expected.backward()
    truth = gradients(model)
    zero = torch.zeros(())  # of delimiters, which no pause has
    assert truth.keys() <= found.keys()
    assert max(relative_error(g, truth.get(name, zero.expand_as(g))) for name, g in found.items()) <= 1e-10


def test_the_filler_is_one_token():
    tokenizer = Tokenizer.from_directory(LAB)
    assert Pause.build(PauseConfig(filler=" "), tokenizer).filler_id == tokenizer.token_id(" ")
    for filler, message in (
        (".", "filler '.' cannot be encoded by the tokenizer; choose another text"),
        ("<<", "filler '<<' must be one token, the tokenizer makes 2 of it"),
    ):
        with pytest.raises(SettingError, match=re.escape(message)):
            Pause.build(PauseConfig(filler=filler), tokenizer)
