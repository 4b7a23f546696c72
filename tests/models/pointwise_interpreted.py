"""The kernels of the pointwise chains against fp64 formulas, in Triton's interpreter; run by test_triton_interpreter.py
under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import pointwise_kernels as kernels
from tests.helpers import relative_error
from tests.models.test_pointwise import draw, gated_by_hand, merged_by_hand, rms_norm_by_hand, rotate_by_hand

# A rounding to fp16 is off by 2⁻¹¹ at most.
ALLOWED = {torch.float32: 2e-6, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", ALLOWED, ids=["fp32", "fp16"])


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.rms_norm(x, weight, 1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return kernels.rotate(x, torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def assert_right(chain, by_hand, values: list[Tensor], dtypes: list[torch.dtype], differentiable: int) -> None:
    """The values, with and without gradients to be had, and the gradients of the first so many arguments."""
    cast = [x.to(dtypes[i]).requires_grad_(i < differentiable) for i, x in enumerate(values)]
    exact = [x.clone().requires_grad_(i < differentiable) for i, x in enumerate(values)]
    out, truth = chain(*cast), by_hand(*exact)
    allowed = ALLOWED[dtypes[0]]
    assert out.dtype == dtypes[0]
    assert relative_error(out, truth) <= allowed
    with torch.no_grad():
        assert torch.equal(chain(*cast), out)
    grad = draw(*reversed(truth.shape), seed=9).permute(*reversed(range(truth.ndim)))  # not contiguous
    got = torch.autograd.grad(out, cast[:differentiable], grad.to(dtypes[0]))
    expected = torch.autograd.grad(truth, exact[:differentiable], grad)
    for x, a, b in zip(cast[:differentiable], got, expected, strict=True):
        assert a.dtype == x.dtype
        assert relative_error(a, b) <= allowed


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 5, 48), id="no power of two"),
        pytest.param((2, 3, 11, 16), id="heads"),
        pytest.param((37, 1024), id="several partial sums"),
        pytest.param((5, 3000), id="wide"),
        pytest.param((0, 64), id="no rows"),
    ],
)
def test_rms_norm(shape, dtype):
    values = [draw(*shape), draw(shape[-1], seed=1)]
    assert_right(rms_norm, rms_norm_by_hand, values, [dtype, torch.float32], differentiable=2)


@pytest.mark.parametrize("programs", [1, 2])
def test_rms_norm_of_more_rows_than_programs_take_at_once(monkeypatch, programs):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    values = [draw(23, 1000), draw(1000, seed=1)]
    assert_right(rms_norm, rms_norm_by_hand, values, 2 * [torch.float32], differentiable=2)


def test_the_gradient_of_a_weight_in_low_precision_is_summed_in_fp32():
    x, weight = draw(64, 32).half(), draw(32, seed=1).half().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(rms_norm(x, weight).sum(), weight)
    (expected,) = torch.autograd.grad(rms_norm_by_hand(x.double(), exact).sum(), exact)
    assert got.dtype == torch.float16
    assert relative_error(got, expected) <= ALLOWED[torch.float16]


@DTYPES
@pytest.mark.parametrize(
    ("shape", "angles"),
    [
        pytest.param((2, 5, 3, 8), (2, 5, 1), id="of every row"),
        pytest.param((130, 1, 64), (130, 1), id="one head, several programs"),
        pytest.param((2, 3, 2, 5, 3, 6), (2, 1, 2, 5, 1), id="of all thoughts, no power of two"),
        pytest.param((4, 3, 2, 16), (1, 3, 1), id="of the first axis"),
        pytest.param((4, 3, 2, 16), (4, 1, 1), id="of the last axis"),
        pytest.param((4, 3, 2, 16), (1,), id="of all rows"),
        pytest.param((2, 3, 4, 2, 16), (1, 3, 1, 1), id="of axes apart"),
        pytest.param((0, 3, 16), (0, 1), id="no rows"),
    ],
)
def test_rotate(shape, angles, dtype):
    angle = draw(*angles, shape[-1] // 2, seed=1)
    # As exact in fp16 as x.
    values = [draw(*shape), angle.cos().half().double(), angle.sin().half().double()]
    assert_right(rotate, rotate_by_hand, values, 3 * [dtype], differentiable=1)


def test_angles_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match="expand"):
        rotate(torch.ones(2, 3, 1, 16), torch.ones(3, 3, 1, 8), torch.ones(3, 3, 1, 8))


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 75), (2, 1024), (0, 8)])
def test_gated(shape, dtype):
    values = [4 * draw(*shape), draw(*shape, seed=1)]
    assert_right(kernels.gated, gated_by_hand, values, 2 * [dtype], differentiable=2)


def test_large_gates_overflow_nothing():
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    out = kernels.gated(gate, torch.ones(4))
    assert torch.equal(out, torch.tensor([0.0, 0.0, 100.0, 1e4]))
    (grad,) = torch.autograd.grad(out.sum(), gate)
    assert torch.equal(grad, torch.tensor([0.0, 0.0, 1.0, 1.0]))


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 3, 48), (70, 1, 16), (0, 2, 16)])
def test_merged(shape, dtype):
    values = [draw(*size, seed=i) for i, size in enumerate(2 * [shape, shape[:-1]])]
    values[3][:1] = -torch.inf  # a part without keys
    a, lse_a, b, lse_b = (x.to(dtype if i % 2 == 0 else torch.float32) for i, x in enumerate(values))
    apart = lse_b.transpose(0, -1).contiguous().transpose(0, -1)
    got = kernels.merged(a, lse_a, b, apart)
    assert torch.equal(got[:1], a[:1])
    assert relative_error(got, merged_by_hand(*values)) <= ALLOWED[dtype]
