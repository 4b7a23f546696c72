"""Does RLP bring out a latent skill? The lab's experiment with all its controls, in one command:

    python -m benchmarks.lab

For each seed, from the shipped base model: RLP (recipe quickstart, fewer steps of more rows), next-token prediction at
equal FLOPs, RLP with its rewards shuffled within each group, RPT (lab-rpt), and Quiet-STaR (lab-quiet-star). All are
evaluated on the same held-out problems: NLL of the answer without a thought, after the model's own and after others,
with 95% intervals over problems; fraction of correct thoughts. RLP's models are also compared with the base model on
longer chains, other tasks and other surface forms.

Writes medians and ranges over the seeds to benchmarks/results/lab.json and prints them. Runs are kept in runs/lab-*, so
an interrupted command resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from data_pipelines import DataConfig, Tokenizer, open_data
from models.philox import Rng
from models.thinking import ThinkingModel
from models.thoughts import Text
from objectives import CounterfactualTest, QuietStar, RlpConfig
from objectives.template import encode_tag
from pretrain.assembly import make_objective
from pretrain.evaluation.held_out import HeldOut, score_held_out, summarise
from pretrain.opening import open_model
from pretrain.recipe import Recipe
from pretrain.recipe_files import load_recipe
from pretrain.run import fit
from pretrain.run_directory import RunDirectory

RESULTS = Path(__file__).parent / "results" / "lab.json"
BASE = "lab"
TRAINED_ON = "lab:tasks=sum,chain=4"
STEPS, ROWS_PER_STEP = 85, 8  # of RLP and its controls: larger batches than the quickstart's, for less noise
ROWS = 24  # held-out rows of 256 tokens, about 20 problems each
LONGEST = 20  # sampled tokens of a thought: enough for chains of 8 with spaces and the closing tag
SHIFTS = {
    "trained on: sum, 4 steps": TRAINED_ON,
    "sum, 3 steps": "lab:tasks=sum,chain=3",
    "sum, 5 steps": "lab:tasks=sum,chain=5",
    "sum, 6 steps": "lab:tasks=sum,chain=6",
    "sum, 8 steps": "lab:tasks=sum,chain=8",
    "sum, 4 steps, letters for operators": "lab:tasks=sum,chain=4,format=letters",
    "sum, 4 steps, written from right to left": "lab:tasks=sum,chain=4,format=mirrored",
    "substitution, 4 steps": "lab:tasks=substitution,chain=4",
    "substitution, 4 steps, letters": "lab:tasks=substitution,chain=4,format=letters",
    "arithmetic, 4 steps": "lab:tasks=arithmetic,chain=4",
    "boolean, 4 steps": "lab:tasks=boolean,chain=4",
    "pointer, 4 steps": "lab:tasks=pointer,chain=4",
}


def run(recipe: Recipe, **changes: Any) -> tuple[Path, Recipe]:
    """Fits a changed recipe, or resumes it; returns the run directory and the recipe."""
    recipe = recipe.replaced(**changes)
    return fit(recipe), recipe


def train(seed: int, work: Path) -> dict[str, Path]:
    """Trains a seed's runs, or resumes them; their directories by name."""
    quickstart = load_recipe("quickstart").replaced(control=None, seed=seed, steps=STEPS, rows_per_step=ROWS_PER_STEP)
    assert isinstance(quickstart.objective, RlpConfig)
    at = {name: str(work / f"lab-{name}-{seed}") for name in ("rlp", "next_token", "shuffled", "rpt", "quiet_star")}
    rlp, _ = run(quickstart, run_dir=at["rlp"])
    controlled = quickstart.replaced(control=load_recipe("smollm2-next-token").objective)
    spent = cost(rlp)
    control = controlled.control_recipe(int(spent["step"]), spent["flops"], at["next_token"])
    next_token, _ = run(control)
    shuffled, _ = run(quickstart, run_dir=at["shuffled"], objective=quickstart.objective.replaced(rewards="shuffled"))
    rpt, _ = run(load_recipe("lab-rpt"), seed=seed, run_dir=at["rpt"])
    quiet_star, _ = run(load_recipe("lab-quiet-star"), seed=seed, run_dir=at["quiet_star"])
    return {"rlp": rlp, "next_token": next_token, "shuffled": shuffled, "rpt": rpt, "quiet_star": quiet_star}


def answers(model: ThinkingModel, tokenizer: Tokenizer, lab: str, seed: int) -> dict[str, float]:
    """Scores on held-out problems, with thoughts between think tags."""
    quickstart = load_recipe("quickstart")
    assert isinstance(quickstart.objective, RlpConfig)
    longer = quickstart.replaced(objective=quickstart.objective.replaced(length=LONGEST), seed=seed)
    evaluator = make_objective(longer, tokenizer)
    data = open_data(DataConfig(reference=lab, length=256), tokenizer, 0)
    held_out = HeldOut(Text(**data.held_out_rows(ROWS)), data.held_out_documents(ROWS))
    test = CounterfactualTest(encode_tag(tokenizer, " ")[0], data.solutions(ROWS))
    scores = score_held_out(evaluator, model, held_out, Rng(seed, 2**32 - 2), 8, test)
    summary = summarise(scores, scores.text_nll_E)
    found = {f"nll_{condition}": interval["nll"] for condition, interval in summary["counterfactual"].items()}
    for condition, interval in summary["counterfactual_minus_own"].items():
        found |= {f"{condition}_minus_own": interval["nll"]}
        found |= {f"{condition}_minus_own_{end}": interval[end] for end in ("low", "high")}
    found["problems"] = summary["documents_scored"]
    return found | {name: summary[name] for name in ("thought_right", "accuracy_thought", "accuracy_text")}


