import hashlib
import json

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from data_pipelines import DataError, Tokenizer
from tests.data_pipelines.conftest import byte_level, save


def test_attributes(tokenizer, tokenizer_directory):
    serialized = (tokenizer_directory / "tokenizer.json").read_bytes()
    thought = tokenizer.token_id("<|startofthought|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (None, 0, False)
    assert tokenizer.control_ids == (0, thought)
    assert tokenizer.size == thought + 1
    assert tokenizer.token_id("<|nothing|>") is None
    assert tokenizer.fingerprint == hashlib.sha256(serialized).hexdigest()


def test_nothing_is_added_padded_or_cut(tokenizer):
    texts = ["a", "", "The cat sat on the mat.\n" * 10, "naïve — 猫 \N{CAT FACE}"]
    rows = tokenizer.encode(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert rows[1] == []
    assert tokenizer.encode([""]) == [[]] and tokenizer.encode([]) == []
    assert not set().union(*rows) & set(tokenizer.control_ids)


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|startofthought|>"])
def test_control_tokens_in_text_are_text(tokenizer, token):
    text = f"before {token}{token} after"
    (row,) = tokenizer.encode([text])
    assert not set(row) & set(tokenizer.control_ids)
    assert tokenizer.decode(row) == text
    assert row == byte_level("<another>").encode(text).ids  # as if the token did not exist
    assert tokenizer.decode([tokenizer.token_id(token)]) == token
    assert tokenizer.has_control_text(text)
    assert not tokenizer.has_control_text("before <|end of text|>")


def unigram() -> Backend:
    pieces = ["<unk>", "<s>", "</s>", "<", ">", "s", "/", "a", "\N{FULLWIDTH LESS-THAN SIGN}"]
    backend = Backend(models.Unigram([(piece, -float(len(piece) == 1)) for piece in pieces], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def word_level() -> Backend:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def ordinary_eos() -> Backend:
    backend = byte_level("<s>")
    backend.add_tokens([AddedToken("</s>", special=False)])
    return backend


@pytest.mark.parametrize("backend", [unigram, word_level, ordinary_eos])
@pytest.mark.parametrize("text", ["a <s> a", "a </s></s>", "<s>", "\N{FULLWIDTH LESS-THAN SIGN}s>a"])
def test_control_tokens_that_are_ordinary_pieces(tmp_path, backend, text):
    """Such vocabularies turn text into control ids even with `encode_special_tokens`."""
    directory = save(backend(), tmp_path, bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer.from_directory(directory)
    (row,) = tokenizer.encode([text])
    assert row
    assert {tokenizer.bos_id, tokenizer.eos_id} == {tokenizer.token_id("<s>"), tokenizer.token_id("</s>")}
    assert not set(row) & {tokenizer.bos_id, tokenizer.eos_id}
    if backend is ordinary_eos:
        assert tokenizer.decode(row) == text


def test_unknown_characters_keep_their_id(tmp_path):
    tokenizer = Tokenizer.from_directory(save(word_level(), tmp_path))
    assert tokenizer.encode(["a b a"]) == [[3, 0, 3]]


def with_bos() -> Backend:
    backend = byte_level("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


@pytest.mark.parametrize(
    ("config", "adds"),
    [
        ({}, False),
        ({"bos_token": "<s>"}, True),
        ({"bos_token": "<s>", "add_bos_token": False}, False),
        ({"add_bos_token": True}, False),
        ({"bos_token": "<absent>"}, False),
    ],
)
def test_add_bos(tmp_path, config, adds):
    tokenizer = Tokenizer.from_directory(save(with_bos(), tmp_path, **config))
    assert tokenizer.add_bos is adds
    plain = Tokenizer.from_directory(save(byte_level("<s>"), tmp_path))
    assert tokenizer.encode(["a"]) == plain.encode(["a"])


def test_special_tokens_map_gives_names_that_the_config_lacks(tmp_path):
    directory = save(byte_level("<s>", "</s>"), tmp_path, eos_token="</s>")
    names = {"bos_token": {"content": "<s>"}, "eos_token": "<s>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.token_id("<s>"), tokenizer.token_id("</s>"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"{"),
        ("special_tokens_map.json", b"[1]"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content):
    directory = save(byte_level("<s>"), tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"^[^\n]*{name} is broken [^\n]*; restore"):
        Tokenizer.from_directory(directory)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(DataError, match=r"^no tokenizer at [^\n]*absent/tokenizer.json"):
        Tokenizer.from_directory(tmp_path / "absent")


TEXTS = ["a cat", "  naïve — 猫 \N{CAT FACE}\n\tx", "The cat sat on the mat. <|endoftext|>", ""]


def test_token_bytes_of_a_byte_level_vocabulary(tokenizer):
    table = tokenizer.token_bytes
    assert len(table) == tokenizer.size
    assert [id for id, found in enumerate(table) if found is None] == list(tokenizer.control_ids)
    for text, row in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert b"".join(table[id] for id in row) == text.encode()
    # Every byte can be written.
    assert {found for found in table if found is not None and len(found) == 1} == {bytes([b]) for b in range(256)}


def test_token_bytes_of_pieces_with_byte_fallback():
    """As in Llama 2 and Mistral: `▁` for a space, and `<0xE7>` for a byte that no piece has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "c", "t", "▁c", "▁ca"]
    merges = [("▁", "c"), ("▁c", "a")]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(backend.to_str().encode(), {"bos_token": "<s>", "eos_token": "</s>"})
    for text, row in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert b"".join(tokenizer.token_bytes[id] for id in row) == text.encode()
    assert tokenizer.token_bytes[:3] == [None] * 3
    assert tokenizer.token_bytes[vocabulary["▁ca"]] == b" ca"


def test_token_bytes_of_a_vocabulary_as_it_is_written(lab_tokenizer):
    """The lab's: tokens that are their own text, tags among them."""
    (row,) = lab_tokenizer.encode(["3+5=<think>8</think>8"])
    assert b"".join(lab_tokenizer.token_bytes[id] for id in row) == b"3+5=<think>8</think>8"
    assert lab_tokenizer.token_bytes[lab_tokenizer.eos_id] is None


@pytest.mark.smollm2
def test_token_bytes_of_smollm2(smollm2_directory):
    tokenizer = Tokenizer.from_directory(smollm2_directory)
    for text, row in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert b"".join(tokenizer.token_bytes[id] for id in row) == text.encode()
