"""What streaming text costs, beside the tokenizer alone."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Variant
from benchmarks.rows.row import Row, Rows, dtype_name, race_row
from benchmarks.settings import Settings
from benchmarks.workloads import make_model, next_token, training_step
from models.thoughts import Text

TURN = 32  # steps: of half a second or so, in which the speed of a shared machine hardly changes


def data_rows(settings: Settings) -> Rows:
    yield "stream", partial(stream_speed, settings)
    yield "step", partial(waiting_steps, settings)


def stream_speed(settings: Settings) -> Row:
    """Tokens/s of nine tenths of an epoch of jsonl: a stream that reads, tokenises and packs in one process, taking
    turns with the tokenizer alone on the texts that it has just encoded (encode_batch_fast, without threads); the same
    without tokenising; reading alone; streams of one and of two worker processes, and as many that only tokenise."""
    # Here, because a machine that only measures models may lack what data needs.
    from data_pipelines.encoding import Encoder
    from data_pipelines.readers import START, Reading

    c = settings.data
    row = Row("data", "stream", dict(c))
    with tempfile.TemporaryDirectory() as folder, _without_threads():
        texts, tokenizer = english_texts(c["documents"]), _tokenizer(settings, Path(folder))
        text = _stream_text(texts, tokenizer, Path(folder), c)
        known = {t: ids for t in texts for ids in text.lanes.encoder.documents([t], len(t)) if ids is not None}
        tokens = sum(map(len, known.values()))
        steps = tokens * 9 // (10 * c["rows"] * c["length"])  # no lane begins another epoch

        def stream() -> dict[str, float]:
            batches = iter(_batches(text, steps, c, 0))
            streaming = alone = 0.0
            with _timed_tokenizer(tokenizer) as timed:
                while True:
                    begun = time.perf_counter()
                    ended = not sum(1 for _ in itertools.islice(batches, TURN))
                    streaming += (paused := time.perf_counter()) - begun
                    if ended:
                        break
                    for batch in timed.taken:
                        timed.backend.encode_batch_fast(batch, add_special_tokens=False)
                    alone += time.perf_counter() - paused
                    timed.taken.clear()
            return {"streaming": streaming, "encoding": timed.seconds, "tokenizer alone": alone}

        def read() -> dict[str, float]:
            (source,) = text.lanes.sources
            for piece in (piece for lane in range(text.config.lanes) for piece in text.lanes.pieces(source, lane)):
                for _ in source.rows(piece, START, Reading()):
                    pass
            return {"tokens": tokens}

        def stream_by(workers: int) -> dict[str, float]:
            for _ in _batches(text, steps, c, workers):
                pass
            return {"tokens": steps * c["rows"] * c["length"]}

        def without_tokenising() -> dict[str, float]:
            looked_up: Callable[..., Any] = lambda self, texts, characters: map(known.get, texts)  # noqa: E731
            documents, Encoder.documents = Encoder.documents, looked_up  # type: ignore[method-assign]
            try:
                return stream_by(0)
            finally:
                Encoder.documents = documents  # type: ignore[method-assign]

        def tokenise_by(processes: int) -> dict[str, float]:
            fork = multiprocessing.get_context("fork")
            shares = [texts[p::processes] for p in range(processes)]
            started = [fork.Process(target=_encode, args=(tokenizer, share)) for share in shares]
            for process in started:
                process.start()
            for process in started:
                process.join()
            return {"tokens": tokens}

        variants: dict[str, Variant] = {
            "stream": stream,
            "stream, tokens known": without_tokenising,
            "reading alone": read,
            "1 worker": partial(stream_by, 1),
            "2 workers": partial(stream_by, 2),
            "1 process, tokenizer alone": partial(tokenise_by, 1),
            "2 processes, tokenizer alone": partial(tokenise_by, 2),
        }
        race_row(row, settings, variants)
    streaming = row.seconds("stream", "streaming")
    rates = {name: row.rate(name, "tokens") for name in variants if name != "stream"}
    rate = [steps * c["rows"] * c["length"] / seconds for seconds in streaming]
    row.compare("stream / tokenizer alone, tokens/s", row.seconds("stream", "tokenizer alone"), streaming)
    row.compare("encode_batch_fast, share of the stream's time", row.seconds("stream", "encoding"), streaming)
    row.compare("reading, share of the stream's time", rate, rates["reading alone"])
    row.compare("reading, packing and bookkeeping, share of the stream's time", rate, rates["stream, tokens known"])
    row.compare("2 workers / 1 worker, tokens/s", rates["2 workers"], rates["1 worker"])
    one, two = (rates[f"{processes}, tokenizer alone"] for processes in ("1 process", "2 processes"))
    row.compare("2 processes / 1 process, tokenizer alone, tokens/s", two, one)
    return row


def _encode(tokenizer: Any, texts: list[str]) -> None:
    for first in range(0, len(texts), 256):
        tokenizer._tokenizer.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)


def waiting_steps(settings: Settings) -> Row:
    """Next-token steps on streamed text: the longest that one of them waited for its batch, beside the median step; not
    the first, which waits for readers to start."""
    c = settings.data_steps
    row = Row("data", "step", dict(c) | {"dtype": dtype_name(settings.dtype)})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _tokenizer(settings, Path(folder))
        text = _stream_text(english_texts(c["documents"]), tokenizer, Path(folder), c)
        model = make_model(replace(settings.model, vocab_size=tokenizer.size), settings.dtype, settings.device)

        def steps(workers: int) -> dict[str, float]:
            waited, took = [], []
            batches = iter(_batches(text, c["steps"] + 1, c, workers))
            for _ in range(c["steps"] + 1):
                begun = time.perf_counter()
                batch = next(batches)
                waited.append(time.perf_counter() - begun)
                del batch["position"]
                training_step(next_token(), model, Text(**batch).to(settings.device))
                took.append(time.perf_counter() - begun)
            return {"longest wait": max(waited[1:]), "step": statistics.median(took)}

        race_row(row, settings, {"1 worker": partial(steps, 1), "no worker": partial(steps, 0)}, repeats=1)
    for name in ("1 worker", "no worker"):
        row.compare(f"longest wait / step, {name}", row.seconds(name, "longest wait"), row.seconds(name, "step"))
    return row


class _Timed:
    """A backend of a tokenizer, with the seconds spent in encode_batch_fast and the batches that it was given."""

    def __init__(self, backend: Any):
        self.backend, self.seconds = backend, 0.0
        self.taken: list[list[str]] = []

    def encode_batch_fast(self, texts: list[str], **kwargs: Any) -> Any:
        self.taken.append(texts)
        begun = time.perf_counter()
        try:
            return self.backend.encode_batch_fast(texts, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begun

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@contextmanager
def _timed_tokenizer(tokenizer: Any) -> Iterator[_Timed]:
    backend = tokenizer._tokenizer
    tokenizer._tokenizer = _Timed(backend)
    try:
        yield tokenizer._tokenizer
    finally:
        tokenizer._tokenizer = backend


@contextmanager
def _without_threads() -> Iterator[None]:
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if parallelism is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


def _stream_text(texts: list[str], tokenizer: Any, folder: Path, c: Mapping[str, int]) -> Any:
    """A StreamText of the texts, in eight shards of jsonl."""
    from data_pipelines import DataConfig, open_data

    (folder / "texts").mkdir()
    for shard in range(8):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[shard::8])
        (folder / "texts" / f"{shard}.jsonl").write_text(lines)
    config = DataConfig(reference=str(folder / "texts"), stream=True, length=c["length"], lanes=8, held_out=0.0)
    return open_data(config, tokenizer, 0, folder / "cache", rows_per_step=c["rows"])


def _batches(text: Any, steps: int, c: Mapping[str, int], workers: int) -> Iterable[Any]:
    from data_pipelines.data_module import TextDataModule

    return TextDataModule(text, steps, c["rows"], num_workers=workers).batches(0, 1)


def english_texts(count: int, first: int = 0) -> list[str]:
    """Different English texts: topics of Python's language reference, numbered from `first` on."""
    from pydoc_data.topics import topics

    every = itertools.cycle(topics.values())
    return [f"{n}. {text}" for n, text in zip(range(first, first + count), every, strict=False)]


def write_tar(path: Path, texts: list[str]) -> None:
    """A webdataset shard of texts."""
    with tarfile.open(path, "w") as tar:
        for n, text in enumerate(map(str.encode, texts)):
            member = tarfile.TarInfo(f"{n}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))


def _tokenizer(settings: Settings, folder: Path) -> Any:
    from checkpoints.references import resolve
    from data_pipelines import Tokenizer
    from data_pipelines.lab import write_tokenizer

    if settings.name != "tiny":
        return Tokenizer.from_directory(resolve("smollm2-135m"))
    write_tokenizer(folder / "tokenizer")
    return Tokenizer.from_directory(folder / "tokenizer")
