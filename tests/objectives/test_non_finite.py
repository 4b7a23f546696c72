"""A weight that is nan before thoughts are sampled: they are sampled, and the loss or its gradient is not finite."""

from __future__ import annotations

import pytest
import torch

from models.philox import Rng
from models.rollout import EAGER, Native, Preferred
from models.rollout.native import compiler
from objectives import QuietStar, QuietStarConfig, Rlp, RlpConfig, Rpt, RptConfig, Template
from objectives.driver import Step
from tests.helpers import packed_text, tiny_model

RLP, RPT = dict(length=4, thoughts=3), dict(length=4, thoughts=3, template="forced", answer_length=2)
BYTES = [b"ab"[token % 2 :][:1] for token in range(61)]
ENGINES = [EAGER, pytest.param(Preferred(Native(), EAGER), marks=pytest.mark.skipif(not compiler(), reason="no C++"))]


@pytest.mark.parametrize("engine", ENGINES, ids=["eager", "native"])
@pytest.mark.parametrize(
    "objective",
    [
        QuietStar(QuietStarConfig(length=3, lookahead=2)),
        *(Rlp(RlpConfig(positions=p, **RLP), Template((7,), (9,))) for p in ("random", "band", "entropy")),
        Rpt(RptConfig(drop_zero_variance_from=0, **RPT), (7,), (9,), BYTES),
    ],
    ids=lambda objective: f"{objective.config.name} {getattr(objective.config, 'positions', '')}",
)
@pytest.mark.parametrize("poisoned", ["embed_tokens", "layers.1.mlp.down_proj"])
def test_a_poisoned_model_thinks_and_its_step_is_not_finite(objective, engine, poisoned):
    """Of the embedding, one token's: only the document that holds it is lost."""
    model = tiny_model(torch.float32, width=32, ffn_width=48, head_dim=16)
    source = packed_text([[9, 6], [15]], 15)
    source.tokens_BN[source.tokens_BN == 5] = 6
    source.tokens_BN[1, 0] = 5
    with torch.no_grad():
        model.decoder.get_parameter(f"{poisoned}.weight")[5] = float("nan")
    total = torch.zeros(())
    for output in Step(objective, model, [source], Rng(3, 1), engine).losses():
        output.loss.backward()
        total = total + output.loss.detach()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert not (total.isfinite() and norm.isfinite())
