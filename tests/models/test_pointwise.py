"""The chains of pointwise operations, as they stand and compiled, against fp64."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from models import pointwise
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error, tiny_model

R, H, D = 5, 3, 8


@pytest.fixture(params=[False, True], ids=["as they stand", "compiled"])
def compiled(request):
    if request.param and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    pointwise.compile_chains(request.param)
    yield request.param
    pointwise.compile_chains(False)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """fp64 values that are exact in bf16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def rms_norm(x, weight):
    return pointwise.rms_norm(x, weight, 1e-6)


def rms_norm_by_hand(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x, cos, sin):
    return pointwise.rotate(x, torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate_by_hand(x, cos, sin):
    """Each pair of halves is a complex number that is turned."""
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=-1)


def gated_by_hand(gate, up):
    return gate / (1 + (-gate).exp()) * up


def merged_by_hand(out_a, lse_a, out_b, lse_b):
    a, b = lse_a.exp()[..., None], lse_b.exp()[..., None]
    return (a * out_a + b * out_b) / (a + b)


CHAINS = {
    "rms_norm": (rms_norm, rms_norm_by_hand, [draw(2, R, D), draw(D)]),
    "rotate": (rotate, rotate_by_hand, [draw(2, R, H, D), *(draw(2, R, 1, D // 2, seed=i) for i in (1, 2))]),
    "gated": (pointwise.gated, gated_by_hand, [draw(2, R, D), draw(2, R, D, seed=1)]),
    "merged": (
        pointwise.merged,
        merged_by_hand,
        [draw(*shape, seed=i) for i, shape in enumerate(2 * [(R, H, D), (R, H)])],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CHAINS)
def test_values_and_gradients(compiled, name, dtype):
    chain, by_hand, values = CHAINS[name]
    # Log-sum-exps and norm weights are fp32 in either case.
    kept = {("rms_norm", 1), ("merged", 1), ("merged", 3)}
    cast = [x.to(torch.float32 if (name, i) in kept else dtype).requires_grad_() for i, x in enumerate(values)]
    exact = [x.clone().requires_grad_() for x in values]
    out, truth = chain(*cast), by_hand(*exact)
    assert out.dtype == dtype
    allowed = 1e-6 if dtype == torch.float32 else 2**-7
    assert relative_error(out, truth) <= allowed
    grad = draw(*truth.shape)
    for got, expected in zip(
        torch.autograd.grad(out, cast, grad.to(dtype)), torch.autograd.grad(truth, exact, grad), strict=True
    ):
        assert relative_error(got, expected) <= allowed


def test_a_part_without_keys_has_no_share(compiled):
    out_a, lse_a, out_b, lse_b = (x.float() for x in CHAINS["merged"][2])
    assert torch.equal(pointwise.merged(out_a, lse_a, out_b, torch.full_like(lse_b, float("-inf"))), out_a)


def test_few_shapes_are_compiled(monkeypatch):
    """Texts, and thoughts of any number of anchors, steps and rows, with gradient and without, in a model with norms of
    queries and keys. Past its limit of recompilations torch runs a chain as it stands, and hardly says so."""
    monkeypatch.setattr(pointwise, "_compiled", {})
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    model = tiny_model(qk_norm=True)
    pointwise.compile_chains()
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for rows, N in ((1, 9), (3, 6)):
                text = packed_text([[N]] * rows, N)
                for gradient in (True, False):
                    with torch.set_grad_enabled(gradient):
                        state = model.read(text)
                        for K, S, M in ((1, 3, N), (2, 3, N), (2, 1, 1), (3, 4, 2), (1, 1, N)):
                            anchors = Anchors(text, torch.zeros(rows, M, dtype=torch.int64))
                            thoughts = torch.randn(rows, K, S, M, model.decoder.config.width, dtype=torch.float64)
                            model.decoder.think(thoughts, anchors, state)
    finally:
        pointwise.compile_chains(False)
        torch._dynamo.reset()
    # Norms of hidden states and of heads, rotations and gates, with gradient and without; norms of thoughts that need
    # none; merges.
    assert counter.frame_count == 2 * 4 + 2
