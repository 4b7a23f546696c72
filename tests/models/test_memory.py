"""Planned bytes against those that are alive."""

from __future__ import annotations

import pytest
import torch

from models.memory import kept, keys_and_values
from models.thoughts import Anchors, Thoughts
from tests.helpers import LiveBytes, packed_text, tiny_model

FAMILIES = [{}, {"qk_norm": True}, {"post_norm": True, "qk_norm_all_heads": True}, {"qkv_bias": True}]


@pytest.mark.parametrize("changes", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_pass_keeps(changes, dtype, checkpointing):
    """Of a text to the byte; of thoughts all but masks. The four thoughts of an anchor share its rotations."""
    model = tiny_model(torch.float32, **changes)
    model.decoder.compute_dtype = dtype
    model.decoder.activation_checkpointing = checkpointing
    config, alive = model.decoder.config, []
    model.read(packed_text([[4]], 4))  # makes the working copies of the weights
    for N in (32, 96):
        text = packed_text([[N // 2, N // 2]], N)
        with LiveBytes() as live:
            state = model.read(text)
        alive.append(live.now)
    assert alive[1] - alive[0] == 64 * kept(config, dtype, checkpointing)
    anchors, alive = Anchors(text, torch.tensor([[20, 70, 90]])), []
    for S in (8, 24):
        thoughts = Thoughts(torch.randint(3, 50, (1, 4, S, 3)), anchors)
        with LiveBytes() as live:
            hidden = model.think(thoughts, state)
        alive.append(live.now)
        del hidden
    planned = kept(config, dtype, checkpointing) - 2 * config.head_dim * dtype.itemsize * 3 / 4
    # Keys and values of thoughts are nobody else's: with checkpointing they are made again.
    planned -= keys_and_values(config, dtype) if checkpointing else 0
    assert alive[1] - alive[0] == pytest.approx(4 * 16 * 3 * planned, rel=0.01)
