"""Streams: what is read, in which order, and that nothing but the recipe decides it."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines import DataConfig, DataError, SourceConfig, open_data
from data_pipelines.data_module import TextDataModule
from data_pipelines.encoding import text_hash
from data_pipelines.lanes import _best_fit
from data_pipelines.opening import streams
from tests.data_pipelines.streams import ROWS, check, digests, documents, open_stream, sources, write

COUNT = 400
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.fixture(scope="module")
def kinds(root) -> dict:
    return sources(root, COUNT)


@pytest.fixture
def stream(kinds, root, tokenizer):
    def opened(name: str, **more):
        return open_stream(kinds[name], tokenizer, root / "cache", **more)

    return opened


def texts(rows, tokenizer) -> Counter[str]:
    """The documents of a lane's rows, put together again."""
    ids = np.concatenate([np.concatenate(row.documents) for row in rows]).tolist()
    return Counter(tokenizer.decode(ids).split(END)[:-1])


def all_rows(text):
    """The rows of each lane up to its end."""
    for lane in range(text.config.lanes):
        rows = []
        with pytest.raises(DataError, match=r"the data ends: lane \d has read all that data.epochs"):
            rows.extend(text.lanes.lane(lane))
        yield rows


@pytest.mark.parametrize(
    "name", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "tar", "tar.gz", "lab", "best fit", "mixture"]
)
def test_ranks_workers_and_resumptions_change_nothing(stream, name):
    readers = [(1, 0), (2, 2), (4, 0)] if name == "mixture" else [(1, 0), (4, 0)]
    check(stream(name), 60, random.Random(name), 4, readers)


@pytest.mark.parametrize("name", ["jsonl", "jsonl.gz", "parquet", "tar", "best fit"])
def test_every_document_of_an_epoch_exactly_once(stream, name, tokenizer):
    length = 512 if name == "best fit" else 64  # so that best-fit packing cuts none
    text = stream(name, epochs=2, held_out=0.1, length=length)
    found = sum((texts(rows, tokenizer) for rows in all_rows(text) if rows), Counter())
    training = [t for t in documents(COUNT) if text_hash(t) >= 0.1 * 2**64]
    assert 0.8 * COUNT < len(training) < COUNT
    assert found == Counter({t: 2 for t in training})


def test_an_epoch_has_another_order(stream, tokenizer):
    (one, two) = (texts_in_order(stream("parquet", lanes=1, epochs=n, held_out=0.0), tokenizer) for n in (1, 2))
    assert one == two[: len(one)]
    assert sorted(two[: COUNT - 5]) != two[: COUNT - 5] != two[COUNT : 2 * COUNT - 5]


def texts_in_order(text, tokenizer) -> list[str]:
    (rows,) = all_rows(text)
    ids = np.concatenate([np.concatenate(row.documents) for row in rows]).tolist()
    return tokenizer.decode(ids).split(END)[:-1]


def test_shards_may_lie_elsewhere(stream, kinds, root, tokenizer, tmp_path):
    text = stream("parquet")
    expected, states = digests(text, 10)
    shutil.copytree(kinds["parquet"]["reference"], tmp_path / "elsewhere")
    moved = open_stream({"reference": str(tmp_path / "elsewhere")}, tokenizer, tmp_path / "cache")
    assert moved.fingerprint == text.fingerprint
    assert digests(moved, 20, 10, states)[0] == digests(text, 20)[0][10:]
    assert digests(moved, 10)[0] == expected


