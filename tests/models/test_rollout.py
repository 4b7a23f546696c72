"""Sampling thoughts: what a draw depends on, and that sampled log-probs are scored ones.

Shapes as in models/rollout.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from models import logprobs
from models.decoder import TextState
from models.logprobs import token_logprobs
from models.philox import Rng
from models.rollout import EAGER, Native, Prediction, Recorded, eager, native
from models.thoughts import PAD, START, Anchors, Text
from tests.helpers import packed_text, relative_error, rollout, tiny_model


def sample(model, text, K=3, length=5, rng=None, temperature=1.0, anchors=None):
    with torch.no_grad():
        state = model.read(text)
    return rollout(
        model, state, anchors or Anchors.everywhere(text), K, length, rng or Rng(11, 3), temperature
    ).thoughts


def texts() -> Text:
    return packed_text([[7, 5], [12], [3, 4, 2], [11]], 12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_thought_is_the_same_in_any_batch(dtype):
    model, text = tiny_model(dtype), texts()
    together = sample(model, text).tokens_BKSM
    assert (together[:, :, 0] == START).all()
    assert len(together[:, :, 1:].unique()) > 10
    for row in range(4):
        alone = sample(model, text.rows(slice(row, row + 1))).tokens_BKSM
        assert torch.equal(alone[0], together[row])
    reordered = [2, 0, 3, 1]
    shuffled = Text(*(getattr(text, n)[reordered] for n in ("tokens_BN", "document_BN", "position_BN", "sample_id_B")))
    assert torch.equal(sample(model, shuffled).tokens_BKSM, together[reordered])


def test_a_thought_is_the_same_in_any_chunk(monkeypatch):
    """Fewer thoughts, anchors, tokens or rows of logits at a time change nothing of those that are there."""
    model, text = tiny_model(), texts()
    together = sample(model, text).tokens_BKSM
    assert torch.equal(sample(model, text, K=1).tokens_BKSM, together[:, :1])
    assert torch.equal(sample(model, text, length=2).tokens_BKSM, together[:, :, :3])
    some = torch.tensor([[1, 6]] * 4)
    assert torch.equal(sample(model, text, anchors=Anchors(text, some)).tokens_BKSM, together[..., [1, 6]])
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 61 * 7)
    monkeypatch.setattr(logprobs, "CACHED_ELEMENTS", 61 * 2)
    assert torch.equal(sample(model, text).tokens_BKSM, together)


def test_a_text_by_head_is_the_same_text(monkeypatch):
    """In bf16 each head's keys and values move together; a rollout then draws what it would have drawn."""
    model, text = tiny_model(torch.float32, heads=4, kv_heads=2), texts()
    with torch.no_grad():
        state = model.read(text)
        assert state.by_head() is state
        model.decoder.compute_dtype = torch.bfloat16
        state = model.read(text)
    moved = state.by_head()
    for before, after in zip((*state.keys, *state.values), (*moved.keys, *moved.values), strict=True):
        assert torch.equal(before, after)
        assert after.transpose(1, 2).is_contiguous() and not before.transpose(1, 2).is_contiguous()
    few = Anchors(text, torch.tensor([[1, 6]] * 4))
    monkeypatch.setattr(TextState, "by_head", lambda self: self)
    drawn = [rollout(model, s, few, 3, 5, Rng(11, 3)) for s in (state, moved)]
    assert torch.equal(*(d.thoughts.tokens_BKSM for d in drawn))


def test_bf16_thoughts_are_the_same_in_any_batch():
    """With rows enough for the matrix products' full tiles, whose sums do not depend on the number of rows."""
    model = tiny_model(torch.float32, width=64, head_dim=16, ffn_width=128)
    model.decoder.compute_dtype = torch.bfloat16
    text = packed_text([[40]] * 4, 40)
    together = sample(model, text, K=2).tokens_BKSM
    assert torch.equal(sample(model, text.rows(slice(2, 3)), K=2).tokens_BKSM[0], together[2])


def test_draws_depend_on_seed_and_step():
    model, text = tiny_model(), texts()
    first = sample(model, text, rng=Rng(11, 3)).tokens_BKSM
    assert not torch.equal(first, sample(model, text, rng=Rng(12, 3)).tokens_BKSM)
    assert not torch.equal(first, sample(model, text, rng=Rng(11, 4)).tokens_BKSM)
    assert torch.equal(first, sample(model, text, rng=Rng(11, 3)).tokens_BKSM)


