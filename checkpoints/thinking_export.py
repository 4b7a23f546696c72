"""Models as transformers thinks with them: by the modelling files that a thinking export carries, and no other code.

Needs transformers (extra `eval`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoints.families import config_to_hf
from checkpoints.hugging_face import (
    language_model_tensors,
    load_thinking_model,
    thinking_config,
    thinking_tensors,
    token_ids,
    trained_thinking,
)
from checkpoints.modeling.configuration_forethought import ForethoughtConfig
from checkpoints.modeling.modeling_forethought import ForethoughtForCausalLM
from models.thinking import ThinkingModel, TrainedThinking


def load_forethought(directory: Path, dtype: torch.dtype = torch.float32) -> ForethoughtForCausalLM:
    """The model of a plain or a thinking export, or of any other directory, which then does not think by itself.

    Raises CheckpointError.
    """
    return as_forethought(load_thinking_model(directory), trained_thinking(directory), dtype, **token_ids(directory))


def as_forethought(
    model: ThinkingModel, trained: TrainedThinking | None, dtype: torch.dtype = torch.float32, **ids: int | None
) -> ForethoughtForCausalLM:
    """A model, from wherever it was opened, as transformers' one; in fp32 it shares the model's weights.

    What the model bans (`ThinkingModel.ban`) is banned from thoughts there, too. ids: eos_token_id, at which generation
    ends, bos_token_id and pad_token_id.
    """
    described = thinking_config(model, trained, config_to_hf(model.decoder.config, torch.float32, **ids))
    config = ForethoughtConfig(**{key: described[key] for key in described if key not in ("model_type", "auto_map")})
    tensors = {f"base.{name}": tensor for name, tensor in language_model_tensors(model.decoder).items()}
    if config.think == "every-token":
        tensors |= thinking_tensors(model)
    return ForethoughtForCausalLM.from_pretrained(None, config=config, state_dict=tensors, torch_dtype=dtype).eval()
