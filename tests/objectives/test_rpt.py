"""RPT against explicit sequences in fp64, its reward on bytes worked out by hand, and what it does at the edges.

Shapes as in objectives/rpt.py.
"""

from __future__ import annotations

import dataclasses
import json

import pydantic
import pytest
import torch

from models.philox import Rng
from models.rollout import Rollout
from models.thoughts import PAD, Anchors, Text, Thoughts
from objectives.credit import standardised_advantage
from objectives.driver import Step
from objectives.rpt import Rpt, RptConfig
from tests.helpers import explicit_hidden, packed_text, relative_error, sampled, scored, step_of, tiny_model

RNG = Rng(seed=3, step=1)
OPEN, CLOSE, BOX = (7, 8), (9,), ((11,), (12,))
SMALL = RptConfig(
    length=4,
    thoughts=4,
    temperature=3.0,
    anchors_per_document=2,
    positions="random",
    template="forced",
    answer_length=3,
    box_open="[",
)
# Few letters, and a token for two of them: predictions are often right, in more than one way of spelling them.
BYTES = [b"ab" if token == 6 else b"ab"[token % 2 :][:1] for token in range(60)] + [None]


def objective(config: RptConfig = SMALL, box=BOX, end=(), token_bytes=BYTES) -> Rpt:
    return Rpt(config, OPEN, CLOSE, token_bytes, box, end)


def text() -> Text:
    return packed_text([[6, 5], [11], [2, 1, 8]], 11)


def model_of_few_words(seed: int = 0):
    """Only a, b, ab and the two ends can be drawn."""
    model = tiny_model(seed=seed)
    model.ban(7, (0, 1, 4, 5))
    return model


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def said(tokens: list[int]) -> bytes:
    return b"".join(BYTES[token] for token in tokens)


def explicit_loss(rpt: Rpt, model, source: Text, batch):
    """GRPO's loss and rewards, response by response, from plain causal passes."""
    c, drawn = rpt.config, batch.rollout
    banned = model.banned_V.clone()
    banned[[9, 12]] = False
    anchors = batch.real_BM.nonzero().tolist()
    total, rewards = 0.0, {}
    for b, m in anchors:
        place = int(drawn.thoughts.anchors.index_BM[b, m])
        document = source.document_BN[b]
        true = [int(source.tokens_BN[b, n]) for n in range(place + 1, 11) if document[n] == document[place]]
        ends = {said(true[: n + 1]) for n in range(len(true))}
        group, policies = [], []
        for k in range(c.thoughts):
            tokens = [t for t in drawn.thoughts.tokens_BKSM[b, k, :, m].tolist() if t != PAD]
            # [open, body, close, box, answer]
            at = next(i for i in range(2, len(tokens)) if tokens[i] == 9) + 1
            assert tokens[at] == 11
            answer = tokens[at + 1 :]
            right = answer[-1] == 12 and len(answer) > 1 and said(answer[:-1]) in ends
            group.append(float(right))
            closed = bool(drawn.closed_BKM[b, k, m])
            own = [*range(2, at if closed else at - 1), *range(at + 1, len(tokens))]
            whole = torch.zeros_like(drawn.thoughts.tokens_BKSM[:, :, :1]).repeat(1, 1, len(tokens), 1)
            whole[b, k, :, m] = torch.tensor(tokens)
            hidden = explicit_hidden(model, source, Thoughts(whole, drawn.thoughts.anchors), b, k, m)
            logits = (hidden @ model.head_weight_VW.T / c.temperature).masked_fill(banned, -torch.inf)
            policies.append(sum(logits[u - 1].log_softmax(-1)[tokens[u]] for u in own) / len(own))
            rewards[b, k, m] = float(right)
        reward_K = torch.tensor(group, dtype=torch.float64)
        advantage_K = (reward_K - reward_K.mean()) / (reward_K.std() + 1e-6)
        total = total - sum(a * p for a, p in zip(advantage_K, policies, strict=True))
    return total / (len(anchors) * c.thoughts), rewards


