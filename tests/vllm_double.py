"""A stand-in for vLLM at the few calls that the engine makes of it: a decoder that reads its whole sequence again for
every token, and keeps whatever weights it was handed last."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from checkpoints.families import config_from_hf
from models.decoder import Decoder
from models.rollout import vllm as engine
from models.thinking import ThinkingModel
from models.thoughts import Text


class DoubleLLM:
    """calls: the names of those that concern memory and weights. tamper: (name, tensor) → what arrives."""

    def __init__(self, directory: str, **settings):
        hf = json.loads((Path(directory) / "config.json").read_text())
        assert settings["load_format"] == "dummy" and settings["logprobs_mode"] == "processed_logprobs"
        self.longest, self.llm_engine = settings["max_model_len"], self
        self.model = ThinkingModel(Decoder(config_from_hf(hf)))
        self.model.decoder.init_weights(torch.Generator().manual_seed(9))
        self.calls: list[str] = []
        self.tamper = lambda name, tensor: tensor
        self._running: list[SimpleNamespace] = []

    def collective_rpc(self, method, kwargs):
        self.calls.append(method)
        handed = dict(kwargs["weights_iterator"])
        order = [int(name.split(".")[2]) for name in handed if name.startswith("model.layers")]
        assert order == sorted(order)
        arrived = {name.removeprefix("model."): self.tamper(name, t).clone() for name, t in handed.items()}
        self.model.decoder.load_state_dict(arrived, strict=True)

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)

    def wake_up(self, tags):
        self.calls.append(f"wake_up {tags}")

    def add_request(self, number, prompt, params):
        ids = list(prompt["prompt_token_ids"])
        assert len(ids) + params.max_tokens <= self.longest
        generator = torch.Generator().manual_seed(params.seed)
        self._running.append(
            SimpleNamespace(number=number, ids=ids, params=params, generator=generator, said=[], at=[])
        )

    def has_unfinished_requests(self):
        return bool(self._running)

    @torch.no_grad()
    def step(self):
        """One token more for each request → those that are finished."""
        running, self._running, finished = self._running, [], []
        for r in running:
            hidden_W = self.model.read(Text.from_rows(torch.tensor([r.ids]))).hidden_BNW[0, -1]
            logits_V = self.model.head_weight_VW @ hidden_W
            for token, bias in (r.params.logit_bias or {}).items():
                logits_V[token] += bias
            logprobs_V = (logits_V / (r.params.temperature or 1.0)).log_softmax(-1)
            draw = torch.multinomial(logprobs_V.exp().nan_to_num(1.0), 1, generator=r.generator)
            token = int(draw if r.params.temperature else logprobs_V.argmax())
            r.ids.append(token)
            r.said.append(token)
            r.at.append({token: SimpleNamespace(logprob=float(logprobs_V[token]))})
            if token in r.params.stop_token_ids or len(r.said) == r.params.max_tokens:
                output = SimpleNamespace(token_ids=tuple(r.said), logprobs=r.at)
                finished.append(SimpleNamespace(request_id=r.number, outputs=[output]))
            else:
                self._running.append(r)
        return finished


@pytest.fixture
def vllm_double(monkeypatch):
    """vLLM as it is found where it is installed; `started` lists the LLMs, `can_sleep` says whether they do,
    `refuses` why none starts."""
    double = SimpleNamespace(started=[], can_sleep=False, refuses="")

    def llm(directory, **settings):
        if double.refuses:
            raise ValueError(double.refuses)
        double.started.append(DoubleLLM(directory, **settings))
        return double.started[-1]

    platform = SimpleNamespace(is_cpu=lambda: True, is_sleep_mode_available=lambda: double.can_sleep)
    modules = {
        "vllm": dict(LLM=llm, SamplingParams=SimpleNamespace),
        "vllm.platforms": dict(current_platform=platform),
        "vllm.inputs": dict(tokens_input=lambda ids: {"type": "token", "prompt_token_ids": ids}),
        "vllm.sampling_params": dict(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final")),
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    engine.start.cache_clear()
    yield double
    engine.start.cache_clear()
