"""`checkpoints` can be imported by those who lack what only some references need."""

from __future__ import annotations

import subprocess
import sys


def test_importing_needs_no_optional_package():
    """Not even for a name that only fetching uses."""
    absent = ("transformers", "gguf", "huggingface_hub", "lightning", "wandb")
    code = f"""
import sys
sys.modules |= dict.fromkeys({absent})
import checkpoints
assert all(hasattr(checkpoints, name) for name in checkpoints.__all__)
assert checkpoints.__all__ == sorted(checkpoints.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
