"""Thoughts for people to read."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from checkpoints.errors import CheckpointError
from data_pipelines import Tokenizer
from models.philox import Rng
from models.thoughts import Text, Thoughts
from objectives import TokenScores, find_objective
from pretrain.opening import OpenedModel, longest_sequence

CONTEXT_TOKENS = 24
CONTINUATION_TOKENS = 6
DEFAULT_LENGTH = 8  # of the thoughts of a model that does not say how it was trained


def printable(words: str) -> RichText:
    """Text as a table cell: line breaks and other control characters escaped, nothing read as markup."""
    return RichText(repr(words)[1:-1])


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


@torch.no_grad()
def print_thoughts(opened: OpenedModel, words: str, length: int | None, temperature: float, seed: int) -> None:
    """Prints, for each position of a text, the thought there and the next token's probability without and with it.

    Raises CheckpointError for a model that was not trained to think, or that cannot do so in this way.
    """
    if length is not None and length < 1:
        raise CheckpointError(f"--length must be at least 1, got {length}")
    # fp32 logits overflow where they are divided by much less.
    if temperature != 0 and not 1e-6 <= temperature < math.inf:
        raise CheckpointError(f"--temperature must be 0 (greedy) or at least 1e-6, got {temperature}")
    tokenizer = opened.tokenizer
    ids = tokenizer.encode([words])[0]
    if not ids:
        raise CheckpointError("there is nothing to read; give --text some words")
    text = Text.from_rows(torch.tensor([ids]))
    scores = _evaluate(opened, text, length, temperature, Rng(seed, 0))
    assert scores.thoughts is not None and scores.thought_nll_BN is not None
    anchor_of = {n: m for m, n in enumerate(scores.thoughts.anchors.index_BM[0].tolist())}
    table = Table(title="A thought at every token")
    for column in ("token", "thought", "next token", "p without", "p with"):
        table.add_column(column, justify="right" if column.startswith("p ") else "left")
    for n, token in enumerate(ids):
        thought = scores.thoughts.tokens_BKSM[0, 0, :, anchor_of[n]].tolist() if n in anchor_of else []
        known = bool(scores.valid_BN[0, n])
        parts = ([token], [t for t in thought if t >= 0], ids[n + 1 : n + 2])
        table.add_row(
            *(printable(tokenizer.decode(part)) for part in parts),
            f"{scores.text_nll_BN[0, n].neg().exp():.4f}" if known else "",
            f"{scores.thought_nll_BN[0, n].neg().exp():.4f}" if known else "",
        )
    Console(highlight=False).print(table)


def _evaluate(opened: OpenedModel, text: Text, length: int | None, temperature: float, rng: Rng) -> TokenScores:
    """Scores by the objective that the model was trained with, at every position where that thinks."""
    model = opened.model
    if opened.recipe is not None:
        config = opened.recipe.objective.showing(length, temperature, text.shape[1])
    elif model.delimiters is not None and model.mixing_head is not None:
        config = (
            find_objective("quiet_star")
            .Config()
            .showing(length or opened.thought_length or DEFAULT_LENGTH, temperature, text.shape[1])
        )
    else:
        config = None
    if config is None:
        raise CheckpointError(
            "this model has no thought delimiters or mixing head; sample a run of quiet_star, or the run directory of "
            "one of rlp or rpt"
        )
    objective = find_objective(config.name).build(config, opened.tokenizer)
    limit, thought = longest_sequence(model.decoder.config), objective.longest_thought
    if text.shape[1] + thought > limit:
        raise CheckpointError(
            f"a text of {text.shape[1]} tokens and thoughts of {thought} exceed the model's {limit} positions; "
            "give a shorter --text or --length"
        )
    if not objective.scored(text):
        rule = objective.scoring_rule()
        raise CheckpointError(
            "the model thinks at no position of this text, which must be followed by a token to predict"
            + (f" and fit {rule}" if rule else "")
            + "; give another --text"
        )
    return objective.evaluate(model, text, rng)
