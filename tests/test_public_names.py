"""The names that other code may import; taking one away breaks somebody."""

from __future__ import annotations

import importlib

import pytest

NAMES = {
    "checkpoints": """CheckpointError config_from_hf config_to_hf export find_checkpoint load_checkpoint load_decoder
        load_thinking_model newest_checkpoint prune resolve save_checkpoint""",
    "data_pipelines": """DataConfig DataError Documents PackedText SourceConfig StreamText Tokenizer open_data
        packed_rows""",
    "models": """EAGER END PAD START Anchors Decoder DecoderConfig Eager Engine Ledger Native Prediction Preferred
        Recorded Rng Rollout RolloutRequest Text TextState ThinkingModel Thoughts Trunk most_probable token_entropies
        token_logprobs""",
    "objectives": """Batch Bodies CounterfactualTest Mean Metric NextToken NextTokenConfig Objective ObjectiveConfig
        Pause PauseConfig QuietStar QuietStarConfig Rlp RlpConfig Rpt RptConfig SettingError Step StepOutput Template
        Term TextPart ThoughtPart ThoughtRecord ThoughtState TokenScores find_objective setting""",
}


@pytest.mark.parametrize("package", NAMES)
def test_public_names(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(NAMES[package].split())
    assert all(hasattr(module, name) for name in module.__all__)
