"""A recorded step of sampling ≡ the same step launched layer by layer. Shapes as in models/rollout/recorded.py."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.attention import aten, reference
from models.attention.merged import MergedAttention
from models.decoder import RecordableCache, ThoughtCache
from models.philox import Rng
from models.rollout import EAGER, Prediction, Preferred, Recorded, recorded
from models.rollout.recorded import RecordedStep
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error, rollout, tiny_model
from tests.models.test_attention_kernels import torch_operators  # noqa: F401


class Recording(TorchDispatchMode):
    """What a CUDA graph records: operators, on which memory, with which numbers. A replay computes into the same
    memory; what the host did between the operators is not in it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def at_few() -> Anchors:
    return Anchors(packed_text([[7, 5], [12]], 12), torch.tensor([[3, 8], [5, -1]]))


def cache_for(model, anchors, K, T, state):
    cache = ThoughtCache(model.decoder.config, *(2, K, T, 2), like=state.hidden_BNW)
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("kernels", ["reference", "of CUDA"])
@torch.no_grad()
def test_one_recording_serves_every_length(torch_operators, monkeypatch, kernels):  # noqa: F811
    if kernels == "of CUDA":
        of_cuda = MergedAttention({"cpu": aten.CUDA})
        monkeypatch.setattr(reference, "thought_attention", of_cuda.thought_attention)
    model, anchors, K, T = tiny_model(), at_few(), 3, 9
    state = model.read(anchors.text)
    tokens = torch.randint(61, (2, K, T, 2), generator=torch.Generator().manual_seed(5))
    plain = cache_for(model, anchors, K, T, state)
    launched = [model.continue_thoughts(tokens[:, :, :2], anchors, state, plain)]
    launched += [model.continue_thoughts(tokens[:, :, t, None], anchors, state, plain) for t in range(2, T)]

    cache = cache_for(model, anchors, K, T, state)
    model.continue_thoughts(tokens[:, :, :2], anchors, state, cache)
    step = RecordedStep(model, anchors, state, cache)
    step._run()  # makes what is kept
    step._cache.restart(2)
    with Recording() as recording:
        hidden = step._run()
    step._cache.restart(2)
    assert not any("_local_scalar_dense" in str(func) for func, *_ in recording.calls)
    for t in range(2, T):
        step._tokens_BK1M.copy_(tokens[:, :, t, None])
        recording.replay()
        assert relative_error(hidden, launched[t - 1]) <= 1e-13
    assert relative_error(cache.keys, plain.keys) <= 1e-13


@torch.no_grad()
def test_a_number_of_the_host_is_noticed():
    """The negative control: a cache that counts on the host repeats its first token."""
    model, anchors = tiny_model(), at_few()
    state = model.read(anchors.text)
    cache = cache_for(model, anchors, 1, 5, state)
    tokens = torch.full((2, 1, 1, 2), 7)
    with Recording() as recording:
        hidden = model.continue_thoughts(tokens, anchors, state, cache)
    first = hidden.clone()
    recording.replay()
    assert torch.equal(hidden, first)


@pytest.mark.parametrize("prediction", [None, Prediction((8,), 4, (9,))])
def test_thoughts_are_the_same(prediction):
    model, anchors = tiny_model(), at_few()
    with torch.no_grad():
        state = model.read(anchors.text)
    sampled, steps = [], []
    run = RecordedStep._run
    for engine in (EAGER, Recorded()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RecordedStep, "_run", lambda self: steps.append(1) or run(self))
            ends = dict(close=(5,), prediction=prediction)
            sampled.append(rollout(model, state, anchors, 3, 20, Rng(1, 2), engine=engine, **ends))
        assert bool(steps) == (engine is not EAGER)
    for name, plain in vars(sampled[0]).items():
        if isinstance(plain, Tensor):
            assert relative_error(vars(sampled[1])[name], plain) <= 1e-12, name
    assert torch.equal(sampled[0].thoughts.tokens_BKSM, sampled[1].thoughts.tokens_BKSM)