def test_step_by_step_hidden_states_are_those_of_one_pass():
    """The tokens drawn are the ones that inverting the scored distribution at the same uniforms gives."""
    model, text = tiny_model(), texts()
    model.ban(60, (0, 1))
    thoughts = sample(model, text)
    with torch.no_grad():
        hidden = model.think(thoughts, model.read(text))
    logits = (hidden[:, :, :-1] @ model.head_weight_VW.T).masked_fill(model.banned_V, -torch.inf)
    cumulative = logits.softmax(-1).cumsum(-1)
    B, K, _, N = thoughts.tokens_BKSM.shape
    for s in range(5):
        u = Rng(11, 3).uniform(
            text.sample_id_B[:, None, None], torch.arange(N)[None, None], torch.arange(K)[None, :, None], s
        )
        drawn = (cumulative[:, :, s] <= u[..., None]).sum(-1)
        assert torch.equal(drawn, thoughts.tokens_BKSM[:, :, s + 1])


def test_banned_ids_are_never_drawn():
    model, text = tiny_model(), texts()
    model.ban(tokenizer_size=20, control_ids=(3, 4, 5))
    drawn = sample(model, text, K=8, length=6).tokens_BKSM[:, :, 1:]
    allowed = set(range(20)) - {3, 4, 5}
    assert set(drawn.flatten().tolist()) <= allowed


def test_greedy_thoughts_are_the_most_probable_and_need_no_draw():
    model, text = tiny_model(), texts()
    greedy = sample(model, text, K=2, temperature=0.0).tokens_BKSM
    assert torch.equal(greedy[:, 0], greedy[:, 1])
    assert torch.equal(greedy, sample(model, text, K=2, temperature=0.0, rng=Rng(0, 0)).tokens_BKSM)


def test_no_thought_is_start_alone():
    assert sample(tiny_model(), texts(), length=0).tokens_BKSM.shape == (4, 3, 1, 12)


def test_rollout_leaves_no_gradient_and_later_passes_have_theirs():
    """Working copies made while sampling must not cut the gradient of the pass that follows."""
    model, text = tiny_model(torch.float32), texts()
    model.decoder.compute_dtype = torch.bfloat16
    state = model.read(text)
    thoughts = rollout(model, state.detached(), Anchors.everywhere(text), 1, 3, Rng(0, 0)).thoughts
    hidden = model.think(thoughts, state)
    token_logprobs(hidden, model.head_weight_VW, thoughts.tokens_BKSM.clamp(min=0)).sum().backward()
    used = [n for n, p in model.named_parameters() if not n.startswith("mixing") and n != "delimiters.end_W"]
    missing = [n for n in used if model.get_parameter(n).grad is None or model.get_parameter(n).grad.norm() == 0]
    assert missing == []
    again = tiny_model(torch.float32)
    again.decoder.compute_dtype = torch.bfloat16
    plain = again.think(thoughts, again.read(text))
    token_logprobs(plain, again.head_weight_VW, thoughts.tokens_BKSM.clamp(min=0)).sum().backward()
    for name in used:
        assert relative_error(model.get_parameter(name).grad, again.get_parameter(name).grad) <= 1e-6, name


# Thoughts that end, and predictions behind them

OPEN, CLOSE, ASK, END = (7, 8), (9, 10), (11,), (12, 13)


def draw(prediction, length=6, prompt=OPEN, close=CLOSE, seed=3, allowed=()):
    """A model that mostly draws what ends things, so that all ways to end occur."""
    model, text = tiny_model(), packed_text([[30], [14, 9]], 30)
    model.ban(16, (0, 1, 2, 3, 4, 5, 9, 12))
    with torch.no_grad():
        state = model.read(text)
    ends = dict(prompt=prompt, close=close, prediction=prediction, allowed=allowed)
    return model, state, text, rollout(model, state, Anchors.everywhere(text), 4, length, Rng(seed, 0), 1.3, **ends)


