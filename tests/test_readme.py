"""README.md is a promise: its code runs, its commands are read, and its recipes can be run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.publish import with_table
from pretrain.cli import main
from pretrain.study.results import arms

README = (Path(__file__).parents[1] / "README.md").read_text()
RESULTS = Path(__file__).parents[1] / "studies" / "results"
COMMANDS = [
    shlex.split(command, comments=True)[1:]
    for line in README.splitlines()
    if line.startswith("    ")
    for command in line.split("&&")
    if command.strip().startswith("forethought ")
]
FITS = [command[1:] for command in COMMANDS if command[0] == "fit"]
# Toy sizes, for which everything is still opened, checked and run once.
SMALL = [
    "--rows-per-step",
    "1",
    "--micro_batch_rows",
    "1",
    "--evaluation.rows",
    "2",
    "--data.length",
    "32",
    "--dry-run",
]


def test_the_library_example_is_a_step_of_rlp():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    body = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(body) <= 15
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    gradients = [p.grad for p in namespace["model"].parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.norm() > 0 for g in gradients)
    assert namespace["rlp"].state()  # the teacher is there, and was moved


@pytest.mark.smollm2
@pytest.mark.parametrize("arguments", FITS, ids=" ".join)
def test_recipes_can_be_run(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "my-recipe.yaml":
        # The reader's own file and text, and a model that only the hub has.
        Path("my-recipe.yaml").write_text("{steps: 2, objective: {name: rlp, length: 4, thoughts: 2}}")
        Path("corpus").mkdir()
        text = "The reader thinks while it reads. " * 400
        Path("corpus/a.jsonl").write_text(json.dumps({"text": text}) + "\n")
        arguments = [{"Qwen/Qwen2.5-0.5B": "smollm2-135m"}.get(a, a) for a in arguments]
    if "HuggingFaceFW/fineweb-edu" in arguments:
        # What the hub has under this name, in its layout.
        (folder := Path("HuggingFaceFW/fineweb-edu/sample")).mkdir(parents=True)
        configs = {"configs": [{"config_name": "sample-10BT", "data_files": "sample/*.parquet"}]}
        (folder.parent / "README.md").write_text(f"---\n{json.dumps(configs)}\n---\n")
        pq.write_table(pa.table({"text": [f"Page {n} of the web. " * 20 for n in range(200)]}), folder / "000.parquet")
        arguments = [*arguments, "--data.stream", "true"]
    assert main(["fit", *arguments, *SMALL]) == 0
    assert "the recipe can be run" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [c for c in COMMANDS if c[0] != "fit"], ids=" ".join)
def test_other_commands_are_read(arguments, capsys):
    """With --help behind them, the parser takes them and stops."""
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"])
    assert stopped.value.code == 0
    assert arguments[0] in capsys.readouterr().out


def test_tables_of_studies_are_those_of_their_results():
    kept = {path.parent.name: json.loads(path.read_text()) for path in RESULTS.glob("*/results.json")}
    for name, found in kept.items():
        assert with_table(README, name, found) == README, f"python -m benchmarks.publish studies/{name}.yaml"
        assert arms(found).to_markdown() in (RESULTS / name / "results.md").read_text()
    places = re.findall(r"<!-- end of (.*) -->", README)
    for name in {*places} - kept.keys():
        assert f"<!-- {name} -->\n<!-- end of {name} -->" in README, f"a table without studies/results/{name}"
