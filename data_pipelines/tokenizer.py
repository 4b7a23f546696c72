"""Text to token ids and back; no text ever becomes a control token."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data_pipelines.config import DataError


class Tokenizer:
    """A `tokenizer.json`, with the special tokens declared by the files next to it.

    Attributes:
        size: the largest id it can emit, plus 1.
        bos_id, eos_id: ids of the tokens that begin and end a sequence, None where there is none.
        add_bos: whether a sequence should begin with `bos_id`.
        control_ids: sorted ids of the special added tokens and of bos, eos and pad.
        fingerprint: sha256 of `tokenizer.json`, in hex.
    """

    def __init__(self, serialized: bytes, settings: dict[str, Any]):
        """From the bytes of a `tokenizer.json` and a parsed `tokenizer_config.json`. Raises ValueError."""
        tokenizer = tokenizers.Tokenizer.from_buffer(serialized)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        named = {name: _token_id(tokenizer, settings.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
        added = tokenizer.get_added_tokens_decoder()
        control = {id for id, token in added.items() if token.special}
        control |= {id for id in named.values() if id is not None}

        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.bos_id, self.eos_id = named["bos"], named["eos"]
        says = settings.get("add_bos_token")
        adds = tokenizer.encode("a").ids[:1] == [self.bos_id]
        self.add_bos = self.bos_id is not None and (adds if says is None else bool(says))
        self.control_ids = tuple(sorted(control))
        self.fingerprint = hashlib.sha256(serialized).hexdigest()
        self._decoder = json.loads(serialized).get("decoder") or {}
        self._made_of = serialized, settings

        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        control_texts = [text for id in sorted(control) if (text := tokenizer.id_to_token(id))]
        self._control_text = re.compile("|".join(map(re.escape, control_texts)) or "(?!)")
        # Unknown characters are rightly encoded as the unknown token, even if it is listed as special.
        self._forbidden = control - ({_unknown_id(serialized)} - {self.bos_id, self.eos_id})
        self._is_forbidden = np.zeros(self.size, bool)
        self._is_forbidden[list(self._forbidden)] = True

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, dict[str, Any]]]:
        return Tokenizer, self._made_of  # pickled, the backend would forget some of its settings

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json`, and if present `tokenizer_config.json` and `special_tokens_map.json`.

        Raises DataError for a missing or broken file.
        """
        directory = Path(path)
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter wins
            file = directory / name
            if file.exists():
                try:
                    settings |= json.loads(file.read_bytes())
                except (OSError, ValueError, TypeError) as error:
                    raise DataError(f"{file} is broken ({error}); restore or remove it") from error
        file = directory / "tokenizer.json"
        try:
            return cls(file.read_bytes(), settings)
        except OSError as error:
            raise DataError(f"no tokenizer at {file} ({error.strerror}); choose another directory") from error
        except ValueError as error:
            raise DataError(f"{file} is broken ({error}); restore it") from error

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without added special tokens; control tokens in it are encoded as ordinary text."""
        return [ids.tolist() for ids in self.arrays(texts)]

    def arrays(self, texts: list[str]) -> list[np.ndarray]:
        """As `encode`, but uint32 arrays."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        # By way of array: numpy takes three times as long for a list.
        ids_T, ends = array("I"), [0]
        for encoding in encodings:
            ids_T.fromlist(encoding.ids)
            ends.append(len(ids_T))
        all_T = np.asarray(ids_T, "<u4")
        rows = [all_T[start:end] for start, end in pairwise(ends)]
        if not self._is_forbidden[all_T].any():
            return rows
        return [
            np.array(self._encode_apart(text), "<u4") if self._is_forbidden[ids].any() else ids
            for text, ids in zip(texts, rows, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of the token that is exactly this text, None if there is none."""
        return self._tokenizer.token_to_id(token)

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """The bytes of text that each id below `size` stands for; None for control tokens and ids without a token."""
        kinds = {part["type"]: part for part in self._decoder.get("decoders", [self._decoder]) if part}
        added = self._tokenizer.get_added_tokens_decoder()

        def stands_for(id: int) -> bytes | None:
            token = self._tokenizer.id_to_token(id)
            if token is None or id in self.control_ids:
                return None
            if id in added:
                return token.encode()
            if "ByteLevel" in kinds:
                return bytes(_BYTE_OF[character] for character in token)
            if "ByteFallback" in kinds and _BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
            if "Metaspace" in kinds or "ByteFallback" in kinds:
                token = token.replace(kinds.get("Metaspace", {}).get("replacement", "▁"), " ")
            return token.encode()

        return [stands_for(id) for id in range(self.size)]

    def has_control_text(self, text: str) -> bool:
        """Whether the text contains the text of a control token."""
        # One search takes a tenth of the time of one for each token.
        return self._control_text.search(text) is not None

    def _encode_apart(self, text: str) -> list[int]:
        """Encodes a text in parts, cut inside the control tokens that it contains.

        `encode_special_tokens` only stops the search for added special tokens. They may be ordinary entries of
        the vocabulary too, as with Unigram and WordLevel, or the eos may be a token that is not special.
        A control token of a single character cannot be split and is dropped.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        found = [span for id, span in spans if id in self._forbidden]
        cuts = sorted({start + 1 for start, stop in found if start + 1 < stop})
        if not cuts:
            return [id for id in encoding.ids if id not in self._forbidden]
        parts = (text[start:stop] for start, stop in pairwise([0, *cuts, len(text)]))
        return [id for part in parts for id in self._encode_apart(part)]


def _printable_bytes() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for, as in GPT-2 and later models.

    Printable Latin-1 characters stand for themselves, those from 256 on for the other bytes in order.
    """
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _printable_bytes()
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _token_id(tokenizer: tokenizers.Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _unknown_id(serialized: bytes) -> int | None:
    model = json.loads(serialized)["model"]
    vocabulary = model.get("vocab")
    # Unigram lists its pieces in the order of their ids.
    return vocabulary.get(model.get("unk_token")) if isinstance(vocabulary, dict) else model.get("unk_id")
