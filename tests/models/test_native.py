"""The compiled step of sampling on CPUs ≡ the layers one by one. Shapes as in models/native.py."""

from __future__ import annotations

import platform

import pytest
import torch

from models import native
from models.decoder import ThoughtCache
from models.native import NativeStep, takes_native_steps
from models.philox import Rng
from models.rollout import Answer, rollout
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error, tiny_model

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")

SIZES = {
    "groups of 2": dict(width=32, ffn_width=48, heads=4, kv_heads=2, head_dim=16),
    "biases and norms of heads": dict(
        width=48, ffn_width=64, heads=3, kv_heads=3, head_dim=32,
        qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True,
    ),
    "one key head for 20": dict(width=16, ffn_width=16, heads=20, kv_heads=1, head_dim=16),
}  # fmt: skip


def model_of(sizes: str, dtype: torch.dtype = torch.float32):
    """The same weights in every dtype."""
    model = tiny_model(torch.float64, max_positions=1024, **SIZES[sizes]).float().to(dtype)
    model.native_steps = True
    return model


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
        assert takes_native_steps(model, anchors, state)
        step = NativeStep(model, anchors, state, K, T)
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


@pytest.mark.parametrize("answer", [None, Answer((8,), 4, (9,))])
@pytest.mark.parametrize("given", [(7,), (7, 8, 9)])
def test_rollouts_draw_the_same(answer, given, monkeypatch):
    model, anchors = model_of("groups of 2"), at_few(12)
    with torch.no_grad():
        state = model.read(anchors.text)
    drawn = []
    for model.native_steps in (False, True):
        if model.native_steps:
            monkeypatch.delattr(ThoughtCache, "__init__")  # which is for the layers one by one
        drawn.append(rollout(model, state, anchors, 3, 20, Rng(1, 2), given=given, close=(5,), answer=answer))
    assert torch.equal(drawn[0].thoughts.tokens_BKSM, drawn[1].thoughts.tokens_BKSM)
    assert relative_error(drawn[1].logprobs_BKSM, drawn[0].logprobs_BKSM) <= 1e-5


@torch.no_grad()
def test_what_it_does_not_serve_goes_layer_by_layer(monkeypatch):
    anchors = at_few(12)

    def taken(model, anchors=anchors):
        return takes_native_steps(model, anchors, model.read(anchors.text))

    model = model_of("groups of 2")
    assert taken(model)
    assert not taken(model, Anchors.everywhere(anchors.text))
    assert not taken(model_of("groups of 2", torch.float64))
    with monkeypatch.context() as patch:
        patch.setenv("FORETHOUGHT_ATTENTION", "reference")
        assert not taken(model)
    model.native_steps = False
    assert not taken(model)
    other = tiny_model(torch.float32, width=24, head_dim=8)
    other.native_steps = True
    assert not taken(other)


def test_thoughts_beyond_the_models_positions_are_refused():
    model = tiny_model(torch.float32, max_positions=14, **SIZES["groups of 2"])
    model.native_steps = True
    with pytest.raises(ValueError, match="15 positions exceed the model's 14; use shorter rows"):
        steps(model, at_few(12), random_tokens(2, 1, 3, 2))


@torch.no_grad()
def test_there_is_no_token_without_room():
    model, anchors = model_of("groups of 2"), at_few(12)
    step = NativeStep(model, anchors, model.read(anchors.text), 1, 4)
    step(random_tokens(2, 1, 4, 2))
    with pytest.raises(ValueError, match="room for 4 tokens of a thought"):
        step(random_tokens(2, 1, 1, 2))


def test_a_compiler_that_fails_is_quoted(monkeypatch, compiled_anew):
    monkeypatch.setattr(native, "FLAGS", ("-std=c++20", "--no-such-flag"))
    native.library.cache_clear()
    with pytest.raises(RuntimeError, match=r"cannot compile native.cpp; leave the key compile out: .*no-such-flag"):
        native.library()
    monkeypatch.setattr(native, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="install g\\+\\+ or leave the key out"):
        native.library()
