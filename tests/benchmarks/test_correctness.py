"""The checks that also run without pytest: on CPU, on CUDA where there is one, and that they notice what is wrong."""

from __future__ import annotations

import pytest
import torch

from benchmarks.correctness import ANCHORS, _model, checks, recorded_steps, run_check, syncs_raise
from models.attention import aten, reference
from models.philox import Rng
from tests.helpers import rollout

CPU = torch.device("cpu")


ON_CUDA_ALONE = (": flex", ": flash", "without syncs", "recorded steps")
CHECKS = [name for name in checks(few=True) if "triton" not in name]


@pytest.mark.parametrize("name", [name for name in CHECKS if any(b in name for b in ON_CUDA_ALONE)])
def test_what_a_cpu_cannot_run_is_unsupported(name):
    assert run_check(checks(few=True)[name], CPU)[0] == "unsupported"


@pytest.mark.parametrize("name", [name for name in CHECKS if not any(b in name for b in ON_CUDA_ALONE)])
def test_on_cpu(name):
    outcome, said, findings = run_check(checks(few=True)[name], CPU)
    assert outcome == "passed", said
    assert findings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_on_cpu(dtype):
    (finding,) = recorded_steps("reference", dtype, CPU)
    assert 0 < finding.error <= finding.allowed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", checks())
def test_on_cuda(name):
    outcome, said, _ = run_check(checks()[name], torch.device("cuda"))
    assert outcome in ("passed", "unsupported"), said


def test_a_rollout_may_not_sync_from_its_first_pass_on(monkeypatch):
    """What torch is told, in order with the passes; only on CUDA would it raise."""
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", said.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 2 if said and said[-1] == "error" else 0)
    model, anchors = _model(torch.float32, CPU, None), ANCHORS["at a few anchors"](CPU)
    state = model.read(anchors.text)
    with syncs_raise(model):
        assert said == []
        rollout(model, state, anchors, 1, 3, Rng(0, 0), prompt=(4,))
    assert said == ["error"] * 3 + ["default"]
    with pytest.raises(AssertionError, match="no pass over thoughts"), syncs_raise(model):
        pass
    rollout(model, state, anchors, 1, 3, Rng(0, 0), prompt=(4,))
    assert said[4:] == ["default"]


def attention_checks() -> dict:
    return {name: check for name, check in checks(few=True).items() if name.startswith(("thoughts", "newest"))}


@pytest.mark.parametrize("name", [name for name in attention_checks() if "aten" in name])
def test_a_backend_that_is_off_by_two_percent_fails(name, monkeypatch):
    right = aten.thought_attention
    monkeypatch.setattr(aten, "thought_attention", lambda *call: right(*call) * 1.02)
    outcome, said, _ = run_check(attention_checks()[name], CPU)
    assert outcome == "failed"
    assert "out is off by 0.02" in said


def test_a_backend_that_raises_fails_and_one_that_refuses_does_not(monkeypatch):
    name = next(name for name in attention_checks() if "aten" in name)

    def broken(*call):
        raise RuntimeError("misaligned address")

    monkeypatch.setattr(aten, "thought_attention", broken)
    assert run_check(attention_checks()[name], CPU)[:2] == ("failed", "RuntimeError: misaligned address")
    monkeypatch.setattr(aten, "supports", lambda *call: (False, "not today"))
    assert run_check(attention_checks()[name], CPU)[:2] == ("unsupported", "not today")
    assert reference._exact(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
