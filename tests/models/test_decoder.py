"""The decoder on packed text and thoughts, against plain causal forwards over explicit sequences.

Shapes as in models/decoder.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.logprobs import token_logprobs
from models.precision import Linear, together, working_copy
from models.thinking import Delimiters
from models.thoughts import END, PAD, START, Anchors, Text, Thoughts
from tests.helpers import explicit_hidden, packed_text, relative_error, tiny_config, tiny_model

LINEAR = dict(rope_scaling={"rope_type": "linear", "factor": 4.0})
VARIANTS = {
    "llama": {},
    "qwen2": dict(qkv_bias=True, tie_embeddings=True),
    "qwen3": dict(qk_norm=True),
    "every bias": dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    "olmo3": dict(post_norm=True, qk_norm_all_heads=True, rotary=("plain", "scaled"), **LINEAR),
    "smollm3": dict(rotary=("scaled", "none")),
}


def random_thoughts(anchors: Anchors, K: int, lengths: tuple[int, int] = (3, 2)) -> Thoughts:
    """start, some tokens, end, some more tokens."""
    B, M = anchors.index_BM.shape
    generator = torch.Generator().manual_seed(4)
    first, second = (torch.randint(61, (B, K, length, M), generator=generator) for length in lengths)
    one = torch.ones(B, K, 1, M, dtype=torch.int64)
    return Thoughts(torch.cat([one * START, first, one * END, second], dim=2), anchors)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dense", [True, False])
def test_a_thought_is_a_causal_pass_over_its_explicit_sequence(variant, dense):
    model = tiny_model(**VARIANTS[variant])
    text = packed_text([[5, 3, 4], [9, 1]], 12)
    anchors = Anchors.everywhere(text) if dense else Anchors(text, torch.tensor([[0, 6, 11], [8, 9, 3]]))
    thoughts = random_thoughts(anchors, K=2)
    hidden = model.think(thoughts, model.read(text))
    for row, m in (text.document_BN.gather(1, anchors.index_BM) >= 0).nonzero().tolist():
        for k in range(2):
            truth = explicit_hidden(model, text, thoughts, row, k, m)
            assert relative_error(hidden[row, k, :, m], truth) <= 1e-13
    # and so are its log-probs
    targets = thoughts.tokens_BKSM[1, 0, 1:4, 0]
    truth = explicit_hidden(model, text, thoughts, 1, 0, 0)[:3] @ model.head_weight_VW.T
    got = token_logprobs(hidden[1, 0, :3, 0], model.head_weight_VW, targets)
    assert relative_error(got, truth.log_softmax(-1).gather(-1, targets[:, None])[:, 0]) <= 1e-13


def test_gradients_of_thoughts_are_those_of_explicit_sequences():
    """One pass over shared text gives every parameter the gradient of separate sequences that repeat the text."""
    model = tiny_model(qkv_bias=True, qk_norm=True)
    text = packed_text([[5, 4]], 9)
    anchors = Anchors.everywhere(text)
    thoughts = random_thoughts(anchors, K=2)
    weight = torch.randn(1, 2, 7, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    shared = gradients((model.think(thoughts, model.read(text)) * weight).sum())
    repeated = gradients(
        sum(
            (explicit_hidden(model, text, thoughts, 0, k, m) * weight[0, k, :, m]).sum()
            for k in range(2)
            for m in range(9)
        )
    )
    assert shared.keys() == repeated.keys()
    assert "delimiters.start_W" in shared
    errors = {n: relative_error(shared[n], repeated[n]) for n in shared}
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("at_once", [None, 2, 5])
@pytest.mark.parametrize("variant", ["qwen3", "smollm3"])
def test_thoughts_of_different_lengths_are_explicit_sequences(variant, at_once):
    """Hidden states and gradients, whatever order and pieces they are computed in."""
    model, text = tiny_model(**VARIANTS[variant]), packed_text([[5, 3, 4], [9, 1]], 12)
    anchors = Anchors(text, torch.tensor([[0, 6, 11], [8, 3, -1]]))
    thoughts = random_thoughts(anchors, K=5, lengths=(5, 4))
    lengths_BKM = torch.randint(1, 12, (2, 5, 3), generator=torch.Generator().manual_seed(6))
    lengths_BKM[:, :, 2] = 1  # among them padding
    slot_S1 = torch.arange(11)[:, None]
    thoughts = Thoughts(thoughts.tokens_BKSM.where(slot_S1 < lengths_BKM[:, :, None], PAD), anchors)
    weight = torch.randn(2, 5, 11, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight *= (thoughts.tokens_BKSM != PAD)[..., None] & (anchors.index_BM >= 0)[:, None, None, :, None]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    hidden = model.think(thoughts, model.read(text), at_once)
    apart = torch.zeros_like(hidden)
    for row, m in (anchors.index_BM >= 0).nonzero().tolist():
        for k in range(5):
            apart[row, k, :, m] = explicit_hidden(model, text, thoughts, row, k, m)
    assert relative_error(hidden * (weight != 0), apart * (weight != 0)) <= 1e-13
    got, truth = gradients((hidden * weight).sum()), gradients((apart * weight).sum())
    assert max(relative_error(got[name], truth[name]) for name in truth) <= 1e-12


def test_padding_inside_a_thought_changes_nothing_before_it():
    model = tiny_model()
    text = packed_text([[8]], 8)
    anchors = Anchors(text, torch.tensor([[2, 7]]))
    thoughts = random_thoughts(anchors, 1)
    padded = thoughts.followed_by(torch.full((1, 1, 3, 2), PAD))
    state = model.read(text)
    assert relative_error(model.think(padded, state)[:, :, :-3], model.think(thoughts, state)) <= 1e-14


def test_documents_of_a_row_do_not_see_each_other():
    """Changing document A leaves document B's hidden states bit-identical, and positions start again."""
    model = tiny_model(torch.float32)
    text = packed_text([[5, 7]], 12)
    before = model.read(text).hidden_BNW[:, 5:]
    text.tokens_BN[:, :5] = (text.tokens_BN[:, :5] + 1) % 61
    assert torch.equal(before, model.read(text).hidden_BNW[:, 5:])
    alone = model.read(Text.from_rows(text.tokens_BN[:, 5:])).hidden_BNW
    assert relative_error(before, alone) <= 1e-6


