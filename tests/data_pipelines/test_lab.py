import dataclasses
import math
import re

import pytest
import torch

from data_pipelines import DataConfig, DataError, open_data
from data_pipelines.lab import (
    FORMATS,
    HELD_OUT_ONE_IN,
    SUBSTITUTIONS,
    TASKS,
    LabConfig,
    LabText,
    document,
    generate,
    problems,
)

LENGTH = 96
DOCUMENT = re.compile(r"([^=]+)=(?:<think>([^<]*)</think>)?(.)")
OPERATORS = dict(zip("ABCDEFGKLMNOPQRST", "+-*&|^>klmnopqrst", strict=True))
FIRST_DOCUMENTS = [
    "4A5A9C7A3=<think>8 3 9 9</think>9",
    "04 16 25 32 49 50 67 78 83 91:8>>>=5",
    "08 14 25 39 47 56 63 72 81 90:9GGG=<think>0 8 1</think>1",
]  # 2⁴⁰, 0 and 1 of seed 7
MIXED = LabConfig(tasks=TASKS, chain=(2, 5), worked=0.6, garbage=0.3, format=FORMATS)


def opened(tokenizer, settings="", seed=0, length=LENGTH) -> LabText:
    text = open_data(DataConfig(reference=f"lab:{settings}" if settings else "lab", length=length), tokenizer, seed)
    assert isinstance(text, LabText)
    return text


def plain(prompt: str) -> str:
    """A prompt of any format in the plain one."""
    prompt = prompt[:0:-1] if prompt[0] == "<" else prompt
    return "".join(OPERATORS.get(character, character) for character in prompt)


def solved(prompt: str) -> list[str]:
    """The steps of a plain prompt, worked out from nothing but its text."""
    if ":" in prompt:
        table, (node, *hops) = prompt.split(":")
        leads = dict(table.split())
        return [node := leads[node] for _ in hops]
    if prompt[0].isalpha():
        symbol, *names = prompt
        return [symbol := SUBSTITUTIONS[name]["abcdefghij".index(symbol)] for name in names]
    # Brackets make Python, too, go from left to right.
    modulus = 2 if set(prompt) & set("&|^") else 10
    brackets = [prompt[0]]
    for n in range(1, len(prompt), 2):
        brackets.append(f"({brackets[-1]}{prompt[n : n + 2]})")
    return [str(eval(bracket) % modulus) for bracket in brackets[1:]]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("format", FORMATS)
def test_steps_and_answers_are_right(task, format):
    config = LabConfig(tasks=(task,), chain=(2, 7), format=(format,))
    found = problems(config, seed=1, count=200, held_out=False)
    for problem in found:
        assert solved(plain(problem.prompt)) == problem.steps.split()
        assert problem.answer == problem.steps[-1]
        assert problem.task == task
        assert "=" not in problem.prompt
    assert {len(problem.steps.split()) for problem in found} == set(range(2, 8))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_not_given_away(task):
    """Each answer comes about equally often, but for circuits, of which `&0` and `|1` force the result."""
    answers = [problem.answer for problem in problems(LabConfig(tasks=(task,)), seed=0, count=2000, held_out=False)]
    assert len(set(answers)) == (2 if task == "boolean" else 10)
    expected = 2000 / len(set(answers))
    assert all(abs(answers.count(answer) - expected) < 5 * math.sqrt(expected) for answer in set(answers))


def test_formats_differ_on_the_surface_only():
    by_format = [problems(LabConfig(tasks=TASKS, chain=(2, 5), format=(name,)), 3, 100) for name in FORMATS]
    for own, *others in zip(*by_format, strict=True):
        assert len({problem.prompt for problem in [own, *others]}) == len(FORMATS)
        for other in others:
            assert (other.task, other.steps, other.answer) == (own.task, own.steps, own.answer)
            assert plain(other.prompt) == own.prompt


def test_no_prompt_means_two_things():
    """The tasks and formats of one mixture must be told apart by the prompt, or at least agree on it."""
    meaning: dict[str, str] = {}
    for index in range(4000):
        problem = generate(LabConfig(tasks=TASKS, chain=(2, 2), format=FORMATS), 0, index)
        assert meaning.setdefault(problem.prompt, problem.steps) == problem.steps


def test_held_out_problems_are_apart():
    """Whatever seed, format, task mixture or chain: 2-step sums are few enough for every one of them to occur."""
    small = LabConfig(chain=(2, 2))
    config = LabConfig(chain=(2, 3), format=FORMATS, tasks=("arithmetic", "sum"))
    kept = {plain(problem.prompt) for seed in (0, 1) for problem in problems(small, seed, 400)}
    trained = {plain(p.prompt) for seed in (2, 3) for p in problems(config, seed, 4000, held_out=False)}
    assert kept and not kept & trained
    assert abs(len(kept) - 1000 / HELD_OUT_ONE_IN) < 4 * math.sqrt(1000 / HELD_OUT_ONE_IN)


