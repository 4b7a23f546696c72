"""Reports on run directories made by hand."""

from __future__ import annotations

import re
import shlex
import sys
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import DataConfig
from objectives.next_token import NextTokenConfig
from objectives.quiet_star import QuietStarConfig
from objectives.rlp import RlpConfig
from pretrain.plots import INK
from pretrain.recipe import Recipe
from pretrain.recipe_files import recipe_to_yaml
from pretrain.report import print_report, write_report
from pretrain.run_directory import RunDirectory

HOSTILE = "<script>alert('thought')</script> & [bold]more[/bold] :smile:\n\x1b[31m\ud800"
COUNTERFACTUAL = {
    "own": {"nll": 0.125, "low": 0.1, "high": 0.15},
    "other": {"nll": 2.5, "low": 2.4, "high": 2.6},
    "shuffled": {"nll": 1.875, "low": 1.775, "high": 2.025},
    "filler": {"nll": 2.25, "low": 2.2, "high": 2.3},
    "none": {"nll": 3.0, "low": 2.9, "high": 3.1},
}
MINUS_OWN = {
    "other": {"nll": 2.375, "low": 2.25, "high": 2.5},
    "shuffled": {"nll": 1.75, "low": 1.625, "high": 1.9},
    "filler": {"nll": 2.125, "low": 2.0, "high": 2.25},
    "none": {"nll": 2.875, "low": 2.75, "high": 3.0},
}


def evaluation(step: int, text: float, thought: float | None = None, **more) -> dict:
    record = {"step": step, "tokens": 100 * step, "flops": step * 10**11, "tokens_scored": 500.0, "nll_text": text}
    record["nll_text_deciles"] = [text + i / 8 for i in range(10)]
    if thought is not None:
        record |= {"nll_thought": thought, "nll_thought_deciles": [thought + i / 16 for i in range(10)]}
    return record | more


def metrics(step: int, **more) -> dict:
    record = {
        "step": step,
        "tokens": 100 * step,
        "flops": step * 10**11,
        "loss": 1.0 / step,
        "lr": 1e-3,
        "seconds": 2.0,
    }
    return record | {"grad_norm": 1.0, "skipped": 0, "tokens_per_second": 50.0, "data/documents": 7} | more


def sample(step: int, thought: str = "hm") -> dict:
    words = {"text": f"context {step} {HOSTILE}", "thought": thought, "continues": " goes on"}
    return {"step": step, "sample_id": 0, "position": 3, **words, "reward": 0.25, "advantage": 0.0}


def make(path: Path, recipe: Recipe, **records: list[dict]) -> tuple[RunDirectory, Recipe, float]:
    """A run directory with these records; what a report is made from."""
    path.mkdir(parents=True)
    directory = RunDirectory(path)
    directory.recipe.write_text(recipe_to_yaml(recipe))
    for name, lines in records.items():
        for line in lines:
            directory.append(getattr(directory, name), line)
    return directory, recipe, 12.0


def make_plain(path: Path, steps: int = 4, **more) -> tuple[RunDirectory, Recipe, float]:
    recipe = Recipe(steps=steps, objective=NextTokenConfig(), data=DataConfig(reference="python-docs"))
    plain = [metrics(step) for step in range(1, steps + 1)]
    return make(path, recipe, metrics=plain, evaluations=[evaluation(0, 3.5), evaluation(steps, 3.25)], **more)


def make_thinking(path: Path, **more) -> tuple[RunDirectory, Recipe, float]:
    recipe = Recipe(steps=20, objective=RlpConfig(length=8, thoughts=4), data=DataConfig(reference="lab:chain=4"))
    counterfactual = {"counterfactual": COUNTERFACTUAL, "counterfactual_minus_own": MINUS_OWN}
    shares = [{"accuracy_thought": 0.25, "thought_right": 0.125}, {"accuracy_thought": 0.75, "thought_right": 0.5}]
    return make(
        path,
        recipe,
        metrics=[metrics(step, reward=step / 8, thought_length=7.0) for step in range(1, 21)],
        evaluations=[evaluation(0, 2.5, 1.5, **shares[0]), evaluation(20, 3.0, 0.125, **shares[1], **counterfactual)],
        samples=[sample(step, HOSTILE) for step in range(1, 21)],
        warnings=[
            {"step": 20, "name": "leakage", "message": "75% of thoughts <contain> the token"}
            | {"metric": "target_in_thought"}
        ],
        **more,
    )


def with_control(run: tuple[RunDirectory, Recipe, float], steps: int = 40, reached: int = 40) -> None:
    directory, recipe, _ = run
    control = recipe.replaced(objective=NextTokenConfig(), steps=steps)
    evaluations = [evaluation(0, 2.5, 1.5), evaluation(reached, 2.3125, 2.4375, accuracy_thought=0.0625)]
    make(directory.control, control, metrics=[metrics(reached, flops=2_100_000_000_000)], evaluations=evaluations)


