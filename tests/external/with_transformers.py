"""Loads exports in whatever transformers is installed: the logits are those of this project, the rope theta is kept.

    python with_transformers.py OUT

OUT: of exports.py. Needs nothing of this project. A family that this transformers does not know is named and left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

LOGITS = 1e-5
# Newer than transformers 4.50.
NEW = {"olmo3", "qwen3", "smollm3"}


def theta(config: transformers.PretrainedConfig) -> float:
    """As transformers 5 has it, for OLMo 3 by type of layers; else as 4 has it."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope).get("rope_theta") or config.rope_theta


@torch.no_grad()
def check(directory: Path) -> str:
    reference = load_file(directory.with_name(f"{directory.name}.reference.safetensors"))
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    logits = model(reference["tokens"]).logits
    error = ((logits - reference["logits"]).norm() / reference["logits"].norm()).item()
    assert error <= LOGITS, f"{directory.name}: logits differ by {error:.1e}"
    runs = directory.name not in transformers.CONFIG_MAPPING
    assert theta(model.config) == (10000.0 if runs else 5000.0), theta(model.config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("3+5=8")["input_ids"]) == "3+5=8"
    model.generate(**tokenizer("3+5=", return_tensors="pt"), max_new_tokens=2)  # it takes whatever the tokenizer gives
    return f"logits differ by {error:.1e}"


if __name__ == "__main__":
    known = 0
    for directory in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        if directory.name in NEW and directory.name not in transformers.CONFIG_MAPPING:
            print(f"transformers {transformers.__version__}, {directory.name}: not known to it")
            continue
        print(f"transformers {transformers.__version__}, {directory.name}: {check(directory)}")
        known += 1
    assert known >= 7, f"only {known} exports were loaded"
