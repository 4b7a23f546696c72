"""Thinking exports: what transformers computes with their modelling files is what training computes.

The oracles are the training side (Quiet-STaR's own evaluation, the rollout) and plain loops of whole passes.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from checkpoints.errors import CheckpointError
from checkpoints.families import FAMILIES
from checkpoints.hugging_face import export, load_decoder, load_thinking_model, trained_thinking
from checkpoints.modeling.configuration_forethought import ForethoughtConfig
from checkpoints.references import LAB
from checkpoints.thinking_export import as_forethought, load_forethought
from data_pipelines import Tokenizer
from models.philox import Rng
from models.rollout import EAGER
from models.thinking import ThinkingModel, TrainedThinking
from models.thoughts import START, Anchors, Text, Thoughts
from objectives import Bodies, QuietStar, QuietStarConfig
from pretrain.cli import main
from tests.helpers import relative_error, rollout, tiny_model

LOGITS = 1e-5
L = 4
EVERY_TOKEN = TrainedThinking("every-token", L)
ROTARY = {"olmo3": ("plain", "scaled"), "smollm3": ("scaled", "none")}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
BANNED = [3, 5, 60]


def family_model(name: str, **changes) -> ThinkingModel:
    """Two layers of a family, random everywhere, the second of them its unusual one."""
    settings = dict(FAMILIES[name].fixed) | dict(family=name, rope_theta=5000.0, rotary=ROTARY.get(name, ()))
    if name == "olmo3":
        settings |= dict(sliding_window=64, windowed_layers=(0,), rope_scaling=YARN)
    if "attention_bias" in FAMILIES[name].biases:
        settings |= dict(qkv_bias=True, out_bias=True)
    model = tiny_model(torch.float32, **settings | changes)
    model.banned_V[BANNED] = True
    return model


def tokens(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(1))


def logits_of(model: ThinkingModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.read(Text.from_rows(ids)).hidden_BNW @ model.head_weight_VW.T


def trained_logits(model: ThinkingModel, ids: torch.Tensor, temperature: float = 0.0):
    """Training's mixed logits [B, N, V] and the thoughts [B, N, L] that it sampled for them."""
    text, quiet_star = Text.from_rows(ids), QuietStar(QuietStarConfig(length=L))
    with torch.no_grad():
        state = model.read(text)
        thoughts = rollout(model, state, Anchors.everywhere(text), 1, L, Rng(0, 0), temperature, EAGER).thoughts
        bodies = Bodies(thoughts.tokens_BKSM[:, 0, 1:], thoughts.anchors, torch.ones_like(ids, dtype=torch.bool))
        logits = quiet_star.hidden_after(model, state, bodies) @ model.head_weight_VW.T
    return logits, bodies.tokens_BLM.transpose(1, 2)


def greedy_text(model: ThinkingModel, ids: torch.Tensor, new: int) -> torch.Tensor:
    """The text as it goes on, by training's code, all thoughts of all tokens again for each new one."""
    for _ in range(new):
        ids = torch.cat([ids, trained_logits(model, ids)[0][:, -1:].argmax(-1)], dim=1)
    return ids


