"""The report of a run, from its records: tables and thoughts on the terminal, report.html and report.png.

The picture shows what the run is about: held-out NLL over compute, beside that of the control, and whether the thought
matters. The HTML stands alone: pictures are inside it, it loads nothing and runs nothing.
"""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from data_pipelines.lab import END_OF_DOCUMENT
from objectives import Metric, find_objective
from pretrain.evaluation.held_out import ENOUGH_DOCUMENTS
from pretrain.page import html_page
from pretrain.recipe import Recipe
from pretrain.recipe_files import recipe_to_yaml
from pretrain.run_directory import RunDirectory
from pretrain.samples import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

TERMINAL_THOUGHTS, TERMINAL_CHARACTERS = 4, 300
HTML_THOUGHTS, HTML_CHARACTERS = 12, 2000
# With fewer tokens a decile is too noisy to be shown beside a control, which says more.
DECILE_TOKENS = 100
FEW = f"* of fewer than {ENOUGH_DOCUMENTS} documents: too few for an interval, which is too narrow"

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
NOT_PLOTTED = ("step", "tokens", "flops", "seconds", "weights_step")
RUN_COLOUR, CONTROL_COLOUR, OTHER_COLOUR = "#0072b2", "#d55e00", "#9a9a9a"

STYLE = """
h1, p, li { overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: 1.5rem 0 }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8886; text-align: right; vertical-align: top }
th:first-child, td:first-child, .words th, .words td { text-align: left }
.words td + td { overflow-wrap: anywhere; min-width: 6rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); gap: .5rem }
.pictures img { width: 100%; border-radius: 6px }
pre { overflow: auto; padding: 1rem; background: #8882; border-radius: 6px }
@media print {
  body { margin: 0; max-width: none; font-size: 9pt }
  .wide { overflow: visible }
  .pictures { grid-template-columns: repeat(auto-fill, minmax(calc(var(--least) * .75), 1fr)) }
  pre { white-space: pre-wrap; overflow-wrap: anywhere }
}
"""


