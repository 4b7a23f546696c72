"""The lab: generated problems that show within minutes whether a model learns to think.

A document is one short problem, a chain of steps whose last result is the answer:

    unworked    3+5+9+2=9
    worked      3+5+9+2=<think>8 7 9</think>9
    garbage     3+5+9+2=<think>4 0 7</think>9

A small model cannot do all steps at once: it is at chance where the answer follows `=` directly, but nearly certain
where it follows correct steps. Trained on a mixture with garbage, it writes correct steps after a think tag only some
of the time: the skill is there, waiting for an objective to reward it.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from torch import Tensor

from data_pipelines.config import DataError
from data_pipelines.rows import PackedText, packed_rows
from data_pipelines.sources import COUNTS
from data_pipelines.tokenizer import Tokenizer

MARKER, OPEN, CLOSE, END_OF_DOCUMENT = "=", "<think>", "</think>", "<|endoftext|>"
HELD_OUT_ONE_IN = 20
VERSION = 1  # bump it when the same configuration would give different documents

Draw = Callable[[int], int]  # draw(n) is uniform over 0 … n − 1


@dataclass(frozen=True)
class Problem:
    """prompt: the text up to the marker. steps: what a correct thought says. answer: the last step."""

    task: str
    prompt: str
    steps: str
    answer: str


def _sum(draw: Draw, chain: int) -> tuple[str, list[str]]:
    """`3+5+9`: sums modulo 10."""
    terms = [draw(10) for _ in range(chain + 1)]
    return "+".join(map(str, terms)), [str(total % 10) for total in accumulate(terms)][1:]


def _arithmetic(draw: Draw, chain: int) -> tuple[str, list[str]]:
    """`3+5*9-2`: modulo 10, left to right without operator precedence."""
    value = draw(10)
    prompt, steps = str(value), []
    for _ in range(chain):
        sign = "+-*"[draw(3)]
        # Factors coprime to 10: others map several digits to one, and make some answers likelier.
        operand = (3, 7, 9)[draw(3)] if sign == "*" else draw(10)
        value = _ARITHMETIC[sign](value, operand) % 10
        prompt += f"{sign}{operand}"
        steps.append(str(value))
    return prompt, steps


def _substitution(draw: Draw, chain: int) -> tuple[str, list[str]]:
    """`cmtk`: the symbol c passed through the fixed SUBSTITUTIONS m, t and k."""
    symbol = _SYMBOLS[draw(10)]
    prompt, steps = symbol, []
    for _ in range(chain):
        name = _SUBSTITUTION_NAMES[draw(10)]
        symbol = SUBSTITUTIONS[name][_SYMBOLS.index(symbol)]
        prompt += name
        steps.append(symbol)
    return prompt, steps


def _boolean(draw: Draw, chain: int) -> tuple[str, list[str]]:
    """`1&0^1`: gates, left to right. The last ones often decide the answer: loss at chance is below ln 2."""
    value = draw(2)
    prompt, steps = str(value), []
    for _ in range(chain):
        gate, operand = "&|^"[draw(3)], draw(2)
        value = _BOOLEAN[gate](value, operand)
        prompt += f"{gate}{operand}"
        steps.append(str(value))
    return prompt, steps


def _pointer(draw: Draw, chain: int) -> tuple[str, list[str]]:
    """`07 13 … 92:4>>`: 0 points to 7, …; where do two hops from 4 lead? The ten digits form one cycle."""
    cycle = list(range(10))
    for last in range(9, 0, -1):
        other = draw(last + 1)
        cycle[last], cycle[other] = cycle[other], cycle[last]
    table = " ".join(f"{node}{cycle[(cycle.index(node) + 1) % 10]}" for node in range(10))
    start = draw(10)
    return f"{table}:{cycle[start]}{'>' * chain}", [str(cycle[(start + n) % 10]) for n in range(1, chain + 1)]


_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_BOOLEAN = {"&": operator.and_, "|": operator.or_, "^": operator.xor}
_SYMBOLS = "abcdefghij"
_SUBSTITUTION_NAMES = "klmnopqrst"
# What a … j are mapped to; no two commute.
SUBSTITUTIONS = {
    "k": "gijhfdaebc",
    "l": "eicgfjahbd",
    "m": "higjfacbde",
    "n": "hcibeafjdg",
    "o": "caejghbfdi",
    "p": "djeacfhbig",
    "q": "abfhejcdgi",
    "r": "gicedfbhaj",
    "s": "cbhgedajif",
    "t": "bjegcidahf",
}

# Each task with the values that its steps and answers can take.
_TASKS: dict[str, tuple[Callable[[Draw, int], tuple[str, list[str]]], str]] = {
    "sum": (_sum, "0123456789"),
    "arithmetic": (_arithmetic, "0123456789"),
    "substitution": (_substitution, _SYMBOLS),
    "boolean": (_boolean, "01"),
    "pointer": (_pointer, "0123456789"),
}
TASKS = tuple(_TASKS)


def answers(task: str) -> str:
    """The symbols that a task's answer can be."""
    return _TASKS[task][1]


