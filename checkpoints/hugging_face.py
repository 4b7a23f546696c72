"""Import from and export to Hugging Face directories.

The language model is stored as any engine can load it: config.json, model.safetensors, tokenizer. The parts used only
for thinking (delimiters, mixing head) are stored next to it in thinking.safetensors, described by thinking.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.references import resolve
from models.decoder import Decoder, DecoderConfig
from models.rope import SCALINGS, inverse_frequencies
from models.thinking import ThinkingModel

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers assumes for keys missing from config.json, where it differs from its defaults for Llama.
ABSENT: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
THINKING_PARTS = ("delimiters", "mixing_head")
FORMAT = 1  # of thinking.json


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The config of the decoder that a config.json of transformers 4 or 5 describes. Raises CheckpointError."""
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise CheckpointError(f"model_type {family!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    hf = ABSENT.get(family, {}) | dict(hf)
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"activation {hf['hidden_act']!r} is not supported; supported: silu")
    if hf.get("quantization_config"):
        raise CheckpointError("quantised weights cannot be trained; give the model in its original precision")
    # transformers 5 writes rope_parameters, theta included; 4 writes rope_theta and rope_scaling.
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    if kind not in SCALINGS:
        raise CheckpointError(f"rope scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}")
    attention_bias = family == "qwen2" or bool(hf.get("attention_bias", False))
    try:
        config = DecoderConfig(
            vocab_size=hf["vocab_size"],
            width=hf["hidden_size"],
            ffn_width=hf["intermediate_size"],
            layers=hf["num_hidden_layers"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            max_positions=hf["max_position_embeddings"],
            rope_theta=float(theta),
            rope_scaling={} if kind == "default" else rope,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias,
            out_bias=attention_bias and family != "qwen2",
            mlp_bias=family == "llama" and bool(hf.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            sliding_window=_sliding_window(hf),
            family=family,
            initializer_range=hf.get("initializer_range", 0.02),
        )
        # Called only to check that all RoPE settings are there.
        inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.max_positions)
    except KeyError as error:
        raise CheckpointError(f"the model's config.json is missing {error}; fetch the model again") from None
    except ValueError as error:
        raise CheckpointError(f"the model's config.json is inconsistent: {error}; fetch the model again") from None
    return config


def _sliding_window(hf: Mapping[str, Any]) -> int | None:
    """The window of the layers that have one; None if no layer does."""
    if hf["model_type"] == "mistral":
        return hf["sliding_window"]
    if hf["model_type"] == "llama" or not hf.get("use_sliding_window", False):
        return None
    windowed = hf["num_hidden_layers"] - hf.get("max_window_layers", 28)
    layer_types = hf.get("layer_types") or ["sliding_attention"] * windowed
    return hf.get("sliding_window", 4096) if "sliding_attention" in layer_types else None


def config_to_hf(config: DecoderConfig, dtype: torch.dtype = torch.float32, **token_ids: int | None) -> dict[str, Any]:
    """config.json for transformers 4 and 5; `token_ids` are bos_token_id and the like.

    RoPE is written in both forms: readers of the older one would otherwise fall back to a theta of 10000.
    """
    rope = dict(config.rope_scaling) or {"rope_type": "default"}
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) or None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: number for name, number in token_ids.items() if number is not None},
    }
    if config.family in ("llama", "qwen3"):
        hf["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        hf["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        hf |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
        if config.sliding_window is not None:
            hf["max_window_layers"] = 0
    return hf


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file is missing or contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give a Hugging Face model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path} is not valid JSON; fetch the model again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch the model again")
    return content


