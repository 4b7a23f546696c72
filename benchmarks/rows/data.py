"""What streaming text costs, beside the tokenizer alone."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Variant
from benchmarks.rows.row import Row, Rows, race_row
from benchmarks.settings import Settings


def data_rows(settings: Settings) -> Rows:
    yield "stream", partial(stream_speed, settings)


def stream_speed(settings: Settings) -> Row:
    """Tokens/s of one epoch of jsonl: the tokenizer alone on the same texts (encode_batch_fast, one process without
    threads), a stream that reads, tokenises and packs them in one process, the same without tokenising, and streams of
    one and of two worker processes."""
    # Here, because a machine that only measures models may lack what data needs.
    from data_pipelines import DataConfig, StreamText, open_data
    from data_pipelines.data_module import TextDataModule
    from data_pipelines.encoding import Encoder

    c = settings.data
    row = Row("data", "stream", dict(c))
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with tempfile.TemporaryDirectory() as folder:
            texts, tokenizer = _texts(c["documents"]), _tokenizer(settings, Path(folder))
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (Path(folder) / "texts.jsonl").write_text(lines)
            config = DataConfig(
                reference=str(Path(folder) / "texts.jsonl"), stream=True, length=c["length"], lanes=4, held_out=0.0
            )
            text = open_data(config, tokenizer, 0, Path(folder) / "cache", rows_per_step=c["rows"])
            assert isinstance(text, StreamText)
            encoder = Encoder(config, tokenizer)
            known = {t: ids for t in texts for ids in encoder.documents([t], len(t)) if ids is not None}
            tokens = sum(map(len, known.values()))
            steps = tokens // (c["rows"] * c["length"]) - 1

            def encode() -> dict[str, float]:
                for first in range(0, len(texts), 256):
                    tokenizer._tokenizer.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
                return {"tokens": tokens}

            def stream(workers: int) -> dict[str, float]:
                for _ in TextDataModule(text, steps, c["rows"], num_workers=workers).batches(0, 1):
                    pass
                return {"tokens": steps * c["rows"] * c["length"]}

            def without_tokenising() -> dict[str, float]:
                looked_up: Callable[..., Any] = lambda self, texts, characters: map(known.get, texts)  # noqa: E731
                documents, Encoder.documents = Encoder.documents, looked_up  # type: ignore[method-assign]
                try:
                    return stream(0)
                finally:
                    Encoder.documents = documents  # type: ignore[method-assign]

            variants: dict[str, Variant] = {
                "tokenizer alone": encode,
                "stream": partial(stream, 0),
                "stream, tokens known": without_tokenising,
                "1 worker": partial(stream, 1),
                "2 workers": partial(stream, 2),
            }
            race_row(row, settings, variants)
    finally:
        if parallelism is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism
    rates = {name: row.rate(name, "tokens") for name in variants}
    row.compare("stream / tokenizer alone, tokens/s", rates["stream"], rates["tokenizer alone"])
    row.compare(
        "reading, packing and bookkeeping, share of the stream's time", rates["stream"], rates["stream, tokens known"]
    )
    row.compare("2 workers / 1 worker, tokens/s", rates["2 workers"], rates["1 worker"])
    return row


def _texts(count: int) -> list[str]:
    """Different English texts: topics of Python's language reference, numbered."""
    from pydoc_data.topics import topics

    return [f"{n}. {text}" for n, text in zip(range(count), itertools.cycle(topics.values()), strict=False)]


def _tokenizer(settings: Settings, folder: Path) -> Any:
    from checkpoints.references import resolve
    from data_pipelines import Tokenizer
    from data_pipelines.lab import write_tokenizer

    if settings.name != "tiny":
        return Tokenizer.from_directory(resolve("smollm2-135m"))
    write_tokenizer(folder / "tokenizer")
    return Tokenizer.from_directory(folder / "tokenizer")
