"""Runs *_interpreted.py in a process of their own, since Triton reads TRITON_INTERPRET as kernels are defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import attention
from models.attention import triton
from models.thoughts import Anchors
from tests.helpers import packed_text
from tests.models.test_attention import inputs


@pytest.mark.parametrize("file", ["triton_interpreted.py", "pointwise_interpreted.py"])
def test_kernels_in_the_interpreter(file):
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/models/{file}"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


def test_triton_is_never_needed(monkeypatch):
    """Absent or without a device it is refused with the way out when forced, and not looked at otherwise."""
    text = packed_text([[5]], 5)
    anchors = Anchors.everywhere(text)
    arguments = inputs(text, 5, 1, 2, 2, 2, 1, D=16, dtype=torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if triton.importlib.util.find_spec("triton") is not None:
        with pytest.raises(ValueError, match="run on CUDA, or on CPU under TRITON_INTERPRET=1, not on cpu"):
            attention.thought_attention(*arguments, anchors, backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("FORETHOUGHT_ATTENTION", "triton")
    with pytest.raises(ValueError, match="triton is not installed; install the extra 'kernels'"):
        attention.thought_attention(*arguments, anchors)
    monkeypatch.delenv("FORETHOUGHT_ATTENTION")
    assert attention.thought_attention(*arguments, anchors).isfinite().all()
