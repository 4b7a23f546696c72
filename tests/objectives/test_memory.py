"""What sets the memory of a step: activation checkpointing, and anchors in parts. Neither changes the update.

Shapes as in the objectives.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pydantic
import pytest
import torch

from models.decoder import Block, Trunk
from models.flops import Ledger
from models.philox import Rng
from models.rollout import eager
from models.thoughts import PAD, Anchors, Text, Thoughts
from objectives import (
    NextToken,
    Objective,
    Pause,
    PauseConfig,
    QuietStar,
    QuietStarConfig,
    Rlp,
    RlpConfig,
    Rpt,
    RptConfig,
    Step,
    Template,
)
from tests.helpers import LiveBytes, packed_text, relative_error, step_of, tiny_model

RNG = Rng(seed=3, step=1)
OPEN, CLOSE = (7, 8), (9,)
QUIET = QuietStarConfig(length=3, lookahead=3, thoughts=2, policy_weight=10.0)
RLP = RlpConfig(length=5, thoughts=4, anchors_per_document=3)
RPT = RptConfig(
    length=4,
    thoughts=4,
    temperature=3.0,
    anchors_per_document=3,
    positions="random",
    template="forced",
    answer_length=3,
    box_open="[",
)
BYTES = [b"ab" if token == 6 else b"ab"[token % 2 :][:1] for token in range(60)] + [None]


def make(config) -> Objective:
    if isinstance(config, RlpConfig):
        return Rlp(config, Template(OPEN, CLOSE))
    if isinstance(config, RptConfig):
        return Rpt(config, OPEN, CLOSE, BYTES, ((11,), (12,)))
    if isinstance(config, PauseConfig):
        return Pause(config, Template(OPEN, CLOSE), 5)
    return QuietStar(config) if isinstance(config, QuietStarConfig) else NextToken()


def thinker(dtype: torch.dtype = torch.float64):
    """A model of few words, whose thoughts end early, late and not at all, and whose predictions are often right."""
    model = tiny_model(dtype)
    model.ban(14, (0, 1, 4, 5, 9))
    return model


def text() -> Text:
    return packed_text([[6, 5], [11], [2, 1, 6]], 11)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [None, QUIET, RLP, RPT], ids=["next_token", "quiet_star", "rlp", "rpt"])
def test_activation_checkpointing_changes_memory_alone(config, monkeypatch):
    passes = []
    original = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: passes.append(torch.is_grad_enabled()) or original(self, *a))
    model, results = thinker(), []
    for checkpointing in (False, True):
        model.decoder.activation_checkpointing = checkpointing
        model.zero_grad(set_to_none=True)
        passes.clear()
        output = step_of(make(config), model, text(), RNG)
        forward = passes.count(True)
        output.loss.backward()
        assert passes.count(True) == (2 if checkpointing else 1) * forward
        results.append((output, gradients(model)))
    (plain, truth), (output, got) = results
    assert torch.equal(output.loss, plain.loss)
    assert got.keys() == truth.keys()
    assert max(relative_error(got[n], truth[n]) for n in truth) <= 1e-13
    assert output.flops > plain.flops


def taken_apart(objective, model, source, rng=RNG, factor: float = 1.0):
    """Loss, metrics, FLOPs, record and gradients of all parts of a step, and how many there were."""
    (taken,) = updates_apart(objective, model, source, rng, factor)
    return taken


def updates_apart(objective, model, source, rng=RNG, factor: float = 1.0):
    """The same of each update of a step; FLOPs with those of all updates before, what is computed again left out.
    Weights move between them."""
    with Ledger() as ledger:
        step = Step(objective, model, [source], rng)
        for update in range(step.updates):
            model.zero_grad(set_to_none=True)
            if update > 0:
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
            loss, metrics, records, parts = 0.0, {}, [], 0
            for output in step.losses():
                (output.loss * factor).backward()
                loss, parts = loss + output.loss.detach(), parts + 1
                records += [output.record] if output.record is not None else []
                for name, mean in output.metrics.items():
                    pair = torch.stack([mean.sum, mean.count])
                    metrics[name] = metrics[name] + pair if name in metrics else pair
            assert len(records) == 1
            yield loss, metrics, ledger.total - ledger.recomputed, records[0], gradients(model), parts


def assert_the_same(got, whole) -> None:
    loss, metrics, flops, record, grads, _ = got
    truth_loss, truth_metrics, truth_flops, truth_record, truth, _ = whole
    assert loss.item() == pytest.approx(truth_loss.item(), rel=1e-10, abs=1e-12)
    assert flops == truth_flops
    assert metrics.keys() == truth_metrics.keys()
    for name, pair in truth_metrics.items():
        assert metrics[name].tolist() == pytest.approx(pair.tolist(), rel=1e-10, abs=1e-12), name
    assert torch.equal(record.thoughts.tokens_BKSM, truth_record.thoughts.tokens_BKSM)
    assert torch.equal(record.thoughts.anchors.index_BM, truth_record.thoughts.anchors.index_BM)
    assert relative_error(record.reward_BKM, truth_record.reward_BKM) <= 1e-10
    assert relative_error(record.advantage_BKM, truth_record.advantage_BKM) <= 1e-10
    assert grads.keys() == truth.keys()
    errors = {name: relative_error(grads[name], truth[name]) for name in truth}
    assert max(errors.values()) <= 1e-10, errors


QUIET_STARS = {
    "paper": QUIET,
    "public_code": dataclasses.replace(QUIET, variant="public_code"),
    "one thought": dataclasses.replace(QUIET, thoughts=1, lookahead=1),
}


@pytest.mark.parametrize("at_once", [1, 4, 11, 50])
@pytest.mark.parametrize("config", QUIET_STARS.values(), ids=QUIET_STARS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_quiet_star_in_parts_is_quiet_star(config, at_once, checkpointing):
    # Of all words: two thoughts alike are rewarded the rounding error between them, or not, and so counted or not.
    model = tiny_model()
    whole = taken_apart(QuietStar(config), model, text())
    model.decoder.activation_checkpointing = checkpointing
    got = taken_apart(QuietStar(dataclasses.replace(config, anchors_at_once=at_once)), model, text())
    assert got[-1] == {1: 11, 4: 3, 11: 1, 50: 1}[at_once] + 1
    assert_the_same(got, whole)


ANCHORED = {
    "rlp": RLP,
    "rlp, all terms": dataclasses.replace(
        RLP, horizon=3, discount=0.9, kl_weight=0.3, next_token_weight=0.5, train_predictor=0.2
    ),
    "rlp, controls": dataclasses.replace(RLP, rewards="shuffled", unclosed="drop", reward_clip=0.5),
    "rlp, two updates": dataclasses.replace(RLP, updates=2, kl_weight=0.3),
    "rpt": RPT,
    "rpt, zero-variance groups": dataclasses.replace(
        RPT, drop_zero_variance_from=0, positions="hard", hard_entropy=0.1
    ),
    "rpt, two updates": dataclasses.replace(RPT, updates=2),
}


@pytest.mark.parametrize(("at_once", "thoughts"), [(1, None), (4, None), (50, None), (None, 3), (2, 1)])
@pytest.mark.parametrize("config", ANCHORED.values(), ids=ANCHORED)
def test_few_anchors_in_parts_are_all_of_them(config, at_once, thoughts):
    """And so are parts of their thoughts. Also on later updates, whose rewards are the first one's, under moved
    weights."""
    results = []
    for configured in (config, dataclasses.replace(config, anchors_at_once=at_once, thoughts_at_once=thoughts)):
        model, objective = thinker(), make(configured)
        if isinstance(objective, Rlp):
            # A teacher that is not the model: else there is nothing to learn from the distance to it.
            objective.teacher._model = tiny_model(seed=4).requires_grad_(False)
            objective.teacher._model.ban(14, (0, 1, 4, 5, 9))
        results.append(list(updates_apart(objective, model, text())))
    whole, parts = results
    M = whole[0][3].thoughts.anchors.index_BM.shape[1]
    assert parts[0][-1] == (1 if at_once is None else math.ceil(M / at_once) + 1)
    for got, truth in zip(parts, whole, strict=True):
        assert sum(g.norm() for g in truth[4].values()) > 1e-3
        assert_the_same(got, truth)


STEPS = {
    "quiet_star": dataclasses.replace(QUIET, anchors_at_once=4),
    "rlp": dataclasses.replace(RLP, anchors_at_once=4, next_token_weight=0.5),
    "rpt": dataclasses.replace(RPT, anchors_at_once=4),
}


@pytest.mark.parametrize("config", STEPS.values(), ids=STEPS)
def test_a_factor_on_every_loss_is_one_on_the_gradient(config):
    """Sharding needs one, and it must reach what the parts send into the text once, not twice and not never."""
    model = thinker()
    truth = taken_apart(make(config), model, text())[4]
    got = taken_apart(make(config), model, text(), factor=-3.0)[4]
    assert max(relative_error(got[n], -3.0 * truth[n]) for n in truth) <= 1e-12


@pytest.mark.parametrize("config", STEPS.values(), ids=STEPS)
def test_without_what_the_parts_send_into_the_text_gradients_are_wrong(config, monkeypatch):
    model = thinker()
    truth = taken_apart(make(dataclasses.replace(config, anchors_at_once=None)), model, text())[4]
    monkeypatch.setattr(Trunk, "accumulated_gradient", lambda self: sum(0.0 * x.sum() for x in self._read.tensors))
    got = taken_apart(make(config), model, text())[4]
    errors = {name: relative_error(got[name], truth[name]) for name in truth}
    assert max(errors.values()) > 1e-2
    # What only thoughts use has all of its gradient without it.
    if isinstance(config, QuietStarConfig):
        assert errors["mixing_head.out.weight"] <= 1e-10


def test_a_trunk_gathers_in_the_accumulation_dtype(monkeypatch):
    """Many small gradients on a large one, each of them lost in bf16."""
    model = tiny_model(torch.float32)
    model.decoder.compute_dtype = torch.bfloat16
    weight, factors = model.decoder.norm.weight, (1.0, *[2.0**-9] * 64)

    def gathered() -> torch.Tensor:
        weight.grad, trunk = None, Trunk(model.read(text()))
        for factor in factors:
            (trunk.state.hidden_BNW.float().sum() * factor).backward()
        trunk.accumulated_gradient().backward()
        return weight.grad.clone()

    got, weight.grad = gathered(), None
    (model.read(text()).hidden_BNW.float().sum() * sum(factors)).backward()
    truth = weight.grad.clone()
    assert relative_error(got, truth) <= 2**-8
    monkeypatch.setattr("models.decoder.accumulation_dtype", lambda dtype: dtype)
    assert relative_error(gathered(), truth) > 8 * 2**-8


def test_parts_of_anchors():
    source = text()
    everywhere = Anchors.everywhere(source)
    few = Anchors(source, torch.tensor([[1, 4, -1], [0, 5, 9], [2, -1, -1]]))
    for anchors in (everywhere, few):
        for name in ("position_BM", "predicting_BM"):
            parts = [getattr(anchors.part(cut), name) for cut in anchors.cuts(2)]
            assert torch.equal(torch.cat(parts, dim=1), getattr(anchors, name))
        visible = [anchors.part(cut).visible_BM for cut in anchors.cuts(2)]
        for i in (0, 1):
            assert torch.equal(torch.cat([v[i] for v in visible], dim=1), anchors.visible_BM[i])
        moved = [(b, m + c.start, *x) for c in anchors.cuts(2) for b, m, *x in anchors.part(c).prefixes]
        assert sorted(moved) == sorted(anchors.prefixes)
    middle = everywhere.part(slice(3, 7))
    assert middle.window == (3, 7) and middle.part(slice(1, 3)).window == (4, 6) and not middle.dense
    assert everywhere.part(slice(0, 11)).dense and few.part(slice(0, 2)).window is None
    assert few.padded(5).index_BM[0].tolist() == [1, 4, -1, -1, -1] and few.padded(2) is few


def test_ranks_agree_on_how_many_parts_there_are():
    """A rank with fewer anchors goes through as many passes as that with the most."""
    model, objective = thinker(), make(dataclasses.replace(RLP, anchors_at_once=2))
    truth = taken_apart(objective, model, text())
    agreements = []

    def all_agree(here) -> bool:
        agreements.append(bool(here))
        # Another rank has ten anchors.
        return len(agreements) >= 5 and bool(here)

    model.all_agree = all_agree
    got = taken_apart(objective, model, text())
    assert (truth[-1], got[-1]) == (4, 6)
    assert relative_error(got[0], truth[0]) <= 1e-12
    assert max(relative_error(got[4][n], truth[4][n]) for n in truth[4]) <= 1e-12


def test_parts_of_no_size_are_refused():
    for config in (QUIET, RLP, RPT):
        for name in ("anchors_at_once", "thoughts_at_once", "sampled_at_once"):
            with pytest.raises(pydantic.ValidationError, match=f"{name}\n.*greater than or equal to 1"):
                pydantic.TypeAdapter(type(config)).validate_json(json.dumps({name: 0}))


@pytest.mark.parametrize("config", [QUIET, RLP, RPT], ids=["quiet_star", "rlp", "rpt"])
def test_how_many_are_sampled_at_once_changes_no_thought(config, monkeypatch):
    """And is apart from how many are held with gradient at once."""
    whole = taken_apart(make(config), thinker(), text())
    M, sizes, sample = whole[3].thoughts.anchors.index_BM.shape[1], [], eager.sample_thoughts
    monkeypatch.setattr(
        eager,
        "sample_thoughts",
        lambda request, flight: sizes.append(request.anchors.index_BM.shape[1]) or sample(request, flight),
    )
    for at_once, sampled_at_once in ((None, 3), (2, None), (2, M), (4, 3)):
        sizes.clear()
        changed = dataclasses.replace(config, anchors_at_once=at_once, sampled_at_once=sampled_at_once)
        got = taken_apart(make(changed), thinker(), text())
        assert max(sizes) == (sampled_at_once or at_once) and sum(sizes) >= M
        assert torch.equal(got[3].thoughts.tokens_BKSM, whole[3].thoughts.tokens_BKSM)
        assert got[-1] == (1 if at_once is None else math.ceil(M / at_once) + 1)
        assert max(relative_error(got[4][n], whole[4][n]) for n in whole[4]) <= 1e-10


def spoken(thoughts: Thoughts):
    """(sample id, anchor) and the tokens of its thoughts, of each anchor."""
    for row, m in (thoughts.anchors.index_BM >= 0).nonzero().tolist():
        ids_KS = thoughts.tokens_BKSM[row, :, :, m].tolist()
        place = int(thoughts.anchors.text.sample_id_B[row]), int(thoughts.anchors.index_BM[row, m])
        yield place, [[token for token in ids if token != PAD] for ids in ids_KS]


@pytest.mark.parametrize("config", [None, QUIET, RLP, RPT, dataclasses.replace(RLP, updates=2, anchors_at_once=2)])
@pytest.mark.parametrize("rows", [2, 3, 50])
def test_micro_batches_sampled_together_are_a_step(config, rows, monkeypatch):
    """Rows that hold different numbers of anchors, one in each micro-batch."""
    source, sizes, sample = text(), [], eager.sample_thoughts
    monkeypatch.setattr(
        eager, "sample_thoughts", lambda request, *x: sizes.append(request.state.text.shape[0]) or sample(request, *x)
    )

    def taken(parts: list[Text], sampled_rows: int | None):
        model, found = thinker(), []
        step = Step(make(config), model, parts, RNG, sampled_rows=sampled_rows)
        for _ in range(step.updates):
            outputs = [(output.loss.backward(), output)[1] for output in step.losses()]
            said = {place: ids for o in outputs if o.record is not None for place, ids in spoken(o.record.thoughts)}
            found.append((sum(o.loss.detach() for o in outputs), gradients(model), said))
        return found

    whole, sizes[:] = taken([source], None), []
    apart = taken([source.rows(slice(row, row + 1)) for row in range(3)], rows)
    assert set(sizes) == (set() if config is None else {2, 1} if rows == 2 else {3})
    for (loss, grads, said), (truth_loss, truth, truly_said) in zip(apart, whole, strict=True):
        assert loss.item() == pytest.approx(truth_loss.item(), rel=1e-10, abs=1e-12)
        assert max(relative_error(grads[name], truth[name]) for name in truth) <= 1e-10
        assert said == truly_said and bool(said) == (config is not None)


# How much memory it is


def peak_bytes(config, N: int, checkpointing: bool = False) -> int:
    """What a step on a row of N tokens has alive at most, weights and their gradients aside."""
    model, objective = tiny_model(torch.float32, max_positions=1024), make(config)
    model.decoder.activation_checkpointing = checkpointing
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    source = packed_text([[N]], N)
    with LiveBytes() as live:
        for output in Step(objective, model, [source], RNG).losses():
            output.loss.backward()
    return live.peak


PAPERS = QuietStarConfig(length=16, lookahead=4, thoughts=2, policy_weight=10.0)


def test_with_a_row_only_the_texts_memory_grows():
    """Twice the row at the same `anchors_at_once`: as many bytes more as next-token prediction needs more."""
    text_alone, at_once, whole = (
        peak_bytes(config, 96) - peak_bytes(config, 48)
        for config in (None, dataclasses.replace(PAPERS, anchors_at_once=4), PAPERS)
    )
    assert at_once <= 1.1 * text_alone
    assert whole > 10 * text_alone


def test_the_knob_sets_the_memory_of_thoughts():
    two, four, eight = (peak_bytes(dataclasses.replace(PAPERS, anchors_at_once=n), 24) for n in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.1)


def test_few_anchors_in_parts_need_less():
    config = dataclasses.replace(RLP, length=16, anchors_per_document=24)
    whole, parts, fewer = (
        peak_bytes(dataclasses.replace(config, anchors_at_once=n, anchors_per_document=anchors), 48)
        for n, anchors in ((None, 24), (3, 24), (3, 12))
    )
    assert parts <= 0.3 * whole
    assert parts <= 1.1 * fewer


def thinking_of(lengths: list[int], at_once: int | None = None) -> int:
    """What thinking so many tokens at one anchor, and backward of it, has alive at most."""
    model, source, slots_S1 = tiny_model(torch.float32), packed_text([[48]], 48), torch.arange(64)[:, None]
    thoughts = Thoughts(
        torch.stack([torch.where(slots_S1 < length, 5, PAD) for length in lengths])[None],
        Anchors(source, torch.tensor([[30]])),
    ).trimmed()
    state = Trunk(model.read(source)).state
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with LiveBytes() as live:
        model.think(thoughts, state, at_once).sum().backward()
    return live.peak


def test_thoughts_at_once_set_the_memory_of_one_anchor():
    two, four, eight, whole = (thinking_of([64] * 16, n) for n in (2, 4, 8, None))
    assert eight - four == pytest.approx(2 * (four - two), rel=0.1)
    assert two <= 0.25 * whole


def test_thoughts_cost_their_own_length():
    """Not that of the longest, in whatever order they come: one of 64 tokens and eight of 8 are as two of 64, but for
    the hidden states handed out, which are padded."""
    assert thinking_of([8, 8, 8, 64, 8, 8, 8, 8, 8]) <= 1.25 * thinking_of([64, 64])


@pytest.mark.parametrize("config", [None, PAPERS, RLP, RPT], ids=["next_token", "quiet_star", "rlp", "rpt"])
def test_activation_checkpointing_needs_less(config):
    assert peak_bytes(config, 96, checkpointing=True) <= 0.7 * peak_bytes(config, 96)


def test_quiet_star_at_512_needs_at_most_twice_what_next_token_does():
    assert peak_bytes(dataclasses.replace(PAPERS, anchors_at_once=8), 512) <= 2 * peak_bytes(None, 512)
