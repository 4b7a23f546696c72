"""The files that a data reference means, in their order: on this machine, behind URLs, or of a hub dataset.

Only names are read here, and of a hub dataset its README; no script of a dataset is ever executed. A shard's name does
not depend on where it lies: it is its path in the dataset, in the directory that was named, or below the last folder of
a pattern that is without wildcards and braces.
"""

from __future__ import annotations

import glob
import logging
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml

from data_pipelines.config import DataError, DataUnreachable, SourceConfig
from data_pipelines.shards import Format, Shard

log = logging.getLogger(__name__)
T = TypeVar("T")
PYTHON_DOCS = "python-docs"
FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}  # of all but parquet, which compresses by itself
_NAMED = 5  # files that a warning names at most
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<path>.*))?"
)
_PUSHED = re.compile(r"\w+-\d{5}-of-\d{5}\.")  # how `push_to_hub` calls a split's files
ACCEPTED = (
    f"{PYTHON_DOCS}, lab, lab:SETTINGS; a file, directory, glob or brace pattern of "
    f"{' '.join(FORMATS)} (all but .parquet also .gz or .zst), here or behind http(s)://; "
    "a hub dataset, always as OWNER/NAME, or hf://datasets/OWNER/NAME/GLOB"
)


@dataclass(frozen=True)
class Found:
    """shards: in the order in which they count. revision: the commit that they are of, for those of one hub dataset."""

    shards: list[Shard]
    revision: str | None


def find(source: SourceConfig, revision: str | None = None, patience: float = 600) -> Found:
    """The shards of a source: sorted within a pattern, patterns and what braces expand to in the order given.

    revision: a commit that takes the place of `source.revision`. patience: seconds to wait for a hub that does not
    answer. Raises DataError, and DataUnreachable where there was no way to tell what the reference means.
    """
    reference = source.reference
    if reference.startswith("hf://") or (_HUB_ID.fullmatch(reference) and not _is_path(reference)):
        return _on_hub(source, revision, patience)
    path = Path(reference).expanduser()
    if path.is_dir() and _in_hub_layout(path, source):
        return Found(_of_builder(source, str(path.resolve()), None), None)
    for key, default in (("config", None), ("split", "train"), ("revision", None)):
        if getattr(source, key) != default:
            raise DataError(f"data.{key} is of hub datasets and {reference!r} is none; leave it out")
    return Found([shard for root, pattern in _patterns(reference) for shard in _of_pattern(root, pattern)], None)


def shard_of(name: str, place: str, json_lines: bool = False) -> Shard | None:
    """What a file is by its name; None if it is of no supported type. json_lines: .json is jsonl, too."""
    stem, compression = name, ""
    for suffix, kind in _COMPRESSIONS.items():
        if name.endswith(suffix):
            stem, compression = name.removesuffix(suffix), kind
    if name.endswith(".tgz"):
        stem, compression = f"{name.removesuffix('.tgz')}.tar", "gz"
    format = FORMATS.get(os.path.splitext(stem)[1])
    if json_lines and stem.endswith((".json", ".ndjson")):
        format = "jsonl"
    if format is None or (format == "parquet" and compression):
        return None
    return Shard(name, place, format, compression, _is_on_hub(place))  # type: ignore[arg-type]


@cache
def warn_once(message: str) -> None:
    """A run opens its data several times."""
    log.warning("%s", message)


# Files and URLs


def _patterns(reference: str) -> list[tuple[str, str]]:
    """Of the parts of a list, all that their braces expand to, each with the folder below which its files are named.

    What exists is taken literally.
    """
    from braceexpand import braceexpand

    if Path(reference).expanduser().exists():
        return [(_root(reference), reference)]
    items = [item for part in reference.split("::") for item in _split_at_commas(part)]
    if "" in items:
        raise DataError(f"data reference {reference!r} has an empty part; remove the comma or :: beside it")
    found: list[tuple[str, str]] = []
    for item in items:
        try:
            expanded = [item] if Path(item).expanduser().exists() else braceexpand(item, escape=False)
            found += [(_root(item), pattern) for pattern in expanded]
        except ValueError:
            raise DataError(f"data reference {item!r} has braces without a partner; close them") from None
    return found


