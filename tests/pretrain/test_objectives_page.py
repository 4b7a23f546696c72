"""What objectives/README.md says: its table of metrics is the code's, and its example runs as it stands on the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from models.philox import Rng
from objectives import Template, find_objective, metrics
from pretrain.cli import main
from tests.helpers import packed_text, relative_error, step_of, tiny_model

PAGE = Path(metrics.__file__).with_name("README.md").read_text()


@pytest.fixture
def example(tmp_path, monkeypatch) -> str:
    """The page's example as an importable module; its import path."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "helping.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_package.helping:Helpful"
    for name in ("my_package.helping", "my_package"):
        sys.modules.pop(name, None)


def test_the_table_is_that_of_the_code():
    (table,) = re.findall(r"<!-- python -m objectives.metrics -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert table == metrics.table()


def test_every_metric_of_ours_is_in_the_table():
    """By what the golden runs log; a new name must be explained."""
    for name in ("next_token", "quiet_star", "rlp", "rpt"):
        golden = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())[name]
        assert set(golden) - {"loss"} <= find_objective(name).all_metrics().keys()


def test_the_example_rewards_what_it_says(example):
    helpful_class = find_objective(example)
    config = helpful_class.Config(length=4, thoughts=4, temperature=1.0, margin=0.1, advantage="mean")
    helpful = helpful_class(config, Template((7, 8), (9,)))
    record = step_of(helpful, tiny_model(), packed_text([[6, 5], [11]], 11), Rng(0, 0)).record
    helps_BKM = (record.reward_BKM > 0.1).double()
    assert 0 < helps_BKM.sum() < helps_BKM.numel()
    real_BM = record.thoughts.anchors.index_BM >= 0
    expected = (helps_BKM - helps_BKM.mean(dim=1, keepdim=True)) * real_BM[:, None]
    assert relative_error(record.advantage_BKM, expected) <= 1e-12


def test_the_example_from_the_command_line(example, tiny_run, run_directory, capsys):
    arguments = ["fit", "smollm2-rlp", *tiny_run, "--objective", example, "--objective.length", "3", "--steps", "1"]
    assert main([*arguments, "--objective.margin", "0.1"]) == 0
    assert "Thoughts that help by more than a margin are rewarded" in (run_directory / "report.html").read_text()
    assert main([*arguments, "--objective.margin", "-1", "--objective.fill", "x"]) == 1
    said = capsys.readouterr().err
    assert "objective.margin must be at least 0, got -1" in said
    assert "unknown key 'objective.fill'" in said
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "smollm2-rlp", "--objective", example, "--help"])
    assert stopped.value.code == 0
    assert "--objective.margin float (default 0.0): gain in nats" in capsys.readouterr().out
