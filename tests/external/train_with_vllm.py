"""RLP with vLLM as its rollout engine, on a CPU, in an environment that has both.

    python -m tests.external.train_with_vllm SCRATCH [--full]

vLLM draws the same thoughts again in another process, so that a run that is continued in the middle ends as one that
was not; its log-probs are the trainer's at every step; and weights that are tampered with stop the run. With --full,
quickstart's run learns as it does with the project's own engine, in some minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

import pretrain.assembly
from checkpoints import export, load_decoder
from checkpoints.references import LAB
from models.decoder import Decoder
from models.thoughts import Text
from pretrain.cli import main

VLLM = ["--rollout.engine", "vllm", "--rollout.cache_gib", "0.25"]
SHORT = ["--steps", "4", "--optimizer.schedule_steps", "4", "--rows_per_step", "1", "--objective.thoughts", "4"]
SHORT += ["--logging.every", "1", "--evaluation.every", "null", "--evaluation.rows", "1"]
SHORT += ["--evaluation.counterfactuals", "false"]
SOLVED = 0.15  # nats, of a held-out answer after a thought


@torch.no_grad()
def with_heads_of_32(narrow: Decoder) -> Decoder:
    """The same function, with the smallest heads that vLLM has on CPUs, of twice the size.

    Every other coordinate of a head is new and 0, which leaves all others their rotary frequencies θ^(-2i/D), and
    queries are √2 times as large, since scores are divided by √D. Training leaves the new ones at 0: their gradients
    are products of each other.
    """
    c = narrow.config
    wide, weights = Decoder(replace(c, head_dim=2 * c.head_dim)), narrow.state_dict()
    for name, parameter in wide.named_parameters():
        old = weights[name]
        if "_proj" not in name or ".mlp." in name:
            parameter.copy_(old)
        elif "o_proj" in name:
            parameter.zero_().unflatten(1, (-1, 2))[..., 0] = old
        else:
            parameter.zero_().unflatten(0, (-1, 2))[:, 0] = old * (2**0.5 if "q_proj" in name else 1.0)
    return wide


def fit(directory: Path, model: Path, *more: str) -> int:
    return main(["fit", "quickstart", "--control", "null", "--model", str(model), "--run-dir", str(directory), *more])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def short(scratch: Path, model: Path) -> None:
    whole, halves = scratch / "whole", scratch / "halves"
    assert fit(whole, model, *VLLM, *SHORT) == 0
    records = lines(whole / "metrics.jsonl")
    for step, record in enumerate(records, start=1):
        assert (record["engine"], record["weights_step"]) == ("vllm", step - 1)
        assert record["sampler_gap"] <= 1e-5, record
    print(
        f"{len(records)} steps: log-probs at most {max(r['sampler_gap'] for r in records):.1e} nats from the trainer's"
    )

    first = ["--steps", "2"]
    assert fit(halves, model, *VLLM, *SHORT, *first) == 0
    again = [
        "-m",
        "pretrain",
        "fit",
        "quickstart",
        "--control",
        "null",
        "--model",
        str(model),
        "--run-dir",
        str(halves),
    ]
    assert subprocess.run([sys.executable, *again, *VLLM, *SHORT]).returncode == 0
    same = ("loss", "reward", "entropy", "grad_norm")
    assert [[r[name] for name in same] for r in lines(halves / "metrics.jsonl")] == [
        [r[name] for name in same] for r in records
    ]
    print("a run continued in another process takes the same steps")

    truth = pretrain.assembly.language_model_weights
    for tampered in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):

        def weights(model, tampered=tampered):
            return ((name, tensor * (1.05 if name == tampered else 1.0)) for name, tensor in truth(model))

        pretrain.assembly.language_model_weights = weights
        assert fit(scratch / tampered, model, *VLLM, *SHORT) == 1
        assert not (scratch / tampered / "metrics.jsonl").exists()
    pretrain.assembly.language_model_weights = truth
    print("weights that are tampered with stop the run")


def full(scratch: Path, model: Path) -> None:
    for engine, more in (("auto", []), ("vllm", VLLM)):
        directory = scratch / engine
        assert fit(directory, model, *more) == 0
        answer = lines(directory / "evaluations.jsonl")[-1]["nll_thought"]
        seconds = lines(directory / "metrics.jsonl")[-1]["seconds"]
        print(f"rollout.engine {engine}: a held-out answer at {answer:.3f} nats after a thought, {seconds:.0f} s")
        assert answer <= SOLVED


if __name__ == "__main__":
    scratch = Path(sys.argv[1])
    narrow = load_decoder(LAB)
    wide = with_heads_of_32(narrow)
    text = Text.from_rows(torch.randint(60, (2, 64), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        assert (wide.read(text).hidden_BNW - narrow.read(text).hidden_BNW).abs().max() <= 1e-4
    export(wide, scratch / "model", LAB)
    (full if "--full" in sys.argv else short)(scratch, scratch / "model")
