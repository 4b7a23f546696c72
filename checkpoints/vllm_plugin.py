"""A plug-in for vLLM: RLP's and RPT's thought before an answer, with a budget, behind which it is closed.

vLLM finds it by its entry points and serves a plain export. A prompt ends with what opens a thought, and the request
carries the rest:

    opening, thought = think_first("out/")
    params = SamplingParams(max_tokens=512, extra_args={"thought": thought})
    llm.generate({"prompt_token_ids": [*prompt, *opening]}, params)

`split_thought` takes what was generated apart. A thinking export is refused: vLLM has no model of that kind, and cannot
have Quiet-STaR's, whose thoughts between two tokens of the text leave no tokens behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from checkpoints.modeling.configuration_forethought import EVERY_TOKEN, ForethoughtConfig

Thought = dict[str, Any]  # length, and the lists close_ids and banned_ids


def think_first(directory: str | Path, length: int | None = None) -> tuple[list[int], Thought]:
    """What opens a thought of a plain export of RLP or RPT, and the thought that its requests ask for.

    length: tokens of a thought at most, by default as trained. Raises ValueError for a model that thinks otherwise.
    """
    path = Path(directory) / "thinking" / "thinking.json"
    described = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not described.get("close_ids"):
        raise ValueError(f"{directory} is no plain export of RLP or RPT; export such a run without --thinking")
    thought = {"length": length or described["length"]} | {k: described[k] for k in ("close_ids", "banned_ids")}
    return described["open_ids"], thought


def split_thought(output_ids: Sequence[int], thought: Thought) -> tuple[list[int], list[int]]:
    """The thought without its closing tag, and the answer."""
    output, end = list(output_ids), _closed_at(output_ids, thought)
    if end is not None:
        return output[: end - len(thought["close_ids"])], output[end:]
    return output[: thought["length"]], output[thought["length"] + len(thought["close_ids"]) :]


def _closed_at(output_ids: Sequence[int], thought: Thought) -> int | None:
    """Where the closing tag that it wrote by itself, within its budget, ends."""
    close, within = list(thought["close_ids"]), list(output_ids[: thought["length"]])
    ends = (end for end in range(len(close), len(within) + 1) if within[end - len(close) : end] == close)
    return next(ends, None)


class ThinkFirst(AdapterLogitsProcessor):
    """Keeps what no thought may contain out of it, and closes it behind its budget."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
        thought = (params.extra_args or {}).get("thought")
        if thought is None:
            return None
        close_ids, length = thought["close_ids"], thought["length"]
        banned = [token for token in thought["banned_ids"] if token not in close_ids]

        def process(output_ids: list[int], logits_V: Tensor) -> Tensor:
            over = len(output_ids) - length
            if over >= len(close_ids) or _closed_at(output_ids, thought) is not None:
                return logits_V
            if over < 0:
                logits_V[[token for token in banned if token < len(logits_V)]] = -torch.inf
                return logits_V
            forced_V = torch.full_like(logits_V, -torch.inf)
            forced_V[close_ids[over]] = 0.0
            return forced_V

        return process


class _RefusedConfig(ForethoughtConfig):
    def __init__(self, think: str = EVERY_TOKEN, **_: Any):
        reason = (
            "it thinks between any two tokens of its text, which vLLM cannot; use transformers"
            if think == EVERY_TOKEN
            else "its weights are named for transformers; export the run without --thinking, and see "
            "checkpoints/vllm_plugin.py"
        )
        raise ValueError(f"vLLM does not load a thinking export: {reason}")


def register() -> None:
    """Called by vLLM in each of its processes."""
    AutoConfig.register("forethought", _RefusedConfig, exist_ok=True)
