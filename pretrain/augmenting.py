"""Documents with thoughts that a model has written into them ahead of training: thinking-augmented text (2509.20186),
a baseline that is trained on by plain next-token prediction.

    3+5+9=7    →    3+5+9=<think>8 7</think>7

The tags are text, and become tokens again as any text does: a tag that the tokenizer has as an ordinary token of its
own (the lab's, Qwen3's) is that token, others are spelled, and one that is a control token, which no text ever becomes,
is refused. A spelled tag may be cut otherwise than the template cuts it, where it merges with its neighbours.

Shapes: B rows, M anchors of a row, L tokens of a body.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints.errors import CheckpointError
from data_pipelines import DataConfig, DataError, Documents, packed_rows
from data_pipelines.lab import LabConfig, document
from models.philox import Rng
from models.rollout import EAGER
from models.thoughts import PAD, Text
from objectives import RlpConfig, SettingError, find_objective
from pretrain.new_file import new_file
from pretrain.opening import OpenedModel, longest_sequence
from pretrain.samples import DEFAULT_LENGTH, added_texts, check_sampling, settings_to_show

ROWS = 16  # pieces that are read at once


class Piece(NamedTuple):
    """A document, or what a model can read at once of a longer one. document: its number. texts: of each token."""

    document: int
    name: str
    ids: list[int]
    texts: list[str]


def write_augmented(
    opened: OpenedModel,
    source: str,
    out: Path,
    length: int | None,
    temperature: float,
    seed: int,
    thoughts: int | None = None,
    marker: str | None = None,
    documents: int | None = None,
) -> str:
    """Writes the first `documents` of a source as jsonl (text, name, number of thoughts); a line that says how many.

    Up to so many `thoughts` (1) stand in a document, or in each piece of one that is longer than the model reads:
    behind the marker, or that of its training, or where there is none at random. A thought depends on the seed, the
    number of its piece and the text before it. Raises CheckpointError and DataError.
    """
    objective = _objective(opened, thoughts or 1, marker, length, temperature)
    opened.model.to("cuda" if torch.cuda.is_available() else "cpu")
    longest = longest_sequence(opened.model.decoder.config) - objective.longest_thought - opened.tokenizer.add_bos
    if longest < 2:
        raise CheckpointError(f"thoughts of {objective.longest_thought} tokens leave no text to read; lower --length")
    pieces = _pieces(opened, _documents(source, documents), longest)
    counted = [0, 0]
    with new_file(out, "OUT") as file:
        done = _with_thoughts(opened, objective, pieces, Rng(seed, 0))
        for (_, name), parts in itertools.groupby(done, key=lambda part: part[0]):
            texts, numbers = zip(*(part[1:] for part in parts), strict=True)
            written = {"text": "".join(texts), "name": name, "thoughts": sum(numbers)}
            file.write(json.dumps(written, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            counted = [counted[0] + 1, counted[1] + written["thoughts"]]
    return f"wrote {out}: {counted[0]:,} documents with {counted[1]:,} thoughts"


def _objective(opened: OpenedModel, thoughts: int, marker: str | None, length: int | None, temperature: float) -> Any:
    """The objective that a model was trained with, or RLP for one that was not, thinking where it is asked to.

    Raises CheckpointError.
    """
    check_sampling(length, temperature)
    config: Any = settings_to_show(opened, length, temperature, thoughts)
    if config is None:
        config = RlpConfig().showing(length or DEFAULT_LENGTH, temperature, thoughts)
    if opened.thinking is not None and opened.thinking.think == "every-token":
        raise CheckpointError(
            "this model thinks between delimiters that are no text; augment by one that thinks before an answer (rlp, "
            "rpt), or by a plain one"
        )
    if marker is not None:
        config = config.replaced(positions="marker", marker=marker)
    for tag in (config.open, config.close):
        if opened.tokenizer.token_id(tag) in opened.tokenizer.control_ids:
            raise CheckpointError(f"the tag {tag!r} is a control token, which no text becomes; train with other tags")
    try:
        return find_objective(config.name).build(config, opened.tokenizer)
    except SettingError as error:
        raise CheckpointError(str(error)) from None


def _documents(source: str, documents: int | None) -> Iterable[tuple[str, str]]:
    config = DataConfig(reference=source)
    if not config.is_lab:
        return itertools.islice(Documents(config), documents)
    if documents is None:
        raise DataError(f"{source} never ends; say with --documents how many problems to take")
    lab = LabConfig.parse(source)
    return ((f"problem {index}", document(lab, 0, index)) for index in range(documents))


def _pieces(opened: OpenedModel, documents: Iterable[tuple[str, str]], longest: int) -> Iterator[Piece]:
    for number, (name, text) in enumerate(documents):
        (ids,) = opened.tokenizer.encode([text])
        texts = added_texts(opened.tokenizer, ids)
        for start in range(0, len(ids), longest):
            cut = slice(start, start + longest)
            yield Piece(number, name, ids[cut], texts[cut])


@torch.no_grad()
def _with_thoughts(
    opened: OpenedModel, objective: Any, pieces: Iterator[Piece], rng: Rng
) -> Iterator[tuple[tuple[int, str], str, int]]:
    """Of each piece its document, its text with thoughts in it, and how many these are."""
    model, tokenizer, config = opened.model, opened.tokenizer, objective.config
    begin = [tokenizer.bos_id] if tokenizer.bos_id is not None and tokenizer.add_bos else []
    for first in itertools.count(0, ROWS):
        if not (batch := list(itertools.islice(pieces, ROWS))):
            return
        rows = [[*begin, *piece.ids] for piece in batch]
        packed = packed_rows(first, [[ids] for ids in rows], max(map(len, rows)))
        text = Text(**packed).to(model.head_weight_VW.device)
        state, anchors = model.read(text), objective.choice.choose_without_model(text, rng)
        body_BLM = objective.own_bodies(model, state, anchors, rng, EAGER)[:, 0]
        for piece, index_M, body_LM in zip(batch, anchors.index_BM.tolist(), body_BLM, strict=True):
            parts = [*([""] * len(begin)), *piece.texts]
            for n, body_L in zip(index_M, body_LM.T.tolist(), strict=True):
                if n >= 0:
                    said = tokenizer.decode([token for token in body_L if token != PAD])
                    parts[n] += f"{config.open}{said}{config.close}"
            yield (piece.document, piece.name), "".join(parts), sum(n >= 0 for n in index_M)
