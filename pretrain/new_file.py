"""Files that a command is asked to write, and that must not be there yet."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from checkpoints.errors import CheckpointError


def refuse_to_overwrite(path: Path, option: str) -> None:
    """Raises CheckpointError if something has the name that was given as `option`."""
    if os.path.lexists(path):
        raise CheckpointError(f"{path} exists; remove it or give another {option}")


@contextmanager
def new_file(path: Path, option: str) -> Iterator[BinaryIO]:
    """A file that has its name once it is whole. Raises CheckpointError if that is taken, or cannot be written."""
    refuse_to_overwrite(path, option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / "new"
            with made.open("wb") as file:
                yield file
            made.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}); give another {option}") from None
