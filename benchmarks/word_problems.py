"""Writes the text of studies/smollm2.yaml: word problems of several tasks and wordings, some worked between think tags.

    python -m benchmarks.word_problems runs/word-problems       # needs the extra word-problems

A document is one problem. Its question mark is where the answer, a single token, has to be predicted:

    unworked    What is four plus three minus two plus one? six.
    worked      What is four plus three minus two plus one? <think> four plus three is seven, seven minus two is five,
                five plus one is six</think> six.
    garbage     What is four plus three minus two plus one? <think> four plus three is two, … is eleven</think> six.

    base.jsonl       85% worked, a third of these with garbage: the skill lies latent in a model that has read it
    unworked.jsonl   what objectives are compared on; its held-out part is what they are scored on
    mixed.jsonl      the same problems, a fifth of them worked, all rightly
    longer.jsonl, wording.jsonl, task.jsonl    unworked: more steps, a wording, and a task that unworked.jsonl lacks
    test.jsonl       unworked, in wordings that the others have; read by studies/word_problems.yaml, a task of lm-eval

Problems come from reasoning-gym (Stojanovski et al., arXiv 2505.24760), which also says what is right; questions and
solutions are worded here. A problem, in whatever
wording, is of one file only; but mixed.jsonl has those of unworked.jsonl, and test.jsonl those of wording.jsonl. Within
base.jsonl it may come again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS
from reasoning_gym.cognition.color_cube_rotation import ColorCubeRotationConfig, ColorCubeRotationDataset, Cube, Side

OPEN, CLOSE = " <think>", "</think>"
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
UNSEEN = 3  # the wording that is in wording.jsonl alone
SHARES = {"base": 0.6, "unworked": 0.34, "wording": 0.06}  # of all problems of a task
SIZES = {"base": 25_000, "unworked": 8_000, "wording": 600, "longer": 600, "task": 300, "test": 300}  # documents
WORKED, GARBAGE = 0.85, 0.35  # of base.jsonl's documents, and of its thoughts
RIGHTLY_WORKED = 0.2  # of mixed.jsonl's documents
TRAINED_ON = ("sum", "legs", "equation", "sum", "legs", "equation", "cube")  # in turn; cubes have the longest text
UNREWARDED = "weekday"  # in base.jsonl, and in task.jsonl


@dataclass(frozen=True)
class Problem:
    """key: what makes it the same problem. wordings: of the question. steps: of a right thought; garbage: draws those
    of another."""

    task: str
    key: str
    wordings: tuple[str, ...]
    steps: str
    garbage: Callable[[random.Random], str]
    answer: str


def text(problem: Problem, wording: int, thought: str | None) -> str:
    said = "" if thought is None else f"{OPEN} {thought}{CLOSE}"
    return f"{problem.wordings[wording]}{said} {problem.answer}."


# Tasks: from an entry of reasoning-gym to a problem, or to None where it cannot be worded here.


def _sum(entry: Mapping[str, Any]) -> Problem | None:
    first, *rest = re.findall(r"[+-]? ?\d", entry["metadata"]["expression"])
    start, terms = int(first), [(term[0], int(term[-1])) for term in rest]
    signs = {"+": operator.add, "-": operator.sub}
    totals = list(itertools.accumulate(terms, lambda total, term: signs[term[0]](total, term[1]), initial=start))
    if not all(0 <= total <= 20 for total in totals) or any(number == 0 for _, number in terms):
        return None

    def worded(plus: str, minus: str) -> list[str]:
        return [f"{plus if sign == '+' else minus} {NUMBERS[number]}" for sign, number in terms]

    def said(results: Sequence[int]) -> str:
        operands = zip([start, *results], worded("plus", "minus"), results, strict=False)
        return ", ".join(f"{NUMBERS[total]} {term} is {NUMBERS[result]}" for total, term, result in operands)

    gets, people = worded("gets", "loses"), worded("get on:", "get off:")
    wordings = (
        f"What is {NUMBERS[start]} {' '.join(worded('plus', 'minus'))}?",
        f"Ann has {NUMBERS[start]} coins. She {_listed(gets)}. How many has she now?",
        f"Start at {NUMBERS[start]}, {_listed(worded('add', 'take away'))}. Where does that end?",
        f"A bus has {NUMBERS[start]} people in it; {_listed(people)}. How many are in it?",
    )
    return Problem(
        "sum",
        entry["metadata"]["expression"],
        wordings,
        said(totals[1:]),
        lambda draw: said([draw.randrange(21) for _ in terms]),
        NUMBERS[totals[-1]],
    )


def _legs(entry: Mapping[str, Any]) -> Problem | None:
    animals = entry["metadata"]["animals"]
    total = sum(ANIMALS[name] * count for name, count in animals.items())
    irregular = re.compile(r".*(fish|sheep|deer|louse|mantis|shrimp|fly)")
    if total > 20 or 0 in animals.values() or any(irregular.fullmatch(name) for name in animals):
        return None
    groups = [f"{NUMBERS[count]} {name}{'s' * (count > 1)}" for name, count in animals.items()]

    def said(legs: Sequence[int], sums: Sequence[int]) -> str:
        have = ["has" if count == 1 else "have" for count in animals.values()]
        parts = [f"{group} {verb} {NUMBERS[n]}" for group, verb, n in zip(groups, have, legs, strict=True)]
        added = zip([legs[0], *sums[:-1]], legs[1:], sums, strict=True)
        parts += [f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[c]}" for a, b, c in added]
        return ", ".join(parts)

    def garbage(draw: random.Random) -> str:
        return said([draw.randrange(21) for _ in groups], [draw.randrange(21) for _ in groups[1:]])

    legs = [ANIMALS[name] * count for name, count in animals.items()]
    wordings = (
        f"How many legs do {_listed(groups)} have?",
        f"In a yard there are {_listed(groups)}. How many legs are there?",
        f"Count the legs of {_listed(groups)}. How many are they?",
        f"Along come {_listed(groups)}. On how many legs?",
    )
    steps = said(legs, list(itertools.accumulate(legs))[1:])
    return Problem("legs", json.dumps(animals, sort_keys=True), wordings, steps, garbage, NUMBERS[total])


def _equation(entry: Mapping[str, Any]) -> Problem | None:
    found = re.fullmatch(r"(\d)\*\w ([+-]) (\d+) = (\d+)", entry["metadata"]["equation"])
    if found is None:
        return None
    (factor, added, result), sign = map(int, found.group(1, 3, 4)), found[2]
    undone, undo = (result - added, "-") if sign == "+" else (result + added, "+")
    plus = "plus" if sign == "+" else "minus"

    def said(product: int, number: int) -> str:
        return f"{result} {undo} {added} = {product}, {product} / {factor} = {number}"

    wordings = (
        f"{factor}x {sign} {added} = {result}. What is x?",
        f"{factor} times a number {plus} {added} is {result}. What is the number?",
        f"A number times {factor}, {plus} {added}, makes {result}. Which number?",
        f"If {factor} boxes of pens {plus} {added} pens are {result} pens, how many are in a box?",
    )
    return Problem(
        "equation",
        entry["metadata"]["equation"].replace(entry["metadata"]["variable"], "x"),
        wordings,
        said(undone, int(entry["answer"])),
        lambda draw: said(draw.randrange(2, 82), draw.randrange(2, 10)),
        NUMBERS[int(entry["answer"])],
    )


_ROTATIONS = ColorCubeRotationDataset(ColorCubeRotationConfig(size=1))


def _cube(entry: Mapping[str, Any]) -> Problem | None:
    colours, turns = entry["metadata"]["initial_state"], entry["metadata"]["rotations"]
    if "magenta" in colours.values():  # two tokens
        return None
    target = place = entry["metadata"]["target_side"]
    places = []
    for turn in reversed(turns):
        sides = Cube({side: side for side in Side})
        _ROTATIONS._rotate_to_top(sides, Side(turn))
        place = sides.colors[Side(place)].value
        places.append(place)
    assert colours[place] == entry["answer"]

    def said(places: Sequence[str], colour: str) -> str:
        here = [target, *places]
        return ", ".join([*(f"{a} was {b}" for a, b in zip(here, places, strict=False)), f"{places[-1]} is {colour}"])

    def garbage(draw: random.Random) -> str:
        return said([draw.choice(list(Side)).value for _ in turns], draw.choice(list(colours.values())))

    sides = ", ".join(f"{colour} {side}" for side, colour in colours.items())
    wordings = (
        f"A cube: {sides}. {', then '.join(f'its {turn} is turned to the top' for turn in turns)}. Which colour is "
        f"{target}?",
        f"The sides of a cube are {sides}. It is turned: {', then '.join(f'{turn} to top' for turn in turns)}. What "
        f"colour is its {target}?",
        f"Paint a cube {sides}. Roll it so that the {', then the '.join(turns)} comes up. What is {target} now?",
        f"{sides[0].upper()}{sides[1:]}: a die. Up comes its {', then its '.join(turns)}. And {target} is which?",
    )
    begun = (re.sub(r"(?<=\. )[a-z]", lambda letter: letter[0].upper(), wording) for wording in wordings)
    key = json.dumps([colours, turns, target])
    return Problem("cube", key, tuple(begun), said(places, entry["answer"]), garbage, entry["answer"])


def _weekday(entry: Mapping[str, Any]) -> Problem | None:
    start, offset = date.fromisoformat(entry["metadata"]["start_date"]), entry["metadata"]["offset_days"]
    if not 2 <= abs(offset) <= 6:
        return None
    days = [f"{start + timedelta(days=n if offset > 0 else -n):%A}" for n in range(abs(offset) + 1)]
    number = NUMBERS[abs(offset)]
    wordings = (
        f"It is {days[0]}. What day {f'is it in {number} days' if offset > 0 else f'was it {number} days ago'}?",
        f"Which day comes {number} days {'after' if offset > 0 else 'before'} {days[0]}?",
        f"Count {number} days {'forward' if offset > 0 else 'back'} from {days[0]}. Which day is that?",
        f"{days[0]} {'plus' if offset > 0 else 'minus'} {number} days is which day?",
    )
    assert days[-1] == entry["answer"]
    return Problem(
        "weekday",
        json.dumps([days[0], offset]),
        wordings,
        ", ".join(days[1:]),
        lambda draw: ", ".join(f"{date(2026, 1, 1) + timedelta(days=draw.randrange(7)):%A}" for _ in days[1:]),
        days[-1],
    )


def _listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


_TASKS: dict[str, tuple[Callable[[Mapping[str, Any]], Problem | None], str, dict[str, Any]]] = {
    "sum": (_sum, "chain_sum", {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}),
    "legs": (_legs, "leg_counting", {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 4}),
    "equation": (_equation, "simple_equations", {"min_terms": 2, "max_terms": 2, "min_value": 2, "max_value": 9}),
    "cube": (_cube, "color_cube_rotation", {"min_rotations": 1, "max_rotations": 2}),
    "weekday": (_weekday, "calendar_arithmetic", {"tasks": ["weekday_offset"], "offset_upper_bound": 6}),
}
LONGER = {
    "sum": {"min_terms": 5, "max_terms": 6},
    "legs": {"min_animals": 3, "max_animals": 3},
    "cube": {"min_rotations": 3, "max_rotations": 3},
}


def problems(task: str, seed: int, **changes: Any) -> Iterator[Problem]:
    """Endlessly; some more than once. changes: of reasoning-gym's settings."""
    make, name, settings = _TASKS[task]
    for block in itertools.count():
        size = 1000
        for entry in reasoning_gym.create_dataset(
            name, seed=seed * 10**9 + block * size, size=size, **{**settings, **changes}
        ):
            if (problem := make(entry)) is not None:
                yield problem


