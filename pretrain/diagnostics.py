"""Warns of the known ways in which learning to think fails, from a run's records.

Each is judged by means over a window of records, so that a single odd step triggers nothing. What the metrics mean,
objectives.metrics says; an objective of one's own that logs them under the same names is diagnosed, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import StatisticsError, fmean, linear_regression
from typing import Any

from objectives import ObjectiveConfig

WINDOW = 20  # records
DIAGNOSED = (
    "nll_text",
    "thought_length",
    "thought_closed",
    "thought_distinct",
    "entropy",
    "target_in_thought",
    "answered",
    "zero_variance_groups",
    "reward",
    "reward_std",
)

FAR = 1.0  # nats above chance; fresh weights are less
COLLAPSED = 0.5  # of the first window's length
# Of the first window's entropy: by then reward has stopped to rise with it (Cui et al. 2025, arXiv 2505.22617).
DETERMINISTIC = 0.1
NEARLY_ALL, NEARLY_NONE = 0.9, 0.1
# A thought may contain the next token by chance, the more often the longer it is: the first window measures how often.
# A rise by a quarter to more than half is beyond the noise of a window of even a few hundred thoughts. In short
# thoughts nine in ten are beyond chance; a thought of some hundred tokens contains most frequent tokens anyway.
LEAKS, LEAKS_MORE, SHORT_THOUGHT = 0.5, 0.25, 100
# Groups whose rewards are equal are reported as dead_groups; with a flat reward most groups have differences, but tiny
# ones. On a solved task the spread falls as well, but there rewards become equal first.
FLAT_STD, MOST = 0.02, 0.5


@dataclass(frozen=True)
class RunWarning:
    """message: one line with what was seen, what it usually means and what to try. metric: what it was judged by."""

    step: int
    name: str
    message: str
    metric: str


def at_start(model: str, trained: Iterable[ObjectiveConfig]) -> list[RunWarning]:
    """What is to be said before the first step of a run on the model reference `model`."""
    if model == "lab" or model.startswith("random:"):
        return []
    cautions = {name: message for config in trained for name, message in config.cautions().items()}
    return [RunWarning(0, name, message, "thought_length") for name, message in cautions.items()]


class Diagnostics:
    """Takes the records of metrics.jsonl in order; gives each warning once.

    Its state comes from the records alone: a continued run first feeds it those that are there. A metric's window
    counts the records that have it.
    """

    def __init__(self, window: int = WINDOW, chance: float = math.inf, lab: bool = False):
        """chance: the loss of a uniform guess, in nats per token. lab: whether the text is the lab's."""
        self.window, self.chance, self.lab = window, chance, lab
        self._harder = "a longer or shorter chain (data.reference lab:chain=…)" if lab else "other objective.positions"
        self._seen: dict[str, list[float]] = {}
        self._stage: int | None = None
        self._issued: set[str] = set()

    def update(self, record: dict[str, Any]) -> list[RunWarning]:
        """The warnings that this record triggers."""
        stage = record.get("stage", 0)
        if stage != self._stage:  # whose metrics are of another objective
            self._stage, self._seen = stage, {name: [] for name in DIAGNOSED}
        for name, values in self._seen.items():
            if name in record and math.isfinite(record[name]):
                values.append(record[name])
        rules = {
            "worse_than_chance": (self._worse_than_chance, "nll_text"),
            "length_collapse": (self._length_collapse, "thought_length"),
            "entropy_collapse": (self._entropy_collapse, "entropy"),
            "leakage": (self._leakage, "target_in_thought"),
            "dead_groups": (self._dead_groups, "zero_variance_groups"),
            "flat_reward": (self._flat_reward, "reward_std"),
            "unclosed_thoughts": (self._unclosed_thoughts, "thought_closed"),
            "unopened_tags": (self._unopened_tags, "answered"),
        }
        pending = [(name, rule(), metric) for name, (rule, metric) in rules.items() if name not in self._issued]
        found = [RunWarning(record["step"], name, message, metric) for name, message, metric in pending if message]
        self._issued.update(warning.name for warning in found)
        return found

    def _recent(self, name: str) -> float | None:
        """Mean over the last window; None before it is full."""
        values = self._seen[name]
        return fmean(values[-self.window :]) if len(values) >= self.window else None

    def _change(self, name: str, window: int) -> tuple[float, float] | None:
        """Means over the first and the last `window` records; None while they overlap."""
        values = self._seen[name]
        if len(values) < 2 * window:
            return None
        return fmean(values[:window]), fmean(values[-window:])

    def _worse_than_chance(self) -> str | None:
        window = max(1, self.window // 4)  # a mean over many tokens: five in a row a nat above chance are no noise
        values = self._seen["nll_text"][-window:]
        if len(values) < window or min(values) <= self.chance + FAR:
            return None
        return (
            f"a loss of {fmean(values):.1f} nats per token without thoughts over {window} records is far above the "
            f"{self.chance:.1f} of a uniform guess: usually the weights diverged or belong to another tokenizer; try a "
            "lower optimizer.lr, and check model and its held-out NLL at step 0"
        )

    def _length_collapse(self) -> str | None:
        window = max(1, self.window // 2)  # a mean length varies little from step to step, and may collapse in ten
        change = self._change("thought_length", window)
        if change is None or change[1] >= COLLAPSED * change[0]:
            return None
        thinking = (
            "a chain that needs thinking (data.reference lab:chain=…)"
            if self.lab
            else "positions that need thinking (objective.positions band or entropy)"
        )
        return (
            f"thoughts shrank from {change[0]:.1f} to {change[1]:.1f} tokens (first and last {window} records): "
            f"usually they are not rewarded and the model learns to say little; try {thinking}, more "
            "objective.thoughts, or a lower optimizer.lr"
        )

    def _entropy_collapse(self) -> str | None:
        change, distinct = self._change("entropy", self.window), self._recent("thought_distinct")
        # The right thought of the lab's problems is a single one.
        if change is None or self.lab or change[1] >= DETERMINISTIC * change[0]:
            return None
        known = "" if distinct is None else f", and {distinct:.0%} of thoughts are distinct"
        return (
            f"the policy's entropy fell from {change[0]:.2g} to {change[1]:.2g} nats per token (first and last "
            f"{self.window} records){known}: usually it has stopped to explore, and rewards rise no further; try a "
            "lower optimizer.lr, a higher objective.temperature, or more objective.thoughts"
        )

    def _leakage(self) -> str | None:
        change, length = self._change("target_in_thought", self.window), self._recent("thought_length")
        # A right thought of the lab ends with the answer.
        if change is None or self.lab:
            return None
        first, last = change
        rose = last >= LEAKS and last >= first + LEAKS_MORE
        outright = last >= NEARLY_ALL and (length is None or length <= SHORT_THOUGHT)
        if not rose and not outright:
            return None
        return (
            f"{last:.0%} of thoughts contain the token they are rewarded for predicting, {first:.0%} did in the first "
            f"{self.window} records: usually the thought guesses the token instead of reasoning; compare own and "
            "shuffled thoughts in the counterfactual test, and if they are equal try a longer objective.horizon or "
            "other objective.positions"
        )

    def _dead_groups(self) -> str | None:
        equal, reward, distinct = (
            self._recent(name) for name in ("zero_variance_groups", "reward", "thought_distinct")
        )
        if equal is None or equal < NEARLY_ALL:
            return None
        known = [f"mean reward {reward:+.3f}"] if reward is not None else []
        known += [f"{distinct:.0%} of thoughts distinct"] if distinct is not None else []
        return (
            f"in {equal:.0%} of groups all thoughts earned the same over {self.window} records"
            f"{' (' + ', '.join(known) + ')' if known else ''}, which gives no gradient: usually the task is solved, "
            f"or never solved, or the thoughts are all alike; try {self._harder}, more objective.thoughts, or a higher "
            "objective.temperature"
        )

    def _flat_reward(self) -> str | None:
        reward, std, equal = (self._recent(name) for name in ("reward", "reward_std", "zero_variance_groups"))
        if reward is None or std is None or equal is None or equal > MOST or std >= FLAT_STD * abs(reward):
            return None
        return (
            f"rewards of thoughts at the same anchor differ by only {std:.4f}, around a mean of {reward:+.3f} "
            f"({self.window} records): usually having a thought is what is rewarded, not its content; compare own and "
            "filler thoughts in the counterfactual test, and try a higher objective.temperature or "
            f"{self._harder}"
        )

    def _unclosed_thoughts(self) -> str | None:
        closed = self._recent("thought_closed")
        if closed is None or closed > NEARLY_NONE:
            return None
        why, instead = (
            ("its steps need more tokens, or the model was not trained on worked documents", "--model lab")
            if self.lab
            else ("common for base models, which do not know the closing tag", "a close that the model writes anyway")
        )
        return (
            f"{closed:.0%} of thoughts ended by themselves over {self.window} records, the others were cut at the "
            f"length limit: {why}; try a longer objective.length, {instead}, or objective.unclosed drop"
        )

    def _unopened_tags(self) -> str | None:
        answered = self._recent("answered")
        if answered is None or answered > NEARLY_NONE:
            return None
        return (
            f"{answered:.0%} of responses held a complete prediction over {self.window} records, and the others earn "
            "nothing: common for base models, which do not know the template; try objective.template "
            "forced (there: a longer objective.answer_length)"
            + ("" if self.lab else " or an objective.instruction that shows the template")
        )


def length_trend(records: Sequence[dict[str, Any]], window: int = WINDOW) -> float | None:
    """Least-squares slope of thought_length over those of the last `window` records that are of the last one's stage,
    in tokens per 100 steps.

    None where fewer than two of them have one.
    """
    alike = [r for r in records[-window:] if r.get("stage") == records[-1].get("stage")]
    points = [(r["step"], r["thought_length"]) for r in alike if "thought_length" in r]
    try:
        return 100 * linear_regression(*zip(*points, strict=True)).slope if points else None
    except StatisticsError:
        return None