def left_padded(ids: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The last tokens of each row alone, behind padding."""
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - n for n in lengths]).long()
    return ids * mask, mask


def loaded(directory, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **settings)


GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


# Thinking at every token


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_thinks_as_in_training(family, attention, tmp_path):
    model = family_model(family)
    export(model, tmp_path / "out", None, trained=EVERY_TOKEN, thinking=True, shard_bytes=8_000)
    theirs = loaded(tmp_path / "out", attn_implementation=attention)
    assert theirs.base.config._attn_implementation == attention
    # Greedy thoughts are those of our rollout, and mixed alike; so are sampled thoughts that are given.
    logits, thoughts = trained_logits(model, tokens())
    with torch.no_grad():
        output = theirs(tokens())
        assert torch.equal(output.thoughts, thoughts) and not torch.isin(thoughts, torch.tensor(BANNED)).any()
        assert relative_error(output.logits, logits) <= LOGITS
        sampled_logits, sampled = trained_logits(model, tokens(), temperature=1.0)
        assert relative_error(theirs(tokens(), thoughts=sampled).logits, sampled_logits) <= LOGITS
        # Where the mixing head says 0, it is the language model, as transformers has it from the plain export.
        export(model.decoder, tmp_path / "plain", None)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation=attention)
        theirs.mixing_head.out.weight.zero_()
        for logits in (plain(tokens()).logits, theirs(tokens(), think="off").logits, theirs(tokens()).logits):
            assert relative_error(logits, logits_of(model, tokens())) <= LOGITS


@pytest.mark.smollm2
def test_smollm2_that_ignores_its_thoughts_is_smollm2(smollm2_directory):
    model = ThinkingModel(load_decoder(smollm2_directory), delimiters=True, mixing_head=True)
    theirs = as_forethought(model, TrainedThinking("every-token", 2))
    plain = transformers.AutoModelForCausalLM.from_pretrained(smollm2_directory, dtype=torch.float32)
    ids = torch.tensor([Tokenizer.from_directory(smollm2_directory).encode(["def f(x):\n    return 3.14159 * x\n"])[0]])
    with torch.no_grad():
        for logits in (plain(ids).logits, theirs(ids).logits):
            assert relative_error(logits, logits_of(model, ids)) <= LOGITS


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_survive(tied, dtype, tmp_path):
    """Through transformers' saving, and through our import, which executes nothing of the export."""
    model = family_model("llama", tie_embeddings=tied)
    export(model, tmp_path / "one", None, dtype, EVERY_TOKEN, thinking=True)
    for path in (tmp_path / "one").glob("*.py"):
        path.write_text("raise SystemExit('executed')")
    ours = load_thinking_model(tmp_path / "one")
    assert ours.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(ours.banned_V, model.banned_V)
    assert trained_thinking(tmp_path / "one") == EVERY_TOKEN
    export(ours, tmp_path / "two", None, dtype, EVERY_TOKEN, thinking=True)
    theirs = loaded(tmp_path / "two", torch_dtype="auto")
    assert {p.dtype for p in theirs.base.parameters()} == {dtype}
    theirs.save_pretrained(tmp_path / "three")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    held, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "three"))
    assert held.keys() == saved.keys()
    assert all(torch.equal(saved[n].float(), held[n].to(saved[n].dtype).float()) for n in held)
    again = loaded(tmp_path / "three", torch_dtype=dtype)
    assert torch.equal(again(tokens()).logits, loaded(tmp_path / "two", torch_dtype=dtype)(tokens()).logits)


@pytest.mark.parametrize("family", ["llama", "olmo3"])
def test_cached_generation_is_full_recomputation(family):
    """Token for token: cached, uncached, and training's own code; a padded batch is its rows."""
    model = family_model(family)
    theirs, new = as_forethought(model, EVERY_TOKEN), 10
    ids, mask = left_padded(tokens(3), [20, 13, 1])
    cached = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, return_thoughts=True, **GREEDY)
    assert torch.equal(
        theirs.generate(ids, attention_mask=mask, max_new_tokens=new, use_cache=False, **GREEDY), cached.sequences
    )
    for row, length in enumerate(mask.sum(1).tolist()):
        truth = greedy_text(model, ids[row : row + 1, -length:], new)
        assert torch.equal(cached.sequences[row, -length - new :], truth[0])
        thoughts = trained_logits(model, truth[:, :-1])[1][0, -new:]
        assert torch.equal(cached.thoughts[row], thoughts)


def test_a_text_goes_on_from_a_cache():
    """Several tokens at once behind a cache that holds the text alone, and chunks of anchors, change nothing."""
    theirs = as_forethought(family_model("llama"), EVERY_TOKEN)
    ids = tokens(length=100)
    with torch.no_grad():
        whole = theirs(ids)
        first = theirs(ids[:, :70])
        assert first.past_key_values.get_seq_length() == 70
        rest = theirs(ids[:, 70:], past_key_values=first.past_key_values)
        last = theirs(ids, logits_to_keep=3)
    for part, here in ((first, slice(70)), (rest, slice(70, None)), (last, slice(-3, None))):
        assert torch.equal(part.thoughts, whole.thoughts[:, here])
        assert relative_error(part.logits, whole.logits[:, here]) <= LOGITS


def test_sampled_thoughts_follow_the_distribution():
    """The first token of 4000 thoughts, by χ² against the model's own probabilities at the temperature."""
    model = family_model("llama")
    model.delimiters.start_W.data *= 0.2  # a flatter distribution
    theirs, temperature = as_forethought(model, EVERY_TOKEN), 2.0
    with torch.no_grad():
        rows = tokens(1, 3).expand(4000, -1)
        settings = dict(thought_length=1, thought_temperature=temperature, logits_to_keep=1)
        first = theirs(rows, generator=torch.Generator().manual_seed(0), **settings).thoughts[:, 0, 0]
        again = theirs(rows, generator=torch.Generator().manual_seed(0), **settings).thoughts[:, 0, 0]
        text = Text.from_rows(rows[:1])
        begun = Thoughts(torch.full((1, 1, 1, 3), START), Anchors.everywhere(text))
        hidden_W = model.think(begun, model.read(text))[0, 0, 0, -1]
    logits = (hidden_W @ model.head_weight_VW.T / temperature).masked_fill(model.banned_V, -torch.inf)
    expected = 4000 * logits.softmax(-1)
    found = first.bincount(minlength=61)
    assert torch.equal(first, again)
    assert found[BANNED].sum() == 0 and (expected > 5).sum() > 10
    common = expected > 5
    chi2 = ((found - expected)[common] ** 2 / expected[common]).sum()
    assert chi2 < common.sum() + 4 * (2 * common.sum()) ** 0.5


