"""This project's stream beside other libraries' on the same documents: speed, start, resume, and what a resume costs.

    python -m benchmarks.streams [--documents N] [--repeats R] [--out FILE.json]

Each reads one epoch of English text as its documentation says a training run should: shuffled, tokenised as SmolLM2
does (256 documents at a time, one core for each process), cut into rows of 1,024 tokens, 8 rows a batch, without
workers and with two. litdata reads what it has tokenised before, which takes the time given below the table.
Libraries that are not installed are left out: `pip install litdata torchdata` (torchdata holds the state of the workers
that read `datasets`; webdataset has no state, and reads again what it has to skip).

    tokens/s   of an epoch, from the imports to the last batch, in a new process; nothing is cached
    start      seconds until the first batch
    resume     the same from the state behind the middle batch
    exactly    whether a new process with that state reads, batch by batch, what the one that saved it read next
    lost       documents that the interrupted epoch lacks; repeated: that it has twice

Every figure is the median of rounds in which all take turns, each time in a new process.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from benchmarks.environment import environment
from benchmarks.measure import Spread
from benchmarks.report import number, print_table, spread
from benchmarks.rows.data import english_texts, write_tar
from checkpoints.references import resolve
from data_pipelines import Tokenizer

LENGTH, ROWS, LANES, BUFFER, AT_ONCE, SHARDS, SEED = 1024, 8, 4, 1024, 256, 32, 0
WORKERS = {0: 2, 2: 1}  # each number of workers, and the one that takes over its state
# One core for each process, and no library asks the network for its newest version.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
}
MARKS = re.compile(r"Document (\d+): |End of document (\d+)\.")

# Batches of token ids [ROWS, LENGTH], and what gives the state behind the last of them.
Reader = tuple[Iterable[Tensor], Callable[[], Any]]


# The documents


def write(folder: Path, count: int) -> None:
    """The documents in directories of shards by format. Each is numbered at its beginning and at its end."""
    texts = enumerate(english_texts(count))
    documents = [f"Document {n}: {text}\nEnd of document {n}." for n, text in texts]
    for name in ("jsonl", "parquet", "tar"):
        (folder / name).mkdir()
    for shard in range(SHARDS):
        held = documents[shard::SHARDS]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in held)
        (folder / "jsonl" / f"{shard:02d}.jsonl").write_text(lines)
        pq.write_table(pa.table({"text": held}), folder / "parquet" / f"{shard:02d}.parquet")
        write_tar(folder / "tar" / f"{shard:02d}.tar", held)


def marks(batch: Tensor, tokenizer: Tokenizer) -> list[str]:
    """The numbered beginnings and ends of documents in a batch; a border of rows may cut one, hardly ever both."""
    return [match[0] for row in batch.tolist() for match in MARKS.finditer(tokenizer.decode(row))]


@functools.cache
def tokenizer_at(directory: str) -> Tokenizer:
    return Tokenizer.from_directory(directory)


def encode(directory: str, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, with the token that ends each."""
    tokenizer = tokenizer_at(directory)
    end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    encoded = tokenizer._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids + end for encoding in encoded]