def printed(run, capsys) -> str:
    """What the terminal says, each line's spaces as one."""
    print_report(*run)
    return "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())


def rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page."""
    lines = re.findall(r"<tr>(.*?)</tr>", page.replace("&nbsp;", " "), re.DOTALL)
    return [[unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line, re.DOTALL)] for line in lines]


def test_the_terminal_compares_with_the_control(tmp_path, capsys):
    run = make_thinking(tmp_path / "run")
    with_control(run)
    out = printed(run, capsys)
    assert "(next_token," in out
    assert "without thoughts 2.5000 3.0000 +0.5000 2.3125" in out
    assert "1.5000 0.1250 -1.3750 2.4375" in out
    assert "25.0% 75.0% +50.0% 6.2%" in out
    assert "right thoughts 12.5% 50.0% +37.5%" in out
    assert "its own thought 0.125 [0.100, 0.150]" in out
    assert "its own, in random order 1.875 [1.775, 2.025] +1.750 [1.625, 1.900]" in out
    assert "own thought minus shuffled: -1.750 nats [-1.900, -1.625]" in out
    said = "75% of thoughts <contain> the token; judged by target_in_thought: share of thoughts that contain the token"
    assert f"warning: leakage (step 20): {said} to predict" in out
    assert "rlp: 20 steps, 2,000 tokens, 2.0 TFLOP" in out
    assert "control, next_token: 40 steps, 4,000 tokens, 2.1 TFLOP" in out
    # Fifty tokens a decile say less than the control.
    assert "decile" not in out
    assert "report.html" not in out


def test_the_terminal_without_control(tmp_path, capsys):
    out = printed(make_thinking(tmp_path / "run"), capsys)
    assert "equal FLOPs" not in out
    assert "10 3.625 4.125 +3.438" in out
    plain = printed(make_plain(tmp_path / "plain"), capsys)
    assert "without thoughts 3.5000 3.2500 -0.2500" in plain
    assert "10 4.625 4.375" in plain
    for absent in ("own thought", "Does the thought matter", "raw gain", "Thoughts", "warning", "None", "nan"):
        assert absent not in plain


def test_what_a_gain_is_worth_is_said(tmp_path, capsys):
    """By decile against shuffled and filler, the raw gain beside them; what too few documents make of intervals."""
    run = make_thinking(tmp_path / "run")
    shuffled, filler = {"nll": 0.5, "low": 0.25, "high": 0.75}, {"nll": -0.5, "low": -0.875, "high": -0.125}
    bins = {"shuffled": [shuffled | {"documents": 30}] * 10, "filler": [filler | {"documents": 19}] * 9 + [None]}
    of_other_rows = evaluation(10, 9.5, 9.5, held_out="other rows", counterfactual=COUNTERFACTUAL)
    first = evaluation(15, 2.25, 1.25, held_out="these rows")
    found = {name: value for name, value in COUNTERFACTUAL.items() if name != "other"}
    last = {"counterfactual_minus_own": MINUS_OWN, "counterfactual_minus_own_deciles": bins, "documents_scored": 19.0}
    for record in (
        of_other_rows,
        first,
        evaluation(20, 3.0, 0.125, held_out="these rows", counterfactual=found, **last),
    ):
        run[0].append(run[0].evaluations, record)
    out = printed(run, capsys)
    assert "own minus shuffled own minus filler raw gain" in out
    assert "1 3.000 -0.50 [-0.75, -0.25] +0.50 [0.12, 0.88]* +2.875" in out
    assert "10 4.125 -0.50 [-0.75, -0.25] +3.438" in out
    page = unescape(write_report(*run).read_text(encoding="utf-8"))
    for said in ("raw gain is no gain by thinking", "* of fewer than 20 documents", "(here 19)", "there is none"):
        assert said in out and said in page, said
    assert "documents" not in printed(make_thinking(tmp_path / "many"), capsys)


def test_thoughts_on_the_terminal_are_text(tmp_path, capsys):
    run = make_thinking(tmp_path / "run")
    run[0].append(run[0].samples, sample(20, "[bold]a :smile:\x1b[31m" + "long " * 1000 + "end"))
    print_report(*run)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]" in out and ":smile:" in out and "\\x1b" in out and "…" in out
    assert out.count("long") < 100


def test_a_control_that_has_not_ended_is_left_out(tmp_path, capsys):
    run = make_thinking(tmp_path / "run")
    with_control(run, reached=39)
    assert "equal FLOPs" not in printed(run, capsys)


def test_the_page(tmp_path, capsys):
    run = make_thinking(tmp_path / "run")
    with_control(run)
    path = write_report(*run)
    assert path == tmp_path / "run" / "report.html"
    page = path.read_text(encoding="utf-8")
    table = rows(page)
    assert ["without thoughts", "2.5000", "3.0000", "+0.5000", "2.3125"] in table
    assert ["after its own thought", "1.5000", "0.1250", "-1.3750", "2.4375"] in table
    assert ["right thoughts", "12.5%", "50.0%", "+37.5%", ""] in table
    assert ["filler of the same length", "2.250 [2.200, 2.300]", "+2.125 [2.000, 2.250]"] in table
    assert ["1", "2.500", "3.000", "+2.875"] in table
    text = unescape(page)
    for said in (
        "own thought minus shuffled: -1.750 nats [-1.900, -1.625]",
        "leakage (step 20): 75% of thoughts <contain> the token",
        "trained with rlp on lab:chain=4: 20 steps",
        "control learned by next_token",
        "control, next_token: 40 steps, 4,000 tokens, 2.1 TFLOP",
        f"forethought export {tmp_path / 'run'} OUT",
        recipe_to_yaml(run[1]),
    ):
        assert said in text
    # Six thoughts of the beginning, six of the end.
    assert [row[0] for row in table if row[-1] == "+0.250"] == [*"123456", *map(str, range(15, 21))]
    # Each plot a picture of its own, so that a phone shows them below each other.
    pictures = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    logged = ["loss", "lr", "grad_norm", "skipped", "tokens_per_second", "reward", "thought_length"]
    assert pictures == ["Held-out NLL", "Does the thought matter?", *logged]
    # Their words are text, in the page's own colour.
    assert ">nats per token (lower is better)</text>" in page and "currentColor" in page and INK not in page
    # On a phone, where each row is a list, every value has its column's name.
    assert '<td data-column="before (step 0)">2.5000</td>' in page
    assert "<title>run: rlp on lab:chain=4</title>" in page
    assert "report.html" in printed(run, capsys)


def test_the_page_is_safe_and_stands_alone(tmp_path):
    page = write_report(*make_thinking(tmp_path / "<i>run")).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(&#x27;thought&#x27;)&lt;/script&gt; &amp; [bold]" in page
    assert "\x1b" not in page
    # Plots refer to shapes of their own.
    assert not re.search(r"https?:|//|<link|url\((?!#)|href=\"(?!#)|@import", page)
    assert "default-src 'none'" in page


def test_the_page_of_a_run_that_does_not_think(tmp_path):
    page = write_report(*make_plain(tmp_path / "run")).read_text(encoding="utf-8")
    assert ["without thoughts", "3.5000", "3.2500", "-0.2500"] in rows(page)
    assert ["10", "4.625", "4.375"] in rows(page)
    assert "<p>None.</p>" in page
    for absent in ("own thought", "Does the thought matter", "<h2>Thoughts", "equal FLOPs", "forethought sample"):
        assert absent not in page


def test_sampling_is_offered_with_a_text_to_think_about(tmp_path, capsys):
    directory, recipe, seconds = make_plain(tmp_path / "a run")
    assert "forethought sample" not in printed((directory, recipe, seconds), capsys)
    quiet_star, marker = (recipe.replaced(objective=o) for o in (QuietStarConfig(), RlpConfig(positions="marker")))
    command = f"forethought sample '{tmp_path / 'a run'}' --text"
    assert f"{command} 'The capital of France is'" in printed((directory, quiet_star, seconds), capsys)
    assert f"{command} 'The capital of France is'" in printed((directory, marker, seconds), capsys)
    # The marker needs a token to predict behind it; `<|endoftext|>` on a command line would be read as text.
    directory.append(directory.samples, sample(1) | {"text": "it's 3+5=", "continues": "8<|endoftext|>"})
    directory.append(directory.samples, sample(1) | {"text": "\x1b[31m3+5="})
    assert command + " " + shlex.quote("it's 3+5=8") in printed((directory, marker, seconds), capsys)


@pytest.mark.parametrize("kind", ["thinking", "controlled", "plain", "gaps"])
def test_the_picture_is_an_image(kind, tmp_path):
    if kind == "plain":
        run = make_plain(tmp_path / "run", steps=1)
    elif kind == "gaps":
        run = make_plain(tmp_path / "run")
        run[0].append(run[0].metrics, metrics(5, reward=0.5, loss=float("nan")))
    else:
        run = make_thinking(tmp_path / "run")
        if kind == "controlled":
            with_control(run)
    write_report(*run)
    with Image.open(tmp_path / "run" / "report.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1000
        # Something is drawn in either half.
        for half in ((0, 0, image.width // 2, image.height), (image.width // 2, 0, image.width, image.height)):
            assert len(image.convert("RGB").crop(half).getcolors(1 << 24)) > 2


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    page = write_report(*make_thinking(tmp_path / "run")).read_text(encoding="utf-8")
    assert "matplotlib is not installed" in page
    assert "<svg" not in page
    assert ["after its own thought", "1.5000", "0.1250", "-1.3750"] in rows(page)
    assert not (tmp_path / "run" / "report.png").exists()
