"""The report of a study: report.html, which stands alone, and its plots as PNG in pictures/.

A curve is an arm's mean over seeds at equal shares of its runs, in the band of its 95% interval (Student's t), over the
seeds' own curves, which are thin. Where arms spend alike, equal shares are equal parts of the budget.

Shapes: P points of a curve.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from pretrain.page import REPORT_STYLE, Sheet, block, bullets, html_page, paragraph
from pretrain.plots import COLOURS, INCHES, INK, Plot, legend_below, pictures
from pretrain.recipe import Recipe
from pretrain.recipe_files import Tree, recipe_to_tree
from pretrain.report import RAW_GAIN, SCORED, RunRecords, has, thoughts
from pretrain.run_directory import write_durably
from pretrain.study import results
from pretrain.study.definition import Planned
from pretrain.study.statistics import Interval, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = Mapping[str, Sequence[RunRecords]]  # of all seeds, by arm
Points = tuple[np.ndarray, np.ndarray]  # x and y [P]

HELD_OUT = {"nll_text": "NLL without a thought", "nll_thought": "NLL after its own thought"}
SPENT = {
    "tokens": ("tokens", "tokens of text"),
    "flops": ("FLOPs", "training compute"),
    "seconds": ("time", "seconds of training"),
}
TRAINING = {"reward": "Reward", "thought_length": "Tokens of a thought"}
NATS = "nats per token"
STYLES = ("-", "--", ":")  # of lines, once all colours are taken
LINE_INCHES = 0.17  # of a line of a legend, or of an interval
# Three plots stand side by side on a desk.
WIDE = "body { max-width: 72rem } p, li { max-width: 60rem }\n"
EACH, LONGEST = 2, 500  # thoughts of a kind that are shown, and their characters
LATE = 0.75  # of a run, from where on its thoughts are shown


@dataclass(frozen=True)
class Curve:
    """mean, low and high at x; of_seeds: what it is the mean of."""

    x_P: np.ndarray
    mean: list[Interval]
    of_seeds: list[Points]


def mean_curve(of_seeds: Sequence[Points]) -> Curve:
    """The mean of curves over the shares of x that all have, between whose points lines are straight.

    of_seeds: x rises from 0 or more, and ends above 0.
    """
    shares = [x_P / x_P[-1] for x_P, _ in of_seeds]
    share_P = np.unique(np.concatenate(shares))
    share_P = share_P[share_P >= max(share[0] for share in shares)]
    y_SP = [np.interp(share_P, share, y_P) for share, (_, y_P) in zip(shares, of_seeds, strict=True)]
    x_P = share_P * np.mean([x_P[-1] for x_P, _ in of_seeds])
    return Curve(x_P, [over_seeds(y_S) for y_S in zip(*y_SP, strict=True)], list(of_seeds))


def write_report(planned: Planned, found: Mapping[str, Any], match: str) -> Path:
    """Writes the report of runs that are all at their end; returns the path of report.html.

    planned: of these runs. found: what `results` gives. match: what the runs spent alike, in words.
    """
    runs: dict[str, list[RunRecords]] = {}
    for run in planned.runs:
        runs.setdefault(run.cell.name, []).append(RunRecords(run.directory, run.directory.load_recipe()))
    path = planned.directory / "report.html"
    write_durably(path, _page(planned, runs, found, match))
    return path


def _page(planned: Planned, runs: Runs, found: Mapping[str, Any], match: str) -> str:
    seeds = ", ".join(map(str, dict.fromkeys(run.recipe.seed for run in planned.runs)))
    title = f"{planned.directory.resolve().name}: {len(runs)} arms, each with seed {seeds}"

    def plotted(plots: Iterable[Plot]) -> str:
        return pictures(plots, pngs=planned.directory / "pictures")

    parts = [f"<h1>{escape(title)}</h1>", paragraph(results.introduction(found, match))]
    parts += [*map(paragraph, results.missing_runs(found)), results.arms(found).to_html()]
    parts += map(paragraph, results.few_documents(found))
    if found["comparisons"]:
        about = "Filled where p, Holm, is below 0.05. Cohen's d is in standard deviations of a document's difference."
        parts += ["<h2>Compared with the controls</h2>", paragraph(f"{results.about_comparisons(found)} {about}")]
        parts += [plotted(_compared(found, runs)), results.comparisons(found).to_html()]
    if found["elsewhere"]:
        parts += ["<h2>Elsewhere</h2>", paragraph(results.ABOUT_ELSEWHERE)]
        parts += [sheet.to_html() for sheet in results.elsewhere(found)]
    parts += ["<h2>In training</h2>", paragraph(ABOUT_CURVES)]
    parts += [plotted([*_held_out(runs), *_in_training(runs)])]
    if found["before"]["counterfactual"]:
        parts += ["<h2>Does the thought matter?</h2>", paragraph(results.ABOUT_COUNTERFACTUAL)]
        parts += [plotted(_counterfactuals(found, runs)), results.counterfactual(found).to_html()]
    if found["passes"]:
        parts += ["<h2>Pass@k</h2>", paragraph(results.ABOUT_PASSES), plotted([_passes(found, runs)])]
        parts += [results.passes(found).to_html()]
    plots, sheets = _by_decile(runs)
    if plots:
        parts += ["<h2>By difficulty of the token</h2>", paragraph(ABOUT_DECILES)]
        parts += [plotted(plots), *(sheet.to_html() for sheet in sheets)]
    if (downstream := _downstream(runs)) is not None:
        parts += ["<h2>Downstream tasks</h2>", downstream.to_html()]
    recipes = {arm: of_seeds[0].recipe for arm, of_seeds in runs.items()}
    parts += ["<h2>What differs between arms</h2>", _differing(recipes).to_html()]
    warnings = [f"{_seed(arm, run)}: {line}" for arm, of in runs.items() for run in of for line in run.warning_lines()]
    parts += ["<h2>Warnings</h2>", bullets(warnings) if warnings else paragraph("None.")]
    if any(run.samples for of_seeds in runs.values() for run in of_seeds):
        parts += ["<h2>Thoughts</h2>", paragraph(ABOUT_THOUGHTS)]
        parts += [
            _picked(arm, of_seeds).to_html() for arm, of_seeds in runs.items() if any(r.samples for r in of_seeds)
        ]
    parts += ["<h2>Study</h2>", block(yaml.safe_dump(planned.tree, sort_keys=False))]
    return html_page(title, REPORT_STYLE + WIDE, "\n".join(parts))


ABOUT_CURVES = (
    "Each arm's mean over seeds at equal shares of its runs in the band of its 95% interval, which may go beyond the "
    "plot, over the seeds' own curves. Held-out NLL is of evaluations while the runs went on, in nats per token. "
    "Rewards are each objective's own, and compare with those of the same objective alone."
)
ABOUT_DECILES = (
    "After the runs, by decile of the token's NLL before them, the easiest first: means over seeds with 95% intervals. "
    f"Own minus none is the raw gain, and {RAW_GAIN}."
)
ABOUT_THOUGHTS = (
    f"Of those that were logged in the last quarter of the runs, which are a random few of all: by reward the {EACH} "
    f"best and the {EACH} worst, and {EACH} at random among the others."
)


def _seed(arm: str, run: RunRecords) -> str:
    return f"{arm}, seed {run.recipe.seed}"


# Plots


def _styles(arms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and dashes of each arm, the same in all plots."""
    return {arm: (COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]) for i, arm in enumerate(arms)}


