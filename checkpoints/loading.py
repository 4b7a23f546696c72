"""Models whose weights are still elsewhere: built without memory, sharded if they are to be, and only then filled, each
rank's part straight from the files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.tensors import StoredTensor, fill_parameters
from models.decoder import Decoder, DecoderConfig
from models.thinking import ThinkingModel


def empty_model(
    config: DecoderConfig, compute_dtype: torch.dtype | None, delimiters: bool = False, mixing_head: bool = False
) -> ThinkingModel:
    """A model with its parameters on the meta device, in fp32."""
    with torch.device("meta"):
        model = ThinkingModel(Decoder(config, compute_dtype), delimiters, mixing_head)
    model.decoder.init_rotary()
    model.banned_V = torch.zeros(config.vocab_size, dtype=torch.bool)
    return model


@dataclass
class UnloadedModel:
    """A model on the meta device, and its weights by name: in files, or whole in memory."""

    model: ThinkingModel
    weights: Mapping[str, StoredTensor | Tensor]

    def load(self, device: torch.device = torch.device("cpu")) -> ThinkingModel:  # noqa: B008
        """The model with its weights, one tensor after the other; of a model that was sharded, its own shards. Once.

        Raises CheckpointError for files that cannot be read.
        """
        self.model.allocate(device)
        fill_parameters(self.model, self.weights)
        self.weights = {}  # else weights that were in memory are there twice for as long as anybody holds this
        return self.model

    def fingerprint(self) -> str:
        """sha256 of all weights, their names, dtypes and shapes, read one after the other."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            stored = self.weights[name]
            weight = (stored if isinstance(stored, Tensor) else stored.whole()).detach().cpu().contiguous()
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
            digest.update(weight.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def row(self, name: str, index: int) -> Tensor:
        """A row of a matrix, in fp32."""
        source, width = self.weights[name], self.weights[name].shape[1]
        if isinstance(source, Tensor):
            return source[index].detach().float()
        part = torch.empty(1, width)
        source.read_into(part, (index, 0))
        return part[0]
