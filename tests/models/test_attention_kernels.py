"""The calls of CUDA kernels, without a GPU: fakes that keep each interface's documented contract, in plain arithmetic.

Torch's operators are faked behind their own schema, so a changed signature is seen; the functions of flash-attn have
the signatures of 2.8.3 (flash_attn/flash_attn_interface.py). Layouts are those of both: q, O [b, s, h, d] and
L [b, h, s], or, with several lengths, q, O [all s, h, d] and L [h, all s].
"""

from __future__ import annotations

import itertools
import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch

from models import attention
from models.attention import aten, flash, flex, merged, reference
from models.attention.merged import MergedAttention
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error
from tests.models.test_attention import NAMES, TOLERANCE, anchor_cases, inputs, value_and_gradients


class Fake:
    """A flash kernel and its backward that check what they are given. `calls` names what was run."""

    def __init__(self):
        self.calls = []

    def forward(self, q, k, v, q_starts, k_starts, q_longest, k_longest, scale, causal, used=None):
        pieces = self.pieces("forward", q, k, v, q_starts, k_starts, q_longest, k_longest, scale)
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        heads, queries = q.shape[-2], q.shape[:-2]
        lse = torch.full((*queries[:-1], heads, queries[-1]), torch.nan, dtype=q.dtype)
        if used is not None:
            assert used.dtype == torch.int32 and used.is_contiguous() and len(used) == len(pieces)
            both = zip(pieces, used.tolist(), strict=True)
            pieces = [(at_q, (slice(at_k.start, at_k.start + n),)) for (at_q, (at_k,)), n in both]
        for at_q, at_k in pieces:
            scores = self.scores(q[at_q], k[at_k], scale, causal)
            lse[(*at_q[:-1], slice(None), at_q[-1])] = scores.logsumexp(-1)
            out[at_q] = torch.einsum("...hst,...thd->...shd", scores.softmax(-1), self.expand(v[at_k], heads))
        return out, lse

    def backward(self, dout, q, k, v, out, lse, q_starts, k_starts, q_longest, k_longest, scale, causal):
        pieces = self.pieces("backward", q, k, v, q_starts, k_starts, q_longest, k_longest, scale)
        heads, queries = q.shape[-2], q.shape[:-2]
        assert lse.shape == (*queries[:-1], heads, queries[-1])
        assert lse.is_contiguous()
        assert dout.stride(-1) == out.stride(-1) == 1
        dq, dk, dv = (torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (q, k, v))
        for at_q, at_k in pieces:
            g, o, l = dout[at_q], out[at_q], lse[(*at_q[:-1], slice(None), at_q[-1])]
            p = (self.scores(q[at_q], k[at_k], scale, causal) - l[..., None]).exp()
            delta = (g * o).sum(-1).transpose(-1, -2)[..., None]
            ds = p * (torch.einsum("...shd,...thd->...hst", g, self.expand(v[at_k], heads)) - delta) * scale
            dq[at_q] = torch.einsum("...hst,...thd->...shd", ds, self.expand(k[at_k], heads))
            group = k.shape[-2], heads // k.shape[-2]
            dk[at_k] = torch.einsum("...hst,...shd->...thd", ds, q[at_q]).unflatten(-2, group).sum(-2)
            dv[at_k] = torch.einsum("...hst,...shd->...thd", p, g).unflatten(-2, group).sum(-2)
        return dq, dk, dv

    def pieces(self, what, q, k, v, q_starts, k_starts, q_longest, k_longest, scale):
        """Index of the queries and of the keys of each sequence, or of all where they are of one length."""
        assert scale == q.shape[-1] ** -0.5
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert q.shape[-2] <= merged.MOST_AT_ONCE
        if q_starts is None:
            assert k_starts is None
            assert (q_longest, k_longest) == (q.shape[1], k.shape[1])
            self.calls.append(what)
            return [((slice(None), slice(None)), (slice(None), slice(None)))]
        self.calls.append(what + ", several lengths")
        assert len(q_starts) == len(k_starts) <= merged.MOST_AT_ONCE + 1
        pieces = []
        for starts, total, longest in ((q_starts, len(q), q_longest), (k_starts, len(k), k_longest)):
            assert starts.dtype == torch.int32
            assert (starts[0], starts[-1], starts.diff().max()) == (0, total, longest)
            assert starts.diff().min() > 0  # flash-attn's L is +inf where there are no keys
            pieces.append([(slice(a, b),) for a, b in itertools.pairwise(starts.tolist())])
        return list(zip(*pieces, strict=True))

    @staticmethod
    def expand(x, heads):
        return x.repeat_interleave(heads // x.shape[-2], dim=-2)

    def scores(self, q, k, scale, causal):
        scores = torch.einsum("...shd,...thd->...hst", q, self.expand(k, q.shape[-2])) * scale
        s, t = scores.shape[-2:]
        assert not causal or s == t
        return scores.masked_fill(torch.ones(s, t, dtype=torch.bool).triu(1), -torch.inf) if causal else scores


@pytest.fixture
def torch_operators():
    fake, library = Fake(), torch.library.Library("aten", "IMPL")

    def forward(q, k, v, q_starts, k_starts, max_q, max_k, dropout, causal, debug, **options):
        assert (dropout, debug) == (0.0, False)
        used = options.pop("seqused_k", None)
        assert not any(options.values())
        out, lse = fake.forward(q, k, v, q_starts, k_starts, max_q, max_k, q.shape[-1] ** -0.5, causal, used)
        return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)

    def backward(dout, q, k, v, out, lse, q_starts, k_starts, max_q, max_k, dropout, causal, rng, unused, **options):
        assert dropout == 0.0
        assert rng.dtype == torch.uint64
        assert not any(options.values())
        return fake.backward(dout, q, k, v, out, lse, q_starts, k_starts, max_q, max_k, q.shape[-1] ** -0.5, causal)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield fake
    library._destroy()


