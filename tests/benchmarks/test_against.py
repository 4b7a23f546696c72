"""Comparisons with other libraries, which are not installed here: doubles with the few names that the scripts use stand
in for them, in an interpreter of their own."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks import against_trl, against_vllm
from benchmarks.against_trl import information
from benchmarks.against_vllm import SMALL as VLLM
from benchmarks.turns import Peer
from benchmarks.workloads import TINY, make_model, make_text, transformers_model
from models.philox import Rng
from models.rollout import EAGER
from objectives import Rlp, RlpConfig, Step, Template
from tests.helpers import relative_error

VLLM_DOUBLE = """
    import json
    from pathlib import Path
    from types import SimpleNamespace as SamplingParams

    __version__ = "a double"

    class LLM:
        def __init__(self, directory, **settings):
            assert json.loads(Path(directory, "config.json").read_text())["torch_dtype"] == settings["dtype"]
            assert {path.name for path in Path(directory).iterdir()} >= {"model.safetensors"}
            self.read = []

        def reset_prefix_cache(self):
            self.read = []

        def generate(self, prompts, sampling, use_tqdm):
            print("noise that is no answer")
            sampling = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
            reading = not self.read
            assert reading == all(s.max_tokens == 1 for s in sampling)
            assert all(s.temperature == 1.0 and s.ignore_eos for s in sampling)
            if reading:
                self.read = prompts
            assert all(prompt in self.read for prompt in prompts)
            return [
                SamplingParams(outputs=[SamplingParams(token_ids=[0] * s.max_tokens)] * s.n) for s in sampling
            ]
"""
TRL_DOUBLE = """
    from contextlib import nullcontext
    from types import SimpleNamespace as GRPOConfig

    __version__ = "a double"

    class GRPOTrainer:
        def __init__(self, model, processing_class, reward_funcs, args, train_dataset, callbacks):
            self.model, self.tokenizer, self.reward = model, processing_class, reward_funcs
            self.args, self.rows, (self.callback,) = args, list(train_dataset), callbacks
            self.accelerator = GRPOConfig(autocast=nullcontext)

        def train(self):
            G, T = self.args.num_generations, self.args.max_completion_length
            per_step = self.args.per_device_train_batch_size // G
            for step in range(self.args.max_steps):
                self.callback.on_step_begin()
                rows = [row for row in self.rows[step * per_step :][:per_step] for _ in range(G)]
                for row in rows:  # TRL makes tokens of the text
                    ids = self.tokenizer(row["prompt"]).input_ids
                    assert ids[: len(row["tokens"]) - 1] == row["tokens"][:-1]
                ids = [[7 + i] * T for i in range(len(rows))]
                rewards = self.reward(
                    prompts=[row["prompt"] for row in rows], completions=ids, completion_ids=ids,
                    tokens=[row["tokens"] for row in rows], trainer_state=None,
                )
                assert len(set(rewards)) > 1 and max(rewards) < 0
                self.callback.on_step_end()
"""


@pytest.fixture
def python_with(tmp_path: Path):
    """An interpreter that has this module, too."""

    def python(name: str, source: str) -> str:
        (tmp_path / "double").mkdir()
        (tmp_path / "double" / f"{name}.py").write_text(textwrap.dedent(source))
        interpreter = tmp_path / "python"
        interpreter.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/double exec {sys.executable} "$@"\n')
        interpreter.chmod(0o755)
        return str(interpreter)

    return python


def test_vllm_decodes_as_many_tokens_behind_the_same_texts(python_with, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--dtypes", "float32", "--rounds", "2", "--out", str(out)]
    against_vllm.main([*arguments, "--vllm-python", python_with("vllm", VLLM_DOUBLE)])
    found = json.loads(out.read_text())["float32"]
    assert found["vllm"]["version"] == "a double"
    c = VLLM["equal"]
    assert found["equal"]["tokens"] == c["B"] * c["K"] * c["length"]
    c = VLLM["ragged"]
    assert c["B"] * c["K"] < found["ragged"]["tokens"] < c["B"] * c["K"] * c["length"]
    for case in ("equal", "ragged"):
        ratio = found[case]["ours / vLLM, decoded tokens/s"]
        assert 0 < ratio["low"] < ratio["high"]  # two rounds
    assert "float32" in capsys.readouterr().out


def test_a_peer_that_cannot_start_ends_the_comparison():
    with pytest.raises(SystemExit, match="no_such_module --serve ended with code 1"):
        Peer(sys.executable, "no_such_module", threads=1)
    with pytest.raises(SystemExit, match="no/python cannot be started"):
        Peer("no/python", "benchmarks.against_vllm", threads=1)


def test_trl_takes_turns_with_the_same_prompts(python_with, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--dtypes", "float32", "--rounds", "1", "--out", str(out)]
    against_trl.main([*arguments, "--trl-python", python_with("trl", TRL_DOUBLE)])
    found = json.loads(out.read_text())
    assert found["setting"]["T"] == against_trl.SMALL.T
    assert found["float32"]["about"]["TRL"]["version"] == "a double"
    assert found["float32"]["TRL / ours, time"]["median"] > 0
    assert found["float32"]["ours, peak GB"] > 0.1
    assert "TRL / ours" in capsys.readouterr().out


def test_the_reward_given_to_trl_is_that_of_rlp():
    P, G, T = 12, 3, 5
    model = make_model(TINY, torch.float32, torch.device("cpu"))
    # A closing tag that is not sampled by chance.
    objective = Rlp(RlpConfig(length=T, thoughts=G, min_prefix=P), Template((1,), (2, 2, 2)))
    text = make_text(TINY, 2, P + 1, torch.device("cpu"))
    with torch.no_grad():
        batch = objective.sample(model, model.read(text), Rng(0, 0), EAGER)
    step = Step(objective, model, [text], Rng(0, 0))
    (output,) = step.losses()
    with_thought_BK = (output.record.reward_BKM + batch.base_BHM)[..., 0]
    thoughts = objective.thoughts_to_score(batch).tokens_BKSM[..., 0].flatten(0, 1).tolist()
    prompts = text.tokens_BN[:, :P].repeat_interleave(G, dim=0).tolist()
    targets = text.tokens_BN[:, P].repeat_interleave(G).tolist()
    found = information(transformers_model(model, torch.float32), prompts, thoughts, targets)
    assert relative_error(torch.tensor(found), with_thought_BK.flatten()) <= 1e-5