def test_short_and_dense_rollouts_are_not_recorded(monkeypatch):
    model, anchors = tiny_model(), at_few()
    monkeypatch.delattr(RecordedStep, "_run")
    with torch.no_grad():
        state = model.read(anchors.text)
    engine = Preferred(Recorded(), EAGER)
    assert engine.name == "recorded"
    rollout(model, state, anchors, 1, 16, Rng(0, 0), engine=engine)
    rollout(model, state, Anchors.everywhere(anchors.text), 1, 20, Rng(0, 0), engine=engine)
    assert engine.name == "eager"
    with pytest.raises(AttributeError, match="_run"):
        rollout(model, state, anchors, 1, 17, Rng(0, 0), engine=engine)
    with pytest.raises(ValueError, match="15 steps are too few to be worth recording, which takes 16"):
        rollout(model, state, anchors, 1, 16, Rng(0, 0), engine=Recorded())
    with pytest.raises(ValueError, match=r"no rollout engine supports this request \(Recorded: thoughts at every"):
        rollout(model, state, Anchors.everywhere(anchors.text), 1, 20, Rng(0, 0), engine=Preferred(Recorded()))


def test_kernels_that_count_on_the_host_are_refused():
    model, anchors = tiny_model(), at_few()
    model.decoder.attention_backend = "aten"
    with torch.no_grad():
        state = model.read(anchors.text)
    with pytest.raises(
        ValueError, match="'aten' does not support this call: the number of own tokens is read on the device"
    ):
        rollout(model, state, anchors, 1, 20, Rng(0, 0), engine=Recorded())


def test_the_buffers_are_those_of_the_cache():
    model = tiny_model()
    cache = ThoughtCache(model.decoder.config, 2, 1, 4, 2, like=torch.zeros(1))
    recordable = RecordableCache(cache)
    assert recordable.keys is cache.keys and recordable.values is cache.values


@torch.no_grad()
def test_what_breaks_a_capture_is_what_is_raised(monkeypatch):
    """Ending a broken capture raises too, and says no more than that it is broken."""

    class Graph:
        def capture_begin(self, **options): ...

        def capture_end(self):
            raise RuntimeError("operation failed due to a previous error during capture")

    model, anchors = tiny_model(), at_few()
    state = model.read(anchors.text)
    step = RecordedStep(model, anchors, state, cache_for(model, anchors, 1, 5, state))
    stream, runs = SimpleNamespace(wait_stream=lambda other: None), []

    def run():
        runs.append(1)
        if len(runs) == 2:
            raise ValueError("a copy from the host")

    step._run = run
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda where: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(recorded, "_stream", lambda device: stream)
    with pytest.raises(ValueError, match="a copy from the host"):
        step._record(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a CUDA device")
@pytest.mark.parametrize("backend", ["aten", "triton"])
@torch.no_grad()
def test_graphs_on_cuda(backend):
    """Against fp32, at most twice the error of the definition in bf16."""
    model = tiny_model(torch.float32, head_dim=32, width=64).cuda()
    anchors = Anchors(at_few().text.to("cuda"), at_few().index_BM.cuda())
    tokens = torch.randint(61, (2, 3, 24, 2), generator=torch.Generator().manual_seed(5)).cuda()

    def steps(dtype, backend, recorded):
        model.decoder.compute_dtype, model.decoder.attention_backend = dtype, backend
        state = model.read(anchors.text)
        cache = ThoughtCache(model.decoder.config, 2, 3, 24, 2, like=state.hidden_BNW)
        found = [model.continue_thoughts(tokens[:, :, :1], anchors, state, cache)]
        step = RecordedStep(model, anchors, state, cache) if recorded else None
        for t in range(1, 24):
            newest = tokens[:, :, t, None]
            found.append(step(newest).clone() if step else model.continue_thoughts(newest, anchors, state, cache))
        return torch.cat(found, dim=2)

    truth = steps(None, "reference", False)
    plain = steps(torch.bfloat16, "reference", False)
    assert relative_error(steps(torch.bfloat16, backend, True), truth) <= 2 * relative_error(plain, truth)
