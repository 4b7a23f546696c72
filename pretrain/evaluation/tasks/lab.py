"""The lab's problems as a dataset for lm-eval: generated, so there is nothing to fetch."""

from __future__ import annotations

from typing import Any

import datasets

from data_pipelines.lab import MARKER, LabConfig, answers, problems

PROBLEMS = 500


def held_out(lab_task: str, chain: int, **_: Any) -> dict[str, datasets.Dataset]:
    """Problems that no run trains on. lab_task, chain: as in a data reference, `lab:tasks=TASK,chain=CHAIN`."""
    config = LabConfig(tasks=(lab_task,), chain=(chain, chain))
    choices = [*answers(lab_task)]
    rows = [
        {"question": f"{problem.prompt}{MARKER}", "choices": choices, "gold": choices.index(problem.answer)}
        for problem in problems(config, seed=0, count=PROBLEMS)
    ]
    return {"test": datasets.Dataset.from_list(rows)}