def _split_at_commas(text: str) -> Iterator[str]:
    """The parts between the commas outside braces."""
    start = depth = 0
    for at, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _root(pattern: str) -> str:
    """The directory itself, or the folder before wildcards and braces."""
    if Path(pattern).expanduser().is_dir():
        return pattern
    magic = r"[{?]" if _is_url(pattern) else r"[{*?[]"  # behind the ? of a URL is its query
    fixed = pattern if Path(pattern).expanduser().exists() else re.split(magic, pattern, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def _of_pattern(root: str, pattern: str) -> list[Shard]:
    json_lines = bool(re.search(r"\.json(\.gz|\.zst)?$", urlsplit(pattern).path if _is_url(pattern) else pattern))
    if _is_url(pattern):
        shard = shard_of(pattern.partition("?")[0][len(root) :], pattern, json_lines)
        if shard is None:
            raise DataError(f"data reference {pattern!r} ends in no supported type; accepted: {ACCEPTED}")
        return [shard]
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    elif path.exists():
        files = [path]
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = sorted(file.absolute() for file in files if file.is_file())
    above = Path(root).expanduser().absolute()
    shards = [shard_of(file.relative_to(above).as_posix(), str(file), json_lines) for file in files]
    found = [shard for shard in shards if shard is not None]
    if not found:
        problem = "is neither a known name nor an existing path"
        if files or path.is_dir():
            problem = "matches no file of a supported type"
        raise DataError(f"data reference {pattern!r} {problem}; accepted: {ACCEPTED}")
    others = [str(file) for file, shard in zip(files, shards, strict=True) if shard is None]
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        warn_once(f"not read: {', '.join(others[:_NAMED])}{more}; only {' '.join(FORMATS)} are")
    return found


def _is_url(pattern: str) -> bool:
    return pattern.startswith(("http://", "https://"))


def _is_path(reference: str) -> bool:
    return Path(reference).expanduser().exists() or shard_of(reference, reference, json_lines=True) is not None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# Hub datasets


def _in_hub_layout(path: Path, source: SourceConfig) -> bool:
    if source.config is not None or source.split != "train":
        return True
    if any(_PUSHED.match(file.name) for file in path.glob("data/*")):
        return True
    readme = path / "README.md"
    if not readme.is_file():
        return False
    from huggingface_hub import metadata_load

    try:
        return bool((metadata_load(readme) or {}).get("configs"))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(f"{readme} begins with broken YAML ({' '.join(str(error).split())}); repair it") from None


def _on_hub(source: SourceConfig, revision: str | None, patience: float) -> Found:
    from huggingface_hub import HfApi, HfFileSystem

    match = (_HUB_FILES if source.reference.startswith("hf://") else _HUB_ID).fullmatch(source.reference)
    if match is None:
        raise DataError(f"data reference {source.reference!r} is no hf://datasets/OWNER/NAME[@REVISION]/GLOB; write so")
    parts = match.groupdict()
    repo, pattern = parts["repo"], parts.get("path")
    named = {r for r in (parts["revision"], source.revision) if r is not None}
    if len(named) > 1:
        raise DataError(f"{source.reference} and data.revision {source.revision} differ; leave one out")
    wanted = revision or next(iter(named), None)

    def look() -> Found:
        api = HfApi()
        commit = api.dataset_info(repo, revision=wanted).sha
        assert commit is not None
        api.auth_check(repo, repo_type="dataset")  # anyone may see what a gated dataset is, but not its files
        if not pattern:
            return Found(_of_builder(source, repo, commit), commit)
        root = f"datasets/{repo}@{commit}/"
        shards = [
            shard
            for _, item in _patterns(pattern)
            for file in HfFileSystem().glob(root + item)
            if (shard := shard_of(path := file.removeprefix(root), _url(repo, commit, path), True)) is not None
        ]
        if not shards:
            raise DataError(
                f"data reference {source.reference!r} matches no file of a supported type; see {_page(repo)}"
            )
        return Found(shards, commit)

    return _patiently(look, repo, wanted, patience)


def _of_builder(source: SourceConfig, where: str, commit: str | None) -> list[Shard]:
    """The files of one split, as `datasets` finds them. where: an absolute directory, or a hub id."""
    try:
        import datasets  # takes 1.5 s
        from datasets.data_files import EmptyDatasetError
    except ImportError:
        raise DataError(
            f"{source.reference} needs the package datasets, which is not installed; pip install 'datasets>=5.0.1'"
        ) from None

    try:
        # In no cache of its own, where an older answer could stand in for a hub that gives none.
        with tempfile.TemporaryDirectory() as directory:
            builder = datasets.load_dataset_builder(where, source.config, revision=commit, cache_dir=directory)
    except (datasets.exceptions.DataFilesNotFoundError, EmptyDatasetError):
        raise DataError(f"{source.reference} has no files of a supported type; accepted: {ACCEPTED}") from None
    except ValueError as error:
        listed = re.search(r"[Aa]vailable(?: configs)?: (\[.*?\])", str(error), re.DOTALL)
        if listed is None:
            raise DataError(f"{source.reference} cannot be read by datasets ({_one_line(error)}); repair it") from None
        lacks = f"no configuration {source.config!r}" if source.config else "several configurations"
        raise DataError(
            f"{source.reference} has {lacks}; set data.config to one of {', '.join(yaml.safe_load(listed[1]))}"
        ) from None
    except RuntimeError:
        raise DataError(
            f"{source.reference} is a script, which is never executed; name its data files, as in "
            "hf://datasets/OWNER/NAME/*.parquet, if it has any"
        ) from None
    splits: Any = builder.config.data_files
    if source.split not in splits:
        raise DataError(
            f"{source.reference} has no split {source.split!r}; set data.split to one of {', '.join(map(str, splits))}"
        )
    return [_of_file(str(file), where) for file in splits[source.split]]


def _of_file(file: str, root: str) -> Shard:
    # By its name: `datasets` has one builder for all configurations, even where they differ in type.
    on_hub = _HUB_FILES.fullmatch(file)
    if on_hub:
        name = on_hub["path"]
        shard = shard_of(name, _url(on_hub["repo"], on_hub["revision"], name), json_lines=True)
    elif _is_url(file):
        shard = shard_of(os.path.basename(urlsplit(file).path), file, json_lines=True)
    else:
        shard = shard_of(os.path.relpath(file, root), file, json_lines=True)
    if shard is None:
        raise DataError(f"{file} is of no supported type; accepted: {ACCEPTED}")
    return shard


def _url(repo: str, revision: str | None, path: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, path, repo_type="dataset", revision=revision)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _is_on_hub(place: str) -> bool:
    return place.startswith(f"{_endpoint()}/")


def _page(repo: str) -> str:
    return f"{_endpoint()}/datasets/{repo}"


def _patiently(look: Callable[[], T], repo: str, revision: str | None, patience: float) -> T:
    """What `look` returns, asked again while the hub does not answer. Raises DataError for all that the hub refuses."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    began, pause = time.monotonic(), 1.0
    since = time.strftime("%H:%M:%S")
    while True:
        try:
            return look()
        except OfflineModeIsEnabled:
            raise DataUnreachable(
                f"hub dataset {repo} cannot be looked up while HF_HUB_OFFLINE is set; unset it, or give a local copy"
            ) from None
        except GatedRepoError:
            raise DataError(
                f"hub dataset {repo} is gated; accept its terms at {_page(repo)}, and log in with `hf auth login`"
            ) from None
        except RevisionNotFoundError:
            raise DataError(
                f"hub dataset {repo} has no revision {revision!r}; set data.revision to a branch, tag or commit of it"
            ) from None
        except (RepositoryNotFoundError, HFValidationError):
            raise DataError(
                f"no path and no hub dataset {repo!r} that you have access to; check the name, or log in with "
                "`hf auth login`"
            ) from None
        except (HTTPError, OSError) as error:
            cause = _transient(error)
            if cause is None:
                raise DataError(
                    f"hub dataset {repo} cannot be looked up ({_one_line(error)}); see {_page(repo)}"
                ) from None
        waited = time.monotonic() - began
        if waited + pause > patience:
            raise DataUnreachable(
                f"hub dataset {repo} cannot be reached at {_endpoint()} ({_one_line(cause)}); check the network "
                "connection, raise data.patience, or give a local copy"
            )
        log.warning("waiting for hub dataset %s at %s since %s (%s)", repo, _endpoint(), since, _one_line(cause))
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, 60.0)


def _transient(error: BaseException) -> BaseException | None:
    """What says, in the chain that led to an error, that another try may succeed."""
    from huggingface_hub.errors import HTTPError

    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if response is not None:
            if response.status_code in (408, 429) or response.status_code >= 500:
                return cause
        elif isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            return cause
    return None


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no more is known'}"