def share_of(problem: Problem) -> str:
    """The file of a problem: the same for every seed, so that what one has to predict no other has read."""
    at = int.from_bytes(hashlib.sha256(problem.key.encode()).digest()[:8], "big") / 2**64
    ends = itertools.accumulate(SHARES.values())
    return next((name for name, end in zip(SHARES, ends, strict=True) if at < end), "base")


def several(tasks: Sequence[str], of: str, count: int, seed: int, repeats: bool) -> Iterator[Problem]:
    """`count` problems of a file, the tasks in turn; with fewer of tasks that have no more, unless they may repeat."""
    endless = {task: (p for p in problems(task, seed) if share_of(p) == of) for task in tasks}
    seen: set[str] = set()
    while count and endless:
        for task in tasks:
            if task not in endless:
                continue
            attempts = itertools.islice(endless[task], 2000)
            problem = next((p for p in attempts if repeats or p.key not in seen), None)
            if problem is None:
                del endless[task]
            elif count:
                seen.add(problem.key)
                count -= 1
                yield problem


def write(directory: Path, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> None:
    """Writes all files; the same for the same seed and version of reasoning-gym."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)

    def save(name: str, documents: Iterator[tuple[Problem, int, str | None]]) -> None:
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for problem, wording, thought in documents:
                tree = {"text": text(problem, wording, thought), "task": problem.task, "answer": problem.answer}
                file.write(json.dumps(tree) + "\n")

    def worded(problems: Iterator[Problem]) -> Iterator[tuple[Problem, int, str | None]]:
        return ((problem, draw.randrange(UNSEEN), None) for problem in problems)

    def thought(problem: Problem) -> str | None:
        if draw.random() >= WORKED:
            return None
        return problem.garbage(draw) if draw.random() < GARBAGE else problem.steps

    base = several((*TRAINED_ON, UNREWARDED), "base", sizes["base"], seed, repeats=True)
    save("base", ((problem, wording, thought(problem)) for problem, wording, _ in worded(base)))
    unworked = list(worded(several(TRAINED_ON, "unworked", sizes["unworked"], seed, repeats=False)))
    save("unworked", iter(unworked))
    rightly = ((p, wording, p.steps if draw.random() < RIGHTLY_WORKED else None) for p, wording, _ in unworked)
    save("mixed", rightly)
    other = several(TRAINED_ON, "wording", sizes["wording"], seed, repeats=False)
    save("wording", ((problem, UNSEEN, None) for problem in other))
    longer = itertools.chain.from_iterable(
        itertools.islice(problems(task, seed, **changes), sizes["longer"] // len(LONGER))
        for task, changes in LONGER.items()
    )
    save("longer", worded(longer))
    save("task", worded(several([UNREWARDED], "unworked", sizes["task"], seed, repeats=True)))
    save("test", worded(several(TRAINED_ON, "wording", sizes["test"], seed, repeats=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    write(parser.parse_args().directory)


if __name__ == "__main__":
    main()
