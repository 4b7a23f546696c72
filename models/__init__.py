"""The decoder that reads text and thinks, and what thinking takes: rollouts, attention, log-probs, the FLOPs ledger."""

from models.decoder import Decoder, DecoderConfig, TextState, Trunk
from models.flops import Ledger
from models.logprobs import most_probable, token_entropies, token_logprobs
from models.philox import Rng
from models.rollout import EAGER, Eager, Engine, Native, Prediction, Preferred, Recorded, Rollout, RolloutRequest
from models.thinking import ThinkingModel
from models.thoughts import END, PAD, START, Anchors, Text, Thoughts

__all__ = [
    "EAGER",
    "END",
    "PAD",
    "START",
    "Anchors",
    "Decoder",
    "DecoderConfig",
    "Eager",
    "Engine",
    "Ledger",
    "Native",
    "Prediction",
    "Preferred",
    "Recorded",
    "Rng",
    "Rollout",
    "RolloutRequest",
    "Text",
    "TextState",
    "ThinkingModel",
    "Thoughts",
    "Trunk",
    "most_probable",
    "token_entropies",
    "token_logprobs",
]
