"""Where what can be made again is kept."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from data_pipelines.config import DataError


def cache_directory(cache_dir: Path | None = None) -> Path:
    """The argument, else `$FORETHOUGHT_CACHE`, else `~/.cache/forethought`."""
    return cache_dir or Path(os.environ.get("FORETHOUGHT_CACHE") or "~/.cache/forethought").expanduser()


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name first, so that none is ever incomplete. Raises DataError if it cannot."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"the cache {path.parent} cannot be written ({error}); free up space, or set FORETHOUGHT_CACHE to another "
            "directory"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
