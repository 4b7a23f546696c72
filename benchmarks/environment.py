"""The environment of a measurement: all that a reader needs to judge it, nothing that names a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

# Vendor-rated dense bf16 peak FLOP/s (data sheets, without sparsity), by the name that the driver reports.
BF16_PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L40S": 362e12,
}


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Commit, versions, device and threads. `device` defaults to CUDA if available, else CPU."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    commit = _git("rev-parse", "HEAD")
    return {
        # A copy of the tree without git history can be told its commit.
        "commit": commit or os.environ.get("FORETHOUGHT_COMMIT"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("lightning", "triton", "transformers")},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpu_capabilities": sorted(name for name, has in capabilities.items() if has is True and "bf16" in name),
    }


def bf16_peak(device: torch.device) -> float | None:
    """Vendor-rated dense bf16 peak FLOP/s; None if the device is not listed here."""
    return BF16_PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(Path(__file__).parents[1]), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