def test_gradient_goes_through_the_thoughts_and_not_through_their_choice():
    theirs = as_forethought(family_model("llama"), EVERY_TOKEN)

    def gradients(**settings) -> dict[str, torch.Tensor]:
        theirs.zero_grad()
        output = theirs(tokens(), labels=tokens(), **settings)
        output.loss.backward()
        gradients.thoughts = output.thoughts
        return {name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None}

    own, given = gradients(), gradients(thoughts=gradients.thoughts)
    assert own.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(own[name], given[name]) for name in own)
    assert own["delimiters.start_W"].norm() > 0


# Thinking before an answer

OPEN, CLOSE = (7, 8), (9, 10)


def answer(model: ThinkingModel, trained: TrainedThinking, prompt: list[int], new: int) -> tuple[list[int], list[int]]:
    """A greedy thought without tags and the answer behind it, token by token, each by a pass over all before it."""

    def following(ids: list[int], banned: torch.Tensor | None = None) -> int:
        logits = logits_of(model, torch.tensor([ids]))[0, -1]
        return int((logits if banned is None else logits.masked_fill(banned, -torch.inf)).argmax())

    banned, close = model.banned_V.clone(), list(trained.close_ids)
    banned[close] = False
    body: list[int] = []
    for _ in range(trained.length):
        body.append(following([*prompt, *trained.open_ids, *body], banned))
        if body[-len(close) :] == close:
            body = body[: -len(close)]
            break
    ids = [*prompt, *trained.open_ids, *body, *close]
    for _ in range(new):
        ids.append(following(ids))
    return body, ids[len(ids) - new :]


def two_token_close(model: ThinkingModel, prompt: list[int], length: int) -> tuple[int, int]:
    """Two tokens in the middle of the model's greedy thought: as closing tag, they end it there."""
    body, _ = answer(model, TrainedThinking("before-answer", length, OPEN, CLOSE), prompt, 0)
    return body[2], body[3]


def test_answers_after_thoughts_are_those_of_a_plain_loop():
    """Rows of different length, of which one closes its thought by itself and others do not."""
    model = ThinkingModel(family_model("qwen2").decoder)
    model.banned_V[BANNED] = True
    ids, mask = left_padded(tokens(3), [20, 13, 6])
    close = two_token_close(model, ids[1, -13:].tolist(), 8)
    model.banned_V[close[0]] = True  # a control token, which may close a thought all the same
    trained, new = TrainedThinking("before-answer", 8, OPEN, close), 7
    theirs = as_forethought(model, trained)
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, return_thoughts=True, **GREEDY)
    bodies = []
    for row, length in enumerate(mask.sum(1).tolist()):
        body, truth = answer(model, trained, ids[row, -length:].tolist(), new)
        assert found.sequences[row].tolist() == [*ids[row].tolist(), *truth]
        assert [token for token in found.thoughts[row, 0].tolist() if token >= 0] == body
        bodies.append(len(body))
    assert bodies[1] == 2 and max(bodies) == 8
    alike = (dict(use_cache=False, max_new_tokens=new), dict(max_length=20 + new))
    for settings in alike:
        assert torch.equal(theirs.generate(ids, attention_mask=mask, **settings, **GREEDY), found.sequences)


def test_every_answer_has_its_own_thought_and_generates_settings():
    model = family_model("llama")
    theirs = as_forethought(model, TrainedThinking("before-answer", 6, OPEN, CLOSE))
    settings = dict(thought_temperature=1.0, generator=torch.Generator().manual_seed(0), return_thoughts=True)
    found = theirs.generate(
        tokens(), max_new_tokens=3, num_return_sequences=4, do_sample=True, temperature=0.9, **settings
    )
    assert found.sequences.shape == (8, 23) and len({tuple(x) for x in found.thoughts[:4, 0].tolist()}) == 4
    assert not torch.isin(found.thoughts, torch.tensor(BANNED)).any()
    # The answer obeys logits processors and ends.
    unwanted = answer(model, TrainedThinking("before-answer", 6, OPEN, CLOSE), tokens()[0].tolist(), 3)[1]
    greedy = dict(do_sample=False, pad_token_id=0)
    ended = theirs.generate(tokens(1), max_new_tokens=3, eos_token_id=unwanted[0], **greedy)
    assert ended[0, 20:].tolist() == unwanted[:1]
    other = theirs.generate(tokens(1), max_new_tokens=3, eos_token_id=None, suppress_tokens=[unwanted[0]], **greedy)
    assert unwanted[0] not in other[0, 20:].tolist()
    beams = theirs.generate(tokens(1), max_new_tokens=3, num_beams=3, num_return_sequences=2, **GREEDY)
    assert beams.shape == (2, 23)


