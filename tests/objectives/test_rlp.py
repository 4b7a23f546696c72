"""RLP against explicit sequences in fp64, the identities of its baseline, its teacher, and what it does at the edges.

Shapes as in objectives/rlp.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pydantic
import pytest
import torch

from checkpoints.references import LAB
from data_pipelines.tokenizer import Tokenizer
from models.flops import Ledger
from models.philox import Rng
from models.thoughts import PAD, Text, Thoughts
from objectives.base import SettingError
from objectives.driver import Step
from objectives.rlp import Rlp, RlpConfig, without_thought
from objectives.teacher import EmaTeacher
from objectives.template import Template
from tests.helpers import explicit_hidden, packed_text, relative_error, sampled, scored, step_of, tiny_model

RNG = Rng(seed=3, step=1)
OPEN, CLOSE = (7, 8), (9,)
SMALL = RlpConfig(length=5, thoughts=4, temperature=0.7, anchors_per_document=2)


def objective(config: RlpConfig = SMALL, close=CLOSE, marker_id: int | None = None) -> Rlp:
    return Rlp(config, Template(OPEN, close), marker_id)


def text() -> Text:
    return packed_text([[6, 5], [11], [2, 1, 8]], 11)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def likely_to_close(seed: int = 0):
    """A model whose thoughts end early, late and not at all."""
    model = tiny_model(seed=seed)
    model.ban(14, (0, 1, 9))  # few tokens to draw from, so that the closing one, which is allowed back, is often drawn
    return model


def explicit_loss(rlp: Rlp, model, source: Text, batch):
    """Algorithm 1, thought by thought, from plain causal passes over [document ≤ anchor, thought, true tokens]."""
    c = rlp.config
    sampled = batch.rollout.thoughts
    banned = model.banned_V.clone()
    banned[list(rlp.template.close)] = False
    anchors = [(b, m) for b, m in batch.real_BM.nonzero().tolist()]
    total, scores = 0.0, {}
    for b, m in anchors:
        rewards, policies = [], []
        for k in range(c.thoughts):
            body = [t for t in sampled.tokens_BKSM[b, k, :, m].tolist() if t != PAD]
            closed = body[-len(rlp.template.close) :] == list(rlp.template.close) and len(body) > len(rlp.template.open)
            assert closed == bool(batch.rollout.closed_BKM[b, k, m])
            sequence = body + ([] if closed else list(rlp.template.close))
            first = len(sequence) - 1
            target = batch.target_BHM[b, :, m].tolist()
            sequence = sequence + target[:-1]
            tokens = torch.full_like(sampled.tokens_BKSM[:, :, :1], 0).repeat(1, 1, len(sequence), 1)
            tokens[b, k, :, m] = torch.tensor(sequence)
            hidden = explicit_hidden(model, source, Thoughts(tokens, sampled.anchors), b, k, m)
            logits = hidden @ model.head_weight_VW.T
            predicted = [logits[first + h].log_softmax(-1)[x] for h, x in enumerate(target)]
            base = batch.base_BHM[b, :, m]
            gain = sum(c.discount**h * (p.detach() - base[h]) for h, p in enumerate(predicted))
            rewards.append(max(gain, 0.0) if c.reward_positive else gain)
            tempered = (logits / c.temperature).masked_fill(banned, -torch.inf).log_softmax(-1)
            own = range(len(rlp.template.open), len(body))
            policies.append(sum(tempered[u - 1, body[u]] for u in own) / len(own))
            scores[b, k, m] = torch.stack(predicted).detach()
        mean = sum(rewards) / len(rewards)
        G = len(rewards)
        total = total - sum(G / (G - 1) * (r - mean) * p for r, p in zip(rewards, policies, strict=True))
    return total / (len(anchors) * c.thoughts), scores


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("close", [(9,), (9, 10)])
def test_algorithm_1_on_explicit_sequences(horizon, close):
    """Loss and every gradient, with ρ = 1: one update per rollout."""
    model, source = likely_to_close(), text()
    rlp = objective(dataclasses.replace(SMALL, horizon=horizon, discount=0.9), close)
    state = model.read(source)
    batch = sampled(rlp, model, source, RNG)
    if close == (9,):
        assert 0.1 < batch.rollout.closed_BKM.double().mean() < 0.9
    output = scored(rlp, model, state, batch, rlp.counts(source))
    truth, scores = explicit_loss(rlp, model, source, batch)
    # The surrogate's value is −A·ρ = −A, its gradient that of −A·log π.
    assert output.loss.item() == pytest.approx(0.0, abs=1e-10)
    got, expected = gradients(model, output.loss), gradients(model, truth)
    assert got.keys() == expected.keys()
    errors = {n: relative_error(got[n], expected[n]) for n in got}
    assert max(errors.values()) <= 1e-10, errors
    for (b, k, m), predicted in scores.items():
        base = batch.base_BHM[b, :, m]
        discount = 0.9 ** torch.arange(horizon)
        assert output.record.reward_BKM[b, k, m].item() == pytest.approx(((predicted - base) * discount).sum().item())


@pytest.mark.parametrize("horizon", [1, 3])
def test_the_live_gain_is_over_the_model_and_not_its_teacher(horizon):
    model, source = likely_to_close(), text()
    rlp = objective(dataclasses.replace(SMALL, horizon=horizon, discount=0.9), (9,))
    rlp.teacher._model = tiny_model(seed=4)
    batch = sampled(rlp, model, source, RNG)
    metrics = scored(rlp, model, model.read(source), batch, rlp.counts(source)).metrics
    _, scores = explicit_loss(rlp, model, source, batch)
    logprobs = (model.read(source).hidden_BNW @ model.head_weight_VW.T).log_softmax(-1)
    gains = []
    for (b, _, m), predicted in scores.items():
        places = int(batch.anchors.index_BM[b, m]) + torch.arange(horizon)
        live = logprobs[b, places, source.tokens_BN[b, places + 1]]
        gains.append(((predicted - live) * 0.9 ** torch.arange(horizon).double()).sum().item())
    assert metrics["gain_live"].count == len(gains)
    assert metrics["gain_live"].sum.item() == pytest.approx(sum(gains), rel=1e-12)
    assert metrics["reward"].sum.item() != pytest.approx(sum(gains), rel=1e-2)


def test_the_teachers_scores_are_those_of_a_plain_pass():
    model, source = likely_to_close(), text()
    rlp = objective()
    batch = sampled(rlp, model, source, RNG)
    logits = model.read(source).hidden_BNW @ model.head_weight_VW.T
    anchors = batch.rollout.thoughts.anchors
    for b, m in batch.real_BM.nonzero().tolist():
        n = int(anchors.index_BM[b, m])
        assert batch.target_BHM[b, 0, m] == source.tokens_BN[b, n + 1]
        truth = logits[b, n].log_softmax(-1)[source.tokens_BN[b, n + 1]]
        assert relative_error(batch.base_BHM[b, 0, m], truth) <= 1e-13


def test_the_ratio_is_one_on_the_first_update(monkeypatch):
    """Sampling and scoring agree on every token: its log-probs of both differ by at most 1e-5 in fp32."""
    model = tiny_model(torch.float32)
    model.ban(61, (9,))
    rlp, source, seen = objective(), text(), []
    monkeypatch.setattr(rlp, "policy", lambda *given: seen.append(Rlp.policy(rlp, *given)) or seen[-1])
    state = model.read(source)
    batch = sampled(rlp, model, source, RNG)
    metrics = scored(rlp, model, state, batch, rlp.counts(source)).metrics
    drawn = batch.rollout
    where = drawn.sampled_BKSM & batch.real_BM[:, None, None]
    rolled_out, rescored = drawn.logprobs_BKSM[where], seen[0].logprob_J
    assert rescored.dtype == torch.float32
    assert len(rescored) == len(rolled_out) == metrics["ratio"].count.item() > 100
    assert rolled_out.std() > 0.5
    assert (rescored - rolled_out).abs().max() <= 1e-5
    assert metrics["ratio_clipped"].sum.item() == 0
    # Both could err alike: the same tokens in fp64.
    exact = copy.deepcopy(model).double()
    exact_batch = dataclasses.replace(batch, base_BHM=batch.base_BHM.double(), reward_BKM=None, advantage_BKM=None)
    scored(rlp, exact, exact.read(source), exact_batch, rlp.counts(source))
    assert seen[1].logprob_J.dtype == torch.float64
    assert relative_error(rolled_out, seen[1].logprob_J) <= 2e-6


def test_the_ratio_is_exactly_one_on_the_first_update_in_bf16():
    """And a sampler by other kernels, whose rounding is made up here, is seen to be off; with a cap its tokens weigh by
    their importance."""
    model = tiny_model(torch.float32)
    model.ban(61, (9,))
    model.decoder.compute_dtype = torch.bfloat16
    source, outputs = text(), {}
    for cap in (None, 1.02):
        rlp = objective(dataclasses.replace(SMALL, importance_cap=cap))
        batch = sampled(rlp, model, source, RNG)
        logprobs_BKSM = batch.rollout.logprobs_BKSM
        logprobs_BKSM += 0.02 * torch.randn(logprobs_BKSM.shape, generator=torch.Generator().manual_seed(0))
        output = scored(rlp, model, model.read(source), batch, rlp.counts(source))
        outputs[cap] = output.loss
        metrics, where = output.metrics, batch.rollout.sampled_BKSM & batch.real_BM[:, None, None]
        assert metrics["ratio"].sum.item() == metrics["ratio"].count.item() > 100
        assert metrics["ratio_clipped"].sum.item() == 0
        gap_J = (batch.old_BKSM - batch.rollout.logprobs_BKSM)[where]
        assert metrics["sampler_gap"].sum.item() == pytest.approx(gap_J.double().abs().sum().item())
        assert 1e-4 < gap_J.abs().mean() < 0.1
    length_BKM = batch.rollout.sampled_BKSM.sum(dim=2).clamp(min=1)
    weight_BKM = (gap_J.new_zeros(where.shape).masked_scatter(where, gap_J.exp().clamp(max=1.02)) * where).sum(dim=2)
    expected = -(batch.advantage_BKM * weight_BKM / length_BKM).sum() / rlp.counts(source)["thoughts"]
    # Without a cap the surrogate is a sum of advantages: 0 but for rounding.
    assert outputs[1.02].item() == pytest.approx(expected.item(), abs=1e-7)
    assert abs(outputs[None].item()) < 1e-7 < abs(expected.item()) / 100


def test_the_baseline_cancels_as_published_and_not_after_a_clip():
    model, source = likely_to_close(), text()
    other = tiny_model(seed=5)

    def gradient_with(teacher, config):
        rlp = objective(config)
        if teacher is not None:
            rlp.teacher._model = teacher
        return gradients(model, step_of(rlp, model, source, RNG).loss)

    same = [gradient_with(teacher, SMALL) for teacher in (None, other)]
    assert max(relative_error(same[1][n], same[0][n]) for n in same[0]) <= 1e-9
    clipped = dataclasses.replace(SMALL, reward_clip=0.5)
    differ = [gradient_with(teacher, clipped) for teacher in (None, other)]
    assert max(relative_error(differ[1][n], differ[0][n]) for n in differ[0]) > 0.1


def test_the_update_does_not_depend_on_the_cut_of_the_batch():
    model, source = likely_to_close(), text()
    config = dataclasses.replace(SMALL, next_token_weight=0.5, train_predictor=0.3, kl_weight=0.1)
    whole = step_of(objective(config), model, source, RNG)
    truth = gradients(model, whole.loss)
    counts = objective(config).counts(source)
    parts = [step_of(objective(config), model, source.rows(cut), RNG, counts) for cut in (slice(0, 1), slice(1, 3))]
    cut = gradients(model, sum(p.loss for p in parts))
    assert max(relative_error(cut[n], truth[n]) for n in truth) <= 1e-10
    assert sum(p.flops for p in parts) == whole.flops
    assert counts["thoughts"].item() == (2 + 2 + 2 + 1 + 0 + 2) * SMALL.thoughts


def test_options_add_their_terms():
    """NTP mix and the dropped predictor term, by differences of gradients against explicit computations."""
    model, source = likely_to_close(), text()
    plain = gradients(model, step_of(objective(), model, source, RNG).loss)
    mixed = gradients(
        model, step_of(objective(dataclasses.replace(SMALL, next_token_weight=2.0)), model, source, RNG).loss
    )
    target_BN, valid_BN = source.targets(1)
    logits = model.read(source).hidden_BNW @ model.head_weight_VW.T
    nll = torch.nn.functional.cross_entropy(logits[valid_BN], target_BN[valid_BN])
    truth = gradients(model, 2.0 * nll)
    for name in truth:
        assert relative_error(mixed[name] - plain.get(name, 0), truth[name]) <= 1e-9, name
    rlp = objective(dataclasses.replace(SMALL, train_predictor=1.0))
    predictor = gradients(model, step_of(rlp, model, source, RNG).loss)
    batch = sampled(rlp, model, source, RNG)
    thoughts = rlp.thoughts_to_score(batch)
    total = 0.0
    for b, m in batch.real_BM.nonzero().tolist():
        for k in range(SMALL.thoughts):
            length = int(thoughts.lengths_BKM[b, k, m])
            cut = Thoughts(thoughts.tokens_BKSM[:, :, :length], thoughts.anchors)
            hidden = explicit_hidden(model, source, cut, b, k, m)[-1]
            total = total - (hidden @ model.head_weight_VW.T).log_softmax(-1)[batch.target_BHM[b, 0, m]]
    truth = gradients(model, total / (9 * SMALL.thoughts))
    for name in truth:
        assert relative_error(predictor[name] - plain[name], truth[name]) <= 1e-9, name


@pytest.mark.parametrize("horizon", [1, 3])
def test_the_distance_to_another_teacher_on_explicit_sequences(horizon):
    """kl_weight: loss and every gradient, with the teacher's own reading of text and thoughts."""
    model, other, source = likely_to_close(), likely_to_close(seed=5), text()
    rlp = objective(dataclasses.replace(SMALL, kl_weight=0.7, horizon=horizon))
    rlp.teacher._model = copy.deepcopy(other)
    state = model.read(source)
    batch = sampled(rlp, model, source, RNG)
    assert 0.1 < batch.rollout.closed_BKM.double().mean() < 0.9
    output = scored(rlp, model, state, batch, rlp.counts(source))
    # exp(d) − d − 1 of each sampled token, d = log π_teacher − log π, both tempered and without what is banned.
    thoughts, banned, total = batch.rollout.thoughts, model.banned_V.clone(), 0.0
    banned[list(CLOSE)] = False
    anchors = batch.real_BM.nonzero().tolist()
    for b, m in anchors:
        for k in range(SMALL.thoughts):
            tokens = [t for t in thoughts.tokens_BKSM[b, k, :, m].tolist() if t != PAD]
            logprobs = []
            for reader in (model, other):
                logits = explicit_hidden(reader, source, thoughts, b, k, m) @ reader.head_weight_VW.T
                logprobs.append((logits / SMALL.temperature).masked_fill(banned, -torch.inf).log_softmax(-1))
            own = range(len(OPEN), len(tokens))
            for u in own:
                pi, reference = (x[u - 1, tokens[u]] for x in logprobs)
                d = reference.detach() - pi
                total = total + (d.exp() - d - 1) / len(own)
    distance = 0.7 * total / (len(anchors) * SMALL.thoughts)
    # Algorithm 1's own part of the value is 0.
    assert relative_error(output.loss, distance) <= 1e-10
    algorithm_1, _ = explicit_loss(rlp, model, source, batch)
    got, expected = gradients(model, output.loss), gradients(model, algorithm_1 + distance)
    assert got.keys() == expected.keys()
    errors = {n: relative_error(got[n], expected[n]) for n in got}
    assert max(errors.values()) <= 1e-10, errors


