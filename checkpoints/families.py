"""The model families: what their config.json says beyond Llama's, and the way back.

Parameter names are Hugging Face's in all of them (models/decoder.py), so a family is only a config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoints.errors import CheckpointError
from models.decoder import DecoderConfig
from models.rope import SCALINGS, inverse_frequencies


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    absent: what transformers takes for keys missing from config.json. fixed: settings of the decoder that no key says.
    biases: the keys that there are of attention_bias and mlp_bias.
    """

    architecture: str
    absent: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, bool] = field(default_factory=dict)
    biases: tuple[str, ...] = ()


_OLMO = {"post_norm": True, "qk_norm_all_heads": True}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", biases=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", {"num_key_value_heads": 32, "sliding_window": 4096}, {"qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
        {"qk_norm": True},
        ("attention_bias",),
    ),
    "olmo2": Family("Olmo2ForCausalLM", {"rms_norm_eps": 1e-5}, _OLMO, ("attention_bias",)),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
        _OLMO,
        ("attention_bias",),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        biases=("attention_bias", "mlp_bias"),
    ),
}
THINKING = "forethought"  # model_type of a thinking export, whose language model is described by base_config
FULL, SLIDING = "full_attention", "sliding_attention"  # values of layer_types


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The config of the decoder that a config.json of transformers 4 or 5 describes. Raises CheckpointError."""
    if hf.get("model_type") == THINKING:
        hf = hf.get("base_config") or {}
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise CheckpointError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    hf = dict(family.absent) | dict(hf)
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"activation {hf['hidden_act']!r} is not supported; supported: silu")
    if hf.get("quantization_config"):
        raise CheckpointError("quantised weights cannot be trained; give the model in its original precision")
    biased = {key for key in family.biases if hf.get(key)}
    attention: dict[str, Any] = {"qkv_bias": "attention_bias" in biased, "out_bias": "attention_bias" in biased}
    try:
        windowed = _windowed_layers(hf)
        config = DecoderConfig(
            vocab_size=hf["vocab_size"],
            width=hf["hidden_size"],
            ffn_width=hf["intermediate_size"],
            layers=hf["num_hidden_layers"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            max_positions=hf["max_position_embeddings"],
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            mlp_bias="mlp_bias" in biased,
            sliding_window=hf["sliding_window"] if windowed else None,
            windowed_layers=windowed if 0 < len(windowed) < hf["num_hidden_layers"] else None,
            family=name,
            initializer_range=hf.get("initializer_range", 0.02),
            **_rotary(hf, windowed),
            **attention | dict(family.fixed),
        )
        # Called only to check that all RoPE settings are there.
        inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, config.max_positions)
    except KeyError as error:
        raise CheckpointError(f"the model's config.json is missing {error}; fetch the model again") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"the model's config.json is inconsistent: {error}; fetch the model again") from None
    return config


def _windowed_layers(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that a sliding window limits."""
    family, layers = hf["model_type"], range(hf["num_hidden_layers"])
    if family in ("llama", "olmo2") or hf.get("sliding_window") is None:
        return ()
    if family == "mistral":
        return tuple(layers)
    if family != "olmo3" and not hf.get("use_sliding_window", False):
        return ()
    if hf.get("layer_types"):
        return tuple(i for i, kind in zip(layers, hf["layer_types"], strict=True) if kind == SLIDING)
    if family == "olmo3":
        return tuple(i for i in layers if (i + 1) % 4)
    if family == "smollm3":
        return tuple(i for i, rotates in enumerate(_rotates(hf)) if not rotates)
    return tuple(layers[hf.get("max_window_layers", 28) :])


def _rotates(hf: Mapping[str, Any]) -> list[int]:
    """1 for each layer of SmolLM3 with rotary embedding, 0 for each without."""
    layers, every = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    return (
        hf["no_rope_layers"][:layers]
        if hf.get("no_rope_layers")
        else [int((i + 1) % every != 0) for i in range(layers)]
    )


def _rotary(hf: Mapping[str, Any], windowed: tuple[int, ...]) -> dict[str, Any]:
    """Theta, scaling, and what each layer has of them.

    transformers 5 writes rope_parameters, theta included, for OLMo 3 once for each type of layers; 4 writes rope_theta
    and rope_scaling, and OLMo 3 scales only layers without window.
    """
    layers = range(hf["num_hidden_layers"])
    given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    by_type = {kind: dict(given.get(kind) or {}) for kind in (FULL, SLIDING)} if {FULL, SLIDING} & given.keys() else {}
    theta, scaling = _theta_and_scaling(by_type.get(FULL, given), hf)
    rotary: tuple[str, ...] = ()
    if hf["model_type"] == "olmo3" and windowed:
        of_windowed = _theta_and_scaling(by_type.get(SLIDING, {"rope_theta": theta}), hf)
        if of_windowed not in ((theta, {}), (theta, scaling)):
            raise CheckpointError("layers with windows have a RoPE of their own, which is not supported")
        if of_windowed[1] != scaling:
            rotary = tuple("plain" if i in windowed else "scaled" for i in layers)
    elif hf["model_type"] == "smollm3":
        rotary = tuple("scaled" if rotates else "none" for rotates in _rotates(hf))
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary": rotary}


def _theta_and_scaling(rope: dict[str, Any], hf: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The scaling is empty where there is none."""
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    if kind not in SCALINGS:
        raise CheckpointError(f"rope scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}")
    return float(theta), {} if kind == "default" else rope


def config_to_hf(config: DecoderConfig, dtype: torch.dtype = torch.float32, **token_ids: int | None) -> dict[str, Any]:
    """config.json for transformers 4 and 5; `token_ids` are bos_token_id, eos_token_id and pad_token_id.

    RoPE is written in both forms: readers of the older one would otherwise fall back to a theta of 10000.
    """
    family = FAMILIES[config.family]
    plain = {"rope_type": "default", "rope_theta": config.rope_theta}
    rope: dict[str, Any] = plain | dict(config.rope_scaling)
    if config.family == "olmo3":
        rope = {FULL: rope, SLIDING: plain if "plain" in config.rotary else rope}
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
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
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        # null where there is none: the defaults of a family may lie beyond this vocabulary.
        **{name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    hf |= {key: biases[key] for key in family.biases}
    if config.family in ("llama", "olmo2"):
        return hf
    hf["sliding_window"] = config.sliding_window
    if config.family == "mistral":
        return hf
    layers = range(config.layers)
    windowed = layers if config.windowed_layers is None else config.windowed_layers
    windowed = () if config.sliding_window is None else windowed
    hf["layer_types"] = [SLIDING if i in windowed else FULL for i in layers]
    if config.family != "olmo3":
        hf["use_sliding_window"] = config.sliding_window is not None
    if config.family in ("qwen2", "qwen3"):
        hf["max_window_layers"] = min(windowed, default=config.layers)
    if config.family == "smollm3":
        hf["no_rope_layers"] = [int(kind != "none") for kind in config.rotary or ["scaled"] * config.layers]
    return hf
