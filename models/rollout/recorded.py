"""One token more for every thought, recorded once as a CUDA graph and replayed for each token.

A step of a few thoughts is dozens of short kernels a layer, which a host may launch more slowly than a GPU runs them; a
graph launches them all at once. Recording runs the step twice. Nothing of this was timed yet.

Shapes: B rows, M anchors, K thoughts, W width.
"""

from __future__ import annotations

import functools
from contextlib import suppress

import torch
from torch import Tensor

from models.decoder import RecordableCache, TextState, ThoughtCache
from models.rollout.eager import Eager, Steps
from models.rollout.request import RolloutRequest
from models.thinking import ThinkingModel
from models.thoughts import PAD, Anchors

# Steps from which on recording is taken to pay for itself: a guess.
WORTH_RECORDING = 16


class Recorded(Eager):
    """The prompt layer by layer, then one recorded step that is replayed for every token.

    Not for sharded models, which gather their weights at every step: whoever shards lets it sample from a plain copy.
    """

    name = "recorded"

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        if request.anchors.window is not None:
            return False, "thoughts at every position are not recorded"
        steps = request.slots - len(request.prompt) - 1
        if steps < WORTH_RECORDING:
            return False, f"{steps} steps are too few to be worth recording, which takes {WORTH_RECORDING}"
        return True, ""

    def steps(self, request: RolloutRequest) -> Steps:
        return RecordedSteps.of(request)


class RecordedSteps(Steps):
    """Steps that are recorded, anew for the fewer thoughts that go on, once there is something in the cache."""

    _recorded: RecordedStep | None = None

    def __call__(self, tokens_BKSM: Tensor) -> Tensor:
        if self.cache.length == 0:
            return super().__call__(tokens_BKSM)
        if self._recorded is None:
            self._recorded = RecordedStep(self.request.model, self.anchors, self.state, self.cache)
        self.cache.length += 1  # which the recorded step counts on the device
        return self._recorded(tokens_BKSM)


class RecordedStep:
    """Called as `continue_thoughts` with the newest token of each thought, [B, K, 1, M] → [B, K, 1, M, W].

    It goes on behind what `cache` holds. Each call overwrites the result of the one before, and of several recorded
    steps only the newest may be called: they share memory. On a device without graphs the same step simply runs;
    attention is left to backends that take the number of tokens from the device.
    """

    def __init__(self, model: ThinkingModel, anchors: Anchors, state: TextState, cache: ThoughtCache):
        self._arguments = model, anchors, state
        self._cache = RecordableCache(cache)
        B, K, _, M = cache.keys.shape[1:5]
        self._tokens_BK1M = torch.full((B, K, 1, M), PAD, device=cache.keys.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if cache.keys.is_cuda:
            self._record(cache.length)

    @torch.no_grad()
    def __call__(self, tokens_BK1M: Tensor) -> Tensor:
        self._tokens_BK1M.copy_(tokens_BK1M)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._hidden_BK1MW

    def _run(self) -> Tensor:
        model, anchors, state = self._arguments
        return model.continue_thoughts(self._tokens_BK1M, anchors, state, self._cache)

    @torch.no_grad()
    def _record(self, length: int) -> None:
        device = self._tokens_BK1M.device
        here, stream = torch.cuda.current_stream(device), _stream(device)
        stream.wait_stream(here)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # Compiles kernels and makes what is kept for later calls. What it writes the first replay writes over.
            self._run()
            self._cache.restart(length)
            graph = torch.cuda.CUDAGraph()
            # Not `torch.cuda.graph`, which empties the allocator's cache. Other threads may copy batches meanwhile.
            newest = _newest_graph.get(device)
            pool = None if newest is None else newest.pool()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._hidden_BK1MW = self._run()
            except Exception:
                with suppress(RuntimeError):  # that the error broke the capture, which would hide the error
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(stream)
        self._graph = _newest_graph[device] = graph


# Graphs that follow each other use the same memory if they share a stream and a pool, which lives as long as one of its
# graphs.
_newest_graph: dict[torch.device, torch.cuda.CUDAGraph] = {}


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
