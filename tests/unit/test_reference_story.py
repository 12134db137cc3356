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

OPENING = "Some friends compare what they have. "
TEXT = OPENING + (
    "Ben owns 3 boxes of 14 apples each. Dan has 5 cards. Compared with Ben, Cara owns 9 more apples. "
    "Compared with Ben, Eva owns half as many apples. How many apples do Ben, Cara and Eva have together?"
)
RIGHT = [
    "as Ben owns 3 boxes of 14: 3*14=42, Ben has 42",
    "with Ben, Cara owns 9 more: Ben has 42, 42+9=51, Cara has 51",
    "with Ben, Eva owns half as many: Ben has 42, 42/2=21, Eva has 21",
    "total of Ben and Cara: Ben has 42, Cara has 51, 42+51=93",
    "total plus Eva: Eva has 21, 93+21=114. Answer: 114",
]
CARA = RIGHT[1]
PARTS = {"half": 2, "a third": 3, "a quarter": 4, "a fifth": 5}


def problem_of(text: str) -> StoryProblem:
    problem = parse(text)
    assert problem is not None, text
    return problem


def read_by_hand(text: str) -> tuple[dict[str, tuple[str, int | str, int | str]], dict[str, int], list[str]]:
    """Who is computed how, everybody's number, and who is asked for: pass over the sentences until nothing is new."""
    how: dict[str, tuple[str, int | str, int | str]] = {}
    values: dict[str, int] = {}
    *facts, question = re.split(r"(?<=[.?]) ", text)[1:]
    for _ in facts:
        for fact in facts:
            *sources, person = [w for w in re.findall(r"\b[A-Z]\w+", fact) if w in NAMES]
            numbers = [int(word) for word in re.findall(r"\d+", fact)]
            if " has " in fact:
                values.setdefault(person, numbers[0])
            elif "boxes" in fact:
                how[person] = ("*", *numbers)
            elif "more" in fact or "fewer" in fact:
                how[person] = ("+" if "more" in fact else "-", sources[0], numbers[0])
            elif "times" in fact:
                how[person] = ("*", sources[0], numbers[0])
            elif "both" in fact:
                how[person] = ("+", *sources)
            else:
                how[person] = ("/", sources[0], next(n for words, n in PARTS.items() if words in fact))
        for name, (sign, *sides) in how.items():
            if all(isinstance(side, int) or side in values for side in sides):
                a, b = (side if isinstance(side, int) else values[side] for side in sides)
                assert sign != "/" or a % b == 0
                values[name] = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    return how, values, [word for word in re.findall(r"\b[A-Z]\w+", question) if word in NAMES]


def claim_by_hand(words: str) -> tuple[str, str, int | str, int | str] | None:
    """The person, operation and sides that a step's first words stand for."""
    who = re.findall(r"[A-Z]\w+", words)
    numbers = [int(number) for number in re.findall(r"\d+", words)]
    for pattern, sign in (
        (r"as \w+ owns \d+ boxes of \d+", "*"),
        (r"with \w+ and \w+, \w+ owns as many as both", "+"),
        (r"with \w+, \w+ owns \d+ more", "+"),
        (r"with \w+, \w+ owns \d+ fewer", "-"),
        (r"with \w+, \w+ owns \d+ times as many", "*"),
        (r"with \w+, \w+ owns (half|a third|a quarter|a fifth) as many", "/"),
    ):
        if re.fullmatch(pattern, words):
            if len(who) == 1:
                return who[0], sign, numbers[0], numbers[1]
            if len(who) == 3:
                return who[2], sign, who[0], who[1]
            return who[1], sign, who[0], numbers[0] if numbers else PARTS[words.split(" owns ")[1][: -len(" as many")]]
    return None