def test_too_long_for_the_model():
    model = tiny_model(max_positions=16)
    with pytest.raises(ValueError, match="20 positions exceed the model's 16"):
        model.read(packed_text([[20]], 20))
    text = packed_text([[12]], 12)
    with pytest.raises(ValueError, match="19 positions exceed"):
        model.think(random_thoughts(Anchors.everywhere(text), 1), model.read(text))
    with pytest.raises(ValueError, match="sliding window of 8"):
        tiny_model(sliding_window=8).read(text)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        tiny_config(kv_heads=3)


@pytest.mark.parametrize("bias", [True, False])
def test_mixed_precision_linear(bias):
    """bf16 in, bf16 out; the fp32 master gets an fp32 gradient; values and gradients to bf16 rounding."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(48, 32, bias=bias)
    x = torch.randn(5, 7, 48, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(5, 7, 32, generator=generator).bfloat16()
    out = layer(x)
    out.backward(grad)
    exact = torch.nn.Linear(48, 32, bias=bias).double()
    exact.load_state_dict({n: p.double() for n, p in layer.state_dict().items()})
    x64 = x.detach().double().requires_grad_()
    truth = exact(x64)
    truth.backward(grad.double())
    assert out.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert relative_error(out, truth) <= 2**-7
    assert relative_error(x.grad, x64.grad) <= 2**-7
    for (name, p), q in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) <= 2**-7, name


@pytest.mark.parametrize("fused", [True, False])
def test_working_copy_follows_the_weight(fused):
    """Through optimizer steps (a fused one does not advance the version counter) and through loading weights."""
    layer = Linear(3, 2, bias=False)
    copy = working_copy(layer.weight, torch.bfloat16)
    assert working_copy(layer.weight, torch.bfloat16) is copy
    layer.weight.grad = torch.ones(2, 3)
    torch.optim.AdamW([layer.weight], lr=0.5, fused=fused).step()
    stepped = working_copy(layer.weight, torch.bfloat16)
    assert torch.equal(stepped, layer.weight.detach().bfloat16())
    assert not torch.equal(stepped, copy)
    layer.load_state_dict({"weight": torch.full((2, 3), 4.0)})
    assert torch.equal(working_copy(layer.weight, torch.bfloat16), torch.full((2, 3), 4.0).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_together_are_layers_apart(dtype, bias):
    """A few rows without gradient, where the weights are packed; before and after they change."""
    torch.manual_seed(0)
    layers = [Linear(48, size, bias=bias) for size in (32, 8, 16)]
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer.parameters()], lr=0.1, fused=True)
    for _ in range(2):
        truth = [F.linear(x, *(p.double() for p in layer.parameters())) for layer in layers]
        with torch.no_grad():
            got = [*together(x.to(dtype), *layers), *(layer(x.to(dtype)) for layer in layers)]
        for a, b in zip(got, truth * 2, strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            assert relative_error(a, b) <= (1e-6 if dtype == torch.float32 else 2**-7)
        sum(layer(x.float()).sum() for layer in layers).backward()
        optimizer.step()


def test_bf16_on_fp32_masters_errs_no_more_than_bf16_weights_do():
    """A whole pass with thoughts, hidden states and all gradients, against fp64: at most twice the error of the same
    model with every weight in bf16 and attention by its definition."""
    text = packed_text([[9, 3]], 12)
    thoughts = random_thoughts(Anchors.everywhere(text), 2)
    weight = torch.randn(1, 2, 7, 12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact, mixed, plain = tiny_model(torch.float64), tiny_model(torch.float32), tiny_model(torch.bfloat16)
    mixed.decoder.compute_dtype = torch.bfloat16
    plain.decoder.attention_backend = "reference"
    results = []
    for model in (exact, mixed, plain):
        hidden = model.think(thoughts, model.read(text))
        (hidden * weight.to(hidden.dtype)).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"hidden": hidden} | gradients)
    truth, got, rounded = results
    assert got["hidden"].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for n, g in got.items() if n != "hidden")
    for name in truth:
        assert relative_error(got[name], truth[name]) <= 2 * relative_error(rounded[name], truth[name]), name


def test_delimiters_move_a_hundred_times_as_fast_under_adam():
    model = tiny_model(torch.float32)
    embedding = model.decoder.embed_tokens.weight[5].detach().clone()
    model.delimiters.init_from(embedding, embedding)
    used = model.embed_thoughts(torch.tensor([START, END, 5]).view(1, 1, 3, 1))[0, 0, :, 0]
    assert relative_error(used[0], used[2]) <= 1e-6 and relative_error(used[1], used[2]) <= 1e-6
    optimizer = torch.optim.Adam([model.delimiters.start_W, model.decoder.embed_tokens.weight], lr=1e-3)
    used.sum().backward()
    optimizer.step()
    after = model.embed_thoughts(torch.tensor([START, 5]).view(1, 1, 2, 1))[0, 0, :, 0]
    moved = (after - used[[0, 2]]).abs().mean(-1)
    assert moved[0].item() == pytest.approx(Delimiters.SCALE * moved[1].item(), rel=1e-3)
