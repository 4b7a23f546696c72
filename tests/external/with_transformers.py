"""Loads exports in whatever transformers is installed: the logits are those of this project, the rope theta is kept,
and thinking exports think as this project does.

    python with_transformers.py OUT

OUT: of exports.py. Needs nothing of this project. A family that this transformers does not know is named and left out.
"""

from __future__ import annotations

import sys
import tempfile
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


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


def refusal(directory: Path) -> str:
    """What transformers says where it must not run the export's code."""
    try:
        transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        return str(error)
    return ""


@torch.no_grad()
def check_thinking(directory: Path, attention: str) -> str:
    """With both kinds of attention; left-padded prompts together go on as each of them alone."""
    reference = load_file(directory.with_name(f"{directory.name}.reference.safetensors"))
    assert "trust_remote_code=True" in refusal(directory)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        trust_remote_code=True,
        torch_dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    tokens, truth = reference["tokens"], reference["sequences"]
    errors = [relative_error(model(tokens, think="off").logits, reference["logits"])]
    if "mixed" in reference:
        output = model(tokens)
        assert torch.equal(output.thoughts, reference["thoughts"])
        errors.append(relative_error(output.logits, reference["mixed"]))
    assert max(errors) <= LOGITS, errors
    settings = dict(max_new_tokens=truth.shape[1] - tokens.shape[1], do_sample=False, eos_token_id=None, pad_token_id=0)
    read: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    assert torch.equal(model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings), truth)
    assert set(read[1:]) == {1}, "the cache was not used"
    padded, mask = torch.nn.functional.pad(tokens, (5, 0)), torch.nn.functional.pad(torch.ones_like(tokens), (5, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 5:], truth)
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again, max_shard_size="100GB")
        saved = load_file(Path(again) / "model.safetensors")
    held = {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}
    assert saved.keys() == held.keys() and all(torch.equal(saved[name], t) for name, t in held.items())
    return f"{model.config.think} with {attention}: logits differ by {max(errors):.1e}"


if __name__ == "__main__":
    known = 0
    for directory in sorted(path for path in Path(sys.argv[1]).glob("*/*") if path.is_dir()):
        if directory.name in NEW and directory.name not in transformers.CONFIG_MAPPING:
            print(f"transformers {transformers.__version__}, {directory.name}: not known to it")
            continue
        if directory.parent.name == "plain":
            found = [check(directory)]
        else:
            found = [check_thinking(directory, attention) for attention in ("eager", "sdpa")]
        for line in found:
            print(f"transformers {transformers.__version__}, {directory.name}: {line}")
        known += 1
    assert known >= 14, f"only {known} exports were loaded"
