"""The sizes of the benchmark's rows: full, quick, or tiny to check that everything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.workloads import CURVE_26M, PUBLIC_57M, QWEN3_1_7B, SMOLLM2_135M, TINY
from models.decoder import DecoderConfig


@dataclass(frozen=True)
class AttentionShape:
    """B rows of N tokens, K thoughts of S tokens at every position, H query and G key-value heads of size D."""

    name: str
    N: int
    S: int
    H: int
    G: int
    D: int
    B: int = 1
    K: int = 1


@dataclass(frozen=True)
class Curve:
    """One size varied, the others fixed. base: settings of `quiet_star` (N, L, A, K) or `rlp` (P, G, T, anchors)."""

    objective: str
    name: str
    base: Mapping[str, int]
    values: Sequence[int]

    def at(self, value: int) -> dict[str, int]:
        return dict(self.base) | {self.name: value}


def _curves(quiet_star: Mapping[str, int], rlp: Mapping[str, int], values: Mapping[str, Sequence[int]]) -> list[Curve]:
    return [
        Curve("quiet_star" if name in quiet_star else "rlp", name, quiet_star if name in quiet_star else rlp, points)
        for name, points in values.items()
    ]


@dataclass(frozen=True)
class Settings:
    """Sizes of all rows. name: which preset they are; targets are judged only for `full`.

    budget: seconds after which a row starts no further round.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    repeats: int
    budget: float
    attention: Sequence[AttentionShape]
    rollout_step: AttentionShape  # S is the number of thought tokens so far, as in deep_decode
    masked: AttentionShape | None = None
    deep_decode: AttentionShape | None = None
    copy_bytes: int = 2**31  # larger than a GPU's caches
    product_size: int = 8192
    model: DecoderConfig = SMOLLM2_135M
    quiet_star: Mapping[str, int] = field(default_factory=lambda: dict(N=256, L=8, A=4, K=2))
    rlp: Mapping[str, int] = field(default_factory=lambda: dict(P=512, G=8, T=64))
    public_model: DecoderConfig = PUBLIC_57M
    public: Mapping[str, int] = field(default_factory=lambda: dict(N=256, L=9, A=4, K=2, at_once=64))
    large_model: DecoderConfig | None = None
    large: Mapping[str, int] = field(default_factory=lambda: dict(N=512, L=8, A=4, K=2, next_token_rows=8))
    deep: Mapping[str, int] = field(default_factory=lambda: dict(P=1024, G=16, T=128))
    ragged: Mapping[str, int] = field(default_factory=lambda: dict(B=8, P=256, K=8, mean=30, longest=128))
    memory: Mapping[str, int] = field(default_factory=lambda: dict(N=512, L=16, A=4, K=2, at_once=2))
    curve_model: DecoderConfig = CURVE_26M
    data: Mapping[str, int] = field(default_factory=lambda: dict(documents=4800, length=1024, rows=8))
    data_steps: Mapping[str, int] = field(default_factory=lambda: dict(documents=160, length=256, rows=2, steps=12))
    fitting: Mapping[str, int] = field(
        default_factory=lambda: dict(N=256, rows=4, micro_batch_rows=2, steps=12, thoughts=4, length=8)
    )
    curves: Sequence[Curve] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "repeats": self.repeats,
            "weights": "random",
            "step": "loss and gradients; the optimizer's update apart",
        }


# Enough text and thoughts that reading them dominates a kernel's time.
DEEP_DECODE = AttentionShape("deep decode", N=8192, S=512, H=16, G=8, D=128, B=8, K=16)


