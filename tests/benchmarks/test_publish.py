"""What is written of a study, on one whose results are made by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks import publish
from pretrain import cli

README = "# A\n\n<!-- small -->\nwhat was found before\n<!-- end of small -->\n\nmore\n"


def results(rlp: float, half: float = 0.25) -> dict:
    before = {
        "right answers without a thought": 0.25,
        "right answers after its own thought": None,
        "NLL without a thought": 3.0,
        "NLL after its own thought": 2.0,
        "own minus shuffled": None,
        "right thoughts": 0.5,
    }
    interval = {"mean": rlp, "low": rlp - half, "high": rlp + half, "n": 3}
    arm = {"seeds": [0, 1, 2], "NLL without a thought": interval, "NLL after its own thought": interval | {"low": None}}
    arm |= {"right answers without a thought": {"mean": 0.875, "low": 0.625, "high": 1.125, "n": 3}}
    return {"before": before, "arms": {"rlp": arm | {"spent": {"flops": [2e9, 4e9], "seconds": [1.0, 3.0]}}}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A project with a README; running a study writes results of its choice."""

    def study(arguments: list[str]) -> int:
        assert arguments[:4] == ["study", "small.yaml", "--run-dir", str(tmp_path / "run")]
        options.append(arguments[4:])
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "results.json").write_text(json.dumps(made[-1]))
        (tmp_path / "run" / "results.md").write_text("# small\n")
        return 3 if made[-1] == {} else 0

    made, options = [results(1.0)], []
    (tmp_path / "README.md").write_text(README)
    monkeypatch.setattr(cli, "main", study)
    return tmp_path, made, options


def test_the_table_and_the_results_are_written(place):
    root, made, options = place
    assert publish.publish("small.yaml", str(root / "run"), root=root) == 0
    written = (root / "README.md").read_text()
    assert written.startswith("# A\n\n<!-- small -->\n\n") and written.endswith("\n<!-- end of small -->\n\nmore\n")
    assert "| the model before |  | 25.0% | 3.000 | 2.000 |  |\n" in written and "before\n<!--" not in written
    assert "| rlp | 0, 1, 2 | 87.5% [62.5%, 100.0%] | 1.000 [0.750, 1.250] | 1.000 | 3e+09 |\n" in written
    kept = json.loads((root / "studies/results/small/results.json").read_text())
    assert kept.pop("environment")["torch"] and kept == made[0]
    assert (root / "studies/results/small/results.md").read_text() == "# small\n"
    # Once more it is the same; a study that does not come to its end changes nothing.
    assert publish.publish("small.yaml", str(root / "run"), root=root) == 0
    made.append({})
    assert publish.publish("small.yaml", str(root / "run"), options=["--minutes", "9"], root=root) == 3
    kept = ["--keep", str(root / "studies/results/small/runs")]
    assert options == [kept, kept, ["--minutes", "9", *kept]]
    assert (root / "README.md").read_text() == written


@pytest.mark.parametrize(
    ("now", "said"), [(1.4, "agrees"), (1.6, "without a thought: 1.000 [0.750, 1.250], now 1.600")]
)
def test_a_check_compares_intervals(now, said, place, capsys):
    root, made, options = place
    publish.publish("small.yaml", str(root / "run"), root=root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and "run" not in path.parts}
    made.append(results(now))
    assert publish.publish("small.yaml", str(root / "run"), check=True, root=root) == int(said != "agrees")
    assert said in capsys.readouterr().out and options[-1] == []
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_check_compares_shifts(place, capsys):
    root, made, _ = place
    made[0]["elsewhere"] = {"longer": results(1.0), "gone": results(1.0)}
    publish.publish("small.yaml", str(root / "run"), root=root)
    made.append(results(1.0) | {"elsewhere": {"longer": results(1.6), "new": results(1.6)}})
    assert publish.publish("small.yaml", str(root / "run"), check=True, root=root) == 1
    differing = capsys.readouterr().out.splitlines()[1:]
    assert differing == ["rlp, on longer, NLL without a thought: 1.000 [0.750, 1.250], now 1.600 [1.350, 1.850]"]


def test_what_cannot_be_published_is_one_line(place):
    root, *_ = place
    with pytest.raises(ValueError, match=r"^there is no .*results.json to compare with; leave --check out$"):
        publish.publish("small.yaml", "run", check=True, root=root)
    (root / "README.md").write_text(README.replace("<!-- small -->\n", ""))
    with pytest.raises(ValueError, match=r"put <!-- small --> and <!-- end of small -->, in this order, on lines of"):
        publish.publish("small.yaml", "run", root=root)


def test_a_study_without_a_place_in_readme_and_with_runs_to_come(place):
    root, made, _ = place
    made.append(results(1.0) | {"missing": {"rlp": [1, 2], "next-token": [2]}})
    assert publish.with_table("# Another\n", "small", made[-1]) == "# Another\n"
    publish.publish("small.yaml", str(root / "run"), root=root)
    said = "Not finished, and missing here: rlp (seed 1, 2), next-token (seed 2)."
    assert f"results.md)):\n\n{said}\n\n| arm |" in (root / "README.md").read_text()
