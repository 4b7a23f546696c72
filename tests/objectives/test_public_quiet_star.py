"""Parity with the public Quiet-STaR code (ezelikman/quiet-star at 892446b): recorded weights, inputs, sampled tokens,
cross-entropies, rewards, advantages, losses and every parameter's gradient, for three tiny cases.

The files are float32 and carry that rounding: recomputed in float64 they agree to 7e-6 on rewards and 2.4e-6 on each
gradient tensor, hence the tolerances (2e-5 absolute on cross-entropies and rewards, 1e-5 relative L2 on gradients).

case1: N = 6, T = 2, one thought. case2: N = 8, T = 4, two thoughts. case3: case2 with a padded row.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.decoder import Decoder, DecoderConfig
from models.logprobs import token_logprobs
from models.thinking import ThinkingModel
from models.thoughts import START, Anchors, Text, Thoughts
from objectives import Batch, QuietStar, QuietStarConfig
from tests.helpers import relative_error, scored

GOLDEN = Path(__file__).parent.parent / "golden" / "quiet_star"
CONFIG = DecoderConfig(
    vocab_size=96,
    width=32,
    ffn_width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=4096,
    rms_norm_eps=1e-5,
    family="mistral",
)
W = CONFIG.width
ABSOLUTE, GRADIENT = 2e-5, 1e-5


def named_as_here(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The file's tensors under `prefix` by the names of a ThinkingModel."""
    own = {name.removeprefix(prefix): tensor for name, tensor in recorded.items() if name.startswith(prefix)}
    first = own["talk_head.0.0.weight"]
    named = {
        "decoder." + name.removeprefix("model."): tensor
        for name, tensor in own.items()
        if name.startswith(("model.", "lm_head"))
    }
    return named | {
        "mixing_head.from_text.weight": first[:, :W],
        "mixing_head.from_thought.weight": first[:, W:],
        "mixing_head.from_thought.bias": own["talk_head.0.0.bias"],
        "mixing_head.hidden.weight": own["talk_head.0.2.weight"],
        "mixing_head.hidden.bias": own["talk_head.0.2.bias"],
        "mixing_head.out.weight": own["talk_head.0.4.weight"],
        "delimiters.start_W": own["start_embedding"][0],
        "delimiters.end_W": own["end_embedding"][0],
    }


class Case:
    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.recorded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        N, T, self.K = (int(metadata[key]) for key in ("N", "T", "P"))
        self.model = ThinkingModel(Decoder(CONFIG), delimiters=True, mixing_head=True)
        self.model.load_state_dict(named_as_here(self.recorded, "param."))
        self.model.ban(tokenizer_size=94, control_ids=())
        self.objective = QuietStar(QuietStarConfig(n_ahead=N, n_ahead_talk=T, thoughts=self.K, variant="public_code"))
        ids, real = self.recorded["input_ids"], self.recorded["attention_mask"].bool()
        self.B, self.N = ids.shape
        position = torch.arange(self.N).expand(self.B, -1) * real
        self.text = Text(ids, torch.where(real, 0, -1), position, torch.arange(self.B))
        sampled = self.recorded["thought_tokens"].view(self.B, self.K, self.N, -1).transpose(2, 3)
        start = torch.full((self.B, self.K, 1, self.N), START)
        self.thoughts = Thoughts(torch.cat([start, sampled], dim=2), Anchors.everywhere(self.text))

    def score(self, objective: QuietStar):
        self.model.zero_grad()
        batch = Batch(self.thoughts)
        output = scored(objective, self.model, self.model.read(self.text), batch, objective.counts(self.text))
        output.loss.backward()
        return output, {name: p.grad for name, p in self.model.named_parameters()}


@pytest.fixture(params=["case1", "case2", "case3"])
def case(request) -> Case:
    return Case(request.param)


