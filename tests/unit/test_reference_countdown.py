"""Countdown problems can be solved, and their checker agrees with a solver that shares no code with it."""

from __future__ import annotations

import time
from fractions import Fraction
from functools import cache
from random import Random

import pytest

from ets_engine.reference.corruptions import corrupt, slip
from ets_engine.reference.countdown import (
    LEVELS,
    MAX_VALUE,
    CountdownProblem,
    compose,
    generate,
    is_right_expression,
    is_solved,
    label_steps,
    parse,
    parse_step,
    reachable,
)

PROBLEM = CountdownProblem((4, 6, 10, 19), 16)
HUNDRED = CountdownProblem((4, 6, 10, 19), 100)
RIGHT = ["19-4=15 left 6 10 15", "15*6=90 left 10 90", "90+10=100"]


@cache
def makeable(numbers: tuple[int, ...]) -> frozenset[int]:
    """Values of all expression trees over these numbers: split them in two in every way, join what the parts make."""
    if len(numbers) == 1:
        return frozenset(numbers)
    found: set[int] = set()
    for mask in range(1, 2 ** len(numbers) - 1):
        left = makeable(tuple(n for i, n in enumerate(numbers) if mask >> i & 1))
        right = makeable(tuple(n for i, n in enumerate(numbers) if not mask >> i & 1))
        for a in left:
            for b in right:
                values = [Fraction(a + b), Fraction(a - b), Fraction(a * b), Fraction(a, b)]
                found |= {int(value) for value in values if value.denominator == 1 and 0 < value <= MAX_VALUE}
    return frozenset(found)


def independent_labels(problem: CountdownProblem, lines: list[str]) -> list[bool]:
    """By hand: take the operands out of the pool, put the result in, see whether the target can still be made."""
    pool, right, labels = list(problem.numbers), True, []
    for line in lines:
        claim, _, rest = line.partition(" left ")
        operation, _, result = claim.partition("=")
        sign = next(sign for sign in "+-*/" if sign in operation)
        a, b = map(int, operation.split(sign))
        value = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[sign]
        for operand in (a, b):
            right = right and operand in pool
            if right:
                pool.remove(operand)
        pool.append(int(result))
        left_over = [int(n) for n in rest.split()] if rest else [int(result)]
        right = right and value == int(result) and 0 < value <= MAX_VALUE and sorted(left_over) == sorted(pool)
        right = right and problem.target in makeable(tuple(sorted(pool)))
        labels.append(right)
    return labels


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_generated_can_be_solved(level: int) -> None:
    rng = Random(level)
    for _ in range(60):
        problem, lines = generate(rng, level)
        assert len(problem.numbers) == level and len(lines) == level - 1
        assert 10 <= problem.target <= 100 and all(1 <= n <= 20 for n in problem.numbers)
        assert is_solved(problem, lines) and label_steps(problem, lines) == [True] * len(lines)
        expression = compose(lines)
        assert expression is not None and is_right_expression(problem, expression)
        assert parse(problem.render()) == problem


@pytest.mark.parametrize("level", [4, 5])
def test_labels_agree_with_an_independent_solver(level: int) -> None:
    rng, seen = Random(10 + level), []
    for _ in range(120 if level == 4 else 40):
        problem, lines = generate(rng, level)
        broken = corrupt(rng, problem, lines)
        labels = label_steps(problem, broken)
        assert labels == independent_labels(problem, broken), (problem, broken)
        assert labels == sorted(labels, reverse=True), "wrong once, wrong for ever"
        seen += labels
    assert {True, False} == set(seen)


def test_what_can_be_reached_agrees_with_an_independent_solver() -> None:
    rng = Random(3)
    for _ in range(30):
        numbers = tuple(sorted(rng.randint(1, 20) for _ in range(4)))
        assert reachable(numbers) == makeable(numbers)