@pytest.fixture
def flash_attn_2(monkeypatch):
    fake, module = Fake(), ModuleType("flash_attn.flash_attn_interface")

    def plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, *none):
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        assert not any(none)

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax)
        return *fake.forward(q, k, v, None, None, q.shape[1], k.shape[1], softmax_scale, causal), None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax, block_table)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *fake.forward(q, k, v, *lengths, softmax_scale, causal), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state)
        lengths = None, None, q.shape[1], k.shape[1]
        grads = fake.backward(dout, q, k, v, out, softmax_lse, *lengths, softmax_scale, causal)
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        grads = fake.backward(dout, q, k, v, out, softmax_lse, *lengths, softmax_scale, causal)
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)

    for function in (
        _flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward
    ):  # fmt: skip
        setattr(module, function.__name__, function)
    package = ModuleType("flash_attn")
    package.flash_attn_interface = module
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    return fake


@pytest.fixture(params=["torch_operators", "flash_attn_2"])
def kernels(request):
    """The attention that runs on the kernels for CUDA, and the fake behind them."""
    fake = request.getfixturevalue(request.param)
    pair = aten.CUDA if request.param == "torch_operators" else flash.FLASH_ATTN_2
    return MergedAttention({"cpu": pair}), fake


def errors_against_reference(attend, arguments, anchors):
    truth = value_and_gradients(reference.thought_attention, arguments, anchors)
    got = value_and_gradients(attend, arguments, anchors)
    return {n: relative_error(a, b) for n, a, b in zip(NAMES, got, truth, strict=True)}


@pytest.mark.parametrize("name", anchor_cases())
@pytest.mark.parametrize(("K", "S", "T"), [(2, 5, 5), (1, 1, 1), (3, 1, 4)])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2)])
def test_thoughts(kernels, name, K, S, T, H, G):
    anchors = anchor_cases()[name]
    arguments = inputs(anchors.text, anchors.index_BM.shape[1], K, S, T, H, G, D=8)
    errors = errors_against_reference(kernels[0].thought_attention, arguments, anchors)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("text", [packed_text([[4, 3, 4], [8, 1]], 11), packed_text([[70], [70]], 70)])
