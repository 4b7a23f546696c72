"""What a measurement was made on: everything a reader needs to judge it, nothing that names a machine."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Commit, versions, device and threads."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    ).stdout.strip()
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "commit": commit or None,
        "uncommitted_changes": bool(changed),
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "cpu_capabilities": sorted(name for name, has in capabilities.items() if has is True and "bf16" in name),
    }
