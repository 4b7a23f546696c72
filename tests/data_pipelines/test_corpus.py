import json
import math
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipelines import DataConfig, DataError, Tokenizer, open_data
from data_pipelines.corpus import tokenised
from data_pipelines.sources import Documents
from tests.data_pipelines.conftest import byte_level, save

ROWS = [
    "The cat sat.",
    "",
    "a <|endoftext|> b <|startofthought|>",
    "nul \0",
    "one two three four five six",
    "x\ny",
]


@pytest.fixture
def config(tmp_path) -> DataConfig:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    return DataConfig(reference=str(tmp_path / "x.jsonl"), max_document_characters=20)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def texts(corpus, tokenizer) -> list[str]:
    spans = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    return [tokenizer.decode(corpus.tokens_T[start:stop].tolist()) for start, stop in spans]


def test_documents_end_with_eos_and_keep_all_their_text(config, cache, tokenizer):
    corpus = tokenised(config, tokenizer, cache)
    assert texts(corpus, tokenizer) == [ROWS[n] + "<|endoftext|>" for n in (0, 2, 4, 5)]
    assert (corpus.tokens_T == tokenizer.eos_id).sum() == 4
    assert not (corpus.tokens_T == tokenizer.token_id("<|startofthought|>")).any()
    assert (corpus.tokens_T.dtype, corpus.offsets.dtype, corpus.hash_D.dtype) == (
        np.uint32,
        np.int64,
        np.uint64,
    )
    assert corpus.counts == {
        "documents": 4,
        "empty": 1,
        "binary": 1,
        "not_utf8": 0,
        "enormous": 2,
        "control_text": 1,
        "oversized": 0,
        "filtered": 0,
        "duplicate": 0,
        "held_out": 0,
        "broken": 0,
    }


def test_enormous_documents_are_cut_before_whitespace(tmp_path, cache, tokenizer):
    text = "word " * 50 + "y" * 60 + "\n\nend"
    (tmp_path / "x.txt").write_text(text)
    reference = str(tmp_path / "x.txt")
    cut = tokenised(DataConfig(reference=reference, max_document_characters=16), tokenizer, cache)
    assert texts(cut, tokenizer) == [text + "<|endoftext|>"]
    assert (cut.counts["documents"], cut.counts["enormous"]) == (1, 1)
    whole = tokenised(DataConfig(reference=reference), tokenizer, cache)
    words = tokenizer.encode(["word" + " word" * 49])[0]
    assert cut.tokens_T[: len(words)].tolist() == whole.tokens_T[: len(words)].tolist() == words
    assert whole.counts["enormous"] == 0