def test_grpo_on_explicit_sequences():
    model, source, rpt = model_of_few_words(), text(), objective()
    batch = sampled(rpt, model, source, RNG)
    output = scored(rpt, model, model.read(source), batch, rpt.counts(source, batch))
    truth, rewards = explicit_loss(rpt, model, source, batch)
    assert 0.05 < sum(rewards.values()) / len(rewards) < 0.95
    for (b, k, m), reward in rewards.items():
        assert output.record.reward_BKM[b, k, m].item() == reward
    got, expected = gradients(model, output.loss), gradients(model, truth)
    assert got.keys() == expected.keys()
    errors = {n: relative_error(got[n], expected[n]) for n in got}
    assert max(errors.values()) <= 1e-10, errors
    assert output.metrics["ratio"].sum.item() == pytest.approx(output.metrics["ratio"].count.item(), rel=1e-12)


# What is rewarded


def drawn_tokens(tokens: list[int], answering: list[bool], answered: bool) -> Rollout:
    tokens_BKSM = torch.tensor(tokens)[None, None, :, None]
    mask = torch.tensor(answering)[None, None, :, None]
    yes = torch.ones(1, 1, 1, dtype=torch.bool)
    source = Text.from_rows(torch.zeros(1, 4, dtype=torch.int64))
    thoughts = Thoughts(tokens_BKSM, Anchors(source, torch.tensor([[1]])))
    return Rollout(thoughts, tokens_BKSM >= 0, tokens_BKSM.double(), yes, mask, yes & answered, 0)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("I think.</think>\\boxed{ cat}", b" cat"),
        ("\\boxed{dog}</think>\\boxed{ cat} no, \\boxed{cow}", b"cow"),
        ("</think>\\boxed{}", b""),
        ("\\boxed{ cat}", None),
        ("\\boxed{ cat}</think>", None),
        ("</think>\\boxed{ cat", None),
        ("</think> cat", None),
        ("a</think>b</think>\\boxed{é}", "é".encode()),
        ("</think>\\boxed{\\frac{1}{2}} or {3}", b"\\frac{1}{2}"),
        ("</think>\\boxed{f(){}\n}", b"f(){}\n"),
        ("</think>\\boxed{{a}", None),
        ("</think>\\boxed{a}}", b"a"),
        ("</think>\\boxed{a} \\boxed{{b}", None),
    ],
)
def test_the_last_box_behind_the_closing_tag(response, expected):
    table = [bytes([byte]) for byte in range(256)]
    rpt = objective(RptConfig(), token_bytes=table)
    tokens = list(response.encode())
    drawn = drawn_tokens([*tokens, PAD], [False] * (len(tokens) + 1), True)
    assert rpt.predictions(drawn) == [[[expected]]]


@pytest.mark.parametrize(
    ("response", "thought"),
    [
        ("I think.</think>\\boxed{ cat}", "I think."),
        ("a</think>b</think>\\boxed{c}", "a</think>b"),
        ("</think>\\boxed{c}", ""),
        ("no tag \\boxed{c}", "no tag \\boxed{c}"),
    ],
)
@pytest.mark.parametrize("ended", [True, False])
def test_what_is_watched_of_a_free_response_is_its_thought(response, thought, ended):
    tokens = [*response.encode(), *([258] if ended else [])]
    length = len(response) + 1
    drawn = drawn_tokens([7, 8, *tokens, *[PAD] * (length - len(tokens))], [False] * (length + 2), True)
    where = (drawn.thoughts.tokens_BKSM != PAD) & (torch.arange(length + 2) > 1)[:, None]
    drawn = dataclasses.replace(drawn, sampled_BKSM=where, closed_BKM=drawn.closed_BKM & ended, closing=1)
    table = [*(bytes([byte]) for byte in range(256)), None, None, None]
    rpt = objective(RptConfig(length=length), end=(258,), token_bytes=table)
    body = rpt.bodies(drawn)[0, 0, :, 0].tolist()
    assert body == [*thought.encode(), *[PAD] * (length - len(thought))]


