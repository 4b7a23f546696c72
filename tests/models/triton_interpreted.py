"""The triton kernels ≡ reference, in Triton's interpreter; run by test_triton_interpreter.py under TRITON_INTERPRET=1.

Kernels compute in fp32 from inputs that are exact in fp32, the reference in fp64 from the same. Shapes as in
models/attention/reference.py.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from models import attention
from models.attention import aten, reference, triton
from models.attention.kernels import decode, dense, step
from models.decoder import ThoughtCache
from models.philox import Rng
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error, rollout, tiny_config, tiny_model
from tests.models.test_attention import NAMES, inputs, value_and_gradients

TOLERANCE = 1e-5


def errors_against_reference(function, anchors: Anchors, K: int, S: int, H: int, G: int, D: int = 16, seed: int = 0):
    """Relative norm of the error of the output and of every gradient."""
    arguments = inputs(anchors.text, anchors.index_BM.shape[1], K, S, S, H, G, D, dtype=torch.float32, seed=seed)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    truth = value_and_gradients(reference.thought_attention, exact, anchors)
    got = value_and_gradients(function, arguments, anchors)
    return {n: relative_error(a, b) for n, a, b in zip(NAMES, got, truth, strict=True)}


@pytest.mark.parametrize(
    ("text", "K", "S", "H", "G", "D"),
    [
        pytest.param(packed_text([[4, 3, 4], [8, 1]], 11), 2, 5, 2, 2, 16, id="packed and padded, groups of 1"),
        pytest.param(packed_text([[45, 26]], 71), 1, 3, 3, 1, 16, id="several tiles of rows and text, groups of 3"),
        pytest.param(packed_text([[13]], 13), 1, 6, 8, 2, 32, id="groups of 4"),
        pytest.param(packed_text([[9], [5, 2]], 9), 1, 13, 8, 1, 16, id="groups of 8, one position a tile, padding"),
        pytest.param(packed_text([[3]], 3), 1, 33, 2, 1, 16, id="more tokens than half a tile"),
        pytest.param(packed_text([[1, 1], [2]], 2), 2, 1, 2, 1, 16, id="documents of one token, thoughts of one"),
    ],
)
def test_whole_thoughts_everywhere(text, K, S, H, G, D):
    errors = errors_against_reference(triton.thought_attention, Anchors.everywhere(text), K, S, H, G, D)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(("programs", "splits"), [(1, 1), (264, 3)])
def test_text_gradients_summed_over_splits(monkeypatch, programs, splits):
    """Blocks of text that end one document and begin another, of which some splits have no rows; the second row of
    text ends within the first split."""
    launched, launch = [], dense._backward_text

    class Recorded:
        def __getitem__(self, grid):
            launched.append(grid)
            return launch[grid]

    monkeypatch.setattr(dense, "_backward_text", Recorded())
    monkeypatch.setattr(dense, "PROGRAMS", programs)
    anchors = Anchors.everywhere(packed_text([[70, 75], [20]], 145))
    errors = errors_against_reference(triton.thought_attention, anchors, K=2, S=2, H=2, G=1)
    assert max(errors.values()) <= TOLERANCE, errors
    assert launched == [(3, 1, 2 * splits)]


def test_programs_for_the_texts_gradient_fill_a_gpu():
    """One row of 1024 positions and 3 key-value heads: on 132 multiprocessors each has at least one program with rows
    to read, and the longest has not many more of them than it would have if all were equal."""
    N, heads, BLOCK = 1024, 3, dense.text_constants(16, 3, 64)["BLOCK"]
    span = dense.positions_of_a_split(N, heads, BLOCK)
    positions = [
        min(N, start + span) - max(start, first)
        for first in range(0, N, BLOCK)
        for start in range(0, N, span)
        if start + span > first
    ]
    assert heads * len(positions) >= 132
    assert max(positions) * 132 <= 1.25 * heads * sum(positions)


def anchors_at_few() -> Anchors:
    """Documents apart, a repeated anchor, one without text, one on padding."""
    return Anchors(packed_text([[30, 70], [90]], 100), torch.tensor([[3, 99, 41, -1], [89, 89, 95, 0]]))


def anchors_at_all() -> Anchors:
    return Anchors.everywhere(packed_text([[4, 3, 4], [8, 1]], 11))


@pytest.mark.parametrize(("H", "G"), [(2, 2), (3, 1), (8, 2), (8, 1)])
@pytest.mark.parametrize("splits", [1, 3])
def test_decode(H, G, splits):
    """One new token, several, and whole thoughts, over any number of splits of the text, empty ones included."""
    anchors = anchors_at_few()
    for K, S, T in ((3, 1, 1), (2, 1, 70), (1, 3, 5), (2, 9, 9)):
        arguments = [x.detach() for x in inputs(anchors.text, 4, K, S, T, H, G, D=16, dtype=torch.float32)]
        truth = reference.thought_attention(*(x.double() for x in arguments), anchors)
        out, lse = decode.decode(*arguments, *anchors.visible_BM, splits=splits)
        assert relative_error(out, truth) <= TOLERANCE
        assert torch.isfinite(lse).all()


@pytest.mark.parametrize(("K", "S", "H", "G"), [(2, 5, 4, 1), (1, 70, 3, 3)])
def test_gradients_at_few_anchors(K, S, H, G):
    errors = errors_against_reference(triton.thought_attention, anchors_at_few(), K, S, H, G)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize(("H", "G"), [(2, 2), (3, 1), (8, 2), (8, 1)])
def test_newest_token_everywhere(H, G):
    anchors = anchors_at_all()
    for K, T in ((2, 2), (1, 7)):
        arguments = [x.detach() for x in inputs(anchors.text, 11, K, 1, T, H, G, D=16, dtype=torch.float32)]
        truth = reference.thought_attention(*(x.double() for x in arguments), anchors)
        assert relative_error(triton.thought_attention(*arguments, anchors), truth) <= TOLERANCE


@pytest.mark.parametrize("anchors", [anchors_at_few(), anchors_at_all()], ids=["few", "all"])
def test_a_cache_is_read_where_it_lies(anchors):
    """The filled part of a longer cache, whose rest is NaN, and step by step what one pass gives."""
    B, M, K, S = *anchors.index_BM.shape, 2, 5
    arguments = [x.detach() for x in inputs(anchors.text, M, K, S, S, 4, 2, D=16, dtype=torch.float32)]
    q, k, v, k_text, v_text = arguments
    whole = reference.thought_attention(*(x.double() for x in arguments), anchors)
    cache = ThoughtCache(tiny_config(kv_heads=2, head_dim=16), B, K, S + 3, M, like=q)
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    for s in range(S):
        now = slice(s, s + 1)
        for layer in range(2):
            keys, values = cache.extend(layer, k[:, :, now], v[:, :, now])
        out = triton.thought_attention(q[:, :, now], keys, values, k_text, v_text, anchors)
        assert relative_error(out, whole[:, :, now]) <= TOLERANCE


def test_own_tokens_counted_on_the_device():
    """A cache whose filled part is known to the device alone, and whose rest is NaN."""
    anchors = anchors_at_few()
    M, K, T = anchors.index_BM.shape[1], 2, 35
    arguments = [x.detach() for x in inputs(anchors.text, M, K, 1, T, 4, 2, D=16, dtype=torch.float32)]
    q, k, v, k_text, v_text = arguments
    for filled in (33, 32, 1):
        seen = q, k[:, :, :filled], v[:, :, :filled], k_text, v_text
        truth = reference.thought_attention(*(x.double() for x in seen), anchors)
        k[:, :, filled:], v[:, :, filled:] = torch.nan, torch.nan
        with torch.no_grad():
            got = triton.thought_attention(*arguments, anchors, torch.tensor([filled], dtype=torch.int32))
        assert relative_error(got, truth) <= TOLERANCE


@pytest.mark.parametrize("anchors", [anchors_at_few(), anchors_at_all()], ids=["few", "all"])
def test_padding_is_never_read(anchors):
    """Padding full of NaN leaves every real output and gradient finite and right."""
    text, M = anchors.text, anchors.index_BM.shape[1]
    arguments = inputs(text, M, 2, 3, 3, 4, 2, D=16, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    truth = value_and_gradients(reference.thought_attention, exact, anchors)
    with torch.no_grad():
        for x in arguments[3:]:
            x[text.document_BN < 0] = torch.nan
    got = value_and_gradients(triton.thought_attention, arguments, anchors)
    errors = {n: relative_error(a, b) for n, a, b in zip(NAMES, got, truth, strict=True)}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("anchors", [anchors_at_few(), anchors_at_all()], ids=["few", "all"])
@pytest.mark.parametrize("S", [1, 3])
def test_nothing_else_is_seen(anchors, S):
    """Other documents, later text, other thoughts, other anchors and later own tokens change nothing, bit for bit."""
    text, T = anchors.text, 3
    m = 1 if not anchors.dense else 9
    row, anchor = (0, int(anchors.index_BM[0, m]))
    start = int(text.document_start_BN[row, anchor])
    M = anchors.index_BM.shape[1]
    q, k, v, k_text, v_text = (x.detach() for x in inputs(text, M, 2, S, T, 4, 2, D=16, dtype=torch.float32))
    before = triton.thought_attention(q, k, v, k_text, v_text, anchors)[row, 1, :, m].clone()
    for x in (k_text, v_text):
        x[row, :start], x[row, anchor + 1 :], x[1] = 7.0, -5.0, 4.0
    for x in (k, v):
        x[row, 0], x[1] = 3.0, 6.0
        x[row, 1, :, torch.arange(M) != m] = 2.0
    after = triton.thought_attention(q, k, v, k_text, v_text, anchors)[row, 1, :, m].clone()
    assert torch.equal(before, after)
    k[row, 1, T - 1, m] = 9.0
    later = triton.thought_attention(q, k, v, k_text, v_text, anchors)[row, 1, :, m]
    assert torch.equal(before[:-1], later[:-1])
    assert not torch.equal(before[-1], later[-1])


def test_fp16():
    """fp16 operands with fp32 accumulation: at most twice the error of the flash kernels inside torch."""
    anchors = anchors_at_all()
    arguments = inputs(anchors.text, 11, 2, 5, 5, 4, 2, D=16, dtype=torch.float16)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    truth = value_and_gradients(reference.thought_attention, exact, anchors)
    got = value_and_gradients(triton.thought_attention, arguments, anchors)
    stock = value_and_gradients(aten.thought_attention, arguments, anchors)
    for name, a, b, c in zip(NAMES, got, stock, truth, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c), name


@pytest.mark.parametrize(
    ("corrupt", "seen_in"),
    [
        pytest.param("lse", ("dq", "dk", "dv", "dk_text", "dv_text"), id="a log-sum-exp of the text alone"),
        pytest.param("out", ("dq", "dk", "dk_text"), id="no delta"),
        pytest.param("end", ("out", "dq", "dk_text", "dv_text"), id="one text token too many"),
    ],
)
def test_a_wrong_thing_is_noticed(monkeypatch, corrupt, seen_in):
    """The negative control: each error a kernel of this kind invites is far beyond the tolerance where it should be."""
    forward, backward = dense.forward, dense.backward

    def wrong_forward(*arguments):
        *inputs, start, end = arguments
        return forward(*inputs, start, (end + 1).clamp(max=end.shape[1]) if corrupt == "end" else end)

    def wrong_backward(*arguments):
        *rest, out, lse = arguments
        if corrupt == "lse":
            q, k_text, v_text, anchors = rest[1], rest[4], rest[5], everywhere
            lse_text = aten.dense_part(q.flatten(1, 2), k_text, v_text, anchors.text)[1]
            lse = lse_text.unflatten(1, q.shape[1:3]).transpose(-1, -2).contiguous() * dense.LOG2_E
        return backward(*rest, torch.zeros_like(out) if corrupt == "out" else out, lse)

    everywhere = Anchors.everywhere(packed_text([[9]], 9))
    monkeypatch.setattr(dense, "forward", wrong_forward)
    monkeypatch.setattr(dense, "backward", wrong_backward)
    errors = errors_against_reference(triton.thought_attention, everywhere, 2, 3, 4, 2)
    assert min(errors[name] for name in seen_in) > 0.05, errors


@pytest.mark.parametrize(
    ("module", "kernel", "argument", "change"),
    [
        pytest.param(step, "_private_keys", "lse_text_ptr", torch.zeros_like, id="step, parts that weigh alike"),
        pytest.param(step, "_private_keys", "out_text_ptr", torch.zeros_like, id="step, no text"),
        pytest.param(step, "_private_keys", "T", lambda T: T - 1, id="step, without itself"),
        pytest.param(decode, "_prefix", "end_ptr", lambda end: end + 1, id="decode, one text token too many"),
        pytest.param(decode, "_prefix", "start_ptr", lambda start: start + 1, id="decode, one text token too few"),
        pytest.param(decode, "_suffix", "lse_text_ptr", torch.zeros_like, id="decode, splits that weigh alike"),
        pytest.param(decode, "_suffix", "splits", lambda splits: splits - 1, id="decode, one split too few"),
        pytest.param(decode, "_suffix", "T", lambda T: T - 1, id="decode, without itself"),
    ],
)
def test_a_wrong_mask_or_merge_of_a_step_is_noticed(monkeypatch, module, kernel, argument, change):
    """The negative control: a kernel with one argument wrong."""
    few = packed_text([[40, 23], [60]], 63)  # long enough that both splits have text
    anchors = anchors_at_all() if module is step else Anchors(few, torch.tensor([[38, 60], [59, 40]]))
    text = anchors.text
    arguments = [x.detach() for x in inputs(text, anchors.index_BM.shape[1], 2, 1, 3, 4, 2, 16, dtype=torch.float32)]
    truth = reference.thought_attention(*(x.double() for x in arguments), anchors)

    def attend():
        if module is step:
            return triton.thought_attention(*arguments, anchors)
        return decode.decode(*arguments, *anchors.visible_BM, splits=2)[0]

    assert relative_error(attend(), truth) <= TOLERANCE
    launch = getattr(module, kernel)
    place = list(inspect.signature(launch.fn).parameters).index(argument)

    class Wrong:
        def __getitem__(self, grid):
            return lambda *given, **constants: launch[grid](
                *given[:place], change(given[place]), *given[place + 1 :], **constants
            )

    monkeypatch.setattr(module, kernel, Wrong())
    assert relative_error(attend(), truth) > 0.02


def test_a_model_thinks_alike_on_either_backend():
    """Hidden states of thoughts and the gradient of every parameter, and a cached rollout step."""
    model = tiny_model(dtype=torch.float32, head_dim=16)
    decoder = model.decoder
    text = packed_text([[5, 4], [7]], 9)
    x = torch.randn(2, 2, 3, 9, decoder.config.width, generator=torch.Generator().manual_seed(3))
    results = {}
    for backend in ("reference", "triton"):
        decoder.attention_backend = backend
        anchors = Anchors.everywhere(text)
        state = decoder.read(text)
        hidden = decoder.think(x, anchors, state)
        grads = torch.autograd.grad(hidden.square().sum(), list(decoder.parameters()), allow_unused=True)
        with torch.no_grad():
            cache = ThoughtCache(decoder.config, 2, 2, 3, 9, like=x)
            steps = [decoder.think(x[:, :, s : s + 1], anchors, state, cache) for s in range(3)]
        results[backend] = [hidden, torch.cat(steps, 2), *(g for g in grads if g is not None)]
    pairs = zip(results["triton"], results["reference"], strict=True)
    assert max(relative_error(a, b) for a, b in pairs) <= 2e-5


def test_a_rollout_at_several_anchors_is_the_same_on_either_backend():
    """The same tokens, from the same log-probs."""
    model = tiny_model(dtype=torch.float32, head_dim=16)
    anchors = Anchors(packed_text([[5, 4], [7]], 9), torch.tensor([[3, 8, 5], [6, 0, -1]]))
    sampled = []
    for backend in ("reference", "triton"):
        model.decoder.attention_backend = backend
        with torch.no_grad():
            state = model.read(anchors.text)
        sampled.append(rollout(model, state, anchors, 2, 4, Rng(1, 2), prompt=(4, 5)))
    assert torch.equal(sampled[0].thoughts.tokens_BKSM, sampled[1].thoughts.tokens_BKSM)
    assert relative_error(sampled[1].logprobs_BKSM, sampled[0].logprobs_BKSM) <= TOLERANCE


def test_the_limits_of_a_tile_are_said_once():
    assert (triton.MAX_ROWS, triton.MAX_OWN) == (dense.MAX_ROWS, dense.MAX_OWN)


def test_what_cannot_be_served_is_refused_with_the_reason():
    anchors = anchors_at_all()
    text = anchors.text

    def refused(message, *sizes, at=anchors, dtype=torch.float32, M=11):
        with pytest.raises(ValueError, match=f"'triton' does not support this call: {message}"):
            attention.thought_attention(*inputs(text, M, *sizes, dtype=dtype), at, backend="triton")

    refused("the triton kernels take head sizes 16, 32, 64, 128, not 8", 1, 2, 2, 2, 1, 8)
    refused("the triton kernels take fp32, bf16 and fp16, not torch.float64", 1, 2, 2, 2, 1, 16, dtype=torch.float64)
    refused("Triton's interpreter computes nonsense in bf16", 1, 2, 2, 2, 1, 16, dtype=torch.bfloat16)
    refused("17 tokens × 8 query heads of a group exceed a tile", 1, 17, 17, 8, 1, 16)
    refused("65 tokens × 1 query heads of a group exceed a tile", 1, 65, 65, 1, 1, 16)
    refused("2 query tokens for 3 key tokens", 1, 2, 3, 2, 1, 16)
    refused("the triton kernel for a single step has no backward", 1, 1, 3, 2, 1, 16)
    few = Anchors(text, torch.tensor([[3], [5]]))
    refused("2 query tokens for 3 key tokens", 1, 2, 3, 2, 1, 16, at=few, M=1)
