"""What objectives/README.md says: its table of metrics is the code's, and its example runs as it stands on the page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.snapshots import find_checkpoint, load_checkpoint
from models.philox import Rng
from objectives import find_objective, metrics
from objectives.driver import Step
from pretrain.cli import main
from tests.helpers import explicit_hidden, packed_text, relative_error, tiny_model

PAGE = Path(metrics.__file__).with_name("README.md").read_text()


@pytest.fixture
def example(tmp_path, monkeypatch) -> str:
    """The page's example as an importable module; its import path."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 60
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "pausing.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_package.pausing:Pause"
    for name in ("my_package.pausing", "my_package"):
        sys.modules.pop(name, None)


def test_the_table_is_that_of_the_code():
    (table,) = re.findall(r"<!-- python -m objectives.metrics -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert table == metrics.table()


def test_every_metric_of_ours_is_in_the_table():
    """By what the golden runs log; a new name must be explained."""
    for name in ("next_token", "quiet_star", "rlp", "rpt"):
        golden = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())[name]
        assert set(golden) - {"loss"} <= find_objective(name).all_metrics().keys()


def test_the_examples_loss_is_that_of_explicit_sequences(example):
    pause_class = find_objective(example)
    pause = pause_class(pause_class.Config(length=3), 5)
    model, text = tiny_model(), packed_text([[6, 5], [11]], 11)
    (output,) = Step(pause, model, [text], Rng(0, 0)).losses()
    target_BN, valid_BN = text.targets(1)
    thoughts, total = output.record.thoughts, 0.0
    for b, n in valid_BN.nonzero().tolist():
        for hidden in (model.read(text).hidden_BNW[b, n], explicit_hidden(model, text, thoughts, b, 0, n)[-1]):
            total = total - (hidden @ model.head_weight_VW.T).log_softmax(-1)[target_BN[b, n]]
    assert relative_error(output.loss, total / valid_BN.sum()) <= 1e-12


def test_the_example_trains_resumes_exports_and_is_reported(example, tiny_run, run_directory, tmp_path, capsys):
    arguments = ["fit", "smollm2-next-token", *tiny_run, "--objective", example, "--objective.length", "3"]
    assert main([*arguments, "--steps", "4", "--run-dir", str(tmp_path / "whole")]) == 0
    for steps in ("2", "4"):
        assert main([*arguments, "--steps", steps]) == 0
    assert "continuing" in capsys.readouterr().err
    whole, resumed = (load_checkpoint(find_checkpoint(d))[0] for d in (tmp_path / "whole", run_directory))
    assert all(torch.equal(resumed["model"][name], tensor) for name, tensor in whole["model"].items())

    records = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4] and all("pause_gain" in record for record in records)
    page = (run_directory / "report.html").read_text()
    assert "At every token the model reads filler before it predicts the next one." in page
    assert "what pausing gains, nats per token" in page
    assert main(["export", str(run_directory), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()

    assert main([*arguments, "--steps", "4", "--objective.length", "0", "--objective.fill", "x"]) == 1
    said = capsys.readouterr().err
    assert "objective.length must be at least 1, got 0" in said
    assert "unknown key 'objective.fill'; did you mean 'filler'?" in said
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "smollm2-next-token", "--objective", example, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--objective.filler str (default .): text whose first token is the filler" in shown