def test_a_tag_that_shares_a_token_ends_the_thought_before_it():
    rpt = objective(RptConfig(), token_bytes=[b"I", b" see", b".</", b"think", b">", b"\\boxed{x}"])
    assert rpt._thought_length([0, 1, 2, 3, 4, 5]) == 2


def test_a_right_prediction_is_no_leak():
    model, source = model_of_few_words(), text()
    config = RptConfig(length=4, thoughts=4, positions="random")
    rpt = objective(config, end=(13,), token_bytes=[*BYTES[:9], None, *BYTES[10:]])
    batch = sampled(rpt, model, source, RNG)
    tokens = batch.rollout.thoughts.tokens_BKSM
    # Every response: a word, the closing tag, and the target itself.
    tokens[:, :, 2:] = PAD
    tokens[:, :, 2], tokens[:, :, 3], tokens[:, :, 4] = 60, 9, batch.target_BHM
    where = (tokens != PAD) & (torch.arange(tokens.shape[2]) > 1)[:, None]
    batch.rollout = dataclasses.replace(
        batch.rollout, sampled_BKSM=where, closed_BKM=torch.zeros_like(batch.rollout.closed_BKM)
    )
    metrics = scored(rpt, model, model.read(source), batch, rpt.counts(source, batch)).metrics
    assert metrics["target_in_thought"].sum.item() == 0
    assert metrics["thought_length"].sum.item() == metrics["thought_length"].count.item() > 0


def test_tags_that_are_control_tokens_are_read():
    """Token 256 closes thoughts, 257 boxes, 258 responses; none of them stands for text."""
    table = [*(bytes([byte]) for byte in range(256)), None, None, None]
    rpt = Rpt(RptConfig(), OPEN, (256,), table, ((1,), (257,)), (258,))
    for tokens, expected in (
        ([*b"so", 256, *b"\\boxed{ cat", 257, 258], b" cat"),
        ([*b"so</think>\\boxed{ cat}", 258], b" cat"),
        ([*b"so\\boxed{ cat}", 258], None),
    ):
        assert rpt.predictions(drawn_tokens(tokens, [False] * len(tokens), True)) == [[[expected]]]


def test_forced_predictions_are_what_stands_before_the_end():
    rpt = objective()
    answering = [False, False, False, True, True, True]
    tokens = [7, 9, 11, 6, 3, 12]
    assert rpt.predictions(drawn_tokens(tokens, answering, True)) == [[[b"abb"]]]
    assert rpt.predictions(drawn_tokens(tokens, answering, False)) == [[[None]]]
    # With a control token in it, or the closing tag, it is no text.
    for token in (60, 9):
        said = [7, 9, 11, 6, token, 12]
        assert objective(token_bytes=[*BYTES[:9], None, *BYTES[10:]]).predictions(
            drawn_tokens(said, answering, True)
        ) == [[[None]]]
    unboxed = objective(box=((), ()))
    assert unboxed.predictions(drawn_tokens([7, 9, 6, 3], [False, False, True, True], True)) == [[[b"abb"]]]


def test_the_continuation_ends_with_its_document_and_before_control_tokens():
    source = Text(
        torch.tensor([[2, 3, 2, 60, 2, 3]]),
        torch.tensor([[0, 0, 0, 0, 1, 1]]),
        torch.tensor([[0, 1, 2, 3, 0, 1]]),
        torch.tensor([0]),
    )
    rpt = objective(box=((), ()))
    drawn = drawn_tokens([7, 9, 2], [False, False, True], True)
    anchors = Anchors(source, torch.tensor([[0]]))
    drawn = dataclasses.replace(drawn, thoughts=Thoughts(drawn.thoughts.tokens_BKSM, anchors))
    for prediction, reward in ((b"b", 1), (b"ba", 1), (b"baa", 0), (b"a", 0), (b"", 0), (None, 0)):
        reward_BKM, undecided_BKM = rpt._rewards([[[prediction]]], drawn, torch.float64)
        assert (reward_BKM.item(), undecided_BKM.item()) == (reward, False)
    assert rpt.choice.eligible(source).tolist() == [[True, True, False, False, True, False]]


