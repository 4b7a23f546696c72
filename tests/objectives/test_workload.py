"""What a step will cost, against the ledger of one that is taken."""

from __future__ import annotations

import dataclasses

import pytest

from models.flops import Ledger
from models.philox import Rng
from objectives import Objective, PauseConfig, QuietStarConfig, RlpConfig, RptConfig, Step
from tests.helpers import packed_text, tiny_model
from tests.objectives.test_memory import make

RLP = RlpConfig(length=12, thoughts=4)
RPT = RptConfig(length=9, thoughts=4, template="forced", answer_length=3, hard_entropy=0.0)
CONFIGS = {
    "next_token": None,
    "quiet_star": QuietStarConfig(length=6, lookahead=3, thoughts=2, policy_weight=10.0),
    "rlp": RLP,
    "rlp, thoughts in parts": dataclasses.replace(RLP, thoughts_at_once=2, kl_weight=0.3),
    "rlp, more terms": dataclasses.replace(
        RLP, horizon=3, kl_weight=0.3, next_token_weight=0.5, min_prefix=5, positions="entropy", entropy_quantile=0.0
    ),
    "rlp, two updates": dataclasses.replace(RLP, updates=2, kl_weight=0.3, anchors_per_document=3),
    "rlp, scored elsewhere": dataclasses.replace(RLP, scored="other"),
    "pause": PauseConfig(length=9, anchors_per_document=3, min_prefix=5),
    "rpt": RPT,
    "rpt, mixed with next-token prediction": dataclasses.replace(RPT, next_token_weight=0.5),
    "rpt, free": dataclasses.replace(RPT, template="free", positions="random", updates=2),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_costs_what_its_workload_says(config, checkpointing):
    objective: Objective = make(config)
    model = tiny_model()
    model.decoder.activation_checkpointing = checkpointing
    B, N, documents = 32, 48, 2
    text = packed_text([[N // documents] * documents] * B, N)
    with Ledger() as ledger:
        step = Step(objective, model, [text], Rng(0, 0))
        for _ in range(step.updates):
            outputs = list(step.losses())
    workload = objective.workload(N, documents)
    if (record := outputs[-1].record) is not None:
        # Some close before they must.
        workload = workload.ending_after(record.thoughts.lengths_BKM.double().mean().item() - workload.prompt)
    planned = workload.flops(model.decoder.config, checkpointing, divided=objective.thoughts_at_once is not None)
    assert {stage for stage, cost in planned.items() if cost} == {*ledger.spent}
    for stage, cost in ledger.spent.items():
        assert B * planned[stage] == pytest.approx(cost, rel=0.05), stage
    assert B * sum(planned.values()) == pytest.approx(ledger.total, rel=0.03)
