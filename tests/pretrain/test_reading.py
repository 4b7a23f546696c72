"""Texts read with thoughts: what `forethought sample` shows on the terminal and as a page."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from html import unescape

import pytest
import tokenizers
import torch
from tokenizers import decoders
from tokenizers.pre_tokenizers import ByteLevel

from checkpoints.errors import CheckpointError
from checkpoints.hugging_face import export, load_thinking_model
from checkpoints.references import LAB
from data_pipelines import DataConfig, Tokenizer
from models import END, START, Anchors, Text, ThinkingModel, Thoughts
from models.thinking import TrainedThinking
from objectives import RlpConfig, RptConfig
from pretrain.cli import main
from pretrain.opening import OpenedModel
from pretrain.reading_page import reading_page, write_page
from pretrain.recipe import Recipe
from pretrain.samples import Candidate, Position, Reading, print_reading, printable, read_with_thoughts
from tests.helpers import explicit_hidden, tiny_model

WORDS = "3+5+9=7"
HOSTILE = "<script>alert('token')</script> & [bold]x[/bold]\x1b[31m\u202e\ud800"
CONFIGS = {
    "quiet_star": None,
    "rlp": RlpConfig(length=4),
    "rpt": RptConfig(length=4, template="forced", box_open="", box_close="", answer_length=1),
}


def thinking_lab() -> ThinkingModel:
    """The lab's model with random delimiters and a mixing head that mixes."""
    model = ThinkingModel(load_thinking_model(LAB).decoder, delimiters=True, mixing_head=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (model.delimiters, model.mixing_head):
            for parameter in part.parameters():
                scale = 0.001 if part is model.delimiters else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def opened(objective: str) -> OpenedModel:
    tokenizer, model, config = Tokenizer.from_directory(LAB), thinking_lab().double(), CONFIGS[objective]
    model.ban(tokenizer.size, tokenizer.control_ids)
    recipe = config and Recipe(steps=3, objective=config, data=DataConfig(reference="lab:chain=4"))
    return OpenedModel(model, tokenizer, LAB, recipe, TrainedThinking("every-token", 4), recipe and {"step": 3})


def reading(*positions: Position) -> Reading:
    return Reading("a model", "Trained.", "It thinks.", [Position(HOSTILE, HOSTILE), *positions])


def position(token: str = "b", gain: float = 0.5, **changes) -> Position:
    likeliest = [(Candidate("x", 0.5, False), Candidate("y", math.exp(-nll), True)) for nll in (1.5, 1.5 - gain)]
    return replace(Position(token, token, "hm", "y", 1.5, 1.5 - gain, *likeliest), **changes)


@pytest.mark.parametrize("objective", CONFIGS)
def test_what_is_read_is_what_explicit_sequences_give(objective):
    """Each thought behind its own prefix, in a sequence of its own, and softmax over the whole vocabulary."""
    found = opened(objective)
    model, tokenizer = found.model, found.tokenizer
    read = read_with_thoughts(found, "lab", WORDS, None, 1.0, seed=3)
    (ids,) = tokenizer.encode([WORDS])
    text = Text.from_rows(torch.tensor([ids]))
    assert [p.token for p in read.positions] == list(WORDS)
    thinking = [n for n, p in enumerate(read.positions) if p.thought is not None]
    # Quiet-STaR thinks behind the last token, too.
    assert thinking == [*range(7 if objective == "quiet_star" else 6)]
    assert len({read.positions[n].thought for n in thinking}) > 1
    for n in thinking:
        p = read.positions[n]
        body = tokenizer.encode([p.thought.removeprefix("<think>").removesuffix("</think>")])[0]
        tags = (START, END) if objective == "quiet_star" else map(tokenizer.token_id, ("<think>", "</think>"))
        opening, closing = tags
        said = torch.tensor([opening, *body, closing])[None, None, :, None]
        with torch.no_grad():
            plain_W = model.read(text).hidden_BNW[0, n]
            hidden_W = explicit_hidden(model, text, Thoughts(said, Anchors(text, torch.tensor([[n]]))), 0, 0, 0)[-1]
            if objective == "quiet_star":
                w = model.mixing_head(plain_W, hidden_W)
                assert abs(w) > 1e-3
                hidden_W = (1 - w) * plain_W + w * hidden_W
            both = [(x_W @ model.head_weight_VW.T).softmax(-1) for x_W in (plain_W, hidden_W)]
        for p_V, candidates, nll in zip(
            both, (p.likeliest_without, p.likeliest_with), (p.nll_without, p.nll_with), strict=True
        ):
            best = p_V.topk(5).indices.tolist()
            true = ids[n + 1] if n < 6 else None
            shown = best if true is None or true in best else [*best, true]
            assert [c.token for c in candidates] == [tokenizer.decode([i]) for i in shown]
            assert [c.true for c in candidates] == [i == true for i in shown]
            assert [c.probability for c in candidates] == pytest.approx(p_V[shown].tolist(), rel=1e-9)
            assert (nll is None) == (true is None)
            if nll is not None:
                assert nll == pytest.approx(-math.log(p_V[true]), rel=1e-9)
        assert p.next_token == (WORDS[n + 1] if n < 6 else None)
        if p.gain is not None:
            assert p.gain == pytest.approx(math.log(both[1][ids[n + 1]] / both[0][ids[n + 1]]), rel=1e-6, abs=1e-9)


def test_the_terminal_is_coloured_and_a_pipe_is_plain(monkeypatch, capsys):
    read = reading(position(gain=1.0), position("c", gain=-1.0), position("d", gain=0.001))
    outs = {}
    for name, variables in {
        "pipe": {},
        "terminal": {"FORCE_COLOR": "1"},
        "no": {"FORCE_COLOR": "1", "NO_COLOR": "1"},
    }.items():
        with monkeypatch.context() as context:
            for variable in ("FORCE_COLOR", "NO_COLOR", "TERM", "COLORTERM"):
                context.delenv(variable, raising=False)
            for variable, value in {"COLORTERM": "truecolor", **variables}.items():
                context.setenv(variable, value)
            print_reading(read)
        outs[name] = capsys.readouterr().out
        assert "[bold]x[/bold]\\x1b[31m\\u202e\\ud800" in outs[name]
        assert "+1.000" in outs[name] and "-1.000" in outs[name] and "'y' 61%" in outs[name]
    assert "\x1b" not in outs["pipe"]
    assert "48;2;" in outs["terminal"] and outs["terminal"].count("\x1b[30;48;2;") == 4
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", outs["no"])
    # Better and worse in the text and in the table, never in the same colour.
    assert len(set(re.findall(r"48;2;[0-9;]+m", outs["terminal"]))) == 2


def test_the_page_is_safe_stands_alone_and_is_the_same_again():
    read = reading(position(), position(HOSTILE, -0.25, thought=HOSTILE, next_token=HOSTILE), position("שלום\n"))
    read = replace(read, title=HOSTILE, model=HOSTILE)
    page = reading_page(read)
    assert page == reading_page(read)
    assert "<script" not in page and "[bold]" in page
    assert "\x1b" not in page and "\u202e" not in page and "\ud800" not in page
    assert "&lt;script&gt;alert(&#x27;token&#x27;)&lt;/script&gt; &amp; " in page
    assert not re.search(r"https?:|//|<link|url\(|@import|<script| on\w+=", page)
    assert "default-src 'none'" in page and "prefers-color-scheme" not in page and "color-scheme: light dark" in page
    assert 'dir="auto"' in page and "שלום↵\n" in page


def test_each_thought_has_a_card_that_its_token_leads_to():
    last = position("d", next_token=None, nll_without=None, nll_with=None)
    page = unescape(reading_page(reading(Position("a", "a"), position("b"), position("y", -0.25), last)))
    links = dict(re.findall(r'<a id="token-(\d+)" href="#card-(\d+)"', page))
    assert links == {"3": "3", "4": "4", "5": "5"}
    cards = dict(re.findall(r'<article class="card[^"]*" id="card-(\d+)">(.*?)</article>', page, re.DOTALL))
    assert set(cards) == set(links)
    assert "+0.500 nats" in cards["3"] and "22.31% without the thought, 36.79% with it" in cards["3"]
    assert cards["3"].count("✓") == 2 and "<mark>y</mark>" in cards["3"]
    assert "width:36.8%" in cards["3"] and "-0.250 nats" in cards["4"]
    assert "<mark>…</mark>" in cards["5"] and "nats" not in cards["5"]
    # By more than colour; the largest gain in full, the other by its share of that.
    shares = re.findall(r'href="#card-\d" class="gain (\w+)" style="--share:([\d.]+)"', page)
    assert shares == [("likelier", "1.00"), ("less", "1.00")]
    assert "2 tokens, mean NLL 1.500 nats without a thought, 1.375 with one: gain +0.125; 1 became likelier." in page


def test_a_character_of_several_tokens_is_shown_by_the_last(tmp_path):
    """With a tokenizer of bytes, whose other tokens are shown as such where they stand alone."""
    alphabet = {character: id for id, character in enumerate(sorted(ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    model = tiny_model(vocab_size=backend.get_vocab_size())
    found = OpenedModel(
        model, Tokenizer.from_directory(tmp_path), tmp_path, None, TrainedThinking("every-token", 2), None
    )
    read = read_with_thoughts(found, "bytes", "aé漢!", None, 0.0, seed=0)
    assert [p.text for p in read.positions] == ["a", "", "é", "", "", "漢", "!"]
    assert [p.token for p in read.positions][:3] == ["a", "\\xc3", "\\xa9"]
    page = reading_page(read)
    assert re.findall(r'<a id="token-.*?>(.*?)</a>', page) == ["·", "é", "·", "·", "漢", "!", " …"]
    assert "aé漢<mark>!</mark>" in page


def test_printable_keeps_what_scripts_need():
    kept = "it's a \\box{é} 漢　字 می‌خواهم 👩‍💻 नि"
    assert printable(kept) == kept
    assert printable("\t\x00\u202e\u2028\ud800") == "\\t\\x00\\u202e\\u2028\\ud800"


def test_the_page_of_a_model_from_the_command_line(tmp_path, capsys, monkeypatch):
    export(thinking_lab(), tmp_path / "lab", LAB, trained=TrainedThinking("every-token", 3))
    (tmp_path / "words.txt").write_text(WORDS)
    pages = []
    for name, source in (
        ("a", ["--text", WORDS]),
        ("b", ["--file", str(tmp_path / "words.txt")]),
        ("c", ["--file", "-"]),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WORDS.encode())))
        page = tmp_path / "new" / f"{name}.html"
        assert main(["sample", str(tmp_path / "lab"), *source, "--html", str(page)]) == 0
        assert capsys.readouterr().out == f"wrote {page}\n"
        pages.append(page.read_bytes())
    assert pages[0] == pages[1] == pages[2]
    assert b"Here thoughts of 3 tokens at most are greedy." in pages[0]
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == ["a.html", "b.html", "c.html"]


def test_an_export_of_rlp_or_rpt_is_sampled_between_its_tags(tmp_path, capsys):
    opening, closing = ((Tokenizer.from_directory(LAB).token_id(tag),) for tag in ("<think>", "</think>"))
    trained = TrainedThinking("before-answer", 3, opening, closing)
    export(load_thinking_model(LAB), tmp_path / "lab", LAB, trained=trained)
    assert main(["sample", str(tmp_path / "lab"), "--text", WORDS]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "lab: An exported model, trained to think before an answer. Here thoughts of 3 tokens at most"
    )
    assert len(re.findall("│ <think>.{0,3}</think>", out)) == 6


def test_mistakes_are_named_in_one_line(tmp_path, capsys):
    lab, page = tmp_path / "lab", tmp_path / "page.html"
    export(thinking_lab(), lab, LAB, trained=TrainedThinking("every-token", 3), shard_bytes=100_000)
    page.write_text("mine")
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    for name in ("sharded", "wordy"):
        shutil.copytree(lab, tmp_path / name)
    shard = next((tmp_path / "sharded").glob("model-*.safetensors"))
    shard.unlink()
    tokenizer = json.loads((lab / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"more{n}": len(tokenizer["model"]["vocab"]) + 3 + n for n in range(99)}
    (tmp_path / "wordy" / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ["--text", WORDS]
    for model, arguments, part in (
        (lab, [*words, "--html", str(page)], "page.html exists; remove it or give another --html"),
        (lab, [*words, "--html", "/proc/page.html"], "/proc/page.html cannot be written ("),
        (lab, ["--file", str(tmp_path / "absent")], "absent cannot be read (No such file or directory); give --file a"),
        (lab, ["--file", str(tmp_path / "latin")], "latin is not UTF-8 (unexpected end of data at byte 3); convert it"),
        (lab, ["--text", ""], "there is nothing to read; give some words in --text or --file"),
        (tmp_path / "empty", words, "empty has no config.json; give a Hugging Face model directory"),
        (tmp_path / "sharded", words, shard.name),
        (tmp_path / "wordy", words, "tokens, its model only"),
    ):
        capsys.readouterr()
        assert main(["sample", str(model), *arguments]) == 1, part
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert part in message, message
    assert page.read_text() == "mine"
    with pytest.raises(CheckpointError, match="exists"):
        write_page(reading(position()), page)