def chunks(documents: Iterable[list[int]]) -> Iterator[Tensor]:
    """Documents end to end, cut into rows."""
    row: list[int] = []
    for ids in documents:
        row += ids
        for at in range(0, len(row) - LENGTH + 1, LENGTH):
            yield torch.tensor(row[at : at + LENGTH])
        row = row[len(row) // LENGTH * LENGTH :]


# Readers


def ours(folder: Path, directory: str, workers: int, state: Any, format: str) -> Reader:
    from data_pipelines import DataConfig, DataError, open_data
    from data_pipelines.data_module import TextDataModule

    config = DataConfig(reference=str(folder / format), stream=True, lanes=LANES, length=LENGTH, held_out=0.0, epochs=1)
    cache = Path(tempfile.mkdtemp(dir=folder)) if state is None else Path(state["cache"])
    text = open_data(config, tokenizer_at(directory), SEED, cache, rows_per_step=ROWS)
    step = 0 if state is None else state["step"]
    lanes = {} if state is None else {int(lane): kept for lane, kept in state["lanes"].items()}
    module = TextDataModule(text, 10**9, ROWS, step, workers, lanes)

    def batches() -> Iterator[Tensor]:
        nonlocal step
        try:
            for batch in module.batches(0, 1):
                module.on_after_batch_transfer(batch, 0)
                step += 1
                yield batch["tokens_BN"]
        except DataError as error:
            if not str(error).startswith("the data ends"):
                raise

    return batches(), lambda: {"step": step, "lanes": json.loads(json.dumps(module.state())), "cache": str(cache)}


class Chunks(IterableDataset[Tensor]):
    """Rows from a streamed dataset of token ids. Its state is the dataset's, and the tokens before the next row."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.left: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        for example in self.dataset:
            self.left += example["ids"]
            while len(self.left) >= LENGTH:
                row, self.left = self.left[:LENGTH], self.left[LENGTH:]
                yield torch.tensor(row)

    def state_dict(self) -> dict[str, Any]:
        return {"dataset": self.dataset.state_dict(), "left": list(self.left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state["dataset"])
        self.left = list(state["left"])


def hugging_face(folder: Path, directory: str, workers: int, state: Any, format: str, buffer: int) -> Reader:
    from datasets import load_dataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    kind = {"jsonl": "json"}.get(format, format)
    dataset = load_dataset(kind, data_files=f"{folder}/{format}/*", split="train", streaming=True)
    if buffer:
        dataset = dataset.shuffle(seed=SEED, buffer_size=buffer)
    dataset = dataset.map(
        lambda batch: {"ids": encode(directory, batch["text"])},
        batched=True,
        batch_size=AT_ONCE,
        remove_columns=["text"],
    )
    loader = StatefulDataLoader(Chunks(dataset), batch_size=ROWS, num_workers=workers, drop_last=True)
    if state is not None:
        loader.load_state_dict(state)
    return loader, loader.state_dict


def web_dataset(folder: Path, directory: str, workers: int, state: Any) -> Reader:
    import webdataset as wds

    shards = sorted(map(str, (folder / "tar").iterdir()))
    dataset = (
        wds.WebDataset(shards, shardshuffle=SHARDS, detshuffle=True, seed=SEED, nodesplitter=wds.split_by_node)
        .compose(wds.detshuffle(BUFFER, seed=SEED))
        .map(lambda sample: sample["txt"].decode())
        .listed(AT_ONCE)
        .map(lambda texts: encode(directory, texts))
        .unlisted()
        .compose(chunks)
        .batched(ROWS, collation_fn=torch.stack, partial=False)
    )
    done = state or 0

    def batches() -> Iterator[Tensor]:
        nonlocal done
        for batch in itertools.islice(wds.WebLoader(dataset, batch_size=None, num_workers=workers), done, None):
            done += 1
            yield batch

    return batches(), lambda: done


def prepare_litdata(folder: Path, directory: str) -> None:
    from litdata import TokensLoader, optimize

    optimize(
        fn=functools.partial(_tokens, directory),
        inputs=sorted(map(str, (folder / "jsonl").iterdir())),
        output_dir=str(folder / "litdata"),
        chunk_size=64 * LENGTH,
        item_loader=TokensLoader(block_size=LENGTH),
        num_workers=2,
        verbose=False,
    )


def _tokens(directory: str, shard: str) -> Iterator[Tensor]:
    texts = [json.loads(line)["text"] for line in Path(shard).read_text().splitlines()]
    for first in range(0, len(texts), AT_ONCE):
        yield from map(torch.tensor, encode(directory, texts[first : first + AT_ONCE]))


def litdata(folder: Path, directory: str, workers: int, state: Any) -> Reader:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(LENGTH), shuffle=True, drop_last=True, seed=SEED
    )
    loader = StreamingDataLoader(dataset, batch_size=ROWS, num_workers=workers, drop_last=True)
    if state is not None:
        loader.load_state_dict(state)
    return loader, loader.state_dict


def tokenizer_alone(folder: Path, directory: str, workers: int, state: Any) -> Reader:
    """What all of them but litdata have to do."""
    texts = [json.loads(line)["text"] for path in sorted((folder / "jsonl").iterdir()) for line in path.open()]

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(texts), AT_ONCE):
            encoded = tokenizer_at(directory)._tokenizer.encode_batch_fast(
                texts[first : first + AT_ONCE], add_special_tokens=False
            )
            yield torch.empty(sum(map(len, encoded)))

    return batches(), lambda: None


ALONE = "tokenizer alone"
READERS: dict[str, Callable[[Path, str, int, Any], Reader]] = {
    ALONE: tokenizer_alone,
    "forethought, jsonl": functools.partial(ours, format="jsonl"),
    "forethought, parquet": functools.partial(ours, format="parquet"),
    "forethought, tar": functools.partial(ours, format="tar"),
    "datasets, jsonl": functools.partial(hugging_face, format="jsonl", buffer=BUFFER),
    "datasets, parquet": functools.partial(hugging_face, format="parquet", buffer=BUFFER),
    "datasets, parquet, not shuffled": functools.partial(hugging_face, format="parquet", buffer=0),
    "webdataset, tar": web_dataset,
    "litdata, tokenised before": litdata,
}
NEEDS = {
    "forethought": ("data_pipelines.data_module",),
    "datasets": ("datasets", "torchdata.stateful_dataloader"),
    "webdataset": ("webdataset",),
    "litdata": ("litdata",),
    ALONE: (),
}


def modules(reader: str) -> tuple[str, ...]:
    """What a reader imports."""
    return NEEDS[reader.partition(",")[0]]


# One process


@dataclass(frozen=True)
class Job:
    """What one process reads. state: file to begin with. save: file for the state behind batch `save_at`. marks:
    whether to digest batches and look for documents, which takes time. limit: batches to read."""

    reader: str
    folder: str
    tokenizer: str
    workers: int = 0
    state: str | None = None
    save: str | None = None
    save_at: int | None = None
    marks: bool = False
    limit: int | None = None


def read(job: Job) -> dict[str, Any]:
    """Seconds to the first batch (start) and to the last one, tokens read, and, for `marks`, each batch's sha256 and
    the documents' marks in it."""
    for module in modules(job.reader):
        importlib.import_module(module)
    tokenizer_at(job.tokenizer)
    found: dict[str, Any] = {"tokens": 0, "digests": [], "marks": []}
    started = time.perf_counter()
    # Pickled, since libraries' states hold what JSON does not; only this script writes and reads them.
    state = None if job.state is None else pickle.loads(Path(job.state).read_bytes())
    batches, state_now = READERS[job.reader](Path(job.folder), job.tokenizer, job.workers, state)
    for n, batch in enumerate(itertools.islice(batches, job.limit), 1):
        if n == 1:
            found["start"] = time.perf_counter() - started
        found["tokens"] += batch.numel()
        if job.marks:
            found["digests"].append(hashlib.sha256(batch.to(torch.int64).numpy().tobytes()).hexdigest())
            found["marks"].append(marks(batch, tokenizer_at(job.tokenizer)))
        if n == job.save_at and job.save is not None:
            Path(job.save).write_bytes(pickle.dumps(state_now()))
    return found | {"seconds": time.perf_counter() - started}


def in_new_process(job: Job) -> dict[str, Any]:
    """`read` in a process of its own. Raises RuntimeError with the last line that it wrote."""
    command = [sys.executable, "-m", "benchmarks.streams", "--job", json.dumps(asdict(job))]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | SETTINGS, timeout=1800)
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or ["failed"])[-1])
    return json.loads(run.stdout.splitlines()[-1])