def test_most_corruptions_break_a_solution_where_they_should() -> None:
    rng, broken = Random(4), 0
    for _ in range(200):
        problem, lines = generate(rng, 4)
        changed = corrupt(rng, problem, lines)
        same = next((i for i, (a, b) in enumerate(zip(lines, changed, strict=False)) if a != b), len(lines))
        assert label_steps(problem, changed)[:same] == [True] * same
        broken += not is_solved(problem, changed)
    assert broken > 130  # some of the legal moves lead there too


def test_the_right_solution() -> None:
    assert is_solved(HUNDRED, RIGHT)
    assert is_solved(HUNDRED, ["19-4=15 left 15 10 6", "6*15=90 left 90 10", "10+90=100"]), "any order"
    assert is_solved(HUNDRED, [f" {line} " for line in RIGHT])


@pytest.mark.parametrize(
    ("lines", "labels"),
    [
        (["19-4=16 left 6 10 16", *RIGHT[1:]], [False, False, False]),  # wrong result
        (["19-4=15 left 6 10 16", *RIGHT[1:]], [False, False, False]),  # wrong remainder
        (["19-4=15 left 6 15", "15*6=90"], [False, False]),  # a number lost
        ([RIGHT[0], "15*6=90 left 6 90", "90+6=96"], [True, False, False]),  # used twice
        ([RIGHT[0], "15*15=225 left 6 10"], [True, False]),  # used twice, there once
        ([RIGHT[0], "15*7=105 left 6 10 105"], [True, False]),  # invented
        (["19-4=15 left 6 10 15", "15*6=90", "90+10=100"], [True, False, False]),  # remainder missing
        (["4/6=0 left 0 10 19"], [False]),  # not whole
        (["4-6=2 left 2 10 19"], [False]),  # negative
        (["10*6=60 left 4 19 60", "60*19=1140 left 4 1140"], [False, False]),  # a dead end, then too large
        ([*RIGHT, ""], [True, True, True, False]),
        ([*RIGHT, "done"], [True, True, True, False]),
        ([RIGHT[0] + " ok", *RIGHT[1:]], [False, False, False]),
        ([*RIGHT, "100+0=100"], [True, True, True, False]),
        (["what?"], [False]),
        (["19-4=16 left 6 10 16", *RIGHT], [False] * 4),  # starting again does not help
        (["9" * 5000 + "+1=2"], [False]),
        (["١٩-4=15 left 6 10 15"], [False]),  # digits, but none of ours
    ],
)
def test_the_checker_refuses(lines: list[str], labels: list[bool]) -> None:
    assert label_steps(HUNDRED, lines) == labels
    assert not is_solved(HUNDRED, lines)


def test_a_part_or_another_target_is_no_solution() -> None:
    assert not is_solved(HUNDRED, RIGHT[:2]) and not is_solved(HUNDRED, []) and not is_solved(PROBLEM, RIGHT)
    assert label_steps(HUNDRED, RIGHT[:2]) == [True, True]
    dead_end = ["10+19=29 left 4 6 29"]  # legal; 100 cannot be made any more
    assert label_steps(HUNDRED, dead_end) == [100 in makeable((4, 6, 29))] == [False]


@pytest.mark.parametrize(
    "text",
    [
        "Use 4, 6, 10 and 19 to make 16.",
        "  use 19, 10,6  and\n4 to MAKE 16",
        "Use 4, 6, 10, and 19 to make 16.",
        "Use 4 6 10 and 19 to make 16.",
    ],
)
def test_wordings_of_one_problem(text: str) -> None:
    assert parse(text) == PROBLEM
    assert PROBLEM.render() == "Use 4, 6, 10 and 19 to make 16."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Use 4, 6 and 10 to make 16.",
        "Use 1, 2, 3, 4, 5, 6 and 7 to make 16.",
        "Use 4, 6, 10 and 19 to make 0.",
        "Use 0, 6, 10 and 19 to make 16.",
        "Use 4, 6, 10 and 401 to make 16.",
        "Use 4, 6, 10 and 19 to make 401.",
        "Use 4, 6, 10 and 19 to make 16. Use 4, 6, 10 and 19 to make 16.",
        "Use 4, 6, 10 and -19 to make 16.",
        "Use 4, 6, 10 and 19.5 to make 16.",
        "Use 4,, 6, 10 and 19 to make 16.",
        "Use ٤, 6, 10 and 19 to make 16.",
        "Make 16 from 4, 6, 10 and 19.",
        "Use 4, 6, 10 and " + "9" * 5000 + " to make 16.",
    ],
)
def test_other_texts_are_no_problem_of_the_family(text: str) -> None:
    assert parse(text) is None


