"""Turns a model reference into a local directory with safetensors, configuration and tokenizer."""

from __future__ import annotations

import os
import re
from pathlib import Path

from checkpoints.errors import CheckpointError, CheckpointUnreachable

ACCEPTED = (
    "a local Hugging Face directory, a hub id like owner/name or owner/name@revision, smollm2-135m, lab, "
    "random:PATH, random:lab"
)
# The model trained by the recipe lab-base, with the tokenizer for the lab's data.
LAB = Path(__file__).parent / "lab"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
# Weights only as safetensors: nothing that has to be unpickled or executed.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md"]
# Subfolders hold other formats, except for our own exports' thinking parts; consolidated files duplicate the weights.
HUB_SKIPPED = ["*/*", "consolidated*"]
HUB_THINKING = ["thinking/thinking.json", "thinking/thinking.safetensors"]


def cache_root(cache_dir: Path | None = None) -> Path:
    """The argument, else FORETHOUGHT_CACHE, else ~/.cache/forethought."""
    return cache_dir or Path(os.environ.get("FORETHOUGHT_CACHE") or Path.home() / ".cache" / "forethought")


def resolve(reference: str | Path, cache_dir: Path | None = None, weights: bool = True) -> Path:
    """A directory with config.json, safetensors and tokenizer.json, downloaded if necessary; of the hub all but the
    safetensors, if no `weights` are needed.

    For `random:PATH`, the directory that contains the configuration. Raises CheckpointError.
    """
    reference = str(reference)
    path = Path(reference.removeprefix("random:"))
    if path.is_dir():
        return path
    if reference in ("lab", "random:lab"):
        return LAB
    if reference.startswith("random:"):
        if path.is_file():
            return path.parent
        raise CheckpointError(f"{reference}: {path} does not exist; give a config.json or a directory with one")
    if reference == "smollm2-135m":
        from checkpoints.smollm2 import smollm2_directory

        return smollm2_directory(cache_root(cache_dir))
    if HUB_ID.fullmatch(reference):
        return _from_hub(reference, HUB_FILES if weights else HUB_FILES[1:])
    raise CheckpointError(f"no model {reference!r}; give {ACCEPTED}")


def _from_hub(reference: str, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    # HTTPError comes from whichever HTTP client huggingface_hub is built on.
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = reference.partition("@")
    try:
        for files, skipped in ((HUB_THINKING, None), (wanted, HUB_SKIPPED)):
            path = snapshot_download(name, revision=revision or None, allow_patterns=files, ignore_patterns=skipped)
        return Path(path)
    except HFValidationError:
        raise CheckpointError(f"no model {reference!r}; give {ACCEPTED}") from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{name!r} on the hub has no revision {revision!r}; give an existing branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"no model {name!r} on the hub that you have access to; check the name, or log in with `hf auth login`"
        ) from None
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointUnreachable(
            f"cannot fetch {reference!r} from the hub ({type(error).__name__}); "
            "check the network connection, or give a local directory as --model"
        ) from None
