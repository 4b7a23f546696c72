"""Import from and export to Hugging Face directories.

The language model is stored as any engine can load it: config.json, model.safetensors or shards with an index,
tokenizer, a model card. The parts used only for thinking (delimiters, mixing head) are in a subfolder, thinking/,
because engines take every safetensors file beside config.json for weights of the language model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.families import config_from_hf, config_to_hf
from checkpoints.references import resolve
from models.decoder import Decoder
from models.thinking import ThinkingModel

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
THINKING_PARTS = ("delimiters", "mixing_head")
FORMAT = 1  # of thinking.json
SHARD_BYTES = 5 * 10**9  # of a file of weights, at most, where no tensor alone is larger
NAMED = 8  # tensors that a message names


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file is missing or contains anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give a Hugging Face model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path} is not valid JSON; fetch the model again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch the model again")
    return content


def load_decoder(
    reference: str | Path, compute_dtype: torch.dtype | None = None, cache_dir: Path | None = None, seed: int = 0
) -> Decoder:
    """Loads a decoder with fp32 master weights; for `random:PATH`, samples its weights with `seed`.

    Raises CheckpointError naming every tensor that is missing, unexpected or of the wrong shape.
    """
    directory = resolve(reference, cache_dir)
    path = Path(str(reference).removeprefix("random:"))
    config = config_from_hf(read_json(path if path.is_file() else directory / "config.json"))
    if str(reference).startswith("random:"):
        decoder = Decoder(config, compute_dtype)
        decoder.init_weights(torch.Generator().manual_seed(seed))
        return decoder
    with torch.device("meta"):
        decoder = Decoder(config, compute_dtype)
    wanted = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    tensors: dict[str, Tensor] = {}
    problems, found = [], set()
    for name, tensor in _tensors(directory):
        name = name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
            continue
        found.add(name)
        if name not in wanted:
            problems.append(f"unexpected {name}")
        elif tensor.shape != wanted[name]:
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(wanted[name])}")
        else:
            # Copied, because safetensors returns views of the memory-mapped file.
            tensors[name] = tensor.to(torch.float32, copy=True)
    problems += [f"missing {name}" for name in wanted if name not in found]
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise CheckpointError(
            f"the weights in {directory} do not match its config.json: {'; '.join(problems[:NAMED])}{more}"
        )
    decoder.load_state_dict(tensors, assign=True)
    decoder.init_rotary()  # which is still on the meta device
    return decoder.requires_grad_()


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) from all safetensors files of a model, one at a time."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} lists no files; fetch the model again")
        files = sorted(set(weight_map.values()))
    elif (directory / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        raise CheckpointError(
            f"{directory} has no model.safetensors; other formats are not supported, so convert it first"
        )
    for name in files:
        if Path(name).name != name or not (directory / name).exists():
            raise CheckpointError(f"{directory} has no file {name}, which its index lists; fetch the model again")
        try:
            with safe_open(directory / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{directory / name} cannot be read ({error}); fetch the model again") from None


def load_thinking_model(directory: Path, compute_dtype: torch.dtype | None = None) -> ThinkingModel:
    """The model in a directory, with its thinking parts if it has any. Raises CheckpointError."""
    decoder = load_decoder(directory, compute_dtype)
    directory = _thinking_directory(directory)
    if not (directory / "thinking.json").exists():
        return ThinkingModel(decoder)
    described = read_json(directory / "thinking.json")
    if described.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory}/thinking.json has format {described.get('format')!r}, not {FORMAT}; export the run again"
        )
    parts = described.get("parts", [])
    model = ThinkingModel(decoder, **{part: part in parts for part in THINKING_PARTS})
    try:
        with safe_open(directory / "thinking.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{directory}/thinking.safetensors cannot be read ({error}); export again") from None
    wanted = {n: p.shape for n, p in model.named_parameters() if n.startswith(THINKING_PARTS)}
    found = {n: t.shape for n, t in tensors.items()}
    if wanted != found:
        raise CheckpointError(f"{directory}/thinking.safetensors does not match thinking.json; export again")
    model.load_state_dict(tensors, strict=False)
    return model


def _thinking_directory(directory: Path) -> Path:
    """Where the thinking parts of a model would be: in exports of before, beside the language model."""
    below = directory / "thinking"
    return below if below.is_dir() else directory


def thought_length(directory: Path) -> int | None:
    """Tokens of the thoughts that an exported model was trained with; None where it does not say.

    Raises CheckpointError.
    """
    path = _thinking_directory(directory) / "thinking.json"
    length = read_json(path).get("length") if path.exists() else None
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError(f"{path} has length {length!r}, not a number of tokens; export the run again")
    return length


def export(
    model: ThinkingModel | Decoder,
    directory: Path,
    tokenizer_directory: Path | None,
    dtype: torch.dtype = torch.float32,
    thought_length: int | None = None,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a Hugging Face directory atomically.

    Raises CheckpointError if it is not empty or cannot be written, or if weights are not finite.

    The language model is stored in `dtype`, in files of at most `shard_bytes`, of which one at a time is held in memory
    beside the model; the parts used only for thinking in their own dtype. thought_length: of the thoughts that it was
    trained with, in tokens. card: its README.md.
    """
    if isinstance(model, Decoder):
        model = ThinkingModel(model)
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"weights are not finite ({broken[0]} and {len(broken) - 1} more), so nothing is written; export an older "
            "checkpoint"
        )
    try:
        _export(model, directory, tokenizer_directory, dtype, thought_length, card, shard_bytes)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} cannot be written ({error}); choose another directory to export to"
        ) from None