def test_a_changed_shard_is_named(stream, kinds, root, tokenizer, tmp_path):
    text = stream("jsonl")
    shutil.copytree(kinds["jsonl"]["reference"], tmp_path / "changed")
    with (tmp_path / "changed" / "001.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    changed = open_stream({"reference": str(tmp_path / "changed")}, tokenizer, tmp_path / "cache")
    assert changed.fingerprint != text.fingerprint
    assert changed.changed(text.contents) == "001.jsonl has changed"
    assert stream("parquet", lanes=4).fingerprint != stream("parquet").fingerprint


def test_the_weights_of_a_mixture_are_kept(stream):
    text = stream("mixture", lanes=2)
    module = TextDataModule(text, 200, ROWS)
    shares = []
    for batch in module.batches(0, 1):
        module.on_after_batch_transfer(batch, 0)
        counts = module.counts()
        shares.append([counts[f"{name}/tokens"] for name in ("web", "code", "lab")])
    # Weights 3 : 1 : 0.1 at the start and 1 : 1 : 0.1 from step 50 on.
    late = np.array(shares[-1]) - np.array(shares[60])
    assert np.abs(late / late.sum() - np.array([1, 1, 0.1]) / 2.1).max() < 0.02
    middle = np.array(shares[50])
    steps = np.arange(51)
    weights = np.stack([np.interp(steps, [0, 50], [3, 1]), np.ones(51), np.full(51, 0.1)])
    assert np.abs(middle / middle.sum() - (weights / weights.sum(0)).mean(1)).max() < 0.03


def test_caps_end_a_source(stream, tokenizer, root, kinds):
    mixture = {
        "few": SourceConfig(reference=kinds["parquet"]["reference"], weight=5.0, max_tokens=20_000),
        "many": SourceConfig(reference=kinds["tar"]["reference"], weight=1.0),
    }
    module = TextDataModule(open_stream({"mixture": mixture}, tokenizer, root / "cache"), 250, ROWS)
    for batch in module.batches(0, 1):
        module.on_after_batch_transfer(batch, 0)
    counts = module.counts()
    assert 15_000 < counts["few/tokens"] <= 20_000 < counts["many/tokens"]
    assert counts["many/epoch"] >= 1


def only_even(text, fields):
    return fields["n"] % 2 == 0


def shorter(text, fields):
    return text[:20]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_filters(stream, kind, tokenizer):
    text = stream(kind, epochs=1, held_out=0.0, filter=f"{__name__}:only_even", lanes=1)
    (rows,) = all_rows(text)
    # Each of three shards numbers its own.
    even = {t for shard in range(3) for t in documents(COUNT)[shard::3][::2]}
    assert set(texts(rows, tokenizer)) == even
    # Rows behind the last document are not counted any more.
    assert 0 <= COUNT - len(even) - rows[-1].state["sources"][0].counts["filtered"] <= 5
    cut = stream(kind, epochs=1, held_out=0.0, filter=f"{__name__}:shorter", lanes=1)
    (rows,) = all_rows(cut)
    assert max(map(len, texts(rows, tokenizer))) == 20
    with pytest.raises(DataError, match=r"^data.filter nowhere:f cannot be imported"):
        digests(stream(kind, filter="nowhere:f"), 1)


def test_duplicates_within_a_window(root, tokenizer, tmp_path):
    reference = write("jsonl", tmp_path / "twice", documents(50) * 2, 1)
    text = open_stream(
        {"reference": reference}, tokenizer, tmp_path, drop_duplicates=True, epochs=1, lanes=1, held_out=0.0
    )
    (rows,) = all_rows(text)
    assert max(texts(rows, tokenizer).values()) == 1
    assert rows[-1].state["sources"][0].counts["duplicate"] >= 48


def test_held_out_documents_are_never_trained_on(stream, tokenizer):
    text = stream("mixture", held_out=0.2)
    held = text.held_out_rows(60)
    numbers = text.held_out_documents(60)
    ids = [held["tokens_BN"][numbers == n].tolist() for n in range(int(numbers.max()))]
    said = {tokenizer.decode(i).removesuffix(END) for i in ids}
    assert len(said) >= 10 and all(text_hash(t) < 0.2 * 2**64 for t in said)
    # From every source by its weight: the schedule's mean is 2 to 1 to 0.1.
    tokens = Counter(t[0] if t[1] == "-" else "lab" for t in said for _ in t)
    assert 1.2 < tokens["0"] / tokens["1"] < 3.5 and tokens["lab"] > 0
    trained = set()
    for _, _, row in itertools.islice(text.stream(0, 1, {}), 600):
        trained |= set(tokenizer.decode(np.concatenate(row.documents).tolist()).split(END))
    assert not said & trained
    again = stream("mixture", held_out=0.2).held_out_rows(60)
    assert all((again[name] == held[name]).all() for name in held)


def test_best_fit_drops_nothing_and_cuts_only_what_is_too_long():
    rng = np.random.default_rng(0)
    pool = [np.full(n, i) for i, n in enumerate(rng.integers(1, 33, 200))]
    rows = _best_fit(pool, 32)
    assert sorted(int(d[0]) for row in rows for d in row) == list(range(200))
    assert all(sum(map(len, row)) <= 32 for row in rows)
    tokens = sum(map(len, pool))
    assert len(rows) <= -(-tokens // 32) * 1.1  # of best-fit decreasing, at most 11/9 of the least possible


def test_documents_of_best_fit_are_whole(stream):
    text = stream("best fit", lanes=1, length=512)
    padding = [512 - sum(map(len, row.documents)) for _, _, row in itertools.islice(text.stream(0, 1, {}), 200)]
    ends = [d[-1] for _, _, row in itertools.islice(text.stream(0, 1, {}), 50) for d in row.documents]
    assert set(ends) == {text.lanes.encoder.end_id}
    assert np.mean(padding) < 0.05 * 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 1000}, r"has no documents for lane \d+ of 1000 .*; give more text, or lower data.lanes"),
        ({"held_out": 1e-9}, r"no document of .* is held out by data.held_out 1e-09; raise it"),
        ({"mixture": {"a": SourceConfig(reference="lab", weight=0.0)}}, r"^no source that has text left has a weight"),
    ],
)
def test_mistakes(stream, changes, message):
    text = stream("jsonl", **changes)
    with pytest.raises(DataError, match=message):
        text.held_out_rows(2), digests(text, 130)


