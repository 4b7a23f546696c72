"""Writes what other software is to load: one small export of each family, and of a run of each thinking objective.

    python -m tests.external.exports OUT

Each is OUT/NAME, with the lab's tokenizer; OUT/NAME.reference.safetensors holds prompts, int64 [20, 24], and this
project's fp32 logits for them, [20, 24, V].
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints import export, load_thinking_model
from checkpoints.families import FAMILIES
from checkpoints.references import LAB
from models import Decoder, DecoderConfig, Text, ThinkingModel
from pretrain.cli import main

# Heads of 32, the smallest that vLLM has on CPUs, and width / heads, which it takes Qwen2's to be; a few embeddings
# more than the tokenizer has tokens.
SIZES = dict(vocab_size=64, width=128, ffn_width=192, layers=4, heads=4, kv_heads=2, head_dim=32, max_positions=512)
ROTARY = {"olmo3": ("plain", "plain", "plain", "scaled"), "smollm3": ("scaled", "scaled", "scaled", "none")}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
RECIPES = {"quiet_star": "lab-quiet-star", "rlp": "quickstart", "rpt": "lab-rpt"}


def random_model(config: DecoderConfig) -> ThinkingModel:
    """Random weights, norms and biases included, large enough for greedy tokens to be clear and various."""
    decoder, generator = Decoder(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(noise + 1.0 if "norm" in name else noise)
    return ThinkingModel(decoder)


def write_families(out: Path) -> None:
    for name, family in FAMILIES.items():
        windows = dict(sliding_window=256, windowed_layers=(0, 1, 2), rope_scaling=YARN) if name == "olmo3" else {}
        fixed = dict(family.fixed) | dict(family=name, rope_theta=5000.0, rotary=ROTARY.get(name, ()))
        export(random_model(DecoderConfig(**SIZES, **fixed, **windows)), out / name, LAB, shard_bytes=100_000)


def write_runs(out: Path) -> None:
    """Two steps of each thinking objective, from the command line to the export."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        export(random_model(DecoderConfig(**SIZES, tie_embeddings=True)), base, LAB)
        for name, recipe in RECIPES.items():
            run = str(Path(scratch) / name)
            few = ["--steps", "2", "--evaluation.rows", "2", "--control", "null", "--logging.wandb", "disabled"]
            assert main(["fit", recipe, "--model", str(base), "--run-dir", run, *few]) == 0
            assert main(["export", run, str(out / name)]) == 0


@torch.no_grad()
def write_reference(directory: Path) -> None:
    decoder = load_thinking_model(directory).decoder
    tokens = torch.randint(61, (20, 24), generator=torch.Generator().manual_seed(1))
    logits = decoder.read(Text.from_rows(tokens)).hidden_BNW @ decoder.head_weight_VW.T
    save_file({"tokens": tokens, "logits": logits}, directory.with_name(f"{directory.name}.reference.safetensors"))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    write_families(out)
    write_runs(out)
    for directory in sorted(path for path in out.iterdir() if path.is_dir()):
        write_reference(directory)
