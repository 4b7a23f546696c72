"""Studies of a tiny model: what they train, that nothing is done twice, and what is refused before anything runs."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml

from checkpoints import find_checkpoint, load_checkpoint, load_thinking_model
from data_pipelines import DataConfig, open_data
from models import Text
from objectives import Step
from pretrain.cli import GAVE_UP, main
from pretrain.opening import open_model
from pretrain.recipe import RecipeError
from pretrain.run_directory import RunDirectory
from pretrain.stopping import UNFINISHED
from pretrain.study import running, scores
from pretrain.study.definition import load_study
from pretrain.study.progress import Progress
from pretrain.study.report import write_report
from tests.pretrain.test_fit import lines

ROOT = Path(__file__).parents[3]
STUDY = {
    "base": "base.yaml",
    "arms": {"next-token": {"objective": "next_token"}, "rlp": None},
    "seeds": [0, 1],
    "match": "flops",
    "budget": "rlp",
    "controls": ["next-token"],
    "held_out_rows": 24,
}


@pytest.fixture(autouse=True)
def reported(monkeypatch) -> list[Path]:
    """The runs whose report was asked for; none is drawn, the study's neither, which takes longer than they do."""
    found: list[Path] = []
    monkeypatch.setattr("pretrain.run.write_report", lambda directory, *rest: found.append(directory.path))
    monkeypatch.setattr(running, "write_report", lambda *rest: None)
    return found


@pytest.fixture
def study(tiny_run, tmp_path, monkeypatch):
    """Writes a study of the tiny model with changes, and gives the arguments of the command."""
    monkeypatch.chdir(tmp_path)
    keys = dict(zip((key.removeprefix("--") for key in tiny_run[::2]), tiny_run[1::2], strict=True))
    del keys["run-dir"]
    base = [f"--{key}={value}" for key, value in keys.items()]
    objective = {"name": "rlp", "length": 3, "thoughts": 2, "min_prefix": 4}
    Path("base.yaml").write_text(yaml.safe_dump({"steps": 2, "objective": objective, "rows_per_step": 2}))

    def write(changes: dict | None = None, out: str = "out") -> list[str]:
        Path("study.yaml").write_text(yaml.safe_dump(STUDY | (changes or {}), sort_keys=False))
        return ["study", "study.yaml", "--run-dir", out, *base, "--rows_per_step=2", "--data.held_out=0.4"]

    return write


