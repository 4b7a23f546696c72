"""A text with the thoughts of its tokens as one page, for slides, phones and paper.

Each token is a link to the card of the thought before it. On a screen only the card that was asked for is shown, beside
the text or, on a phone, below it, by `:target` alone: the page needs no script, and a link to `#card-12` opens there.
On paper, and in browsers that know none of this, all cards follow the text.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from pretrain.new_file import new_file
from pretrain.page import html_page
from pretrain.samples import GAIN, LESS_LIKELY_RGB, LIKELIER_RGB, PART, Candidate, Reading, printable

# A tint of at most half a colour over the page's own background, which black and white text both stay readable on.
STYLE = """
h1 { font-size: 1.4rem; margin: 0 }
header p, footer p { margin: .25rem 0 }
.text { font-size: 1.2rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; margin: 1.5rem 0 }
.text a { color: inherit; text-decoration: none }
.gain { --share: 1; padding-block: .15em; background: rgb(var(--tint) / calc(var(--share) * .5));
  border-bottom: 2px solid rgb(var(--tint) / var(--share)); print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.likelier { --tint: LIKELIER }
.less { --tint: LESS_LIKELY; border-bottom-style: dotted }
.key { padding-inline: .3em }
a:focus-visible, .text a:target { outline: 2px solid; outline-offset: 1px }
.card { white-space: normal; overflow-wrap: anywhere; break-inside: avoid }
.card header { display: flex; justify-content: space-between; gap: 1rem; align-items: start }
.card h2 { font-size: 1rem; font-weight: 400; margin: .4rem 0 }
.card p { margin: .5rem 0 }
.card q, .card mark, th { white-space: pre-wrap; font-style: normal }
.card q { font-weight: 600 }
mark { background: #8884; color: inherit; font-weight: 600; padding: .1em; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.lists { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; font-size: .85rem }
.lists table { width: 100%; table-layout: fixed }
.lists th, .lists td { text-align: left; font-weight: 400; padding: .1rem 0; vertical-align: top }
.lists td { width: 3.6rem; text-align: right; font-variant-numeric: tabular-nums }
.lists .true th { font-weight: 700 }
.bar { display: block; height: .3rem; background: #7d8590; border-radius: 2px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.true .bar { background: rgb(LIKELIER) }
nav { flex: none }
nav a { display: inline-block; min-width: 2.75rem; padding: .4rem 0; text-align: center; color: inherit }
@media screen {
  .card { display: none; position: fixed; inset: auto 0 0; max-height: 60vh; overflow: auto; box-sizing: border-box;
    padding: .75rem 1rem; background: Canvas; border-top: 1px solid #8888; box-shadow: 0 0 1.5rem #0004 }
  .card:target { display: block }
  body:has(.card:target) { padding-bottom: 62vh }
}
@media screen and (min-width: 60rem) {
  body { max-width: 38rem; margin-left: max(1rem, calc(50vw - 32rem)) }
  .card { inset: 2rem max(1rem, calc(50vw - 32rem)) auto auto; width: 23rem; max-height: calc(100vh - 4rem);
    border: 1px solid #8888; border-radius: 8px; box-shadow: none }
  body:has(.card:target) { padding-bottom: 0 }
  body:not(:has(.card:target)) .first { display: block }
}
@media print {
  body { margin: 0; max-width: none; font-size: 8pt; line-height: 1.3 }
  .text { font-size: 12pt }
  .cards { columns: 3; column-gap: 1.5rem }
  .card { border-top: 1px solid #8888; padding: .2rem 0 }
  .card h2, .card p, .lists { font-size: inherit; margin: .2rem 0 }
  .lists { gap: .5rem }
  .lists td { width: 2.6rem }
  nav, .hint { display: none }
}
""".replace("LIKELIER", " ".join(map(str, LIKELIER_RGB))).replace("LESS_LIKELY", " ".join(map(str, LESS_LIKELY_RGB)))
CONTEXT = 8  # tokens before the one that a card is of


def write_page(reading: Reading, path: Path) -> None:
    """Writes the page atomically. Raises CheckpointError if something has its name, or if it cannot be written."""
    with new_file(path, "--html") as file:
        # Names of files may hold bytes that are no text.
        file.write(reading_page(reading).encode(errors="backslashreplace"))


def reading_page(reading: Reading) -> str:
    """The page; the same for the same reading."""
    positions = reading.positions
    # The thought behind a token is before the next one, whose card shows it; the last one is before what is not there.
    numbers = [n for n, p in enumerate(positions, start=1) if p.thought is not None]
    tokens = [_token(reading, n) for n in range(len(positions) + (len(positions) in numbers))]
    gains = {n: abs(positions[n - 1].gain or 0.0) for n in numbers}
    first = max(numbers, key=lambda n: gains[n], default=None)
    cards = [
        _card(reading, n, previous, following, n == first)
        for previous, n, following in zip([None, *numbers], numbers, [*numbers[1:], None], strict=False)
    ]
    # The token whose card is open.
    opened = ", ".join(f":root:has(#card-{n}:target) #token-{n}" for n in numbers)
    style = STYLE + (f"@media screen {{ {opened} {{ outline: 2px solid; outline-offset: 1px }} }}\n" if numbers else "")
    key = "".join(
        f'<span class="key gain {kind}">{label}</span> '
        for kind, label in (("likelier", "likelier with the thought"), ("less", "less likely"))
    )
    title = printable(reading.title)
    header = (
        f"<header>\n<h1>{escape(title)}</h1>\n"
        f"<p>{escape(printable(f'{reading.model} {reading.thinking}'))}</p>\n<p>{escape(reading.summary())}</p>\n"
        f"<p>{key}full colour from ±{reading.full_colour:.2f} nats on. "
        '<span class="hint">Choose a token for the thought before it.</span></p>\n</header>'
    )
    text = f'<main>\n<div class="text" id="text" dir="auto" lang="">{"".join(tokens)}</div>\n</main>'
    footer = f"<footer>\n<p>Gain: {escape(GAIN)}. ✓ the true next token.</p>\n</footer>"
    body = "\n".join([header, text, '<section class="cards">', *cards, "</section>", footer])
    return html_page(f"{title}: thoughts while reading", style, body)


def _token(reading: Reading, n: int) -> str:
    """A token of the text, in the colour of what the thought before it gained."""
    token = reading.positions[n].text or PART if n < len(reading.positions) else " …"
    # A line break is seen, and breaks the line.
    words = escape("\n".join(map(printable, token.split("\n")))).replace("\n", "↵\n")
    before = reading.positions[n - 1] if n > 0 else None
    if before is None or before.thought is None:
        return f"<span>{words}</span>"
    kind = ""
    if before.gain is not None:
        share = min(1.0, abs(before.gain) / reading.full_colour)
        kind = f' class="gain {"likelier" if before.gain > 0 else "less"}" style="--share:{share:.2f}"'
    return f'<a id="token-{n}" href="#card-{n}"{kind}>{words}</a>'


def _card(reading: Reading, n: int, previous: int | None, following: int | None, first: bool) -> str:
    """What the model thought before the n-th token, and how that moved its prediction of it. first: shown at first."""
    position = reading.positions[n - 1]
    context = printable("".join(p.text for p in reading.positions[max(0, n - CONTEXT) : n]))
    token = "…" if position.next_token is None else escape(printable(position.next_token))
    gain = "what comes next is not in the text"
    if position.gain is not None:
        gain = (
            f"gain <strong>{position.gain:+.3f} nats</strong>: probability {_probability(position.nll_without)} without"
            f" the thought, {_probability(position.nll_with)} with it"
        )
    links = [("←", "previous", previous), ("→", "next", following)]
    moves = "".join(f'<a href="#card-{to}" aria-label="{label}">{sign}</a>' for sign, label, to in links if to)
    lists = "".join(
        _list(title, candidates)
        for title, candidates in (
            ("without", position.likeliest_without),
            ("with", position.likeliest_with),
        )
    )
    return (
        f'<article class="card{" first" if first else ""}" id="card-{n}">\n'
        f'<header><h2 dir="auto">{escape(context)}<mark>{token}</mark></h2>\n'
        f'<nav aria-label="thoughts">{moves}<a href="#token-{n}" aria-label="close">×</a></nav></header>\n'
        f"<p>thought <q>{_words(position.thought or '')}</q></p>\n<p>{gain}</p>\n"
        f'<div class="lists">{lists}</div>\n</article>'
    )


def _list(title: str, candidates: tuple[Candidate, ...]) -> str:
    """The likeliest next tokens with bars, the true one among them or below them."""
    lines = [
        f'<tr class="{"true" if c.true else "other"}"><th scope="row">{"✓ " if c.true else ""}{_spaced(c.token)}'
        f'<span class="bar" style="width:{c.probability:.1%}"></span></th><td>{c.probability:.1%}</td></tr>'
        for c in candidates
    ]
    return f"<table><caption>{title}</caption>{''.join(lines)}</table>"


def _spaced(token: str) -> str:
    """A token that stands alone, where a space at its beginning is not seen."""
    return _words(token.replace(" ", "␣"))


def _words(words: str) -> str:
    return f"<bdi>{escape(printable(words))}</bdi>"


def _probability(nll: float | None) -> str:
    return f"{math.exp(-(nll or 0.0)):.2%}"
