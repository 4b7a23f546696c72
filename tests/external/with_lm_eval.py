"""Loads plain exports in lm-evaluation-harness, `--model hf`: its log-likelihoods are those of this project's logits.
And it reads our task files for others' data.

    python with_lm_eval.py OUT TASKS

OUT: of exports.py; TASKS: pretrain/evaluation/tasks. Needs nothing of this project.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file

ERROR = 1e-5
CONTEXT = 12  # tokens of a prompt that are given
CARD = "---\nconfigs:\n- config_name: main\n  data_files: [{split: test, path: test.jsonl}]\n---\n"


def check(directory: Path) -> str:
    reference = load_file(directory.with_name(f"{directory.name}.reference.safetensors"))
    lm = HFLM(str(directory), device="cpu", dtype="float32", batch_size=8)
    requests = [((str(i), ""), row[:CONTEXT], row[CONTEXT:]) for i, row in enumerate(reference["tokens"].tolist())]
    found = torch.tensor([score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)])
    logprobs = reference["logits"][:, CONTEXT - 1 : -1].log_softmax(-1)
    truth = logprobs.gather(-1, reference["tokens"][:, CONTEXT:, None]).sum(dim=(1, 2))
    error = ((found - truth).norm() / truth.norm()).item()
    assert error <= ERROR, f"{directory.name}: log-likelihoods differ by {error:.1e}"
    return f"log-likelihoods differ by {error:.1e}"


def scores(directory: Path, tasks: Path) -> dict[str, float]:
    """Of gsm8k_probability on three problems."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        data = Path("openai/gsm8k")
        data.mkdir(parents=True)
        (data / "README.md").write_text(CARD)
        lines = [json.dumps({"question": f"{n}+5=", "answer": f"#### {n + 5}"}) + "\n" for n in range(3)]
        (data / "test.jsonl").write_text("".join(lines))
        found = simple_evaluate(
            "hf",
            model_args={"pretrained": str(directory), "device": "cpu"},
            tasks=["gsm8k_probability"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        )
    return found["results"]["gsm8k_probability"]


if __name__ == "__main__":
    exports, tasks = (Path(argument).absolute() for argument in sys.argv[1:])
    directories = sorted(path for path in (exports / "plain").iterdir() if path.is_dir())
    for directory in directories:
        print(f"lm-eval {version('lm_eval')}, {directory.name}: {check(directory)}")
    found = scores(directories[0], tasks)
    assert 0 < found["expected_probability,none"] < 1, found
    print(f"lm-eval {version('lm_eval')}: it reads our task files")
