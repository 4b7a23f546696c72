"""The ledger against torch's own counter, which sees every product that is really computed.

The counter sees attention as the reference backend computes it, all queries times all keys, where the ledger counts the
pairs that may see each other; the difference is known and put back by hand.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import flops
from models.flops import Ledger
from models.philox import Rng
from models.rollout.eager import LOOK_EVERY
from models.thoughts import Anchors
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


def test_next_token():
    model, text = tiny_model(), packed_text([[16], [9, 7]], N)
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


@pytest.mark.parametrize(
    ("positions", "closes"), [("random", False), ("band", False), ("entropy", False), ("random", True)]
)
def test_rlp(positions, closes):
    """With few anchors the reference meets every text key with every thought token, and the ledger only those seen.

    Thoughts that all close at once are neither sampled nor scored to their full length.
    """
    model, text = tiny_model(), packed_text([[16], [9, 7]], N)
    model.decoder.attention_backend = "reference"
    model.ban(61, tuple(range(61)) if closes else (3,))
    P, L, K = 2, 5, 4
    # Without a next-token term the text's last block has no backward but that of its keys and values, which the ledger
    # counts like all others: one part in as many as there are layers.
    config = RlpConfig(
        length=3 * LOOK_EVERY if closes else L,
        thoughts=K,
        anchors_per_document=2,
        positions=positions,
        band=(-50.0, 0.0),
        next_token_weight=0.1,
        train_predictor=0.1,
    )
    L = LOOK_EVERY if closes else L
    objective = Rlp(config, Template((1, 2), (3,)))
    objective.teacher.model(model)
    seen, reported = counted(objective, model, text)
    anchors = objective.choice.choose(text, Rng(0, 0), model.read(text), model.head_weight_VW)
    prefix = sum(end - start for _, _, start, end in anchors.prefixes)
    M = anchors.index_BM.numel()
    text_pairs = sum((end - start) * (end - start + 1) // 2 for _, start, end in text.spans)
    # The teacher reads, and the model reads with gradient; then P + L − 1 tokens are fed, and P + L + 1 scored.
    total = (1 + 3) * flops.attention(model.decoder.config, 2 * N * N - text_pairs)
    for tokens, passes in ((P + L - 1, 1), (P + L + 1, 3)):
        own = (P * P if passes == 1 else tokens * tokens) - (P if passes == 1 else tokens) * (
            (P if passes == 1 else tokens) + 1
        ) // 2
        total += passes * flops.attention(model.decoder.config, K * tokens * (M * N - prefix) + M * K * own)
    assert reported + total == pytest.approx(seen, rel=0.005)


@pytest.mark.parametrize("template", ["forced", "free"])
def test_rpt(template):
    """Sampling ahead takes a reading of its own; the reference meets every text key with every token."""
    model, text = tiny_model(), packed_text([[16], [9, 7]], N)
    model.decoder.attention_backend = "reference"
    K, P, L = 4, 2, 5
    config = RptConfig(length=L, thoughts=K, anchors_per_document=2, template=template, answer_length=3, hard_entropy=0)
    rpt = Rpt(config, (1, 2), (3,), [b"a"] * 61, ((), ()), () if template == "forced" else (60,))
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


def test_units():
    """A multiply-add is two; a thought of one token over a prefix of three meets four keys."""
    model, text = tiny_model(), packed_text([[5]], 5)
    c = model.decoder.config
    layers = [m for block in model.decoder.layers for m in block.modules() if isinstance(m, torch.nn.Linear)]
    linear = sum(layer.weight.numel() for layer in layers)
    assert flops.blocks(c, 1) == 2 * linear
    with torch.no_grad(), Ledger() as ledger:
        flops.count_think(model.decoder, Anchors(text, torch.tensor([[2]])), K=1, S=1)
    flops.count_think(model.decoder, Anchors(text, torch.tensor([[2]])), K=1, S=1)
    assert ledger.total == 2 * linear + 4 * 4 * c.layers * c.heads * c.head_dim
