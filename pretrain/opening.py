"""Models opened for use: by reference, or as a run has left them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import CheckpointError
from checkpoints.hugging_face import load_decoder, open_thinking_model, trained_thinking
from checkpoints.loading import UnloadedModel, empty_model
from checkpoints.references import resolve
from checkpoints.snapshots import find_snapshot
from data_pipelines import Tokenizer
from models.decoder import DecoderConfig
from models.thinking import ThinkingModel, TrainedThinking
from objectives import find_objective
from pretrain.recipe import Recipe
from pretrain.run_directory import RunDirectory, is_run
from pretrain.state import model_of


def compute_dtype(setting: str) -> torch.dtype | None:
    """The dtype of activations: None leaves that of the masters. `auto` is bf16 where the hardware multiplies it."""
    if setting == "auto":
        if torch.cuda.is_available():
            bf16 = torch.cuda.is_bf16_supported()
        else:
            capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        return torch.bfloat16 if bf16 else None
    return torch.bfloat16 if setting == "bf16" else None


def longest_sequence(config: DecoderConfig) -> int:
    """Tokens that a text and a thought may have together."""
    return min(config.max_positions, config.sliding_window or config.max_positions)


def open_reference(reference: str, directory: Path, dtype: torch.dtype | None, seed: int = 0) -> UnloadedModel:
    """The model of a reference that was resolved to `directory`, with the thinking parts it brings.

    Raises CheckpointError. Random weights are sampled whole, and held until the model is loaded.
    """
    if not reference.startswith("random:"):
        return open_thinking_model(directory, dtype)
    decoder = load_decoder(reference, dtype, seed=seed)
    weights = {f"decoder.{name}": parameter.detach() for name, parameter in decoder.named_parameters()}
    return UnloadedModel(empty_model(decoder.config, dtype), weights)


@dataclass
class OpenedModel:
    """A model for use after training, with its tokenizer and, from a run, its recipe.

    thinking: how it was trained to think, where it was and that is known. state: of the checkpoint, from a run.
    """

    model: ThinkingModel
    tokenizer: Tokenizer
    tokenizer_directory: Path
    recipe: Recipe | None
    thinking: TrainedThinking | None
    state: Mapping[str, Any] | None

    @property
    def thought_length(self) -> int | None:
        """Sampled tokens of the thoughts that it was trained with."""
        return None if self.thinking is None else self.thinking.length


def open_model(reference: str, dtype: torch.dtype | None = None) -> OpenedModel:
    """A run directory, a checkpoint of one, or any model reference. Raises CheckpointError or DataError."""
    path = Path(reference)
    if is_run(path):
        checkpoint = find_snapshot(path, ("model",))
        directory = RunDirectory(checkpoint.path.parent.parent)
        if not directory.recipe.exists():
            raise CheckpointError(f"{checkpoint.path} lies in no run directory (no {directory.recipe}); move it back")
        model = model_of(checkpoint, dtype).load()
        state: Mapping[str, Any] | None = checkpoint.state
        tokenizer_directory, recipe = directory.tokenizer, directory.load_recipe()
    else:
        tokenizer_directory, recipe = resolve(reference), None
        model = open_reference(reference, tokenizer_directory, dtype).load()
        state = None
    tokenizer = Tokenizer.from_directory(tokenizer_directory)
    check_vocabulary(reference, tokenizer, model.decoder.config.vocab_size)
    model.ban(tokenizer.size, tokenizer.control_ids)
    if recipe is None:
        thinking = trained_thinking(tokenizer_directory)
    else:
        thinking = find_objective(recipe.thinking.name).build(recipe.thinking, tokenizer).thinking
    return OpenedModel(model, tokenizer, tokenizer_directory, recipe, thinking, state)


def check_vocabulary(reference: str, tokenizer: Tokenizer, embeddings: int) -> None:
    """Raises CheckpointError for a tokenizer with more tokens than the model; a model may have more, never sampled."""
    if tokenizer.size > embeddings:
        raise CheckpointError(
            f"the tokenizer of {reference} has {tokenizer.size} tokens, its model only {embeddings} embeddings; "
            "give a directory in which they belong together"
        )
