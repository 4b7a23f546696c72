import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch

from data_pipelines import DataConfig, open_data
from data_pipelines.corpus import tokenised
from data_pipelines.packing import CorpusText

LENGTH = 7
FIRST_DOCUMENTS = {  # of an epoch, by (seed, epoch)
    (0, 0): [0, 38, 21, 2, 11, 20],
    (0, 1): [17, 34, 31, 22, 39, 16],
    (1, 0): [3, 5, 24, 27, 26, 2],
    (2**40, 3): [17, 15, 14, 20, 25, 12],
}


def write(path, documents) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory):
    """40 documents of 2 to 21 tokens, all different."""
    folder = tmp_path_factory.mktemp("packing")
    documents = ["".join(chr(ord("A") + (7 * n + k) % 50) for k in range(n // 2 + 1)) for n in range(40)]
    return tokenised(DataConfig(reference=write(folder / "x.jsonl", documents)), tokenizer, folder)


def packed(corpus, length=LENGTH, held_out=0.0, seed=0) -> CorpusText:
    return CorpusText(corpus, length, held_out, seed)


def documents(corpus) -> list[list[int]]:
    """The token lists of all documents, each ending with its eos."""
    return [part.tolist() for part in np.split(np.asarray(corpus.tokens_T), corpus.offsets[1:-1])]


def stream(text: CorpusText, tokens: int) -> list[int]:
    """The first tokens of the endless stream, by way of its rows."""
    rows = text.rows(0, -(-tokens // text.length))
    return rows["tokens_BN"].flatten().tolist()[:tokens]


def apart(tokens: list[int], end: int) -> list[tuple[int, ...]]:
    """Cuts a stream after every end-of-document token."""
    ends = [n + 1 for n, token in enumerate(tokens) if token == end]
    assert ends[-1] == len(tokens)
    return [tuple(tokens[start:stop]) for start, stop in zip([0, *ends], ends, strict=False)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert list(a) == list(b) == ["tokens_BN", "document_BN", "position_BN", "sample_id_B"]
    assert {tensor.dtype for tensor in [*a.values(), *b.values()]} == {torch.int64}
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("length", [2, 7, 64, 1000])
def test_every_epoch_holds_every_token_once(corpus, tokenizer, length):
    """Rows longer than an epoch included."""
    text = packed(corpus, length)
    T = text.tokens_per_epoch
    every = Counter(map(tuple, documents(corpus)))
    assert T == len(corpus.tokens_T) == sum(map(len, every.elements()))
    tokens = stream(text, 3 * T)
    epochs = [apart(tokens[n * T : (n + 1) * T], tokenizer.eos_id) for n in range(3)]
    assert [Counter(epoch) for epoch in epochs] == [every] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_rows_are_a_pure_function(corpus):
    text = packed(corpus)
    expected = text.rows(7, 3)
    single = [packed(corpus).rows(row, 1) for row in (7, 8, 9)]
    assert same(expected, {name: torch.cat([row[name] for row in single]) for name in expected})
    text.rows(5000, 2)
    text.rows(60, 1)
    assert same(text.rows(7, 3), expected)
    assert same(pickle.loads(pickle.dumps(text)).rows(7, 3), expected)
    assert expected["sample_id_B"].tolist() == [7, 8, 9]
    assert same(text.batch(4, 6), text.rows(24, 6))
    assert text.rows(3, 0)["tokens_BN"].shape == (0, LENGTH)


@pytest.mark.parametrize(("seed", "epoch"), FIRST_DOCUMENTS)
def test_order_is_stable(corpus, tokenizer, seed, epoch):
    """A change of this order would silently break every run that is continued."""
    text = packed(corpus, length=1, seed=seed)
    T = text.tokens_per_epoch
    documents_in_order = apart(text.rows(epoch * T, T)["tokens_BN"].flatten().tolist(), tokenizer.eos_id)
    own = list(map(tuple, documents(corpus)))
    assert [own.index(document) for document in documents_in_order[:6]] == FIRST_DOCUMENTS[seed, epoch]


def test_fragments_and_positions(corpus):
    """Against a walk along the stream token by token."""
    text = packed(corpus)
    count = 3 * text.tokens_per_epoch // LENGTH
    rows = text.rows(0, count)
    ended = False
    for row in range(count):
        document = position = 0
        for n, token in enumerate(rows["tokens_BN"][row].tolist()):
            if n and ended:
                document, position = document + 1, 0
            assert rows["document_BN"][row, n] == document
            assert rows["position_BN"][row, n] == position
            position += 1
            ended = token == 0


@pytest.mark.parametrize("share", [1e-9, 0.02, 0.3, 0.5])
def test_held_out_documents_are_whole_and_apart(corpus, tokenizer, share):
    text = packed(corpus, held_out=share)
    held = text.held_out_rows(10**6)
    real = held["document_BN"] >= 0
    kept = apart(held["tokens_BN"][real].tolist(), tokenizer.eos_id)
    trained = apart(stream(text, text.tokens_per_epoch), tokenizer.eos_id)
    total = len(corpus.tokens_T)
    assert Counter(kept) + Counter(trained) == Counter(map(tuple, documents(corpus)))
    assert not set(kept) & set(trained)
    assert share * total - 21 * (share == 0.5) <= real.sum() <= min(share * total + 21, total / 2)
    assert kept

    assert held["sample_id_B"].tolist() == list(range(len(real)))
    assert real[:-1].all()
    padding = ~real[-1]
    assert padding.sum() == -real.sum() % LENGTH
    assert not real[-1, LENGTH - padding.sum() :].any()
    for name, value in (("tokens_BN", 0), ("position_BN", 0), ("document_BN", -1)):
        assert (held[name][-1, padding] == value).all()
    # Fragments of a document have its number, and no other's.
    numbers, document = text.held_out_documents(10**6), {}
    assert torch.equal(numbers >= 0, real)
    for number in numbers[real].unique().tolist():
        document[number] = tuple(held["tokens_BN"][numbers == number].tolist())
    assert sorted(document.values()) == sorted(kept)
    assert same(text.held_out_rows(1), {name: tensor[:1] for name, tensor in held.items()})


def test_held_out_documents_do_not_depend_on_the_seed(corpus):
    one, other = (packed(corpus, held_out=0.2, seed=seed) for seed in (0, 1))
    assert same(one.held_out_rows(99), other.held_out_rows(99))
    assert not same(one.rows(0, 9), other.rows(0, 9))


def test_nothing_held_out(corpus):
    assert packed(corpus).held_out_rows(9)["tokens_BN"].shape == (0, LENGTH)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["ABCDEFGHIJ"], "IJ<|endoftext|>"),
        (["x"], "<|endoftext|>"),
        (["ABCDEF", "ABCDEF", "ABCDEF"], "EF<|endoftext|>"),
        (["ABCDEFGHIJKLMNOPQRS", "z"], "z<|endoftext|>"),
        (["z", "ABCDEFGHIJKLMNOPQRS"], "z<|endoftext|>"),
    ],
    ids=["one", "one of two tokens", "copies of one", "long and short", "short and long"],
)
def test_held_out_of_few_texts(tmp_path, tokenizer, texts, expected):
    """The tail where there is one text; never most of the tokens, whatever the hashes are."""
    config = DataConfig(reference=write(tmp_path / "x.jsonl", texts), length=2, held_out=0.2)
    text = open_data(config, tokenizer, seed=0, cache_dir=tmp_path)
    held = text.held_out_rows(99)
    kept = held["tokens_BN"][held["document_BN"] >= 0].tolist()
    assert tokenizer.decode(kept) == expected
    assert Counter(kept + stream(text, text.tokens_per_epoch)) == Counter(text.corpus.tokens_T.tolist())


def test_held_out_text_that_the_training_text_has_as_well_is_said(tmp_path, tokenizer, caplog):
    """Against a search for every stretch in the training text, document by document."""
    draw = random.Random(0)
    pages = [" ".join(draw.choice(["cat", "dog", "mat", "sat", "ran"]) for _ in range(200)) for _ in range(30)]
    # Copies that differ in a word, which equal hashes of whole texts do not show.
    for name, texts in (("copies", [*pages, *(f"copy {text}" for text in pages)]), ("apart", pages)):
        reference = write(tmp_path / f"{name}.jsonl", texts)
        caplog.clear()
        text = open_data(DataConfig(reference=reference, held_out=0.1), tokenizer, 0, tmp_path / "cache")
        tokens = text.corpus.tokens_T.tolist()
        train, held = (
            [tokens[start:stop] for start, stop in zip(line.start_D, line.stop_D, strict=True)]
            for line in (text._train, text._held_out)
        )
        stretches = [ids[n : n + 32] for ids in held for n in range(0, len(ids) - 31, 32)]
        there = {tuple(ids[n : n + 32]) for ids in train for n in range(len(ids) - 31)}
        expected = sum(tuple(ids) in there for ids in stretches), len(stretches)
        assert text.repeated() == expected
        said = f"{expected[0]} of the held-out text's {expected[1]} stretches of 32 tokens"
        assert [m[: len(said)] for m in caplog.messages] == ([said] if name == "copies" else [])
        assert (expected[0] > 0) == (name == "copies")


def test_copies_of_a_text_stay_together(tmp_path, tokenizer):
    texts = [f"text {n % 10}" for n in range(40)]
    config = DataConfig(reference=write(tmp_path / "x.jsonl", texts), length=5, held_out=0.12)
    text = open_data(config, tokenizer, seed=0, cache_dir=tmp_path)
    held = text.held_out_rows(99)
    kept = Counter(apart(held["tokens_BN"][held["document_BN"] >= 0].tolist(), 0))
    trained = Counter(apart(stream(text, text.tokens_per_epoch), 0))
    assert list(kept.values()) == [4, 4]
    assert len(text.held_out_documents(99).unique()) - 1 <= 2  # padding aside
    assert list(trained.values()) == [4] * 8
    assert not set(kept) & set(trained)


def test_fingerprint_is_of_all_that_rows_depend_on(corpus):
    settings = [{}, {"length": 8}, {"held_out": 0.1}, {"seed": 1}]
    assert len({packed(corpus, **setting).fingerprint for setting in settings}) == 4
    assert packed(corpus).fingerprint == packed(corpus).fingerprint
