"""Updates that are far outside what the last steps had: what bad text or a bad moment does to a loss or a gradient.

Far is in robust standard deviations above the median: 1.4826 times the median absolute deviation, which estimates a
Gaussian's (Hampel 1974), and which spikes among the values do not move until they are half of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

GAUSSIAN = 1.4826
# Least standard deviations: a surrogate loss may be 0 but for rounding for many steps.
LEAST_LOSS, LEAST_GRAD_NORM = 0.01, 0.01  # nats; share of the median


@dataclass(frozen=True)
class Spike:
    """metric: loss or grad_norm."""

    metric: str
    value: float
    median: float
    deviations: float

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.value:.4g} was {self.deviations:.0f} robust standard deviations above the median "
            f"{self.median:.4g} of the last steps"
        )


class SpikeGuard:
    """Judges the updates of a step, each by the same update of the `window` steps before: the second one on the same
    thoughts has another loss than the first.

    Values that spiked are remembered as well, so that what stays is normal after half a window. `count`: of updates
    that were skipped; `rollbacks`: of those for which the run went back.
    """

    def __init__(self, threshold: float, window: int):
        self.threshold, self.window = threshold, window
        self.count = self.rollbacks = 0
        self._recent: dict[str, list[float]] = {}

    def judge(self, update: int, loss: float, grad_norm: float) -> Spike | None:
        """What is wrong with an update, from half a window of steps on. Both finite, and the same on all ranks."""
        found = None
        for metric, value in (("grad_norm", grad_norm), ("loss", loss)):
            before = self._recent.setdefault(f"{metric}/{update}", [])
            if 2 * len(before) >= self.window:
                middle = median(before)
                least = LEAST_LOSS if metric == "loss" else LEAST_GRAD_NORM * middle
                deviation = max(GAUSSIAN * median(abs(x - middle) for x in before), least)
                if value > middle + self.threshold * deviation:
                    found = found or Spike(metric, value, middle, (value - middle) / deviation)
            before.append(value)
            del before[: -self.window]
        self.count += found is not None
        return found

    def forget(self) -> None:
        """What comes is not to be compared with what was: another objective has another loss."""
        self._recent.clear()

    def counts(self) -> dict[str, int]:
        """For the records."""
        return {"spikes": self.count} | ({"rollbacks": self.rollbacks} if self.rollbacks else {})

    def state(self) -> dict[str, Any]:
        """JSON-able, which keeps floats to the bit."""
        return {"count": self.count, "rollbacks": self.rollbacks, "recent": self._recent}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count, self.rollbacks, self._recent = state["count"], state.get("rollbacks", 0), state["recent"]
