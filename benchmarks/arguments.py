"""The arguments of `forethought bench`, apart from what runs it so that `--help` needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

PART_NAMES = ("attention", "steps", "rollouts", "memory", "curves")


def parts(value: str) -> tuple[str, ...]:
    """Names of parts between commas."""
    chosen = tuple(value.split(","))
    unknown = [name for name in chosen if name not in PART_NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {', '.join(map(repr, unknown))}; there are {', '.join(PART_NAMES)}")
    return chosen


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", type=parts, default=PART_NAMES, metavar="PART,…", help=f"of {', '.join(PART_NAMES)}")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="smaller, no targets judged")
    sizes.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="only to see that it runs")
    parser.set_defaults(size="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--repeats", type=positive, metavar="N", help="rounds of each row; default: as the size has it")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="directory of the results")
