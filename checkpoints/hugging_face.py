"""Import from and export to Hugging Face directories.

The language model is stored as any engine can load it: config.json, model.safetensors or shards with an index,
tokenizer, a model card. The parts used only for thinking (delimiters, mixing head) are in a subfolder, thinking/,
because engines take every safetensors file beside config.json for weights of the language model.

A thinking export is one that transformers alone can think with: all weights in one set of files, and beside them the
modelling files of checkpoints/modeling/, which its config.json names. Reading it executes none of them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.families import THINKING, config_from_hf, config_to_hf
from checkpoints.loading import UnloadedModel, empty_model
from checkpoints.references import resolve
from checkpoints.tensors import StoredTensor, stored_in
from models.decoder import Decoder
from models.thinking import ThinkingModel, TrainedThinking

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
THINKING_PARTS = ("delimiters", "mixing_head")
FORMAT = 1  # of thinking.json
MODELING = Path(__file__).parent / "modeling"
AUTO_MAP = {
    "AutoConfig": "configuration_forethought.ForethoughtConfig",
    "AutoModelForCausalLM": "modeling_forethought.ForethoughtForCausalLM",
}
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
    if not str(reference).startswith("random:"):
        return open_thinking_model(directory, compute_dtype, parts=False).load().decoder
    decoder = Decoder(config_from_hf(read_json(path if path.is_file() else directory / "config.json")), compute_dtype)
    decoder.init_weights(torch.Generator().manual_seed(seed))
    return decoder


def _decoder_tensors(directory: Path, decoder: Decoder) -> dict[str, StoredTensor]:
    """The stored tensors by the decoder's names.

    Raises CheckpointError naming every tensor that is missing, unexpected or of the wrong shape.
    """
    wanted = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    tensors: dict[str, StoredTensor] = {}
    problems, found = [], set()
    for name, tensor in _tensors(directory):
        if name.startswith(THINKING_PARTS):
            continue
        name = name.removeprefix("base.").removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and decoder.lm_head is None):
            continue
        found.add(name)
        if name not in wanted:
            problems.append(f"unexpected {name}")
        elif tensor.shape != wanted[name]:
            problems.append(f"{name} is {tensor.shape}, not {tuple(wanted[name])}")
        else:
            tensors[name] = tensor
    problems += [f"missing {name}" for name in wanted if name not in found]
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise CheckpointError(
            f"the weights in {directory} do not match its config.json: {'; '.join(problems[:NAMED])}{more}"
        )
    return tensors


def _tensors(directory: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yields (name, tensor) from all safetensors files of a model."""
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
            yield from stored_in(directory / name).items()
        except SafetensorError as error:
            raise CheckpointError(f"{directory / name} cannot be read ({error}); fetch the model again") from None


def load_thinking_model(directory: Path, compute_dtype: torch.dtype | None = None) -> ThinkingModel:
    """The model in a directory, with its thinking parts if it has any, in fp32. Raises CheckpointError."""
    return open_thinking_model(directory, compute_dtype).load()


def open_thinking_model(directory: Path, compute_dtype: torch.dtype | None = None, parts: bool = True) -> UnloadedModel:
    """The same, with its weights still in their files. parts: with those for thinking. Raises CheckpointError."""
    config = config_from_hf(read_json(directory / "config.json"))
    described = _description(directory) if parts else {}
    there = described.get("parts", [])
    model = empty_model(config, compute_dtype, **{part: part in there for part in THINKING_PARTS})
    model.banned_V[described.get("banned_ids", [])] = True
    weights = {f"decoder.{name}": t for name, t in _decoder_tensors(directory, model.decoder).items()}
    if there:
        found = dict(_thinking_tensors(directory))
        wanted = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith(THINKING_PARTS)}
        if wanted != {n: t.shape for n, t in found.items()}:
            raise CheckpointError(
                f"the parts for thinking in {directory} do not match its description of them; export again"
            )
        weights |= found
    return UnloadedModel(model, weights)


def trained_thinking(directory: Path) -> TrainedThinking | None:
    """How an exported model was trained to think; None where it was not, or does not say. Raises CheckpointError."""
    described = _description(directory)
    # Exports of before say no more than the length.
    think: Any = described.get("think") or ("every-token" if "mixing_head" in described.get("parts", []) else "off")
    if think == "off":
        return None
    length = described.get("length")
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError(
            f"{directory} has a thought length of {length!r}, not a number of tokens; export the run again"
        )
    return TrainedThinking(think, length, tuple(described.get("open_ids", ())), tuple(described.get("close_ids", ())))


def _description(directory: Path) -> Mapping[str, Any]:
    """What an export says about thinking, in the words of thinking.json; empty if nothing. Raises CheckpointError."""
    hf = read_json(directory / "config.json")
    if hf.get("model_type") == THINKING:
        parts = THINKING_PARTS if hf.get("think") == "every-token" else ()
        return hf | {"parts": parts, "length": hf.get("thought_length")}
    path = _thinking_directory(directory) / "thinking.json"
    if not path.exists():
        return {}
    described = read_json(path)
    if described.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {described.get('format')!r}, not {FORMAT}; export the run again")
    return described


