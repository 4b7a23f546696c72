"""Quiet-STaR beyond what the public code's files cover: packed documents, fresh models, cuts of a batch, evaluation.

Shapes as in objectives/quiet_star.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.philox import Rng
from models.thoughts import Anchors, Text, Thoughts
from objectives import Batch, QuietStar, QuietStarConfig
from objectives.next_token import NextToken
from tests.helpers import explicit_hidden, packed_text, relative_error, rollout, scored, step_of, tiny_model

RNG = Rng(seed=5, step=2)
SMALL = QuietStarConfig(length=3, lookahead=2, thoughts=2, policy_weight=10.0)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packed_documents_are_documents_apart():
    """A row of two documents has the loss and gradients of two rows that hold one each (and padding)."""
    model = tiny_model()
    packed, apart = packed_text([[7, 5]], 12), packed_text([[7], [5]], 7)
    apart.tokens_BN[0, :7], apart.tokens_BN[1, :5] = packed.tokens_BN[0, :7], packed.tokens_BN[0, 7:]
    objective = QuietStar(SMALL)
    together = rollout(model, model.read(packed), Anchors.everywhere(packed), 2, 3, RNG).thoughts.tokens_BKSM
    separate = torch.zeros(2, 2, 4, 7, dtype=torch.int64)
    separate[0], separate[1, :, :, :5] = together[0, :, :, :7], together[0, :, :, 7:]
    results = []
    for text, tokens in ((packed, together), (apart, separate)):
        batch = Batch(Thoughts(tokens, Anchors.everywhere(text)))
        output = scored(objective, model, model.read(text), batch, objective.counts(text))
        results.append((output.loss, gradients(model, output.loss)))
    (loss, grads), (loss_apart, grads_apart) = results
    assert relative_error(loss, loss_apart) <= 1e-13
    assert max(relative_error(grads[n], grads_apart[n]) for n in grads) <= 1e-11


@pytest.mark.parametrize("variant", ["paper", "public_code"])
def test_the_update_does_not_depend_on_the_cut_of_the_batch(variant):
    model, objective = tiny_model(), QuietStar(dataclasses.replace(SMALL, variant=variant))
    text = packed_text([[12], [3, 4], [8, 3], [1, 1, 9]], 12)
    whole = step_of(objective, model, text, RNG)
    truth = gradients(model, whole.loss)
    counts = objective.counts(text)
    parts = [step_of(objective, model, text.rows(cut), RNG, counts) for cut in (slice(0, 1), slice(1, 4))]
    assert relative_error(sum(p.loss for p in parts), whole.loss) <= 1e-13
    cut = gradients(model, sum(p.loss for p in parts))
    assert max(relative_error(cut[n], truth[n]) for n in truth) <= 1e-12
    assert sum(p.flops for p in parts) == whole.flops
    for name, mean in whole.metrics.items():
        added = sum(p.metrics[name].sum for p in parts) / sum(p.metrics[name].count for p in parts)
        assert added.item() == pytest.approx((mean.sum / mean.count).item(), rel=1e-12), name
    own = [objective.counts(text.rows(cut)) for cut in (slice(0, 1), slice(1, 4))]
    assert all(torch.equal(own[0][n] + own[1][n], counts[n]) for n in counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fresh_model_predicts_exactly_as_its_base(dtype):
    """The last layer of a fresh mixing head is zero: w = 0, every reward is 0, and the mixed NLL is the text's."""
    model = tiny_model(torch.float64 if dtype == torch.float64 else torch.float32)
    model.decoder.compute_dtype = dtype if dtype == torch.bfloat16 else None
    model.mixing_head.init_weights()
    text = packed_text([[9, 3], [12]], 12)
    scores = QuietStar(SMALL).evaluate(model, text, RNG)
    assert torch.equal(scores.thought_nll_BN, scores.text_nll_BN)
    base = NextToken().evaluate(model, text, RNG)
    assert torch.equal(base.text_nll_BN, scores.text_nll_BN)
    output = step_of(QuietStar(SMALL), model, text, RNG)
    assert (output.record.reward_BKM == 0).all()
    assert (output.metrics["policy_loss"].sum / output.metrics["policy_loss"].count).item() == 0
    # What a fresh model learns from first is the mixing head's last layer.
    assert gradients(model, output.loss)["mixing_head.out.weight"].norm() > 0


def test_reward_by_hand():
    """r_j = Σ_s [CE_text(x_{j+s+1}) − CE_mixed(x_{j+s+1})], advantage = max(0, r − mean over the K thoughts)."""
    model, objective = tiny_model(), QuietStar(SMALL)
    text = packed_text([[12]], 12)
    output = step_of(objective, model, text, RNG)
    reward, advantage = output.record.reward_BKM, output.record.advantage_BKM
    assert (reward[0, 0] - reward[0, 1]).abs().min() < (reward[0, 0] - reward[0, 1]).abs().max()
    half = (reward[:, 0] - reward[:, 1]) / 2
    has_target = text.targets(1)[1]
    assert relative_error(advantage[:, 0], half.clamp(min=0) * has_target) <= 1e-13
    assert relative_error(advantage[:, 1], (-half).clamp(min=0) * has_target) <= 1e-13
    # Without anything ahead there is nothing to be rewarded for.
    assert reward[0, :, -1].abs().max() == 0
    single = step_of(QuietStar(dataclasses.replace(SMALL, thoughts=1)), model, text, RNG)
    assert relative_error(single.record.reward_BKM, reward[:, :1]) <= 1e-13
    assert relative_error(single.record.advantage_BKM, reward[:, :1].clamp(min=0) * has_target[:, None]) <= 1e-13


