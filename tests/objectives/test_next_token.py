from __future__ import annotations

import torch
import torch.nn.functional as F

from models.philox import Rng
from objectives import NextToken
from tests.helpers import packed_text, relative_error, step_of, tiny_model


def test_is_cross_entropy_within_documents():
    """Against torch's own, with the first token of every document and the padding left out by hand."""
    model, text = tiny_model(), packed_text([[5, 4], [7, 1]], 9)
    output = step_of(NextToken(), model, text, Rng(0, 0))
    logits = model.read(text).hidden_BNW @ model.head_weight_VW.T
    pairs = [(0, n) for n in (0, 1, 2, 3, 5, 6, 7)] + [(1, n) for n in range(6)]
    truth = F.cross_entropy(
        torch.stack([logits[b, n] for b, n in pairs]), torch.stack([text.tokens_BN[b, n + 1] for b, n in pairs])
    )
    assert relative_error(output.loss, truth) <= 1e-14
    parameters = list(model.decoder.parameters())
    for a, b in zip(torch.autograd.grad(output.loss, parameters), torch.autograd.grad(truth, parameters), strict=True):
        assert relative_error(a, b) <= 1e-12
    assert NextToken().counts(text)["text"].item() == len(pairs)


def test_evaluation_is_the_loss():
    model, text = tiny_model(), packed_text([[5, 4], [7, 1]], 9)
    scores = NextToken().evaluate(model, text, Rng(0, 0))
    assert scores.thought_nll_BN is None
    loss = step_of(NextToken(), model, text, Rng(0, 0)).loss
    assert relative_error(scores.text_nll_BN[scores.valid_BN].mean(), loss) <= 1e-14