@pytest.mark.parametrize("task", TASKS)
def test_both_kinds_exist_of_the_shortest_chains(task):
    for held_out in (True, False):
        assert generate(LabConfig(tasks=(task,), chain=(2, 2)), 0, 0, held_out)


def test_documents_are_a_pure_function():
    """A change of these would silently break every run that is continued."""
    config = LabConfig(tasks=TASKS, chain=(2, 4), worked=0.5, format=FORMATS)
    assert [document(config, 7, index) for index in (2**40, 0, 1)] == FIRST_DOCUMENTS
    assert [document(config, 7, index) for index in (1, 0)] == FIRST_DOCUMENTS[:0:-1]
    assert document(config, 8, 0) != FIRST_DOCUMENTS[1]


def test_documents_are_the_problems_worked_unworked_or_garbled():
    count = 3000
    worked = right = 0
    for index in range(count):
        problem = generate(MIXED, 5, index)
        prompt, thought, answer = DOCUMENT.fullmatch(document(MIXED, 5, index)).groups()
        assert (prompt, answer) == (problem.prompt, problem.answer)
        if thought is not None:
            worked += 1
            right += thought == problem.steps
            assert len(thought) == len(problem.steps)
    for found, of, share in ((worked, count, MIXED.worked), (right, worked, 1 - MIXED.garbage)):
        # Random bits are the right ones now and then.
        assert abs(found / of - share) < 4 * math.sqrt(share * (1 - share) / of) + 0.02 * (of == worked)


@pytest.mark.parametrize(("worked", "garbage", "expected"), [(0, 1, [0, 0]), (1, 0, [200, 200]), (1, 1, [200, 0])])
def test_shares_of_all_and_nothing(worked, garbage, expected):
    config = LabConfig(chain=(6, 6), worked=worked, garbage=garbage)
    documents = [document(config, 0, index) for index in range(200)]
    right = [f"<think>{generate(config, 0, index).steps}</think>" in text for index, text in enumerate(documents)]
    assert [sum("<think>" in text for text in documents), sum(right)] == expected


def test_tokenizer(lab_directory, lab_tokenizer):
    """A token for every character and tag, and no way for a text to spell the end of a document."""
    for index in range(300):
        text = document(MIXED, 0, index)
        ids = lab_tokenizer.encode([text])[0]
        assert len(ids) == len(re.sub("</?think>", "T", text))
        assert lab_tokenizer.decode(ids) == text
    assert lab_tokenizer.size <= 64
    assert lab_tokenizer.control_ids == (lab_tokenizer.eos_id,)
    assert lab_tokenizer.eos_id not in lab_tokenizer.encode(["1<|endoftext|>2"])[0]
    assert len(lab_tokenizer.encode(["aé\n"])[0]) == 3

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(lab_directory)
    assert theirs("1+2=<think>3</think>3").input_ids == lab_tokenizer.encode(["1+2=<think>3</think>3"])[0]
    assert theirs.eos_token_id == lab_tokenizer.eos_id


def documents_of(rows: dict[str, torch.Tensor], row: int) -> list[list[int]]:
    document_N, tokens_N = rows["document_BN"][row], rows["tokens_BN"][row]
    return [tokens_N[document_N == number].tolist() for number in range(int(document_N.max()) + 1)]


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_hold_whole_documents_and_padding(lab_tokenizer, held_out):
    text = opened(lab_tokenizer, "tasks=sum+pointer,chain=2-5,worked=0.5")
    rows = text.held_out_rows(8) if held_out else text.rows(0, 8)
    assert {tensor.dtype for tensor in rows.values()} == {torch.int64}
    assert rows["sample_id_B"].tolist() == list(range(8))
    for row in range(8):
        found = documents_of(rows, row)
        config = dataclasses.replace(text.config, worked=0.0) if held_out else text.config
        expected = [document(config, 0, row * LENGTH + n, held_out) for n in range(len(found) + 1)]
        assert [lab_tokenizer.decode(ids) for ids in found] == [one + "<|endoftext|>" for one in expected[:-1]]
        used = sum(map(len, found))
        assert used + len(lab_tokenizer.encode([expected[-1]])[0]) + 1 > LENGTH
        for name, value in (("tokens_BN", 0), ("position_BN", 0), ("document_BN", -1)):
            assert (rows[name][row, used:] == value).all()
        assert rows["position_BN"][row, :used].tolist() == [n for ids in found for n in range(len(ids))]
        assert rows["document_BN"][row, :used].tolist() == [n for n, ids in enumerate(found) for _ in ids]


def test_solutions_are_the_steps_of_each_problem(lab_tokenizer):
    text = opened(lab_tokenizer, "tasks=sum+pointer,chain=2-5,worked=0.5")
    rows, solutions = text.held_out_rows(6), text.solutions(6)
    places = iter(sorted(solutions))
    for row in range(6):
        start = 0
        for number, ids in enumerate(documents_of(rows, row)):
            problem = generate(text.config, 0, row * LENGTH + number, held_out=True)
            place = next(places)
            assert place == (row, start + len(problem.prompt))
            assert lab_tokenizer.decode(list(solutions[place])) == problem.steps
            start += len(ids)
    assert next(places, None) is None


