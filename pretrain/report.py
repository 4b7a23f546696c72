"""The report of a run, from its records: tables and thoughts on the terminal, report.html and report.png.

The picture shows what the run is about: held-out NLL over compute, beside that of the control, and whether the thought
matters. The HTML stands alone: pictures are inside it, it loads nothing and runs nothing.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from data_pipelines.lab import END_OF_DOCUMENT
from objectives import Metric, ObjectiveConfig, find_objective
from pretrain.evaluation.held_out import ENOUGH_DOCUMENTS
from pretrain.page import REPORT_STYLE, Sheet, block, bullets, html_page, paragraph
from pretrain.plots import COLOURS, INK, Plot, available, drawn, legend_below, pictures, to_png
from pretrain.recipe import Recipe
from pretrain.recipe_files import recipe_to_yaml
from pretrain.run_directory import RunDirectory
from pretrain.samples import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]

TERMINAL_THOUGHTS, TERMINAL_CHARACTERS = 4, 300
HTML_THOUGHTS, HTML_CHARACTERS = 12, 2000
# With fewer tokens a decile is too noisy to be shown beside a control, which says more.
DECILE_TOKENS = 100
FEW = f"* of fewer than {ENOUGH_DOCUMENTS} documents: too few for an interval, which is too narrow"

RAW_GAIN = "raw gain is no gain by thinking: anything that disturbs a prediction helps hard tokens and hurts easy ones"

# Name in evaluations.jsonl → label.
HELD_OUT = {
    "nll_text": "without thoughts",
    "nll_thought": "after its own thought",
    "accuracy_text": "greedy hits, without",
    "accuracy_thought": "greedy hits, after it",
    "thought_right": "right thoughts",
}
CONDITIONS = {
    "own": "its own thought",
    "other": "the thought of another text",
    "shuffled": "its own, in random order",
    "filler": "filler of the same length",
    "none": "no thought",
    "right": "a right thought",
}
# What the training loop logs; the rest is the objective's.
LOOP_METRICS = {
    "loss": Metric("what is minimised", "mean over the step's updates"),
    "lr": Metric("learning rate", "of the step's updates"),
    "grad_norm": Metric("norm of the gradient before clipping", "mean over the step's updates"),
    "skipped": Metric("steps without an update so far", "those with a non-finite loss or gradient"),
    "spikes": Metric("steps skipped by optimizer.spike_threshold so far", "those whose loss or gradient spiked"),
    "rollbacks": Metric("returns to a checkpoint so far", "by optimizer.on_spike"),
    "tokens_per_second": Metric("tokens of text read a second", "of the last step"),
}
# What a downstream score is of, beside its step.
SCORED = ("task", "metric", "thoughts", "temperature")
NOT_PLOTTED = ("step", "stage", "tokens", "flops", "seconds", "weights_step")
OVERVIEW_INCHES, CURVE_INCHES, CURVE_WIDTH = (9.0, 3.6), (2.6, 1.8), "13rem"
RUN_COLOUR, CONTROL_COLOUR, OTHER_COLOUR = COLOURS[0], COLOURS[1], COLOURS[-1]


class RunRecords:
    """The records of a run, and of its control if that came to its end."""

    def __init__(self, directory: RunDirectory, recipe: Recipe):
        self.directory, self.recipe, self.name = directory, recipe, recipe.trained_with
        self.metrics = directory.read(directory.metrics)
        self.evaluations = directory.read(directory.evaluations)
        self.downstream = directory.read(directory.downstream)
        self.samples = directory.read(directory.samples)
        self.warnings = directory.read(directory.warnings)
        self.control: RunRecords | None = None
        control = RunDirectory(directory.control)
        if control.recipe.exists():
            its_recipe = control.load_recipe()
            if recipe.data.held_out and control.is_finished(its_recipe):
                self.control = RunRecords(control, its_recipe)

    @property
    def before(self) -> Record:
        """The first evaluation of what the last one evaluates, too."""
        alike = [e for e in self.evaluations if e.get("held_out") == self.after.get("held_out")]
        return alike[0] if alike else {}

    @property
    def after(self) -> Record:
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def last(self) -> Record:
        return self.metrics[-1]

    # Tables

    def held_out(self) -> Sheet:
        before, after = self.before, self.after
        columns = ["", f"before\n(step {before['step']})", f"after\n(step {after['step']})", "change"]
        others = []
        if self.control is not None:
            columns.append(f"after, control\n({self.control.name},\nequal FLOPs)")
            others.append(self.control.after)
        rows = []
        for name, label in HELD_OUT.items():
            if has(after, name):
                values = [_shown(name, record) for record in (before, after)]
                rows.append([label, *values, _change(name, before, after), *(_shown(name, other) for other in others)])
        return Sheet("Held-out NLL, nats per token (lower is better)", columns, rows)

    def counterfactuals(self) -> Sheet | None:
        found, minus_own = self.after.get("counterfactual"), self.after.get("counterfactual_minus_own", {})
        if not found:
            return None
        rows = []
        for condition in [c for c in CONDITIONS if c in found]:
            difference = minus_own.get(condition)
            shown = f"{difference['nll']:+.3f} {_interval(difference)}" if difference else ""
            nll = found[condition]
            rows.append([CONDITIONS[condition], f"{nll['nll']:.3f} {_interval(nll)}", shown])
        title = "Does the thought matter? The same tokens, each after … (95% intervals)"
        return Sheet(title, ["", "NLL", "minus its own thought's"], rows)

    def notes(self) -> list[str]:
        """What must be known of the evaluation beside its tables."""
        found, documents = self.after.get("counterfactual"), self.after.get("documents_scored", math.inf)
        notes = [f"{FEW} (here {documents:.0f})"] if found and documents < ENOUGH_DOCUMENTS else []
        if found and "other" not in found:
            notes.append("the thought of another text: there is none, all held-out tokens are of one document")
        return notes

    def counterfactual_sentence(self) -> str | None:
        shuffled = self.after.get("counterfactual_minus_own", {}).get("shuffled")
        if shuffled is None:
            return None
        low, high = -shuffled["high"], -shuffled["low"]
        return f"own thought minus shuffled: {-shuffled['nll']:+.3f} nats [{low:+.3f}, {high:+.3f}]"

    def deciles(self) -> Sheet:
        before, after = self.before, self.after
        thought = after.get("nll_thought_deciles")
        differences = {
            condition: after.get("counterfactual_minus_own_deciles", {}).get(condition)
            for condition in ("shuffled", "filler")
        }
        shown = {condition: deciles for condition, deciles in differences.items() if deciles}
        # On a terminal of 80 columns there is no room for `before` beside intervals.
        columns = ["decile"] + ([] if shown else ["before"]) + ["without\nthoughts"]
        columns += [*(f"own minus {condition}" for condition in shown), *(["raw gain"] if thought else [])]
        rows = []
        for i, (first, text) in enumerate(zip(before["nll_text_deciles"], after["nll_text_deciles"], strict=True)):
            row = [str(i + 1)] + ([] if shown else [f"{first:.3f}"]) + [f"{text:.3f}"]
            row += [_own_minus(deciles[i]) for deciles in shown.values()]
            rows.append([*row, f"{text - thought[i]:+.3f}"] if thought else row)
        return Sheet("After the run, by difficulty of the token (decile of its NLL before the run)", columns, rows)

    def deciles_sentence(self) -> str | None:
        return RAW_GAIN if "nll_thought_deciles" in self.after else None

    def deciles_are_firm(self) -> bool:
        return self.after.get("tokens_scored", math.inf) >= DECILE_TOKENS * len(self.after["nll_text_deciles"])

    def scores(self) -> dict[tuple[str, ...], Record]:
        """What `forethought evaluate` found, the last of each step, task, metric, way to think and temperature."""
        return {
            (str(record["step"]), score["task"], score["metric"], record["think"], f"{score['temperature']:g}"): score
            for record in self.downstream
            for score in record["scores"]
        }

    def stages(self) -> Sheet | None:
        """What was trained, one after the other, and where each was left."""
        last, rows = {record.get("stage"): record for record in self.metrics}, []
        for stage, (name, config) in enumerate(
            zip(["", *self.recipe.stages], self.recipe.trained.values(), strict=True)
        ):
            if stage in last:
                spent = f"{last[stage]['flops'] / 1e12:,.2f}"
                rows.append([name, _described(config), f"{last[stage]['step']:,}", spent])
        return Sheet("Stages", ["stage", "objective", "last step", "TFLOP by then"], rows) if rows else None

    def tasks(self) -> Sheet | None:
        def value(score: Record) -> str:
            return f"{score['value']:.3f} {_interval(score) if math.isfinite(score['low']) else ''}"

        rows = [[*key, value(score), str(score["documents"])] for key, score in self.scores().items()]
        return Sheet("Downstream tasks (95% intervals)", ["step", *SCORED, "score", "problems"], rows) if rows else None

    @property
    def plotted(self) -> list[str]:
        """Names of the metrics that have curves."""
        logged = dict.fromkeys(name for record in self.metrics for name in record if has(record, name))
        return [name for name in logged if name not in NOT_PLOTTED and not name.startswith("data/")]

    @property
    def known_metrics(self) -> dict[str, Metric]:
        kinds = [find_objective(config.name) for config in self.recipe.trained.values()]
        return {name: metric for kind in kinds for name, metric in kind.all_metrics().items()} | LOOP_METRICS

    def meanings(self) -> Sheet:
        known = self.known_metrics
        rows = [[name, known[name].meaning, known[name].formula] for name in self.plotted if name in known]
        return Sheet("What the curves show", ["metric", "meaning", "computed as"], rows, words=True)

    # Lines

    def cost(self) -> str:
        last = self.last
        return (
            f"{self.name}: {last['step']:,} steps, {last['tokens']:,} tokens, {last['flops'] / 1e12:,.1f} TFLOP, "
            f"{last['seconds']:.0f} s of training"
        )

    def costs(self, seconds: float | None) -> list[str]:
        control = [f"control, {self.control.cost()}"] if self.control is not None else []
        return [self.cost(), *control, *([] if seconds is None else [f"this command took {seconds:.0f} s"])]

    def warning_lines(self) -> list[str]:
        def judged_by(warning: Record) -> str:
            metric = warning.get("metric")  # which older runs do not say
            return f"; judged by {metric}: {self.known_metrics[metric].meaning}" if metric in self.known_metrics else ""

        return [f"{w['name']} (step {w['step']}): {w['message']}{judged_by(w)}" for w in self.warnings]

    def curve(self, records: list[Record], x: str, name: str) -> tuple[list[float], list[float]]:
        points = [(record[x], record[name]) for record in records if has(record, name)]
        return [p[0] for p in points], [p[1] for p in points]

    # Commands

    def commands(self) -> list[str]:
        path = shlex.quote(str(self.directory.path))
        found = [f"forethought export {path} OUT"]
        if self.recipe.thinking.showing(None, 0.0, 1) is not None:
            found.append(f"forethought sample {path} --text {shlex.quote(self._text_to_think_about())}")
        return found

    def _text_to_think_about(self) -> str:
        """Where the model thinks only at a marker, a text that has one and a token to predict behind it."""
        positions = getattr(self.recipe.thinking, "positions", None)
        read = [
            sample["text"] + sample["continues"].removesuffix(END_OF_DOCUMENT)
            for sample in self.samples
            if sample["text"].isprintable()
        ]
        return read[-1] if positions == "marker" and read else "The capital of France is"


def has(record: Record, name: str) -> bool:
    """Whether a record has a number of that name."""
    value = record.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _described(config: ObjectiveConfig) -> str:
    """The objective's name, and its settings where they are no defaults."""
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    defaults = {f.name: f.default for f in fields(config)}
    changed = [f"{name} {value}" for name, value in given.items() if name != "name" and value != defaults[name]]
    return f"{config.name} ({', '.join(changed)})" if changed else config.name