def test_negative_rewards_count_as_0_on_explicit_sequences():
    """reward_positive: what is paid, not what is logged."""
    model, source = likely_to_close(), text()
    rlp = objective(dataclasses.replace(SMALL, reward_positive=True))
    rlp.teacher._model = tiny_model(seed=5)
    state = model.read(source)
    batch = sampled(rlp, model, source, RNG)
    output = scored(rlp, model, state, batch, rlp.counts(source))
    truth, scores = explicit_loss(rlp, model, source, batch)
    got, expected = gradients(model, output.loss), gradients(model, truth)
    assert got.keys() == expected.keys()
    errors = {n: relative_error(got[n], expected[n]) for n in got}
    assert max(errors.values()) <= 1e-10, errors
    gains = {at: (predicted - batch.base_BHM[at[0], :, at[2]]).item() for at, predicted in scores.items()}
    for at, gain in gains.items():
        assert output.record.reward_BKM[at].item() == pytest.approx(gain)
    # It matters only in groups with both: where all lose nothing is learned, where all gain it changes nothing.
    groups = [[gains[b, k, m] > 0 for k in range(SMALL.thoughts)] for b, m in batch.real_BM.nonzero().tolist()]
    assert sum(any(group) and not all(group) for group in groups) >= 2
    assert any(not any(group) for group in groups)


