"""The ledger against torch's own counter, which sees every product that is really computed.

The counter sees attention as the reference backend computes it, all queries times all keys, where the ledger counts the
pairs that may see each other; the difference is known and put back by hand.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import flops
from models.decoder import Trunk
from models.flops import Ledger
from models.philox import Rng
from models.rollout import EAGER, Prediction, RolloutRequest
from models.rollout.eager import Steps
from models.thoughts import PAD, Anchors, Thoughts
from objectives.next_token import NextToken
from objectives.quiet_star import QuietStar, QuietStarConfig
from objectives.rlp import Rlp, RlpConfig
from objectives.rpt import Rpt, RptConfig
from objectives.template import Template
from tests.helpers import packed_text, sampled, step_of, tiny_model

N = 16


def counted(objective, model, text) -> tuple[int, int]:
    """(FLOPs that torch sees in a forward and backward pass, those that the objective reports)."""
    with FlopCounterMode(display=False) as counter:
        output = step_of(objective, model, text, Rng(0, 0))
        output.loss.backward()
    return counter.get_total_flops(), output.flops


def wasted(model, text, thoughts: list[tuple[int, int, int]]) -> int:
    """FLOPs of the pairs that the reference computes and masks: of text, then of (K, tokens, passes) of thoughts."""
    config = model.decoder.config
    B = text.shape[0]
    seen = sum((end - start) * (end - start + 1) // 2 for _, start, end in text.spans)
    total = flops._passes(model.decoder) * flops.attention(config, B * N * N - seen)
    for K, queries, passes in thoughts:
        text_pairs = K * queries * (B * N * N - seen)
        # Step by step (one pass), a query meets just the keys of its own thought that it may see.
        own_pairs = K * B * N * queries * (queries - 1) // 2 if passes > 1 else 0
        total += passes * flops.attention(config, text_pairs + own_pairs)
    return total


@pytest.mark.parametrize("changes", [{}, dict(post_norm=True, qk_norm_all_heads=True, rotary=("none", "plain"))])
def test_next_token(changes):
    model, text = tiny_model(**changes), packed_text([[16], [9, 7]], N)
    model.decoder.attention_backend = "reference"
    seen, reported = counted(NextToken(), model, text)
    assert reported + wasted(model, text, []) == seen


@pytest.mark.parametrize("policy", [True, False])
def test_quiet_star(policy):
    model, text = tiny_model(), packed_text([[16], [9, 7]], N)
    model.decoder.attention_backend = "reference"
    objective = QuietStar(QuietStarConfig(length=3, lookahead=2, thoughts=2, policy_weight=1.0 if policy else 0.0))
    seen, reported = counted(objective, model, text)
    expected = reported + wasted(model, text, [(2, 3, 1), (2, 6, 3)])
    assert expected == pytest.approx(seen, rel=0.005)


@pytest.mark.parametrize("positions", ["random", "band", "entropy"])
def test_rlp(positions):
    """With few anchors the reference meets every text key with every thought token, and the ledger only those seen.

    All thoughts are as long: the closing tag is hardly ever written by chance.
    """
    model, text = tiny_model(), packed_text([[8, 8], [9, 7]], N)
    model.decoder.attention_backend = "reference"
    model.ban(61, (3,))
    P, L, K, close = 2, 5, 4, (3, 4)
    # Without a next-token term the text's last block has no backward but that of its keys and values, which the ledger
    # counts like all others: one part in as many as there are layers.
    config = RlpConfig(
        length=L,
        thoughts=K,
        anchors_per_document=2,
        positions=positions,
        band=(-50.0, 0.0),
        next_token_weight=0.1,
        train_predictor=0.1,
    )
    objective = Rlp(config, Template((1, 2), close))
    objective.teacher.model(model)
    seen, reported = counted(objective, model, text)
    anchors = objective.choice.choose(text, Rng(0, 0), model.read(text), model.head_weight_VW)
    prefix = sum(end - start for _, _, start, end in anchors.prefixes)
    M = anchors.index_BM.numel()
    text_pairs = sum((end - start) * (end - start + 1) // 2 for _, start, end in text.spans)
    # The teacher reads, and the model reads with gradient; then P + L − 1 tokens are fed, and all scored.
    total = (1 + 3) * flops.attention(model.decoder.config, 2 * N * N - text_pairs)
    for tokens, passes in ((P + L - 1, 1), (P + L + len(close), 3)):
        own = (P * P if passes == 1 else tokens * tokens) - (P if passes == 1 else tokens) * (
            (P if passes == 1 else tokens) + 1
        ) // 2
        total += passes * flops.attention(model.decoder.config, K * tokens * (M * N - prefix) + M * K * own)
    assert reported + total == pytest.approx(seen, rel=0.005)


@pytest.mark.parametrize("template", ["forced", "free"])
def test_rpt(template):
    """Sampling ahead takes a reading of its own; the reference meets every text key with every token."""
    model, text = tiny_model(), packed_text([[8, 8], [9, 7]], N)
    model.decoder.attention_backend = "reference"
    K, P, L = 4, 2, 5
    config = RptConfig(length=L, thoughts=K, anchors_per_document=2, template=template, answer_length=3, hard_entropy=0)
    rpt = Rpt(config, (1, 2), (3, 4), [b"a"] * 61, ((), ()), () if template == "forced" else (59, 60))
    batch = sampled(rpt, model, text, Rng(0, 0))
    anchors, S = batch.anchors, batch.rollout.thoughts.tokens_BKSM.shape[2]
    prefix = sum(end - start for _, _, start, end in anchors.prefixes)
    M = anchors.index_BM.numel()
    text_pairs = sum((end - start) * (end - start + 1) // 2 for _, start, end in text.spans)
    c = model.decoder.config
    total = (1 + 3) * flops.attention(c, 2 * N * N - text_pairs)
    # Step by step a token meets the keys it may see, but the prompt's tokens all of the prompt's.
    for tokens, passes, own in ((S - 1, 1, P * (P - 1) // 2), (S, 3, S * (S - 1) // 2)):
        total += passes * flops.attention(c, K * tokens * (M * N - prefix) + M * K * own)
    seen, reported = counted(rpt, model, text)
    assert reported + total == pytest.approx(seen, rel=0.03)


def test_a_thought_counts_until_it_ends():
    """A batch of thoughts of all lengths, among padding, costs what torch sees of each of them alone."""
    model, text = tiny_model(), packed_text([[40], [24, 16], [12, 28]], 40)
    model.decoder.attention_backend = "reference"
    model.ban(61, (3, 60))
    anchors = Anchors(text, torch.tensor([[5, 20, -1], [30, -1, -1], [9, 15, 38]]))
    request = RolloutRequest(
        model, model.read(text), anchors, 4, 30, Rng(0, 0), 3.0, (1, 2), (3,), Prediction((4,), 3, (5,))
    )
    c, alone = model.decoder.config, {"thoughts": 0, "rollout": 0}
    with torch.no_grad():
        with Ledger() as ledger:
            rollout = EAGER.sample(request)
            model.think(rollout.thoughts, request.state)
        lengths = set()
        for b, m in (anchors.index_BM >= 0).nonzero().tolist():
            (prefix,) = [end - start for row, place, start, end in anchors.prefixes if (row, place) == (b, m)]
            row = text.rows(slice(b, b + 1))
            for k in range(4):
                tokens_S = rollout.thoughts.tokens_BKSM[b, k, :, m]
                tokens_S = tokens_S[tokens_S >= 0]
                lengths.add(S := len(tokens_S))
                one = Thoughts(tokens_S[None, None, :, None], Anchors(row, anchors.index_BM[b : b + 1, m : m + 1]))
                for stage, fed in (("thoughts", S), ("rollout", S - 1)):
                    # The reference meets all keys of the row and of the thought; those not seen are put back.
                    with FlopCounterMode(display=False) as counter:
                        model.think(one.slots(fed), model.read(row))
                    with FlopCounterMode(display=False) as reading:
                        model.read(row)
                    unseen = flops.attention(c, fed * (40 - prefix) + fed * (fed - 1) // 2)
                    alone[stage] += counter.get_total_flops() - reading.get_total_flops() - unseen
        alone["rollout"] += 2 * c.vocab_size * c.width * int(rollout.sampled_BKSM.sum())
    assert len(lengths) > 4 and not rollout.sampled_BKSM.transpose(2, 3)[:, :, anchors.index_BM[0] < 0][0].any()
    assert alone == {stage: ledger.spent[stage] for stage in alone}


@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_thoughts_of_one_anchor_cost_their_own_lengths(at_once, checkpointing):
    """Nothing is computed behind their ends, and parts are computed again: forward and backward by torch's counter."""
    model, text, lengths = tiny_model(), packed_text([[24]], 24), [12, 20, 4, 8, 16]
    model.decoder.attention_backend, model.decoder.activation_checkpointing = "reference", checkpointing
    c, anchors, state = model.decoder.config, Anchors(text, torch.tensor([[17]])), Trunk(model.read(text)).state
    slots_S1 = torch.arange(20)[:, None]
    thoughts = Thoughts(torch.stack([torch.where(slots_S1 < n, 5, PAD) for n in lengths])[None], anchors)
    with FlopCounterMode(display=False) as counter, Ledger() as ledger:
        model.think(thoughts, state, at_once).square().sum().backward()
    passes = 3 + checkpointing + (at_once is not None)
    masked = sum(flops.attention(c, n * (24 - 18) + n * (n - 1) // 2) for n in lengths)
    # With checkpointing backward leaves out the last product of each block; see test_activation_checkpointing.
    spared = checkpointing * 2 * c.layers * c.width * c.ffn_width * sum(lengths)
    assert ledger.total == ledger.spent["thoughts"]
    assert counter.get_total_flops() == ledger.total + passes * masked - spared


def test_no_thought_waits_for_padding(monkeypatch):
    """Where the real thoughts have ended the rollout ends, whatever stands beside them."""
    model, text = tiny_model(), packed_text([[40], [24, 16]], 40)
    model.ban(61, tuple(range(61)))  # but what closes a thought
    anchors, taken = Anchors(text, torch.tensor([[5, -1], [30, 35]])), []
    step = Steps.__call__
    monkeypatch.setattr(Steps, "__call__", lambda self, tokens: taken.append(1) or step(self, tokens))
    request = RolloutRequest(model, model.read(text), anchors, 2, 66, Rng(0, 0), prompt=(1,), close=(3,))
    rollout = EAGER.sample(request)
    assert len(taken) == 1
    assert rollout.sampled_BKSM.sum(dim=2).tolist() == [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]


@pytest.mark.parametrize("objective", [NextToken(), QuietStar(QuietStarConfig(length=3, lookahead=2, thoughts=2))])
def test_activation_checkpointing(objective):
    """Blocks are computed again, all but the last product of each, which torch sees that nobody needs in fp64."""
    model, text = tiny_model(), packed_text([[16], [9, 7]], N)
    model.decoder.attention_backend = "reference"
    model.decoder.activation_checkpointing = True
    seen, reported = counted(objective, model, text)
    thinks = isinstance(objective, QuietStar)
    expected = reported + wasted(model, text, [(2, 3, 1), (2, 6, 4)] if thinks else [])
    c, tokens = model.decoder.config, 2 * N * (1 + 2 * 6 * thinks)
    assert expected - 2 * c.layers * c.width * c.ffn_width * tokens == pytest.approx(seen, rel=0.005 if thinks else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_recomputed_is_known_apart(checkpointing):
    """A model's FLOPs are three times those of a forward pass with its logits, whatever is computed again to save
    memory: against torch's count of that pass."""
    model, text = tiny_model(), packed_text([[16], [9, 7]], N)
    model.decoder.attention_backend = "reference"
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        _ = model.read(text).hidden_BNW @ model.head_weight_VW.t()
        unseen = wasted(model, text, [])
    model.decoder.activation_checkpointing = checkpointing
    with Ledger() as ledger:
        step_of(NextToken(), model, text, Rng(0, 0))
    assert ledger.total - ledger.recomputed == 3 * (forward.get_total_flops() - unseen)
    assert ledger.recomputed > 0


def test_units():
    """A multiply-add is two; a thought of one token over a prefix of three meets four keys."""
    model, text = tiny_model(), packed_text([[5]], 5)
    c = model.decoder.config
    layers = [m for block in model.decoder.layers for m in block.modules() if isinstance(m, torch.nn.Linear)]
    linear = sum(layer.weight.numel() for layer in layers)
    assert flops.blocks(c, 1) == 2 * linear
    thought = Thoughts(torch.tensor([[[[5]]]]), Anchors(text, torch.tensor([[2]])))
    with torch.no_grad(), Ledger() as ledger:
        flops.count_think(model.decoder, thought)
    flops.count_think(model.decoder, thought)
    assert ledger.total == 2 * linear + 4 * 4 * c.layers * c.heads * c.head_dim
