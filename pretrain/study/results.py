"""What a study found: each arm's right answers and held-out NLL, what it spent, and how it differs from the controls.

Shapes: S seeds, D documents.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.evaluation.held_out import ENOUGH_DOCUMENTS
from pretrain.page import Sheet
from pretrain.report import CONDITIONS
from pretrain.study.changed import shares
from pretrain.study.definition import Cell
from pretrain.study.scores import Scores
from pretrain.study.statistics import holm, over_seeds, paired_differences


@dataclass(frozen=True)
class Metric:
    """Of the scored tokens, after one condition's thought: their NLL in nats, or the share that is right. minus: a
    condition whose mean is subtracted."""

    of: Literal["nll", "correct"]
    condition: str
    minus: str | None = None


# What arms are compared by.
METRICS = {
    "right answers without a thought": Metric("correct", "none"),
    "right answers after its own thought": Metric("correct", "own"),
    "NLL without a thought": Metric("nll", "none"),
    "NLL after its own thought": Metric("nll", "own"),
    "own minus shuffled": Metric("nll", "own", "shuffled"),
}
PASSES = "pass@k"
SHARES = {PASSES, "right thoughts", *(name for name, metric in METRICS.items() if metric.of == "correct")}


@dataclass(frozen=True)
class Finished:
    """A run that came to its end. spent: step, tokens, flops and seconds. missed: the share by which that is not its
    budget."""

    cell: Cell
    seed: int
    spent: Mapping[str, float]
    missed: float
    scores: Scores


def results(
    runs: Sequence[Finished], controls: Sequence[str], before: Scores, missing: Sequence[tuple[Cell, int]] = ()
) -> dict[str, Any]:
    """JSON-able. before: of the model that training starts from. missing: runs that are not finished, with seeds."""
    cells = list(dict.fromkeys(run.cell for run in runs))
    of = {cell: [run for run in runs if run.cell == cell] for cell in cells}
    comparisons = [
        (cell, control, metric)
        for cell in cells
        if cell.arm not in controls
        for control in (Cell(name, cell.values) for name in controls)
        if control in of and {run.seed for run in of[cell]} & {run.seed for run in of[control]}
        for metric in METRICS
        if _of(before, metric) is not None
    ]
    differences = [_difference(of[cell], of[control], metric) for cell, control, metric in comparisons]
    adjusted = holm([found["p"] for found in differences])
    return {
        **_size(before),
        "before": {**_values(before), "counterfactual": _counterfactual([before])},
        "missing": {
            cell.name: [seed for of_seed, seed in missing if of_seed == cell]
            for cell in dict.fromkeys(cell for cell, _ in missing)
        },
        "missed": max(run.missed for run in runs),
        "arms": {cell.name: _arm(of[cell]) for cell in cells},
        "comparisons": [
            {"arm": cell.name, "control": control.name, "metric": metric, **found, "p_holm": p}
            for (cell, control, metric), found, p in zip(comparisons, differences, adjusted, strict=True)
        ],
        "passes": _passes(of, before),
        "elsewhere": {shift: _elsewhere(shift, of, before.shifts[shift]) for shift in before.shifts},
    }


def _of(scores: Scores, metric: str) -> Tensor | None:
    """[D] of a metric; None where it is not scored."""
    which = METRICS[metric]
    of: Mapping[str, Tensor] = getattr(scores, which.of)
    if which.condition not in of or (which.minus is not None and which.minus not in of):
        return None
    return of[which.condition] - (of[which.minus] if which.minus is not None else 0)


def _mean(scores: Scores, metric: str) -> float | None:
    """Over tokens."""
    value_D = _of(scores, metric)
    return None if value_D is None else ((value_D * scores.tokens_D).sum() / scores.tokens_D.sum()).item()


def _size(scores: Scores) -> dict[str, int]:
    return {"documents": len(scores.documents_D), "tokens": int(scores.tokens_D.sum())}


def _values(scores: Scores) -> dict[str, float | None]:
    return {**{metric: _mean(scores, metric) for metric in METRICS}, "right thoughts": scores.right}


def _over_seeds(of_seeds: Sequence[Scores]) -> dict[str, Any]:
    values = [_values(scores) for scores in of_seeds]
    by_seed = {metric: [of[metric] for of in values] for metric in values[0]}
    known = {metric: [x for x in of if x is not None] for metric, of in by_seed.items()}
    means = {metric: _json(vars(over_seeds(of))) for metric, of in known.items() if of}
    return {**means, "by_seed": by_seed}


def _arm(runs: Sequence[Finished]) -> dict[str, Any]:
    of_seeds = [run.scores for run in runs]
    return {
        "seeds": [run.seed for run in runs],
        **_over_seeds(of_seeds),
        "spent": {name: [run.spent[name] for run in runs] for name in ("step", "tokens", "flops", "seconds")},
        "counterfactual": _counterfactual(of_seeds),
        "changed": _changed(of_seeds),
    }


def _elsewhere(shift: str, runs: Mapping[Cell, Sequence[Finished]], before: Scores) -> dict[str, Any]:
    arms = {cell.name: [run.scores.shifts[shift] for run in of] for cell, of in runs.items()}
    scored = {metric: value_D for metric in METRICS if (value_D := _of(before, metric)) is not None}
    return {
        **_size(before),
        "before": _values(before),
        "arms": {
            arm: {
                **_over_seeds(of_seeds),
                "minus before": {
                    metric: _paired([_of(scores, metric) - value_D for scores in of_seeds], before.tokens_D)  # type: ignore[operator]
                    for metric, value_D in scored.items()
                },
            }
            for arm, of_seeds in arms.items()
        },
    }


def _changed(of_seeds: Sequence[Scores]) -> dict[str, dict[str, float]]:
    """Shares of parameters, means over seeds; empty for runs that were scored before these were counted."""
    of = [shares(scores.changed) for scores in of_seeds if scores.changed]
    return {
        where: {name: statistics.mean(found[where][name] for found in of) for name in names}
        for where, names in (of[0] if of else {}).items()
    }


def _passes(of: Mapping[Cell, Sequence[Finished]], before: Scores) -> dict[str, Any]:
    """pass@k at each k, of the model before and each arm, and the k from which on the former's is higher; empty where
    it was not asked for."""

    def curve(of_seeds: Sequence[Scores]) -> list[dict[str, Any]]:
        return [_paired([scores.passes[k] for scores in of_seeds], before.tokens_D) for k in before.passes]

    if not before.passes:
        return {}
    base = curve([before])
    arms = {cell.name: curve([run.scores for run in runs]) for cell, runs in of.items()}
    overtaken: dict[str, int | None] = {}
    for name, means in arms.items():
        ahead = [b["mean"] > a["mean"] for a, b in zip(means, base, strict=True)]
        ends = [k for i, k in enumerate(before.passes) if all(ahead[i:])]
        overtaken[name] = min(ends, default=None)
    return {"k": [*before.passes], "before": base, "arms": arms, "overtaken": overtaken}


def _counterfactual(of_seeds: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """By condition, the own thought's NLL minus that after it. Empty for models that do not think."""
    both = [c for c in CONDITIONS if all(c in scores.nll and "own" in scores.nll for scores in of_seeds)]
    return {
        condition: _paired([scores.nll["own"] - scores.nll[condition] for scores in of_seeds], of_seeds[0].tokens_D)
        for condition in both
        if condition != "own"
    }