_OPERATORS = "+-*&|^>" + _SUBSTITUTION_NAMES
_CAPITALS = "ABCDEFG" + _SUBSTITUTION_NAMES.upper()
# Surface forms of a prompt; no prompt means different things in different tasks or forms.
_FORMATS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "letters": lambda prompt: prompt.translate(str.maketrans(_OPERATORS, _CAPITALS)),  # 3A5A9
    "mirrored": lambda prompt: "<" + prompt[::-1],  # from right to left: <9+5+3
}
FORMATS = tuple(_FORMATS)


@dataclass(frozen=True)
class LabConfig:
    """What the documents are. Of several tasks or formats, one is sampled per document."""

    tasks: tuple[str, ...] = ("sum",)
    chain: tuple[int, int] = (4, 4)  # minimum and maximum number of steps
    worked: float = 0.0  # fraction of the documents that have a thought
    garbage: float = 0.5  # fraction of those thoughts whose steps are random; the correct answer still follows
    format: tuple[str, ...] = ("plain",)

    @classmethod
    def parse(cls, reference: str) -> LabConfig:
        """From `lab` or, say, `lab:tasks=sum+boolean,chain=4-6,worked=0.5`. Raises DataError listing every mistake."""
        values: dict[str, Any] = {}
        mistakes = []
        for setting in filter(None, reference.partition(":")[2].split(",")):
            name, _, value = setting.partition("=")
            if name not in _READERS:
                mistakes.append(f"unknown setting {name!r}; settings are {', '.join(_READERS)}")
            elif name in values:
                mistakes.append(f"{name} is given twice; join values with +, as in tasks=sum+boolean")
            else:
                read, example = _READERS[name]
                try:
                    values[name] = read(value)
                except ValueError:
                    mistakes.append(f"{setting!r} cannot be read; write it like {name}={example}")
        config = cls(**values)
        if mistakes := mistakes + config.mistakes():
            raise DataError(f"data reference {reference!r}: {'; '.join(mistakes)}")
        return config

    def mistakes(self) -> list[str]:
        """One line for each invalid value."""
        found = []
        for name, known in (("tasks", TASKS), ("format", FORMATS)):
            given = getattr(self, name)
            if unknown := [value for value in given if value not in known]:
                found.append(f"{name} cannot be {' or '.join(map(repr, unknown))}; choose from {', '.join(known)}")
            elif len(set(given)) < len(given):
                found.append(f"{name} lists one twice; list each once")
        fewest, most = self.chain
        if not 2 <= fewest <= most:
            found.append(f"chain is {fewest}-{most}; it must be a range of at least 2 steps, fewest first, like 4-6")
        for name in ("worked", "garbage"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} is {getattr(self, name)}; it must be a fraction between 0 and 1")
        return found


def _read_names(value: str) -> tuple[str, ...]:
    return tuple(value.split("+"))


def _read_range(value: str) -> tuple[int, int]:
    fewest, dash, most = value.partition("-")
    return int(fewest), int(most if dash else fewest)


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "tasks": (_read_names, "sum+boolean"),
    "chain": (_read_range, "4-6"),
    "worked": (float, "0.5"),
    "garbage": (float, "0.5"),
    "format": (_read_names, "plain"),
}
assert list(_READERS) == [field.name for field in fields(LabConfig)]


def generate(config: LabConfig, seed: int, index: int, held_out: bool = False) -> Problem:
    """Problem `index` of a seed, for training or held out: a pure function of its arguments.

    About one prompt in twenty is held out, chosen by its hash: what is held out for one seed, format or task mixture is
    never a training problem of another.
    """
    return _problem(config, _draw(seed, index), held_out)


def problems(config: LabConfig, seed: int, count: int, held_out: bool = True) -> list[Problem]:
    """The first `count` problems of a seed, to evaluate on."""
    return [generate(config, seed, index, held_out) for index in range(count)]


