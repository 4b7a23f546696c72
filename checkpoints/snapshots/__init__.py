"""A run's own checkpoints: sharded, written in the background, complete and unaltered or refused by name."""

from checkpoints.snapshots.format import (
    Snapshot,
    all_checkpoints,
    find_checkpoint,
    find_snapshot,
    load_checkpoint,
    name_of,
    newest_checkpoint,
    newest_snapshot,
    open_snapshot,
)
from checkpoints.snapshots.retention import prune, remove_after, remove_leftovers
from checkpoints.snapshots.writing import SnapshotWriter, save_checkpoint

__all__ = [
    "Snapshot",
    "SnapshotWriter",
    "all_checkpoints",
    "find_checkpoint",
    "find_snapshot",
    "load_checkpoint",
    "name_of",
    "newest_checkpoint",
    "newest_snapshot",
    "open_snapshot",
    "prune",
    "remove_after",
    "remove_leftovers",
    "save_checkpoint",
]
