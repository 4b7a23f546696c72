"""Tiny models and packed texts for tests, and the one way numbers are compared."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.decoder import Decoder, DecoderConfig, TextState
from models.flops import Ledger
from models.philox import Rng
from models.rollout import EAGER, Engine, Rollout, RolloutRequest
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Text, Thoughts
from objectives.base import Batch, Counts, Objective, ThoughtRecord
from objectives.driver import Sampled, Step, at_once
from objectives.metrics import Means


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖, in fp64; the absolute norm where the truth is zero."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    scale = truth.norm().item()
    return (value - truth).norm().item() / (scale if scale > 0 else 1.0)


def tiny_config(**changes) -> DecoderConfig:
    sizes = dict(vocab_size=61, width=24, ffn_width=40, layers=2, heads=4, kv_heads=2, head_dim=6, max_positions=128)
    return DecoderConfig(**(sizes | changes))


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> ThinkingModel:
    """A thinking model with random weights everywhere, norms, biases and the mixing head's last layer included."""
    model = ThinkingModel(Decoder(tiny_config(**changes)), delimiters=True, mixing_head=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.005 if name.startswith("delimiters") else 0.3
            parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
    return model.to(dtype)


def packed_text(lengths: list[list[int]], N: int, vocab_size: int = 61, seed: int = 1) -> Text:
    """Rows of documents of the given lengths, padded to N, with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (len(lengths), N), generator=generator)
    document = torch.full((len(lengths), N), -1)
    position = torch.zeros(len(lengths), N, dtype=torch.int64)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents):
            document[row, start : start + length] = number
            position[row, start : start + length] = torch.arange(length)
            start += length
    return Text(tokens, document, position, torch.arange(len(lengths)) + 7)


def document_numbers(text: Text) -> Tensor:
    """int64 [B, N], a number of its own for each document, -1 on padding: as if none were a fragment of another."""
    row_B1 = torch.arange(text.shape[0])[:, None]
    return torch.where(text.document_BN < 0, -1, row_B1 * text.shape[1] + text.document_start_BN)


def explicit_hidden(model: ThinkingModel, text: Text, thoughts: Thoughts, row: int, k: int, m: int) -> Tensor:
    """Hidden states of a thought from a plain causal pass over [its document up to the anchor, the thought]."""
    anchor = int(thoughts.anchors.index_BM[row, m])
    start = int(text.document_start_BN[row, anchor]) if anchor >= 0 else 0
    tokens = torch.cat([text.tokens_BN[row, start : anchor + 1], thoughts.tokens_BKSM[row, k, :, m]])
    sequence = Text.from_rows(tokens[None])
    embeddings_BNW = model.embed_thoughts(tokens[None, None, :, None])[:, 0, :, 0]
    return model.decoder.read_embedded(embeddings_BNW, sequence).hidden_BNW[0, anchor + 1 - start :]


@dataclass
class Output:
    """A step, or a text's part of one, whose thoughts are held at once."""

    loss: Tensor
    metrics: Means
    record: ThoughtRecord | None
    flops: int


def step_of(objective: Objective, model: ThinkingModel, text: Text, rng: Rng, counts: Counts | None = None) -> Output:
    """A step's only update of its only micro-batch. counts: by default the text's own."""
    with Ledger() as ledger:
        (output,) = Step(objective, model, [text], rng).losses(counts)
    return Output(output.loss, output.metrics, output.record, ledger.total)


def sampled(objective: Objective, model: ThinkingModel, text: Text, rng: Rng, engine: Engine = EAGER):
    """A text's batch of thoughts."""
    with torch.no_grad():
        return objective.sample(model, model.read(text), rng, engine)


def scored(objective: Objective, model: ThinkingModel, state: TextState, batch: Batch, counts: Counts) -> Output:
    """One update of a batch whose thoughts are held at once."""
    output = at_once(objective, model, state, Sampled.of(objective, batch), counts)
    return Output(output.loss, output.metrics, output.record, 0)


def rollout(
    model: ThinkingModel,
    state: TextState,
    anchors: Anchors,
    thoughts: int,
    length: int,
    rng: Rng,
    temperature: float = 1.0,
    engine: Engine = EAGER,
    **changes,
) -> Rollout:
    """`RolloutRequest` in the order of its fields."""
    return engine.sample(RolloutRequest(model, state, anchors, thoughts, length, rng, temperature, **changes))


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors made under it that are alive: `now`, and at most, `peak`. A storage counts once and whole.

    Weights packed for oneDNN do not count: they are weights, and have no storage that can be asked for its size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout != torch._mkldnn:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