@pytest.mark.parametrize(
    ("documents", "cut"),
    [([0, 0, 0, 0], True), ([0, 0, 0, 1], False), ([0, 0, 0, -1], False)],
    ids=["cut", "before another", "before padding"],
)
def test_a_right_prediction_longer_than_its_row_is_neither_right_nor_wrong(documents, cut):
    """Behind the anchor the row has `ab` (or `aba`); the group's others decide what is left open."""
    source = Text(torch.tensor([[3, 2, 3, 2]]), torch.tensor([documents]), torch.arange(4)[None], torch.tensor([0]))
    rpt = objective(box=((), ()))
    tokens_BKSM = torch.full((1, 4, 1, 1), 7)
    yes = torch.ones(1, 4, 1, dtype=torch.bool)
    thoughts = Thoughts(tokens_BKSM, Anchors(source, torch.tensor([[0]])))
    drawn = Rollout(thoughts, tokens_BKSM < 0, tokens_BKSM.double(), yes, tokens_BKSM < 0, yes, 0)
    known = b"aba" if cut else b"ab"
    predictions = [[[known + b"b"], [known], [b"ab"], [b"b"]]]
    reward_BKM, undecided_BKM = rpt._rewards(predictions, drawn, torch.float64)
    assert undecided_BKM.flatten().tolist() == [cut, False, False, False]
    assert reward_BKM.flatten().tolist() == [2 / 3 if cut else 0, 1, 1, 0]
    assert (standardised_advantage(reward_BKM)[0, 0].item() == 0) == cut
    alone, _ = rpt._rewards([[[known + b"b"]] * 4], drawn, torch.float64)
    assert alone.flatten().tolist() == [0, 0, 0, 0]


# Where, and which groups


def test_hard_positions_are_the_proxys():
    model, other, source = model_of_few_words(), tiny_model(seed=5), text()
    config = dataclasses.replace(SMALL, positions="hard", anchors_per_document=99)

    def entropies(which):
        logits = which.read(source).hidden_BNW @ which.head_weight_VW.T
        p = logits.topk(16).values.softmax(-1)
        return -(p * p.log()).sum(-1)

    for proxy in (None, other):
        entropy_BN = entropies(proxy or model)
        # Between two entropies: at one, rounding would decide.
        threshold = entropy_BN[objective().choice.eligible(source)].sort().values[10:12].mean().item()
        rpt = objective(dataclasses.replace(config, hard_entropy=threshold))
        rpt.proxy = proxy
        batch = sampled(rpt, model, source, RNG)
        index_BM = batch.rollout.thoughts.anchors.index_BM
        chosen = {(b, n) for b in range(3) for n in index_BM[b].tolist() if n >= 0}
        hard_BN = rpt.choice.eligible(source) & (entropy_BN >= threshold)
        assert chosen == set(map(tuple, hard_BN.nonzero().tolist())) != set()
        assert rpt.other_models(model) == ([proxy] if proxy else [])


def test_zero_variance_groups_are_left_out_from_their_step_on():
    model, source = model_of_few_words(), text()
    keep = objective(dataclasses.replace(SMALL, drop_zero_variance_from=2))
    before, after = sampled(keep, model, source, Rng(3, 1)), sampled(keep, model, source, Rng(3, 2))
    assert torch.equal(before.kept_BM, before.real_BM)
    varied_BM = (after.reward_BKM.amax(1) > after.reward_BKM.amin(1)) & after.real_BM
    assert 0 < varied_BM.sum() < after.real_BM.sum()
    assert torch.equal(after.kept_BM, varied_BM)
    assert keep.counts(source, after)["thoughts"] == varied_BM.sum() * SMALL.thoughts
    never = objective(dataclasses.replace(SMALL, drop_zero_variance_from=None))
    rng = Rng(3, 2)
    kept, all_of_them = (gradients(model, step_of(o, model, source, rng).loss) for o in (keep, never))
    scale = after.real_BM.sum() / varied_BM.sum()
    assert max(relative_error(kept[n], all_of_them[n] * scale) for n in kept) <= 1e-10


