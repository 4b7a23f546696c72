"""`forethought bench`, which the command line finds as an entry point, and `python -m benchmarks`, which needs none of
the project's optional dependencies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PART_NAMES = ("attention", "steps", "rollouts", "memory", "curves", "data", "fit")


def parts(value: str) -> tuple[str, ...]:
    """Comma-separated names of parts, or PART:ROW."""
    chosen = tuple(value.split(","))
    unknown = [name for name in chosen if name.partition(":")[0] not in PART_NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no part {', '.join(map(repr, unknown))}; choose from {', '.join(PART_NAMES)}"
        )
    return chosen


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        type=parts,
        default=PART_NAMES,
        metavar="PART[:ROW],…",
        help=f"default: all of {', '.join(PART_NAMES)}",
    )
    parser.add_argument("--missing", action="store_true", help="leave out rows that the results already have")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="smaller; targets are not judged"
    )
    sizes.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="toy sizes, to see that it runs")
    parser.set_defaults(size="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--repeats", type=positive, metavar="N", help="rounds per row; default: set by the size")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="directory for the results")


def bench(**options: Any) -> None:
    """Measure speed and memory on this machine, as ratios within one run.

    Attention against its reference, Quiet-STaR and RLP-shaped steps against next-token steps, rollouts against
    transformers' generate, peak memory, how the cost of a step grows, runs against bare loops. Writes a JSON file and a
    picture; the exit code is 1 if anything failed. FORETHOUGHT_DEVICE=cpu keeps it off the GPU.
    """
    # Imported late so that --help needs no torch.
    from benchmarks.bench import bench as run

    if run(**options):
        raise SystemExit(1)


# What the command line expects of a command: the function to run, and one that adds its arguments to a parser.
command = bench, add_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="The same as `forethought bench`.")
    add_arguments(parser)
    bench(**vars(parser.parse_args(argv)))
