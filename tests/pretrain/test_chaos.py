"""A killed run ends as if it had not been; `python -m tests.pretrain.chaos` does it for all objectives, and longer."""

from __future__ import annotations

from tests.pretrain.chaos import check, write_model


def test_a_run_that_is_killed_at_any_moment_on_any_number_of_ranks_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FORETHOUGHT_CACHE", str(tmp_path / "cache"))
    said = check(tmp_path, str(write_model(tmp_path)), "rlp", kills=2, steps=40, ranks=(1, 2))
    assert "killed 2 times in 40 steps" in said