def test_an_instruction_stands_before_the_thought_alone():
    """Given like the opening tag: thoughts see it, no loss is on it, and predictions without a thought lack it."""
    tokenizer = Tokenizer.from_directory(LAB)
    config = dataclasses.replace(SMALL, instruction="a+b=", horizon=2)
    rlp = Rlp.build(config, tokenizer)
    spelled = [tokenizer.token_id(token) for token in ("a", "+", "b", "=", "<think>")]
    assert list(rlp.template.open) == spelled
    assert rlp.longest_thought == len(spelled) + SMALL.length + 1 + 1
    model, source = tiny_model(vocab_size=62), text()
    model.ban(14, (0, 1))
    state = model.read(source)
    batch = sampled(rlp, model, source, RNG)
    drawn = batch.rollout
    assert 0 < drawn.closed_BKM.sum() < drawn.closed_BKM.numel()
    assert (drawn.thoughts.tokens_BKSM[:, :, :5] == torch.tensor(spelled)[:, None]).all()
    assert not drawn.sampled_BKSM[:, :, :5].any()
    logits = state.hidden_BNW @ model.head_weight_VW.T
    for b, m in batch.real_BM.nonzero().tolist():
        n = int(drawn.thoughts.anchors.index_BM[b, m])
        for h in range(2):
            truth = logits[b, n + h].log_softmax(-1)[source.tokens_BN[b, n + h + 1]]
            assert relative_error(batch.base_BHM[b, h, m], truth) <= 1e-12
    output = scored(rlp, model, state, batch, rlp.counts(source))
    truth, _ = explicit_loss(rlp, model, source, batch)
    got, expected = gradients(model, output.loss), gradients(model, truth)
    assert got.keys() == expected.keys()
    errors = {n: relative_error(got[n], expected[n]) for n in got}
    assert max(errors.values()) <= 1e-10, errors


