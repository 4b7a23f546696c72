"""How many parameters training changed, and where.

A parameter has changed if its bf16 value has: AdamW moves every fp32 weight, but what is less than bf16's rounding is
nothing to the model that people will load. Mukherjee et al. 2025 (arXiv 2505.11711) find that RL changes 5 to 30%, and
supervised training nearly all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from checkpoints.loading import UnloadedModel

Changed = Mapping[str, tuple[int, int]]  # by name of a weight: parameters that changed, and all of them
LAYER = re.compile(r"\.layers\.(\d+)\.(.+)")


def changed(before: UnloadedModel, after: UnloadedModel) -> Changed:
    """Of the weights that both have; a mixing head and delimiters are made for the run."""

    def rounded(model: UnloadedModel, name: str) -> Tensor:
        weight = model.weights[name]
        return (weight if isinstance(weight, Tensor) else weight.whole()).to("cpu", torch.bfloat16)

    return {
        name: (int((rounded(before, name) != rounded(after, name)).sum()), rounded(before, name).numel())
        for name in before.weights
        if name in after.weights
    }


def shares(found: Changed) -> dict[str, dict[str, float]]:
    """Shares that changed of `all` parameters, and by `layer` and `kind`: what a weight is in its layer, or its name
    outside of them."""

    def by(group: Callable[[str], str]) -> dict[str, float]:
        sums: dict[str, list[int]] = {}
        for name, pair in found.items():
            so_far = sums.setdefault(group(name), [0, 0])
            so_far[:] = [a + b for a, b in zip(so_far, pair, strict=True)]
        return {name: count / of for name, (count, of) in sums.items()}

    def layer(name: str) -> str:
        match = LAYER.search(name)
        return match[1] if match else "outside"

    def kind(name: str) -> str:
        match = LAYER.search(name)
        return (match[2] if match else name.removeprefix("decoder.")).removesuffix(".weight")

    return {"all": by(lambda name: "all"), "layer": by(layer), "kind": by(kind)}
