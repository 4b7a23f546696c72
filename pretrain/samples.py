"""Thoughts for people to read: those of training in samples.jsonl, those of a text on the terminal or as a page."""

from __future__ import annotations

import codecs
import math
import sys
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text as RichText

from checkpoints.errors import CheckpointError
from data_pipelines import DataError, Tokenizer
from models.logprobs import top_tokens
from models.philox import Rng
from models.thoughts import Text, Thoughts
from objectives import Objective, ObjectiveConfig, find_objective
from pretrain.opening import OpenedModel, longest_sequence

CONTEXT_TOKENS = 24
CONTINUATION_TOKENS = 6
DEFAULT_LENGTH = 8  # of the thoughts of a model that does not say how it was trained
LIKELIEST, TERMINAL_LIKELIEST = 5, 2  # next tokens that are shown of a distribution
GAIN = "log-probability of the true next token with the thought minus that without it, in nats"
PART = "·"  # a token that is but the beginning of a character, where the text is shown
PIPE_COLUMNS = 160  # of a table that no terminal limits
# Blue and orange, which the colour-blind tell apart (Okabe and Ito).
LIKELIER_RGB, LESS_LIKELY_RGB = (0, 114, 178), (213, 94, 0)


def printable(words: str) -> str:
    """Text with line breaks and other characters that have no shape of their own escaped; joiners stay, which scripts
    need, and directional controls do not, which would turn what is printed behind them."""
    kept = ("\u200c", "\u200d")
    return "".join(
        c if c.isprintable() or c in kept or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in words
    )