def _held_out(runs: Runs) -> list[Plot]:
    return [
        _plot(f"{label}, by {by}", curves, runs, (x_label, NATS))
        for name, label in HELD_OUT.items()
        for unit, (by, x_label) in SPENT.items()
        if (curves := _curves(runs, partial(evaluated, unit=unit, name=name)))
    ]


def _in_training(runs: Runs) -> list[Plot]:
    return [
        _plot(label, curves, runs, ("step", ""))
        for name, label in TRAINING.items()
        if (curves := _curves(runs, partial(_logged, name=name)))
    ]


def _curves(runs: Runs, points: Callable[[RunRecords], tuple[Sequence[float], Sequence[float]]]) -> dict[str, Curve]:
    """Of the arms all of whose runs have such points."""
    found = {}
    for arm, of_seeds in runs.items():
        curves = [(np.asarray(x_P), np.asarray(y_P)) for x_P, y_P in map(points, of_seeds)]
        if all(len(x_P) for x_P, _ in curves):
            found[arm] = mean_curve(curves)
    return found


def evaluated(run: RunRecords, unit: str, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """A held-out score by what the run had spent, of evaluations that are like the last one."""
    alike = [e for e in run.evaluations if e.get("held_out") == run.after.get("held_out") and has(e, name)]
    if unit != "seconds":
        return run.curve(alike, unit, name)
    # Evaluations do not say when they were; between two logged steps time is taken to go by evenly.
    step, seconds = ([0.0, *(record[key] for record in run.metrics)] for key in ("step", "seconds"))
    return np.interp([e["step"] for e in alike], step, seconds).tolist(), [e[name] for e in alike]


def _logged(run: RunRecords, name: str) -> tuple[list[float], list[float]]:
    """A metric of training by step."""
    return run.curve(run.metrics, "step", name)


def _plot(title: str, curves: Mapping[str, Curve], runs: Runs, labels: tuple[str, str]) -> Plot:
    """runs: of all arms, also of those without a curve. labels: of x and y."""
    columns = 2 if max(map(len, curves)) <= 20 else 1
    draw = partial(_draw_curves, curves=curves, styles=_styles(runs), labels=labels, columns=columns)
    return Plot(title, draw, (INCHES[0], INCHES[1] + LINE_INCHES * math.ceil(len(curves) / columns)))


def _draw_curves(
    axes: Axes,
    curves: Mapping[str, Curve],
    styles: Mapping[str, tuple[str, str]],
    labels: tuple[str, str],
    columns: int,
) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for arm, curve in curves.items():
        colour, dashes = styles[arm]
        axes.plot(curve.x_P, [mean.mean for mean in curve.mean], dashes, color=colour, linewidth=1.5, label=arm)
        for x_P, y_P in curve.of_seeds:
            axes.plot(x_P, y_P, dashes, color=colour, linewidth=0.5)
    limits = axes.get_ylim()
    for arm, curve in curves.items():
        if len(curve.of_seeds) > 1:
            low, high = ([getattr(mean, end) for mean in curve.mean] for end in ("low", "high"))
            axes.fill_between(curve.x_P, low, high, color=styles[arm][0], alpha=0.15, linewidth=0)
    # Of two seeds an interval is so wide that beside it nothing else would be seen.
    axes.set_ylim(limits)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if max(curve.x_P[-1] for curve in curves.values()) >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(unit="FLOP" if labels[0] == SPENT["flops"][1] else ""))
    axes.set(xlabel=labels[0], ylabel=labels[1])
    legend_below(axes, columns)