def test_the_update_does_not_depend_on_the_cut_of_the_batch():
    model, source = model_of_few_words(), text()
    config = dataclasses.replace(SMALL, drop_zero_variance_from=0)
    truth = gradients(model, step_of(objective(config), model, source, RNG).loss)
    rpt = objective(config)
    parts = [source.rows(cut) for cut in (slice(0, 1), slice(1, 3))]
    counts = [Step(rpt, model, [part], RNG).counts for part in parts]
    total = {name: counts[0][name] + counts[1][name] for name in counts[0]}
    cut = gradients(model, sum(step_of(rpt, model, part, RNG, total).loss for part in parts))
    together = Step(rpt, model, parts, RNG)
    assert all(torch.equal(together.counts[name], total[name]) for name in total)
    assert max(relative_error(cut[n], truth[n]) for n in truth) <= 1e-10
    whole, *single = (step_of(rpt, model, part, RNG, total) for part in (source, *parts))
    assert sum(p.flops for p in single) == whole.flops


# At the edges


def test_a_mixed_update_adds_the_texts_own_gradient():
    model, source = model_of_few_words(), text()
    mixed = objective(dataclasses.replace(SMALL, next_token_weight=2.0))
    alone, both = (gradients(model, step_of(o, model, source, RNG).loss) for o in (objective(), mixed))
    target_BN, valid_BN = source.targets(1)
    logits_BNV = model.read(source).hidden_BNW @ model.head_weight_VW.T
    nll = torch.nn.functional.cross_entropy(logits_BNV[valid_BN], target_BN[valid_BN])
    truth = gradients(model, 2.0 * nll)
    for name in truth:
        assert relative_error(both[name] - alone.get(name, 0), truth[name]) <= 1e-9, name


def test_a_text_without_a_position_gives_no_loss():
    model = model_of_few_words()
    for source, config in (
        (packed_text([[1], []], 4), SMALL),
        (text(), dataclasses.replace(SMALL, positions="hard", hard_entropy=100.0)),
        (text(), dataclasses.replace(SMALL, min_prefix=50)),
    ):
        output = step_of(objective(config), model, source, RNG)
        assert output.loss.item() == 0
        assert all(g.abs().max() == 0 for g in gradients(model, output.loss).values())


def test_a_document_nearly_over_can_still_be_predicted():
    """A prediction longer than what is left is wrong, not an error."""
    model, source = model_of_few_words(), packed_text([[2], [2, 2]], 4)
    output = step_of(objective(dataclasses.replace(SMALL, answer_length=12)), model, source, RNG)
    assert torch.isfinite(output.loss)
    assert objective().counts(source)["thoughts"].item() == 3 * SMALL.thoughts


def test_settings_that_cannot_be():
    wrong = dict(length=0, thoughts=1, answer_length=0, drop_zero_variance_from=-1)
    with pytest.raises(pydantic.ValidationError) as caught:
        pydantic.TypeAdapter(RptConfig).validate_json(json.dumps(wrong))
    assert {error["loc"][0] for error in caught.value.errors()} == wrong.keys()
    (problem,) = RptConfig(box_open="").problems()
    assert "use template forced" in problem
    assert RptConfig().problems() == []


def test_free_responses_end_with_the_models_own_end():
    model, source = model_of_few_words(), text()
    config = RptConfig(length=6, thoughts=4, positions="random", temperature=2.0)
    rpt = objective(config, box=((11,), (12,)), end=(13,))
    batch = sampled(rpt, model, source, RNG)
    drawn = batch.rollout
    real = batch.real_BM[:, None].expand_as(drawn.closed_BKM)
    assert 0 < drawn.closed_BKM[real].sum() < real.sum()
    tokens = drawn.thoughts.tokens_BKSM
    assert ((tokens == 13).any(dim=2) == drawn.closed_BKM)[real].all()
    assert not drawn.predicting_BKSM.any()
    metrics = step_of(rpt, model, source, RNG).metrics
    assert metrics["ratio"].sum.item() == pytest.approx(metrics["ratio"].count.item(), rel=1e-12)
    assert metrics["answered"].sum.item() < metrics["answered"].count.item()