def test_shuffled_rewards_are_the_same_rewards():
    model, source = likely_to_close(), text()
    plain, shuffled = (
        step_of(objective(dataclasses.replace(SMALL, rewards=r)), model, source, RNG) for r in ("earned", "shuffled")
    )
    assert torch.equal(plain.record.reward_BKM, shuffled.record.reward_BKM)
    a, b = plain.record.advantage_BKM, shuffled.record.advantage_BKM
    assert not torch.equal(a, b)
    assert relative_error(b.sort(dim=1).values, a.sort(dim=1).values) <= 1e-12


def test_random_and_constant_rewards_know_nothing_of_thoughts():
    """The same coins whatever is thought and predicted; and nothing to learn where all thoughts earn alike."""
    models, source = [likely_to_close(seed) for seed in (0, 1)], text()
    coins = objective(dataclasses.replace(SMALL, rewards="random", advantage="mean"))
    a, b = (step_of(coins, model, source, RNG).record for model in models)
    assert torch.equal(a.advantage_BKM, b.advantage_BKM) and not torch.equal(a.reward_BKM, b.reward_BKM)
    paid_BKM = a.advantage_BKM - a.advantage_BKM.amin(dim=1, keepdim=True)
    assert {0.0, 1.0} == set(paid_BKM.unique().tolist())
    flat = step_of(objective(dataclasses.replace(SMALL, rewards="constant")), models[0], source, RNG)
    assert torch.equal(flat.record.reward_BKM, a.reward_BKM)
    assert not flat.record.advantage_BKM.any()


