"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # heeded by torch when it is imported, and by what tests start

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoints.hugging_face import export
from checkpoints.references import resolve
from models.decoder import Decoder
from models.thinking import ThinkingModel
from tests.helpers import tiny_config
from tests.vllm_double import vllm_double  # noqa: F401 - a fixture

PROSE = """The reader thinks while it reads. A thought is a few words long, and nobody sees it but the reader.
Was it worth thinking? The next words of the text will tell: they come as less of a surprise after a good thought.
def think(text): return [word for word in text.split() if word]
"""


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """The real SmolLM2-135M, fetched by the project's own code into the user's cache."""
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> Path:
    """A tiny random llama with a byte-level tokenizer of its own, as a Hugging Face directory."""
    tokenizer_directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.save(str(tokenizer_directory / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tokenizer_directory / "tokenizer_config.json").write_text(json.dumps(names))
    decoder = Decoder(tiny_config(vocab_size=tokenizer.get_vocab_size(), max_positions=256, tie_embeddings=True))
    decoder.init_weights(torch.Generator().manual_seed(0))
    directory = tmp_path_factory.mktemp("models") / "tiny"
    export(ThinkingModel(decoder), directory, tokenizer_directory)
    return directory
