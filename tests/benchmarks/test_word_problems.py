"""Word problems: every step of a right thought is checked by other means than those that wrote it."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from datetime import date, timedelta
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.word_problems import LONGER, NUMBERS, TRAINED_ON, UNREWARDED, problems, share_of, text, write
from data_pipelines import Tokenizer

TASKS = [*dict.fromkeys(TRAINED_ON), UNREWARDED]
# Directions of a cube's sides; x to the right, y to the back, z up.
AXES = {
    "right": (1, 0, 0),
    "left": (-1, 0, 0),
    "back": (0, 1, 0),
    "front": (0, -1, 0),
    "top": (0, 0, 1),
    "bottom": (0, 0, -1),
}
COLOURS = "blue brown cyan gold gray green indigo orange pink purple red silver violet white yellow".split()
TASK = Path(__file__).parents[2] / "studies" / "word_problems.yaml"
SIZES = {"base": 400, "unworked": 200, "wording": 24, "longer": 24, "task": 12, "test": 24}


def some(task, count=150, **changes):
    return list(itertools.islice(problems(task, seed=1, **changes), count))


def turned(side, by):
    """Where `side` is after the side `by` was turned to the top; the bottom comes up over the front."""
    x, y, z = AXES[side]
    x, y, z = {
        "front": (x, z, -y),
        "back": (x, -z, y),
        "right": (-z, y, x),
        "left": (z, y, -x),
        "bottom": (x, -y, -z),
    }[by]
    return next(name for name, axis in AXES.items() if axis == (x, y, z))


@pytest.mark.parametrize("task", TASKS)
def test_questions_have_one_question_mark_and_the_thought_ends_with_the_answer(task):
    for problem in some(task):
        assert len({*problem.wordings}) == 4
        assert all(wording.endswith("?") and wording.count("?") == 1 for wording in problem.wordings)
        last = re.split(r"[ ,]+", problem.steps)[-1]
        assert (NUMBERS[int(last)] if last.isdecimal() else last) == problem.answer


@pytest.mark.parametrize("changes", [{}, LONGER["sum"]])
def test_sums(changes):
    for problem in some("sum", **changes):
        assert NUMBERS[eval(problem.key, {})] == problem.answer
        totals = []
        for step in problem.steps.split(", "):
            a, sign, b, _, result = step.split()
            a, b, result = map(NUMBERS.index, (a, b, result))
            assert result == (a + b if sign == "plus" else a - b)
            assert not totals or totals[-1] == a
            totals.append(result)
        assert len(totals) == len(re.findall("[+-]", problem.key))


@pytest.mark.parametrize("changes", [{}, LONGER["legs"]])
def test_legs(changes):
    legs = {"chicken": 2, "dog": 4, "cow": 4, "ant": 6, "spider": 8, "crab": 10, "snake": 0, "horse": 4}
    checked = 0
    for problem in some("legs", 600, **changes):
        animals = json.loads(problem.key)
        *has, last = problem.steps.split(", ")
        if animals.keys() <= legs.keys():
            checked += 1
            assert NUMBERS[sum(legs[name] * count for name, count in animals.items())] == problem.answer
            for count, name, _, total in map(str.split, has[: len(animals)]):
                assert NUMBERS[legs[name.removesuffix("s")] * NUMBERS.index(count)] == total
        a, _, b, _, c = last.split()
        assert NUMBERS.index(a) + NUMBERS.index(b) == NUMBERS.index(c)
    assert checked >= 5


def test_equations():
    for problem in some("equation"):
        factor, sign, added, result = re.fullmatch(r"(\d)\*x ([+-]) (\d+) = (\d+)", problem.key).groups()
        x = Fraction(int(result) - int(sign + added), int(factor))
        assert NUMBERS[int(x)] == problem.answer
        assert x.denominator == 1
        for step in problem.steps.split(", "):
            left, right = step.split(" = ")
            assert eval(left, {}) == int(right)


@pytest.mark.parametrize("changes", [{}, LONGER["cube"]])
def test_cubes(changes):
    for problem in some("cube", **changes):
        colours, turns, target = json.loads(problem.key)
        at = {side: side for side in AXES}  # where each side is now
        for turn in turns:
            at = {side: turned(place, turn) for side, place in at.items()}
        assert problem.answer == next(colours[side] for side, place in at.items() if place == target)
        *moves, last = problem.steps.split(", ")
        assert len(moves) == len(turns)
        here = target
        for move, turn in zip(moves, reversed(turns), strict=True):
            now, _, before = move.split()
            assert (now, turned(before, turn)) == (here, here)
            here = before
        assert last == f"{here} is {problem.answer}"


def test_weekdays():
    for problem in some("weekday"):
        day, offset = json.loads(problem.key)
        monday = date(2024, 1, 1)
        start = next(monday + timedelta(n) for n in range(7) if f"{monday + timedelta(n):%A}" == day)
        assert f"{start + timedelta(offset):%A}" == problem.answer
        assert len(problem.steps.split(", ")) == abs(offset)


def test_files(tmp_path):
    write(tmp_path / "a", sizes=SIZES)
    write(tmp_path / "b", sizes=SIZES)
    files = {path.stem: path.read_text() for path in (tmp_path / "a").iterdir()}
    assert files == {path.stem: path.read_text() for path in (tmp_path / "b").iterdir()}
    of = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}
    assert {name: len(documents) for name, documents in of.items()} == SIZES | {"mixed": SIZES["unworked"]}
    questions = {name: [d["text"].partition("?")[0] for d in documents] for name, documents in of.items()}
    assert not {*questions["base"]} & {*questions["unworked"]}
    assert questions["mixed"] == questions["unworked"]
    assert len({*questions["unworked"]}) == SIZES["unworked"]
    worked = {name: [d["text"] for d in documents if "<think>" in d["text"]] for name, documents in of.items()}
    assert [name for name, texts in worked.items() if not texts] == [
        name for name in of if name not in ("base", "mixed")
    ]
    assert len(worked["base"]) / SIZES["base"] == pytest.approx(0.85, abs=0.06)
    assert len(worked["mixed"]) / SIZES["unworked"] == pytest.approx(0.2, abs=0.09)
    assert all(text.endswith(f" {d['answer']}.") for d in of["base"] for text in [d["text"]])
    consistent = [text for text in worked["mixed"] if re.search(r"(\w+)</think> (\w+)\.", text)]
    assert len(consistent) == len(worked["mixed"])
    assert Counter(d["task"] for d in of["task"]) == {UNREWARDED: SIZES["task"]}


def test_the_task_of_lm_eval(tmp_path, monkeypatch):
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path, sizes=SIZES)
    monkeypatch.chdir(tmp_path)
    task = TaskManager(include_defaults=False).load([str(TASK)])["tasks"]["word_problems"]
    documents = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    asked = [*task.test_docs()]
    assert len(asked) == len(documents) == SIZES["test"]
    for doc, problem in zip(asked, documents, strict=True):
        choices, answer = task.doc_to_choice(doc), task.doc_to_target(doc)
        assert f"{task.doc_to_text(doc)} {answer}." == problem["text"] and answer == problem["answer"]
        named = [word for word in re.findall(r"\w+", problem["text"].partition("?")[0].lower()) if word in COLOURS]
        assert [*choices] == NUMBERS if problem["task"] != "cube" else {*choices} == {*named} and len(choices) == 6
        assert answer in choices


@pytest.mark.smollm2
def test_answers_are_single_tokens_of_smollm2_and_tags_stay_by_themselves(smollm2_directory):
    """What the objectives of the study predict behind the question mark, and where the thought stands."""
    tokenizer = Tokenizer.from_directory(smollm2_directory)
    mark, open_, close = tokenizer.encode(["?", " <think>", "</think>"])
    for task in TASKS:
        for problem in some(task, 40):
            assert len(tokenizer.encode([f" {problem.answer}"])[0]) == 1
            plain, worked = tokenizer.encode([text(problem, 1, None), text(problem, 1, problem.steps)])
            at = plain.index(*mark)
            assert plain[at + 1 :] == tokenizer.encode([f" {problem.answer}."])[0]
            said = [*open_, *tokenizer.encode([f" {problem.steps}"])[0], *close]
            assert worked == [*plain[: at + 1], *said, *plain[at + 1 :]]


def test_a_problem_is_of_one_file_whatever_the_seed():
    by_key = {}
    for seed in (1, 2):
        for problem in itertools.islice(problems("equation", seed), 300):
            assert by_key.setdefault(problem.key, share_of(problem)) == share_of(problem)
    shares = Counter(by_key.values())
    assert shares["base"] / len(by_key) == pytest.approx(0.6, abs=0.1)
