"""Every backend on a GPU, by flash-attention's rule: against fp32, at most twice the error of the definition in bf16.

Skipped where there is no CUDA, and each backend where it is not installed or does not serve the call.
"""

from __future__ import annotations

import pytest
import torch

from models import attention
from models.attention import reference
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error
from tests.models.test_attention import NAMES, inputs, value_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
BACKENDS = [name for name in attention.BACKENDS if name != "reference"]
# Below what bf16 gives a tensor of these sizes; for tensors that the definition gets right to the bit.
FLOOR = 1e-3


def cases() -> dict[str, tuple[Anchors, int, int, int]]:
    """Anchors, thoughts of an anchor, query tokens, key tokens."""
    whole, packed = packed_text([[200], [200]], 200), packed_text([[90, 61, 20], [150]], 180)
    few, prefixes = torch.tensor([[150, 20, 100], [0, 149, 149]]), torch.tensor([[30, 199], [120, 0]])
    return {
        "dense": (Anchors.everywhere(whole), 2, 12, 12),
        "dense, packed": (Anchors.everywhere(packed), 2, 7, 7),
        "dense, one step": (Anchors.everywhere(packed), 2, 1, 5),
        "deep": (Anchors(whole, prefixes), 3, 140, 140),
        "deep, packed": (Anchors(packed, few), 2, 33, 33),
        "deep, one step": (Anchors(packed, few), 3, 1, 33),
        "deep, some without text": (Anchors(packed, torch.tensor([[-1, 5], [170, 149]])), 2, 9, 9),
    }


def on_cuda(anchors: Anchors) -> Anchors:
    return Anchors(anchors.text.to("cuda"), anchors.index_BM.cuda(), anchors.window)


def rounded(q, k, v, k_text, v_text, anchors):
    """The definition with scores, weights and results in the precision of its arguments."""
    B, K, S, M, H, D = q.shape
    T, G, N = k.shape[2], k.shape[4], k_text.shape[1]
    start_BM, end_BM = anchors.visible_BM
    n = torch.arange(N, device=q.device)
    seen_BMN = (start_BM[..., None] <= n) & (n < end_BM[..., None])
    own_ST = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    q = q.unflatten(-2, (G, H // G))
    scores = torch.cat(
        [
            torch.einsum("bksmgrd,bngd->bksmgrn", q, k_text).masked_fill(
                ~seen_BMN[:, None, None, :, None, None], -torch.inf
            ),
            torch.einsum("bksmgrd,bktmgd->bksmgrt", q, k).masked_fill(~own_ST[:, None, None, None], -torch.inf),
        ],
        dim=-1,
    )
    weights = (scores * D**-0.5).softmax(-1)
    out = torch.einsum("bksmgrn,bngd->bksmgrd", weights[..., :N], v_text)
    return (out + torch.einsum("bksmgrt,bktmgd->bksmgrd", weights[..., N:], v)).flatten(-3, -2)


def compare(definition, in_bf16, backend, arguments, *rest):
    """Error of each tensor over that of the definition in bf16."""
    exact = [x.detach().float().requires_grad_() for x in arguments]
    weight = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(9)).cuda().double()
    truth = value_and_gradients(definition, exact, *rest, weight=weight.bfloat16())
    got = value_and_gradients(backend, arguments, *rest, weight=weight)
    plain = value_and_gradients(in_bf16, arguments, *rest, weight=weight)
    return [
        (relative_error(a, c), max(2 * relative_error(b, c), FLOOR)) for a, b, c in zip(got, plain, truth, strict=True)
    ]


@pytest.fixture(autouse=True)
def as_it_was():
    """fp32 is fp32, and `aten` runs torch's own kernels after `flash` had them replaced."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    if torch.nn.attention.current_flash_attention_impl() is not None:
        torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize(("H", "G", "D"), [(4, 4, 64), (8, 2, 128)])
def test_thoughts(backend, case, H, G, D):
    anchors, K, S, T = cases()[case]
    anchors = on_cuda(anchors)
    cpu = inputs(anchors.text, anchors.index_BM.shape[1], K, S, T, H, G, D, dtype=torch.bfloat16)
    arguments = [x.detach().cuda().requires_grad_() for x in cpu]
    served, reason = attention.BACKENDS[backend].supports(arguments[0], arguments[1], anchors, True)
    if not served:
        pytest.skip(reason)

    def attend(*arguments):
        return attention.thought_attention(*arguments, backend=backend)

    errors = compare(reference.thought_attention, rounded, attend, arguments, anchors)
    assert all(error <= bound for error, bound in errors), dict(zip(NAMES, errors, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["dense, one step", "deep, one step"])
def test_newest_token_without_gradient(backend, case):
    """A step of a rollout, which some kernels serve only without a gradient."""
    anchors, K, S, T = cases()[case]
    anchors = on_cuda(anchors)
    cpu = inputs(anchors.text, anchors.index_BM.shape[1], K, S, T, 8, 2, 64, dtype=torch.bfloat16)
    arguments = [x.detach().cuda() for x in cpu]
    served, reason = attention.BACKENDS[backend].supports(arguments[0], arguments[1], anchors, False)
    if not served:
        pytest.skip(reason)
    truth = reference.thought_attention(*(x.float() for x in arguments), anchors)
    got = attention.thought_attention(*arguments, anchors, backend=backend)
    assert relative_error(got, truth) <= 2 * relative_error(rounded(*arguments, anchors), truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[[300], [300]], [[170, 1, 80], [299]]])
def test_text(backend, lengths):
    text = packed_text(lengths, 300).to("cuda")
    generator = torch.Generator().manual_seed(3)
    arguments = [torch.randn(2, 300, h, 64, generator=generator).cuda().bfloat16().requires_grad_() for h in (8, 2, 2)]
    served, reason = attention.BACKENDS[backend].supports(arguments[0], arguments[1], None, True)
    if not served:
        pytest.skip(reason)

    def in_bf16(q, k, v, text):
        document = text.document_BN
        seen = ((document[:, :, None] == document[:, None, :]).tril() & (document >= 0)[:, :, None])[:, None, None]
        scores = torch.einsum("bngrd,bmgd->bgrnm", q.unflatten(2, (2, 4)), k) * 64**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
        return torch.einsum("bgrnm,bmgd->bngrd", weights, v).flatten(2, 3)

    def attend(*arguments):
        return attention.text_attention(*arguments, backend=backend)

    errors = compare(reference.text_attention, in_bf16, attend, arguments, text)
    assert all(error <= bound for error, bound in errors), errors