def test_without_a_mixing_head_the_thought_has_the_whole_weight():
    model, text = tiny_model(), packed_text([[12]], 12)
    model.mixing_head = None
    objective = QuietStar(dataclasses.replace(SMALL, mixing_head=False))
    assert not objective.needs.mixing_head
    scores = objective.evaluate(model, text, RNG)
    for n in range(11):
        logits = explicit_hidden(model, text, scores.thoughts, 0, 0, n)[-1] @ model.head_weight_VW.T
        assert relative_error(scores.thought_nll_BN[0, n], -logits.log_softmax(-1)[text.tokens_BN[0, n + 1]]) <= 1e-12
    output = step_of(objective, model, text, RNG)
    assert output.metrics["mixing_weight"].sum == output.metrics["mixing_weight"].count
    assert output.record.advantage_BKM.any()


def test_two_ways_of_counting():
    assert (QuietStarConfig().L, QuietStarConfig().A) == (9, 4)
    assert (QuietStarConfig(n_ahead=12, n_ahead_talk=4).L, QuietStarConfig(n_ahead=24, n_ahead_talk=12).A) == (9, 12)
    assert (QuietStarConfig(length=5, lookahead=2).L, QuietStarConfig(length=5, lookahead=2).A) == (5, 2)
    problems = QuietStarConfig(length=5, n_ahead=12, lookahead=2, n_ahead_talk=4).problems()
    assert len(problems) == 2 and all("give one of them" in p for p in problems)


def test_variants_reward_different_positions():
    text = packed_text([[7, 5]], 12)
    paper, code = (QuietStar(dataclasses.replace(SMALL, variant=v)) for v in ("paper", "public_code"))
    assert paper.counts(text)["policy"].item() == (6 + 4) * 2 * 3  # all that have a successor in their document
    assert code.counts(text)["policy"].item() == (12 - 1 - 2) * 2 * 3  # the first N − 1 − A of the row
    with pytest.raises(ValueError, match="rows of 3 tokens are too short for a lookahead of 2"):
        code.counts(packed_text([[3]], 3))


def test_evaluation_is_greedy_in_the_paper_and_sampled_in_the_code():
    model, text = tiny_model(), packed_text([[9, 3], [12]], 12)
    paper, code = (QuietStar(dataclasses.replace(SMALL, variant=v)) for v in ("paper", "public_code"))
    greedy = [paper.evaluate(model, text, Rng(0, step)).thoughts.tokens_BKSM for step in (0, 1)]
    sampled = [code.evaluate(model, text, Rng(0, step)).thoughts.tokens_BKSM for step in (0, 1)]
    assert torch.equal(*greedy)
    assert not torch.equal(*sampled)
    assert not torch.equal(greedy[0], sampled[0])


def test_evaluation_scores_what_training_scores():
    """With the same sampled thoughts, the mixed NLL of the next token is that of the first lookahead in training."""
    model, text = tiny_model(), packed_text([[9, 3], [12]], 12)
    objective = QuietStar(dataclasses.replace(SMALL, thoughts=1, variant="public_code"))
    scores = objective.evaluate(model, text, RNG)
    output = step_of(objective, model, text, RNG)
    assert torch.equal(scores.thoughts.tokens_BKSM[:, :, :4], output.record.thoughts.tokens_BKSM)
    for name, nll in (("nll_text", scores.text_nll_BN), ("nll_thought", scores.thought_nll_BN)):
        mean = output.metrics[name]
        assert nll[scores.valid_BN].mean().item() == pytest.approx((mean.sum / mean.count).item(), rel=1e-12)


def test_text_without_anything_to_predict():
    """Rows of padding and one-token documents: a loss of zero and finite gradients, no division by zero."""
    model = tiny_model()
    text = packed_text([[1, 1], []], 6)
    output = step_of(QuietStar(SMALL), model, text, RNG)
    assert output.loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(model, output.loss).values())


def test_text_is_read_once_for_all_thoughts(monkeypatch):
    model, text = tiny_model(), packed_text([[12]], 12)
    reads = []
    original = type(model.decoder).read
    monkeypatch.setattr(type(model.decoder), "read", lambda self, t: reads.append(t) or original(self, t))
    step_of(QuietStar(dataclasses.replace(SMALL, thoughts=4)), model, text, RNG)
    assert len(reads) == 1


def test_whole_rows_as_text():
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    output = step_of(QuietStar(SMALL), tiny_model(), Text.from_rows(tokens), RNG)
    assert torch.isfinite(output.loss)