def _shown(name: str, record: Record) -> str:
    if not has(record, name):
        return ""
    return f"{record[name]:.4f}" if name.startswith("nll") else f"{record[name]:.1%}"


def _change(name: str, before: Record, after: Record) -> str:
    if not has(before, name):
        return ""
    change = after[name] - before[name]
    return f"{change:+.4f}" if name.startswith("nll") else f"{change:+.1%}"


def _interval(value: Record) -> str:
    few = "*" if value.get("documents", math.inf) < ENOUGH_DOCUMENTS else ""
    return f"[{value['low']:.3f}, {value['high']:.3f}]{few}"


def _own_minus(value: Record | float) -> str:
    """The own thought's NLL minus that of the condition, from the record of their difference the other way round."""
    if not isinstance(value, dict):  # a decile without tokens
        return ""
    few = "*" if value["documents"] < ENOUGH_DOCUMENTS else ""
    return f"{-value['nll']:+.2f} [{-value['high']:.2f}, {-value['low']:.2f}]{few}"


def thoughts(title: str, samples: Sequence[Record], longest: int, picked: Sequence[str] = ()) -> Sheet:
    """Samples in words, cut to so many characters. picked: how each was, if not all in the same way."""
    rows = [
        [
            *how,
            str(sample["step"]),
            *(_cut(printable(sample[name]), longest) for name in ("text", "thought", "continues")),
            f"{sample['reward']:+.3f}",
        ]
        for sample, *how in zip(samples, *([picked] if picked else []), strict=True)
    ]
    columns = ["step", "text", "thought", "continues", "reward"]
    return Sheet(title, ["picked", *columns] if picked else columns, rows, words=True)


