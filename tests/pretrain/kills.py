"""Runs that are killed at random moments and started again end as the run that was left alone:

    python -m tests.pretrain.kills [--kills 10] [--objectives quiet_star rlp rpt]

Each objective trains a tiny model on a streamed mixture whose weights change; it is killed with SIGKILL, workers
included, and continued with another number of workers. Final weights, optimizer and lanes are the same to the bit, and
every step is in metrics.jsonl once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from checkpoints.hugging_face import export
from models.decoder import Decoder
from models.thinking import ThinkingModel
from tests.data_pipelines.conftest import byte_level, save
from tests.data_pipelines.streams import documents, write
from tests.helpers import tiny_config

STEPS = 30
OBJECTIVES = {
    "quiet_star": {"name": "quiet_star", "length": 3, "lookahead": 2, "thoughts": 2},
    "rlp": {"name": "rlp", "length": 4, "thoughts": 2, "anchors_per_document": 1, "min_prefix": 4},
    "rpt": {"name": "rpt", "length": 4, "thoughts": 2, "anchors_per_document": 1, "min_prefix": 4},
}


def write_model(directory: Path) -> Path:
    tokenizer = save(byte_level("<|endoftext|>"), directory / "tokenizer", eos_token="<|endoftext|>")
    decoder = Decoder(tiny_config(vocab_size=300, max_positions=128))
    decoder.init_weights(torch.Generator().manual_seed(0))
    export(ThinkingModel(decoder), directory / "model", tokenizer)
    return directory / "model"


def recipe(directory: Path, model: Path, objective: str, steps: int) -> Path:
    web, code = (write(kind, directory / kind, documents(300, n)) for n, kind in enumerate(("jsonl", "tar")))
    mixture = {"web": {"reference": web, "weight": [[0, 3.0], [steps, 1.0]]}, "code": {"reference": code}}
    return write_recipe(directory / f"{objective}.yaml", model, OBJECTIVES[objective], steps, {"mixture": mixture})


def write_recipe(path: Path, model: Path, objective: dict, steps: int, data: dict) -> Path:
    """A YAML file; JSON is YAML."""
    settings = {
        "steps": steps,
        "objective": objective,
        "model": str(model),
        "data": {"length": 48, "lanes": 4, "end_of_document": "<|endoftext|>", **data},
        "rows_per_step": 4,
        "compute_dtype": "fp32",
        "optimizer": {"lr": 1e-3},
        "evaluation": {"rows": 2, "counterfactuals": False},
        "checkpoint": {"every": 3},
        "logging": {"wandb": "disabled", "csv": False},
    }
    path.write_text(json.dumps(settings))
    return path


def start(recipe: Path, run: Path, workers: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "pretrain",
        "fit",
        str(recipe),
        "--run-dir",
        str(run),
        "--data_workers",
        str(workers),
    ]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    """What it said."""
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def final(run: Path, steps: int) -> tuple[dict[str, torch.Tensor], dict]:
    at = run / "checkpoints" / f"step-{steps:08d}"
    # Not the global generators: no objective uses them, and every process has others to begin with.
    paths = [path for path in at.glob("*.safetensors") if path.stem != "random"]
    tensors = {f"{path.stem}/{name}": t for path in paths for name, t in load_file(path).items()}
    return tensors, json.loads((at / "state.json").read_text())["lanes"]


def check(directory: Path, objective: str, kills: int, rng: random.Random, steps: int = STEPS) -> None:
    path = recipe(directory, write_model(directory), objective, steps)
    began = time.monotonic()
    finish(start(path, directory / "alone", 0))
    took = time.monotonic() - began
    killed = 0
    while killed < kills:
        process = start(path, directory / "killed", rng.choice((0, 2)))
        records, seen = directory / "killed" / "metrics.jsonl", 0
        before = len(records.read_text().splitlines()) if records.exists() else 0
        # Some steps on, at any moment of a step, a save, or an evaluation.
        while process.poll() is None and seen - before < rng.randrange(1, 6):
            seen = len(records.read_text().splitlines()) if records.exists() else 0
            time.sleep(0.01)
        time.sleep(rng.random() * took / steps / 2)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1
    finish(start(path, directory / "killed", rng.choice((0, 2))))
    tensors, lanes = final(directory / "alone", steps)
    again, lanes_again = final(directory / "killed", steps)
    assert lanes == lanes_again
    assert tensors.keys() == again.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, again[name])]
    assert not different, different
    records = [json.loads(line) for line in (directory / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    print(f"{objective}: killed {killed} times in {steps} steps, the same to the bit", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    arguments = parser.parse_args()
    for objective in arguments.objectives:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder), objective, arguments.kills, random.Random(0))


if __name__ == "__main__":
    main()