@torch.no_grad()
def quiet_answers(model: ThinkingModel, tokenizer: Tokenizer, objective: QuietStar, seed: int) -> dict[str, float]:
    """Quiet-STaR's own evaluation at the marker: greedy thoughts between its delimiters, mixed in."""
    data = open_data(DataConfig(reference=TRAINED_ON, length=256), tokenizer, 0)
    text, solutions = Text(**data.held_out_rows(ROWS)), data.solutions(ROWS)
    nll, right, base = [], [], []
    for row in range(ROWS):
        scores = objective.evaluate(model, text.rows(slice(row, row + 1)), Rng(seed, 2**32 - 2))
        assert scores.thoughts is not None and scores.thought_nll_BN is not None
        for (of, place), steps in solutions.items():
            if of == row:
                said = scores.thoughts.tokens_BKSM[0, 0, 1 : 1 + objective.config.L, place].tolist()
                nll.append(scores.thought_nll_BN[0, place].item())
                base.append(scores.text_nll_BN[0, place].item())
                right.append(float(said == list(steps)))
    return {
        "mixed_nll_own": statistics.mean(nll),
        "mixed_nll_none": statistics.mean(base),
        "mixed_thought_right": statistics.mean(right),
    }


def cost(directory: Path) -> dict[str, float]:
    """Training seconds, FLOPs and steps."""
    run_directory = RunDirectory(directory)
    last = run_directory.read(run_directory.metrics)[-1]
    return {name: last[name] for name in ("seconds", "flops", "step")}


def over_seeds(found: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
        for name in found[0]
        for values in [[one[name] for one in found]]
    }


def show(results: dict[str, Any]) -> None:
    console = Console(highlight=False, width=140)
    columns = ("nll_none", "nll_own", "nll_shuffled", "nll_other", "nll_filler", "nll_right", "thought_right")
    table = Table(title="Held-out answers, nats: median over seeds (range)", title_justify="left")
    for column in ("", *columns, "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in results["objectives"].items():
        cells = [f"{found[c]['median']:.2f} ({found[c]['min']:.2f}–{found[c]['max']:.2f})" for c in columns]
        table.add_row(name, *cells, f"{found['seconds']['median']:.0f}" if "seconds" in found else "")
    console.print(table)
    title = "NLL minus that after the own thought: median over seeds [95% intervals over problems, all seeds']"
    table = Table(title=title, title_justify="left")
    conditions = ("shuffled", "other", "filler", "none")
    for column in ("", *conditions):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in results["objectives"].items():
        parts = [[found[f"{c}_minus_own{end}"] for end in ("", "_low", "_high")] for c in conditions]
        table.add_row(name, *(f"{a['median']:+.2f} [{b['min']:+.2f}, {c['max']:+.2f}]" for a, b, c in parts))
    console.print(table)
    table = Table(title="Shift: base → after RLP", title_justify="left")
    for column in ("problems", "correct thoughts", "NLL after own thought", "NLL without a thought"):
        table.add_column(column, justify="left" if column == "problems" else "right")
    for name, (base, after) in results["shift"].items():
        pairs = [(base[c]["median"], after[c]["median"]) for c in ("thought_right", "nll_own", "nll_none")]
        table.add_row(name, *(f"{a:.2f} → {b:.2f}" for a, b in pairs))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    base = open_model(BASE)
    found: dict[str, list[dict[str, float]]] = {"base": []}
    shifts: dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]] = {name: ([], []) for name in SHIFTS}
    for seed in seeds:
        runs = train(seed, arguments.work)
        found["base"].append(answers(base.model, base.tokenizer, TRAINED_ON, seed))
        for name, directory in runs.items():
            opened = open_model(str(directory))
            scores = answers(opened.model, opened.tokenizer, TRAINED_ON, seed) | cost(directory)
            if name == "quiet_star":
                assert opened.recipe is not None
                objective = make_objective(opened.recipe, opened.tokenizer)
                assert isinstance(objective, QuietStar)
                scores |= quiet_answers(opened.model, opened.tokenizer, objective, seed)
            found.setdefault(name, []).append(scores)
            if name == "rlp":
                for shift, lab in SHIFTS.items():
                    for model, into in zip((base.model, opened.model), shifts[shift], strict=True):
                        into.append(answers(model, opened.tokenizer, lab, seed))
    results = {
        "environment": environment(),
        "seeds": list(seeds),
        "objectives": {name: over_seeds(scores) for name, scores in found.items()},
        "by_seed": found,
        "shift": {name: [over_seeds(a), over_seeds(b)] for name, (a, b) in shifts.items()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