def test_a_study_killed_in_the_middle_of_a_run(study, reported, monkeypatch, capsys):
    class Stopping(Step):
        def __init__(self, *rest):
            super().__init__(*rest)
            made.append(self)
            if len(made) == 5:
                raise InterruptedError

    made: list[Step] = []
    monkeypatch.setattr("pretrain.module.Step", Stopping)
    with pytest.raises(InterruptedError):
        main(study())
    assert not Path("out/results.md").exists()
    first = lines(Path("out/rlp/seed-0/metrics.jsonl"))
    assert main(study()) == 0
    said = capsys.readouterr()
    assert lines(Path("out/rlp/seed-0/metrics.jsonl")) == first  # to the second: it was not run again
    assert "run 3 of 4: out/rlp/seed-1, about " in said.err and "run 4 of 4: out/next-token/seed-1" in said.err

    # Runs are those of the arms, matched seed by seed.
    spent = {}
    for path in Path("out").glob("*/seed-?"):
        directory = RunDirectory(path)
        recipe, records = directory.load_recipe(), lines(directory.metrics)
        assert path.name == f"seed-{recipe.seed}" and path in reported
        assert recipe.objective.name == {"rlp": "rlp", "next-token": "next_token"}[path.parent.name]
        assert recipe.evaluation.objective.name == "rlp"
        assert (recipe.logging.wandb_group, recipe.logging.wandb_name) == ("out", str(path))
        spent[path.parent.name, recipe.seed] = [record["flops"] for record in records]
    assert len(spent) == 4
    for seed in (0, 1):
        cost, budget = spent["next-token", seed], spent["rlp", seed][-1]
        assert len(spent["rlp", seed]) == 2 < len(cost)
        assert abs(cost[-1] - budget) <= cost[0] / 2

    # The table says what the documents' scores say.
    found = json.loads(Path("out/results.json").read_text())
    of_documents = {}
    for arm in ("rlp", "next-token"):
        of_seeds = [json.loads(Path(f"out/{arm}/seed-{seed}.scores.json").read_text()) for seed in (0, 1)]
        tokens = of_seeds[0]["tokens"]
        means = [
            sum(n * (a - b) for n, a, b in zip(tokens, s["nll"]["own"], s["nll"]["shuffled"], strict=True))
            / sum(tokens)
            for s in of_seeds
        ]
        assert found["arms"][arm]["own minus shuffled"]["mean"] == pytest.approx(sum(means) / 2)
        assert found["arms"][arm]["by_seed"]["own minus shuffled"] == pytest.approx(means)
        of_documents[arm] = [s["nll"]["own"] for s in of_seeds]
    assert found["tokens"] == sum(tokens) and found["documents"] == len(tokens) > 1
    (own,) = [c for c in found["comparisons"] if c["metric"] == "NLL after its own thought"]
    assert (own["arm"], own["control"], own["seeds"]) == ("rlp", "next-token", 2)
    expected = [
        sum(n * (a - b) for n, a, b in zip(tokens, *of, strict=True)) / sum(tokens)
        for of in zip(of_documents["rlp"], of_documents["next-token"], strict=True)
    ]
    assert own["mean"] == pytest.approx(sum(expected) / 2) and own["low"] <= own["mean"] <= own["high"]
    assert len(found["comparisons"]) == 5 and "5 comparisons were made" in said.out
    assert said.out.strip().endswith(Path("out/results.md").read_text().strip())

    # What the runs have changed, of all weights in a row.
    before = dict(load_thinking_model(Path(directory.load_recipe().model)).named_parameters())
    shares = []
    for seed in (0, 1):
        after = load_checkpoint(find_checkpoint(Path(f"out/rlp/seed-{seed}")), ("model",))[0]["model"]
        old, new = (torch.cat([x[name].detach().flatten() for name in before]).bfloat16() for x in (before, after))
        shares.append((old != new).double().mean().item())
    assert found["arms"]["rlp"]["changed"]["all"]["all"] == pytest.approx(sum(shares) / 2) and 0 < min(shares)

    # Of runs scored before changes were counted, these are added; those without right answers are scored anew.
    paths = [Path(f"out/rlp/seed-{seed}.scores.json") for seed in (0, 1)]
    complete = [json.loads(path.read_text()) for path in paths]
    for path, of, missing in zip(paths, complete, ("changed", "correct"), strict=True):
        path.write_text(json.dumps({name: value for name, value in of.items() if name != missing}))

    # Once more: nothing is trained and nothing else scored; but a run whose end was not saved is taken up again, until
    # it is scored.
    trained: list[str] = []
    monkeypatch.setattr(running, "fit", lambda recipe, report: trained.append(recipe.run_dir))
    scored, score = [], scores.score_held_out
    monkeypatch.setattr(scores, "score_held_out", lambda *given, **rest: scored.append(given) or score(*given, **rest))
    assert main(study()) == 0
    assert json.loads(Path("out/results.json").read_text()) == found and not trained
    assert [json.loads(path.read_text()) for path in paths] == complete and len(scored) == 1
    (last,) = Path("out/rlp/seed-1/checkpoints").iterdir()
    last.rename("elsewhere")
    assert main(study()) == 0 and not trained
    paths[1].rename("scores elsewhere")
    assert main(study()) == 0 and trained == ["out/rlp/seed-1"]
    assert json.loads(Path("out/results.json").read_text())["missing"] == {"rlp": [1]}
    Path("elsewhere").rename(last)
    Path("scores elsewhere").rename(paths[1])

    # It may grow, and nothing else may change.
    assert main(study({"budget": "next-token", "arms": STUDY["arms"] | {"rlp": {"objective.length": 2}}})) == 1
    message = capsys.readouterr().err
    assert "out belongs to another study (budget, arms.rlp differ); choose another --run-dir" in message
    grown = {"arms": STUDY["arms"] | {"coin": {"objective.rewards": "random"}}, "seeds": [0, 1, 2]}
    assert main([*study(grown), "--dry-run"]) == 0
    assert "the study can be run: 9 runs" in capsys.readouterr().err


