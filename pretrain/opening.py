"""Models opened for use: by reference, or as a run has left them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.errors import CheckpointError
from checkpoints.hugging_face import load_decoder, load_thinking_model, trained_thinking
from checkpoints.references import resolve
from checkpoints.run import find_checkpoint, load_checkpoint
from data_pipelines import Tokenizer
from models.decoder import DecoderConfig
from models.thinking import ThinkingModel, TrainedThinking
from objectives import find_objective
from pretrain.recipe import Recipe
from pretrain.run_directory import RunDirectory, is_run
from pretrain.state import model_from_state


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


def load_reference(reference: str, directory: Path, dtype: torch.dtype | None, seed: int = 0) -> ThinkingModel:
    """The model of a reference that was resolved to `directory`, with the thinking parts it brings.

    Raises CheckpointError.
    """
    if reference.startswith("random:"):
        return ThinkingModel(load_decoder(reference, dtype, seed=seed))
    return load_thinking_model(directory, dtype)


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
        checkpoint = find_checkpoint(path)
        directory = RunDirectory(checkpoint.parent.parent)
        if not directory.recipe.exists():
            raise CheckpointError(f"{checkpoint} lies in no run directory (no {directory.recipe}); move it back")
        tensors, state = load_checkpoint(checkpoint, ("model",))
        model = model_from_state(tensors, state, dtype)
        tokenizer_directory, recipe = directory.tokenizer, directory.load_recipe()
    else:
        tokenizer_directory, recipe = resolve(reference), None
        model = load_reference(reference, tokenizer_directory, dtype)
        state = None
    tokenizer = Tokenizer.from_directory(tokenizer_directory)
    check_vocabulary(reference, tokenizer, model.decoder.config.vocab_size)
    model.ban(tokenizer.size, tokenizer.control_ids)
    if recipe is None:
        thinking = trained_thinking(tokenizer_directory)
    else:
        thinking = find_objective(recipe.objective.name).build(recipe.objective, tokenizer).thinking
    return OpenedModel(model, tokenizer, tokenizer_directory, recipe, thinking, state)


def check_vocabulary(reference: str, tokenizer: Tokenizer, embeddings: int) -> None:
    """Raises CheckpointError for a tokenizer with more tokens than the model; a model may have more, never sampled."""
    if tokenizer.size > embeddings:
        raise CheckpointError(
            f"the tokenizer of {reference} has {tokenizer.size} tokens, its model only {embeddings} embeddings; "
            "give a directory in which they belong together"
        )
