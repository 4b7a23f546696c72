"""A step of RLP on a CPU beside one of TRL's GRPOTrainer with the same reward, in turns, on the same weights and text:

    python -m benchmarks.against_trl --trl-python PATH [--dtypes float32 bfloat16] [--rounds R] [--out FILE.json]

PATH is the Python of an environment with TRL (`pip install trl` beside a torch for CPUs). A step is two prompts of 256
tokens, 8 thoughts of 64 tokens for each, rewarded by log p(next token | prompt, thought, closing tag), and an update of
all weights of SmolLM2-135M by AdamW; masters are fp32, bfloat16 is mixed precision.

TRL gets what makes it fastest here: all completions at once, generation with a cache, no reference model, no second
pass for old log-probs, logits of one position for the reward, nothing logged or saved. Its reward function holds the
model, since TRL hands it text and ids alone. RLP also reads the text by its teacher, whose log-prob without a thought
makes the reward a gain, and updates that. Thoughts have their full length in both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.measure import Spread, peak_memory
from benchmarks.report import print_table, spread
from benchmarks.turns import Peer, Turns

CPU = torch.device("cpu")
LEARNING_RATE, CLIP = 1e-6, 1.0
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Workload:
    """A step: so many prompts of P tokens, G thoughts of T sampled tokens for each.

    model, data: references, as in recipes. open, close: what a thought is written between; no model writes `close`.
    """

    model: str = "smollm2-135m"
    data: str = "python-docs"
    open: str = "<think>"
    close: str = "</think>"
    prompts: int = 2
    P: int = 256
    G: int = 8
    T: int = 64


SMALL = Workload("lab", "lab:tasks=sum,chain=8", "=", "=+=+=+", prompts=2, P=19, G=2, T=4)


def prompt_rows(work: Workload, directory: Path, count: int) -> Rows:
    """Text of P + 1 tokens whose first P are what the tokenizer makes of it, since TRL takes prompts as text."""
    from data_pipelines import DataConfig, Tokenizer, open_data

    tokenizer = Tokenizer.from_directory(directory)
    (opening,) = tokenizer.encode([work.open])
    data = open_data(DataConfig(reference=work.data, length=work.P + 1), tokenizer, seed=0)
    rows: list[Mapping[str, Any]] = []
    for step in range(100 * count):
        (tokens,) = data.batch(step, rows_per_step=1)["tokens_BN"].tolist()
        prompt = tokenizer.decode(tokens[:-1]) + work.open
        if list(tokenizer.encode([prompt])[0]) == [*tokens[:-1], *opening]:
            rows.append({"prompt": prompt, "tokens": tokens})
        if len(rows) == count:
            return rows
    raise SystemExit(f"the text has fewer than {count} rows of {work.P} tokens that survive their tokenizer")


def serve_ours(work: Workload, directory: Path, rows: Rows, dtype: str) -> None:
    turns = Turns()
    from checkpoints import load_thinking_model
    from data_pipelines import Tokenizer
    from models import Rng, Text
    from models.rollout import EAGER, Native, Preferred
    from models.rollout.native import compiler
    from objectives import Rlp, RlpConfig, Step

    tokenizer = Tokenizer.from_directory(directory)
    model = load_thinking_model(directory, None if dtype == "float32" else getattr(torch, dtype))
    model.ban(tokenizer.size, tokenizer.control_ids)
    config = RlpConfig(
        length=work.T, thoughts=work.G, temperature=1.0, min_prefix=work.P, open=work.open, close=work.close
    )
    rlp = Rlp.build(config, tokenizer)
    engine = EAGER if compiler() is None else Preferred(Native(), EAGER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    turns.answer(threads=torch.get_num_threads())
    for number, _ in enumerate(turns):
        started = time.perf_counter()
        tokens = [row["tokens"] for row in rows[number * work.prompts : (number + 1) * work.prompts]]
        lengths: list[int] = []
        for output in Step(rlp, model, [Text.from_rows(torch.tensor(tokens))], Rng(0, number), engine).losses():
            output.loss.backward()
            if output.record is not None:
                lengths = (output.record.thoughts.lengths_BKM.flatten() - len(rlp.template.open)).tolist()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        rlp.after_step(model)
        turns.answer(seconds=time.perf_counter() - started, peak_bytes=peak_memory(CPU), lengths=lengths)


@torch.no_grad()
def information(
    model: Any, prompts: Sequence[list[int]], thoughts: Sequence[list[int]], targets: Sequence[int]
) -> list[float]:
    """log p(target | prompt, thought) of each, all of the same length, by a causal language model of transformers."""
    read = torch.tensor([[*prompt, *thought] for prompt, thought in zip(prompts, thoughts, strict=True)])
    logits: Tensor = model(input_ids=read, logits_to_keep=1, use_cache=False).logits[:, -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(targets)[:, None])[:, 0].tolist()


def serve_trl(work: Workload, directory: Path, rows: Rows, dtype: str) -> None:
    turns = Turns()
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    opening, closing = (tokenizer(tag, add_special_tokens=False).input_ids for tag in (work.open, work.close))
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], tokens: list[list[int]], **_: Any) -> list[float]:
        lengths[:] = [len(ids) for ids in completion_ids]
        thoughts = [[*opening, *ids, *closing] for ids in completion_ids]
        with trainer.accelerator.autocast():
            return information(trainer.model, [row[:-1] for row in tokens], thoughts, [row[-1] for row in tokens])

    class TakesTurns(TrainerCallback):
        """A step begins when it is asked for, with generating."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            next(asked)
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = time.perf_counter() - self.started
            turns.answer(seconds=seconds, peak_bytes=peak_memory(CPU), lengths=lengths)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = trl.GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=trl.GRPOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=dtype == "bfloat16",
                per_device_train_batch_size=work.prompts * work.G,
                num_generations=work.G,
                max_completion_length=work.T,
                generation_kwargs={"min_new_tokens": work.T},
                temperature=1.0,
                beta=0.0,
                learning_rate=LEARNING_RATE,
                max_grad_norm=CLIP,
                max_steps=len(rows) // work.prompts,
                gradient_checkpointing=False,
                shuffle_dataset=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(list(rows)),
            callbacks=[TakesTurns()],
        )
        turns.answer(version=trl.__version__, threads=torch.get_num_threads())
        asked = iter(turns)
        trainer.train()


