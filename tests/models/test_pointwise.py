"""The chains of pointwise operations, as torch runs them, against fp64."""

from __future__ import annotations

import pytest
import torch

from models import pointwise
from tests.helpers import relative_error

R, H, D = 5, 3, 8


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
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
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
def test_values_and_gradients(name, dtype):
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


def test_a_part_without_keys_has_no_share():
    out_a, lse_a, out_b, lse_b = (x.float() for x in CHAINS["merged"][2])
    assert torch.equal(pointwise.merged(out_a, lse_a, out_b, torch.full_like(lse_b, float("-inf"))), out_a)
