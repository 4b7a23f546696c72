"""Counts of parameters that changed, against values worked by hand."""

from __future__ import annotations

import pytest
import torch

from checkpoints.loading import UnloadedModel
from pretrain.study.changed import changed, shares
from tests.helpers import tiny_model


def test_a_parameter_has_changed_if_its_bf16_value_has():
    """bf16 has eight bits of a number: between 1 and 2 its values are 2⁻⁷ apart."""
    model, ones = tiny_model(), torch.ones(4)
    q, k = (f"decoder.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    embeddings = "decoder.embed_tokens.weight"
    before = {q: ones, k: ones, embeddings: ones.expand(2, 4)}
    after = {
        q: ones + torch.tensor([0.0, 2**-9, 2**-7, -(2**-7)]),  # less than half a step is rounded off
        k: ones + 1e-4,
        embeddings: torch.tensor([[1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]]),
        "mixing_head.first.weight": ones,
    }
    found = changed(UnloadedModel(model, before), UnloadedModel(model, after))
    assert found == {q: (2, 4), k: (0, 4), embeddings: (1, 8)}
    assert shares(found) == {
        "all": {"all": pytest.approx(3 / 16)},
        "layer": {"0": 0.5, "1": 0.0, "outside": 0.125},
        "kind": {"self_attn.q_proj": 0.25, "embed_tokens": 0.125},
    }
