"""The kernels of the pointwise chains on a GPU, by flash-attention's rule: against fp64, at most twice the error of the
definition in the same dtype. Skipped where there is no CUDA or no Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from models import pointwise
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error, tiny_model
from tests.models.test_pointwise import draw, rms_norm, rotate

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.skipif(pointwise._triton_kernels() is None, reason="needs Triton"),
]
# For tensors that the definition gets right to the last bits of fp32.
FLOOR = 2e-6


# Chain, fp64 arguments, which of them are fp32 whatever the dtype, how many have a gradient.
Case = tuple[Callable[..., Tensor], list[Tensor], set[int], int]


def norm(*shape: int) -> Case:
    return rms_norm, [draw(*shape), draw(shape[-1], seed=1)], {1}, 2


def rotation(shape: tuple[int, ...], *angles: int) -> Case:
    angle = draw(*angles, 1, shape[-1] // 2, seed=1)
    return rotate, [draw(*shape), angle.cos().bfloat16().double(), angle.sin().bfloat16().double()], set(), 1


def gate(*shape: int) -> Case:
    return pointwise.gated, [4 * draw(*shape), draw(*shape, seed=1)], set(), 2


def merge(*shape: int) -> Case:
    parts = [draw(*size, seed=i) for i, size in enumerate(2 * [shape, shape[:-1]])]
    parts[3][0] = -torch.inf  # a part without keys
    return pointwise.merged, parts, {1, 3}, 0


CASES: dict[str, Callable[[], Case]] = {
    "norm": partial(norm, 2, 515, 2048),
    "norm, no power of two": partial(norm, 3, 67, 576),
    "norm, wide": partial(norm, 300, 8192),
    "norm, wider than a program": partial(norm, 20, 8200),
    "norm of heads": partial(norm, 2, 300, 16, 128),
    "norm of small heads": partial(norm, 5, 7, 3, 16),
    "norm, many rows": partial(norm, 90001, 64),
    "norm, no rows": partial(norm, 0, 64),
    "rotate": partial(rotation, (2, 300, 16, 128), 2, 300),
    "rotate, one key head": partial(rotation, (2, 301, 1, 64), 2, 301),
    "rotate, angles of all thoughts": partial(rotation, (2, 3, 5, 40, 9, 64), 2, 1, 5, 40),
    "rotate, no power of two": partial(rotation, (2, 30, 4, 80), 1, 30),
    "rotate, no rows": partial(rotation, (0, 4, 64), 0),
    "gate": partial(gate, 2, 100, 6144),
    "gate, odd": partial(gate, 3, 77),
    "gate, nothing": partial(gate, 0, 64),
    "merge": partial(merge, 3, 50, 9, 64),
}
IN_OTHER_DTYPES = ("norm, no power of two", "rotate, no power of two", "gate, odd", "merge")


def run(case: str, dtype: torch.dtype, device: str = "cuda", gradients: bool = True) -> list[Tensor]:
    """The chain's value and gradients, of a gradient that is not contiguous, on CPU."""
    chain, values, wide, differentiable = CASES[case]()
    differentiable *= gradients
    arguments = [
        x.to(device, torch.promote_types(dtype, torch.float32) if i in wide else dtype).requires_grad_(
            i < differentiable
        )
        for i, x in enumerate(values)
    ]
    with torch.set_grad_enabled(differentiable > 0):
        out = chain(*arguments)
    if not differentiable:
        return [out.cpu()]
    grad = draw(*reversed(out.shape), seed=9).permute(*reversed(range(out.ndim))).to(device, dtype)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, arguments[:differentiable], grad))]


def without_kernels(monkeypatch) -> None:
    monkeypatch.setattr(pointwise, "_kernels", lambda x: None)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in CASES]
    + [(case, dtype) for case in IN_OTHER_DTYPES for dtype in (torch.float16, torch.float32)],
)
def test_values_and_gradients(monkeypatch, case, dtype):
    truth, got = run(case, torch.float64, "cpu"), run(case, dtype)
    without_kernels(monkeypatch)
    plain = run(case, dtype)
    for a, b, c in zip(got, plain, truth, strict=True):
        assert a.dtype == b.dtype
        error, allowed = relative_error(a, c), max(FLOOR, 2 * relative_error(b, c))
        assert error <= allowed


def launches(monkeypatch, what) -> list[str]:
    """The kernels of ours that are launched meanwhile."""
    kernels, launched = pointwise._triton_kernels(), []

    class Counted:
        def __init__(self, name: str):
            self.name, self.launch = name, getattr(kernels, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.launch[grid]

    with monkeypatch.context() as patch:
        for name in ("_norm", "_norm_backward", "_rotate", "_gate", "_gate_backward", "_merge"):
            patch.setattr(kernels, name, Counted(name))
        what()
    return launched


def step(dtype: torch.dtype, compute_dtype: torch.dtype) -> Tensor:
    """Hidden states of a text and its thoughts, and all gradients, end to end."""
    model = tiny_model(dtype=dtype, head_dim=32, qk_norm=True).cuda()
    model.decoder.compute_dtype = compute_dtype
    text = packed_text([[40, 21], [50]], 61).to("cuda")
    thoughts = draw(2, 2, 5, 61, model.decoder.config.width).cuda().to(compute_dtype).requires_grad_()
    state = model.read(text)
    hidden = model.decoder.think(thoughts, Anchors.everywhere(text), state)
    real = (text.document_BN >= 0)[..., None]
    out = torch.cat([(x * real).flatten() for x in (state.hidden_BNW, *hidden.flatten(1, 2).unbind(1))])
    inputs = [thoughts, *model.decoder.parameters()]
    grads = torch.autograd.grad(out, inputs, draw(len(out), seed=5).cuda().to(out.dtype), allow_unused=True)
    tensors = [x.detach().double().flatten() for x in (out, *grads) if x is not None]
    return torch.cat([x / x.norm() for x in tensors])


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_step_of_a_model(monkeypatch, compute_dtype):
    truth, got = step(torch.float64, torch.float64), []
    launched = launches(monkeypatch, lambda: got.append(step(torch.float32, compute_dtype)))
    assert {"_norm", "_norm_backward", "_rotate", "_gate", "_gate_backward"} <= set(launched)
    without_kernels(monkeypatch)
    plain = step(torch.float32, compute_dtype)
    assert relative_error(got[0], truth) <= 2 * relative_error(plain, truth)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("norm", ["_norm", "_norm_backward"]),
        ("norm of heads", ["_norm", "_norm_backward"]),
        ("rotate", ["_rotate", "_rotate"]),
        ("gate", ["_gate", "_gate_backward"]),
        ("merge", ["_merge"]),
    ],
)
def test_a_launch_each_way_and_the_same_bits_again(monkeypatch, case, expected):
    got = []
    assert launches(monkeypatch, lambda: got.extend(run(case, torch.bfloat16))) == expected
    assert all(torch.equal(a, b) for a, b in zip(got, run(case, torch.bfloat16), strict=True))
    assert torch.equal(run(case, torch.bfloat16, gradients=False)[0], got[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    x, weight = draw(5, 64).float(), torch.ones(64)
    assert relative_error(rms_norm(x.to("cuda:1"), weight.to("cuda:1")).cpu(), rms_norm(x, weight)) <= FLOOR
