"""`forethought data`: what a recipe reads, as its ranks and workers will read it."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from checkpoints.references import resolve
from checkpoints.snapshots import newest_snapshot
from data_pipelines import DataError, PackedText, StreamText, Tokenizer, open_data
from data_pipelines.corpus import write_corpus
from data_pipelines.data_module import Batch, TextDataModule
from data_pipelines.opening import needs_stream
from pretrain.callbacks import console, say
from pretrain.recipe import Recipe
from pretrain.run_directory import RunDirectory

COLOURS = ("cyan", "yellow", "green", "magenta")


def open_text(recipe: Recipe) -> tuple[Tokenizer, PackedText]:
    tokenizer = Tokenizer.from_directory(resolve(recipe.model))
    return tokenizer, open_data(recipe.data, tokenizer, recipe.seed, rows_per_step=recipe.rows_per_step)


def global_batches(recipe: Recipe, text: PackedText, step: int, workers: int, ranks: int) -> Iterator[Batch]:
    """The rows of every step from `step` on, as `ranks` loaders with so many workers each produce them."""
    states = None
    checkpoint = newest_snapshot(RunDirectory(recipe.run_dir or "runs/run").checkpoints, groups=())
    start = 0 if isinstance(text, StreamText) else step
    if checkpoint is not None and isinstance(text, StreamText):
        state = checkpoint.state
        if state["data_fingerprint"] == text.fingerprint and state["step"] <= step:
            start, states = state["step"], {int(lane): cursor for lane, cursor in state["lanes"].items()}
    if start < step:
        say(f"reading from step {start} to get to step {step}")
    loaders = [
        TextDataModule(text, recipe.budget.steps, recipe.rows_per_step, start, workers, states).batches(rank, ranks)
        for rank in range(ranks)
    ]
    for parts in itertools.islice(zip(*loaders, strict=True), step - start, None):
        order = torch.cat([part["sample_id_B"] for part in parts]).argsort()
        names = ("tokens_BN", "document_BN", "position_BN", "sample_id_B")
        yield {name: torch.cat([part[name] for part in parts])[order] for name in names}


def digest(batch: Batch) -> str:
    """sha256 of a step's rows, in hex."""
    found = hashlib.sha256()
    for name in ("tokens_BN", "document_BN", "position_BN", "sample_id_B"):
        found.update(batch[name].numpy().astype("<i8").tobytes())
    return found.hexdigest()


def print_digests(recipe: Recipe, steps: int, step: int, workers: int, ranks: int) -> None:
    _, text = open_text(recipe)
    batches = global_batches(recipe, text, step, workers, ranks)
    for number, batch in zip(range(step, step + steps), batches, strict=False):
        print(number, digest(batch), flush=True)


def print_data(recipe: Recipe, steps: int, step: int, workers: int, rows: int) -> None:
    """Rows with their documents in colour, statistics over `steps` steps, throughput, and where it would resume."""
    started = time.perf_counter()
    tokenizer, text = open_text(recipe)
    opened = time.perf_counter() - started
    say(f"data: {text.about()}, opened in {opened:.1f} s; fingerprint {text.fingerprint[:16]}")
    module = TextDataModule(text, recipe.budget.steps, recipe.rows_per_step, step, workers)
    lengths, tokens, padding, seconds = [], 0, 0, []
    last = time.perf_counter()
    for number, batch in zip(range(step, step + steps), module.batches(0, 1), strict=False):
        seconds.append(time.perf_counter() - last)
        module.on_after_batch_transfer(batch, 0)
        if number == step:
            for row in range(min(rows, recipe.rows_per_step)):
                console.print(_coloured(tokenizer, batch, row), soft_wrap=True)
        for document_N in batch["document_BN"].numpy():
            counted = np.bincount(document_N[document_N >= 0])
            lengths += counted.tolist()
            tokens += int(counted.sum())
            padding += int((document_N < 0).sum())
        last = time.perf_counter()
    # The first batch waits for readers to start.
    rate = (tokens / len(seconds)) / statistics.mean(seconds[1:] or seconds)
    table = Table("statistic", "value", title=f"{len(seconds)} steps of {recipe.rows_per_step} × {recipe.data.length}")
    table.add_row("tokens", f"{tokens:,}")
    table.add_row("padding", f"{padding / max(tokens + padding, 1):.2%}")
    table.add_row("documents and fragments", f"{len(lengths):,}")
    table.add_row("their length, median (most)", f"{statistics.median(lengths):.0f} ({max(lengths)})")
    table.add_row("tokens/s after the first batch", f"{rate:,.0f}")
    table.add_row("first batch after", f"{seconds[0]:.2f} s")
    counts = module.counts()
    for name in text.config.sources if isinstance(text, StreamText) else [""]:
        prefix = f"{name}/" if name else ""
        if size := counts.get(f"{prefix}bytes"):
            of = counts[f"{prefix}tokens"]
            whole = sum(value for key, value in counts.items() if key.rpartition("/")[2] == "tokens")
            table.add_row(f"{prefix}share of tokens read", f"{of / whole:.1%}")
            table.add_row(f"{prefix}bytes per token", f"{size / of:.2f}")
    for name, count in counts.items():
        if count and not name.endswith(("tokens", "bytes")):
            table.add_row(name.replace("_", " "), f"{count:,}")
    console.print(table)
    if isinstance(text, StreamText):
        for source in text.lanes.sources:
            found, rows_in = source.manifest, source.manifest.rows
            say(
                f"{source.name or 'data'}: {source.config.reference}"
                + (f" at {found.revision}, " if found.revision else ", ")
                + f"{len(found.shards):,} shards, {len(found.blocks):,} blocks"
                + (f", {rows_in:,} rows" if rows_in is not None else "")
            )
        lane, state = next(iter(module.state().items()))
        say(f"lane {lane} would resume at {state}")


def tokenize(recipe: Recipe, out: Path) -> None:
    """Writes the recipe's data as a tokenised copy, which `--data OUT` reads by random access."""
    if keys := needs_stream(recipe.data):
        raise DataError(
            f"data.{keys[0]} needs a stream, of which there is no tokenised copy; tokenise a source by itself"
        )
    tokenizer = Tokenizer.from_directory(resolve(recipe.model))
    corpus = write_corpus(recipe.data, tokenizer, out)
    count = corpus.counts["documents"]
    say(f"wrote {out}: {count:,} documents, {len(corpus.tokens_T):,} tokens; read it with --data {out}")


def _coloured(tokenizer: Tokenizer, batch: Batch, row: int) -> Text:
    tokens_N, document_N = batch["tokens_BN"][row], batch["document_BN"][row]
    line = Text(f"row {int(batch['sample_id_B'][row])}  ", style="bold")
    for document in range(int(document_N.max()) + 1):
        said = tokenizer.decode(tokens_N[document_N == document].tolist())
        line.append(said.replace("\n", "⏎"), style=COLOURS[document % len(COLOURS)])
        line.append("│", style="bold red")
    return line
