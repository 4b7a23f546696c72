"""A killed run ends as if it had not been; `python -m tests.pretrain.chaos` does it for all objectives, and longer."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.pretrain.chaos import write_model


def test_a_run_that_is_killed_at_any_moment_on_any_number_of_ranks_ends_the_same(tmp_path):
    # A process of its own, since one that has computed gradients may not fork.
    command = [sys.executable, "-m", "tests.pretrain.chaos", "--fork", "--objective", "rlp", "--kills", "2"]
    command += ["--steps", "30", "--ranks", "1", "2", "--model", str(write_model(tmp_path))]
    environment = os.environ | {"FORETHOUGHT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "killed 2 times in 30 steps" in done.stdout, done.stderr