def full(device: torch.device, dtype: torch.dtype, repeats: int | None) -> Settings:
    dense = AttentionShape("dense", N=1024, S=16, H=9, G=3, D=64)
    step = AttentionShape("rollout step", N=1024, S=8, H=9, G=3, D=64, K=2)
    if device.type == "cpu":
        curves = _curves(
            dict(N=128, L=4, A=2, K=2),
            dict(P=256, G=4, T=16, anchors=1),
            dict(N=[64, 128, 256, 512], L=[2, 4, 8, 16], K=[1, 2, 4, 8], P=[128, 256, 512, 1024])
            | dict(G=[2, 4, 8, 16], T=[8, 16, 32, 64], anchors=[1, 2, 4, 8]),
        )
        return Settings(
            "full",
            device,
            dtype,
            repeats or 5,
            600.0,
            [dense],
            step,
            masked=AttentionShape("dense, masked", N=512, S=16, H=9, G=3, D=64),
            quiet_star=dict(N=256, L=8, A=4, K=2, at_once=64),
            curves=curves,
        )
    many = AttentionShape("dense, 8 rows", N=1024, S=16, H=9, G=3, D=64, B=8)
    wide = AttentionShape("dense, heads of 128", N=2048, S=13, H=16, G=8, D=128, B=2)
    curves = _curves(
        dict(N=512, L=8, A=4, K=2),
        dict(P=1024, G=16, T=16, anchors=1),
        dict(N=[256, 512, 1024, 2048], L=[4, 8, 16, 32], K=[1, 2, 4, 8], P=[512, 1024, 2048, 4096])
        | dict(G=[4, 8, 16, 32], T=[8, 16, 32, 64], anchors=[1, 2, 4, 8]),
    )
    return Settings(
        "full",
        device,
        dtype,
        repeats or 5,
        6.0,
        [dense, many, wide],
        step,
        deep_decode=DEEP_DECODE,
        large_model=QWEN3_1_7B,
        # Every window of anchors takes L eager steps: of 2 anchors, as on CPU, there are 256.
        memory=dict(N=512, L=16, A=4, K=2, at_once=64),
        curve_model=replace(SMOLLM2_135M, layers=12),
        curves=curves,
    )


def quick(device: torch.device, dtype: torch.dtype, repeats: int | None) -> Settings:
    return Settings(
        "quick",
        device,
        dtype,
        repeats or 3,
        30.0,
        [AttentionShape("dense", N=512, S=8, H=9, G=3, D=64)],
        AttentionShape("rollout step", N=512, S=4, H=9, G=3, D=64, K=2),
        deep_decode=DEEP_DECODE if device.type == "cuda" else None,
        quiet_star=dict(N=128, L=4, A=2, K=2),
        rlp=dict(P=256, G=4, T=16),
        public=dict(N=128, L=4, A=2, K=2, at_once=32),
        deep=dict(P=256, G=8, T=16),
        ragged=dict(B=4, P=128, K=4, mean=16, longest=64),
        memory=dict(N=128, L=8, A=2, K=2, at_once=32),
        data=dict(documents=320, length=1024, rows=8),
        data_steps=dict(documents=80, length=128, rows=2, steps=6),
        fitting=dict(N=128, rows=2, micro_batch_rows=1, steps=8, thoughts=4, length=4),
        curves=_curves(
            dict(N=64, L=4, A=2, K=1),
            dict(P=128, G=4, T=8, anchors=1),
            dict(N=[32, 64, 128], L=[2, 4, 8], K=[1, 2, 4], P=[64, 128, 256])
            | dict(G=[2, 4, 8], T=[4, 8, 16], anchors=[1, 2, 4]),
        ),
    )


def tiny(device: torch.device, dtype: torch.dtype, repeats: int | None) -> Settings:
    return Settings(
        "tiny",
        device,
        dtype,
        repeats or 1,
        2.0,
        [
            AttentionShape("dense", N=24, S=4, H=3, G=1, D=16),
            AttentionShape("dense, 2 rows", 16, 3, 4, 2, 16, B=2, K=2),
        ],
        AttentionShape("rollout step", N=24, S=3, H=3, G=1, D=16, K=2),
        masked=AttentionShape("dense, masked", N=16, S=3, H=4, G=2, D=16, B=2, K=2),
        deep_decode=AttentionShape("deep decode", N=24, S=3, H=4, G=2, D=16, B=2, K=2),
        copy_bytes=2**20,
        product_size=64,
        model=TINY,
        quiet_star=dict(N=16, L=2, A=2, K=2),
        rlp=dict(P=24, G=2, T=3),
        public_model=TINY,
        public=dict(N=16, L=3, A=2, K=2, at_once=5),
        large_model=TINY,
        large=dict(N=16, L=2, A=2, K=2, next_token_rows=2),
        deep=dict(P=32, G=2, T=18),
        ragged=dict(B=2, P=24, K=3, mean=20, longest=40),
        memory=dict(N=16, L=3, A=2, K=2, at_once=5),
        curve_model=TINY,
        data=dict(documents=20, length=64, rows=2),
        data_steps=dict(documents=20, length=64, rows=2, steps=2),
        fitting=dict(N=64, rows=2, micro_batch_rows=1, steps=3, thoughts=2, length=2),
        curves=_curves(
            dict(N=16, L=2, A=2, K=1),
            dict(P=24, G=2, T=2, anchors=1),
            dict(N=[8, 16, 24], L=[1, 2, 4], K=[1, 2, 3], P=[16, 24, 32])
            | dict(G=[2, 3, 4], T=[1, 2, 4], anchors=[1, 2, 3]),
        ),
    )


SIZES = {"full": full, "quick": quick, "tiny": tiny}
