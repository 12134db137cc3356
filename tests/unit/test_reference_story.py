"""Stories can be solved, and their checker agrees with a reading of the text that shares no code with it."""

from __future__ import annotations

import re
from itertools import pairwise
from random import Random

import pytest

from ets_engine.reference.corruptions import corrupt
from ets_engine.reference.story import (
    ITEMS,
    LEVELS,
    MAX_VALUE,
    NAMES,
    StoryProblem,
    answer,
    check_steps,
    generate,
    is_solved,
    needed,
    parse,
    solve,
)

TEXT = (
    "Ben has 3 boxes of 14 apples each. Dan has 5 cards. Cara has 9 more apples than Ben. Eva has half as many apples "
    "as Ben. How many apples do Ben, Cara and Eva have together?"
)
RIGHT = [
    "- Ben has 3 boxes of 14: 3*14=42",
    "- Cara has 9 more than Ben: 42+9=51",
    "- Eva has half of Ben: 42/2=21",
    "total Ben and Cara: 42+51=93",
    "total with Eva: 93+21=114. Answer: 114",
]
PARTS = {"half": 2, "a third": 3, "a quarter": 4, "a fifth": 5}


def problem_of(text: str) -> StoryProblem:
    problem = parse(text)
    assert problem is not None, text
    return problem


def read_by_hand(text: str) -> tuple[dict[str, tuple[str, int | str, int | str]], dict[str, int], list[str]]:
    """Who is computed how, everybody's number, and who is asked for: pass over the sentences until nothing is new."""
    how: dict[str, tuple[str, int | str, int | str]] = {}
    values: dict[str, int] = {}
    *facts, question = re.split(r"(?<=[.?]) ", text)
    for _ in facts:
        for fact in facts:
            person, words = [w for w in re.findall(r"\b[A-Z]\w+", fact) if w in NAMES], re.findall(r"\d+", fact)
            numbers = [int(word) for word in words]
            if re.search(r"has \d+ \w+\.$", fact):
                values.setdefault(person[0], numbers[0])
            elif "boxes" in fact:
                how[person[0]] = ("*", *numbers)
            elif "more" in fact or "fewer" in fact:
                how[person[0]] = ("+" if "more" in fact else "-", person[1], numbers[0])
            elif "times" in fact:
                how[person[0]] = ("*", person[1], numbers[0])
            elif "together" in fact:
                how[person[0]] = ("+", person[1], person[2])
            else:
                how[person[0]] = ("/", person[1], next(n for words, n in PARTS.items() if words in fact))
        for name, (sign, *sides) in how.items():
            if all(isinstance(side, int) or side in values for side in sides):
                a, b = (side if isinstance(side, int) else values[side] for side in sides)
                assert sign != "/" or a % b == 0
                values[name] = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    return how, values, [word for word in re.findall(r"\b[A-Z]\w+", question) if word in NAMES]


def claim_by_hand(words: str) -> tuple[str, int | str, int | str] | None:
    """The operation and sides that a step's words stand for."""
    for pattern, sign in (
        (r"(\d+) boxes of (\d+)", "*"),
        (r"(\w+) and (\w+)", "+"),
        (r"(?P<n>\d+) more than (?P<who>\w+)", "+"),
        (r"(?P<n>\d+) fewer than (?P<who>\w+)", "-"),
        (r"(?P<n>\d+) times (?P<who>\w+)", "*"),
        (r"(?P<part>half|a third|a quarter|a fifth) of (?P<who>\w+)", "/"),
    ):
        if found := re.fullmatch(pattern, words):
            if "who" in pattern:
                named = found.groupdict()
                return sign, named["who"], PARTS[named["part"]] if "part" in named else int(named["n"])
            first, second = (int(side) if side.isdigit() else side for side in found.groups())
            return sign, first, second
    return None


