"""Documents with thoughts written into them: what is thought where, that the text is kept, and how it is read again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from checkpoints.hugging_face import export, load_thinking_model
from checkpoints.references import LAB
from data_pipelines import DataConfig, Tokenizer, open_data
from data_pipelines.lab import LabConfig, document
from models import Text
from models.thinking import TrainedThinking
from pretrain.cli import main

THOUGHT = re.compile("<think>(.*?)</think>", re.DOTALL)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORETHOUGHT_CACHE", str(tmp_path / "cache"))


def augmented(model: str | Path, source: str, out: str, *options: str) -> list[dict]:
    assert main(["sample", str(model), "--augment", source, out, *options]) == 0
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def greedy(prefix: str, length: int) -> str:
    """The lab's most probable thought behind a prefix, token by token, each by a pass over all before it."""
    tokenizer, model = Tokenizer.from_directory(LAB), load_thinking_model(LAB)
    ids, close_id = tokenizer.encode([prefix + "<think>"])[0], tokenizer.token_id("</think>")
    said: list[int] = []
    for _ in range(length):
        hidden_W = model.read(Text.from_rows(torch.tensor([[*ids, *said]]))).hidden_BNW[0, -1]
        logits_V = hidden_W @ model.head_weight_VW.T
        logits_V[list(tokenizer.control_ids)] = -torch.inf
        if (token := int(logits_V.argmax())) == close_id:
            break
        said.append(token)
    return tokenizer.decode(said)


def test_problems_with_the_thoughts_that_the_model_has_of_them(capsys):
    reference = "lab:tasks=sum,chain=2-4"
    found = augmented("lab", reference, "out.jsonl", "--marker", "=", "--documents", "9", "--length", "8")
    assert capsys.readouterr().out == "wrote out.jsonl: 9 documents with 9 thoughts\n"
    for index, row in enumerate(found):
        problem = document(LabConfig.parse(reference), 0, index)
        question, answer = problem.split("=")
        assert row == {
            "text": f"{question}=<think>{greedy(f'{question}=', 8)}</think>{answer}",
            "name": f"problem {index}",
            "thoughts": 1,
        }
    # Trained on, a tag is the token that opens a thought.
    tokenizer = Tokenizer.from_directory(LAB)
    rows = open_data(DataConfig(reference="out.jsonl", length=64, held_out=0.0), tokenizer, 0).rows(0, 3)
    assert int((rows["tokens_BN"] == tokenizer.token_id("<think>")).sum()) >= 8


def test_a_thought_is_the_same_however_many_are_sampled_at_once(monkeypatch):
    options = ["--marker", "=", "--length", "8", "--temperature", "1", "--seed", "3"]
    whole = augmented("lab", "lab:tasks=sum,chain=4", "a.jsonl", *options, "--documents", "7")
    monkeypatch.setattr("pretrain.augmenting.ROWS", 2)
    assert augmented("lab", "lab:tasks=sum,chain=4", "b.jsonl", *options, "--documents", "5") == whole[:5]
    assert whole != augmented("lab", "lab:tasks=sum,chain=4", "c.jsonl", *options, "--documents", "7", "--seed", "4")


def test_the_text_itself_is_kept(tiny_directory, monkeypatch):
    """With characters of several tokens, in pieces, with tags that this tokenizer spells."""
    texts = ["Ünïcödé 🙂 thinks.\n", "The reader thinks while it reads, 日本語 too. " * 3, "<|endoftext|> is text here"]
    Path("in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr("pretrain.augmenting.longest_sequence", lambda config: 56)
    found = augmented(tiny_directory, "in.jsonl", "out.jsonl", "--thoughts", "4", "--length", "2", "--temperature", "1")
    assert [THOUGHT.sub("", row["text"]) for row in found] == texts
    assert [len(THOUGHT.findall(row["text"])) for row in found] == [row["thoughts"] for row in found]
    assert found[0]["thoughts"] == 4 < found[1]["thoughts"]


def test_mistakes_are_named_in_one_line(capsys):
    export(load_thinking_model(LAB), Path("every"), LAB, trained=TrainedThinking("every-token", 3))
    end = (Tokenizer.from_directory(LAB).token_id("<|endoftext|>"),)
    export(load_thinking_model(LAB), Path("control"), LAB, trained=TrainedThinking("before-answer", 3, end, end))
    Path("there.jsonl").write_text("mine")
    source = "lab:tasks=sum,chain=4"
    for arguments, part in (
        (["lab", "--augment", source, "there.jsonl"], "there.jsonl exists; remove it or give another OUT"),
        (["lab", "--augment", "nowhere.jsonl", "out.jsonl"], "nowhere.jsonl"),
        (["lab", "--augment", source, "out.jsonl"], f"{source} never ends; say with --documents how many"),
        (["lab", "--augment", source, "out.jsonl", "--marker", "=="], "marker '==' must be one token"),
        (["lab", "--augment", source, "out.jsonl", "--length", "2000"], "leave no text to read; lower --length"),
        (["every", "--augment", source, "out.jsonl"], "this model thinks between delimiters that are no text"),
        (["control", "--augment", source, "out.jsonl"], "the tag '<|endoftext|>' is a control token"),
        (["lab", "--text", "3+5=8", "--thoughts", "2"], "--thoughts, --marker and --documents are for --augment"),
    ):
        capsys.readouterr()
        assert main(["sample", *arguments]) == 1, part
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert part in message, message
        assert not Path("out.jsonl").exists()
    assert Path("there.jsonl").read_text() == "mine"