MEMORY = """
import resource, sys
from pathlib import Path
from data_pipelines import DataConfig, Tokenizer
from data_pipelines.corpus import tokenised
tokenizer = Tokenizer.from_directory(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenised(DataConfig(reference=sys.argv[2]), tokenizer, Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_single_long_line_takes_memory_for_its_text_not_for_its_tokens(tmp_path, cache, tokenizer_directory):
    """12 MB in one line: the encodings of its 12 million tokens would take 2.8 GB. Those of a million take their part,
    once for every thread that has made some."""
    (tmp_path / "x.txt").write_text("xy " * 4_000_000)
    command = [sys.executable, "-c", MEMORY, str(tokenizer_directory), str(tmp_path / "x.txt"), str(cache)]
    grown = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout) * 1024
    assert grown < 750e6, grown


def test_bos_and_another_end_of_document(config, cache, tmp_path):
    directory = save(byte_level("<s>", "<end>"), tmp_path / "tokenizer", bos_token="<s>", add_bos_token=True)
    tokenizer = Tokenizer.from_directory(directory)
    corpus = tokenised(DataConfig(reference=config.reference, end_of_document="<end>"), tokenizer, cache)
    assert texts(corpus, tokenizer) == [f"<s>{ROWS[n]}<end>" for n in (0, 2, 4, 5)]
    with pytest.raises(DataError, match=r"^the tokenizer has no eos token; set data.end_of_document"):
        tokenised(config, tokenizer, cache)
    with pytest.raises(DataError, match=r"^the tokenizer has no token '<fin>'; set data.end_of_document"):
        tokenised(DataConfig(reference=config.reference, end_of_document="<fin>"), tokenizer, cache)


def test_cached_corpus_is_the_fresh_one(config, cache, tokenizer, monkeypatch):
    fresh = tokenised(config, tokenizer, cache)
    tokens, counts = fresh.tokens_T.tolist(), dict(fresh.counts)

    monkeypatch.setattr(Tokenizer, "encode", None)  # the cache has no use for it
    cached = tokenised(config, tokenizer, cache)
    assert cached.tokens_T.tolist() == tokens
    assert cached.offsets.tolist() == fresh.offsets.tolist()
    assert cached.hash_D.tolist() == fresh.hash_D.tolist()
    assert dict(cached.counts) == counts
    assert cached.fingerprint == fresh.fingerprint
    assert isinstance(cached.tokens_T, np.memmap)


def test_cache_is_found_through_the_environment(config, cache, tokenizer, monkeypatch):
    monkeypatch.setenv("FORETHOUGHT_CACHE", str(cache))
    assert tokenised(config, tokenizer).directory.is_relative_to(cache)


@pytest.mark.parametrize(("old", "new"), [("cat", "dog"), ("cat", "long-haired cat")])
def test_a_changed_file_is_read_again(config, cache, tokenizer, old, new):
    first = tokenised(config, tokenizer, cache)
    file = Path(config.reference)
    file.write_text(file.read_text().replace(old, new))
    os.utime(file, (0, 0))
    second = tokenised(config, tokenizer, cache)
    assert texts(second, tokenizer)[0] == f"The {new} sat.<|endoftext|>"
    assert second.fingerprint != first.fingerprint


def test_fingerprint_is_of_the_content_not_of_the_file(config, cache, tokenizer, tmp_path):
    first = tokenised(config, tokenizer, cache)
    os.rename(config.reference, tmp_path / "moved.jsonl")
    os.utime(tmp_path / "moved.jsonl", (0, 0))
    moved = tokenised(DataConfig(reference=str(tmp_path / "moved.jsonl"), max_document_characters=20), tokenizer, cache)
    assert moved.directory != first.directory
    assert moved.fingerprint == first.fingerprint


CHANGES = [{"max_document_characters": 2}, {"end_of_document": "<|startofthought|>"}]


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_change_tokens_have_a_cache_of_their_own(config, cache, tokenizer, change):
    first = tokenised(config, tokenizer, cache)
    second = tokenised(DataConfig(**{**config.model_dump(), **change}), tokenizer, cache)
    assert second.directory != first.directory
    assert second.fingerprint != first.fingerprint


def test_concurrent_builders_agree(config, cache, tokenizer):
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(lambda _: tokenised(config, tokenizer, cache), range(8)))
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert [entry.name for entry in (cache / "corpora").iterdir()] == [corpora[0].directory.name]


def test_a_failed_build_leaves_nothing(tmp_path, cache, tokenizer):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    config = DataConfig(reference=str(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match="line 2"):
        tokenised(config, tokenizer, cache)
    assert list((cache / "corpora").iterdir()) == []
    skipping = tokenised(DataConfig(reference=config.reference, skip_broken=True), tokenizer, cache)
    assert (skipping.counts["documents"], skipping.counts["broken"]) == (1, 1)


def test_no_usable_document(tmp_path, cache, tokenizer):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": "\\u0000"}\n')
    with pytest.raises(DataError, match=r"has no usable documents \(1 empty, 1 binary\); choose other data$"):
        tokenised(DataConfig(reference=str(tmp_path)), tokenizer, cache)


def test_damaged_cache_is_named(config, cache, tokenizer):
    directory = tokenised(config, tokenizer, cache).directory
    os.truncate(directory / "tokens.npy", 140)
    with pytest.raises(DataError, match=rf"^the token cache {directory} is damaged [^\n]*; delete it$"):
        tokenised(config, tokenizer, cache)


def test_unwritable_cache_is_named(config, tmp_path, tokenizer):
    (tmp_path / "file").write_text("where a directory should be")
    with pytest.raises(DataError, match=r"^the token cache [^\n]* cannot be written [^\n]*FORETHOUGHT_CACHE"):
        tokenised(config, tokenizer, tmp_path / "file")


def test_pickles_without_its_tokens(config, cache, tokenizer):
    """As it goes to the workers of a data loader that are not forked."""
    corpus = tokenised(config, tokenizer, cache)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).tokens_T.tolist() == corpus.tokens_T.tolist()


def test_settings_are_all_reported_at_once():
    wrong = dict(reference="", length=1, text_field="", held_out=math.nan, max_document_characters=0, skip_broken=1)
    with pytest.raises(ValidationError) as caught:
        DataConfig(**wrong, unknown=0)
    assert sorted(error["loc"] for error in caught.value.errors()) == sorted((name,) for name in [*wrong, "unknown"])


@pytest.mark.parametrize("wrong", [{"length": 2.0}, {"length": "2"}, {"held_out": -0.01}, {"held_out": 0.51}])
def test_settings_at_their_limits(wrong):
    assert DataConfig(reference="x", length=2, text_field="x", held_out=0.5, max_document_characters=1).length == 2
    assert DataConfig(held_out=0).held_out == 0
    with pytest.raises(ValidationError):
        DataConfig(**wrong)


def test_settings_describe_themselves_and_stay_as_they_are():
    assert all(field.description for field in DataConfig.model_fields.values())
    with pytest.raises(ValidationError):
        DataConfig().length = 3


def test_python_docs(tokenizer, cache):
    packed = open_data(DataConfig(), tokenizer, seed=0, cache_dir=cache)
    corpus = packed.corpus
    every = texts(corpus, tokenizer)
    assert packed.counts["documents"] == len(every) > 500
    assert sum(map(len, every)) > 1_000_000
    assert any(text.startswith("argparse\nCommand-line parsing library") for text in every)
    read_again = Documents(DataConfig())
    assert every == [text + "<|endoftext|>" for _, text in read_again]
    held_out = packed.held_out_rows(10**6)["document_BN"] >= 0
    assert 0.02 <= held_out.sum().item() / len(corpus.tokens_T) < 0.1