def _json(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """What is not finite is not JSON."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _difference(arm: Sequence[Finished], control: Sequence[Finished], metric: str) -> dict[str, Any]:
    """Over the seeds that both have."""
    by_seed = {run.seed: run.scores for run in control}
    pairs = [(run.scores, by_seed[run.seed]) for run in arm if run.seed in by_seed]
    return _paired([_of(a, metric) - _of(b, metric) for a, b in pairs], pairs[0][0].tokens_D)  # type: ignore[operator]


def _paired(of_seeds: Sequence[Tensor], tokens_D: Tensor) -> dict[str, Any]:
    found = paired_differences(torch.stack(list(of_seeds)), tokens_D)
    return {"seeds": len(of_seeds), **_json({name: value.item() for name, value in vars(found).items()})}


# In words and tables


def markdown(name: str, found: Mapping[str, Any], match: str) -> str:
    """match: what the runs spent alike, in words."""
    parts: list[str | Sheet] = [
        f"# {name}",
        introduction(found, match),
        *missing_runs(found),
        arms(found),
        *few_documents(found),
    ]
    if found["comparisons"]:
        parts += [about_comparisons(found), comparisons(found)]
    if found["elsewhere"]:
        parts += [f"Elsewhere. {ABOUT_ELSEWHERE}", *elsewhere(found)]
    if found["before"]["counterfactual"]:
        parts += [f"Does the thought matter? {ABOUT_COUNTERFACTUAL}", counterfactual(found)]
    if found["passes"]:
        parts += [f"Pass@k. {ABOUT_PASSES}", passes(found)]
    if any(arm.get("changed") for arm in found["arms"].values()):
        parts += [ABOUT_CHANGED, changes(found)]
    return "\n\n".join(part if isinstance(part, str) else part.to_markdown() for part in parts) + "\n"


ABOUT_ELSEWHERE = (
    "The same models on the documents of each of the study's shifts. Means over seeds with 95% intervals "
    "(Student's t). Differences to the model before are on the same documents, with 95% intervals over seeds and "
    "documents. None of these is among the comparisons that Holm allows for. A shift that is scored by next_token has "
    "no thoughts, and NLL is of all tokens."
)


ABOUT_COUNTERFACTUAL = (
    "NLL after the model's own thought minus that after another: "
    f"{', '.join(f'{words} ({name})' for name, words in CONDITIONS.items() if name != 'own')}; with 95% intervals over "
    "seeds and documents, not corrected for their number. Only what its own gains over other, shuffled and filler is "
    "due to what a thought says."
)


ABOUT_PASSES = (
    "Probability that after at least one of k sampled thoughts the true token is the likeliest (Yue et al., "
    "2504.13837; by the unbiased estimate of Chen et al., 2107.03374), with 95% intervals over seeds and documents. "
    "From which k on the model before is ahead is by the means alone."
)

ABOUT_CHANGED = (
    "Parameters whose bf16 value training changed (Mukherjee et al., 2505.11711), by kind, and the least and the most "
    "changed layer; means over seeds. results.json has every layer."
)


def introduction(found: Mapping[str, Any], match: str) -> str:
    return (
        f"{match} No run missed its budget by more than {found['missed']:.1%}. Scored are {found['tokens']:,} tokens "
        f"of {found['documents']:,} held-out documents. An answer is right if the model finds the true token "
        "likeliest; NLL is in nats per token. Own minus shuffled is what the words of a thought are worth in NLL: the "
        "lower, the better. Means over seeds with 95% intervals (Student's t; those of shares are cut at 0 and 100%)."
    )


def arms(found: Mapping[str, Any], short: bool = False) -> Sheet:
    """short: without right thoughts and seconds."""
    shown = [metric for metric in (*METRICS, "right thoughts") if found["before"][metric] is not None]
    spent = {"flops": ("FLOPs", ".4g"), "seconds": ("seconds", ".0f")}
    if short:
        shown, spent = [metric for metric in shown if metric in METRICS], {"flops": spent["flops"]}
    rows = [
        ["the model before", "", *(_number(metric, found["before"][metric]) for metric in shown), *("" for _ in spent)]
    ]
    for cell, arm in found["arms"].items():
        seeds = ", ".join(map(str, arm["seeds"]))
        costs = [f"{statistics.mean(arm['spent'][name]):{how}}" for name, (_, how) in spent.items()]
        rows.append([cell, seeds, *(_shown(metric, arm[metric]) for metric in shown), *costs])
    head = ["arm", "seeds", *(metric if metric in SHARES else f"{metric}, nats" for metric in shown)]
    return Sheet("At the end of the runs", [*head, *(name for name, _ in spent.values())], rows)


def missing_runs(found: Mapping[str, Any]) -> list[str]:
    """What must be known of a study that is not finished."""
    missing = [f"{cell} (seed {', '.join(map(str, seeds))})" for cell, seeds in found.get("missing", {}).items()]
    return [f"Not finished, and missing here: {', '.join(missing)}."] if missing else []


def few_documents(found: Mapping[str, Any]) -> list[str]:
    """What must be known of intervals over documents, if anything."""
    places = {"": found, **{f"{shift}: of": of for shift, of in found["elsewhere"].items()}}
    return [
        f"{place or 'Of'} fewer than {ENOUGH_DOCUMENTS} documents: too few for intervals over them; raise "
        + ("evaluation.rows." if place else "held_out_rows.")
        for place, of in places.items()
        if of["documents"] < ENOUGH_DOCUMENTS
    ]


def about_comparisons(found: Mapping[str, Any]) -> str:
    seeds = min(c["seeds"] for c in found["comparisons"])
    of_one = " With one seed they hold for these models alone, not for other runs of the recipes." if seeds < 2 else ""
    return (
        "Differences on the same documents, paired by seed, with 95% intervals over seeds and documents; "
        f"{len(found['comparisons'])} comparisons were made, which the column Holm allows for.{of_one}"
    )


def comparisons(found: Mapping[str, Any]) -> Sheet:
    rows = [
        [
            *(c["arm"], c["control"], c["metric"], _signed(c, c["metric"])),
            *(f"{c['p']:.4f}", f"{c['p_holm']:.3f}", "" if c["effect"] is None else f"{c['effect']:+.2f}"),
        ]
        for c in found["comparisons"]
    ]
    head = ["arm", "minus control", "of", "difference, nats or points", "p", "p, Holm", "Cohen's d"]
    return Sheet("Differences from the controls", head, rows)


def elsewhere(found: Mapping[str, Any]) -> list[Sheet]:
    """One row for each shift."""
    shifts, plain = found["elsewhere"], "NLL without a thought"
    sheets = []
    for metric in ("right answers after its own thought", "NLL after its own thought", plain):
        rows = [
            [
                shift,
                _number(metric, of["before"][metric]),
                *(_shown(metric, arm[metric]) for arm in of["arms"].values()),
            ]
            for shift, of in shifts.items()
            if of["before"][metric] is not None
        ]
        sheets.append(Sheet("Elsewhere", [metric, "the model before", *found["arms"]], rows))
    differences = [
        [shift, *(_signed(arm["minus before"][plain]) for arm in of["arms"].values())] for shift, of in shifts.items()
    ]
    sheets.append(Sheet("Elsewhere", [f"{plain}, minus the model before's", *found["arms"]], differences))
    return [sheet for sheet in sheets if sheet.rows]


def counterfactual(found: Mapping[str, Any]) -> Sheet:
    before = found["before"]["counterfactual"]
    models = {"the model before": before} | {cell: arm["counterfactual"] for cell, arm in found["arms"].items()}
    rows = [[model, *(_signed(of[c]) if c in of else "" for c in before)] for model, of in models.items()]
    return Sheet("Own thought minus …, nats", ["arm", *before], rows)


def passes(found: Mapping[str, Any]) -> Sheet:
    of = found["passes"]
    rows = []
    for model, curve in ({"the model before": of["before"]} | of["arms"]).items():
        overtaken = of["overtaken"].get(model)
        ahead = "" if model not in of["overtaken"] else "none" if overtaken is None else str(overtaken)
        rows.append([model, *(_shown(PASSES, mean) for mean in (curve[0], curve[-1])), ahead])
    return Sheet("Pass@k", ["model", "k = 1", f"k = {of['k'][-1]}", "the model before is ahead from k ="], rows)


def changes(found: Mapping[str, Any]) -> Sheet:
    of = {cell: arm["changed"] for cell, arm in found["arms"].items() if arm.get("changed")}
    kinds = list(dict.fromkeys(kind for arm in of.values() for kind in arm["kind"]))
    rows = [
        [
            cell,
            f"{arm['all']['all']:.1%}",
            *(f"{arm['kind'][kind]:.1%}" if kind in arm["kind"] else "" for kind in kinds),
            *(f"{share:.1%} ({layer})" for share, layer in _extremes(arm["layer"])),
        ]
        for cell, arm in of.items()
    ]
    return Sheet("Parameters changed beyond rounding", ["arm", "all", *kinds, "least (layer)", "most (layer)"], rows)


def _extremes(of_layers: Mapping[str, float]) -> tuple[tuple[float, str], tuple[float, str]]:
    shares = [(share, layer) for layer, share in of_layers.items() if layer.isdecimal()]
    return min(shares), max(shares)


def _signed(difference: Mapping[str, Any], metric: str = "") -> str:
    """In nats; of shares in percentage points."""
    scale, how = (100, "+.1f") if metric in SHARES else (1, "+.3f")
    mean, low, high = (f"{scale * difference[name]:{how}}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _shown(metric: str, interval: Mapping[str, Any]) -> str:
    mean = _number(metric, interval["mean"])
    if interval["low"] is None:
        return mean
    return f"{mean} [{_number(metric, interval['low'])}, {_number(metric, interval['high'])}]"


def _number(metric: str, value: float) -> str:
    """A share as it can be, whatever its interval says."""
    return f"{min(max(value, 0.0), 1.0):.1%}" if metric in SHARES else f"{value:.3f}"
