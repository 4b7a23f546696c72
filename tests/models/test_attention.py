"""aten ≡ reference in fp64, forward and all gradients; what may see what, to the bit; and a control that must fail.

Shapes as in models/attention/reference.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from models import attention
from models.attention import aten, reference, triton
from models.thoughts import Anchors, Text
from tests.helpers import packed_text, relative_error

TOLERANCE = 1e-10
NAMES = ("out", "dq", "dk", "dv", "dk_text", "dv_text")


def inputs(text: Text, M: int, K: int, S: int, T: int, H: int, G: int, D: int, dtype=torch.float64, seed: int = 0):
    B, N = text.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, K, S, M, H, D), (B, K, T, M, G, D), (B, K, T, M, G, D), (B, N, G, D), (B, N, G, D)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def value_and_gradients(function, arguments, *rest, weight=None):
    out = function(*arguments, *rest)
    if weight is None:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), arguments)]


def window(text: Text, start: int, end: int) -> Anchors:
    return Anchors(text, torch.arange(start, end).expand(text.shape[0], -1), window=(start, end))


def anchor_cases() -> dict[str, Anchors]:
    packed = packed_text([[4, 3, 4], [8, 1]], 11)
    whole = packed_text([[9], [9]], 9)
    single = packed_text([[1, 1], [2]], 2)
    sparse = torch.tensor([[0, 3, 5, -1], [7, 8, 2, 2]])
    return {
        "dense, packed, padded": Anchors.everywhere(packed),
        "dense, whole rows": Anchors.everywhere(whole),
        "dense, documents of one token": Anchors.everywhere(single),
        "sparse, repeated, without text": Anchors(packed, sparse),
        "sparse, on padding": Anchors(packed, torch.tensor([[10], [10]])),
        "window inside a document": window(packed, 5, 7),
        "window over several documents": window(packed, 2, 9),
        "window up to the end": window(packed, 6, 11),
        "window at the beginning": window(whole, 0, 4),
        "window at a document's beginning": window(packed, 4, 9),
        "one in all": Anchors(packed_text([[4, 6]], 11), torch.tensor([[8]])),
        "at the first token": Anchors(whole, torch.tensor([[0], [0]])),
    }


@pytest.mark.parametrize("name", anchor_cases())
@pytest.mark.parametrize(("K", "S", "T"), [(2, 5, 5), (1, 1, 1), (3, 1, 4)])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 1), (8, 1), (6, 2)])
def test_aten_is_reference(name, K, S, T, H, G):
    anchors = anchor_cases()[name]
    arguments = inputs(anchors.text, anchors.index_BM.shape[1], K, S, T, H, G, D=8)
    truth = value_and_gradients(reference.thought_attention, arguments, anchors)
    got = value_and_gradients(aten.thought_attention, arguments, anchors)
    errors = {n: relative_error(a, b) for n, a, b in zip(NAMES, got, truth, strict=True)}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("text", [packed_text([[4, 3, 4], [8, 1]], 11), packed_text([[70], [70]], 70)])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 1), (6, 2)])
def test_text_attention_aten_is_reference(text, H, G):
    B, N = text.shape
    arguments = [torch.randn(B, N, h, 8, dtype=torch.float64, requires_grad=True) for h in (H, G, G)]
    truth = value_and_gradients(reference.text_attention, arguments, text)
    got = value_and_gradients(aten.text_attention, arguments, text)
    errors = [relative_error(a, b) for a, b in zip(got, truth, strict=True)]
    assert max(errors) <= TOLERANCE, errors


def test_sizes_that_span_several_tiles():
    """More text and more thought than one tile of the kernels, neither a multiple of it."""
    text = packed_text([[97, 73], [170]], 170)
    for anchors, S in ((Anchors.everywhere(text), 5), (Anchors(text, torch.tensor([[96, 169], [0, 131]])), 77)):
        arguments = inputs(text, anchors.index_BM.shape[1], 1, S, S, 4, 2, D=8)
        truth = value_and_gradients(reference.thought_attention, arguments, anchors)
        got = value_and_gradients(aten.thought_attention, arguments, anchors)
        assert max(relative_error(a, b) for a, b in zip(got, truth, strict=True)) <= TOLERANCE


def test_reference_is_softmax_over_what_is_visible():
    """The definition itself, worked out key by key for one query."""
    text = packed_text([[3, 4]], 7)
    anchors = Anchors(text, torch.tensor([[5]]))
    q, k, v, k_text, v_text = (x.detach() for x in inputs(text, 1, 1, 3, 3, 2, 1, D=4))
    out = reference.thought_attention(q, k, v, k_text, v_text, anchors)
    keys = torch.stack([k_text[0, n, 0] for n in (3, 4, 5)] + [k[0, 0, s, 0, 0] for s in (0, 1)])
    values = torch.stack([v_text[0, n, 0] for n in (3, 4, 5)] + [v[0, 0, s, 0, 0] for s in (0, 1)])
    expected = torch.softmax(keys @ q[0, 0, 1, 0, 1] / 2.0, 0) @ values
    assert relative_error(out[0, 0, 1, 0, 1], expected) <= 1e-14


@pytest.mark.parametrize("dense", [True, False])
def test_gradcheck(dense):
    text = packed_text([[3, 2]], 5)
    anchors = Anchors.everywhere(text) if dense else Anchors(text, torch.tensor([[4, -1]]))
    arguments = inputs(text, anchors.index_BM.shape[1], 1, 2, 2, 2, 1, D=4)
    assert torch.autograd.gradcheck(lambda *a: aten.thought_attention(*a, anchors), arguments)


def test_dropping_the_gradient_of_lse_is_caught():
    """The negative control: each part's backward with its own O and L, as stock kernels under a differentiable merge
    would do it, must be seen by these comparisons as plainly wrong."""
    text = packed_text([[9], [9]], 9)
    anchors = Anchors.everywhere(text)
    arguments = inputs(text, 9, 2, 4, 4, 4, 2, D=8)

    def merged_without_dlse(q, k, v, k_text, v_text):
        B, K, S, N, H, D = q.shape
        G = k.shape[4]
        q_groups = q.reshape(B, K, S, N, G, H // G, D)
        text_scores = torch.einsum("bksmgrd,bngd->bksmgrn", q_groups, k_text) * D**-0.5
        text_scores = text_scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril()[:, None, None], -torch.inf)
        own_scores = torch.einsum("bksmgrd,bktmgd->bksmgrt", q_groups, k) * D**-0.5
        causal = torch.ones(S, S, dtype=torch.bool).tril()[:, None, None, None]
        own_scores = own_scores.masked_fill(~causal, -torch.inf)
        lse_text, lse_own = text_scores.logsumexp(-1).detach(), own_scores.logsumexp(-1).detach()
        lse = torch.logaddexp(lse_text, lse_own)
        out_text = torch.einsum("bksmgrn,bngd->bksmgrd", text_scores.softmax(-1), v_text)
        out_own = torch.einsum("bksmgrt,bktmgd->bksmgrd", own_scores.softmax(-1), v)
        out = (lse_text - lse).exp()[..., None] * out_text + (lse_own - lse).exp()[..., None] * out_own
        return out.reshape(q.shape)

    truth = value_and_gradients(reference.thought_attention, arguments, anchors)
    wrong = value_and_gradients(merged_without_dlse, arguments)
    errors = {n: relative_error(a, b) for n, a, b in zip(NAMES, wrong, truth, strict=True)}
    assert errors["out"] <= 1e-14
    assert errors["dq"] > 0.05, errors
    assert errors["dk"] > 0.05, errors
    assert errors["dk_text"] > 0.05, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_errs_at_most_twice_the_references(dtype):
    """flash-attention's rule: against fp64, at most twice the error of the definition run in that precision."""
    # Documents on both sides of aten.SHORT.
    text = packed_text([[60, 200], [260]], 260)
    anchors = Anchors.everywhere(text)
    arguments = inputs(text, 260, 2, 6, 6, 4, 2, D=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    truth = value_and_gradients(reference.thought_attention, exact, anchors)
    got = value_and_gradients(aten.thought_attention, arguments, anchors)

    def rounded(q, k, v, k_text, v_text):
        """The definition with every intermediate result in `dtype`."""
        B, K, S, N, H, D = q.shape
        G = k.shape[4]
        q = q.reshape(B, K, S, N, G, H // G, D)
        text_scores = torch.einsum("bksmgrd,bngd->bksmgrn", q, k_text) * D**-0.5
        document = text.document_BN
        seen = (document[:, :, None] == document[:, None, :]).tril()[:, None, None, :, None, None]
        own_scores = torch.einsum("bksmgrd,bktmgd->bksmgrt", q, k) * D**-0.5
        causal = torch.ones(S, S, dtype=torch.bool).tril()[:, None, None, None]
        scores = torch.cat(
            [text_scores.masked_fill(~seen, -torch.inf), own_scores.masked_fill(~causal, -torch.inf)], dim=-1
        )
        weights = scores.softmax(-1)
        out = torch.einsum("bksmgrn,bngd->bksmgrd", weights[..., :N], v_text)
        return (out + torch.einsum("bksmgrt,bktmgd->bksmgrd", weights[..., N:], v)).reshape(B, K, S, N, H, D)

    plain = value_and_gradients(rounded, arguments)
    for name, a, b, c in zip(NAMES, got, plain, truth, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c), name


def test_step_by_step_is_one_pass():
    """Each token as the newest of its thought gives what the pass over the whole thought gives."""
    for anchors in anchor_cases().values():
        q, k, v, k_text, v_text = inputs(anchors.text, anchors.index_BM.shape[1], 2, 5, 5, 4, 2, D=8)
        whole = aten.thought_attention(q, k, v, k_text, v_text, anchors)
        for s in range(5):
            step = aten.thought_attention(
                q[:, :, s : s + 1], k[:, :, : s + 1], v[:, :, : s + 1], k_text, v_text, anchors
            )
            assert relative_error(step, whole[:, :, s : s + 1]) <= 1e-14


def test_thoughts_together_are_thoughts_apart():
    anchors = anchor_cases()["dense, packed, padded"]
    q, k, v, k_text, v_text = inputs(anchors.text, 11, 3, 4, 4, 4, 2, D=8)
    together = aten.thought_attention(q, k, v, k_text, v_text, anchors)
    for i in range(3):
        alone = aten.thought_attention(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], k_text, v_text, anchors)
        assert relative_error(alone, together[:, i : i + 1]) <= 1e-14


def test_dense_is_sparse_at_every_position():
    anchors = anchor_cases()["dense, packed, padded"]
    arguments = inputs(anchors.text, 11, 2, 4, 4, 4, 2, D=8)
    dense = value_and_gradients(aten.thought_attention, arguments, anchors)
    sparse = value_and_gradients(aten.thought_attention, arguments, Anchors(anchors.text, anchors.index_BM))
    assert max(relative_error(a, b) for a, b in zip(sparse, dense, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("backend", ["reference", "aten"])
@pytest.mark.parametrize("dense", [True, False])
def test_nothing_else_is_seen(backend, dense):
    """Other documents, later text, other thoughts and other anchors change nothing, bit for bit; not even as NaN."""
    text = packed_text([[6, 5]], 11)
    anchors = Anchors.everywhere(text) if dense else Anchors(text, torch.tensor([[3, 8]]))
    m, anchor = (8, 8) if dense else (1, 8)
    q, k, v, k_text, v_text = (x.detach() for x in inputs(text, anchors.index_BM.shape[1], 2, 3, 3, 4, 2, D=8))
    before = attention.thought_attention(q, k, v, k_text, v_text, anchors, backend)[0, 1, :, m]
    for x in (k_text, v_text):
        x[0, :6] = 7.0  # the other document
        x[0, anchor + 1 :] = -5.0  # later text
    for x in (k, v):
        x[0, 0] = 3.0  # the other thought of every anchor
        others = torch.arange(x.shape[3]) != m
        x[0, 1, :, others] = 2.0  # the same thought of other anchors
    after = attention.thought_attention(q, k, v, k_text, v_text, anchors, backend)[0, 1, :, m]
    assert torch.equal(before, after)
    k[0, 1, 2, m] = 9.0  # a later token of its own
    causal = attention.thought_attention(q, k, v, k_text, v_text, anchors, backend)[0, 1, :, m]
    assert torch.equal(before[:2], causal[:2])
    assert not torch.equal(before[2], causal[2])


def test_padding_is_never_read():
    """Padding full of NaN leaves every real output and gradient finite."""
    text = packed_text([[4], [7]], 9)
    anchors = Anchors.everywhere(text)
    arguments = inputs(text, 9, 1, 2, 2, 2, 1, D=8)
    with torch.no_grad():
        for x in arguments[3:]:
            x[0, 4:], x[1, 7:] = torch.nan, torch.nan
    real = (text.document_BN >= 0)[:, None, None, :, None, None].double().expand(-1, 1, 2, -1, 2, 8)
    got = value_and_gradients(aten.thought_attention, arguments, anchors, weight=real)
    assert all(torch.isfinite(x).all() for x in got)


def test_choice_of_backend(monkeypatch, caplog):
    """aten where it serves, else the definition; either is said once, with the reason."""
    monkeypatch.delenv("FORETHOUGHT_ATTENTION", raising=False)
    attention._say_once.cache_clear()
    caplog.set_level("INFO", attention.__name__)
    anchors = anchor_cases()["dense, whole rows"]
    arguments = inputs(anchors.text, 9, 1, 2, 5, 2, 1, D=8)
    unsupported = "2 query tokens for 5 key tokens: neither one step nor the whole thought"
    for _ in range(2):
        fallback = attention.thought_attention(*arguments, anchors)
        attention.text_attention(*arguments[-1:] * 3, anchors.text)
    assert torch.equal(fallback, reference.thought_attention(*arguments, anchors))
    assert caplog.messages == [
        f"attention backend: reference ({unsupported})",
        "attention backend: aten (flash kernel for CPU)",
    ]
    with pytest.raises(
        ValueError, match=f"'aten' does not support this call: {unsupported}; unset it or use 'reference'$"
    ):
        attention.thought_attention(*arguments, anchors, backend="aten")
    with pytest.raises(ValueError, match=r"'magic' is not one of reference, aten, flex, flash, triton$"):
        attention.thought_attention(*arguments, anchors, backend="magic")


@pytest.mark.parametrize("name", attention.BACKENDS)
def test_a_backend_asked_for_serves_or_says_why_not(monkeypatch, name):
    """By the variable; an argument goes before it. No device here has all of them."""
    anchors = anchor_cases()["dense, whole rows"]
    arguments = inputs(anchors.text, 9, 1, 2, 5, 2, 1, D=8)
    monkeypatch.setenv("FORETHOUGHT_ATTENTION", name)
    if name == "reference":
        assert attention.thought_attention(*arguments, anchors).isfinite().all()
    else:
        with pytest.raises(
            ValueError, match=f"'{name}' does not support this call: [^\n]+; unset it or use 'reference'$"
        ):
            attention.thought_attention(*arguments, anchors)
    assert attention.thought_attention(*arguments, anchors, backend="reference").isfinite().all()


def on_cuda(*shape: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False):
    """All that the choice of a backend asks of a tensor."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape, requires_grad=requires_grad)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.delenv("FORETHOUGHT_ATTENTION", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention._say_once.cache_clear()


def test_falling_to_the_definition_on_cuda_is_a_warning(hopper, caplog):
    caplog.set_level("WARNING", attention.__name__)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        q = on_cuda(1, 5, 2, 64, dtype=dtype)
        assert attention._choose(q, q) is (aten if dtype == torch.bfloat16 else reference)
    (warning,) = caplog.messages
    assert "dense definition" in warning and "takes bf16 and fp16, not torch.float32" in warning


@pytest.mark.parametrize("installed", [True, False])
def test_new_tokens_at_several_anchors_do_not_copy_their_texts(hopper, monkeypatch, installed):
    """By the kernel that reads them where they lie, if it is there and has the head size; whatever has a gradient, and
    one anchor, whose text is a slice, by torch's."""
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: installed or None)
    text = packed_text([[30], [30]], 30)
    several, one = Anchors(text, torch.tensor([[3, 9], [20, 29]])), Anchors(text.rows(slice(1)), torch.tensor([[9]]))

    def chosen(anchors, S, T, D=64, filled=False, requires_grad=False):
        B, M = anchors.index_BM.shape
        q = on_cuda(B, 2, S, M, 4, D, requires_grad=requires_grad)
        return attention._choose(q, on_cuda(B, 2, T, M, 2, D), anchors=anchors, filled=filled)

    for filled in (False, True):
        assert chosen(several, 1, 7, filled=filled) is (triton if installed else aten)
        assert chosen(several, 1, 7, D=80, filled=filled) is aten
        assert chosen(one, 1, 7, filled=filled) is aten
    assert chosen(several, 7, 7) is aten
    assert chosen(several, 1, 1, requires_grad=True) is aten
    assert chosen(Anchors.everywhere(text), 1, 7) is aten


@pytest.mark.parametrize("installed", [True, False])
def test_whole_thoughts_at_every_position_take_the_kernel_made_for_them(hopper, monkeypatch, installed):
    """With gradient or without, in fp32 too, if it is there and a thought fits into a tile; windows take torch's."""
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: installed or None)
    everywhere = Anchors.everywhere(packed_text([[30], [30]], 30))

    def chosen(anchors, S, **of_q):
        M = anchors.index_BM.shape[1]
        return attention._choose(on_cuda(2, 2, S, M, 4, 64, **of_q), on_cuda(2, 2, S, M, 2, 64), anchors=anchors)

    for requires_grad in (False, True):
        assert chosen(everywhere, 16, requires_grad=requires_grad) is (triton if installed else aten)
        assert chosen(everywhere, 65, requires_grad=requires_grad) is aten
        assert chosen(everywhere.part(slice(10, 20)), 16, requires_grad=requires_grad) is aten
    assert chosen(everywhere, 16, dtype=torch.float32) is (triton if installed else reference)
