"""What snapshots cost a run: throughput while they are written, time and memory of saving, loading and starting.

python -m benchmarks.snapshots [--repeats R] [--rounds-of STEPS] [--tiny] [--out FILE.json]

saving     STEPS steps of next-token training on a ~50M model, without a snapshot, with one that is written while
           the steps go on, and with one that they wait for; all take turns, each ratio is within a round
save, load time and host memory of each of them: staging alone, until it is durable, reading it in full and again by
           tensor
start      two ranks that read a 1.5B-shaped bf16 directory straight into fp32 shards: time, and host memory at its
           peak against what the shards and the largest tensor take
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.environment import environment
from benchmarks.measure import Spread, race
from benchmarks.report import number, print_table
from checkpoints.families import config_to_hf
from checkpoints.hugging_face import language_model_tensors, open_thinking_model
from checkpoints.loading import empty_model
from checkpoints.snapshots import SnapshotWriter, load_checkpoint, open_snapshot
from models.decoder import Decoder, DecoderConfig
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives import NextToken, Step
from pretrain.sharding import shard

# GPT-2 small's depth at half its width; and Qwen2.5-1.5B.
SMALL = dict(
    width=512, ffn_width=1536, layers=12, heads=8, kv_heads=4, head_dim=64, vocab_size=32768, tie_embeddings=True
)
LARGE = dict(
    width=1536, ffn_width=8960, layers=28, heads=12, kv_heads=2, head_dim=128, vocab_size=151936, tie_embeddings=True
)
TINY = dict(width=32, ffn_width=64, layers=2, heads=2, kv_heads=1, head_dim=16, vocab_size=512)
CPU = torch.device("cpu")


def decoder_config(sizes: dict[str, int]) -> DecoderConfig:
    return DecoderConfig(**sizes, max_positions=4096)  # type: ignore[arg-type]


class Training:
    """Next-token steps on random text, and their state as a run has it."""

    def __init__(self, config: DecoderConfig, rows: int, length: int):
        decoder = Decoder(config)
        decoder.init_weights(torch.Generator().manual_seed(0))
        self.model = ThinkingModel(decoder)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.text = Text.from_rows(torch.randint(config.vocab_size, (rows, length)))
        self.objective = NextToken()
        self.step = 0
        self.take(1)

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            for output in Step(self.objective, self.model, [self.text], Rng(0, self.step)).losses():
                output.loss.backward()
            self.optimizer.step()
            self.step += 1

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        states = self.optimizer.state.items()
        moments = {f"{names[id(p)]}/{key}": value for p, entries in states for key, value in entries.items()}
        return {"model": dict(self.model.state_dict()), "optimizer": moments}


def saving(training: Training, steps: int, repeats: int, directory: Path) -> dict[str, Any]:
    """Seconds of rounds of `steps` steps, and of what saving does."""
    writer = SnapshotWriter(directory)
    staged: list[float] = []

    def save() -> None:
        if (error := writer.error()) is not None:
            raise error
        started = time.perf_counter()
        writer.save(1, training.tensors(), {"step": 1})
        staged.append(time.perf_counter() - started)

    def in_background() -> None:
        save()
        training.take(steps)

    def waited_for() -> None:
        in_background_writer_done()
        save()
        in_background_writer_done()
        training.take(steps)

    def in_background_writer_done() -> None:
        if (error := writer.error()) is not None:
            raise error

    def alone() -> None:
        in_background_writer_done()
        training.take(steps)

    variants: dict[str, Callable[[], None]] = {"alone": alone, "in background": in_background, "waited for": waited_for}
    measured = race(variants, CPU, repeats)
    base = measured["alone"].figures["seconds"]
    ratios = {
        name: vars(Spread.of([s / b - 1 for s, b in zip(m.figures["seconds"], base, strict=True)]))
        for name, m in measured.items()
    }
    return {
        "seconds": {name: m.to_json() for name, m in measured.items()},
        "cost": ratios,
        "staging": statistics.median(staged),
    }


def save_and_load(training: Training, repeats: int, directory: Path) -> dict[str, Any]:
    writer = SnapshotWriter(directory)

    def save() -> None:
        writer.save(1, training.tensors(), {"step": 1})
        if (error := writer.error()) is not None:
            raise error

    def by_tensor() -> None:
        snapshot = open_snapshot(directory / "step-00000001")
        for named in snapshot.tensors.values():
            for stored in named.values():
                stored.whole()

    def load() -> None:
        load_checkpoint(directory / "step-00000001")

    save()
    measured = race({"save until durable": save, "load whole": load, "load by tensor": by_tensor}, CPU, repeats)
    size = sum(file.stat().st_size for file in (directory / "step-00000001").iterdir())
    return {"bytes": size, **{name: m.to_json() for name, m in measured.items()}}


def write_large(config: DecoderConfig, directory: Path) -> None:
    """A Hugging Face directory of random bf16 weights, layer by layer."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_to_hf(config, torch.bfloat16)))
    names = language_model_tensors(empty_model(config, None).decoder)
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors", []).append(name)
    for file, held in files.items():
        save_file({name: torch.randn(names[name].shape).bfloat16() for name in held}, directory / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def start_rank(directory: Path, rank: int, ranks: int, store: Path) -> None:
    """Prints what one rank needs to start."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    dist.barrier()
    before, started = _status("VmRSS"), time.perf_counter()
    unloaded = open_thinking_model(directory)
    shard(unloaded.model, mesh)
    model = unloaded.load(CPU)
    seconds = time.perf_counter() - started
    shards = sum(parameter.to_local().nbytes for parameter in model.parameters())  # type: ignore[attr-defined]
    largest = max(parameter.nbytes for parameter in model.parameters())
    found = {"seconds": seconds, "peak": _status("VmHWM") - before, "shards": shards, "largest_tensor": largest}
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def start(config: DecoderConfig, folder: Path, ranks: int = 2) -> list[dict[str, float]]:
    write_large(config, folder / "large")
    command = [sys.executable, "-m", "benchmarks.snapshots", "--start", str(folder / "large"), str(folder / "store")]
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks)], stdout=subprocess.PIPE, text=True) for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a rank could not start")
    return [json.loads(line.splitlines()[-1]) for line in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; default: 5")
    parser.add_argument("--rounds-of", type=int, default=20, metavar="STEPS", help="default: 20")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "snapshots.json")
    parser.add_argument("--start", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start is not None:
        directory, store, rank, ranks = arguments.start
        start_rank(Path(directory), int(rank), int(ranks), Path(store))
        return
    small, large = (TINY, TINY) if arguments.tiny else (SMALL, LARGE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = Training(decoder_config(small), rows=2, length=32 if arguments.tiny else 256)
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        found: dict[str, Any] = {
            "environment": environment(CPU),
            "setting": {"parameters": parameters, "steps": arguments.rounds_of, "repeats": arguments.repeats},
            "saving": saving(training, arguments.rounds_of, arguments.repeats, folder / "saving"),
            "save and load": save_and_load(training, arguments.repeats, folder / "loading"),
            "start": start(decoder_config(large), folder),
        }
    cost = found["saving"]["cost"]
    print_table(
        f"One snapshot of a {parameters / 1e6:.0f}M model in {arguments.rounds_of} steps",
        ("", "", "slower by"),
        [
            (name, "", f"{c['median']:+.1%} ({c['low']:+.1%} to {c['high']:+.1%})")
            for name, c in cost.items()
            if name != "alone"
        ],
    )
    loading = found["save and load"]
    print(f"staged in {found['saving']['staging']:.2f} s; {loading['bytes'] / 1e6:.0f} MB in all")
    for name in ("save until durable", "load whole", "load by tensor"):
        added = loading[name].get("peak_bytes"), loading[name].get("added_bytes")
        print(
            f"{name}: {number(loading[name]['seconds']['median'])} s, {number((added[1] or 0) / 1e6)} MB of host memory"
        )
    for rank, its in enumerate(found["start"]):
        allowed = 1.2 * its["shards"] + its["largest_tensor"]
        print(
            f"start, rank {rank}: {its['seconds']:.1f} s, {its['peak'] / 1e9:.2f} GB at its peak; 1.2 × its shards "
            f"({its['shards'] / 1e9:.2f} GB) + the largest tensor ({its['largest_tensor'] / 1e9:.2f} GB) are "
            f"{allowed / 1e9:.2f} GB"
        )
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
