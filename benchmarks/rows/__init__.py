"""The benchmark's rows by part: what is compared with what, and the resulting ratios."""

from collections.abc import Callable

from benchmarks.rows.attention import attention_rows
from benchmarks.rows.costs import curve_rows, memory_rows
from benchmarks.rows.data import data_rows
from benchmarks.rows.fitting import fitting_rows
from benchmarks.rows.rollouts import rollout_rows
from benchmarks.rows.row import Rows
from benchmarks.rows.steps import step_rows
from benchmarks.settings import Settings

ROWS: dict[str, Callable[[Settings], Rows]] = {
    "attention": attention_rows,
    "steps": step_rows,
    "rollouts": rollout_rows,
    "memory": memory_rows,
    "curves": curve_rows,
    "data": data_rows,
    "fit": fitting_rows,
}