def _export(
    model: ThinkingModel,
    directory: Path,
    tokenizer_directory: Path | None,
    dtype: torch.dtype,
    thought_length: int | None,
    card: str | None,
    shard_bytes: int,
) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is not empty; choose another directory to export to")
    directory.parent.mkdir(parents=True, exist_ok=True)
    ids = _token_ids(tokenizer_directory)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "export"
        made.mkdir()
        _write_weights(model.decoder, made, dtype, shard_bytes)
        (made / "config.json").write_text(json.dumps(config_to_hf(model.decoder.config, dtype, **ids), indent=2))
        (made / "generation_config.json").write_text(json.dumps(ids, indent=2))
        parts = [part for part in THINKING_PARTS if getattr(model, part) is not None]
        if parts:
            thinking = {
                n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n.startswith(THINKING_PARTS)
            }
            (made / "thinking").mkdir()
            save_file(thinking, made / "thinking" / "thinking.safetensors", metadata={"format": "pt"})
            (made / "thinking" / "thinking.json").write_text(
                json.dumps({"format": FORMAT, "parts": parts, "length": thought_length}, indent=2)
            )
        if card is not None:
            (made / "README.md").write_text(card, encoding="utf-8")
        for name in TOKENIZER_FILES:
            if tokenizer_directory is not None and (tokenizer_directory / name).exists():
                shutil.copyfile(tokenizer_directory / name, made / name)
        if (made / "tokenizer_config.json").exists():
            # Without it, a tokenizer of no family's class gives token_type_ids, which no decoder takes.
            inputs = {"model_input_names": ["input_ids", "attention_mask"]}
            settings = inputs | read_json(made / "tokenizer_config.json")
            (made / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")
        if directory.exists():
            directory.rmdir()
        made.rename(directory)


def _write_weights(decoder: Decoder, directory: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """One safetensors file, or shards in the order of the layers and the index that names the shard of each tensor."""
    tensors = {name if name.startswith("lm_head") else f"model.{name}": t for name, t in decoder.state_dict().items()}
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, shard in zip(names, shards, strict=True):
        held = {tensor: tensors[tensor].detach().to("cpu", dtype).contiguous() for tensor in shard}
        save_file(held, directory / name, metadata={"format": "pt"})


def _token_ids(tokenizer_directory: Path | None) -> dict[str, int]:
    """The bos, eos and pad ids of the tokens named in tokenizer_config.json."""
    if tokenizer_directory is None or not (tokenizer_directory / "tokenizer_config.json").exists():
        return {}
    names = read_json(tokenizer_directory / "tokenizer_config.json")
    vocabulary = read_json(tokenizer_directory / "tokenizer.json")
    numbers = dict(vocabulary["model"]["vocab"]) if isinstance(vocabulary["model"]["vocab"], dict) else {}
    numbers |= {token["content"]: token["id"] for token in vocabulary.get("added_tokens", [])}
    ids = {}
    for kind in ("bos", "eos", "pad"):
        token = names.get(f"{kind}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in numbers:
            ids[f"{kind}_token_id"] = numbers[token]
    return ids