def document(config: LabConfig, seed: int, index: int, held_out: bool = False) -> str:
    """The text of document `index`: the problem from `generate`, worked or not, without the end-of-document token."""
    draw = _draw(seed, index)
    problem = _problem(config, draw, held_out)
    steps = problem.steps
    if _chance(draw) >= config.worked:
        return f"{problem.prompt}{MARKER}{problem.answer}"
    if _chance(draw) < config.garbage:
        values = _TASKS[problem.task][1]
        steps = " ".join(values[draw(len(values))] for _ in steps.split())
    return f"{problem.prompt}{MARKER}{OPEN}{steps}{CLOSE}{problem.answer}"


def _draw(seed: int, index: int) -> Draw:
    # Raw words: unlike a Generator's numbers, they are the same in every numpy version.
    word = np.random.Philox(key=np.array([seed, index], np.uint64)).random_raw
    return lambda n: word() * n >> 64


def _chance(draw: Draw) -> float:
    return draw(1 << 53) / (1 << 53)


def _problem(config: LabConfig, draw: Draw, held_out: bool) -> Problem:
    task = config.tasks[draw(len(config.tasks))]
    surface = _FORMATS[config.format[draw(len(config.format))]]
    fewest, most = config.chain
    chain = fewest + draw(most - fewest + 1)
    while True:
        prompt, steps = _TASKS[task][0](draw, chain)
        digest = hashlib.sha256(prompt.encode()).digest()
        if (int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0) == held_out:
            return Problem(task, surface(prompt), " ".join(steps), steps[-1])


class LabText(PackedText):
    """Rows of as many whole documents as fit, then padding. No row ever repeats.

    Held-out rows are the same for every seed, and all unworked: it is the answer that is evaluated. With a tokenizer
    other than the lab's, an answer may be several tokens.
    Raises DataError if the longest document does not fit into a row.
    """

    def __init__(self, config: LabConfig, tokenizer: Tokenizer, end_id: int, length: int, seed: int):
        self.config, self.length, self.seed = config, length, seed
        self.tokens_per_epoch = math.inf
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self._tokenizer, self._end_id = tokenizer, end_id
        what = json.dumps([VERSION, asdict(config), tokenizer.fingerprint, end_id, length, seed])
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()
        longest = replace(config, chain=(config.chain[1],) * 2, worked=float(config.worked > 0))
        needed = max(
            len(self._encode(document(replace(longest, tasks=(task,), format=(name,)), seed=0, index=0)))
            for task in config.tasks
            for name in config.format
        )
        if needed > length:
            raise DataError(f"data.length is {length}, but the lab's longest documents have {needed} tokens; raise it")

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        rows = [[ids for _, ids in self._documents(self.seed, row)] for row in range(first, first + count)]
        return packed_rows(first, rows, self.length)

    def held_out_rows(self, limit: int) -> dict[str, Tensor]:
        rows = [[ids for _, ids in self._documents(0, row, held_out=True)] for row in range(limit)]
        return packed_rows(0, rows, self.length)

    def solutions(self, limit: int) -> dict[tuple[int, int], tuple[int, ...]]:
        """The steps of each held-out problem, at its marker."""
        marker_id, found = self._tokenizer.encode([MARKER])[0][-1], {}
        for row in range(limit):
            start = 0
            for index, ids in self._documents(0, row, held_out=True):
                steps = generate(self.config, 0, index, held_out=True).steps
                found[row, start + ids.index(marker_id)] = tuple(self._tokenizer.encode([steps])[0])
                start += len(ids)
        return found

    def _documents(self, seed: int, row: int, held_out: bool = False) -> Iterator[tuple[int, list[int]]]:
        """(index, token ids) of a row's documents; indices start at row · length, so no two rows share one."""
        config = replace(self.config, worked=0.0) if held_out else self.config
        remaining = self.length
        for index in count(row * self.length):
            ids = self._encode(document(config, seed, index, held_out))
            remaining -= len(ids)
            if remaining < 0:
                return
            yield index, ids

    def _encode(self, text: str) -> list[int]:
        begin = [self._tokenizer.bos_id] if self._tokenizer.bos_id is not None and self._tokenizer.add_bos else []
        return [*begin, *self._tokenizer.encode([text])[0], self._end_id]


def write_tokenizer(directory: Path) -> None:
    """Writes the lab's tokenizer, one token per character or tag: `tokenizer.json` and `tokenizer_config.json`."""
    characters = " 0123456789:<" + MARKER + _SYMBOLS + _OPERATORS + _CAPITALS
    unknown = "<|unknown|>"
    vocabulary = {token: id for id, token in enumerate([unknown, *characters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=unknown))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in (OPEN, CLOSE)])
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_DOCUMENT, normalized=False)])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT, "unk_token": unknown}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