def replayed(tokens: list[int], sampled: list[bool], prediction, length: int) -> tuple[list[bool], bool, bool]:
    """Which tokens of a finished thought must have been drawn, and whether it closed and predicted: a plain reading."""
    expected, closed, predicted = [False] * len(OPEN), False, False
    place = count = len(OPEN)
    while place < len(tokens) and count < len(OPEN) + length and not closed:
        expected.append(True)
        place, count = place + 1, count + 1
        closed = tokens[place - 2 : place] == list(CLOSE) and place - 2 >= len(OPEN)
    if prediction is not None:
        forced = [*([] if closed else CLOSE), *prediction.prompt]
        assert tokens[place : place + len(forced)] == forced
        expected += [False] * len(forced)
        first = place = place + len(forced)
        while place < len(tokens) and place < first + prediction.length and not predicted:
            expected.append(True)
            place += 1
            predicted = tuple(tokens[max(first, place - len(prediction.end)) : place]) == prediction.end
    assert place == len(tokens)
    assert sampled[: len(tokens)] == expected and not any(sampled[len(tokens) :])
    return expected, closed, predicted


@pytest.mark.parametrize("prediction", [None, Prediction(ASK, 4, END), Prediction((), 3, END)])
def test_thoughts_end_and_predict_as_a_plain_reading_says(prediction):
    _, _, text, drawn = draw(prediction)
    seen = set()
    for b, n in ((text.document_BN >= 0) & text.targets(1)[1]).nonzero().tolist():
        for k in range(4):
            tokens = [t for t in drawn.thoughts.tokens_BKSM[b, k, :, n].tolist() if t != PAD]
            expected, closed, predicted = replayed(tokens, drawn.sampled_BKSM[b, k, :, n].tolist(), prediction, 6)
            assert closed == bool(drawn.closed_BKM[b, k, n])
            if prediction is not None:
                assert predicted == bool(drawn.predicted_BKM[b, k, n])
            assert drawn.predicting_BKSM[b, k, :, n].sum() <= (prediction.length if prediction else 0)
            seen.add((closed, predicted))
    assert len(seen) == (2 if prediction is None else 4)


@pytest.mark.parametrize("anchors", ["few", "few, natively", "everywhere"])
def test_log_probs_of_draws_are_scored_ones_in_low_precision(anchors):
    """Root mean squares: in fp32 within 1e-5 nats, in bf16 no further from the scoring pass than that is from fp32."""
    model = tiny_model(torch.float32, width=64, head_dim=16, ffn_width=128)
    if anchors == "few, natively" and native.compiler() is None:
        pytest.skip("no C++ compiler")
    engine = Native() if anchors == "few, natively" else EAGER
    text = packed_text([[20, 19], [40]], 40)
    few = Anchors(text, torch.tensor([[3, 8, 30], [5, -1, 39]]))

    @torch.no_grad()
    def run(dtype, thoughts=None):
        """Log-probs of the thoughts' sampled tokens, drawn or scored."""
        model.decoder.compute_dtype = dtype
        state = model.read(text)
        if thoughts is None:
            places = Anchors.everywhere(text) if anchors == "everywhere" else few
            drawn = rollout(model, state, places, 8, 12, Rng(0, 2), engine=engine)
            return drawn.thoughts, drawn.logprobs_BKSM[drawn.sampled_BKSM]
        hidden, tokens = model.think(thoughts, state)[:, :, :-1], thoughts.tokens_BKSM[:, :, 1:]
        return thoughts, token_logprobs(hidden[tokens >= 0], model.head_weight_VW, tokens[tokens >= 0])

    thoughts, drawn = run(None)
    assert (drawn - run(None, thoughts)[1]).square().mean() <= 1e-5**2
    thoughts, drawn = run(torch.bfloat16)
    scored, exact = run(torch.bfloat16, thoughts)[1], run(None, thoughts)[1]
    assert (drawn - scored).square().mean() <= (scored - exact).square().mean()


def test_log_probs_of_draws_are_scored_ones():
    model, state, _, drawn = draw(Prediction(ASK, 4, END))
    with torch.no_grad():
        hidden = model.think(drawn.thoughts, state)
    banned = model.banned_V.clone()
    banned[[9, 12]] = False
    logits = (hidden[:, :, :-1] @ model.head_weight_VW.T / 1.3).masked_fill(banned, -torch.inf)
    tokens = drawn.thoughts.tokens_BKSM[:, :, 1:].clamp(min=0)
    truth = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    where = drawn.sampled_BKSM[:, :, 1:]
    assert relative_error(drawn.logprobs_BKSM[:, :, 1:][where], truth[where]) <= 1e-12
    assert drawn.logprobs_BKSM[~drawn.sampled_BKSM].abs().max() == 0


