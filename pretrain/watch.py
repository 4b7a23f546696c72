"""Follows the records of a run and names the ways in which learning to think is known to fail.

Each is judged by means over a window of records, so that one odd step says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import StatisticsError, fmean, linear_regression
from typing import Any

WINDOW = 20  # records
WATCHED = (
    "thought_length",
    "thought_closed",
    "thought_distinct",
    "target_in_thought",
    "answered",
    "zero_variance_groups",
    "reward",
    "reward_std",
)

COLLAPSED = 0.5  # of the first window's length
NEARLY_ALL, NEARLY_NONE = 0.9, 0.1
# A thought may name the next token by chance, the more often the longer it is: the first window measures how often. A
# rise of a quarter to more than half is beyond the noise of a window of even a few hundred thoughts. Nine in ten are
# beyond chance in a short thought whatever came before; one of some hundred tokens holds most frequent tokens anyway.
LEAKS, LEAKS_MORE, SHORT_THOUGHT = 0.5, 0.25, 100
# Groups whose rewards are equal are dead_groups' matter; a flat reward has differences in most groups, but tiny ones.
# Where a task is solved the spread falls too, but there equal rewards come first.
FLAT_SPREAD, MOST = 0.02, 0.5


@dataclass(frozen=True)
class Warning:
    """message: one line with what was seen, what it usually means and what to try."""

    step: int
    name: str
    message: str


class Watch:
    """Takes the records of metrics.jsonl in their order; gives each warning once.

    All its state comes from the records: a continued run feeds those it has first. A metric's window counts the records
    that have it.
    """

    def __init__(self, window: int = WINDOW):
        self.window = window
        self._seen: dict[str, list[float]] = {name: [] for name in WATCHED}
        self._given: set[str] = set()

    def update(self, record: dict[str, Any]) -> list[Warning]:
        """The warnings that this record gives rise to."""
        for name, values in self._seen.items():
            if name in record and math.isfinite(record[name]):
                values.append(record[name])
        rules = {
            "length_collapse": self._length_collapse,
            "leakage": self._leakage,
            "dead_groups": self._dead_groups,
            "flat_reward": self._flat_reward,
            "unclosed_thoughts": self._unclosed_thoughts,
            "unopened_tags": self._unopened_tags,
        }
        messages = {name: rule() for name, rule in rules.items() if name not in self._given}
        found = [Warning(record["step"], name, message) for name, message in messages.items() if message]
        self._given.update(warning.name for warning in found)
        return found

    def _recent(self, name: str) -> float | None:
        """Mean over the last window; None before there is one."""
        values = self._seen[name]
        return fmean(values[-self.window :]) if len(values) >= self.window else None

    def _change(self, name: str, window: int) -> tuple[float, float] | None:
        """Means over the first and the last `window` records; None while they overlap."""
        values = self._seen[name]
        if len(values) < 2 * window:
            return None
        return fmean(values[:window]), fmean(values[-window:])

    def _length_collapse(self) -> str | None:
        window = max(1, self.window // 2)  # a mean length varies little from step to step, and may collapse in ten
        change = self._change("thought_length", window)
        if change is None or change[1] >= COLLAPSED * change[0]:
            return None
        return (
            f"thoughts shrank from {change[0]:.1f} to {change[1]:.1f} tokens (first and last {window} records): "
            "usually they do not pay and the model learns to say little; try positions that need thinking "
            "(objective.positions band or entropy), more objective.thoughts, or a lower optimizer.lr"
        )

    def _leakage(self) -> str | None:
        change, length = self._change("target_in_thought", self.window), self._recent("thought_length")
        if change is None:
            return None
        first, last = change
        rose = last >= LEAKS and last >= first + LEAKS_MORE
        outright = last >= NEARLY_ALL and (length is None or length <= SHORT_THOUGHT)
        if not rose and not outright:
            return None
        return (
            f"{last:.0%} of thoughts contain the token they are paid to predict, {first:.0%} did in the first "
            f"{self.window} records: on ordinary text the thought guesses the token instead of reasoning; where right "
            "thoughts end with the answer, as in the lab, it is as it should be; compare own and shuffled thoughts in "
            "the causal test, and if they are equal try a longer objective.horizon or other objective.positions"
        )

    def _dead_groups(self) -> str | None:
        flat, reward, distinct = (self._recent(name) for name in ("zero_variance_groups", "reward", "thought_distinct"))
        if flat is None or flat < NEARLY_ALL:
            return None
        known = [f"mean reward {reward:+.3f}"] if reward is not None else []
        known += [f"{distinct:.0%} of thoughts distinct"] if distinct is not None else []
        return (
            f"in {flat:.0%} of groups all thoughts earned the same over {self.window} records"
            f"{' (' + ', '.join(known) + ')' if known else ''}, which teaches nothing: usually the task is solved, or "
            "never solved, or the thoughts are all alike; try harder or easier objective.positions, more "
            "objective.thoughts, or a higher objective.temperature"
        )

    def _flat_reward(self) -> str | None:
        reward, spread, flat = (self._recent(name) for name in ("reward", "reward_std", "zero_variance_groups"))
        if reward is None or spread is None or flat is None or flat > MOST or spread >= FLAT_SPREAD * abs(reward):
            return None
        return (
            f"rewards of thoughts at the same place differ by {spread:.4f} only, around a mean of {reward:+.3f} "
            f"({self.window} records): usually it is having a thought that pays or costs, not what it says; compare "
            "own and filler thoughts in the causal test, and try a higher objective.temperature or other "
            "objective.positions"
        )

    def _unclosed_thoughts(self) -> str | None:
        closed = self._recent("thought_closed")
        if closed is None or closed > NEARLY_NONE:
            return None
        return (
            f"{closed:.0%} of thoughts ended by themselves over {self.window} records, the others were cut at the "
            "length limit: usual for base models, which do not know the closing tag; try a longer objective.length, an "
            "objective.close that the model writes anyway, or objective.unclosed drop"
        )

    def _unopened_tags(self) -> str | None:
        answered = self._recent("answered")
        if answered is None or answered > NEARLY_NONE:
            return None
        return (
            f"{answered:.0%} of thoughts opened and filled the answer template over {self.window} records, and the "
            "others earn nothing: usual for base models, which do not know the template; try objective.template "
            "forced (there: a longer objective.answer_length) or an objective.instruction that shows the template"
        )


def length_trend(records: Sequence[dict[str, Any]], window: int = WINDOW) -> float | None:
    """Least-squares slope of thought_length over the last `window` records, in tokens per 100 steps.

    None where fewer than two of them have one.
    """
    points = [(r["step"], r["thought_length"]) for r in records[-window:] if "thought_length" in r]
    try:
        return 100 * linear_regression(*zip(*points, strict=True)).slope if points else None
    except StatisticsError:
        return None
