"""Models and runs on disk.

    reference → resolve → a local Hugging Face directory → load_decoder, load_thinking_model → model → export
    run       → save_checkpoint → step-<8 digits>/ → newest_checkpoint, find_checkpoint → load_checkpoint

`prune` removes old checkpoints. Anything unusable raises `CheckpointError`. Importing this package needs no
transformers, gguf or network; gguf and the network are used only to fetch a model.
"""

from checkpoints.errors import CheckpointError
from checkpoints.families import config_from_hf, config_to_hf
from checkpoints.hugging_face import export, load_decoder, load_thinking_model
from checkpoints.references import resolve
from checkpoints.snapshots import find_checkpoint, load_checkpoint, newest_checkpoint, prune, save_checkpoint

__all__ = [
    "CheckpointError",
    "config_from_hf",
    "config_to_hf",
    "export",
    "find_checkpoint",
    "load_checkpoint",
    "load_decoder",
    "load_thinking_model",
    "newest_checkpoint",
    "prune",
    "resolve",
    "save_checkpoint",
]