def test_text(kernels, text):
    B, N = text.shape
    arguments = [torch.randn(B, N, h, 8, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2)]
    truth = value_and_gradients(reference.text_attention, arguments, text)
    got = value_and_gradients(kernels[0].text_attention, arguments, text)
    assert max(relative_error(a, b) for a, b in zip(got, truth, strict=True)) <= TOLERANCE


@pytest.mark.parametrize(("name", "most"), [("dense, packed, padded", 9), ("dense, whole rows", 8)])
def test_more_than_one_call_takes(kernels, monkeypatch, name, most):
    """Anchors and thoughts are split where there are more heads, or more documents, than the grid of a kernel holds."""
    monkeypatch.setattr(merged, "MOST_AT_ONCE", most)
    anchors = anchor_cases()[name]
    arguments = inputs(anchors.text, anchors.index_BM.shape[1], 3, 4, 4, 4, 2, D=8)
    errors = errors_against_reference(kernels[0].thought_attention, arguments, anchors)
    assert max(errors.values()) <= TOLERANCE, errors
    assert len(kernels[1].calls) > 4


@pytest.mark.parametrize("name", ["dense, packed, padded", "sparse, repeated, without text"])
def test_packed_documents_and_prefixes_are_one_call(kernels, name):
    attend, fake = kernels
    anchors = anchor_cases()[name]
    arguments = inputs(anchors.text, anchors.index_BM.shape[1], 2, 3, 3, 4, 2, D=8)
    value_and_gradients(attend.thought_attention, arguments, anchors)
    assert sorted(fake.calls) == ["backward", "backward, several lengths", "forward", "forward, several lengths"]


