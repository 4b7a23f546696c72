"""Rotary position embedding and the scaling variants that the supported families ship.

The keys of a scaling are those of Hugging Face configs (`rope_type`, `factor`, ...), so that they travel unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    """fp32 inverse frequencies [head_dim / 2] and the factor on cos and sin.

    `dynamic` changes nothing below `max_positions`, and the decoder reads no further. Sources: linear, Chen et al.
    2306.15595; yarn, Peng et al. 2309.00071 eqs. 17–25; llama3, the Llama 3.1 model card.
    Raises ValueError for a variant outside SCALINGS.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if kind in ("default", "dynamic"):
        return inverse, 1.0
    if kind == "linear":
        return inverse / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    if kind == "yarn":
        return _yarn(inverse, head_dim, theta, scaling, max_positions)
    raise ValueError(f"rope scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}")


def _llama3(inverse: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    # Fewer than `low` turns in the original context: stretched; more than `high`: kept; between: interpolated.
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * inverse / factor + keep * inverse


def _yarn(
    inverse: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any], max_positions: int
) -> tuple[Tensor, float]:
    original = scaling.get("original_max_position_embeddings") or max_positions
    factor = scaling.get("factor") or max_positions / original

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(scaling.get("beta_fast") or 32.0)
    high = dimension_of(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    dims = torch.arange(head_dim // 2, dtype=torch.float32)
    stretch = ((dims - low) / max(high - low, 1e-3)).clamp(0, 1)
    inverse = stretch * inverse / factor + (1 - stretch) * inverse

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all)
        else:
            attention_factor = magnitude(factor)
    return inverse, attention_factor


def cos_and_sin(position: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_dim] in `dtype` for int64 positions [...]; angles in at least fp32.

    x · cos + (halves of x exchanged) · sin turns x: the pairs are the halves, so both are there twice, and sin is
    negative for the first half.
    """
    angle = position[..., None].to(inverse.dtype) * inverse
    cos, sin = (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
