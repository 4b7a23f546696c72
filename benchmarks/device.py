"""The device itself: what it reaches at best, and which kernels a step spends its time in.

    python -m benchmarks.device ceilings|profile [--tiny] [--out DIR]

`ceilings` writes ceilings.json: FLOP/s of a bf16 matrix product, bytes/s of a copy, and the clocks under that load.
`profile` writes profile-OBJECTIVE.txt, the kernels of one step of the large model by time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import choose_device
from benchmarks.environment import bf16_peak, environment
from benchmarks.measure import Spread, race, synchronise
from benchmarks.settings import SIZES, Settings
from benchmarks.workloads import copy_bytes, make_model, make_text, next_token, quiet_star, training_step

CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_event_reasons.active"


def ceilings(settings: Settings, out: Path) -> None:
    device, n = settings.device, settings.product_size
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> dict[str, float]:
        _ = a @ b
        return {"flops": 2 * n**3}

    measured = race({"product": product, "copy": partial(copy_bytes, settings.copy_bytes, device)}, device, 5)
    best = {
        "product, FLOP/s": vars(Spread.of(measured["product"].rate("flops"))),
        "vendor-rated FLOP/s": bf16_peak(device),
        "copy, bytes/s": vars(Spread.of(measured["copy"].rate("bytes"))),
        "clocks under load": _clocks(product) if device.type == "cuda" else None,
    }
    (out / "ceilings.json").write_text(json.dumps({"environment": environment(device), "n": n} | best, indent=1) + "\n")
    print(json.dumps(best, indent=1))


def _clocks(load) -> dict[str, str] | None:
    """What nvidia-smi says while the device is busy for about a second."""
    for _ in range(500):
        load()
    query = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    finally:
        torch.cuda.synchronize()
    return dict(zip(CLOCKS.split(","), said.strip().split(", "), strict=False))


def profile_steps(settings: Settings, out: Path) -> None:
    assert settings.large_model is not None
    device, c = settings.device, settings.large
    model = make_model(settings.large_model, torch.bfloat16, device)
    rows = {"quiet_star": 1, "next_token": c["next_token_rows"]}
    objectives = {"quiet_star": quiet_star(c["L"], c["A"], c["K"]), "next_token": next_token()}
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    for name, objective in objectives.items():
        step = partial(training_step, objective, model, make_text(settings.large_model, rows[name], c["N"], device))
        for _ in range(2):
            step()
        with profile(activities=activities) as profiler:
            step()
            synchronise(device)
        order = f"self_{device.type}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
        (out / f"profile-{name}.txt").write_text(table + "\n")
        print(name, *table.splitlines()[:20], sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ceilings", "profile"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="directory for the results")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = SIZES["tiny" if arguments.tiny else "full"](choose_device(), torch.bfloat16, None)
    {"ceilings": ceilings, "profile": profile_steps}[arguments.what](settings, arguments.out)


if __name__ == "__main__":
    main()
