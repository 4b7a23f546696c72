"""Chunked log-probs against torch's log_softmax in fp64, gradients included; sampling against exact probabilities."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from models import logprobs
from models.logprobs import sample_tokens, token_entropies, token_logprobs, top_tokens
from models.precision import bf16_products
from models.rollout.native import NativeDraw, compiler
from tests.helpers import relative_error

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def case(rows=23, width=8, vocabulary=17, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(vocabulary - 3, (rows,), generator=generator)
    return hidden, weight, targets


@pytest.mark.parametrize(("chunk_rows", "cached_rows"), [(1, 1), (5, 2), (23, 4), (1000, 1000)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("banned", [False, True])
def test_values_and_gradients(monkeypatch, chunk_rows, cached_rows, temperature, banned):
    hidden, weight, targets = case()
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk_rows * 17)
    monkeypatch.setattr(logprobs, "CACHED_ELEMENTS", cached_rows * 17)
    banned_V = torch.arange(17) >= 14 if banned else None
    logits = hidden @ weight.T / temperature
    if banned:
        logits = logits.masked_fill(banned_V, -torch.inf)
    truth = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    got = token_logprobs(hidden, weight, targets, temperature, banned_V)
    grad = torch.linspace(-1, 2, 23, dtype=torch.float64)
    assert relative_error(got, truth) <= 1e-14
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight), grad),
        torch.autograd.grad(truth, (hidden, weight), grad),
        strict=True,
    ):
        assert relative_error(a, b) <= 1e-13


def test_leading_axes_and_no_rows():
    hidden, weight, targets = case(24)
    shaped = token_logprobs(hidden.view(2, 3, 4, 8), weight, targets.view(2, 3, 4))
    assert torch.equal(shaped.flatten(), token_logprobs(hidden, weight, targets))
    nothing = token_logprobs(hidden[:0], weight, targets[:0])
    assert nothing.shape == (0,)
    gradients = torch.autograd.grad(nothing.sum(), (hidden, weight))
    assert all(g.abs().sum() == 0 for g in gradients)


def test_bf16_activations_give_the_master_its_gradient_in_its_own_dtype():
    hidden, weight, targets = case(dtype=torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    got = token_logprobs(hidden, master, targets)
    assert got.dtype == torch.float32
    grads = torch.autograd.grad(got.sum(), (hidden, master))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().requires_grad_()
    truth = torch.autograd.grad(token_logprobs(exact_hidden, exact_weight, targets).sum(), (exact_hidden, exact_weight))
    assert max(relative_error(a, b) for a, b in zip(grads, truth, strict=True)) <= 2**-6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_logits_are_not_rounded_to_bf16(device):
    """Log-probs, draws and entropies of bf16 hidden states and a head rounded to bf16, against fp64."""
    hidden, weight, targets = (x.detach().to(device) for x in case(vocabulary=600, dtype=torch.bfloat16))
    master, uniforms = weight.float(), torch.full((23,), 0.5, device=device)
    exact = (hidden.double() @ master.bfloat16().double().T).log_softmax(-1)
    assert relative_error(token_logprobs(hidden, master, targets), exact.gather(-1, targets[:, None])[:, 0]) <= 1e-6
    tokens, drawn = sample_tokens(hidden, master, uniforms, 1.0)
    assert relative_error(drawn, exact.gather(-1, tokens[:, None])[:, 0]) <= 1e-6
    assert relative_error(token_entropies(hidden, master), -(exact.exp() * exact).sum(-1)) <= 1e-6


@pytest.fixture(params=["none", "ieee"])
def set_before(request):
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_how_fp32_matrices_are_multiplied_is_the_users(set_before):
    hidden, weight, targets = case(rows=600, width=64, dtype=torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    with pytest.raises(RuntimeError, match="in the middle"), bf16_products(torch.bfloat16):
        raise RuntimeError("in the middle")
    token_logprobs(hidden, master, targets).sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == set_before
    exact = master.detach().double() @ weight.detach()[0]
    assert relative_error(master.detach() @ weight.detach()[0].float(), exact) <= 1e-6


def test_no_logits_of_all_rows_are_held(monkeypatch):
    """Neither forward nor backward makes a tensor of rows × vocabulary."""
    hidden, weight, targets = case(rows=64, vocabulary=32)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 4 * 32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            out = function(*arguments, **(keywords or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        token_logprobs(hidden, weight, targets).sum().backward()
    assert largest <= 64 * 8  # the hidden states themselves


def test_samples_follow_the_probabilities(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(17, 8, generator=generator, dtype=torch.float64) * 0.5
    banned = torch.zeros(17, dtype=torch.bool)
    banned[[0, 5, 16]] = True
    n = 40_000
    uniforms = (torch.arange(n) + 0.5).float() / n
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 17 * 1000)
    for temperature in (1.0, 0.7):
        tokens, drawn_logprobs = sample_tokens(hidden.expand(n, -1), weight, uniforms, temperature, banned)
        logits = (hidden @ weight.T / temperature).masked_fill(banned, -torch.inf)
        # Evenly spaced uniforms: the counts are the probabilities up to one grid cell at each end.
        counts = torch.bincount(tokens, minlength=17).double() / n
        assert (counts - logits.softmax(-1)[0]).abs().max() <= 2 / n + 1e-6
        assert not banned[tokens].any()
        assert relative_error(drawn_logprobs, logits.log_softmax(-1)[0, tokens]) <= 1e-14


def natively(hidden, weight, uniforms, temperature, banned=None):
    """`sample_tokens` by the kernel for CPUs."""
    draw = NativeDraw(SimpleNamespace(head_weight_VW=weight), temperature)
    return draw(hidden, uniforms, torch.zeros(len(weight), dtype=torch.bool) if banned is None else banned)


both = pytest.mark.parametrize(
    "sample",
    [sample_tokens, pytest.param(natively, marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler"))],
)


@both
def test_extreme_uniforms_never_draw_a_banned_token(sample):
    hidden, weight = torch.zeros(2, 16), torch.zeros(6, 16)
    banned = torch.tensor([True, False, False, False, True, True])
    uniforms = torch.tensor([2.0**-24, 1 - 2.0**-24])
    assert sample(hidden, weight, uniforms, 1.0, banned)[0].tolist() == [1, 3]


@pytest.mark.parametrize("vocabulary", [5, 4096, 4097, 4100, 4609, 5120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@both
def test_draws_invert_the_distribution_function(vocabulary, dtype, temperature, sample):
    """Against a search through the whole of it in fp64, where half the tokens, and one run of 256, have no mass."""
    if sample is natively and dtype == torch.float64:
        pytest.skip("samples in fp32")
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1000, 16, generator=generator, dtype=dtype) / 2
    weight = torch.randn(vocabulary, 16, generator=generator, dtype=dtype)
    masters = torch.promote_types(dtype, torch.float32)
    banned = torch.rand(vocabulary, generator=generator) < 0.5
    banned[256:512] |= vocabulary > 512
    banned[-1] = True
    banned[0] = False
    uniforms = torch.rand(1000, generator=generator).clamp(2.0**-24, 1 - 2.0**-24)
    uniforms[:2] = torch.tensor([2.0**-24, 1 - 2.0**-24])
    tokens, logprobs_R = sample(hidden, weight.to(masters), uniforms, temperature, banned)
    assert not banned[tokens].any()
    logits = (hidden.double() @ weight.double().T / temperature).masked_fill(banned, -torch.inf)
    truth = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert relative_error(logprobs_R, truth) <= (1e-14 if dtype == torch.float64 else 1e-6)
    upto = logits.softmax(-1).cumsum(-1)
    before = torch.nn.functional.pad(upto, (1, 0)).gather(1, tokens[:, None])[:, 0]
    rounding = 2.0**-48 if dtype == torch.float64 else 2.0**-20
    assert (before <= uniforms + rounding).all()
    assert (uniforms <= upto.gather(1, tokens[:, None])[:, 0] + rounding).all()


def test_greedy_is_the_most_probable():
    hidden, weight, _ = case()
    tokens, _ = sample_tokens(hidden, weight, torch.full((23,), 0.999), 0.0)
    assert torch.equal(tokens, (hidden @ weight.T).argmax(-1))


def test_the_top_tokens_are_those_of_all_chunks(monkeypatch):
    hidden, weight, _ = case()
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 5 * 17)
    truth = (hidden @ weight.T).log_softmax(-1).sort(-1, descending=True)
    tokens, got = top_tokens(hidden.view(1, 23, 8), weight, 3)
    assert torch.equal(tokens[0], truth.indices[:, :3])
    assert relative_error(got[0], truth.values[:, :3]) <= 1e-14
    assert top_tokens(hidden, weight, 99)[0].shape == (23, 17)


@pytest.mark.parametrize("vocabulary", [5, 4100])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@both
def test_where_logits_are_not_finite_a_token_is_drawn_all_the_same(vocabulary, temperature, sample):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=generator) for rows in (4, vocabulary))
    uniforms = torch.tensor([0.1, 0.4, 0.7, 0.99])
    tokens, logprobs_R = sample(hidden, weight, uniforms, temperature)
    hidden[1], hidden[3, 2] = float("nan"), float("inf")
    got, got_logprobs = sample(hidden, weight, uniforms, temperature)
    assert got.tolist() == [tokens[0], 0, tokens[2], 0]
    assert got_logprobs.isnan().tolist() == [False, True, False, True]
    assert torch.equal(got_logprobs[::2], logprobs_R[::2])
