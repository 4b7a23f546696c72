"""Sources of every kind, made of the same documents, and a stream's digests as ranks and workers read it:

    python -m tests.data_pipelines.streams [--steps 1000]

checks every kind of source, and a mixture, at full length; the tests do the same in short.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import random
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_pipelines import DataConfig, SourceConfig, StreamText, Tokenizer, open_data
from data_pipelines.data_module import TextDataModule
from pretrain.data import digest
from tests.data_pipelines.conftest import byte_level, save

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROWS, LANES = 8, 8
READERS = [(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 2)]


def documents(count: int, seed: int = 0) -> list[str]:
    """Different texts of 3 to 80 words."""
    rng = random.Random(seed)
    words = [[str(rng.randrange(1000)) for _ in range(rng.randrange(3, 80))] for _ in range(count)]
    return [f"{seed}-{n}: {' '.join(w)}" for n, w in enumerate(words)]


def write(kind: str, directory: Path, texts: list[str], shards: int = 3) -> str:
    """Writes texts as shards of a kind; the reference that reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        part, path = texts[number::shards], directory / f"{number:03d}.{kind}"
        lines = b"".join(json.dumps({"text": text, "n": n}).encode() + b"\n" for n, text in enumerate(part))
        if kind == "jsonl":
            path.write_bytes(lines)
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(lines, mtime=0))
        elif kind == "jsonl.zst":
            path.write_bytes(zstd.compress(lines))
        elif kind == "parquet":
            pq.write_table(pa.table({"text": part, "n": list(range(len(part)))}), path, row_group_size=50)
        elif kind in ("tar", "tar.gz"):
            with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
                for n, text in enumerate(part):
                    info = tarfile.TarInfo(f"{n:05d}.txt")
                    info.size = len(text.encode())
                    tar.addfile(info, io.BytesIO(text.encode()))
        else:
            raise ValueError(kind)
    return str(directory)


KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "tar", "tar.gz")


def sources(root: Path, count: int) -> dict[str, dict]:
    """Keys of `data` by name: every kind of source, and a mixture of three whose weights change."""
    found = {kind: {"reference": write(kind, root / kind, documents(count))} for kind in KINDS}
    found["lab"] = {"reference": "lab:tasks=sum,chain=4"}
    found["best fit"] = {**found["parquet"], "packing": "best_fit"}
    mixture = {
        "web": SourceConfig(reference=found["jsonl"]["reference"], weight=[(0, 3.0), (50, 1.0)]),
        "code": SourceConfig(reference=write("tar", root / "code", documents(count // 2, 1))),
        "lab": SourceConfig(reference="lab:tasks=sum,chain=4", weight=0.1),
    }
    return found | {"mixture": {"mixture": mixture}}


def open_stream(keys: Mapping, tokenizer: Tokenizer, cache: Path, **more) -> StreamText:
    config = DataConfig(**{"stream": True, "length": 64, "lanes": LANES, **keys, **more})
    text = open_data(config, tokenizer, 3, cache, rows_per_step=ROWS)
    assert isinstance(text, StreamText)
    return text


def digests(
    text: StreamText, stop: int, start: int = 0, states: Mapping | None = None, ranks: int = 1, workers: int = 0
) -> tuple[list[str], dict[int, dict]]:
    """A digest of each step's global batch, and the states behind the last, by way of JSON."""
    modules = [TextDataModule(text, stop, ROWS, start, workers, states) for _ in range(ranks)]
    found = []
    for parts in zip(*(m.batches(rank, ranks) for rank, m in enumerate(modules)), strict=True):
        for module, part in zip(modules, parts, strict=True):
            module.on_after_batch_transfer(part, 0)
        order = torch.cat([part["sample_id_B"] for part in parts]).argsort()
        found.append(digest({name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}))
    newest: dict[int, dict] = {}
    for lane, state in itertools.chain.from_iterable(module.state().items() for module in modules):
        if lane not in newest or state["rows"] > newest[lane]["rows"]:
            newest[lane] = state
    return found, {int(lane): state for lane, state in json.loads(json.dumps(newest)).items()}


def check(text: StreamText, steps: int, rng: random.Random, resumptions: int, readers=READERS) -> None:
    """The same digests for every number of ranks and workers, and however often the stream is left and resumed."""
    expected, _ = digests(text, steps)
    assert len(set(expected)) == steps
    for ranks, workers in readers:
        assert digests(text, steps, ranks=ranks, workers=workers)[0] == expected, (ranks, workers)
    stops = sorted({*(stop for _ in range(resumptions) for stop in [rng.randrange(1, steps - 1)] * 2)})
    stops = sorted({*stops, *(stop + 1 for stop in stops), steps})  # twice in a row
    found, states, start = [], None, 0
    for stop in stops:
        ranks, workers = rng.choice(readers)
        more, states = digests(text, stop, start, states, ranks, workers)
        found, start = found + more, stop
    assert found == expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = Tokenizer.from_directory(save(byte_level("<end>"), root / "tokenizer", eos_token="<end>"))
        for name, keys in sources(root, 3000).items():
            text = open_stream(keys, tokenizer, root / "cache")
            check(text, steps, random.Random(name), resumptions=10)
            print(f"{name}: the first {steps} steps are the same in all ways", flush=True)


if __name__ == "__main__":
    main()