@dataclass(frozen=True)
class Sheet:
    """A table, on a terminal or in HTML. words: of text, not of numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    words: bool = False

    def to_rich(self) -> Table:
        style = box.HORIZONTALS if self.words else box.SIMPLE_HEAD
        table = Table(title=self.title, title_justify="left", show_lines=self.words, box=style)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if self.words or i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_html(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        rows = "\n".join(line(row, "td") for row in self.rows)
        kind = ' class="words"' if self.words else ""
        head = f"<caption>{escape(self.title)}</caption>\n<thead>{line(self.columns, 'th')}</thead>"
        return f'<div class="wide"><table{kind}>\n{head}\n<tbody>\n{rows}\n</tbody>\n</table></div>'


class RunRecords:
    """The records of a run, and of its control if that came to its end."""

    def __init__(self, directory: RunDirectory, recipe: Recipe):
        self.directory, self.recipe, self.name = directory, recipe, recipe.objective.name
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
            if _known(after, name):
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
        if "nll_thought_deciles" not in self.after:
            return None
        return (
            "raw gain is no gain by thinking: anything that disturbs a prediction helps hard tokens and hurts easy ones"
        )

    def deciles_are_firm(self) -> bool:
        return self.after.get("tokens_scored", math.inf) >= DECILE_TOKENS * len(self.after["nll_text_deciles"])

    def tasks(self) -> Sheet | None:
        """What `forethought evaluate` found, the last line of each score."""
        rows = {}
        for record in self.downstream:
            for score in record["scores"]:
                key = (str(record["step"]), *(score[name] for name in ("task", "metric")), record["think"])
                key += (f"{score['temperature']:g}",)
                interval = _interval(score) if math.isfinite(score["low"]) else ""
                rows[key] = [*key, f"{score['value']:.3f} {interval}", str(score["documents"])]
        columns = ["step", "task", "metric", "thoughts", "temperature", "score", "problems"]
        return Sheet("Downstream tasks (95% intervals)", columns, [*rows.values()]) if rows else None

    def thoughts(self, title: str, samples: list[Record], longest: int) -> Sheet:
        rows = [
            [
                str(sample["step"]),
                *(_cut(printable(sample[name]), longest) for name in ("text", "thought", "continues")),
                f"{sample['reward']:+.3f}",
            ]
            for sample in samples
        ]
        return Sheet(title, ["step", "text", "thought", "continues", "reward"], rows, words=True)

    @property
    def plotted(self) -> list[str]:
        """Names of the metrics that have curves."""
        logged = dict.fromkeys(name for record in self.metrics for name in record if _known(record, name))
        return [name for name in logged if name not in NOT_PLOTTED and not name.startswith("data/")]

    @property
    def known_metrics(self) -> dict[str, Metric]:
        return {**find_objective(self.name).all_metrics(), **LOOP_METRICS}

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
        points = [(record[x], record[name]) for record in records if _known(record, name)]
        return [p[0] for p in points], [p[1] for p in points]

    # Commands

    def commands(self) -> list[str]:
        path = shlex.quote(str(self.directory.path))
        found = [f"forethought export {path} OUT"]
        if self.recipe.objective.showing(None, 0.0, 1) is not None:
            found.append(f"forethought sample {path} --text {shlex.quote(self._text_to_think_about())}")
        return found

    def _text_to_think_about(self) -> str:
        """Where the model thinks only at a marker, a text that has one and a token to predict behind it."""
        positions = getattr(self.recipe.objective, "positions", None)
        read = [
            sample["text"] + sample["continues"].removesuffix(END_OF_DOCUMENT)
            for sample in self.samples
            if sample["text"].isprintable()
        ]
        return read[-1] if positions == "marker" and read else "The capital of France is"


def _known(record: Record, name: str) -> bool:
    """Whether a record has a number of that name."""
    value = record.get(name)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shown(name: str, record: Record) -> str:
    if not _known(record, name):
        return ""
    return f"{record[name]:.4f}" if name.startswith("nll") else f"{record[name]:.1%}"


def _change(name: str, before: Record, after: Record) -> str:
    if not _known(before, name):
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
    if (tasks := run.tasks()) is not None:
        console.print(tasks.to_rich())
    if run.samples:
        samples = run.samples[-TERMINAL_THOUGHTS:]
        title = "Thoughts of the last steps, picked at random"
        console.print(run.thoughts(title, samples, TERMINAL_CHARACTERS).to_rich())
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


def overview(run: RunRecords) -> Figure:
    """Held-out NLL over compute, and what the thought is worth. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, plot in zip(figure.subplots(1, 2), (_plot_nll, _plot_thought), strict=True):
        plot(axes, run)
    return figure


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
    axes.set(title="Held-out NLL", xlabel="training compute", ylabel="nats per token (lower is better)")
    if run.evaluations:
        axes.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_thought(axes: Axes, run: RunRecords) -> None:
    """What the thought is worth; without a thought, how the loss went."""
    if run.after.get("counterfactual"):
        _plot_counterfactuals(axes, run.after["counterfactual"])
    else:
        name = "reward" if any(_known(record, "reward") for record in run.metrics) else "loss"
        axes.plot(*run.curve(run.metrics, "step", name), color=RUN_COLOUR)
        axes.set(title=f"{name.capitalize()} in training", xlabel="step", ylabel=name)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_counterfactuals(axes: Axes, found: dict[str, dict[str, float]]) -> None:
    conditions = [c for c in CONDITIONS if c in found][::-1]
    nll = [found[c]["nll"] for c in conditions]
    # A bootstrap interval may miss the mean by a rounding error.
    below = [max(0.0, found[c]["nll"] - found[c]["low"]) for c in conditions]
    above = [max(0.0, found[c]["high"] - found[c]["nll"]) for c in conditions]
    colours = [RUN_COLOUR if c == "own" else OTHER_COLOUR for c in conditions]
    axes.barh([CONDITIONS[c] for c in conditions], nll, color=colours, xerr=[below, above], ecolor="#333333", capsize=3)
    for i, value in enumerate(nll):
        axes.text(value + above[i], i, f"  {value:.2f}", va="center")
    axes.margins(x=0.15)
    axes.set(title="Does the thought matter?", xlabel="held-out NLL after it, nats per token, 95% intervals")


