"""What sets the memory of a step: activation checkpointing, and anchors in parts. Neither changes the update.

Shapes as in the objectives.
"""

from __future__ import annotations

import pytest
import torch

from models.decoder import Block
from models.philox import Rng
from models.thoughts import Text
from objectives.base import Objective
from objectives.next_token import NextToken
from objectives.quiet_star import QuietStar, QuietStarConfig
from objectives.rlp import Rlp, RlpConfig
from objectives.rpt import Rpt, RptConfig
from tests.helpers import packed_text, relative_error, tiny_model

RNG = Rng(seed=3, step=1)
OPEN, CLOSE = (7, 8), (9,)
QUIET = QuietStarConfig(length=3, lookahead=3, thoughts=2, policy_weight=10.0)
RLP = RlpConfig(length=5, thoughts=4, anchors_per_document=3)
RPT = RptConfig(
    length=4,
    thoughts=4,
    temperature=3.0,
    anchors_per_document=3,
    positions="random",
    template="forced",
    answer_length=3,
    box_open="[",
)
BYTES = [b"ab" if token == 6 else b"ab"[token % 2 :][:1] for token in range(60)] + [None]


def make(config) -> Objective:
    if isinstance(config, RlpConfig):
        return Rlp(config, OPEN, CLOSE)
    if isinstance(config, RptConfig):
        return Rpt(config, OPEN, CLOSE, BYTES, ((11,), (12,)))
    return QuietStar(config) if isinstance(config, QuietStarConfig) else NextToken()


def thinker(dtype: torch.dtype = torch.float64):
    """A model of few words, whose thoughts end early, late and not at all, and whose predictions are often right."""
    model = tiny_model(dtype)
    model.ban(14, (0, 1, 4, 5, 9))
    return model


def text() -> Text:
    return packed_text([[6, 5], [11], [2, 1, 6]], 11)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [None, QUIET, RLP, RPT], ids=["next_token", "quiet_star", "rlp", "rpt"])
def test_activation_checkpointing_changes_memory_alone(config, monkeypatch):
    passes = []
    original = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: passes.append(torch.is_grad_enabled()) or original(self, *a))
    model, results = thinker(), []
    for checkpointing in (False, True):
        model.decoder.activation_checkpointing = checkpointing
        model.zero_grad(set_to_none=True)
        passes.clear()
        output = make(config)(model, text(), RNG)
        forward = passes.count(True)
        output.loss.backward()
        assert passes.count(True) == (2 if checkpointing else 1) * forward
        results.append((output, gradients(model)))
    (plain, truth), (output, got) = results
    assert torch.equal(output.loss, plain.loss)
    assert got.keys() == truth.keys()
    assert max(relative_error(got[n], truth[n]) for n in truth) <= 1e-13
    assert output.flops > plain.flops