# What a resume costs


@dataclass
class Resume:
    """exactly: whether the batches are those that would have come next. lost, repeated: documents of the epoch.
    refused: the error, if a state is not taken."""

    exactly: bool = False
    lost: int = 0
    repeated: int = 0
    refused: str | None = None

    def __str__(self) -> str:
        if self.refused is not None:
            return "refused"
        return "yes" if self.exactly else f"no ({self.lost} lost, {self.repeated} repeated)"


def resumed(job: Job, whole: dict[str, Any], at: int, run: Callable[[Job], dict[str, Any]]) -> Resume:
    """How an epoch that was interrupted behind batch `at` differs from the whole one."""
    try:
        rest = run(job)
    except Exception as error:
        return Resume(refused=f"{type(error).__name__}: {error}"[:300])
    expected = Counter(itertools.chain(*whole["marks"]))
    got = Counter(itertools.chain(*whole["marks"][:at], *rest["marks"]))
    lost = _numbers(expected) - _numbers(got)
    repeated = _numbers(mark for mark, count in got.items() if count > max(1, expected[mark]))
    return Resume(rest["digests"] == whole["digests"][at:], len(lost), len(repeated))


def _numbers(found: Iterable[str]) -> set[str]:
    """Of the documents that the marks are of."""
    return {re.sub(r"\D", "", mark) for mark in found}


@dataclass
class Cell:
    """A reader with a number of workers. same, other: a resume with as many workers, and with another number."""

    reader: str
    workers: int
    documents: int
    same: Resume
    other: Resume
    figures: dict[str, list[float]] = field(default_factory=dict)


def examine(reader: str, workers: int, job: Job, at: int, run: Callable[[Job], dict[str, Any]]) -> Cell:
    """Reads an epoch, and twice its rest behind batch `at`."""
    whole = run(replace(job, save=job.state, save_at=at, state=None))
    if len(whole["digests"]) <= at:
        raise RuntimeError(f"{reader}: an epoch has {len(whole['digests'])} batches, none behind batch {at}")
    documents = len(_numbers(itertools.chain(*whole["marks"])))
    if not documents:
        raise RuntimeError(f"{reader}: no document has its marks; is the tokenizer lossless?")
    same = resumed(job, whole, at, run)
    other = resumed(replace(job, workers=WORKERS[workers]), whole, at, run)
    return Cell(reader, workers, documents, same, other)


