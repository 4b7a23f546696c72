"""The benchmark's targets: the figure each is judged by, and whether it is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio of a row must be at least or at most `bound`, on `device` or, if that is None, on any device."""

    part: str
    row: str
    ratio: str
    sense: Literal["≥", "≤"]
    bound: float
    device: Literal["cpu", "cuda"] | None = None

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.sense == "≥" else value <= self.bound

    def margin(self, value: float) -> float:
        """Factor by which the target is beaten; below 1 it is missed. A value of 0 counts as bound / 1000."""
        return value / self.bound if self.sense == "≥" else self.bound / max(value, self.bound / 1000)


LINEAR = tuple(
    Target("curves", size, f"{cost}, worst deviation from a line", "≤", 0.15)
    for size in ("L", "K", "G", "anchors")
    for cost in ("seconds", "bytes")
)
TARGETS = (
    Target("attention", "dense", "reference / default, time", "≥", 20, "cpu"),
    Target("attention", "dense", "default / reference, memory", "≤", 1 / 10, "cpu"),
    Target("attention", "dense", "default / S causal calls, time", "≤", 1.25, "cpu"),
    Target("steps", "quiet_star", "quiet_star / next_token, FLOP/s", "≥", 0.85, "cpu"),
    Target("steps", "rlp", "rlp, compiled / next_token, FLOP/s", "≥", 0.9, "cpu"),
    Target("steps", "public shape, float32", "quiet_star / next_token, K times, time", "≤", 18, "cpu"),
    Target("steps", "public shape, bfloat16", "quiet_star / next_token, K times, time", "≤", 18, "cpu"),
    Target("steps", "public shape, float32", "peak, GB", "≤", 2.8, "cpu"),
    Target("steps", "public shape, bfloat16", "peak, GB", "≤", 1.6, "cpu"),
    Target("rollouts", "deep", "rollout, compiled / generate, decode tokens/s", "≥", 4, "cpu"),
    Target("rollouts", "deep", "generate / rollout, compiled, end to end", "≥", 6, "cpu"),
    Target("rollouts", "deep", "rollout, compiled / generate, KV", "≤", 1 / 4, "cpu"),
    Target("rollouts", "ragged", "compiled: together / ragged, time", "≥", 2.5, "cpu"),
    Target("rollouts", "ragged", "compiled: ragged / equal, time per token", "≤", 1.25, "cpu"),
    Target("rollouts", "scoring", "separate / shared, time", "≥", 2, "cpu"),
    Target("data", "stream", "stream / tokenizer alone, tokens/s", "≥", 0.9, "cpu"),
    Target("data", "stream", "reading, packing and bookkeeping, share of the stream's time", "≤", 0.05, "cpu"),
    Target("data", "stream", "2 workers / 1 worker, tokens/s", "≥", 1.8, "cpu"),
    Target("data", "step", "longest wait / step, 1 worker", "≤", 0.01, "cpu"),
    Target("fit", "next_token", "fit / bare, time of a step", "≤", 1.03, "cpu"),
    Target("fit", "rlp", "fit / bare, time of a step", "≤", 1.03, "cpu"),
    Target("memory", "quiet_star", "quiet_star / next_token, memory", "≤", 2, "cpu"),
    Target("attention", "dense", "triton / one causal call, FLOP/s", "≥", 0.6, "cuda"),
    Target("attention", "deep decode", "triton / copy, bytes/s", "≥", 0.7, "cuda"),
    Target("steps", "large", "quiet_star, MFU", "≥", 0.4, "cuda"),
    Target("steps", "large", "next_token, MFU", "≥", 0.55, "cuda"),
    *LINEAR,
)


def judge(rows: Sequence[Record], device: str, size: str) -> list[Record]:
    """Each target with its value; `reached` is None if it was not measured, or not at full size."""
    judged = []
    for target in TARGETS:
        if target.device not in (None, device):
            continue
        row = next((r for r in rows if (r["part"], r["name"]) == (target.part, target.row)), None)
        value = row["ratios"].get(target.ratio, {}).get("median") if row is not None else None
        judged.append(
            vars(target)
            | {
                "value": value,
                "margin": None if value is None else target.margin(value),
                "reached": None if value is None or size != "full" else target.reached(value),
            }
        )
    return judged