def load_decoder(
    reference: str | Path, compute_dtype: torch.dtype | None = None, cache_dir: Path | None = None, seed: int = 0
) -> Decoder:
    """Loads a decoder with fp32 master weights; for `random:PATH`, samples its weights with `seed`.

    Raises CheckpointError naming every tensor that is missing, unexpected or of the wrong shape.
    """
    directory = resolve(reference, cache_dir)
    path = Path(str(reference).removeprefix("random:"))
    config = config_from_hf(read_json(path if path.is_file() else directory / "config.json"))
    if str(reference).startswith("random:"):
        decoder = Decoder(config, compute_dtype)
        decoder.init_weights(torch.Generator().manual_seed(seed))
        return decoder
    with torch.device("meta"):
        decoder = Decoder(config, compute_dtype)
    wanted = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    tensors: dict[str, Tensor] = {}
    problems, found = [], set()
    for name, tensor in _tensors(directory):
        name = name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
            continue
        found.add(name)
        if name not in wanted:
            problems.append(f"unexpected {name}")
        elif tensor.shape != wanted[name]:
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(wanted[name])}")
        else:
            # Copied, because safetensors returns views of the memory-mapped file.
            tensors[name] = tensor.to(torch.float32, copy=True)
    problems += [f"missing {name}" for name in wanted if name not in found]
    if problems:
        raise CheckpointError(f"the weights in {directory} do not match its config.json: {'; '.join(problems)}")
    decoder.load_state_dict(tensors, assign=True)
    # Not in any file, and still on the meta device.
    decoder.inverse_frequencies, _ = inverse_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling, config.max_positions
    )
    return decoder.requires_grad_()


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) from all safetensors files of a model, one at a time."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} lists no files; fetch the model again")
        files = sorted(set(weight_map.values()))
    elif (directory / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        raise CheckpointError(
            f"{directory} has no model.safetensors; other formats are not supported, so convert it first"
        )
    for name in files:
        if Path(name).name != name or not (directory / name).exists():
            raise CheckpointError(f"{directory} has no file {name}, which its index lists; fetch the model again")
        try:
            with safe_open(directory / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{directory / name} cannot be read ({error}); fetch the model again") from None


def load_thinking_model(directory: Path, compute_dtype: torch.dtype | None = None) -> ThinkingModel:
    """The model in a directory, with its thinking parts if it has any. Raises CheckpointError."""
    decoder = load_decoder(directory, compute_dtype)
    if not (directory / "thinking.json").exists():
        return ThinkingModel(decoder)
    described = read_json(directory / "thinking.json")
    if described.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory}/thinking.json has format {described.get('format')!r}, not {FORMAT}; export the run again"
        )
    parts = described.get("parts", [])
    model = ThinkingModel(decoder, **{part: part in parts for part in THINKING_PARTS})
    try:
        with safe_open(directory / "thinking.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{directory}/thinking.safetensors cannot be read ({error}); export again") from None
    wanted = {n: p.shape for n, p in model.named_parameters() if n.startswith(THINKING_PARTS)}
    found = {n: t.shape for n, t in tensors.items()}
    if wanted != found:
        raise CheckpointError(f"{directory}/thinking.safetensors does not match thinking.json; export again")
    model.load_state_dict(tensors, strict=False)
    return model


def thought_length(directory: Path) -> int | None:
    """Tokens of the thoughts that an exported model was trained with; None where it does not say.

    Raises CheckpointError.
    """
    path = directory / "thinking.json"
    length = read_json(path).get("length") if path.exists() else None
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError(f"{path} has length {length!r}, not a number of tokens; export the run again")
    return length


def export(
    model: ThinkingModel | Decoder,
    directory: Path,
    tokenizer_directory: Path | None,
    dtype: torch.dtype = torch.float32,
    thought_length: int | None = None,
) -> None:
    """Writes a Hugging Face directory atomically.

    Raises CheckpointError if it is not empty or cannot be written, or if weights are not finite.

    The language model is stored in `dtype`, the parts used only for thinking in their own dtype. thought_length: of the
    thoughts that it was trained with, in tokens.
    """
    if isinstance(model, Decoder):
        model = ThinkingModel(model)
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"weights are not finite ({broken[0]} and {len(broken) - 1} more), so nothing is written; export an older "
            "checkpoint"
        )
    try:
        _export(model, directory, tokenizer_directory, dtype, thought_length)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} cannot be written ({error}); choose another directory to export to"
        ) from None


def _export(
    model: ThinkingModel,
    directory: Path,
    tokenizer_directory: Path | None,
    dtype: torch.dtype,
    thought_length: int | None,
) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is not empty; choose another directory to export to")
    directory.parent.mkdir(parents=True, exist_ok=True)
    decoder = model.decoder
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in decoder.state_dict().items()
    }
    ids = _token_ids(tokenizer_directory)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "export"
        made.mkdir()
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(config_to_hf(decoder.config, dtype, **ids), indent=2))
        (made / "generation_config.json").write_text(json.dumps(ids, indent=2))
        parts = [part for part in THINKING_PARTS if getattr(model, part) is not None]
        if parts:
            thinking = {
                n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n.startswith(THINKING_PARTS)
            }
            save_file(thinking, made / "thinking.safetensors", metadata={"format": "pt"})
            (made / "thinking.json").write_text(
                json.dumps({"format": FORMAT, "parts": parts, "length": thought_length}, indent=2)
            )
        for name in TOKENIZER_FILES:
            if tokenizer_directory is not None and (tokenizer_directory / name).exists():
                shutil.copyfile(tokenizer_directory / name, made / name)
        if directory.exists():
            directory.rmdir()
        made.rename(directory)


def _token_ids(tokenizer_directory: Path | None) -> dict[str, int]:
    """The bos, eos and pad ids of the tokens named in tokenizer_config.json."""
    if tokenizer_directory is None or not (tokenizer_directory / "tokenizer_config.json").exists():
        return {}
    names = read_json(tokenizer_directory / "tokenizer_config.json")
    vocabulary = read_json(tokenizer_directory / "tokenizer.json")
    numbers = dict(vocabulary["model"]["vocab"]) if isinstance(vocabulary["model"]["vocab"], dict) else {}
    numbers |= {token["content"]: token["id"] for token in vocabulary.get("added_tokens", [])}
    ids = {}
    for kind in ("bos", "eos", "pad"):
        token = names.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in numbers:
            ids[f"{kind}_token_id"] = numbers[token]
    return ids