def _cut(words: str, longest: int) -> str:
    return words if len(words) <= longest else f"{words[: longest // 2]} … {words[-longest // 2 :]}"


# On the terminal


def print_report(directory: RunDirectory, recipe: Recipe, seconds: float) -> None:
    """Prints to standard output. seconds: what the whole command took."""
    console, run = Console(highlight=False, markup=False, emoji=False), RunRecords(directory, recipe)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    if run.evaluations:
        console.print(run.held_out().to_rich())
    counterfactuals, sentence = run.counterfactuals(), run.counterfactual_sentence()
    if counterfactuals is not None:
        console.print(counterfactuals.to_rich())
    if sentence is not None:
        say(f"{sentence}\n")
    for note in run.notes():
        say(note)
    if run.evaluations and (run.control is None or run.deciles_are_firm()):
        console.print(run.deciles().to_rich())
        if (sentence := run.deciles_sentence()) is not None:
            say(f"{sentence}\n")
    for sheet in filter(None, (run.tasks(), run.stages())):
        console.print(sheet.to_rich())
    if run.samples:
        samples = run.samples[-TERMINAL_THOUGHTS:]
        title = "Thoughts of the last steps, picked at random"
        console.print(thoughts(title, samples, TERMINAL_CHARACTERS).to_rich())
    for line in run.warning_lines():
        say(f"warning: {line}")
    for line in run.costs(seconds):
        say(line)
    if (directory.path / "report.html").exists():
        say(f"report:     {directory.path / 'report.html'}")
    say(f"checkpoint: {directory.checkpoints}/step-{run.last['step']:08d}")
    for command in run.commands():
        say(f"go on:      {command}")