def compare(
    folder: Path, directory: str, readers: Sequence[str], at: int, repeats: int, run: Callable[[Job], dict[str, Any]]
) -> dict[str, Any]:
    """Examines each reader with each number of workers, then measures them in turns. JSON-able."""
    cells, failed = [], {}
    jobs = {}
    for reader, workers in itertools.product(readers, WORKERS):
        state = str(folder / f"{reader}-{workers}.state")
        job = Job(reader, str(folder), directory, workers, state, marks=True)
        try:
            cells.append(examine(reader, workers, job, at, run))
        except Exception as error:
            failed[f"{reader}, {workers} workers"] = f"{type(error).__name__}: {error}"[:300]
            continue
        jobs[reader, workers] = job
        print(f"{reader}, {workers} workers: resumes exactly: {cells[-1].same}", flush=True)
    alone = []
    for _ in range(repeats):
        found = run(Job(ALONE, str(folder), directory))
        alone.append(found["tokens"] / found["seconds"])
        for cell in cells:
            job = jobs[cell.reader, cell.workers]
            found = run(replace(job, state=None, marks=False))
            figures = {"tokens/s": found["tokens"] / found["seconds"], "start": found["start"]}
            figures["/ tokenizer alone"] = figures["tokens/s"] / alone[-1]
            if cell.same.refused is None:
                figures["resume"] = run(replace(job, marks=False, limit=1))["start"]
            for name, figure in figures.items():
                cell.figures.setdefault(name, []).append(figure)
    spreads = [{name: vars(Spread.of(values)) for name, values in cell.figures.items()} for cell in cells]
    return {
        "cells": [asdict(cell) | {"figures": figures} for cell, figures in zip(cells, spreads, strict=True)],
        "tokenizer alone, tokens/s": vars(Spread.of(alone)) if alone else None,
        "failed": failed,
    }


# The table

COLUMNS = ("reader", "workers", "tokens/s", "/ tokenizer", "start, s", "resume, s", "exactly", "with other workers")


def lines(found: dict[str, Any]) -> list[list[str]]:
    """The table's cells."""
    rows = []
    for cell in found["cells"]:
        figures = cell["figures"]
        rate, *others = (figures.get(name) for name in ("tokens/s", "/ tokenizer alone", "start", "resume"))
        measured = [spread(rate), *(number(figure and figure["median"]) for figure in others)]
        resumes = [str(Resume(**cell[name])) for name in ("same", "other")]
        rows.append([cell["reader"], str(cell["workers"]), *measured, *resumes])
    return rows


def markdown(found: dict[str, Any]) -> str:
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *lines(found)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def missing(reader: str) -> list[str]:
    """Libraries that a reader needs and that are not installed."""
    needed = (module.partition(".")[0] for module in modules(reader))
    return [name for name in needed if importlib.util.find_spec(name) is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3000, help="default: 3000, about 4.3 million tokens")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; default: 3")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "streams.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        print(json.dumps(read(Job(**json.loads(arguments.job)))))
        return
    if arguments.prepare is not None:
        prepare_litdata(Path(arguments.prepare[0]), arguments.prepare[1])
        return
    readers = [reader for reader in READERS if reader != ALONE]
    for reader in [reader for reader in readers if missing(reader)]:
        print(f"left out: {reader} ({', '.join(missing(reader))} not installed)")
        readers.remove(reader)
    directory, prepared = str(resolve("smollm2-135m")), None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, arguments.documents)
        if not missing("litdata"):
            started = time.perf_counter()
            command = [sys.executable, "-m", "benchmarks.streams", "--prepare", name, directory]
            subprocess.run(command, check=True, env=os.environ | SETTINGS, stdout=subprocess.DEVNULL)
            prepared = time.perf_counter() - started
        found = compare(folder, directory, readers, arguments.documents // 12, arguments.repeats, in_new_process)
    libraries = {module.partition(".")[0] for reader in readers for module in modules(reader)} - {"data_pipelines"}
    versions = {name: importlib.metadata.version(name) for name in sorted(libraries | {"tokenizers"})}
    found = {
        "environment": environment(torch.device("cpu")) | versions,
        "setting": {"documents": arguments.documents, "repeats": arguments.repeats, "length": LENGTH, "rows": ROWS},
        "litdata's preparation with 2 workers, seconds": prepared,
        **found,
    }
    print_table("Streams", COLUMNS, lines(found))
    print(markdown(found))
    for name, why in found["failed"].items():
        print(f"failed: {name}: {why}")
    if prepared is not None:
        print(f"litdata tokenised before, with two processes, in {prepared:.1f} s")
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
