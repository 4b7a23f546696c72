"""The walls of the design: what may import what, as contracts in pyproject.toml, and no cycles among modules.

Imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "pretrain", "objectives", "checkpoints", "data_pipelines", "models")
LINT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def cycles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Groups of modules that import one another, directly or by way of others."""
    upstream = {module: graph.find_upstream_modules(module) for module in graph.modules}
    groups = {frozenset(n for n in upstream[m] if m in upstream[n]) | {m} for m in graph.modules}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_contracts_are_kept():
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_modules_import_each_other():
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert set(PACKAGES) < graph.modules
    assert cycles(graph) == []


def test_cycles_are_found():
    graph = grimp.ImportGraph()
    for importer, imported in [
        ("a", "a.b"),
        ("a.b", "a.c"),
        ("a.c", "a.b"),
        ("d", "e"),
        ("e", "f"),
        ("f", "d"),
        ("f", "a"),
    ]:
        graph.add_import(importer=importer, imported=imported)
    assert cycles(graph) == [["a.b", "a.c"], ["d", "e", "f"]]