# Pictures


def overview(run: RunRecords) -> list[Plot]:
    """Held-out NLL over compute, and what the thought is worth; without a thought, how the loss went."""
    name = "reward" if any(has(record, "reward") for record in run.metrics) else "loss"
    second = Plot(f"{name.capitalize()} in training", partial(_plot_curve, run=run, name=name))
    if found := run.after.get("counterfactual"):
        second = Plot("Does the thought matter?", partial(_plot_counterfactuals, found=found))
    return [Plot("Held-out NLL", partial(_plot_nll, run=run)), second]


def curves(run: RunRecords) -> list[Plot]:
    """Every metric over the steps."""
    return [Plot(name, partial(_plot_curve, run=run, name=name), CURVE_INCHES) for name in run.plotted]


def _plot_nll(axes: Axes, run: RunRecords) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    runs = [(run, run.name, RUN_COLOUR)]
    if run.control is not None:
        runs.append((run.control, f"control ({run.control.name})", CONTROL_COLOUR))
    for records, label, colour in runs:
        for name, how, style in (("nll_thought", "after its own thought", "-"), ("nll_text", "without thoughts", "--")):
            x, y = records.curve(records.evaluations, "flops", name)
            if x:
                axes.plot(x, y, style, color=colour, marker="o", markersize=3, label=f"{label}, {how}")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(unit="FLOP"))
    axes.set(xlabel="training compute", ylabel="nats per token (lower is better)")
    if run.evaluations:
        legend_below(axes)


def _plot_curve(axes: Axes, run: RunRecords, name: str) -> None:
    axes.plot(*run.curve(run.metrics, "step", name), color=RUN_COLOUR, linewidth=1)
    axes.set_xlabel("step")