def test_rows_are_a_pure_function(lab_tokenizer):
    settings = "chain=2-6,worked=0.5"
    expected = opened(lab_tokenizer, settings).rows(7, 3)
    single = [opened(lab_tokenizer, settings).rows(row, 1) for row in (9, 7, 8)]
    order = [single[1], single[2], single[0]]
    assert same(expected, {name: torch.cat([row[name] for row in order]) for name in expected})
    text = opened(lab_tokenizer, settings)
    assert same(text.batch(4, 6), text.rows(24, 6))
    assert text.rows(3, 0)["tokens_BN"].shape == (0, LENGTH)
    other = opened(lab_tokenizer, settings, seed=1)
    assert not torch.equal(other.rows(7, 3)["tokens_BN"], expected["tokens_BN"])
    assert same(other.held_out_rows(5), text.held_out_rows(5))


def test_the_marker_precedes_every_answer_and_thought(lab_tokenizer):
    """Answers are one token, between the marker or the closing tag and the end of the document."""
    text = opened(lab_tokenizer, f"tasks={'+'.join(TASKS)},format={'+'.join(FORMATS)},worked=0.5")
    marker, opening, closing = (lab_tokenizer.encode([one])[0][0] for one in ("=", "<think>", "</think>"))
    rows = text.rows(0, 40)
    for row in range(40):
        for ids in documents_of(rows, row):
            assert ids.count(marker) == 1
            assert ids[-1] == lab_tokenizer.eos_id
            after = ids[ids.index(marker) + 1]
            assert (after == opening and ids[-3] == closing) or ids[-3] == marker


def test_other_tokenizers_read_the_lab(tokenizer):
    rows = opened(tokenizer, "worked=0.5").rows(0, 4)
    expected = document(LabConfig(worked=0.5), 0, 2 * LENGTH) + "<|endoftext|>"
    assert tokenizer.decode(documents_of(rows, 2)[0]) == expected


def test_the_stream_says_what_it_is(lab_tokenizer, tokenizer):
    text = opened(lab_tokenizer)
    assert text.tokens_per_epoch == math.inf and f"{text.tokens_per_epoch:,}" == "inf"
    assert not any(text.counts.values())
    variants = [{}, {"seed": 1}, {"length": 97}, {"settings": "chain=5"}, {"tokenizer": tokenizer}]
    fingerprints = [opened(**({"tokenizer": lab_tokenizer} | variant)).fingerprint for variant in variants]
    assert len(set(fingerprints)) == len(variants)
    assert fingerprints[0] == text.fingerprint


def test_references():
    assert LabConfig.parse("lab") == LabConfig.parse("lab:") == LabConfig()
    assert LabConfig.parse("lab:tasks=sum+boolean,chain=4-6,worked=0.5,garbage=0.25,format=mirrored") == LabConfig(
        tasks=("sum", "boolean"), chain=(4, 6), worked=0.5, garbage=0.25, format=("mirrored",)
    )
    assert LabConfig.parse("lab:chain=5").chain == (5, 5)


def test_every_mistake_of_a_reference_is_reported(lab_tokenizer):
    """At once, in one line."""
    wrong = "tasks=sum+chess+sum,chain=6-4,worked=1.5,garbage=nan,format=plain+plain,noise=1,worked=0.5"
    with pytest.raises(DataError) as caught:
        opened(lab_tokenizer, wrong)
    message = str(caught.value)
    for part in (
        "tasks cannot be 'chess'; choose from sum,",
        "chain is 6-4",
        "worked is 1.5",
        "garbage is nan",
        "format lists one twice",
    ):
        assert part in message
    assert "unknown setting 'noise'; settings are tasks, chain" in message
    assert "worked is given twice" in message
    assert "\n" not in message


@pytest.mark.parametrize("setting", ["chain=four", "chain=4-", "worked=half", "worked", "tasks=", "chain=1", "sum"])
def test_a_mistake_is_named(lab_tokenizer, setting):
    with pytest.raises(DataError, match=re.escape(setting.partition("=")[0])):
        opened(lab_tokenizer, setting)


def test_rows_too_short_for_a_document(lab_tokenizer):
    with pytest.raises(DataError, match="have 14 tokens"):
        opened(lab_tokenizer, "chain=2-5", length=13)
    assert (opened(lab_tokenizer, "chain=2-5", length=14).rows(0, 9)["document_BN"][:, 0] == 0).all()


def test_unknown_references_name_the_lab(lab_tokenizer):
    with pytest.raises(DataError, match="lab:SETTINGS"):
        open_data(DataConfig(reference="labs"), lab_tokenizer, 0)