def test_a_prediction_without_a_thought():
    _, _, _, drawn = draw(Prediction(ASK, 2), length=0)
    tokens = drawn.thoughts.tokens_BKSM
    assert tokens.shape[2] == 2 + 2 + 1 + 2
    assert (tokens[:, :, :5] == torch.tensor([*OPEN, *CLOSE, *ASK])[:, None]).all()
    assert drawn.sampled_BKSM[:, :, :5].sum() == 0 and drawn.sampled_BKSM[:, :, 5:].all()
    assert drawn.predicted_BKM.all() and not drawn.closed_BKM.any()


def test_allowed_ids_can_be_drawn_though_they_are_banned():
    for allowed, expected in (((), False), ((4,), True)):
        tokens = draw(None, allowed=allowed)[3].thoughts.tokens_BKSM
        assert bool((tokens == 4).any()) == expected


def anchors_at_few() -> Anchors:
    """Of documents of different lengths, in rows with different numbers of anchors."""
    text = packed_text([[7, 5], [12], [4, 8]], 12)
    return Anchors(text, torch.tensor([[3, 8, 10], [5, -1, -1], [2, 6, -1]]))


class Watched(Rng):
    """Notes which thoughts there are draws for."""

    rows: ClassVar[list[int]] = []

    def uniform(self, *places):
        drawn = super().uniform(*places)
        self.rows.append(len(drawn))
        return drawn


@pytest.mark.parametrize("prediction", [None, Prediction((8,), 4, (9,))])
@pytest.mark.parametrize("prompt", [(7,), (7, 8, 9)])
@pytest.mark.parametrize("engine", [EAGER, Recorded(), Native()])
def test_thoughts_that_leave_and_take_turns_are_the_same(engine, prompt, prediction, monkeypatch):
    """Token for token those of a batch that stays together to its end."""
    if isinstance(engine, Native) and native.compiler() is None:
        pytest.skip("no C++ compiler")
    model = tiny_model(torch.float32, width=32, ffn_width=48, head_dim=16)
    model.ban(61, tuple(range(10, 61)))
    with torch.no_grad():
        state = model.read(anchors_at_few().text)
    ends = dict(prompt=prompt, close=(5,), prediction=prediction, engine=engine)

    def sampled():
        Watched.rows.clear()
        return rollout(model, state, anchors_at_few(), 5, 40, Watched(1, 2), **ends)

    if isinstance(engine, Native):
        monkeypatch.setattr(native, "ROWS", 4)
        found = sampled()
        assert max(Watched.rows) == 4
        monkeypatch.setattr(native, "ROWS", 100)
        monkeypatch.setattr(native, "FEW", 0)
    else:
        found = sampled()
        assert min(Watched.rows) < max(Watched.rows) / 4
        monkeypatch.setattr(eager.AllAtOnce, "turn_over", lambda self, ended_R: False)
    together = sampled()
    assert len(set(Watched.rows)) == 1
    lengths = together.sampled_BKSM.sum(2)[anchors_at_few().index_BM[:, None].expand(-1, 5, -1) >= 0]
    assert lengths.min() < 8 < 16 < lengths.max()
    for name, truth in vars(together).items():
        if name == "logprobs_BKSM":
            # A product of fewer rows may be summed in another order.
            assert relative_error(found.logprobs_BKSM, truth) <= 1e-6
        elif isinstance(truth, torch.Tensor):
            assert torch.equal(getattr(found, name), truth), name
    assert torch.equal(found.thoughts.tokens_BKSM, together.thoughts.tokens_BKSM)


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
def test_the_compiled_step_is_spent_on_tokens_that_are_sampled(monkeypatch):
    model = tiny_model(torch.float32, width=32, ffn_width=48, head_dim=16)
    model.ban(61, tuple(range(10, 61)))
    anchors, rows = anchors_at_few(), []
    with torch.no_grad():
        state = model.read(anchors.text)
    call = native.NativeStep.__call__
    monkeypatch.setattr(native.NativeStep, "__call__", lambda self, *x: rows.append(len(x[0])) or call(self, *x))
    found = rollout(model, state, anchors, 16, 40, Rng(1, 2), close=(5,), engine=Native())
    wanted = int(found.sampled_BKSM.sum())
    assert wanted <= sum(rows) <= 1.1 * wanted < 0.5 * 40 * 16 * 6
