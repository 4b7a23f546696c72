"""`forethought bench`: all rows in one process, reported as median ratios in a table, a JSON file and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.report import print_report, print_row, write_picture
from benchmarks.rows import ROWS
from benchmarks.rows.row import Row, run_row
from benchmarks.settings import SIZES, Settings
from benchmarks.targets import judge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device() -> torch.device:
    """FORETHOUGHT_DEVICE, else CUDA if available, else CPU."""
    asked, there = os.environ.get("FORETHOUGHT_DEVICE"), torch.cuda.is_available()
    if asked not in (None, "", "cpu", "cuda") or (asked == "cuda" and not there):
        why = "there is no CUDA device" if asked == "cuda" else "it must be cpu or cuda"
        raise SystemExit(f"forethought: FORETHOUGHT_DEVICE is {asked!r}, but {why}; unset it to choose automatically")
    return torch.device(asked or ("cuda" if there else "cpu"))


def bench(
    only: Sequence[str], size: str, dtype: str | None, repeats: int | None, out: Path, missing: bool = False
) -> int:
    """Runs parts, or rows as PART:ROW, writes OUT/<cpu or cuda>[-DTYPE].json and .png, and returns how many rows or
    variants failed.

    The file is written after every row. Other rows that are already in it are kept if they were measured at the same
    commit, on the same device and at the same size, so parts can be run one at a time; if `missing`, all rows are.
    """
    device = choose_device()
    chosen = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    settings = SIZES[size](device, chosen, repeats)
    about = {"environment": environment(device), "settings": settings.to_json()}
    if out.exists() and not out.is_dir():
        raise SystemExit(f"forethought: {out} is a file; name a directory for the results with --out")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{device.type}{'-' + dtype if dtype else ''}.json"
    rows, failures = _kept(path, about), []
    for part, name, measure in _chosen(only, settings):
        before = [r for r in rows if (r["part"], r["name"]) == (part, name)]
        if not (missing and before):
            row = run_row(part, name, measure)
            failures += [f"{part}, {failure}" for failure in row.failures()]
            rows = [r for r in rows if r not in before] + [row.to_json()]
            print_row(rows[-1])
            order = list(ROWS)
            rows.sort(key=lambda r: order.index(r["part"]))
        results = about | {"targets": judge(rows, device.type, size), "rows": rows}
        # Replaced in one step, so an interrupted run leaves the earlier rows intact.
        written = path.with_suffix(".json.part")
        written.write_text(json.dumps(results, indent=1) + "\n")
        written.replace(path)
    print_report(results, {chosen.partition(":")[0] for chosen in only})
    picture = write_picture(results, path.with_suffix(".png"))
    print(f"wrote {path}" + (f" and {picture.name}" if picture else "; no picture: matplotlib is not installed"))
    for failure in failures:
        print(f"failed: {failure}")
    return len(failures)


def _chosen(only: Sequence[str], settings: Settings) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    """Part, name and measurement of the rows that are meant."""
    for chosen in only:
        part, _, wanted = chosen.partition(":")
        rows = dict(ROWS[part](settings))
        if wanted and wanted not in rows:
            raise SystemExit(f"forethought: no row {wanted!r} in {part}; choose from {', '.join(rows)}")
        yield from ((part, name, measure) for name, measure in rows.items() if wanted in ("", name))


def _kept(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows already in a file, if its environment and settings are the same."""
    try:
        before = json.loads(path.read_text())
        return before["rows"] if {name: before[name] for name in about} == about else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