def _thinking_tensors(directory: Path) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) of the parts used only for thinking."""
    if read_json(directory / "config.json").get("model_type") == THINKING:
        yield from ((name, t) for name, t in _tensors(directory) if name.startswith(THINKING_PARTS))
        return
    path = _thinking_directory(directory) / "thinking.safetensors"
    try:
        yield from stored_in(path).items()
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); export again") from None


def _thinking_directory(directory: Path) -> Path:
    """Where the thinking parts of a plain export would be: in exports of before, beside the language model."""
    below = directory / "thinking"
    return below if below.is_dir() else directory


def export(
    model: ThinkingModel | Decoder,
    directory: Path,
    tokenizer_directory: Path | None,
    dtype: torch.dtype = torch.float32,
    trained: TrainedThinking | None = None,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    thinking: bool = False,
) -> None:
    """Writes a Hugging Face directory atomically: a plain language model, or with `thinking` a thinking export.

    Raises CheckpointError if it is not empty or cannot be written, if weights are not finite, or if `thinking` is asked
    of a model that was not trained to think.

    The language model is stored in `dtype`, in files of at most `shard_bytes`, of which one at a time is held in memory
    beside the model; the parts used only for thinking in their own dtype. trained: how the model was trained to think.
    card: its README.md.
    """
    if isinstance(model, Decoder):
        model = ThinkingModel(model)
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"weights are not finite ({broken[0]} and {len(broken) - 1} more), so nothing is written; export an older "
            "checkpoint"
        )
    if thinking and (trained is None or (trained.think == "every-token" and model.mixing_head is None)):
        raise CheckpointError(
            "the model was not trained to think, so there is nothing to think with; leave --thinking out"
        )
    try:
        _export(model, directory, tokenizer_directory, dtype, trained, card, shard_bytes, thinking)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} cannot be written ({error}); choose another directory to export to"
        ) from None


def _export(
    model: ThinkingModel,
    directory: Path,
    tokenizer_directory: Path | None,
    dtype: torch.dtype,
    trained: TrainedThinking | None,
    card: str | None,
    shard_bytes: int,
    thinking: bool,
) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is not empty; choose another directory to export to")
    directory.parent.mkdir(parents=True, exist_ok=True)
    ids = token_ids(tokenizer_directory)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        made = Path(scratch) / "export"
        made.mkdir()
        config = config_to_hf(model.decoder.config, dtype, **ids)
        tensors, parts = language_model_tensors(model.decoder), thinking_tensors(model)
        if thinking:
            assert trained is not None
            config = thinking_config(model, trained, config)
            tensors = {f"base.{name}": tensor for name, tensor in tensors.items()} | parts
            for path in MODELING.glob("*_forethought.py"):
                shutil.copyfile(path, made / path.name)
        elif parts or trained is not None:
            (made / "thinking").mkdir()
            (made / "thinking" / "thinking.json").write_text(json.dumps(_thinking_json(model, trained), indent=2))
            if parts:
                held = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}
                save_file(held, made / "thinking" / "thinking.safetensors", metadata={"format": "pt"})
        _write_weights(tensors, made, dtype, shard_bytes)
        (made / "config.json").write_text(json.dumps(config, indent=2))
        (made / "generation_config.json").write_text(json.dumps(ids, indent=2))
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


def language_model_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights by the names that transformers has for them."""
    return {name if name.startswith("lm_head") else f"model.{name}": t for name, t in decoder.state_dict().items()}


def thinking_tensors(model: ThinkingModel) -> dict[str, Tensor]:
    """The weights used only for thinking."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(THINKING_PARTS)}


def _thinking_json(model: ThinkingModel, trained: TrainedThinking | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "format": FORMAT,
        "parts": [part for part in THINKING_PARTS if getattr(model, part) is not None],
    }
    if trained is not None:
        described |= {
            "think": trained.think,
            "length": trained.length,
            "open_ids": trained.open_ids,
            "close_ids": trained.close_ids,
            "banned_ids": model.banned_V.nonzero().flatten().tolist(),
        }
    return described


def thinking_config(model: ThinkingModel, trained: TrainedThinking | None, plain: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a thinking export, where that of the `plain` one is this."""
    shared = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    described = _thinking_json(model, trained)
    return {
        "architectures": ["ForethoughtForCausalLM"],
        "model_type": THINKING,
        "auto_map": AUTO_MAP,
        # transformers 4 would build it in its own dtype, whatever the one it is asked for.
        "base_config": {key: value for key, value in plain.items() if key not in ("torch_dtype", "dtype")},
        "think": described.get("think", "off"),
        "thought_length": described.get("length"),
        **{key: described.get(key, []) for key in ("open_ids", "close_ids", "banned_ids")},
        **{key: plain[key] for key in shared},
    }


def _write_weights(tensors: Mapping[str, Tensor], directory: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """One safetensors file, or shards in the order of the layers and the index that names the shard of each tensor."""

    def dtype_of(name: str) -> torch.dtype:
        return tensors[name].dtype if name.startswith(THINKING_PARTS) else dtype

    sizes = {name: tensor.numel() * dtype_of(name).itemsize for name, tensor in tensors.items()}
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
        held = {tensor: tensors[tensor].detach().to("cpu", dtype_of(tensor)).contiguous() for tensor in shard}
        save_file(held, directory / name, metadata={"format": "pt"})


def token_ids(tokenizer_directory: Path | None) -> dict[str, int]:
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
