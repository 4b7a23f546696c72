"""A row of the benchmark: one comparison, its measurements and the resulting ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import Growth, Measured, Spread, Variant, race
from benchmarks.settings import Settings

# The rows of a part: each one's name, and the function that measures it.
Rows = Iterator[tuple[str, Callable[[], "Row"]]]
# Errors that fail a row when raised outside its variants, whose own errors `race` catches.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, MemoryError, ImportError)


@dataclass
class Row:
    """One comparison. setting: its sizes. ratios: by what is compared; growth: of curves, in seconds and bytes."""

    part: str
    name: str
    setting: dict[str, Any]
    measured: dict[str, Measured] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    growth: dict[str, Growth] = field(default_factory=dict)
    failed: str | None = None

    def seconds(self, name: str, figure: str = "seconds") -> list[float]:
        return self.measured[name].figures.get(figure, []) if name in self.measured else []

    def rate(self, name: str, figure: str = "flops") -> list[float]:
        return self.measured[name].rate(figure) if self.seconds(name, figure) else []

    def model_rate(self, name: str, also: str | None = None) -> list[float]:
        """FLOPs per second without those that recompute, in each round; `also` adds another variant's time."""
        spent, again = self.seconds(name, "flops"), self.seconds(name, "recomputed_flops")
        others = self.seconds(also) if also is not None else [0.0] * len(spent)
        figures = zip(spent, again, self.seconds(name), others, strict=False)
        return [(flops - r) / (seconds + other) for flops, r, seconds, other in figures]

    def added(self, name: str, constant: int = 0) -> list[float]:
        """Bytes that a call allocates and frees again, plus `constant` bytes that are always there."""
        found = self.measured[name].added_bytes if name in self.measured else None
        return [] if found is None else [float(found + constant)]

    def compare(self, what: str, over: list[float], under: list[float]) -> None:
        """Adds the ratio, taken round by round, if both sides have figures."""
        if over and under and min(under) > 0:
            self.ratios[what] = Spread.of([a / b for a, b in zip(over, under, strict=False)])

    def failures(self) -> list[str]:
        rows = [f"{self.name}: {self.failed}"] if self.failed else []
        return rows + [f"{self.name}, {name}: {m.failed}" for name, m in self.measured.items() if m.failed]

    def to_json(self) -> dict[str, Any]:
        return {
            "part": self.part,
            "name": self.name,
            "setting": self.setting,
            "measured": {name: measured.to_json() for name, measured in self.measured.items()},
            "ratios": {name: vars(ratio) for name, ratio in self.ratios.items()},
            **({"growth": {name: vars(growth) for name, growth in self.growth.items()}} if self.growth else {}),
            **({"failed": self.failed} if self.failed else {}),
        }


def race_row(row: Row, settings: Settings, variants: Mapping[str, Variant], repeats: int | None = None) -> Row:
    row.measured |= race(variants, settings.device, settings.repeats if repeats is None else repeats, settings.budget)
    return row


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_row(part: str, name: str, measure: Callable[[], Row]) -> Row:
    """The row, or one that says why it failed."""
    try:
        return measure()
    except FAILURES as error:
        return Row(part, name, {}, failed=f"{type(error).__name__}: {error}"[:500])
