"""Models that get their weights late."""

from __future__ import annotations

import gc
import weakref

import torch

from checkpoints.loading import UnloadedModel, empty_model
from models.decoder import Decoder
from tests.helpers import tiny_config


def test_weights_in_memory_are_not_kept_beside_the_model():
    config = tiny_config(tie_embeddings=True)
    source = Decoder(config)
    truth = source.embed_tokens.weight.detach().clone()
    unloaded = UnloadedModel(empty_model(config, None), {f"decoder.{n}": p for n, p in source.named_parameters()})
    there = weakref.ref(source.embed_tokens.weight)
    model = unloaded.load()
    del source
    gc.collect()
    assert there() is None
    assert torch.equal(model.head_weight_VW, truth)
