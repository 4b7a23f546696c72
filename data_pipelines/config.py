"""What text to read and how to cut it into rows."""

from __future__ import annotations

from dataclasses import dataclass


class DataError(ValueError):
    """A mistake in the data or its settings that the user can fix; the message is one line that says how."""


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes rows."""

    reference: str = "python-docs"  # that name, or a file, directory or glob of text, jsonl or parquet
    length: int = 256  # tokens of a row
    text_field: str = "text"  # the field of a jsonl object, or column of a parquet file, that holds the text
    end_of_document: str | None = None  # the token that ends every document; default: the tokenizer's eos
    held_out: float = 0.02  # share of the tokens kept from training, in whole documents if it can be
    skip_broken: bool = False  # count and skip rows and files that cannot be read, instead of stopping
    max_document_characters: int = 1_000_000  # a longer document is tokenised in pieces, cut at whitespace

    def problems(self) -> list[str]:
        """One line for each invalid value."""
        found = []
        if not self.reference:
            found.append("reference is empty; name a file, a directory, a glob or python-docs")
        if self.length < 2:
            found.append(f"length is {self.length}; a row needs at least 2 tokens")
        if not self.text_field:
            found.append("text_field is empty; name the field that holds the text")
        if not 0 <= self.held_out <= 0.5:
            found.append(f"held_out is {self.held_out}; it must be a fraction between 0 and 0.5")
        if self.max_document_characters < 1:
            found.append(f"max_document_characters is {self.max_document_characters}; use at least 1")
        return found