def test_ranks_and_workers_must_divide_the_lanes(stream):
    with pytest.raises(DataError, match=r"^2 ranks × 3 data_workers do not divide data.lanes 8; .* 1, 2, 4"):
        TextDataModule(stream("jsonl"), 1, ROWS, num_workers=3).batches(0, 2)


def test_a_mistake_in_a_worker_is_one_line(root, tokenizer, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "0.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n' * 40)
    text = open_stream({"reference": str(tmp_path / "x")}, tokenizer, tmp_path, held_out=0.0)
    with pytest.raises(DataError, match=r"0.jsonl, line \d+ has no string in field 'text'; [^\n]*$"):
        digests(text, 5, workers=2)


@pytest.mark.parametrize(("workers", "rows"), [(2, ROWS), (2, 5), (4, 3)])
def test_every_step_before_a_mistake_is_given(stream, workers, rows):
    """However many steps' rows a worker sends at once, and whether workers divide them or not."""

    def until_the_end(workers):
        found = []
        batches = TextDataModule(stream("jsonl", epochs=1), 500, rows, num_workers=workers).batches(0, 1)
        with pytest.raises(DataError, match="the data ends: lane"):
            found.extend(batch["tokens_BN"] for batch in batches)
        return found

    expected, found = until_the_end(0), until_the_end(workers)
    assert len(expected) == len(found) > 20
    assert all(map(torch.equal, expected, found))


def test_new_data_from_its_beginning(stream):
    """As a run reads it that goes on with data that has changed: rows are numbered on, documents begin anew."""
    text = stream("parquet")
    module = TextDataModule(text, 7, ROWS, 5, states=text.beginning(5 * ROWS))
    assert module.counts()["documents"] == 0
    (first, *_) = module.batches(0, 1)
    assert first["sample_id_B"].tolist() == list(range(5 * ROWS, 6 * ROWS))
    assert (first["tokens_BN"] == text.rows(0, ROWS)["tokens_BN"]).all()
    module.on_after_batch_transfer(first, 0)
    assert module.counts()["documents"] > 0


def test_what_only_a_stream_heeds(stream, kinds, root, tokenizer):
    for reference in (kinds["parquet"]["reference"], "python-docs", "lab"):
        config = DataConfig(reference=reference, packing="best_fit")
        assert streams(config)
        with pytest.raises(DataError, match=r"^data.packing needs a stream; leave data.stream out, or packing"):
            streams(config.model_copy(update={"stream": False}))


def test_what_is_streamed_by_itself(kinds, root, tokenizer):
    cases = {"jsonl": False, "parquet": False, "tar": True, "mixture": True, "lab": False}
    for name, streamed in cases.items():
        text = open_data(DataConfig(**{"length": 64, **kinds[name]}), tokenizer, 0, root / "cache")
        assert (type(text).__name__ == "StreamText") == streamed, name