SERVED: dict[str, Callable[..., None]] = {"ours": serve_ours, "TRL": serve_trl}


def compare(python: str, work: Workload, directory: Path, rows: Rows, dtype: str) -> dict[str, Any]:
    """Seconds and peak memory of a step of both, which take turns; the first turns are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder, "job.json")
        job.write_text(json.dumps([asdict(work), str(directory), list(rows), dtype]))
        threads = torch.get_num_threads()
        with (
            Peer(sys.executable, "benchmarks.against_trl", "ours", str(job), threads=threads) as ours,
            Peer(python, "benchmarks.against_trl", "TRL", str(job), threads=threads) as theirs,
        ):
            peers = {"ours": ours, "TRL": theirs}
            turns = [{name: peer.work() for name, peer in peers.items()} for _ in range(len(rows) // work.prompts)]
            about = {name: peer.hello for name, peer in peers.items()}
    for name, lengths in ((name, its["lengths"]) for turn in turns for name, its in turn.items()):
        if lengths != [work.T] * work.prompts * work.G:
            raise SystemExit(f"thoughts of {name} have {lengths} tokens, not {work.T} each")
    return {
        "about": about,
        **{f"{name}, s": vars(Spread.of([turn[name]["seconds"] for turn in turns[1:]])) for name in peers},
        "TRL / ours, time": vars(Spread.of([turn["TRL"]["seconds"] / turn["ours"]["seconds"] for turn in turns[1:]])),
        **{f"{name}, peak GB": turns[-1][name]["peak_bytes"] / 1e9 for name in peers},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", metavar="PATH", help="Python of an environment with TRL")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"], help="default: both"
    )
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument("--tiny", action="store_true", help="the lab's model at toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "against-trl.json")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        name, path = arguments.serve
        work, directory, rows, dtype = json.loads(Path(path).read_text())
        SERVED[name](Workload(**work), Path(directory), rows, dtype)
        return
    if arguments.trl_python is None:
        parser.error("name an environment's Python with --trl-python")
    from checkpoints import resolve

    work = SMALL if arguments.tiny else Workload()
    directory = resolve(work.model)
    rows = prompt_rows(work, directory, (arguments.rounds + 1) * work.prompts)
    found: dict[str, Any] = {"environment": environment(CPU), "setting": asdict(work)}
    for dtype in arguments.dtypes:
        found[dtype] = compare(arguments.trl_python, work, directory, rows, dtype)
    print_table(
        "A step, medians and ranges of rounds",
        ["dtype", "", "ours, s", "TRL, s", "TRL / ours", "ours, peak GB", "TRL, peak GB"],
        [
            [
                dtype,
                "",
                *(spread(found[dtype][name]) for name in ("ours, s", "TRL, s", "TRL / ours, time")),
                *(f"{found[dtype][name]:.1f}" for name in ("ours, peak GB", "TRL, peak GB")),
            ]
            for dtype in arguments.dtypes
        ],
    )
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
