"""The benchmark of snapshots, at toy sizes."""

from __future__ import annotations

import json
import sys

from benchmarks import snapshots


def test_saving_loading_and_starting_are_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "snapshots.json"
    monkeypatch.setattr(sys, "argv", ["snapshots", "--tiny", "--repeats", "1", "--rounds-of", "2", "--out", str(out)])
    snapshots.main()
    found = json.loads(out.read_text())
    assert found["saving"]["cost"].keys() == {"alone", "in background", "waited for"}
    assert found["saving"]["cost"]["alone"]["median"] == 0
    parameters = found["setting"]["parameters"]
    # Weights and two moments in fp32, and the steps, headers and lists.
    assert 12 * parameters < found["save and load"]["bytes"] < 12 * parameters + 40_000
    # Each rank has half of the model.
    assert [rank["shards"] for rank in found["start"]] == [2 * parameters, 2 * parameters]
    assert "start, rank 1" in capsys.readouterr().out