def labels_by_hand(text: str, lines: list[str]) -> list[bool]:
    how, values, asked = read_by_hand(text)
    known = set(values) - set(how)
    right, summed, done, labels = True, 1, False, []
    for line in lines:
        body, _, told = line.partition(". Answer: ")
        words, _, equation = body.partition(": ")
        who, _, words = words.removeprefix("- ").partition(" ")
        operation, _, result = equation.partition("=")
        sign = next(sign for sign in "+-*/" if sign in operation)
        a, b = map(int, operation.split(sign))
        right = right and not done and {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
        if who == "total":
            right = right and summed < len(asked) and sign == "+" and known.issuperset(asked[: summed + 1])
            if right:
                named = f"{asked[0]} and {asked[1]}" if summed == 1 else f"with {asked[summed]}"
                right = words == named and [a, b] == [
                    sum(values[name] for name in asked[:summed]),
                    values[asked[summed]],
                ]
            summed += 1
        else:
            claim = claim_by_hand(words.removeprefix("has "))
            right = right and who in how and who not in known and claim is not None
            if right and claim is not None:
                same = claim == how[who] or (isinstance(claim[2], str) and sign == "+" and claim[:0:-1] == how[who][1:])
                right = same and claim[0] == sign
                right = right and all(isinstance(side, int) or side in known for side in claim[1:])
                right = right and [a, b] == [side if isinstance(side, int) else values[side] for side in claim[1:]]
            known.add(who)
        if told:
            right = right and told == result == str(sum(values[name] for name in asked))
            right = right and (who == "total" or [who] == asked) and summed == len(asked)
            done = True
        labels.append(right)
    return labels


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_generated_can_be_solved(level: int) -> None:
    rng = Random(level)
    for _ in range(25):
        problem, lines = generate(rng, level)
        assert len(lines) == level == len(needed(problem)) + len(problem.asked) - 1
        assert is_solved(problem, lines) and check_steps(problem, lines) == [True] * level
        assert answer(lines) == str(problem.answer()) and problem.answer() <= MAX_VALUE
        assert is_solved(problem, solve(rng, problem)), "in another order"
        read = problem_of(problem.render())
        assert (read.item, read.asked, read.values()) == (problem.item, problem.asked, problem.values())
        assert read.quantities == problem.quantities and read.render() == problem.render()


def test_numbers_and_labels_agree_with_a_reading_by_hand() -> None:
    rng, seen = Random(1), []
    for i in range(240):
        problem, lines = generate(rng, LEVELS[i % len(LEVELS)])
        text = problem.render()
        _, values, asked = read_by_hand(text)
        assert values == problem.values() and asked == list(problem.asked), text
        broken = corrupt(rng, problem_of(text), lines)
        labels = check_steps(problem_of(text), broken)
        assert labels == labels_by_hand(text, broken), (text, broken)
        assert labels == sorted(labels, reverse=True), "wrong once, wrong for ever"
        seen += labels
    assert {True, False} == set(seen)


def test_most_corruptions_break_a_solution_where_they_should() -> None:
    rng, broken = Random(4), 0
    for _ in range(200):
        problem, lines = generate(rng, 5)
        changed = corrupt(rng, problem, lines)
        same = next((i for i, (a, b) in enumerate(zip(lines, changed, strict=False)) if a != b), len(lines))
        assert check_steps(problem, changed)[:same] == [True] * same
        broken += not is_solved(problem, changed)
    assert broken > 180


def test_the_right_solution() -> None:
    problem = problem_of(TEXT)
    assert problem.answer() == 114 and is_solved(problem, RIGHT)
    assert is_solved(problem, [RIGHT[0], RIGHT[2], RIGHT[1], *RIGHT[3:]]), "another order of people"
    assert is_solved(problem, [*RIGHT[:2], RIGHT[3], RIGHT[2], RIGHT[4]]), "a sum early"
    needless = problem_of(TEXT.replace("Ben, Cara and Eva have together", "Cara have").replace("do C", "does C"))
    assert is_solved(needless, [RIGHT[0], RIGHT[2], f"{RIGHT[1]}. Answer: 51"]), "needless, but right"
    both = problem_of("Ana has 4 eggs. Ben has 3 eggs. Cara has as many eggs as Ana and Ben together. "
                      "How many eggs does Cara have?")  # fmt: skip
    assert is_solved(both, ["- Cara has Ana and Ben: 4+3=7. Answer: 7"])
    assert is_solved(both, ["- Cara has Ben and Ana: 3+4=7. Answer: 7"])
    assert not is_solved(both, ["- Cara has Ben and Ana: 4+3=7. Answer: 7"]), "sides not as named"


@pytest.mark.parametrize(
    ("changes", "first_wrong"),
    [
        ({1: "- Cara has 9 more than Ben: 42+9=52"}, 1),  # wrong result
        ({1: "- Cara has 8 more than Ben: 42+8=50"}, 1),  # wrong number
        ({1: "- Cara has 9 more than Ben: 42+8=50"}, 1),  # another number than claimed
        ({1: "- Cara has 9 fewer than Ben: 42-9=33"}, 1),  # wrong relation
        ({1: "- Cara has 9 more than Dan: 5+9=14"}, 1),  # compared with another person
        ({1: "- Cara has 9 more than Dan: 42+9=51"}, 1),  # right by luck
        ({1: "- Eva has 9 more than Ben: 42+9=51"}, 1),  # wrong person
        ({1: "- Dan has 9 more than Ben: 42+9=51"}, 1),  # nobody computes Dan
        ({1: "- Zoe has 9 more than Ben: 42+9=51"}, 1),  # not in the story
        ({1: RIGHT[0]}, 1),  # known already
        ({0: RIGHT[1], 1: RIGHT[0]}, 0),  # Ben is not known yet
        ({2: "- Eva has half of Ben: 2/42=21"}, 2),  # sides of a division
        ({2: RIGHT[3], 3: RIGHT[2], 4: "total with Eva: 93+21=114"}, None),
        ({3: "total Ben and Eva: 42+21=63", 4: "total with Cara: 63+51=114. Answer: 114"}, 3),  # not in the order asked
        ({3: "total Cara and Eva: 51+21=72", 4: "total with Ben: 72+42=114. Answer: 114"}, 3),
        ({3: "total Ben and Cara: 93-51=42"}, 3),
        ({4: "total with Eva: 93+21=114. Answer: 115"}, 4),
        ({3: "total Ben and Cara: 42+51=93. Answer: 93"}, 3),  # too early
        ({3: "total Ben and Cara: 42+51=93. Answer: 114"}, 3),  # right before it can be known
        ({3: "total with Eva: 93+21=114", 4: RIGHT[3]}, 3),  # the second sum first
        ({4: RIGHT[3]}, 4),  # the same sum twice
        ({1: RIGHT[3], 3: RIGHT[1]}, 1),  # Cara is not known yet
        ({0: f"{RIGHT[0]}. Answer: 42"}, 0),
        ({1: "- Cara has 42+9=51"}, 1),  # no word how
        ({1: "Cara has 9 more than Ben: 42+9=51"}, 1),
        ({1: "- cara has 9 more than Ben: 42+9=51"}, 1),
        ({1: "- Cara has 9 more than Ben: 42+9=51."}, 1),
        ({1: "- Cara has 9 more than Ben: 42 + 9 = 51"}, 1),
        ({1: ""}, 1),
        ({1: "- Cara has 9 more than Ben: 42+9=" + "9" * 5000}, 1),
    ],
)
def test_the_checker_refuses(changes: dict[int, str], first_wrong: int | None) -> None:
    lines = [changes.get(i, line) for i, line in enumerate(RIGHT)]
    right = len(lines) if first_wrong is None else first_wrong
    assert check_steps(problem_of(TEXT), lines) == [i < right for i in range(len(lines))]
    assert not is_solved(problem_of(TEXT), lines)


def test_incomplete_and_overlong_solutions() -> None:
    problem = problem_of(TEXT)
    assert not is_solved(problem, []) and not is_solved(problem, RIGHT[:-1])
    assert not is_solved(problem, [*RIGHT[:-1], "total with Eva: 93+21=114"]), "no answer"
    assert not is_solved(problem, [RIGHT[0], *RIGHT[3:]]), "a step is missing"
    for trailing in ("done", "Answer: 114", RIGHT[-1], "- Dan has 0 more than Dan: 5+0=5"):
        assert check_steps(problem, [*RIGHT, trailing]) == [True] * len(RIGHT) + [False]
        assert not is_solved(problem, [*RIGHT, trailing])
    one = problem_of(
        "Ana has 4 eggs. Ben has 3 more eggs than Ana. Cara has half as many eggs as Ana. How many eggs does Ben have?"
    )
    assert check_steps(one, ["- Ben has 3 more than Ana: 4+3=7. Answer: 7", "- Cara has half of Ana: 4/2=2"]) == [
        True,
        False,
    ]
    elsewhere = ["- Ben has 3 more than Ana: 4+3=7", "- Cara has half of Ana: 4/2=2. Answer: 7"]
    assert check_steps(one, elsewhere) == [True, False], "the answer belongs to its own line"


def test_answer() -> None:
    assert answer(RIGHT) == "114"
    assert answer([]) is None and answer(RIGHT[:-1]) is None and answer(["Answer: 1", "so"]) is None
    assert answer(["total 1+1=2. Answer: 2!"]) is None and answer(["Answer: " + "9" * 5000]) is None


def test_spacing_does_not_matter() -> None:
    assert problem_of("  " + TEXT.replace(" ", "  ").replace(".", ".\n")) == problem_of(TEXT)


ASK = " How many apples does Ben have?"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "How many apples does Ben have?",
        "Ben has 5 apples." + ASK,  # nothing to compute
        "Ann has 5 apples. Ben has 3 more apples than Ann." + ASK,  # no name of ours
        "Ana has 5 apples. Ben has 3 more apples than Ana. How many apples does Cara have?",
        "Ana has 5 apples. Ben has 3 more apples than Cara." + ASK,  # nobody counts Cara
        "Ana has 5 apples. Ana has 6 apples. Ben has 3 more apples than Ana." + ASK,
        "Ana has 3 more apples than Ben. Ben has 3 fewer apples than Ana." + ASK,  # in circles
        "Ana has 5 apples. Ben has 3 more cards than Ana." + ASK,  # cards are asked for nowhere
        "Ana has 5 apples. Ben has half as many apples as Ana." + ASK,  # 2.5
        "Ana has 5 apples. Ben has 7 fewer apples than Ana." + ASK,  # -2
        "Ana has 999 apples. Ben has 7 times as many apples as Ana." + ASK,  # 6993
        "Ana has 5 apples. Ben has 3 more apples than Ana. How many apples do Ben and Ben have together?",
        "Ana has five apples. Ben has 3 more apples than Ana." + ASK,
        "Ana has \N{ARABIC-INDIC DIGIT FIVE} apples. Ben has 3 more apples than Ana." + ASK,
        "Ana has 5 apples. Ben has 3 more apples than Ana. Thanks." + ASK,
        "ana has 5 apples. ben has 3 more apples than ana. how many apples does ben have?",
        "Janet's ducks lay 16 eggs per day. How many eggs does she have?",
    ],
)
def test_other_texts_are_no_problem_of_the_family(text: str) -> None:
    assert parse(text) is None


def test_a_story_of_too_many_steps_is_refused() -> None:
    names = list(NAMES)
    chain = [f"{names[0]} has 5 {ITEMS[0]}."]
    chain += [f"{b} has 2 more {ITEMS[0]} than {a}." for a, b in pairwise(names)]
    for steps in (10, 11):
        text = " ".join([*chain[: steps + 1], f"How many {ITEMS[0]} does {names[steps]} have?"])
        assert (parse(text) is None) is (steps > LEVELS[-1])