def test_shifts_are_scored_when_they_come(study, monkeypatch, capsys):
    """Of runs that are finished, and nothing twice."""
    notes = "".join(json.dumps({"text": f"Note {n} says that it is {n * n}. " * 3}) + "\n" for n in range(12))
    Path("notes.jsonl").write_text(notes)
    small = {"arms": {"rlp": None}, "controls": [], "match": None, "budget": None}

    def scored(shifts: dict) -> list[str]:
        capsys.readouterr()
        assert main(study(small | {"shifts": shifts})) == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("scoring")]

    assert main(study(small)) == 0
    models = ["the model before", "out/rlp/seed-0", "out/rlp/seed-1"]
    monkeypatch.setattr(running, "fit", None)
    shifts = {"notes": {"data": "notes.jsonl", "data.held_out": 0.5, "evaluation.objective": "next_token"}}
    assert scored(shifts) == [f"scoring {model} on notes" for model in models]
    shifts["longer"] = {"data.length": 48, "evaluation.objective.length": 5}
    assert scored(shifts) == [f"scoring {model} on longer" for model in models]
    shifts["longer"]["evaluation.rows"] = 2
    assert scored(shifts) == [f"scoring {model} on longer" for model in models]
    assert not scored(shifts)

    # Nor are thoughts for pass@k.
    (path,) = Path("out").glob("rlp/seed-0.scores.json")
    of_notes = json.loads(path.read_text())["shifts"]
    small |= {"pass_at": 3}
    assert scored(shifts) == [f"scoring {model}" for model in models]
    again = json.loads(path.read_text())
    assert again["shifts"] == of_notes and all(0 <= c <= 3 for right in again["passes"] for c in right)
    passes = json.loads(Path("out/results.json").read_text())["passes"]
    assert passes["k"] == [1, 2, 3] and set(passes["arms"]) == set(passes["overtaken"]) == {"rlp"}
    right = [c / 3 for of in again["passes"] for c in of]
    other = json.loads(Path("out/rlp/seed-1.scores.json").read_text())["passes"]
    right += [c / 3 for of in other for c in of]
    assert passes["arms"]["rlp"][0]["mean"] == pytest.approx(sum(right) / len(right))
    assert "Pass@k." in Path("out/results.md").read_text()

    # Half of the notes are held out; all of their tokens are read, by the documents alone.
    opened = open_model("out/rlp/seed-0")
    config = DataConfig(reference="notes.jsonl", held_out=0.5, length=32, end_of_document="<|endoftext|>")
    rows = open_data(config, opened.tokenizer, 0).held_out_rows(24)
    text = Text(**rows)
    logprobs_BNV = (opened.model.read(text).hidden_BNW @ opened.model.head_weight_VW.T).log_softmax(-1)
    follows_BN = (text.document_BN[:, 1:] >= 0) & (text.document_BN[:, 1:] == text.document_BN[:, :-1])
    nll_BN = -logprobs_BNV[:, :-1].gather(2, text.tokens_BN[:, 1:, None])[..., 0]
    found = json.loads(Path("out/results.json").read_text())
    elsewhere = found["elsewhere"]["notes"]
    assert elsewhere["documents"] == 6 and elsewhere["tokens"] == follows_BN.sum()
    by_seed = elsewhere["arms"]["rlp"]["by_seed"]
    assert by_seed["NLL without a thought"][0] == pytest.approx(nll_BN[follows_BN].mean().item(), rel=1e-5)
    assert by_seed["NLL after its own thought"] == [None, None]
    gained = sum(by_seed["NLL without a thought"]) / 2 - elsewhere["before"]["NLL without a thought"]
    assert elsewhere["arms"]["rlp"]["minus before"]["NLL without a thought"]["mean"] == pytest.approx(gained)
    longer = json.loads(Path("out/rlp/seed-1.scores.json").read_text())["shifts"]["longer"]
    assert longer["how"]["evaluation"]["objective"]["length"] == 5 and longer["how"]["data"]["length"] == 48
    said = Path("out/results.md").read_text()
    assert "notes: of fewer than 20 documents" in said and "| longer | " in said


def refused(arguments: list[str], capsys) -> list[str]:
    """What is wrong with a study, by line."""
    capsys.readouterr()
    assert main(arguments) == 1
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "forethought: the study cannot be run:"
    return [line.removeprefix("  - ") for line in lines]


