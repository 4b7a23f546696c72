"""Streams beside other libraries', and the memory of a stream, in short form."""

from __future__ import annotations

import pytest

from benchmarks import memory, streams


def test_a_resume_is_compared_with_the_epoch_that_it_interrupts(tmp_path, tiny_directory, monkeypatch):
    streams.write(tmp_path, 60)
    monkeypatch.setitem(streams.READERS, "tokenizer alone, broken", lambda *_: 1 / 0)

    readers = ["forethought, tar", "webdataset, tar", "tokenizer alone, broken"]
    found = streams.compare(tmp_path, str(tiny_directory), readers, 16, 1, streams.read)
    cells = {(cell["reader"], cell["workers"]): cell for cell in found["cells"]}
    assert len(cells) == 4
    for workers in streams.WORKERS:
        ours, theirs = cells["forethought, tar", workers], cells["webdataset, tar", workers]
        exact = {"exactly": True, "lost": 0, "repeated": 0, "refused": None}
        assert ours["same"] == ours["other"] == theirs["same"] == exact  # it reads again what it skips
        # Other workers read other shards: what is skipped is not what was read.
        assert not theirs["other"]["exactly"] and theirs["other"]["lost"] > 0 and theirs["other"]["repeated"] > 0
        assert all(figure["median"] > 0 for cell in (ours, theirs) for figure in cell["figures"].values())
        assert "ZeroDivisionError" in found["failed"][f"tokenizer alone, broken, {workers} workers"]
    rows = streams.markdown(found).splitlines()
    assert len(rows) == 6 and "yes | yes |" in rows[2] and "lost" in rows[4]


def test_libraries_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(streams.importlib.util, "find_spec", lambda name: None if name == "torchdata" else name)
    assert streams.missing("datasets, jsonl") == ["torchdata"]
    assert streams.missing("forethought, jsonl") == streams.missing("webdataset, tar") == []


def test_memory_is_sampled_over_all_the_text(tmp_path):
    with memory.served(tmp_path) as url:
        memory.write(tmp_path, 3_000_000)
        samples = memory.read(tmp_path, url, 3_000_000, memory.line_tokenizer(), 2**18)
    text = [sample["text"] for sample in samples]
    assert text == sorted(text) and text[-1] >= 3_000_000 and len(text) > 5
    assert all(len(s["workers"]) == 2 and min(s["main"], *s["workers"]) > 2**20 for s in samples)
    memory.plot({"tokenizer": "", "samples": samples, "growth": memory.growth(samples)}, tmp_path / "plot.png")


def test_growth_leaves_out_the_first_fifth():
    samples = [{"text": n, "main": 100 if n >= 20 else 9 * n, "workers": [0.25 * n, 0.5 * n]} for n in range(101)]
    found = memory.growth(samples)
    assert found["bytes per byte of text"] == pytest.approx(0.75)
    assert found["median of the last tenth, bytes"] - found["median of the first tenth, bytes"] == pytest.approx(54)
