"""The compiled step of sampling on CPUs ≡ the layers one by one. Shapes as in models/rollout/native.py."""

from __future__ import annotations

import platform

import pytest
import torch

from models.decoder import ThoughtCache
from models.philox import Rng
from models.rollout import EAGER, Native, Prediction, RolloutRequest, native
from models.rollout.native import NativeStep
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error, rollout, tiny_model

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")

SIZES = {
    "groups of 2": dict(width=32, ffn_width=48, heads=4, kv_heads=2, head_dim=16),
    "biases and norms of heads": dict(
        width=48, ffn_width=64, heads=3, kv_heads=3, head_dim=32,
        qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True,
    ),
    "norms of OLMo, a layer without rotary": dict(
        width=48, ffn_width=64, heads=4, kv_heads=2, head_dim=16, layers=3,
        post_norm=True, qk_norm_all_heads=True, qkv_bias=True, out_bias=True,
        rotary=("plain", "none", "scaled"), rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    "one key head for 20": dict(width=16, ffn_width=16, heads=20, kv_heads=1, head_dim=16),
}  # fmt: skip


def model_of(sizes: str, dtype: torch.dtype = torch.float32):
    """The same weights in every dtype."""
    return tiny_model(torch.float64, max_positions=1024, **SIZES[sizes]).float().to(dtype)


@torch.no_grad()
def supported(model, anchors) -> tuple[bool, str]:
    return Native().supports(RolloutRequest(model, model.read(anchors.text), anchors, 2, 3, Rng(0, 0)))


def at_few(N: int) -> Anchors:
    """In two documents and padding, in one document, and nowhere."""
    text = packed_text([[N // 2 + 1, N // 3], [N]], N)
    return Anchors(text, torch.tensor([[3, N // 2 + 1 + N // 4], [N - 2, -1]]))


@torch.no_grad()
def steps(model, anchors, tokens, compute_dtype=None, natively=True):
    """Hidden states [B, K, T - 2, M, W] of all tokens from the third on, which are fed one by one."""
    model.decoder.compute_dtype = compute_dtype
    B, K, T, M = tokens.shape
    state = model.read(anchors.text)
    if natively:
        assert supported(model, anchors) == (True, "")
        native_step = NativeStep(model, anchors, state, B * K * M, T)
        anchor_R = torch.arange(B * M).repeat_interleave(K)
        # Seats in any order.
        seat_R, length_R = torch.arange(B * K * M).flip(0), torch.zeros(B * K * M, dtype=torch.int64)

        def step(tokens):
            for newest in tokens.split(1, dim=2):
                found_RW = native_step(newest[:, :, 0].transpose(1, 2).flatten(), anchor_R, seat_R, length_R)
                length_R.add_(1)
            return found_RW.view(B, M, K, -1).transpose(1, 2)[:, :, None]
    else:
        cache = ThoughtCache(model.decoder.config, B, K, T, M, like=state.hidden_BNW)

        def step(tokens):
            return model.continue_thoughts(tokens, anchors, state, cache)

    found = [step(tokens[:, :, :3])[:, :, -1:]]
    return torch.cat(found + [step(tokens[:, :, t, None]) for t in range(3, T)], dim=2)


def random_tokens(*shape: int):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("N", [12, 600])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("K", [1, 19])
def test_numbers_are_those_of_the_layers(sizes, N, K):
    """In fp32 near fp64; in bf16, where the layers round it does, so no further from fp64 than they are."""
    anchors, tokens = at_few(N), random_tokens(2, K, 37, 2)
    truth = steps(model_of(sizes, torch.float64), anchors, tokens, natively=False)
    model = model_of(sizes)
    assert relative_error(steps(model, anchors, tokens), truth) <= 1e-5
    layers, found = (steps(model, anchors, tokens, torch.bfloat16, natively) for natively in (False, True))
    assert relative_error(found, truth) <= 1.25 * relative_error(layers, truth)
    assert relative_error(found, layers) <= relative_error(layers, truth)


@pytest.fixture
def compiled_anew():
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flags", [("-mno-avx512bf16",), ("-march=x86-64-v3",)])
def test_processors_without_products_of_bf16(flags, monkeypatch, compiled_anew):
    anchors, tokens = at_few(40), random_tokens(2, 5, 20, 2)
    usual = steps(model_of("groups of 2"), anchors, tokens, torch.bfloat16)
    native.library.cache_clear()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *flags))
    assert relative_error(steps(model_of("groups of 2"), anchors, tokens, torch.bfloat16), usual) <= 1e-2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_thought_has_the_same_numbers_in_any_batch_and_with_any_threads(dtype):
    model, anchors, tokens = model_of("groups of 2"), at_few(600), random_tokens(2, 19, 20, 2)
    together, threads = steps(model, anchors, tokens, dtype), torch.get_num_threads()
    row = Anchors(anchors.text.rows(slice(1, 2)), anchors.index_BM[1:, :1])
    try:
        torch.set_num_threads(3)
        alone = steps(model, row, tokens[1:, 17:18, :, :1], dtype)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0, 0, :, 0], together[1, 17, :, 0])


def test_weights_that_change_are_packed_again():
    model, anchors, tokens = model_of("biases and norms of heads"), at_few(12), random_tokens(2, 2, 5, 2)
    before = steps(model, anchors, tokens)
    with torch.no_grad():
        for parameter in model.decoder.layers.parameters():
            parameter.mul_(1.1)
    after = steps(model, anchors, tokens)
    assert relative_error(after, before) > 1e-2
    assert relative_error(after, steps(model, anchors, tokens, natively=False)) <= 1e-5


@pytest.mark.parametrize("prediction", [None, Prediction((8,), 4, (9,))])
@pytest.mark.parametrize("prompt", [(7,), (7, 8, 9)])
def test_rollouts_sample_the_same(prediction, prompt, monkeypatch):
    model, anchors = model_of("groups of 2"), at_few(12)
    with torch.no_grad():
        state = model.read(anchors.text)
    found = []
    for engine in (EAGER, Native()):
        if engine is not EAGER:
            monkeypatch.delattr(ThoughtCache, "__init__")  # which is for the layers one by one
        ends = dict(prompt=prompt, close=(5,), prediction=prediction)
        found.append(rollout(model, state, anchors, 3, 20, Rng(1, 2), engine=engine, **ends))
    assert torch.equal(found[0].thoughts.tokens_BKSM, found[1].thoughts.tokens_BKSM)
    assert relative_error(found[1].logprobs_BKSM, found[0].logprobs_BKSM) <= 1e-5


def test_what_it_does_not_support_and_why(monkeypatch):
    anchors, model = at_few(12), model_of("groups of 2")
    assert supported(model, anchors) == (True, "")
    for other, places, reason in (
        (model, Anchors.everywhere(anchors.text), "thoughts at every position are not its shape"),
        (model_of("groups of 2", torch.float64), anchors, "it computes in fp32 and bf16, not in torch.float64"),
        (tiny_model(torch.float32, width=24, head_dim=8), anchors, "must be multiples of 16"),
    ):
        is_supported, why = supported(other, places)
        assert not is_supported and reason in why
    monkeypatch.setenv("FORETHOUGHT_ATTENTION", "reference")
    assert supported(model, anchors) == (False, "attention backend 'reference' was asked for")


def test_thoughts_beyond_the_models_positions_are_refused():
    model = tiny_model(torch.float32, max_positions=14, **SIZES["groups of 2"])
    with pytest.raises(ValueError, match="15 positions exceed the model's 14; use shorter rows"):
        steps(model, at_few(12), random_tokens(2, 1, 3, 2))


@torch.no_grad()
def test_a_full_cache_takes_no_token():
    model, anchors = model_of("groups of 2"), at_few(12)
    step, one = NativeStep(model, anchors, model.read(anchors.text), 1, 4), torch.ones(1, dtype=torch.int64)
    step(one, one, 0 * one, 3 * one)
    with pytest.raises(ValueError, match="thought cache is full \\(4 tokens\\)"):
        step(one, one, 0 * one, 4 * one)


def test_a_compiler_that_fails_is_quoted(monkeypatch, compiled_anew):
    monkeypatch.setattr(native, "FLAGS", ("-std=c++20", "--no-such-flag"))
    native.library.cache_clear()
    with pytest.raises(RuntimeError, match=r"cannot compile native.cpp; leave the key compile out: .*no-such-flag"):
        native.library()
    monkeypatch.setattr(native, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="install g\\+\\+ or leave the key out"):
        native.library()
