"""What a run ends with: a table of held-out NLL before and after, a few thoughts, and where everything lies."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain.recipe import Recipe
from pretrain.run_directory import RunDirectory
from pretrain.samples import printable

SHOWN_THOUGHTS = 4


def print_report(directory: RunDirectory, recipe: Recipe, seconds: float) -> None:
    """Prints to standard output, from the run's own records."""
    console = Console(highlight=False)
    evaluations = directory.read(directory.evaluations)
    before, after = evaluations[0], evaluations[-1]
    console.print(_nll_table(before, after))
    console.print(_decile_table(before, after))
    samples = directory.read(directory.samples)[-SHOWN_THOUGHTS:]
    if samples:
        table = Table(title="Thoughts of the last steps, drawn at random", title_justify="left", show_lines=True)
        for column in ("text", "thought", "continues", "reward"):
            table.add_column(column)
        for sample in samples:
            words = (printable(sample[name]) for name in ("text", "thought", "continues"))
            table.add_row(*words, f"{sample['reward']:+.3f}")
        console.print(table)
    last = directory.read(directory.metrics)[-1]
    console.print(
        f"{last['step']} steps, {last['tokens']:,} tokens and {last['flops'] / 1e12:,.0f} TFLOP in "
        f"{last['seconds']:.0f} s of training; this command took {seconds:.0f} s"
    )
    console.print(f"checkpoint: {directory.checkpoints}/step-{last['step']:08d}", soft_wrap=True)
    console.print(f"export it:  forethought export {directory.path} OUT", soft_wrap=True)


def _nll_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    table = Table(title="Held-out NLL, nats per token", title_justify="left")
    for column in ("", f"before (step {before['step']})", f"after (step {after['step']})", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in (("nll_text", "without thoughts"), ("nll_thought", "with thoughts")):
        if name in after:
            table.add_row(label, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{after[name] - before[name]:+.4f}")
    return table


def _decile_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    thinks = "nll_thought" in after
    table = Table(title="By difficulty of the token (decile of its NLL before the run)", title_justify="left")
    columns = ["decile", "before", "after, without thoughts"]
    columns += ["after, with thoughts", "gain of thoughts"] if thinks else []
    for column in columns:
        table.add_column(column, justify="right")
    for i, first in enumerate(before["nll_text_deciles"]):
        text = after["nll_text_deciles"][i]
        row = [str(i + 1), f"{first:.4f}", f"{text:.4f}"]
        if thinks:
            thought = after["nll_thought_deciles"][i]
            row += [f"{thought:.4f}", f"{text - thought:+.4f}"]
        table.add_row(*row)
    return table