def without_seconds(results: dict) -> dict:
    for arm in results["arms"].values():
        del arm["spent"]["seconds"]
    return results


def test_a_study_in_two_places(study, tiny_directory, monkeypatch, capsys):
    """What one has finished is kept, and the other, which has nothing else of it, makes the rest."""
    shutil.copytree(tiny_directory, "start")
    own = "--model=start"
    assert main([*study(out="whole"), own]) == 0
    trained, train = [], running.fit
    monkeypatch.setattr(running, "fit", lambda recipe, **rest: trained.append(recipe.run_dir) or train(recipe, **rest))
    kept = [own, "--keep", "kept"]
    assert main([*study(out="first"), *kept, "--seeds", "0"]) == 0
    assert "Not finished, and missing here: rlp (seed 1), next-token (seed 1)." in capsys.readouterr().out
    assert len(json.loads(Path("first/results.json").read_text())["comparisons"]) == 5
    assert {path.suffix for path in Path("kept").rglob("*") if path.is_file()} == {".json", ".jsonl", ".yaml"}

    trained.clear()
    assert main([*study(out="second"), *kept]) == 0
    assert trained == ["second/rlp/seed-1", "second/next-token/seed-1"]
    both = [json.loads(Path(f"{out}/results.json").read_text()) for out in ("whole", "second")]
    found = both[1]["arms"]["rlp"]["spent"]["seconds"]
    assert without_seconds(both[0]) == without_seconds(both[1]) and not both[0]["missing"]
    for path in Path("whole").glob("*/*/evaluations.jsonl"):
        assert path.read_text() == Path("second", *path.parts[1:]).read_text()

    # Where all is kept nothing is left to do, however little time there is.
    trained.clear()
    assert main([*study(out="third"), *kept, "--minutes", "0", "--at-once", "2"]) == 0
    third = json.loads(Path("third/results.json").read_text())
    assert third["arms"]["rlp"]["spent"]["seconds"] == found and without_seconds(third) == both[0] and not trained
    assert main([*study(out="no time"), own, "--minutes", "0"]) == GAVE_UP
    assert "no run of the study is finished" in capsys.readouterr().err

    # A kept run is the planned one, or nothing runs.
    arms = STUDY["arms"] | {"rlp": {"objective.length": 2}}
    lines = refused([*study({"arms": arms}, "fourth"), *kept], capsys)
    assert lines == [
        f"kept/rlp/seed-{seed} is a run of another recipe (objective.length differ); move it away, or keep runs "
        "elsewhere"
        for seed in (0, 1)
    ]
    lines = refused([*study({"held_out_rows": 12}, "fourth"), *kept], capsys)
    assert len(lines) == 4 and lines[0].startswith(
        "kept/rlp/seed-0.scores.json was scored in another way (evaluation differ), and has no weights to be scored"
    )
    weights = Path("start/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    scores._fingerprint.cache_clear()
    elsewhere = "is of a run from other weights than start has now; bring those back, or move the run away"
    lines = refused([*study(out="fourth"), *kept], capsys)
    assert lines[0] == f"kept/rlp/seed-0.scores.json {elsewhere}" and len(lines) == 4
    assert refused([*study(out="third"), own], capsys)[0] == f"third/before.scores.json {elsewhere}"
    Path("kept/rlp/seed-0.scores.json").unlink()
    assert refused([*study(out="fourth"), *kept], capsys)[0] == (
        "kept/next-token/seed-0 takes its budget from kept/rlp/seed-0, which is not there; bring that back or move both"
    )
    assert not trained and not Path("fourth").exists()


def test_a_part_of_a_study_that_could_never_run(study, capsys):
    line = "--only: out/next-token/seed-1 takes its budget from out/rlp/seed-1; run rlp as well"
    assert refused([*study(), "--only", "next-token", "--seeds", "1"], capsys) == [line]
    assert refused([*study(), "--only", "rpl,rlp", "--seeds", "7"], capsys) == [
        "--only: 'rpl' is no arm; arms: next-token, rlp",
        "--seeds: 7 is none of the study's, which are 0, 1",
    ]


def test_runs_at_once_of_which_some_fail(study, monkeypatch, capsys):
    """Each by a command of the user's, here one that trains only one of them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("launch.sh").write_text(
        f"case $2 in */rlp/seed-0.*) exec {sys.executable} -m pretrain fit $2;; esac; echo no such node; exit 7"
    )
    assert main([*study(), "--launch", "bash launch.sh --option", "--at-once", "2"]) == GAVE_UP
    said = capsys.readouterr().err.splitlines()
    assert {
        "out/rlp/seed-1 failed, exit code 7: no such node",
        "out/rlp/seed-0 is finished: 1 of 4 runs finished, about 0 seconds left",
        "out/next-token/seed-0 failed, exit code 7: no such node",
    } <= {*said}
    assert said[-1] == (
        "forethought: out/rlp/seed-1, out/next-token/seed-0 failed, and 1 that take their budget from them were not "
        "begun; all others are finished. What a run said is in out/rlp/seed-1.log; the same command goes on"
    )
    planned = load_study("study.yaml", study()[4:], "out")
    assert [Progress(planned).is_whole(run) for run in planned.runs] == [True, False, False, False]
    assert not Path("out/results.json").exists()
    assert main([*study(out="other"), "--launch", "nowhere"]) == 1
    assert "--launch: nowhere cannot be started (No such file or directory)" in capsys.readouterr().err


def test_a_signal_stops_all_runs_at_once(study, monkeypatch):
    """They are told, and waited for."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("launch.sh").write_text(
        "trap 'touch $1.saved; exit 75' TERM; touch $1.began; while true; do sleep 0.05; done\n"
    )
    command = [sys.executable, "-m", "pretrain", *study({"match": None, "budget": None})]
    process = subprocess.Popen([*command, "--launch", "bash launch.sh"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len([*Path("out").glob("*/*.began")]) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == UNFINISHED, process.stderr.read()
    assert len([*Path("out").glob("*/*.saved")]) == 4


def test_the_grid_of_a_study(study):
    arguments = study({"matrix": {"optimizer.lr": [1e-3, 1e-4], "data.length": [16, 32]}, "match": "tokens"})
    planned = load_study("study.yaml", arguments[4:], "out")
    names = [cell.name for cell in planned.cells]
    assert names[:3] == ["rlp,optimizer.lr=0.001,data.length=16", names[0].replace("rlp", "next-token"), names[2]]
    assert len(names) == 8 and len({run.recipe.run_dir for run in planned.runs}) == 16
    for run in planned.runs:
        recipe = planned.recipe(run)
        assert (recipe.steps, recipe.flops) == (2, None)
        assert ("optimizer.lr", recipe.optimizer.lr) in run.cell.values
        assert ("data.length", recipe.data.length) in run.cell.values


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"matrix": {"optimizer.lrr": [1]}}, ["unknown key 'optimizer.lrr'; did you mean 'lr'?"]),
        (
            {"arms": STUDY["arms"] | {"short": {"objective.length": 0}}},
            ["objective.length must be at least 1, got 0 (L, sampled tokens of a thought at most) (in short)"],
        ),
        ({"budget": "rpl"}, ["budget 'rpl' is neither a number nor an arm; arms: next-token, rlp"]),
        ({"budget": -1.0}, ["budget must be above 0, got -1.0"]),
        ({"budget": None}, ["match and budget go together: what all runs spend alike, and how much or as which arm"]),
        (
            {"match": "tokens", "budget": 100},
            ["100 tokens are no whole number of steps of 64; change the budget or rows_per_step"],
        ),
        (
            {"arms": {"rlp": {}, "next-token": {"objective": "next_token", "steps": 7}}},
            ["arms.next-token cannot set steps: match flops says how long; leave it out"],
        ),
        (
            {"changes": {"optimizer.schedule_steps": 5}},
            [
                "optimizer.schedule_steps is of runs that end by steps, and this one ends by flops; give "
                "optimizer.schedule_flops, or leave it out for the whole run (in next-token)"
            ],
        ),
        (
            {"controls": ["sft"], "seeds": [1, 1], "arms": STUDY["arms"] | {"a/b": {"evaluation.rows": 3}}},
            [
                "controls: 'sft' is no arm; arms: next-token, rlp, a/b",
                "arm 'a/b' names a folder; use letters, digits, ., _ and -",
                "seeds [1, 1] are not all different; give each once",
                "arms.a/b cannot set evaluation.rows: all arms are scored alike; set it in changes",
            ],
        ),
        (
            {"pass_at": 4, "changes": {"evaluation.objective": "next_token"}},
            ["pass_at: evaluation.objective samples no thoughts; name one that does, or leave it out"],
        ),
        ({"sed": 3}, ["unknown key 'sed'; known: base, changes, arms, matrix, seeds, match, budget, controls, "]),
        ({"base": "nowhere"}, ["no recipe 'nowhere': give a YAML file or one of "]),
        (
            {"shifts": {"a|b": "python-docs", "far": {"model": "lab"}}},
            [
                "shift 'a|b' names rows of tables; use letters, digits, ., _ and -",
                "shifts.far cannot set model: a shift is of data and evaluation alone",
            ],
        ),
        (
            {"shifts": {"far": "nowhere.jsonl", "none": {"data.held_out": 0}, "long": {"data.lenght": 9}}},
            [
                "data reference 'nowhere.jsonl' is neither a known name nor an existing path; ",
                "data.held_out is 0, which leaves nothing to score; raise it (in shifts.none)",
                "unknown key 'data.lenght'; did you mean 'length'? (in shifts.long)",
            ],
        ),
        ({"changes": {"devices": 2}}, ["a study's runs take one device each; set devices and nodes to 1"]),
        ({"changes": {"model": "nowhere at all"}}, ["no model 'nowhere at all'; give a local Hugging Face directory"]),
    ],
)
def test_mistakes_are_a_line_each_before_anything_runs(changes, expected, study, capsys):
    arguments = study(changes)
    if "model" in changes.get("changes", {}):
        arguments = [a for a in arguments if not a.startswith("--model")]
    assert main(arguments) == 1
    first, *found = capsys.readouterr().err.splitlines()
    assert first == "forethought: the study cannot be run:"
    assert len(found) == len(expected)
    assert all(line.removeprefix("  - ").startswith(part) for line, part in zip(found, expected, strict=True)), found
    assert not Path("out").exists()