def test_rewards_and_advantages(case):
    output, _ = case.score(case.objective)
    positions = case.N - 1 - case.objective.config.A
    reward = output.record.reward_BKM.flatten(0, 1)[:, :positions]
    advantage = output.record.advantage_BKM.flatten(0, 1)[:, :positions]
    assert (reward - case.recorded["reward_raw"]).abs().max() <= ABSOLUTE
    assert (advantage - case.recorded["advantage"]).abs().max() <= ABSOLUTE
    assert (output.record.advantage_BKM[:, :, positions:] == 0).all()


def test_cross_entropies(case):
    model, c = case.model, case.objective.config
    state = model.read(case.text)
    target_BN, valid_BN = case.text.targets(1)
    base = -token_logprobs(state.hidden_BNW, model.head_weight_VW, target_BN) * valid_BN
    recorded = case.recorded["base_ce"].view(case.B, case.K, -1)
    assert (base[:, None, :-1] - recorded).abs().max() <= ABSOLUTE
    end_and_true = [torch.full_like(case.thoughts.tokens_BKSM[:, :, 0], -2)]
    end_and_true += [case.text.targets(s)[0][:, None].expand(-1, case.K, -1) for s in range(1, c.A)]
    hidden = model.think(case.thoughts.followed_by(torch.stack(end_and_true, dim=2)), state)
    mixed, w = case.objective._mix(model, state.hidden_BNW, hidden[:, :, c.L + 1 :])
    for s in range(c.A):
        target_BN, valid_BN = case.text.targets(s + 1)
        targets = target_BN[:, None].expand(-1, case.K, -1)
        ce = -token_logprobs(mixed[:, :, s], model.head_weight_VW, targets) * valid_BN[:, None]
        recorded = case.recorded["talk_ce"][s].view(case.B, case.K, -1)
        assert (ce[:, :, :-1] - recorded).abs().max() <= ABSOLUTE
        w_recorded = case.recorded["mixing_weight"][c.L + 1 + s].view(case.B, case.K, -1)
        compared = valid_BN[:, None].expand_as(w_recorded)
        assert (w[:, :, s] - w_recorded)[compared].abs().max() <= ABSOLUTE


def test_losses(case):
    output, _ = case.score(case.objective)
    recorded = {name: tensor.item() for name, tensor in case.recorded.items() if tensor.numel() == 1}
    assert output.loss.item() == pytest.approx(recorded["loss_total"], rel=1e-5)
    policy = output.metrics["policy_loss"]
    assert (policy.sum / policy.count).item() == pytest.approx(recorded["policy_loss"], rel=1e-5)
    nll = output.metrics["nll_text"]
    assert (nll.sum / nll.count).item() == pytest.approx(recorded["nll_base"], abs=ABSOLUTE)
    likelihood = QuietStar(dataclasses.replace(case.objective.config, policy_weight=0.0))
    assert case.score(likelihood)[0].loss.item() == pytest.approx(recorded["loss_nll"], abs=ABSOLUTE)


@pytest.mark.parametrize("part", ["grad_nll", "grad_total"])
def test_gradients(case, part):
    weight = case.objective.config.policy_weight if part == "grad_total" else 0.0
    _, gradients = case.score(QuietStar(dataclasses.replace(case.objective.config, policy_weight=weight)))
    truth = named_as_here(case.recorded, f"{part}.")
    assert gradients.keys() == truth.keys()
    errors = {name: relative_error(gradients[name], truth[name]) for name in truth}
    assert max(errors.values()) <= GRADIENT, errors


def test_policy_gradient_alone(case):
    """(total − nll) / 1e6, so that neither part can hide the other."""
    _, total = case.score(case.objective)
    total = {name: g.clone() for name, g in total.items()}
    _, nll = case.score(QuietStar(dataclasses.replace(case.objective.config, policy_weight=0.0)))
    recorded_total, recorded_nll = (named_as_here(case.recorded, f"{p}.") for p in ("grad_total", "grad_nll"))
    for name in total:
        truth = (recorded_total[name].double() - recorded_nll[name]) / 1e6
        if truth.norm() > 0:
            assert relative_error((total[name].double() - nll[name]) / 1e6, truth) <= GRADIENT, name