def describe_thought(thoughts: Thoughts, row: int, k: int, m: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Where a thought is, the text before it, the thought, and the true continuation."""
    text, anchor = thoughts.anchors.text, int(thoughts.anchors.index_BM[row, m])
    document = text.document_BN[row]
    inside = [n for n in range(text.shape[1]) if document[n] == document[anchor]]
    before = [n for n in inside if n <= anchor][-CONTEXT_TOKENS:]
    after = [n for n in inside if n > anchor][:CONTINUATION_TOKENS]
    words = text.tokens_BN[row].tolist()
    thought = [token for token in thoughts.tokens_BKSM[row, k, :, m].tolist() if token >= 0]
    return {
        "sample_id": int(text.sample_id_B[row]),
        "position": anchor,
        "text": tokenizer.decode([words[n] for n in before]),
        "thought": tokenizer.decode(thought),
        "continues": tokenizer.decode([words[n] for n in after]),
    }


def check_sampling(length: int | None, temperature: float) -> None:
    """Raises CheckpointError for thoughts that cannot be sampled."""
    if length is not None and length < 1:
        raise CheckpointError(f"--length must be at least 1, got {length}")
    # fp32 logits overflow where they are divided by much less.
    if temperature != 0 and not 1e-6 <= temperature < math.inf:
        raise CheckpointError(f"--temperature must be 0 (greedy) or at least 1e-6, got {temperature}")


# A text that is read with thoughts


@dataclass(frozen=True)
class Candidate:
    """A next token with its probability; true: the text goes on with it."""

    token: str
    probability: float
    true: bool


@dataclass(frozen=True)
class Position:
    """A token of a text, the thought behind it, and how that moved the prediction of the next token.

    text: what it adds to the text, nothing where it begins a character that a later token completes. next_token: the
    true one, None where the text ends. nll_without, nll_with: its NLL in nats. likeliest_without,
    likeliest_with: the likeliest next tokens in order, and the true one if it is none of them. All but the token are
    missing where the model does not think.
    """

    token: str
    text: str
    thought: str | None = None
    next_token: str | None = None
    nll_without: float | None = None
    nll_with: float | None = None
    likeliest_without: tuple[Candidate, ...] = ()
    likeliest_with: tuple[Candidate, ...] = ()

    @property
    def gain(self) -> float | None:
        """The information gain: how much likelier the thought makes the true next token, in nats."""
        if self.nll_without is None or self.nll_with is None:
            return None
        return self.nll_without - self.nll_with


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it.

    title: what the model is called. model: how it was trained, thinking: how it thinks here, in sentences.
    """

    title: str
    model: str
    thinking: str
    positions: list[Position]

    @property
    def full_colour(self) -> float:
        """The gain in nats from which on a token is shown in full colour, so that a few outliers pale no others."""
        sizes = sorted(abs(p.gain) for p in self.positions if p.gain is not None)
        return max(sizes[int(0.9 * (len(sizes) - 1))], 0.01) if sizes else 1.0

    def summary(self) -> str:
        without = [p.nll_without for p in self.positions if p.nll_without is not None]
        with_ = [p.nll_with for p in self.positions if p.nll_with is not None]
        gains = [p.gain for p in self.positions if p.gain is not None]
        return (
            f"{len(gains)} tokens, mean NLL {fmean(without):.3f} nats without a thought, {fmean(with_):.3f} with one: "
            f"gain {fmean(gains):+.3f}; {sum(gain > 0 for gain in gains)} became likelier."
        )


def text_of_file(path: str) -> str:
    """The text of a file, of standard input for `-`. Raises DataError."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give --file a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


@torch.no_grad()
def read_with_thoughts(
    opened: OpenedModel, reference: str, words: str, length: int | None, temperature: float, seed: int
) -> Reading:
    """A text with the thought at each position where the model thinks.

    Raises CheckpointError for a model that was not trained to think, or that cannot do so in this way.
    """
    check_sampling(length, temperature)
    model, tokenizer = opened.model, opened.tokenizer
    ids = tokenizer.encode([words])[0]
    if not ids:
        raise CheckpointError("there is nothing to read; give some words in --text or --file")
    text = Text.from_rows(torch.tensor([ids]))
    objective = _objective(opened, text, length, temperature)
    scores = objective.evaluate(model, text, Rng(seed, 0))
    assert scores.thoughts is not None and scores.thought_nll_BN is not None and scores.bodies is not None
    anchors, state = scores.bodies.anchors, model.read(text)
    places_M = anchors.index_BM[0]
    hidden = (state.hidden_BNW[0, places_M.clamp(min=0)], objective.hidden_after(model, state, scores.bodies)[0])
    top = [[x_MT.tolist() for x_MT in top_tokens(x_MW, model.head_weight_VW, LIKELIEST)] for x_MW in hidden]
    positions = list(map(Position, (_token(tokenizer, id) for id in ids), added_texts(tokenizer, ids)))
    for m, n in enumerate(places_M.tolist()):
        if n < 0:
            continue
        said = [t for t in scores.thoughts.tokens_BKSM[0, 0, :, m].tolist() if t >= 0]
        true = ids[n + 1] if scores.valid_BN[0, n] else None
        without, with_ = (
            x_BN[0, n].item() if true is not None else None for x_BN in (scores.text_nll_BN, scores.thought_nll_BN)
        )
        likeliest = [
            _candidates(tokenizer, tokens_MT[m], logprobs_MT[m], true, nll)
            for (tokens_MT, logprobs_MT), nll in zip(top, (without, with_), strict=True)
        ]
        positions[n] = replace(
            positions[n],
            thought=tokenizer.decode(said),
            next_token=None if true is None else positions[n + 1].token,
            nll_without=without,
            nll_with=with_,
            likeliest_without=likeliest[0],
            likeliest_with=likeliest[1],
        )
    drawn = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}, seed {seed}"
    longest = objective.config.thought_length
    tokens = f" of {longest[1]} tokens at most" if longest is not None else ""
    return Reading(*_described(opened, reference), f"Here thoughts{tokens} are {drawn}.", positions)


def _described(opened: OpenedModel, reference: str) -> tuple[str, str]:
    """What a model is called, and how it was trained as far as is known, in sentences."""
    recipe = opened.recipe
    if recipe is None or opened.state is None:
        name = Path(reference).resolve().name if Path(reference).exists() else reference
        when = "at every token" if opened.model.mixing_head is not None else "before an answer"
        return name, f"An exported model, trained to think {when}."
    run = opened.tokenizer_directory.parent.resolve().name
    data = ", ".join(source.reference for source in recipe.data.sources.values())
    trained = f"{recipe.model} trained with {recipe.trained_with} on {data}."
    return (
        f"{run}, step {opened.state['step']:,}",
        f"{trained} {find_objective(recipe.thinking.name).sentence}".strip(),
    )


def _token(tokenizer: Tokenizer, id: int) -> str:
    """A token as text, also where it is part of a character, a control token, or none at all."""
    spelled = tokenizer.token_bytes[id] if id < tokenizer.size else None
    return spelled.decode(errors="backslashreplace") if spelled is not None else tokenizer.decode([id]) or f"[{id}]"


def added_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text: a character of several tokens is its last one's."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    spelled = [tokenizer.token_bytes[id] for id in ids]
    return [_token(tokenizer, id) if s is None else decoder.decode(s) for id, s in zip(ids, spelled, strict=True)]


def _candidates(
    tokenizer: Tokenizer, ids: list[int], logprobs: list[float], true: int | None, nll: float | None
) -> tuple[Candidate, ...]:
    """The likeliest next tokens, and the true one, whose NLL is known, if it is none of them."""
    rows = list(zip(ids, logprobs, strict=True))
    if true is not None and nll is not None and true not in ids:
        rows.append((true, -nll))
    return tuple(Candidate(_token(tokenizer, id), math.exp(logprob), id == true) for id, logprob in rows)


def settings_to_show(
    opened: OpenedModel, length: int | None, temperature: float, positions: int
) -> ObjectiveConfig | None:
    """The objective that the model was trained with, thinking at up to so many positions; None for one without."""
    if opened.recipe is not None:
        return opened.recipe.thinking.showing(length, temperature, positions)
    if (trained := opened.thinking) is None:
        return None
    # An export says how to think, which is all that is shown of its objective.
    names = {"every-token": "quiet_star", "before-answer": "rlp"}
    tags = {"open": trained.open_ids, "close": trained.close_ids} if trained.think == "before-answer" else {}
    spelled = {name: opened.tokenizer.decode(list(ids)) for name, ids in tags.items()}
    settings = find_objective(names[trained.think]).Config(**spelled)
    return settings.showing(length or trained.length or DEFAULT_LENGTH, temperature, positions)


def _objective(opened: OpenedModel, text: Text, length: int | None, temperature: float) -> Objective:
    """The objective that the model was trained with, thinking at every position where it can.

    Raises CheckpointError if there is none, or the text does not suit it.
    """
    config = settings_to_show(opened, length, temperature, text.shape[1])
    if config is None:
        raise CheckpointError(
            "this model was not trained to think, or does not say how; sample a run of quiet_star, rlp or rpt, or an "
            "export of one"
        )
    objective = find_objective(config.name).build(config, opened.tokenizer)
    limit, thought = longest_sequence(opened.model.decoder.config), objective.longest_thought
    if text.shape[1] + thought > limit:
        raise CheckpointError(
            f"a text of {text.shape[1]} tokens and thoughts of {thought} exceed the model's {limit} positions; "
            "give a shorter text or --length"
        )
    if not objective.scored(text):
        rule = objective.scoring_rule()
        raise CheckpointError(
            "the model thinks at no position of this text, which must be followed by a token to predict"
            + (f" and fit {rule}" if rule else "")
            + "; give another text"
        )
    return objective


# On the terminal


def print_reading(reading: Reading) -> None:
    """Prints to standard output: the text in colours, and a table of its positions. Nothing in it is markup."""
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    console.print(printable(f"{reading.title}: {reading.model} {reading.thinking}"), soft_wrap=True)
    if console.color_system is not None:
        console.print(_coloured(reading), soft_wrap=True)
    table = Table()
    for column in ("token", "thought", "next token"):
        table.add_column(column, overflow="fold")
    for column in ("p without", "p with", "gain"):
        table.add_column(column, justify="right")
    for column in ("likeliest without", "likeliest with"):
        table.add_column(column, overflow="fold")
    for p in reading.positions:
        numbers: list[str | RichText] = ["", "", ""]
        if p.gain is not None:
            without, with_ = (math.exp(-(nll or 0.0)) for nll in (p.nll_without, p.nll_with))
            gain = RichText(f"{p.gain:+.3f}", _style(p.gain, reading.full_colour))
            numbers = [f"{without:.4f}", f"{with_:.4f}", gain]
        moved = [
            ", ".join(f"'{printable(c.token)}' {c.probability:.0%}" for c in candidates[:TERMINAL_LIKELIEST])
            for candidates in (p.likeliest_without, p.likeliest_with)
        ]
        table.add_row(*(printable(words or "") for words in (p.token, p.thought, p.next_token)), *numbers, *moved)
    console.print(table)
    console.print(f"gain: {GAIN}", soft_wrap=True)
    console.print(reading.summary(), soft_wrap=True)


def _coloured(reading: Reading) -> RichText:
    """The text, each token in the colour of what the thought before it gained."""
    gains = [None, *(p.gain for p in reading.positions)]
    line = RichText()
    for position, gain in zip(reading.positions, gains, strict=False):
        line.append(printable(position.text or PART), _style(gain, reading.full_colour))
    return line


def _style(gain: float | None, full: float) -> Style:
    """Black on a light colour, which reads on light and dark terminals alike; the least gains have none."""
    share = min(1.0, abs(gain or 0.0) / full)
    if share < 0.1:
        return Style()
    rgb = LIKELIER_RGB if (gain or 0.0) > 0 else LESS_LIKELY_RGB
    tint = (round(255 - (255 - channel) * (0.2 + 0.5 * share)) for channel in rgb)
    return Style(color="black", bgcolor="#" + "".join(f"{channel:02x}" for channel in tint))