def _compared(found: Mapping[str, Any], runs: Runs) -> list[Plot]:
    plots, styles = [], _styles(runs)
    for metric in results.METRICS:
        of_metric = [c for c in found["comparisons"] if c["metric"] == metric]
        # A control has the arm's values of the matrix.
        labels = [f"{c['arm']}\n− {c['control'].partition(',')[0]}" for c in of_metric]
        rows = [(l, c, styles[c["arm"]][0], c["p_holm"] < 0.05) for l, c in zip(labels, of_metric, strict=True)]
        if rows:
            unit = "share" if metric in results.SHARES else NATS
            plots.append(_intervals(f"{metric[0].upper()}{metric[1:]}, minus the control's", rows, unit))
    return plots


def _counterfactuals(found: Mapping[str, Any], runs: Runs) -> list[Plot]:
    plots, arms = [], found["arms"]
    for condition, before in found["before"]["counterfactual"].items():
        rows = [("the model before", before, INK, True)]
        for arm, (colour, _) in _styles(runs).items():
            if condition in arms[arm]["counterfactual"]:
                rows.append((arm, arms[arm]["counterfactual"][condition], colour, True))
        plots.append(_intervals(f"Own minus {condition}", rows, NATS))
    return plots


def _passes(found: Mapping[str, Any], runs: Runs) -> Plot:
    of, styles = found["passes"], {"the model before": (INK, "-")} | _styles(runs)
    draw = partial(_draw_passes, k=of["k"], curves={"the model before": of["before"]} | of["arms"], styles=styles)
    return Plot("Pass@k", draw, (INCHES[0], INCHES[1] + LINE_INCHES * len(styles)))


