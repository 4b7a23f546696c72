"""A killed run continues to the same bits; `python -m tests.pretrain.kills` does it for all objectives, and longer."""

from __future__ import annotations

import random

from tests.pretrain.kills import check


def test_a_killed_run_on_a_streamed_mixture_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETHOUGHT_CACHE", str(tmp_path / "cache"))
    check(tmp_path, "rlp", kills=2, rng=random.Random(0), steps=12)
