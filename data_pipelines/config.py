"""What text to read and how to cut it into rows."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DataError(ValueError):
    """A mistake in the data or its settings that the user can fix; the message is one line that says how."""


class DataConfig(BaseModel):
    """Where the text comes from and how it becomes rows. Raises pydantic.ValidationError listing every mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    reference: str = Field(
        default="python-docs",
        min_length=1,
        description="python-docs, lab, lab:SETTINGS, or a file, directory or glob of text, jsonl or parquet files",
    )
    length: int = Field(default=256, ge=2, description="tokens per row")
    text_field: str = Field(
        default="text", min_length=1, description="jsonl field or parquet column that contains the text"
    )
    end_of_document: str | None = Field(
        default=None, description="token that ends every document; default: the tokenizer's eos"
    )
    held_out: float = Field(
        default=0.02,
        ge=0,
        le=0.5,
        description="fraction of the tokens kept out of training, in whole documents where possible; 0: no evaluation",
    )
    skip_broken: bool = Field(
        default=False, description="count and skip rows and files that cannot be read, instead of stopping"
    )
    max_document_characters: int = Field(
        default=1_000_000, ge=1, description="longer documents are tokenised in pieces, cut at whitespace"
    )
