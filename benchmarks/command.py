"""`forethought bench`, which the command line finds by its entry point, and `python -m benchmarks`, which needs none of
the project's other dependencies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.arguments import add_arguments


def bench(**options: Any) -> None:
    """Measure speed and memory on this machine, as ratios within one run.

    Attention against its reference, Quiet-STaR and RLP-shaped steps against next-token steps, rollouts against
    transformers' generate, peak memory, and how the cost of a step grows. Writes a JSON file and a picture; the exit
    code is 1 if anything could not be measured. FORETHOUGHT_DEVICE=cpu keeps it off a GPU.
    """
    # Imported late so that --help needs no torch.
    from benchmarks.bench import bench as run

    if run(**options):
        raise SystemExit(1)


# What the command line takes of a command: the function to run, and what adds its arguments to a parser.
command = bench, add_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="The same as `forethought bench`.")
    add_arguments(parser)
    bench(**vars(parser.parse_args(argv)))
