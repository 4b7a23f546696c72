"""The engine that hands requests to vLLM, against the eager one, at a stand-in for vLLM. `.ci/external` runs vLLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from checkpoints.families import config_to_hf
from models.philox import Rng
from models.rollout import EAGER, EngineError, Prediction, RolloutRequest, Vllm
from models.thoughts import Anchors
from pretrain.sampling import language_model_weights
from tests.helpers import packed_text, tiny_model

ENDS = {
    "full length": dict(),
    "a tag": dict(close=(3,)),
    "a tag of two tokens": dict(close=(2, 4)),
    "a prediction": dict(close=(2, 4), prediction=Prediction((3, 8), 4, (5, 1))),
    "an open prediction": dict(close=(3,), prediction=Prediction(length=2)),
}


def request(model, temperature=1.0, step=3, thoughts=3, **changes) -> RolloutRequest:
    """Anchors in two packed rows, one of them padding."""
    text = packed_text([[9, 7], [12]], 20)
    anchors = Anchors(text, torch.tensor([[2, 8, 14], [5, 11, -1]]))
    given = dict(prompt=(7, 9), allowed=(1,)) | changes
    return RolloutRequest(model, model.read(text), anchors, thoughts, 9, Rng(4, step), temperature, **given)


def engine_for(model, **changes) -> Vllm:
    config = replace(model.decoder.config, tie_embeddings=False)
    return Vllm(config_to_hf(config, torch.float32), language_model_weights, 64, 1.0, **changes)


def some_model(tied: bool = True, tokens: int = 58):
    """One that may write some of its tokens, the fewer, the more often tags."""
    model = tiny_model(torch.float32, tie_embeddings=tied)
    model.ban(tokens, (0, 1, 30))
    return model


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_greedy_thoughts_are_the_eager_ones(vllm_double, ends, tied):
    model = some_model(tied, tokens=6)
    asked = request(model, 0.0, **ENDS[ends])
    truth, found = EAGER.sample(asked), engine_for(model).sample(asked)
    assert torch.equal(found.thoughts.tokens_BKSM, truth.thoughts.tokens_BKSM)
    for name in ("sampled_BKSM", "closed_BKM", "predicting_BKSM", "predicted_BKM"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert found.closing == truth.closing
    assert (found.logprobs_BKSM - truth.logprobs_BKSM).abs().max() <= 1e-4


def test_a_thought_ends_with_its_first_tag(vllm_double):
    """Of several tokens, whose last one often ends nothing."""
    model, tag = some_model(tokens=6), [2, 4]
    rollout = engine_for(model).sample(request(model, thoughts=12, close=tuple(tag)))
    ends, unended = [], 0
    for b, k, m in (rollout.thoughts.anchors.index_BM >= 0)[:, None].expand(-1, 12, -1).nonzero().tolist():
        body = [token for token in rollout.thoughts.tokens_BKSM[b, k, 2:, m].tolist() if token >= 0]
        pairs = [body[i : i + 2] for i in range(len(body) - 1)]
        assert tag not in pairs[:-1] and rollout.closed_BKM[b, k, m] == (pairs[-1] == tag)
        assert pairs[-1] == tag or len(body) == 9
        ends.append(pairs[-1] == tag)
        unended += tag[1] in body[:-1]
    assert any(ends) and not all(ends) and unended


def test_a_thought_depends_on_its_place_alone_and_holds_nothing_banned(vllm_double):
    model = some_model()
    engine, asked = engine_for(model), request(model)
    whole = engine.sample(asked).thoughts.tokens_BKSM
    part = engine.sample(replace(asked, anchors=asked.anchors.part(slice(1, 2)))).thoughts.tokens_BKSM
    assert torch.equal(part, whole[..., 1:2])
    assert not torch.equal(engine.sample(request(model, step=4)).thoughts.tokens_BKSM, whole)
    there = whole[:, :, 2:][(asked.anchors.index_BM >= 0)[:, None, None].expand(-1, 3, 9, -1)]
    assert len({tuple(whole[0, k, :, m].tolist()) for k in range(3) for m in range(3)}) == 9
    assert there.min() >= 1 and there.max() < 58 and not (there == 30).any()


def test_weights_are_handed_over_after_each_optimizer_step(vllm_double):
    model = some_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    engine = engine_for(model)
    engine.sample(request(model))
    engine.sample(request(model))
    (llm,) = vllm_double.started
    assert llm.calls == ["reload_weights", "reset_prefix_cache"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = engine.sample(request(model, 0.0))
    assert llm.calls == ["reload_weights", "reset_prefix_cache"] * 2 and engine.lag == 0
    assert torch.equal(found.thoughts.tokens_BKSM, EAGER.sample(request(model, 0.0)).thoughts.tokens_BKSM)
    # Another run in the same process: another model, no step in between.
    other = engine_for(model)
    other.sample(request(some_model()))
    assert len(vllm_double.started) == 1 and llm.calls.count("reload_weights") == 3


def test_it_sleeps_while_the_model_trains(vllm_double):
    vllm_double.can_sleep = True
    model = some_model()
    engine, asked = engine_for(model), request(model, 0.0)
    for _ in range(2):
        found = engine.sample(asked)
    assert torch.equal(found.thoughts.tokens_BKSM, EAGER.sample(asked).thoughts.tokens_BKSM)
    handed = ["reload_weights", "reset_prefix_cache"]
    woken = ["wake_up ['weights']", *handed, "wake_up ['kv_cache']", "sleep 2"]
    assert vllm_double.started[0].calls == [*handed, "sleep 2", *woken]


TAMPERED = {
    "a stale head": lambda name, tensor: tensor * (0.8 if name == "lm_head.weight" else 1.0),
    "a scaled matrix": lambda name, tensor: tensor * (1.02 if name.endswith("1.mlp.down_proj.weight") else 1.0),
    "nothing finite": lambda name, tensor: tensor * torch.nan,
}


@pytest.mark.parametrize("how", TAMPERED)
def test_other_weights_stop_the_run(vllm_double, how):
    model = some_model()
    engine = engine_for(model)
    engine.sample(request(model))
    vllm_double.started[0].tamper = TAMPERED[how]
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    with pytest.raises(EngineError, match=r"not sample from the weights that are trained: its log-probs of"):
        engine.sample(request(model))


def test_a_model_that_is_not_finite_is_no_mismatch(vllm_double):
    model = some_model()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(torch.nan)
    engine_for(model).sample(request(model))


def test_what_it_does_not_support():
    model = some_model()
    engine = engine_for(model)
    assert engine.supports(request(model, prompt=(7,))) == (True, "")
    assert engine.supports(request(model, prompt=(-1,))) == (False, "its delimiters have no vocabulary ids")
    assert engine.supports(request(model, 2.5)) == (False, "temperature 2.5 is above 2")
    with pytest.raises(ValueError, match="vLLM does not support this rollout: its delimiters"):
        engine.sample(request(model, prompt=(-1,)))
