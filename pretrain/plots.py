"""Plots of reports: drawn once, as SVG in a page, whose text colour they take, and as PNG for slides and Markdown.

matplotlib is imported when something is drawn; without it only `available` and `pictures` can be called.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.page import paragraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, orange, green, purple, light blue and yellow, which the colour-blind tell apart (Okabe and Ito), and grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c8c")
# Stands for the colour of the page's text, which is light on a dark page.
INK = "#010203"
INCHES = (3.9, 3.0)
LEAST_WIDTH = "20rem"  # of a picture on a page


@dataclass(frozen=True)
class Plot:
    """A picture. draw: all but the title."""

    title: str
    draw: Callable[[Axes], None]
    inches: tuple[float, float] = INCHES

    def figure(self) -> Figure:
        return drawn([self], self.inches)


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def drawn(plots: list[Plot], inches: tuple[float, float]) -> Figure:
    """Plots beside each other."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, INK) | {"font.size": 8.5, "axes.titlesize": 9.5}
    with rc_context(style | dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)):
        figure = Figure(figsize=inches, layout="constrained")
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            # Axes beside long labels are narrower than their title.
            axes.set_title(plot.title) if len(plots) > 1 else figure.suptitle(plot.title, fontsize=9.5)
            plot.draw(axes)
        figure.draw_without_rendering()
    return figure


def legend_below(axes: Axes, columns: int = 2) -> None:
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=columns)


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def to_svg(figure: Figure, title: str) -> str:
    """An element of HTML: text is text, and what is black takes the colour of the page's text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "forethought"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    found = buffer.getvalue()
    # Numbered ids would not be the only ones of a page; those of shapes that are used again say what they are.
    found = re.sub(r'(?<=<g) id="[^"]*"', "", found[found.index("<svg") :]).replace(INK, "currentColor")
    box = re.search(r'viewBox="[^"]*"', found)
    assert box is not None
    return f'<svg role="img" aria-label="{escape(title)}" {box[0]}>' + found[found.index(">") + 1 :].strip()


def pictures(plots: Iterable[Plot], least: str = LEAST_WIDTH, pngs: Path | None = None) -> str:
    """HTML: as many beside each other as are each at least so wide, on a phone one below the other.

    pngs: a folder for the same as PNG, by their titles.
    """
    if not available():
        return paragraph("No pictures: matplotlib is not installed. pip install matplotlib")
    found = []
    for plot in plots:
        figure = plot.figure()
        found.append(to_svg(figure, plot.title))
        if pngs is not None:
            pngs.mkdir(exist_ok=True)
            (pngs / f"{re.sub(r'[^a-z0-9]+', '-', plot.title.lower()).strip('-')}.png").write_bytes(to_png(figure))
    return f'<div class="pictures" style="--least:{least}">{"".join(found)}</div>'
