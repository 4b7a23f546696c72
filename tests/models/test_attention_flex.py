"""flex ≡ reference in fp64, forward and all gradients, by FlexAttention's uncompiled arithmetic on CPU.

What is ours, the masks and layouts, is the same there; torch refuses gradients on CPU, which its arithmetic has all the
same, so the refusal is lifted. The compiled kernels run in test_attention_cuda.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from models import attention
from models.attention import flex, reference
from models.thoughts import Anchors
from tests.helpers import packed_text, relative_error
from tests.models.test_attention import NAMES, TOLERANCE, anchor_cases, inputs, value_and_gradients


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def errors_against_reference(anchors, K, S, T, H, G):
    arguments = inputs(anchors.text, anchors.index_BM.shape[1], K, S, T, H, G, D=16)
    truth = value_and_gradients(reference.thought_attention, arguments, anchors)
    got = value_and_gradients(flex.thought_attention, arguments, anchors)
    return {n: relative_error(a, b) for n, a, b in zip(NAMES, got, truth, strict=True)}


@pytest.mark.parametrize("name", anchor_cases())
@pytest.mark.parametrize(("K", "S", "T"), [(2, 5, 5), (3, 1, 4), (1, 2, 6)])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (6, 2)])
def test_thoughts(name, K, S, T, H, G):
    errors = errors_against_reference(anchor_cases()[name], K, S, T, H, G)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("text", [packed_text([[4, 3, 4], [8, 1]], 11), packed_text([[70, 90], [170]], 170)])
def test_text(text):
    B, N = text.shape
    arguments = [torch.randn(B, N, h, 16, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2)]
    truth = value_and_gradients(reference.text_attention, arguments, text)
    got = value_and_gradients(flex.text_attention, arguments, text)
    assert max(relative_error(a, b) for a, b in zip(got, truth, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("anchors", [anchor_cases()[n] for n in ("dense, packed, padded", "dense, whole rows")])
def test_one_visible_token_too_many_is_caught(monkeypatch, anchors):
    """The negative control."""
    start, end = anchors.visible_BM
    wrong = Anchors(anchors.text, anchors.index_BM, window=(0, anchors.text.shape[1]))
    wrong.__dict__["visible_BM"] = start, (end + 1).clamp(max=anchors.text.shape[1])
    monkeypatch.setattr(flex, "_thought_mask", lambda _, *sizes, make=flex._thought_mask: make(wrong, *sizes))
    errors = errors_against_reference(anchors, 2, 3, 3, 4, 2)
    assert min(errors.values()) > 0.02, errors


def test_blocks_of_which_nothing_is_visible_are_skipped():
    """300 anchors, two thoughts of two tokens: keys are 300 of text and, from 300 on, 1200 of thoughts."""
    anchors = Anchors.everywhere(packed_text([[140, 160]], 300))
    computed = flex._thought_mask(anchors, 2, 2, 2).to_dense()[0, 0]
    assert computed.shape == (10, 12)
    queries, keys = torch.arange(1200), torch.arange(1500)
    start, end = (x[0].repeat_interleave(4)[:, None] for x in anchors.visible_BM)
    visible = (start <= keys) & (keys < end)
    visible[:, 300:] = (queries[:, None] // 2 == queries // 2) & (queries <= queries[:, None])
    needed = torch.nn.functional.pad(visible, (0, 36, 0, 80)).unflatten(0, (10, 128)).unflatten(2, (12, 128))
    assert torch.equal(computed.bool(), needed.any(dim=(1, 3)))


def test_masks_are_made_once_and_hold_no_sizes(monkeypatch):
    """Every layer and head has the same; a mask that held integers would be compiled anew at each length."""
    anchors = anchor_cases()["sparse, repeated, without text"]
    mask = flex._thought_mask(anchors, 2, 3, 3)
    assert flex._thought_mask(anchors, 2, 3, 3) is mask
    assert flex._thought_mask(anchors, 2, 1, 3) is not mask
    assert all(torch.is_tensor(cell.cell_contents) for cell in mask.mask_mod.__closure__)


def test_what_cannot_be_served_is_refused_with_the_reason():
    anchors = anchor_cases()["dense, whole rows"]
    with pytest.raises(ValueError, match="'flex' does not support this call: FlexAttention is compiled for CUDA here"):
        attention.thought_attention(*inputs(anchors.text, 9, 1, 2, 2, 2, 1, D=16), anchors, backend="flex")
    for dtype, size, reason in ((torch.float64, 16, "not torch.float64"), (torch.bfloat16, 8, "sizes from 16, not 8")):
        q = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(2, 9, 4, size))
        served, why = flex.supports(q, q, None, True)
        assert not served
        assert why.endswith(reason)