def test_a_directory_that_is_no_study_s(study, capsys):
    Path("out/rlp").mkdir(parents=True)
    assert main(study()) == 1
    assert "  - out is not empty and no study's; choose another --run-dir" in capsys.readouterr().err.splitlines()
    with pytest.raises(RecipeError, match=r"^no study 'nowhere.yaml' \(No such file or directory\); give a YAML file"):
        load_study("nowhere.yaml", [], None)


def test_the_lab_s_study_in_small(tmp_path, monkeypatch, capsys):
    """Two steps of each arm with random weights, of one seed; all the rest as it is, the report included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "write_report", write_report)
    path = ROOT / "studies" / "lab.yaml"
    assert len(load_study(str(path), [], None).shifts) == 12
    tree = yaml.safe_load(path.read_text()) | {"seeds": [0], "held_out_rows": 2, "pass_at": 2}
    tree["shifts"] = {"mixed-in": tree["shifts"]["mixed-in"] | {"evaluation.rows": 2}}
    Path("lab.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    small = ["--model", "random:lab", "--steps", "2", "--rows_per_step", "1", "--data.length", "64"]
    assert main(["study", "lab.yaml", *small, "--objective.length", "4", "--evaluation.rows", "1"]) == 0
    found = json.loads(Path("runs/lab/results.json").read_text())
    controls = {"next-token", "shuffled", "random", "pause", "mixed-sft"}
    assert set(found["arms"]) == {"rlp", "rpt", "quiet-star"} | controls
    assert found["arms"]["rlp"]["right thoughts"]["n"] == 1
    assert all(math.isfinite(c["mean"]) for c in found["comparisons"]) and len(found["comparisons"]) == 75
    # Quiet-STaR's own way of thinking, for which the other models have untrained parts; scored are answers alone.
    mixed = found["elsewhere"]["mixed-in"]
    assert mixed["documents"] == mixed["tokens"] == found["documents"]
    assert {"right thoughts", "own minus shuffled"} <= mixed["arms"]["quiet-star"].keys() & mixed["arms"]["rlp"].keys()
    said = capsys.readouterr().out
    page = unescape(Path("runs/lab/report.html").read_text(encoding="utf-8"))
    for where in (said, page):
        assert "With one seed they hold for these models" in where and "Of fewer than 20 documents: too few" in where
