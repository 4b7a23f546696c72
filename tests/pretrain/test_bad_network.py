"""A run survives its network; `python -m tests.pretrain.bad_network` lets it, for 300 steps."""

from __future__ import annotations

import random

from tests.pretrain.bad_network import check


def test_a_run_over_a_bad_network_ends_as_one_on_local_files(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETHOUGHT_CACHE", str(tmp_path / "cache"))
    check(tmp_path, steps=20, rng=random.Random(0), patience=8.0, shards=16)
