"""How large a stream may be: the manifest of many shards, and the first batch of a run continued deep inside of them.

    python -m benchmarks.scale [--shards 10000] [--out FILE]

Writes so many small parquet shards to a temporary directory, and prints, as JSON: seconds to make their manifest from
the footers, seconds in another process from nothing to the first batch behind step 1,000,000 (imports apart), and the
bytes of the lanes' states.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environment import environment

LANES, ROWS, STEP = 64, 8, 1_000_000


def write(folder: Path, shards: int) -> None:
    for shard in range(shards):
        texts = [f"Row {row} of shard {shard}. " * 20 for row in range(20)]
        pq.write_table(pa.table({"text": texts}), folder / f"{shard:05d}.parquet")


def states() -> dict[int, dict[str, Any]]:
    """Of lanes that have read the whole several times and are inside a window, with counts as large as they get."""
    counts = {
        name: 10**12 for name in ("documents", "tokens", "bytes", "held_out", "empty", "control_text", "enormous")
    }
    cursor = [7, 5, [0, 0], 11, -123.456, counts]
    rows = STEP * ROWS // LANES
    return {lane: {"rows": rows, "offset": 3, "chosen_at": rows - 1, "sources": [cursor]} for lane in range(LANES)}


def open_stream(folder: Path) -> Any:
    from checkpoints.references import resolve
    from data_pipelines import DataConfig, Tokenizer, open_data

    config = DataConfig(reference=str(folder / "shards"), stream=True, lanes=LANES, held_out=0.0)
    tokenizer = Tokenizer.from_directory(resolve("lab"))
    config = config.model_copy(update={"end_of_document": "<|endoftext|>"})
    return open_data(config, tokenizer, 0, folder / "cache", rows_per_step=ROWS)


def resume(folder: Path) -> float:
    """Seconds to the first batch, with the manifest in the cache."""
    from data_pipelines.data_module import TextDataModule

    started = time.perf_counter()
    text = open_stream(folder)
    next(iter(TextDataModule(text, STEP + 1, ROWS, STEP, states=states()).batches(0, 1)))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume is not None:
        print(resume(arguments.resume))
        return
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        write(folder / "shards", arguments.shards)
        started = time.perf_counter()
        text = open_stream(folder)
        manifest = time.perf_counter() - started
        command = [sys.executable, "-m", "benchmarks.scale", "--resume", str(folder)]
        again = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found = {
            "environment": environment(torch.device("cpu")),
            "shards": arguments.shards,
            "manifest, seconds": manifest,
            "to the first batch behind step 1,000,000, seconds": again,
            "states of 64 lanes, bytes": len(json.dumps(states())),
            "contents, bytes": len(json.dumps(text.contents)),
        }
    said = json.dumps(found, indent=1)
    print(said)
    if arguments.out is not None:
        arguments.out.write_text(said + "\n")


if __name__ == "__main__":
    main()