@pytest.mark.parametrize("name", ["dense, packed, padded", "sparse, repeated, without text"])
def test_padding_is_never_read(kernels, name):
    """Padding full of NaN leaves every real output and gradient finite and right."""
    anchors = anchor_cases()[name]
    arguments = inputs(anchors.text, anchors.index_BM.shape[1], 2, 3, 3, 4, 2, D=8)
    truth = value_and_gradients(reference.thought_attention, arguments, anchors)
    with torch.no_grad():
        for x in arguments[3:]:
            x[anchors.text.document_BN < 0] = torch.nan
    got = value_and_gradients(kernels[0].thought_attention, arguments, anchors)
    assert max(relative_error(a, b) for a, b in zip(got, truth, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("name", ["dense, packed, padded", "sparse, repeated, without text"])
@pytest.mark.parametrize("wrong", ["lse", "out"])
def test_a_part_run_with_its_own_result_is_caught(kernels, monkeypatch, name, wrong):
    """The negative control: a backward that is given the part's own O or L instead of the merged ones."""
    attend, fake = kernels
    anchors = anchor_cases()[name]
    arguments = inputs(anchors.text, anchors.index_BM.shape[1], 2, 3, 3, 4, 2, D=8)
    backward = fake.backward

    def of_the_part(dout, q, k, v, out, lse, *rest):
        own_out, own_lse = fake.forward(q, k, v, *rest)
        return backward(dout, q, k, v, *((own_out, lse) if wrong == "out" else (out, own_lse)), *rest)

    monkeypatch.setattr(fake, "backward", of_the_part)
    errors = errors_against_reference(attend.thought_attention, arguments, anchors)
    assert errors["out"] <= TOLERANCE
    assert min(errors[name] for name in ("dq", "dk", "dk_text")) > 0.02, errors


@pytest.mark.parametrize("filled", [1, 3, 5])
@pytest.mark.parametrize("most", [merged.MOST_AT_ONCE, 8])
def test_own_tokens_counted_on_the_device(torch_operators, monkeypatch, filled, most):
    """As if what is not filled yet, here NaN, were not there."""
    monkeypatch.setattr(merged, "MOST_AT_ONCE", most)
    anchors = anchor_cases()["sparse, repeated, without text"]
    arguments = [x.detach() for x in inputs(anchors.text, anchors.index_BM.shape[1], 2, 1, 5, 4, 2, D=8)]
    q, k, v, k_text, v_text = arguments
    truth = reference.thought_attention(q, k[:, :, :filled], v[:, :, :filled], k_text, v_text, anchors)
    k[:, :, filled:], v[:, :, filled:] = torch.nan, torch.nan
    number_1 = torch.tensor([filled], dtype=torch.int32)
    with torch.no_grad():
        got = MergedAttention({"cpu": aten.CUDA}).thought_attention(*arguments, anchors, number_1)
    assert relative_error(got, truth) <= TOLERANCE
    assert relative_error(reference.thought_attention(*arguments, anchors, number_1), truth) <= TOLERANCE


def test_what_is_kept_dies_with_its_text(kernels):
    """Sequences and masks are made once, for all layers, and hold no batch in memory."""
    for name in ("dense, packed, padded", "sparse, repeated, without text"):
        anchors = anchor_cases()[name]
        arguments = [x.detach() for x in inputs(anchors.text, anchors.index_BM.shape[1], 2, 3, 3, 4, 2, D=8)]
        kernels[0].thought_attention(*arguments, anchors)
        assert merged._documents(anchors.text, 6) is merged._documents(anchors.text, 6)
        assert flex._thought_mask(anchors, 2, 3, 3) is flex._thought_mask(anchors, 2, 3, 3)
        assert flex._text_mask(anchors.text) is flex._text_mask(anchors.text)
        batch = weakref.ref(anchors), weakref.ref(anchors.text)
        del anchors
        assert [x() for x in batch] == [None, None]


def test_the_schema_of_torchs_operators():
    """Names and order of what is passed by position."""
    names = {
        op: [a.name for a in getattr(torch.ops.aten, op).default._schema.arguments if not a.kwarg_only]
        for op in ("_flash_attention_forward", "_flash_attention_backward")
    }
    keyword = [a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments if a.kwarg_only]
    assert "seqused_k" in keyword
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert names["_flash_attention_forward"] == ["query", "key", "value", *lengths, "return_debug_mask"]
    given = ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert names["_flash_attention_backward"] == [*given, *lengths, "rng_state", "unused"]


@pytest.mark.parametrize(
    ("installed", "capability", "head_size", "expected"),
    [
        (("flash_attn_interface", "flash-attn-4", "flash_attn_2_cuda"), (9, 0), 128, "FA3"),
        (("flash-attn-4", "flash_attn_2_cuda"), (9, 0), 128, "FA4"),
        (("flash-attn-4", "flash_attn_2_cuda"), (9, 0), 256, "flash-attn 2"),
        (("flash_attn_interface", "flash_attn_2_cuda"), (8, 0), 128, "flash-attn 2"),
        (("flash_attn_interface", "flash-attn-4"), (10, 0), 64, "FA4"),
        (("flash_attn_interface", "flash-attn-4"), (8, 9), 64, None),
        ((), (9, 0), 128, None),
        (("flash_attn_2_cuda",), (7, 5), 128, None),
    ],
)
def test_which_package_serves(monkeypatch, installed, capability, head_size, expected):
    flash._package.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(flash, "_is_installed", lambda name: name in installed)
    q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(2, 9, 4, head_size))
    served, reason = flash.supports(q, q, None, True)
    if expected is None:
        assert not served
        assert "compute capability 8.0" in reason if capability < (8, 0) else "install the extra 'flash'" in reason
    else:
        assert (served, reason) == (True, expected)
    flash._package.cache_clear()


def test_torch_is_told_to_reroute(monkeypatch):
    """Once, and again where someone has undone it."""
    told = [None]
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", told.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: told[-1])
    for _ in range(2):
        assert flash._attention("FA4").kernels == {"cuda": aten.CUDA}
    assert told == [None, "FA4"]
    told.append(None)
    flash._attention("FA4")
    assert told == [None, "FA4", None, "FA4"]
    assert {"FA3", "FA4"} <= set(torch.nn.attention.list_flash_attention_impls())


def test_flash_on_cpu_is_refused():
    text = packed_text([[5]], 5)
    arguments = inputs(text, 5, 1, 2, 2, 2, 1, D=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="'flash' does not support this call: the flash-attn packages run on CUDA"):
        attention.thought_attention(*arguments, Anchors.everywhere(text), backend="flash")
