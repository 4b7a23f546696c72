"""The benchmark's results as tables in a terminal and as a picture; rich and matplotlib are used if installed.

`python -m benchmarks.report FILE.json` prints and plots the results in a file.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
REACHED_COLOUR, MISSED_COLOUR, UNJUDGED_COLOUR = "#2a9d8f", "#e76f51", "#888888"
VERDICTS = {True: "yes", False: "no", None: "–"}


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def spread(record: Record | None) -> str:
    """Median and range."""
    if record is None:
        return "–"
    return f"{number(record['median'])} ({number(record['low'])}–{number(record['high'])})"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        print(f"\n{title}")
        for row in [columns, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=140).print(table)


def print_row(row: Record) -> None:
    """Prints one line as soon as a row is done."""
    medians = (f"{name} {number(ratio['median'])}" for name, ratio in row["ratios"].items())
    growth = (f"{name} ∝ {row['name']}^{g['exponent']:.2f}" for name, g in row.get("growth", {}).items())
    print(f"{row['part']}, {row['name']}: {row.get('failed') or '; '.join([*medians, *growth]) or 'done'}", flush=True)


def print_report(results: Record, parts: Collection[str]) -> None:
    """Prints everything measured in these parts, and all targets."""
    about, settings = results["environment"], results["settings"]
    variants, ratios, growth = [], [], []
    for row in (r for r in results["rows"] if r["part"] in parts):
        title = f"{row['part']}: {row['name']}"
        for name, measured in row["measured"].items():
            why = measured.get("failed") or measured.get("unsupported")
            seconds = textwrap.shorten(why, 44, placeholder="…") if why else spread(measured.get("seconds"))
            added = measured.get("added_bytes")
            flops = measured.get("flops", {}).get("median")
            rate = flops / measured["seconds"]["median"] / 1e9 if flops else None
            memory = None if added is None else added / 2**20
            variants.append([title, name, seconds, number(memory), number(rate)])
        ratios += [[title, name, spread(ratio)] for name, ratio in row["ratios"].items()]
        for name, g in row.get("growth", {}).items():
            growth.append([f"{name} of {row['name']}", f"{g['exponent']:.2f}", f"{100 * g['line_worst']:.0f}%"])
    where = f"{about['device']}, {settings['dtype']}, {settings['name']}"
    columns = ["row", "variant", "seconds: median (range)", "memory added, MiB", "GFLOP/s"]
    print_table(f"Time and memory; {where}", columns, variants)
    if ratios:
        print_table("Ratios, round by round", ["row", "ratio", "median (range)"], ratios)
    if growth:
        print_table("How the cost of a step grows", ["cost", "exponent", "worst deviation from a line"], growth)
    judged = [
        [
            f"{t['part']}: {t['row']}",
            t["ratio"],
            f"{t['sense']} {number(t['bound'])}",
            number(t["value"]),
            VERDICTS[t["reached"]],
        ]
        for t in results["targets"]
    ]
    print_table("Targets", ["row", "figure", "target", "measured", "reached"], judged)


def write_picture(results: Record, path: Path) -> Path | None:
    """Plots the margin of each target and how the cost of a step grows; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(14, 5), layout="constrained")
    targets, seconds, memory = figure.subplots(1, 3, width_ratios=[1.6, 1, 1])
    about, settings = results["environment"], results["settings"]
    figure.suptitle(f"{about['device']}, {settings['dtype']}, torch {about['torch']}, {settings['name']} size")
    _plot_targets(targets, results["targets"])
    curves = [row for row in results["rows"] if row["part"] == "curves" and not row.get("failed")]
    _plot_curves(seconds, curves, "seconds", "time")
    _plot_curves(memory, curves, "added_bytes", "memory")
    for axes in (targets, seconds, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _plot_targets(axes: Axes, targets: Sequence[Record]) -> None:
    known = [t for t in targets if t["value"] is not None][::-1]
    colours = {True: REACHED_COLOUR, False: MISSED_COLOUR, None: UNJUDGED_COLOUR}
    for i, t in enumerate(known):
        axes.plot([1, t["margin"]], [i, i], color=colours[t["reached"]], linewidth=2)
        axes.plot(t["margin"], i, "o", color=colours[t["reached"]])
        axes.annotate(
            f"{number(t['value'])} ({t['sense']} {number(t['bound'])})",
            (t["margin"], i),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize="x-small",
        )
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_yticks(range(len(known)), [f"{t['row']}: {t['ratio']}" for t in known], fontsize="x-small")
    if known:
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.08)
    axes.set(title="Targets", xlabel="margin, as a factor (right of 1: reached)")


def _plot_curves(axes: Axes, curves: Sequence[Record], figure: str, name: str) -> None:
    """Cost against each size, both relative to the smallest size."""
    for row in curves:
        costs = {
            int(x): m[figure]["median"] if figure == "seconds" else m[figure]
            for x, m in row["measured"].items()
            if m.get(figure)
        }
        if costs:
            first = min(costs)
            x, y = [v / first for v in costs], [cost / costs[first] for cost in costs.values()]
            axes.plot(x, y, marker="o", markersize=3, label=f"{row['name']} ({row['setting']['objective']})")
    if axes.lines:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.axline((1, 1), (2, 2), color="#bbbbbb", linestyle=":", linewidth=1, label="proportional")
        axes.legend(frameon=False, fontsize="x-small")
    axes.set(
        title=f"A step's {name}",
        xlabel="size, relative to the smallest",
        ylabel=f"{name}, relative to the smallest size",
    )


def main(path: Path) -> None:
    results = json.loads(path.read_text())
    print_report(results, {row["part"] for row in results["rows"]})
    picture = write_picture(results, path.with_suffix(".png"))
    print(f"wrote {picture}" if picture else "no picture: matplotlib is not installed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
