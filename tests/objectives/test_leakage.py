"""What a document says changes nothing of another one's, bit for bit: as rows are streamed, or cut from a tokenised
copy, and in all that an objective makes of them.

Shapes as in the objectives.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines import DataConfig, StreamText, Tokenizer, open_data
from models.philox import Rng
from models.rollout import EAGER, Engine, Native
from models.rollout.native import compiler
from models.thinking import ThinkingModel
from models.thoughts import PAD, Anchors, Text
from objectives import NextToken, Objective, QuietStarConfig, RlpConfig, RptConfig, find_objective
from objectives.base import ThoughtState
from objectives.driver import Sampled
from objectives.policy import PolicyConfig
from tests.data_pipelines.conftest import byte_level, save
from tests.data_pipelines.streams import documents
from tests.helpers import tiny_model

SOURCES = {
    "concatenate": {"stream": True, "lanes": 2},
    "best_fit": {"stream": True, "lanes": 2, "packing": "best_fit"},
    "packed": {"stream": False},
}
ANCHORED = {"open": "<[", "close": "]", "temperature": 3.0, "min_prefix": 2, "anchors_per_document": 2, "length": 9}
IN_PARTS = {"anchors_at_once": 20, "sampled_at_once": 30}
CONFIGS = {
    "next_token": NextToken.Config(),
    "quiet_star": QuietStarConfig(length=3, lookahead=3, thoughts=2),
    "quiet_star in parts": QuietStarConfig(length=3, lookahead=3, thoughts=2, **IN_PARTS),
    "rlp": RlpConfig(thoughts=3, horizon=2, next_token_weight=0.1, kl_weight=0.1, **ANCHORED),
    "rlp in parts": RlpConfig(thoughts=3, positions="entropy", anchors_at_once=2, sampled_at_once=3, **ANCHORED),
    "rpt": RptConfig(thoughts=3, hard_entropy=0.5, template="forced", answer_length=3, box_open="[", **ANCHORED),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.from_directory(save(byte_level("<end>"), directory, eos_token="<end>"))


def texts(keys: dict, tokenizer: Tokenizer, directory: Path) -> tuple[Text, Text, Tensor]:
    """Rows, the same with one document changed, and where that is, bool [B, N]."""
    written = [text[: 10 + 4 * n] for n, text in enumerate(documents(12))]
    # As long as it was, since every digit is a token.
    other = [*written[:6], "".join(str((int(c) + 1) % 10) if c.isdigit() else c for c in written[6]), *written[7:]]
    found = []
    for name, said in (("before", written), ("after", other)):
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
        config = DataConfig(reference=str(path), length=64, held_out=0.0, **keys)
        packed = open_data(config, tokenizer, 3, directory / "cache")
        assert isinstance(packed, StreamText) == keys["stream"]
        found.append(packed.rows(0, 60))
    before, after = (Text(**rows) for rows in found)
    changed_BN = torch.zeros_like(before.document_BN, dtype=torch.bool)
    for row, start, end in before.spans:
        changed_BN[row, start:end] = (before.tokens_BN != after.tokens_BN)[row, start:end].any()
    beside_BN = (before.document_BN >= 0) & ~changed_BN
    both_B = changed_BN.any(dim=1) & beside_BN.any(dim=1)
    rows = [*both_B.nonzero()[:3, 0].tolist(), *(~changed_BN.any(dim=1)).nonzero()[:2, 0].tolist()]
    assert len(rows) == 5
    before, after = (Text(**{name: x[rows] for name, x in part.items()}) for part in found)
    for name in ("document_BN", "position_BN", "sample_id_B"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    return before, after, changed_BN[rows]


@torch.no_grad()
def everything(objective: Objective, model: ThinkingModel, text: Text, engine: Engine) -> dict[str, Tensor]:
    """What the objective computes at each position of a text, [B, N, …] by name; −7 where it computes nothing."""
    B, N = text.shape
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, axis: int, anchors: Anchors) -> None:
        x_BM = x.movedim(axis, 1)
        place_BM = torch.where(anchors.index_BM >= 0, anchors.index_BM, N)
        held_BN = found.get(name, x_BM.new_full((B, N, *x_BM.shape[2:]), -7))
        at = place_BM.view(B, -1, *[1] * (x_BM.ndim - 2)).expand_as(x_BM)
        found[name] = torch.cat([held_BN, held_BN[:, :1]], dim=1).scatter(1, at, x_BM)[:, :N]

    rng, state = Rng(5, 2), model.read(text)
    found["logits"] = state.hidden_BNW @ model.head_weight_VW.T
    batch = objective.sample(model, state, rng, engine)
    of_text = objective.text_terms(model, state, batch)
    for chunk in Sampled.of(objective, batch).chunks:
        whole = objective.thoughts_to_score(chunk)
        thoughts = whole.trimmed()
        hidden_BKSMW = model.think(thoughts, state)
        record = objective.thought_terms(model, state, chunk, ThoughtState(thoughts, hidden_BKSMW), of_text).record
        # What stands behind a thought's end is nothing.
        S = whole.tokens_BKSM.shape[2]
        logits_BKSMV = F.pad(hidden_BKSMW @ model.head_weight_VW.T, (0, 0, 0, 0, 0, S - hidden_BKSMW.shape[2]))
        add("thoughts", whole.tokens_BKSM, 3, chunk.anchors)
        logits_BKSMV = logits_BKSMV.masked_fill((whole.tokens_BKSM == PAD)[..., None], 0)
        add("logits of thoughts", logits_BKSMV, 3, chunk.anchors)
        add("rewards", record.reward_BKM, 2, chunk.anchors)
        add("advantages", record.advantage_BKM, 2, chunk.anchors)
        if (rollout := getattr(chunk, "rollout", None)) is not None:
            add("sampled log-probs", rollout.logprobs_BKSM, 3, chunk.anchors)
    scores = objective.evaluate(model, text, rng, engine)
    found["evaluation of the text"] = scores.text_nll_BN
    if scores.thought_nll_BN is not None:
        found["evaluation with thoughts"] = scores.thought_nll_BN
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_changes_nothing_of_another(source, name, tokenizer, tmp_path, monkeypatch):
    # Thoughts in one piece: how a product rounds a row depends on how many others there are.
    monkeypatch.setattr("models.thoughts.EVEN", 0.0)
    before, after, changed_BN = texts(SOURCES[source], tokenizer, tmp_path)
    others_BN = (before.document_BN >= 0) & ~changed_BN
    model = tiny_model(torch.float32, vocab_size=320, width=32, ffn_width=64, head_dim=16)
    # Few tokens, so that some thoughts end early and some not at all.
    spelled = {id for ids in tokenizer.encode(list("0123456789] ")) for id in ids}
    model.ban(tokenizer.size, tuple(set(range(tokenizer.size)) - spelled))
    native = [Native()] if isinstance(CONFIGS[name], PolicyConfig) and compiler() else []
    for engine in (EAGER, *native):
        objective = find_objective(CONFIGS[name].name).build(CONFIGS[name], tokenizer)
        was, now = (everything(objective, model, text, engine) for text in (before, after))
        assert was.keys() == now.keys()
        assert [key for key in was if not torch.equal(was[key][others_BN], now[key][others_BN])] == []
        # Advantages and RPT's rewards may be the same by chance.
        same = {key for key in was if torch.equal(was[key][changed_BN], now[key][changed_BN])}
        assert same <= {"rewards", "advantages"}