def test_compose() -> None:
    assert compose(RIGHT) == "((19-4)*6)+10"
    assert compose(["19-4=15 left 6 10 15", "6*15=90 left 90 10", "10+90=100"]) == compose(RIGHT), "one form"
    assert compose(["4+6=11 left 10 11 19", "19-11=8 left 8 10", "8+10=18"]) == "10+(19-(4+6))", "unchecked"
    assert compose(["2*2=4 left 4 4", "4+4=8"]) == "(2*2)+4"
    assert compose(RIGHT[:2]) is None and compose([]) is None and compose([*RIGHT, "so 100"]) is None


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("(19-4)*6+10", True),
        (" 10 + 6 * (19 - 4) ", True),
        ("(19-4)*6", False),  # one number left
        ("(19-4)*6+10+4-4", False),  # twice
        ("19*6-4-10", True),  # another route
        ("(19-4)*6+5+5", False),  # invented
        ("(4-19)*-6+10", False),  # through negative numbers
        ("(19-4)*6--10", False),
        ("+(19-4)*6+10", False),
        ("(19-4)*6+10.0", False),
        ("(19-4)*6+1e1", False),
        ("(19-4)*6+1_0", False),
        ("(19-4)*6+010", False),
        ("(19-4)*6+0xa", False),
        ("(19-4)//1*6+10", False),
        ("(19-4)*6+10 # yes", False),
        ("(19-4)*6+10; 1", False),
        ("((19-4)*6+10,)", False),
        ("[100][0]", False),
        ("100", False),
        ("", False),
        ("(", False),
        ("\0", False),
        ("True", False),
    ],
)
def test_expressions(expression: str, right: bool) -> None:
    assert is_right_expression(HUNDRED, expression) is right


def test_a_truth_value_is_no_number() -> None:
    assert is_right_expression(CountdownProblem((1, 2, 3, 10), 16), "1+2+3+10")
    assert not is_right_expression(CountdownProblem((1, 2, 3, 10), 16), "True+2+3+10")


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9**9",
        "9" * 100_000,
        "(" * 100_000,
        "(" * 150 + "1" + ")" * 150,
        "(" * 99 + "1" + ")" * 99,
        "-" * 100_000 + "1",
        "-" * 150 + "1",
        "1+" * 100_000 + "1",
        "1+" * 99 + "1",
        "__import__('os').system('false')",
        "print(1)",
        "(lambda: 100)()",
        "'a' * 10**9",
        "[0] * 10**9",
        "1 if 1 else 1",
        "x := 1",
    ],
)
def test_hostile_expressions_are_refused_quickly(expression: str) -> None:
    started_s = time.process_time()
    assert not is_right_expression(HUNDRED, expression)
    assert time.process_time() - started_s < 0.5  # a millisecond; unchecked, some never end


def test_slips_look_like_numbers_and_are_wrong() -> None:
    rng = Random(0)
    for value in (1, 7, 10, 11, 99, 400, 9999):
        assert all((wrong := slip(rng, value)) > 0 and wrong != value for _ in range(50))


def test_steps_round_trip() -> None:
    rng = Random(6)
    for _ in range(30):
        for line in generate(rng, 5)[1]:
            move = parse_step(line)
            assert move is not None and move.render() == line
