"""The pointwise chains compiled against the chains as they stand, values and gradients."""

from __future__ import annotations

import shutil

import pytest
import torch

from models import pointwise
from models.pointwise import gated, merged, rms_norm, rotate
from tests.helpers import relative_error


def cases(dtype: torch.dtype):
    def x(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    for shape in ((5, 3), (1, 2, 4, 3)):
        cos, sin = torch.rand(2, shape[-1], 1, 4).to(dtype)
        yield rms_norm, (x(*shape, 16), x(16).float(), 1e-5)
        yield rotate, (x(*shape, 2, 8), cos, sin)
        yield gated, (x(*shape, 16), x(*shape, 16))
        yield merged, (x(*shape, 8), x(*shape).float(), x(*shape, 8), x(*shape).float())


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="compiling takes a C++ compiler"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_as_it_stands(monkeypatch, dtype):
    torch.manual_seed(0)
    chains = list(cases(dtype))

    def run():
        for chain, arguments in chains:
            out = chain(*arguments)
            inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
            yield chain.__name__, [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    eager = list(run())
    monkeypatch.setattr(pointwise, "_compiled", {})
    monkeypatch.setattr(pointwise, "_compile", True)
    for (name, a), (_, b) in zip(run(), eager, strict=True):
        for got, truth in zip(a, b, strict=True):
            assert got.dtype == truth.dtype
            # A compiled chain rounds once, at its end.
            assert relative_error(got, truth) <= (1e-6 if dtype == torch.float32 else 2**-7), name
    assert set(pointwise._compiled) == {getattr(pointwise, f"_{chain.__name__}") for chain, _ in chains}