def _plot_counterfactuals(axes: Axes, found: dict[str, dict[str, float]]) -> None:
    conditions = [c for c in CONDITIONS if c in found][::-1]
    nll = [found[c]["nll"] for c in conditions]
    # A bootstrap interval may miss the mean by a rounding error.
    below = [max(0.0, found[c]["nll"] - found[c]["low"]) for c in conditions]
    above = [max(0.0, found[c]["high"] - found[c]["nll"]) for c in conditions]
    colours = [RUN_COLOUR if c == "own" else OTHER_COLOUR for c in conditions]
    axes.barh([CONDITIONS[c] for c in conditions], nll, color=colours, xerr=[below, above], ecolor=INK, capsize=3)
    for i, value in enumerate(nll):
        axes.annotate(f"{value:.2f}", (value + above[i], i), (5, 0), textcoords="offset points", va="center")
    axes.margins(x=0.2)
    axes.set_xlabel("held-out NLL after it, nats per token, 95% intervals", loc="right")


# In files


def write_report(directory: RunDirectory, recipe: Recipe, seconds: float | None = None) -> Path:
    """Writes report.html, and report.png where matplotlib is installed; returns the former.

    seconds: what the whole training command took.
    """
    run = RunRecords(directory, recipe)
    if available():
        (directory.path / "report.png").write_bytes(to_png(drawn(overview(run), OVERVIEW_INCHES)))
    path = directory.path / "report.html"
    path.write_text(_page(run, seconds), encoding="utf-8")
    return path


def _page(run: RunRecords, seconds: float | None) -> str:
    title = f"{run.directory.path.resolve().name}: {run.name} on {run.recipe.data.reference}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        paragraph(_what_it_is(run)),
        pictures(overview(run)),
    ]
    parts.append(run.held_out().to_html() if run.evaluations else paragraph("No text was held out (data.held_out 0)."))
    counterfactuals, sentence = run.counterfactuals(), run.counterfactual_sentence()
    if counterfactuals is not None:
        parts += [
            counterfactuals.to_html(),
            paragraph("Only what its own thought gains over all the others is due to its content."),
        ]
    if sentence is not None:
        parts.append(paragraph(sentence))
    parts += map(paragraph, run.notes())
    if run.evaluations:
        parts.append(run.deciles().to_html())
        parts += map(paragraph, filter(None, [run.deciles_sentence()]))
    parts += [sheet.to_html() for sheet in filter(None, (run.tasks(), run.stages()))]
    parts += ["<h2>Warnings</h2>", bullets(run.warning_lines()) if run.warnings else paragraph("None.")]
    if run.samples:
        half = HTML_THOUGHTS // 2
        samples = run.samples if len(run.samples) <= HTML_THOUGHTS else run.samples[:half] + run.samples[-half:]
        picked = "Picked at random in the first and in the last steps"
        parts += ["<h2>Thoughts</h2>", thoughts(picked, samples, HTML_CHARACTERS).to_html()]
    parts += ["<h2>Training</h2>", pictures(curves(run), CURVE_WIDTH)]
    parts += [run.meanings().to_html(), bullets(run.costs(seconds))]
    parts += ["<h2>How to go on</h2>", block("\n".join(run.commands()))]
    parts += ["<h2>Recipe</h2>", block(recipe_to_yaml(run.recipe))]
    return html_page(title, REPORT_STYLE, "\n".join(parts))


def sentences(recipe: Recipe) -> list[str]:
    """What its objectives do, each in a sentence."""
    found = dict.fromkeys(find_objective(config.name).sentence for config in recipe.trained.values())
    return [sentence for sentence in found if sentence]


def _what_it_is(run: RunRecords) -> str:
    recipe = run.recipe
    steps = run.last["step"]
    tokens = steps * recipe.rows_per_step * recipe.data.length
    found = (
        f"{recipe.model} trained with {run.name} on {recipe.data.reference}: {steps:,} steps of "
        f"{recipe.rows_per_step} × {recipe.data.length:,} tokens, {tokens:,} in all. "
        + "".join(f"{sentence} " for sentence in sentences(recipe))
    )
    if run.control is not None:
        found += (
            f"The control learned by {run.control.name} from the same start on the same data for the same FLOPs, and "
            "is scored in the same way. "
        )
    return found + (
        "NLL is how surprised the model is by the true next token of text it was not trained on, in nats: "
        "lower is better."
    )