def _draw_passes(
    axes: Axes,
    k: Sequence[int],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    styles: Mapping[str, tuple[str, str]],
) -> None:
    for model, curve in curves.items():
        colour, dashes = styles[model]
        mean, low, high = ([of[end] for of in curve] for end in ("mean", "low", "high"))
        axes.plot(k, mean, dashes, color=colour, linewidth=1.5, marker=".", label=model)
        axes.fill_between(k, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(k, list(map(str, k)))
    axes.set(xlabel="k, sampled thoughts", ylabel="share", ylim=(0, 1))
    legend_below(axes, 1)


def _intervals(title: str, rows: Sequence[tuple[str, Mapping[str, float], str, bool]], unit: str) -> Plot:
    """Means with intervals, by label; in colours, filled or not."""
    rows = [(label.replace(",", ",\n"), mean, colour, filled) for label, mean, colour, filled in rows]
    lines = max(label.count("\n") for label, *_ in rows) + 1
    draw = partial(_draw_intervals, rows=rows, unit=unit)
    return Plot(title, draw, (INCHES[0], 1 + LINE_INCHES * (lines + 0.5) * len(rows)))


def _draw_intervals(axes: Axes, rows: Sequence[tuple[str, Mapping[str, float], str, bool]], unit: str) -> None:
    axes.axvline(0, color=INK, linewidth=0.5)
    for i, (_, difference, colour, filled) in enumerate(rows):
        axes.plot([difference["low"], difference["high"]], [i, i], color=colour, linewidth=1.5)
        face = colour if filled else "none"
        axes.plot(difference["mean"], i, "o", markersize=5, markerfacecolor=face, markeredgecolor=colour)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{unit}, 95% intervals", loc="right")


def _by_decile(runs: Runs) -> tuple[list[Plot], list[Sheet]]:
    """What own thoughts gain over others, by the token's difficulty before the run; the raw gain only as a plot."""
    plots, sheets = [], []
    for condition in ("shuffled", "filler", "none"):
        name, curves = f"Own minus {condition}, by difficulty", _curves(runs, partial(_own_minus, condition=condition))
        if curves:
            plots.append(_plot(name, curves, runs, ("decile", NATS)))
        if curves and condition != "none":
            by_decile = zip(*(curve.mean for curve in curves.values()), strict=True)
            rows = [[str(i + 1), *(_shown(mean, "+.3f") for mean in means)] for i, means in enumerate(by_decile)]
            sheets.append(Sheet(f"{name}, nats", ["decile", *curves], rows))
    return plots, sheets


def _own_minus(run: RunRecords, condition: str) -> tuple[list[float], list[float]]:
    """By decile; nothing where it was not scored, or some decile has no tokens."""
    if condition == "none":
        both = (run.after.get(f"nll_{which}_deciles", []) for which in ("thought", "text"))
        of = [own - text for own, text in zip(*both, strict=False)]
    else:
        differences = run.after.get("counterfactual_minus_own_deciles", {}).get(condition, [])
        of = [-decile["nll"] if isinstance(decile, dict) else math.nan for decile in differences]
    return ([], []) if any(map(math.isnan, of)) else ([*range(1, len(of) + 1)], of)


# Tables


def _downstream(runs: Runs) -> Sheet | None:
    """Of each arm's models at their ends, over the seeds that were evaluated."""
    at_end = {
        arm: [{key[1:]: score for key, score in run.scores().items() if key[0] == str(run.last["step"])} for run in of]
        for arm, of in runs.items()
    }
    keys = dict.fromkeys(key for of in at_end.values() for scores in of for key in scores)
    rows = []
    for key in keys:
        known = [[scores[key]["value"] for scores in of if key in scores] for of in at_end.values()]
        rows.append([*key, *(f"{_shown(over_seeds(values))}, n = {len(values)}" if values else "" for values in known)])
    title = "Scores of `forethought evaluate`: means over n seeds with 95% intervals over these, not over problems"
    return Sheet(title, [*SCORED, *at_end], rows) if rows else None


def _shown(value: Interval, how: str = ".3f") -> str:
    return f"{value.mean:{how}}" + (f" [{value.low:{how}}, {value.high:{how}}]" if value.n > 1 else "")


def _differing(recipes: Mapping[str, Recipe]) -> Sheet:
    """Keys of recipes whose values are not the same in all that have them."""
    trees = {arm: _flat(recipe_to_tree(recipe)) for arm, recipe in recipes.items()}
    rows = []
    for key in dict.fromkeys(key for tree in trees.values() for key in tree):
        values = [tree.get(key, "") for tree in trees.values()]
        if not key.startswith(("seed", "run_dir", "logging.wandb_")) and len({*values} - {""}) > 1:
            rows.append([key, *values])
    title = "Keys of the recipes, of the first seed; those that only one objective has are not listed"
    return Sheet(title, ["key", *trees], rows, words=True)


def _flat(tree: Tree, where: str = "") -> dict[str, str]:
    """Values by dotted key."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{where}{key}.")
        else:
            found[f"{where}{key}"] = f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')
    return found


def _picked(arm: str, of_seeds: Sequence[RunRecords]) -> Sheet:
    """The best thoughts of the ends of the runs, the worst, and some others."""
    late = [(run, sample) for run in of_seeds for sample in run.samples if sample["step"] > LATE * run.last["step"]]
    ranked = sorted((of for of in late if has(of[1], "reward")), key=lambda of: -of[1]["reward"])
    best, rest = ranked[:EACH], ranked[EACH:]
    worst, others = rest[-EACH:], rest[:-EACH]
    chosen = random.Random(0).sample(others, min(EACH, len(others)))
    kinds = {"best": best, "worst": worst, "at random": chosen}
    how = [f"{kind}, seed {run.recipe.seed}" for kind, of in kinds.items() for run, _ in of]
    return thoughts(f"{arm}: of {len(ranked)}", [sample for of in kinds.values() for _, sample in of], LONGEST, how)
