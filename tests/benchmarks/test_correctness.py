"""The checks that also run without pytest: on CPU, on CUDA where there is one, and that they see what is wrong."""

from __future__ import annotations

import pytest
import torch

from benchmarks.correctness import checks, run_check
from models.attention import aten, reference

CPU = torch.device("cpu")


ON_CUDA_ALONE = ("flex", "flash")
CHECKS = [name for name in checks(few=True) if "triton" not in name]


@pytest.mark.parametrize("name", [name for name in CHECKS if any(f": {b}" in name for b in ON_CUDA_ALONE)])
def test_what_a_cpu_cannot_run_is_unserved(name):
    assert run_check(checks(few=True)[name], CPU)[0] == "unserved"


@pytest.mark.parametrize("name", [name for name in CHECKS if not any(f": {b}" in name for b in ON_CUDA_ALONE)])
def test_on_cpu(name):
    outcome, said, findings = run_check(checks(few=True)[name], CPU)
    assert outcome == "passed", said
    assert findings


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", checks())
def test_on_cuda(name):
    outcome, said, _ = run_check(checks()[name], torch.device("cuda"))
    assert outcome in ("passed", "unserved"), said


def attention_checks() -> dict:
    return {name: check for name, check in checks(few=True).items() if name.startswith(("thoughts", "newest"))}


@pytest.mark.parametrize("name", [name for name in attention_checks() if "aten" in name])
def test_a_backend_that_is_off_by_two_percent_fails(name, monkeypatch):
    right = aten.thought_attention
    monkeypatch.setattr(aten, "thought_attention", lambda *call: right(*call) * 1.02)
    outcome, said, _ = run_check(attention_checks()[name], CPU)
    assert outcome == "failed"
    assert "out errs by 0.02" in said


def test_a_backend_that_raises_fails_and_one_that_refuses_does_not(monkeypatch):
    name = next(name for name in attention_checks() if "aten" in name)

    def broken(*call):
        raise RuntimeError("misaligned address")

    monkeypatch.setattr(aten, "thought_attention", broken)
    assert run_check(attention_checks()[name], CPU)[:2] == ("failed", "RuntimeError: misaligned address")
    monkeypatch.setattr(aten, "supports", lambda *call: (False, "not today"))
    assert run_check(attention_checks()[name], CPU)[:2] == ("unserved", "not today")
    assert reference._exact(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
