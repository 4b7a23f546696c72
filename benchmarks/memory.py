"""Whether the memory of a stream stays flat, however much text it reads.

    python -m benchmarks.memory [--gigabytes 5] [--tokenizer REFERENCE] [--out FILE.json]

Writes that much text (English, each document with words of its own) to a temporary directory: a third as parquet, a
third as gzipped jsonl, a third as tar files behind a web server. Streams the mixture with two workers, as a run does,
and samples the memory of the main process and of each worker: resident pages (Linux's PSS) but those of files, of which
a process's share depends on what other programs run. Prints how much it grows after the first fifth, and writes the
samples as JSON, with a plot beside them.

--tokenizer: a model, such as smollm2-135m, whose tokenizer takes most of the time. By default every line is a token.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import itertools
import json
import logging
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch

from benchmarks.environment import environment
from benchmarks.rows.data import english_texts, write_tar
from checkpoints.references import resolve
from data_pipelines import DataConfig, Tokenizer, open_data
from data_pipelines.data_module import TextDataModule

SHARD, SAMPLE = 2**25, 2**24  # bytes of text
LENGTH, ROWS, LANES, WORKERS = 1024, 8, 16, 2
END = "<|endoftext|>"


def documents() -> Iterator[str]:
    """Endless; each has words that no other has, so that whatever keeps texts or words would grow."""
    draw = random.Random(0)
    for batch in itertools.count():
        for text in english_texts(1000, batch * 1000):
            yield f"{text}\n" + " ".join(f"{draw.getrandbits(32):08x}" for _ in range(32))


def write(folder: Path, size: int) -> None:
    """About `size` bytes of text, as shards in a directory for each format."""
    found = documents()
    for name in (formats := {"parquet": _parquet, "jsonl.gz": _jsonl, "tar": write_tar}):
        (folder / name).mkdir()
    shard_size = min(SHARD, size // (len(formats) * LANES))
    written = 0
    for number, (name, write_shard) in enumerate(itertools.cycle(formats.items())):
        if written >= size:
            break
        shard, end = [], written + shard_size
        while written < end:
            shard.append(next(found))
            written += len(shard[-1].encode())
        write_shard(folder / name / f"{number:05d}.{name}", shard)


def _parquet(path: Path, shard: list[str]) -> None:
    pq.write_table(pa.table({"text": shard}), path, row_group_size=1000, compression="zstd")


def _jsonl(path: Path, shard: list[str]) -> None:
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in shard)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL at which another process serves a directory."""
    code = (
        "import functools, http.server as h, sys\n"
        "handler = functools.partial(h.SimpleHTTPRequestHandler, directory=sys.argv[1])\n"
        "server = h.ThreadingHTTPServer(('127.0.0.1', 0), handler)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.terminate()


def line_tokenizer() -> Tokenizer:
    """Makes a token of every line."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"line": 0, END: 1}, "line"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("\n", "removed")
    tokenizer.add_special_tokens([END])
    return Tokenizer(tokenizer.to_str().encode(), {"eos_token": END})


def pss(pid: int) -> int:
    """Bytes of a process's resident memory without pages of files, of which its share depends on other programs; pages
    that processes share are divided among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def read(folder: Path, url: str, size: int, tokenizer: Tokenizer, sample: int = SAMPLE) -> list[dict[str, Any]]:
    """Streams `size` bytes of text. Returns, about every `sample` bytes: text read and memory, in bytes; seconds."""
    tars = ",".join(path.stem for path in sorted((folder / "tar").iterdir()))
    mixture = {name: {"reference": str(folder / name)} for name in ("parquet", "jsonl.gz")}
    mixture["tar"] = {"reference": f"{url}/tar/{{{tars}}}.tar"}
    config = DataConfig.model_validate(
        {"mixture": mixture, "length": LENGTH, "lanes": LANES, "held_out": 0.0, "stream": True}
    )
    text = open_data(config, tokenizer, 0, folder / "cache", rows_per_step=ROWS)
    module = TextDataModule(text, sys.maxsize // ROWS, ROWS, num_workers=WORKERS)
    found: list[dict[str, Any]] = []
    started = time.perf_counter()
    for batch in module.batches(0, 1):
        module.on_after_batch_transfer(batch, 0)
        if not found:
            gc.collect()  # one will write to every object sooner or later, which unshares the pages that workers have
        counts = module.counts()
        done = sum(count for name, count in counts.items() if name.endswith("/bytes"))
        if done >= len(found) * sample or done >= size:
            workers = [pss(worker.pid) for worker in multiprocessing.active_children() if worker.pid is not None]
            main = {"text": done, "seconds": time.perf_counter() - started, "main": pss(os.getpid())}
            found.append(main | {"workers": workers})
        if done >= size:
            return found
    raise AssertionError("a stream has no end")


def growth(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Of all processes' memory after the first fifth of the text: least-squares bytes per byte of text, and medians of
    the first and the last tenth of what remains."""
    settled = [s for s in samples if s["text"] >= 0.2 * samples[-1]["text"]]
    text, memory = [s["text"] for s in settled], [s["main"] + sum(s["workers"]) for s in settled]
    tenth = -(-len(memory) // 10)
    return {
        "bytes per byte of text": statistics.linear_regression(text, memory).slope,
        "median of the first tenth, bytes": statistics.median(memory[:tenth]),
        "median of the last tenth, bytes": statistics.median(memory[-tenth:]),
    }


def plot(found: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    samples, grown = found["samples"], found["growth"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    text = [s["text"] / 1e9 for s in samples]
    curves = {"all": [s["main"] + sum(s["workers"]) for s in samples], "main process": [s["main"] for s in samples]}
    curves |= {f"worker {n}": [s["workers"][n] for s in samples] for n in range(WORKERS)}
    for name, memory in curves.items():
        axes.plot(text, [m / 2**20 for m in memory], label=name, linewidth=1)
    slope = grown["bytes per byte of text"] * 1e9 / 2**20
    axes.set(
        title=f"Parquet, jsonl.gz and tars over http; {WORKERS} workers; tokenizer: {found['tokenizer']}\n"
        f"after the first fifth: {slope:+.2f} MiB per GB of text",
        xlabel="text read, GB",
        ylabel="memory (anonymous and shared, PSS), MiB",
    )
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--tokenizer", metavar="REFERENCE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stream-memory.json")
    arguments = parser.parse_args()
    logging.getLogger("data_pipelines").setLevel(logging.ERROR)  # the server has no ranges, of which each shard warns
    size, name = int(arguments.gigabytes * 1e9), arguments.tokenizer
    tokenizer = Tokenizer.from_directory(resolve(name)) if name else line_tokenizer()
    with tempfile.TemporaryDirectory() as directory, served(Path(directory)) as url:
        write(Path(directory), size)
        print(f"wrote {arguments.gigabytes:g} GB of text", flush=True)
        samples = read(Path(directory), url, size, tokenizer)
    found = {
        "environment": environment(torch.device("cpu")),
        "tokenizer": name or "a token a line",
        "sources": ["parquet", "jsonl.gz", "tar over http"],
        "workers": WORKERS,
        "growth": growth(samples),
        "samples": samples,
    }
    print(json.dumps(found["growth"], indent=1))
    arguments.out.write_text(json.dumps(found) + "\n")
    plot(found, arguments.out.with_suffix(".png"))
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