# From the command line, and what is refused


def test_a_run_is_exported_and_goes_on(tmp_path, capsys):
    """A step of each objective; the export thinks as the plain one's loader does, is trained on and sampled."""
    few = [
        "--steps",
        "1",
        "--data.length",
        "64",
        "--evaluation.rows",
        "1",
        "--control",
        "null",
        "--logging.wandb",
        "disabled",
    ]
    for recipe, think in (("lab-quiet-star", "every-token"), ("quickstart", "before-answer")):
        run, out, plain = (str(tmp_path / f"{recipe}-{kind}") for kind in ("run", "thinking", "plain"))
        assert main(["fit", recipe, "--run-dir", run, *few]) == 0
        assert main(["export", run, out, "--thinking"]) == 0
        assert main(["export", run, plain]) == 0
        theirs, ours = loaded(out), load_forethought(tmp_path / f"{recipe}-plain")
        assert theirs.config.think == ours.config.think == think
        assert theirs.config.banned_ids == ours.config.banned_ids != []
        tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
        prompt = tokenizer("3+5+9=", return_tensors="pt")
        first, second = (m.generate(**prompt, max_new_tokens=3, do_sample=False) for m in (theirs, ours))
        assert torch.equal(first, second)
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "lab-quiet-star-thinking"), "--text", "3+5=8"]) == 0
    assert "4 tokens, mean NLL" in capsys.readouterr().out
    run = str(tmp_path / "on")
    assert (
        main(["fit", "lab-quiet-star", "--model", str(tmp_path / "lab-quiet-star-thinking"), "--run-dir", run, *few])
        == 0
    )


def test_bad_input_gets_one_clear_line(tmp_path, capsys):
    model, out = family_model("olmo3", vocab_size=70), tmp_path / "out"
    export(model, out, LAB, trained=EVERY_TOKEN, thinking=True, shard_bytes=8_000)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    with pytest.raises(CheckpointError, match="was not trained to think, so there is nothing to think with") as caught:
        export(model, tmp_path / "other", None, thinking=True)
    theirs, lines = as_forethought(model, EVERY_TOKEN), [str(caught.value)]
    before = as_forethought(model, None)
    windowed = as_forethought(model, TrainedThinking("before-answer", 4, OPEN, CLOSE))
    for ask, message in (
        (lambda: theirs(tokens(length=60)), "60 tokens and thoughts of 6 exceed the model's sliding window of 64"),
        (
            lambda: windowed.generate(tokens(length=57)),
            "57 tokens and thoughts of 8 exceed the model's sliding window of",
        ),
        (lambda: theirs.generate(max_new_tokens=1), "there is nothing to think about; give input_ids"),
        (lambda: theirs(tokens(), thought_length=0), "thought_length is 0; give a number of tokens, at least 1"),
        (lambda: theirs(tokens(), think="aloud"), "think is 'aloud'; choose one of every-token, before-answer, off"),
        (lambda: before(tokens(), think="every-token"), "the model has no mixing head"),
        (lambda: before.generate(tokens(), think="before-answer"), "the model has no tag that closes a thought"),
        (lambda: theirs.generate(tokens(), cache_implementation="static"), "thoughts need a cache of the whole text"),
        (lambda: theirs.generate(tokens(), num_beams=2, return_thoughts=True), "their thoughts cannot be returned"),
        (lambda: theirs(tokens(), attention_mask=torch.ones(2, 3)), r"attention_mask is \(2, 3\), not \[rows, all"),
        (lambda: ForethoughtConfig(think="aloud"), "think is 'aloud'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ask()
        lines.append(str(caught.value))
    assert not any("\n" in line for line in lines)
    with pytest.raises(ValueError, match="flex_attention"):
        loaded(out, attn_implementation="flex_attention")
    last = max(out.glob("*.safetensors"))
    last.unlink()
    with pytest.raises(CheckpointError, match=f"has no file {last.name}, which its index lists"):
        load_decoder(out)
    with pytest.raises(OSError, match=last.name):
        loaded(out)
    # A tokenizer of more tokens than the model has; the lab's has 62.
    export(tiny_model(torch.float32, vocab_size=40), tmp_path / "small", LAB, trained=EVERY_TOKEN, thinking=True)
    assert main(["sample", str(tmp_path / "small"), "--text", "3+5"]) == 1
    assert "has 62 tokens, its model only 40 embeddings" in capsys.readouterr().err