def labels_by_hand(text: str, lines: list[str]) -> list[bool]:
    how, values, asked = read_by_hand(text)
    known = set(values) - set(how)
    right, summed, done, labels = True, 1, False, []
    for line in lines:
        body, _, told = line.partition(". Answer: ")
        words, _, rest = body.partition(": ")
        *looked_up, equation, says = rest.split(", ") if not words.startswith("total") else [*rest.split(", "), ""]
        operation, _, result = equation.partition("=")
        sign = next(sign for sign in "+-*/" if sign in operation)
        a, b = map(int, operation.split(sign))
        right = right and not done and {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
        right = right and all(values[name] == int(n) for name, n in (fact.split(" has ") for fact in looked_up))
        sources = [fact.split()[0] for fact in looked_up]
        if words.startswith("total"):
            who = "total"
            right = right and summed < len(asked) and sign == "+" and known.issuperset(asked[: summed + 1])
            if right:
                named = f"total of {asked[0]} and {asked[1]}" if summed == 1 else f"total plus {asked[summed]}"
                right = words == named and sources == asked[0 if summed == 1 else summed : summed + 1]
                right = right and [a, b] == [sum(values[name] for name in asked[:summed]), values[asked[summed]]]
            summed += 1
        else:
            claim = claim_by_hand(words)
            who = claim[0] if claim else ""
            right = right and who in how and who not in known and claim is not None
            if right and claim is not None:
                same = claim[1:] == how[who] or (claim[1] == "+" and claim[:1:-1] == how[who][1:])
                right = same and claim[1] == sign and says == f"{who} has {result}"
                right = right and all(isinstance(side, int) or side in known for side in claim[2:])
                right = right and [a, b] == [side if isinstance(side, int) else values[side] for side in claim[2:]]
                right = right and sources == [side for side in claim[2:] if isinstance(side, str)]
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
    needless = problem_of(TEXT.replace("do Ben, Cara and Eva have together", "does Cara have"))
    assert is_solved(needless, [RIGHT[0], RIGHT[2], f"{CARA}. Answer: 51"]), "needless, but right"
    both = problem_of(
        OPENING + "Ana has 4 eggs. Ben has 3 eggs. Compared with Ana and Ben, Cara owns as many eggs as both. "
        "How many eggs does Cara have?"
    )
    as_told = "with Ana and Ben, Cara owns as many as both: Ana has 4, Ben has 3, 4+3=7, Cara has 7. Answer: 7"
    turned = "with Ben and Ana, Cara owns as many as both: Ben has 3, Ana has 4, 3+4=7, Cara has 7. Answer: 7"
    assert is_solved(both, [as_told]) and is_solved(both, [turned])
    assert not is_solved(both, [turned.replace("3+4", "4+3")]), "sides not as named"


@pytest.mark.parametrize(
    ("changes", "first_wrong"),
    [
        ({1: CARA.replace("51", "52")}, 1),  # wrong result
        ({1: CARA.replace("=51", "=52")}, 1),
        ({1: CARA.replace("has 51", "has 52")}, 1),  # another number than computed
        ({1: CARA.replace("Ben has 42", "Ben has 24")}, 1),  # remembered wrongly
        ({1: "with Ben, Cara owns 8 more: Ben has 42, 42+8=50, Cara has 50"}, 1),  # wrong number
        ({1: "with Ben, Cara owns 9 more: Ben has 42, 42+8=50, Cara has 50"}, 1),  # another number than claimed
        ({1: "with Ben, Cara owns 9 fewer: Ben has 42, 42-9=33, Cara has 33"}, 1),  # wrong relation
        ({1: "with Dan, Cara owns 9 more: Dan has 5, 5+9=14, Cara has 14"}, 1),  # compared with another person
        ({1: "with Dan, Cara owns 9 more: Dan has 5, 42+9=51, Cara has 51"}, 1),  # right by luck
        ({1: CARA.replace("Cara", "Eva")}, 1),  # wrong person
        ({1: CARA.replace("Cara", "Dan")}, 1),  # nobody computes Dan
        ({1: CARA.replace("Cara", "Zoe")}, 1),  # not in the story
        ({1: RIGHT[0]}, 1),  # known already
        ({0: RIGHT[1], 1: RIGHT[0]}, 0),  # Ben is not known yet
        ({2: RIGHT[2].replace("42/2", "2/42")}, 2),  # sides of a division
        ({2: RIGHT[3], 3: RIGHT[2], 4: RIGHT[4].replace(". Answer: 114", "")}, None),
        (  # not in the order asked
            {
                3: "total of Ben and Eva: Ben has 42, Eva has 21, 42+21=63",
                4: "total plus Cara: Cara has 51, 63+51=114. Answer: 114",
            },
            3,
        ),
        ({3: "total of Cara and Ben: Cara has 51, Ben has 42, 51+42=93"}, 3),
        ({3: "total of Ben and Cara: Ben has 42, Cara has 51, 93-51=42"}, 3),
        ({4: RIGHT[4].replace("Answer: 114", "Answer: 115")}, 4),
        ({3: f"{RIGHT[3]}. Answer: 93"}, 3),  # too early
        ({3: f"{RIGHT[3]}. Answer: 114"}, 3),  # right before it can be known
        ({3: "total plus Eva: Eva has 21, 93+21=114", 4: RIGHT[3]}, 3),  # the second sum first
        ({4: RIGHT[3]}, 4),  # the same sum twice
        ({1: RIGHT[3], 3: RIGHT[1]}, 1),  # Cara is not known yet
        ({0: f"{RIGHT[0]}. Answer: 42"}, 0),
        ({1: CARA.partition(": ")[2]}, 1),  # no word how
        ({1: "Ben has 42, 42+9=51, Cara has 51"}, 1),
        ({1: CARA.replace(" Ben has 42,", "")}, 1),  # looked up nowhere
        ({1: CARA.replace("Cara", "cara")}, 1),
        ({1: CARA + "."}, 1),
        ({1: CARA.replace("42+9=51", "42 + 9 = 51")}, 1),
        ({1: ""}, 1),
        ({1: CARA.replace("51", "9" * 5000)}, 1),
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
    assert not is_solved(problem, [*RIGHT[:-1], RIGHT[-1].replace(". Answer: 114", "")]), "no answer"
    assert not is_solved(problem, [RIGHT[0], *RIGHT[3:]]), "a step is missing"
    for trailing in ("done", "Answer: 114", RIGHT[-1], "with Dan, Dan owns 0 more: Dan has 5, 5+0=5, Dan has 5"):
        assert check_steps(problem, [*RIGHT, trailing]) == [True] * len(RIGHT) + [False]
        assert not is_solved(problem, [*RIGHT, trailing])
    one = problem_of(
        OPENING + "Ana has 4 eggs. Compared with Ana, Ben owns 3 more eggs. Compared with Ana, Cara owns half as many "
        "eggs. How many eggs does Ben have?"
    )
    ben = "with Ana, Ben owns 3 more: Ana has 4, 4+3=7, Ben has 7"
    cara = "with Ana, Cara owns half as many: Ana has 4, 4/2=2, Cara has 2"
    assert check_steps(one, [f"{ben}. Answer: 7", cara]) == [True, False]
    assert check_steps(one, [ben, f"{cara}. Answer: 7"]) == [True, False], "the answer belongs to its own line"


def test_answer() -> None:
    assert answer(RIGHT) == "114"
    assert answer([]) is None and answer(RIGHT[:-1]) is None and answer(["Answer: 1", "so"]) is None
    assert answer(["total 1+1=2. Answer: 2!"]) is None and answer(["Answer: " + "9" * 5000]) is None


def test_spacing_does_not_matter() -> None:
    assert problem_of("  " + TEXT.replace(" ", "  ").replace(".", ".\n")) == problem_of(TEXT)


ANA = OPENING + "Ana has 5 apples. "
ASK = " How many apples does Ben have?"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "How many apples does Ben have?",
        OPENING + ASK.strip(),
        OPENING + "Ben has 5 apples." + ASK,  # nothing to compute
        OPENING + "Ann has 5 apples. Compared with Ann, Ben owns 3 more apples." + ASK,  # no name of ours
        ANA + "Compared with Ana, Ben owns 3 more apples. How many apples does Cara have?",
        ANA + "Compared with Cara, Ben owns 3 more apples." + ASK,  # nobody counts Cara
        ANA + "Ana has 6 apples. Compared with Ana, Ben owns 3 more apples." + ASK,
        OPENING
        + "Compared with Ben, Ana owns 3 more apples. Compared with Ana, Ben owns 3 fewer apples."
        + ASK,  # in circles
        ANA + "Compared with Ana, Ben owns 3 more cards." + ASK,  # cards are asked for nowhere
        ANA + "Compared with Ana, Ben owns half as many apples." + ASK,  # 2.5
        ANA + "Compared with Ana, Ben owns 7 fewer apples." + ASK,  # -2
        ANA.replace("5", "999") + "Compared with Ana, Ben owns 7 times as many apples." + ASK,  # 6993
        ANA + "Compared with Ana, Ben owns 3 more apples. How many apples do Ben and Ben have together?",
        ANA.replace("5", "five") + "Compared with Ana, Ben owns 3 more apples." + ASK,
        ANA.replace("5", "\N{ARABIC-INDIC DIGIT FIVE}") + "Compared with Ana, Ben owns 3 more apples." + ASK,
        ANA + "Compared with Ana, Ben owns 3 more apples. Thanks." + ASK,
        (ANA + "Compared with Ana, Ben owns 3 more apples." + ASK).lower(),
        "Ana has 5 apples. Compared with Ana, Ben owns 3 more apples." + ASK,  # no opening
        "Janet's ducks lay 16 eggs per day. How many eggs does she have?",
    ],
)
def test_other_texts_are_no_problem_of_the_family(text: str) -> None:
    assert parse(text) is None


def test_a_story_of_too_many_steps_is_refused() -> None:
    names = list(NAMES)
    chain = [f"{OPENING}{names[0]} has 5 {ITEMS[0]}."]
    chain += [f"Compared with {a}, {b} owns 2 more {ITEMS[0]}." for a, b in pairwise(names)]
    for steps in (10, 11):
        text = " ".join([*chain[: steps + 1], f"How many {ITEMS[0]} does {names[steps]} have?"])
        assert (parse(text) is None) is (steps > LEVELS[-1])
