"""What our HTML pages have in common: they stand alone, load nothing and run nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from rich import box
from rich.table import Table

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
caption { text-align: left; font-weight: 600 }
"""
# Of reports. On a phone each row of a table is a list of its own, every value beside its column's name.
REPORT_STYLE = """
h1, h2, p, li { overflow-wrap: anywhere }
h1 { line-height: 1.2 }
.wide { overflow-x: auto; margin: 1.5rem 0 }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8886; text-align: right; vertical-align: top }
th:first-child, td:first-child, .words th, .words td { text-align: left }
th { white-space: pre-line }
.words td + td { overflow-wrap: anywhere; min-width: 6rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); gap: 1rem }
.pictures svg { width: 100%; height: auto }
.pictures text { font-family: system-ui, sans-serif !important }
pre { overflow: auto; padding: 1rem; background: #8882; border-radius: 6px }
@media screen and (max-width: 40rem) {
  table, caption, tbody, tr { display: block }
  thead { display: none }
  tr { padding: .4rem 0; border-bottom: 1px solid #8886 }
  td { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0 }
  td:empty { display: none }
  td::before { content: attr(data-column); flex: none; max-width: 55%; text-align: left }
  td:first-child { justify-content: start; font-weight: 600 }
  .words td { display: block; overflow-wrap: anywhere }
  .words td::before { content: attr(data-column) ": "; font-style: italic }
}
@media print {
  body { margin: 0; max-width: none; font-size: 9pt }
  .wide { overflow: visible }
  svg, tr, h2 + p { break-inside: avoid }
  h2, caption { break-after: avoid }
  .pictures { grid-template-columns: repeat(auto-fill, minmax(calc(var(--least) * .75), 1fr)) }
  pre { white-space: pre-wrap; overflow-wrap: anywhere }
}
"""


def html_page(title: str, style: str, body: str) -> str:
    """A whole page; `body` is HTML, the title text."""
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Thoughts are text that nobody has reviewed: should a tag in one ever escape, it can do nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


@dataclass(frozen=True)
class Sheet:
    """A table, on a terminal, in HTML or in Markdown. words: of text, not of numbers."""

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
        def shown(cell: str) -> str:
            # Intervals stay in one line.
            return escape(cell) if self.words else escape(cell).replace(", ", ",&nbsp;")

        columns = [escape(" ".join(column.split())) for column in self.columns]
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = "\n".join(
            "<tr>"
            + "".join(
                f'<td data-column="{column}">{shown(cell)}</td>' for column, cell in zip(columns, row, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        kind = ' class="words"' if self.words else ""
        return (
            f'<div class="wide"><table{kind}>\n<caption>{escape(self.title)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
        )

    def to_markdown(self) -> str:
        """Without its title."""
        rows = (self.columns, ["---"] * len(self.columns), *self.rows)
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def block(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
