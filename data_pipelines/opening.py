"""From a configuration to its text."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.config import DataConfig, DataError
from data_pipelines.corpus import end_of_document, tokenised
from data_pipelines.lab import LabConfig, LabText
from data_pipelines.packing import CorpusText
from data_pipelines.rows import PackedText
from data_pipelines.tokenizer import Tokenizer


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    cache_dir: Path | None = None,
) -> PackedText:
    """The text of a configuration: tokenised (or found in the cache) and packed, or made by the lab.

    Raises DataError for settings, sources or a cache that the user has to mend.
    """
    if problems := config.problems():
        raise DataError("; ".join(problems))
    if config.reference.partition(":")[0] == "lab":
        end_id = end_of_document(config, tokenizer)
        return LabText(LabConfig.parse(config.reference), tokenizer, end_id, config.length, seed)
    return CorpusText(tokenised(config, tokenizer, cache_dir), config.length, config.held_out, seed)
