"""Sampling thoughts from a sharded model without a collective call for each token, so that no rank waits for another's
thoughts to end.

A token takes every block, and a sharded model gathers a block for each use. So all ranks gather the model once and
sample by themselves: from a plain copy of it, which lives beside the shards and serves every engine, or, where there is
no memory for that, from its blocks, which stay gathered while thoughts are sampled and no longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from checkpoints.hugging_face import language_model_tensors
from checkpoints.loading import empty_model
from models.decoder import RMSNorm
from models.precision import optimizer_steps
from models.rollout import EAGER, Engine, Rollout, RolloutRequest
from models.thinking import ThinkingModel
from pretrain.sharding import full, sharded_modules


class FromReplica:
    """An engine that lets another one sample from a `Replica` of a sharded model; other models it takes as they are."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._replica: Replica | None = None

    @property
    def reproducible(self) -> bool:
        return self.engine.reproducible

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def lag(self) -> int:
        return self.engine.lag

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        return self.engine.supports(request)

    def sample(self, request: RolloutRequest) -> Rollout:
        return self.engine.sample(replace(request, model=self.whole(request.model)))

    def whole(self, model: ThinkingModel) -> ThinkingModel:
        """The same without shards, for passes without gradient; all ranks must call it after an optimizer step."""
        if not isinstance(model, FSDPModule):
            return model
        if self._replica is None:
            self._replica = Replica(model)
        return self._replica.updated()


class Gathered:
    """An engine that samples layer by layer from a sharded model whose blocks stay gathered meanwhile; all ranks must
    call it."""

    reproducible, name, lag = EAGER.reproducible, EAGER.name, EAGER.lag

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        return EAGER.supports(request)

    def sample(self, request: RolloutRequest) -> Rollout:
        with _blocks_stay_gathered(request.model):
            return EAGER.sample(request)


def language_model_weights(model: ThinkingModel) -> Iterator[tuple[str, Tensor]]:
    """The language model's tensors by their names in transformers, in the order of the layers, and at last the head,
    also where it is tied; all ranks of a sharded model must take them, each of which is gathered as it is taken."""
    tensors = language_model_tensors(model.decoder)
    for name, tensor in tensors.items():
        yield name, full(tensor.detach())
    if "lm_head.weight" not in tensors:
        yield "lm_head.weight", full(model.head_weight_VW.detach())


@contextmanager
def _blocks_stay_gathered(model: ThinkingModel) -> Iterator[None]:
    # What is outside the blocks stays gathered anyway.
    modules = sharded_modules(model.decoder.layers)
    for module in modules:
        module.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True)
            module.reshard()


class Replica:
    """A plain copy of a sharded model, of what its passes compute with: blocks' matrices in the compute dtype,
    embedding and head, norms, mixing head and delimiters as the masters that they are."""

    def __init__(self, model: ThinkingModel):
        self._sharded, self._filled_at = model, -1
        decoder, device = model.decoder, model.head_weight_VW.device
        parts = model.delimiters is not None, model.mixing_head is not None
        plain = empty_model(decoder.config, decoder.compute_dtype, *parts)
        dtypes, shapes = computing_dtypes(model), {name: p.shape for name, p in model.named_parameters()}
        empty = {name: torch.empty(shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}
        plain.load_state_dict(empty, assign=True)
        plain.banned_V = model.banned_V
        plain.decoder.attention_backend = decoder.attention_backend
        self._plain = plain.requires_grad_(False).to(device)

    @torch.no_grad()
    def updated(self) -> ThinkingModel:
        """The copy, as the model is now; gathers one tensor at a time if an optimizer step came in between."""
        if self._filled_at != optimizer_steps():
            for shard, whole in zip(self._sharded.parameters(), self._plain.parameters(), strict=True):
                whole.copy_(full(shard.to(whole.dtype)))
            self._filled_at = optimizer_steps()
        return self._plain


def computing_dtypes(model: ThinkingModel) -> dict[str, torch.dtype]:
    """In which dtype passes use each parameter."""
    norms = {id(p) for module in model.modules() if isinstance(module, RMSNorm) for p in module.parameters()}
    low = model.decoder.compute_dtype

    def of(name: str, parameter: Tensor) -> torch.dtype:
        in_block = name.startswith("decoder.layers.") and id(parameter) not in norms
        return low if low is not None and in_block else parameter.dtype

    return {name: of(name, parameter) for name, parameter in model.named_parameters()}


def replica_bytes(model: ThinkingModel) -> int:
    """What a `Replica` of a model takes, which may be sharded, or on the meta device."""
    dtypes = computing_dtypes(model)
    return sum(parameter.numel() * dtypes[name].itemsize for name, parameter in model.named_parameters())
