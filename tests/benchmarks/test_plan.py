"""Plans against whole runs in processes of their own; the full sizes are for the benchmark itself."""

from __future__ import annotations

import pytest

from benchmarks.plan import CASES, in_a_process


@pytest.mark.parametrize("case", [case for case in CASES if "rlp" in case or "four at once" in case])
def test_a_run_costs_what_is_planned(case):
    found = in_a_process(case, tiny=True)
    assert found["planned / measured, FLOPs"] == pytest.approx(1, rel=0.03)
    assert found["measured, bytes"] > 0.5 * found["planned, bytes"]  # beside which so small a model is little
