"""Twenty training steps of each objective on a tiny model, against committed losses.

A refactor must give the same numbers. Make the file again, and say why, with
`python -m tests.objectives.test_golden_losses`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.philox import Rng
from models.thoughts import Text
from objectives import NextToken, Objective, QuietStar, QuietStarConfig, Rlp, RlpConfig, Rpt, RptConfig, Template
from tests.helpers import packed_text, step_of, tiny_model

FILE = Path(__file__).parent.parent / "golden" / "losses.json"
STEPS = 20
OBJECTIVES: dict[str, Objective] = {
    "next_token": NextToken(),
    "quiet_star": QuietStar(QuietStarConfig(length=3, lookahead=2, thoughts=2)),
    "rlp": Rlp(RlpConfig(length=6, thoughts=4, next_token_weight=0.1), Template((1, 2), (3,))),
    "rpt": Rpt(
        RptConfig(
            length=5,
            thoughts=6,
            temperature=2.0,
            template="forced",
            answer_length=2,
            hard_entropy=0.1,
            drop_zero_variance_from=9,
        ),
        open_ids=(1, 2),
        close_ids=(3,),
        token_bytes=[b"ab"[token % 2 :][:1] for token in range(61)],
    ),
}


def losses(objective: Objective) -> dict[str, list[float]]:
    """The loss and every metric of each step.

    In fp64, so that another machine's order of summation changes neither a draw nor a compared digit.
    """
    model = tiny_model(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    recorded: dict[str, list[float]] = {}
    for step in range(STEPS):
        text = packed_text([[9, 5, 2], [16]], 16, seed=step)
        text = Text(text.tokens_BN % 7, text.document_BN, text.position_BN, text.sample_id_B + 2 * step)
        output = step_of(objective, model, text, Rng(0, step))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        objective.after_step(model)
        for key, value in {"loss": output.loss, **{k: m.sum / m.count for k, m in output.metrics.items()}}.items():
            recorded.setdefault(key, []).append(value.item())
    return recorded


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_the_committed_ones(name):
    committed = json.loads(FILE.read_text())[name]
    got = losses(OBJECTIVES[name])
    assert got.keys() == committed.keys()
    for key in committed:
        assert got[key] == pytest.approx(committed[key], rel=1e-9, abs=1e-12, nan_ok=True), key


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: losses(objective) for name, objective in OBJECTIVES.items()}, indent=1) + "\n")