def panels(run: RunRecords) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The overview's halves, and the curve of every metric over the steps: PNG by title. Apart, so that a narrow page
    puts them below each other. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    def drawn(width: float, height: float, plots: Iterable[Callable[[Axes], None]]) -> dict[str, bytes]:
        found = {}
        for plot in plots:
            figure = Figure(figsize=(width, height), layout="constrained")
            axes = figure.subplots()
            plot(axes)
            found[axes.get_title()] = _png(figure)
        return found

    def curve(axes: Axes, name: str) -> None:
        axes.plot(*run.curve(run.metrics, "step", name), color=RUN_COLOUR, linewidth=1)
        axes.set_title(name, fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.yaxis.get_offset_text().set_fontsize("x-small")
        axes.spines[["top", "right"]].set_visible(False)

    return (
        drawn(5.5, 4.2, (partial(plot, run=run) for plot in (_plot_nll, _plot_thought))),
        drawn(2.75, 1.9, (partial(curve, name=name) for name in run.plotted)),
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


# In files


def write_report(directory: RunDirectory, recipe: Recipe, seconds: float | None = None) -> Path:
    """Writes report.html, and report.png where matplotlib is installed; returns the former.

    seconds: what the whole training command took.
    """
    run = RunRecords(directory, recipe)
    overviews: dict[str, bytes] | None = None
    curves: dict[str, bytes] | None = None
    try:
        overviews, curves = panels(run)
        (directory.path / "report.png").write_bytes(_png(overview(run)))
    except ImportError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
    path = directory.path / "report.html"
    path.write_text(_page(run, seconds, overviews, curves), encoding="utf-8")
    return path


def _page(
    run: RunRecords, seconds: float | None, overviews: dict[str, bytes] | None, curves: dict[str, bytes] | None
) -> str:
    title = f"{run.directory.path.resolve().name}: {run.name} on {run.recipe.data.reference}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _paragraph(_what_it_is(run)),
        _pictures(overviews, "22rem"),
    ]
    parts.append(run.held_out().to_html() if run.evaluations else _paragraph("No text was held out (data.held_out 0)."))
    counterfactuals, sentence = run.counterfactuals(), run.counterfactual_sentence()
    if counterfactuals is not None:
        parts += [
            counterfactuals.to_html(),
            _paragraph("Only what its own thought gains over all the others is due to its content."),
        ]
    if sentence is not None:
        parts.append(_paragraph(sentence))
    parts += map(_paragraph, run.notes())
    if run.evaluations:
        parts.append(run.deciles().to_html())
        parts += map(_paragraph, filter(None, [run.deciles_sentence()]))
    if (tasks := run.tasks()) is not None:
        parts.append(tasks.to_html())
    parts += ["<h2>Warnings</h2>", _list(run.warning_lines()) if run.warnings else _paragraph("None.")]
    if run.samples:
        half = HTML_THOUGHTS // 2
        samples = run.samples if len(run.samples) <= HTML_THOUGHTS else run.samples[:half] + run.samples[-half:]
        picked = "Picked at random in the first and in the last steps"
        parts += ["<h2>Thoughts</h2>", run.thoughts(picked, samples, HTML_CHARACTERS).to_html()]
    parts += ["<h2>Training</h2>", _pictures(curves, "13rem")]
    parts += [run.meanings().to_html(), _list(run.costs(seconds))]
    parts += ["<h2>How to go on</h2>", _block("\n".join(run.commands()))]
    parts += ["<h2>Recipe</h2>", _block(recipe_to_yaml(run.recipe))]
    return html_page(title, STYLE, "\n".join(parts))


def _what_it_is(run: RunRecords) -> str:
    recipe = run.recipe
    steps = run.last["step"]
    tokens = steps * recipe.rows_per_step * recipe.data.length
    found = (
        f"{recipe.model} trained with {run.name} on {recipe.data.reference}: {steps:,} steps of "
        f"{recipe.rows_per_step} × {recipe.data.length:,} tokens, {tokens:,} in all. "
        f"{find_objective(run.name).sentence}".rstrip()
        + " "
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


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _block(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _pictures(pngs: dict[str, bytes] | None, least: str) -> str:
    """Pictures by their titles, as many beside each other as are each at least so wide."""
    if pngs is None:
        return _paragraph("No pictures: matplotlib is not installed. pip install matplotlib")
    images = "".join(
        f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in pngs.items()
    )
    return f'<div class="pictures" style="--least:{least}">{images}</div>'
