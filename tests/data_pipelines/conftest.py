import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from data_pipelines import Tokenizer
from data_pipelines.lab import write_tokenizer

SAMPLE = [
    "The cat sat on the mat, and the dog ran after the cat.",
    "def add(a, b):\n    return a <| b |> a\n",
]


def byte_level(*special: str) -> Backend:
    """A byte-level BPE tokenizer; the first special token is in its vocabulary, others are added."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        SAMPLE * 3,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=[special[0]], initial_alphabet=alphabet, show_progress=False
        ),
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[1:]])
    return backend


def save(backend: Backend, directory: Path, **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory) -> Path:
    """With all that must be ignored: a post-processor that adds tokens, truncation and padding."""
    backend = byte_level("<|endoftext|>", "<|startofthought|>")
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=4, pad_id=5, pad_token="%")
    directory = tmp_path_factory.mktemp("tokenizer")
    return save(backend, directory, eos_token={"content": "<|endoftext|>"}, bos_token=None)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory) -> Tokenizer:
    return Tokenizer.from_directory(tokenizer_directory)


@pytest.fixture(scope="session")
def lab_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lab")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def lab_tokenizer(lab_directory) -> Tokenizer:
    return Tokenizer.from_directory(lab_directory)