def test_gains_in_probability():
    model, source = likely_to_close(), text()
    logs, shares = (
        step_of(objective(dataclasses.replace(SMALL, gain=g)), model, source, RNG).record
        for g in ("log_probability", "probability")
    )
    rlp = objective(SMALL)
    base_BM = sampled(rlp, model, source, RNG).base_BHM[:, 0]
    expected = (logs.reward_BKM + base_BM[:, None]).exp() - base_BM[:, None].exp()
    assert relative_error(shares.reward_BKM, expected) <= 1e-10
    assert shares.reward_BKM.abs().max() <= 1 < logs.reward_BKM.abs().max()


def test_thoughts_are_paid_for_what_they_gain_elsewhere():
    """Each in another document of its row, by an explicit pass there; the policy is that of where it was thought."""
    model, source = likely_to_close(), text()
    config = dataclasses.replace(SMALL, scored="other")
    record = step_of(objective(config), model, source, RNG).record
    batch = sampled(objective(SMALL), model, source, RNG)
    index_BM, documents_BN = batch.anchors.index_BM, source.document_BN
    thoughts = Template(OPEN, CLOSE).close_all(batch.rollout)
    moved = 0
    for b, m in batch.real_BM.nonzero().tolist():
        real = batch.real_BM[b].nonzero()[:, 0].tolist()
        document = [int(documents_BN[b, index_BM[b, i]]) for i in range(len(index_BM[b]))]
        others = [i for i in [*real, *real][real.index(m) + len(real) // 2 :] if document[i] != document[m]]
        if not others:
            assert not record.reward_BKM[b, :, m].any() and not record.advantage_BKM[b, :, m].any()
            continue
        there, moved = others[0], moved + 1
        swapped = thoughts.tokens_BKSM.clone()
        swapped[b, :, :, there] = thoughts.tokens_BKSM[b, :, :, m]
        for k in range(SMALL.thoughts):
            length = int((swapped[b, k, :, there] != PAD).sum())
            hidden = explicit_hidden(model, source, Thoughts(swapped[:, :, :length], batch.anchors), b, k, there)[-1]
            logprobs = (hidden @ model.head_weight_VW.T).log_softmax(-1)
            gain = logprobs[batch.target_BHM[b, 0, there]] - batch.base_BHM[b, 0, there]
            assert relative_error(record.reward_BKM[b, k, m], gain) <= 1e-10
    assert moved >= 4
    in_chunks = step_of_chunks(dataclasses.replace(config, anchors_at_once=1), model, source)
    assert relative_error(in_chunks.reward_BKM, record.reward_BKM) <= 1e-10


def step_of_chunks(config: RlpConfig, model, source: Text):
    return [output.record for output in Step(objective(config), model, [source], RNG).losses()][-1]


def test_teachers_that_stay_and_teachers_that_follow():
    """τ = 1 and τ = 0: what a reward is measured against after an update, the base model or the model itself."""
    for decay, same in ((1.0, "base"), (0.0, "live")):
        model, source = likely_to_close(), text()
        rlp = objective(dataclasses.replace(SMALL, ema_decay=decay))
        base_BHM = sampled(rlp, model, source, RNG).base_BHM
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        rlp.after_step(model)
        batch = sampled(rlp, model, source, RNG)
        with torch.no_grad():
            live_BHM = without_thought(model, model.read(source), batch.anchors, batch.target_BHM)
        assert torch.equal(batch.base_BHM, base_BHM if same == "base" else live_BHM)
        assert not torch.equal(base_BHM, live_BHM)


def test_unclosed_thoughts_are_paid_by_the_same_rule_or_dropped():
    model, source = likely_to_close(), text()
    score, drop = (
        step_of(objective(dataclasses.replace(SMALL, unclosed=rule)), model, source, RNG) for rule in ("score", "drop")
    )
    rlp = objective()
    closed = sampled(rlp, model, source, RNG).rollout.closed_BKM
    assert 0 < closed.sum() < closed.numel()
    assert torch.equal(drop.record.advantage_BKM, score.record.advantage_BKM * closed)
    share = score.metrics["thought_closed"]
    real = score.record.thoughts.anchors.index_BM[:, None].expand_as(closed) >= 0
    assert (share.sum / share.count).item() == pytest.approx(closed[real].double().mean().item())


# Positions


def test_positions_are_drawn_from_all_that_fit_and_no_others():
    source = text()
    rlp = objective(dataclasses.replace(SMALL, anchors_per_document=1, min_prefix=3, horizon=2))
    seen = set()
    for step in range(60):
        anchors = rlp.choice.choose_without_model(source, Rng(0, step)).index_BM
        assert (anchors[0] >= 0).sum() == 2
        seen |= {(b, n) for b in range(3) for n in anchors[b].tolist() if n >= 0}
    first = {(0, n) for n in (2, 3)} | {(0, 8)}
    assert seen == first | {(1, n) for n in range(2, 9)} | {(2, n) for n in (5, 6, 7, 8)}


def test_a_position_does_not_depend_on_the_rest_of_the_batch():
    source, rlp = text(), objective()
    together = rlp.choice.choose_without_model(source, RNG).index_BM
    for row in range(3):
        alone = source.rows(slice(row, row + 1))
        own = rlp.choice.choose_without_model(alone, RNG).index_BM[0]
        assert own.tolist() == [n for n in together[row].tolist() if n >= 0]


def test_position_filters():
    model, source = likely_to_close(), text()
    state = model.read(source)
    logits = (state.hidden_BNW @ model.head_weight_VW.T).log_softmax(-1)
    target_BN, valid_BN = source.targets(1)
    logprob_BN = logits.gather(-1, target_BN[..., None])[..., 0]

    def chosen(**changes):
        rlp = objective(dataclasses.replace(SMALL, anchors_per_document=99, **changes), marker_id=17)
        anchors = rlp.choice.choose(source, RNG, state, model.head_weight_VW)
        return {(b, n) for b in range(3) for n in anchors.index_BM[b].tolist() if n >= 0}

    low, high = logprob_BN[valid_BN].quantile(0.3).item(), logprob_BN[valid_BN].quantile(0.7).item()
    band = valid_BN & (logprob_BN >= low) & (logprob_BN <= high)
    assert chosen(positions="band", band=(low, high)) == set(map(tuple, band.nonzero().tolist()))
    entropy_BN = -(logits.exp() * logits).sum(-1)
    hard = set()
    for b, start, end in source.spans:
        inside = [n for n in range(start, end) if valid_BN[b, n]]
        if inside:
            threshold = entropy_BN[b, inside].quantile(0.5)
            hard |= {(b, n) for n in inside if entropy_BN[b, n] >= threshold}
    assert chosen(positions="entropy", entropy_quantile=0.5) == hard
    source.tokens_BN[1, [2, 6, 10]] = 17
    source.tokens_BN[0, 5] = 17  # the last of its document: nothing follows
    others = (source.tokens_BN == 17) & valid_BN
    assert chosen(positions="marker") == set(map(tuple, others.nonzero().tolist()))
    assert {(1, 2), (1, 6)} <= chosen(positions="marker")


def test_documents_without_room_are_left_out():
    """Shorter than the prefix, or than the horizon: no anchor, no loss, no NaN."""
    model = likely_to_close()
    source = packed_text([[2, 1], []], 4)
    rlp = objective(dataclasses.replace(SMALL, min_prefix=3))
    assert rlp.counts(source)["thoughts"].item() == 0
    output = step_of(rlp, model, source, RNG)
    assert output.loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(model, output.loss).values())
    skipped = step_of(objective(), model, source, RNG).metrics["documents_skipped"]
    assert (skipped.sum.item(), skipped.count.item()) == (1, 2)
    long = objective(dataclasses.replace(SMALL, horizon=4))
    assert long.counts(packed_text([[4], [5]], 5))["thoughts"].item() == SMALL.thoughts


def test_settings_that_cannot_be():
    wrong = dict(length=0, thoughts=1, temperature=0, horizon=0, discount=2, close="", anchors_per_document=0)
    with pytest.raises(pydantic.ValidationError) as caught:
        pydantic.TypeAdapter(RlpConfig).validate_json(json.dumps(wrong))
    assert {error["loc"][0] for error in caught.value.errors()} == wrong.keys()
    assert RlpConfig().problems() == []


def test_texts_that_the_tokenizer_cannot_encode():
    tokenizer = Tokenizer.from_directory(LAB)
    for changes, message in (
        (dict(close="§"), "close '§' cannot be encoded by the tokenizer; choose another text"),
        (dict(open=""), "open '' cannot be encoded by the tokenizer; choose another text"),
        (
            dict(positions="marker", marker="==", close="="),
            "marker '==' must be one token, the tokenizer makes 2 of it",
        ),
    ):
        with pytest.raises(SettingError, match=re.escape(message)):
            Rlp.build(dataclasses.replace(SMALL, **changes), tokenizer)


# The teacher


def test_the_teacher_starts_as_the_model_and_follows_it():
    student = tiny_model(torch.float32)
    teacher = EmaTeacher(0.9)
    assert teacher.state() == {}
    teacher.update(student)
    assert teacher.state() == {}
    phi = teacher.model(student)
    start = {n: p.clone() for n, p in phi.named_parameters()}
    assert all(torch.equal(start[n], p) for n, p in student.named_parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    for _ in range(3):
        teacher.update(student)
    for name, p in phi.named_parameters():
        assert relative_error(p, start[name] + (1 - 0.9**3)) <= 1e-6
        assert not p.requires_grad
    again = EmaTeacher(0.9)
    again.load(tiny_model(torch.float32, seed=9), teacher.state())
    assert all(torch.equal(again.state()[n], t) for n, t in teacher.state().items())


def test_a_bf16_average_would_not_move():
    """One step at τ = 0.999 towards a weight 1% away: fp32 moves, bf16 rounds the step away."""
    student = tiny_model(torch.float32)
    teacher = EmaTeacher(0.999)
    start = teacher.model(student).decoder.norm.weight.clone()
    with torch.no_grad():
        student.decoder.norm.weight.mul_(1.01)
    teacher.update(student)
    moved = teacher.model(student).decoder.norm.weight
    assert moved.dtype == torch.float32
    assert relative_error(moved - start, (student.decoder.norm.weight - start) * 1e-3) <= 1e-2
    low = start.bfloat16()
    assert torch.equal(low.lerp(student.decoder.norm.weight.bfloat16(), 1e-3), low)


def test_evaluation_scores_its_anchors():
    model, source = likely_to_close(), text()
    scores = objective().evaluate(model, source, RNG)
    assert scores.valid_BN.sum().item() == 9
    logits = model.read(source).hidden_BNW @ model.head_weight_VW.T
    target_BN, _ = source.targets(1)
    for b, n in scores.valid_BN.nonzero().tolist():
        truth = -logits[b, n].log_softmax(-1)[target_BN[b, n]]
        assert relative_error(scores.text_nll_BN[b, n], truth) <= 1e-12
        m = scores.thoughts.anchors.index_BM[b].tolist().index(n)
        hidden = explicit_hidden(model, source, scores.thoughts, b, 0, m)
        last = int(scores.thoughts.lengths_BKM[b, 0, m]) - 1
        truth = -(hidden[last] @ model.head_weight_VW.T).log_softmax(-1)[target_BN[b, n]]
        assert relative_error(scores.thought_nll_BN[b, n], truth) <= 1e-12


# Several updates on the same thoughts


def test_a_second_update_has_true_ratios_and_the_first_ones_advantages():
    """Against the clipped surrogate of log-probs from explicit sequences, under moved weights."""
    model, source = likely_to_close(), text()
    config = dataclasses.replace(SMALL, updates=2, eps_low=0.05, eps_high=0.1)
    rlp = objective(config)
    with Ledger() as sampling:
        step = Step(rlp, model, [source], RNG)
    (batch,) = [taken.batch for taken in step._sampled]
    with Ledger() as updating:
        (first,) = step.losses()
    alone = step_of(objective(SMALL), model, source, RNG)
    assert first.loss.item() == pytest.approx(alone.loss.item(), abs=1e-12)
    assert torch.equal(first.record.advantage_BKM, alone.record.advantage_BKM)
    truth = gradients(model, alone.loss)
    assert all(relative_error(g, truth[n]) <= 1e-12 for n, g in gradients(model, first.loss).items())
    # What the step's single update would have cost, plus a reading of its own for the thoughts.
    assert sampling.total + updating.total > alone.flops

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    (second,) = step.losses()
    assert torch.equal(second.record.advantage_BKM, first.record.advantage_BKM)
    drawn, advantage = batch.rollout, first.record.advantage_BKM
    banned = rlp.template.banned(model.banned_V)
    total, clipped = 0.0, 0
    for b, m in batch.real_BM.nonzero().tolist():
        for k in range(config.thoughts):
            hidden = explicit_hidden(model, source, drawn.thoughts, b, k, m)
            own = drawn.sampled_BKSM[b, k, :, m].nonzero()[:, 0].tolist()
            for u in own:
                logits = (hidden[u - 1] @ model.head_weight_VW.T / config.temperature).masked_fill(banned, -torch.inf)
                now = logits.log_softmax(-1)[drawn.thoughts.tokens_BKSM[b, k, u, m]]
                ratio = (now - drawn.logprobs_BKSM[b, k, u, m]).exp()
                clipped += not 0.95 <= ratio <= 1.1
                a = advantage[b, k, m]
                total = total - torch.minimum(ratio * a, ratio.clamp(0.95, 1.1) * a) / len(own)
    total = total / step.counts["thoughts"]
    share = second.metrics["ratio_clipped"]
    assert 0 < clipped == share.sum.item() < share.count.item()
    assert second.loss.item() == pytest.approx(total.item(), rel=1e-10)
    truth = gradients(model, total)
    assert max(relative_error(g, truth[n]) for n, g in gradients(model, second.loss).items()) <= 1e-10
