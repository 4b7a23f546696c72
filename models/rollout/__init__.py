"""Sampling thoughts. A `RolloutRequest` says what is wanted, an `Engine` samples it, a `Rollout` is what comes back.

`Eager` supports every request and is what the others are tested against; `Native` is a compiled step for a CPU,
`Recorded` replays one step as a CUDA graph, `Vllm` is vLLM in the same process. `Preferred` takes the first of several
that supports a request.
"""

from models.rollout.eager import EAGER, Eager
from models.rollout.native import Native
from models.rollout.recorded import Recorded
from models.rollout.request import Engine, Prediction, Preferred, Rollout, RolloutRequest
from models.rollout.vllm import EngineError, Vllm

__all__ = [
    "EAGER",
    "Eager",
    "Engine",
    "EngineError",
    "Native",
    "Prediction",
    "Preferred",
    "Recorded",
    "Rollout",
    "RolloutRequest",
    "Vllm",
]
