"""Loads exports in vLLM on a CPU: its greedy continuations of 20 prompts are those of transformers, token for token.
With this project installed beside it, answers behind thoughts are the project's own, and thinking exports are refused.

    python with_vllm.py OUT [NAME ...]

OUT: of exports.py. Each export gets a process of its own, since vLLM keeps its memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

NEW_TOKENS = 24


def check(directory: Path) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    import torch
    import transformers
    import vllm
    from safetensors.torch import load_file

    prompts = load_file(directory.with_name(f"{directory.name}.reference.safetensors"))["tokens"]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # Without an end, after which rows would be padded; with a mask, which would else be guessed from the padding token.
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    truth = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    engine = vllm.LLM(str(directory), enforce_eager=True, dtype="float32", max_model_len=128)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    given = [{"prompt_token_ids": row.tolist()} for row in prompts]
    found = [list(result.outputs[0].token_ids) for result in engine.generate(given, greedy, use_tqdm=False)]
    differing = [i for i, row in enumerate(truth[:, prompts.shape[1] :].tolist()) if row != found[i]]
    assert not differing, f"{directory.name}: prompts {differing} go on differently"
    print(f"vLLM {vllm.__version__}, {directory.name}: {len(found)} prompts go on as in transformers")
    if find_spec("checkpoints") is not None:
        check_thinking(directory, engine)


def check_thinking(directory: Path, engine) -> None:
    import vllm
    from safetensors.torch import load_file

    from checkpoints.vllm_plugin import split_thought, think_first

    exported = directory.parent.with_name("thinking") / directory.name
    try:
        vllm.LLM(str(exported), enforce_eager=True)
    except ValueError as error:
        assert "vLLM does not load a thinking export: it" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("a thinking export was loaded")
    if directory.name not in ("rlp", "rpt"):
        return
    reference = load_file(exported.with_name(f"{exported.name}.reference.safetensors"))
    prompts, truth = (reference[name].tolist() for name in ("tokens", "sequences"))
    new = len(truth[0]) - len(prompts[0])
    opening, thought = think_first(directory)
    room = thought["length"] + len(thought["close_ids"]) + new
    greedy = vllm.SamplingParams(temperature=0, max_tokens=room, ignore_eos=True, extra_args={"thought": thought})
    results = engine.generate([{"prompt_token_ids": [*p, *opening]} for p in prompts], greedy, use_tqdm=False)
    answers = [split_thought(result.outputs[0].token_ids, thought)[1][:new] for result in results]
    assert [[*p, *a] for p, a in zip(prompts, answers, strict=True)] == truth
    print(f"vLLM {vllm.__version__}, {directory.name}: {len(answers)} answers behind thoughts are the same")


if __name__ == "__main__":
    out, names = Path(sys.argv[1]) / "plain", sys.argv[2:]
    if len(names) == 1:
        check(out / names[0])
    else:
        every = names or sorted(path.name for path in out.iterdir() if path.is_dir())
        failed = [name for name in every if subprocess.run([sys.executable, __file__, sys.argv[1], name]).returncode]
        sys.exit(f"vLLM disagrees about {', '.join(failed)}" if failed else 0)
