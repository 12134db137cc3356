"""The `countdown` family: reach a target from given numbers; generator, exact checker, solvability.

A solution has one operation per line with what is left (in any order), the last line reaching the target::

    19-4=15 left 6 10 15
    15*6=90 left 10 90
    90+10=100
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

LEVELS = (4, 5, 6)  # level = how many numbers
MAX_GIVEN = 20
MAX_VALUE = 400  # largest intermediate result the generator uses and the checker accepts
TARGETS = (10, 100)

_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_PROMPT = re.compile(
    r"use ([0-9]{1,3}(?:(?:,| |, )[0-9]{1,3})*)(?:,| ,)? and ([0-9]{1,3}) to make ([0-9]{1,3})\.?", re.IGNORECASE
)
_STEP = re.compile(r"([0-9]{1,6})([-+*/])([0-9]{1,6})=([0-9]{1,6})(?: left((?: [0-9]{1,6})+))?")
_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,200}")


@dataclass(frozen=True, slots=True)
class CountdownProblem:
    """Numbers, sorted, each to be used exactly once, and the target."""

    numbers: tuple[int, ...]
    target: int

    def render(self) -> str:
        """The problem in words."""
        *head, last = self.numbers
        return f"Use {', '.join(map(str, head))} and {last} to make {self.target}."


def parse(text: str) -> CountdownProblem | None:
    """The problem in `text`, or None when it is not a countdown problem of a known level.

    Letter case, spacing, the order of the numbers and the full stop do not matter: `render` puts them right.
    """
    match = _PROMPT.fullmatch(" ".join(text.split()))
    if match is None:
        return None
    *numbers, target = (int(part) for part in re.findall("[0-9]+", match[0]))
    if len(numbers) not in LEVELS or not all(0 < n <= MAX_VALUE for n in (*numbers, target)):
        return None
    return CountdownProblem(tuple(sorted(numbers)), target)


def apply(left: int, op: str, right: int) -> int | None:
    """The result of one operation, or None where it leaves the positive integers up to `MAX_VALUE`."""
    if op == "+":
        result = left + right
    elif op == "-":
        result = left - right
    elif op == "*":
        result = left * right
    else:
        result = left // right if right and left % right == 0 else 0
    return result if 0 < result <= MAX_VALUE else None


def merge(numbers: Sequence[int], left: int, right: int, result: int) -> tuple[int, ...]:
    """The sorted numbers left after `left` and `right` became `result`."""
    rest = list(numbers)
    rest.remove(left)
    rest.remove(right)
    return tuple(sorted([*rest, result]))


@lru_cache(maxsize=400_000)
def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """Every value that can be made from all of `numbers` (sorted)."""
    if len(numbers) == 1:
        return frozenset(numbers)
    found: set[int] = set()
    for state in {
        merge(numbers, a, b, result)
        for i, a in enumerate(numbers)
        for j, b in enumerate(numbers)
        if i != j
        for op in "+-*/"
        if (result := apply(a, op, b)) is not None
    }:
        found |= reachable(state)
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Move:
    """One operation and the numbers left after it."""

    left: int
    op: str
    right: int
    result: int
    rest: tuple[int, ...]

    def render(self) -> str:
        """The step's line; the last one names nothing left."""
        line = f"{self.left}{self.op}{self.right}={self.result}"
        return line if len(self.rest) == 1 else f"{line} left {' '.join(map(str, self.rest))}"


def parse_step(line: str) -> Move | None:
    """The move a line claims, unchecked, or None when it is not one."""
    match = _STEP.fullmatch(line.strip())
    if match is None:
        return None
    result = int(match[4])
    rest = tuple(int(part) for part in match[5].split()) if match[5] else (result,)
    return Move(int(match[1]), match[2], int(match[3]), result, rest)


def generate(rng: Random, level: int) -> tuple[CountdownProblem, list[str]]:
    """A solvable problem and one random solution of it, line by line."""
    while True:
        numbers = tuple(sorted(rng.randint(1, MAX_GIVEN) for _ in range(level)))
        state, lines = numbers, []
        while len(state) > 1:
            for _ in range(20):
                i, j = rng.sample(range(len(state)), 2)
                left, right, op = state[i], state[j], rng.choice("+-*/")
                if op in "+*" and left < right:
                    left, right = right, left
                result = apply(left, op, right)
                if result is not None:
                    break
            else:
                break
            state = merge(state, left, right, result)
            lines.append(Move(left, op, right, result, state).render())
        if len(state) == 1 and TARGETS[0] <= state[0] <= TARGETS[1]:
            return CountdownProblem(numbers, state[0]), lines


def walk(problem: CountdownProblem, lines: Sequence[str]) -> list[tuple[bool, tuple[int, ...]]]:
    """Check each line: is everything up to and including it legal and right, and what is left after it."""
    state, valid, out = problem.numbers, True, []
    for line in lines:
        move = parse_step(line) if valid else None
        valid = move is not None and _is_legal(state, move)
        if move is not None and valid:
            state = tuple(sorted(move.rest))
        out.append((valid, state))
    return out


def _is_legal(state: tuple[int, ...], move: Move) -> bool:
    pool = list(state)
    for operand in (move.left, move.right):
        if operand not in pool:
            return False
        pool.remove(operand)
    return apply(move.left, move.op, move.right) == move.result and sorted([*pool, move.result]) == sorted(move.rest)


def label_steps(problem: CountdownProblem, lines: Sequence[str]) -> list[bool]:
    """Per line: is everything so far right, and can the target still be reached?"""
    return [valid and problem.target in reachable(state) for valid, state in walk(problem, lines)]


def is_solved(problem: CountdownProblem, lines: Sequence[str]) -> bool:
    """Whether every line is right and the last one leaves exactly the target."""
    checks = walk(problem, lines)
    return bool(checks) and all(valid for valid, _ in checks) and checks[-1][1] == (problem.target,)


def compose(lines: Sequence[str]) -> str | None:
    """The expression that the lines build, by the values they claim; unchecked.

    None where a line is illegible, or the last one leaves more than one number.

    Example:
        >>> compose(["19-4=15 left 6 15", "15*6=90"])
        '(19-4)*6'
    """
    made: dict[int, list[str]] = {}  # claimed value -> expressions not used yet
    expression: str | None = None
    left_over = True
    for line in lines:
        move = parse_step(line)
        if move is None:
            return None
        left_over = len(move.rest) > 1
        parts = [stack.pop() if (stack := made.get(n)) else str(n) for n in (move.left, move.right)]
        if move.op in "+*":
            parts.sort()
        parts = [f"({part})" if not part.isdigit() else part for part in parts]
        expression = parts[0] + move.op + parts[1]
        made.setdefault(move.result, []).append(expression)
    return None if left_over else expression


def is_right_expression(problem: CountdownProblem, expression: str) -> bool:
    """Whether an expression uses each number exactly once, with legal operations only, and makes the target.

    Example:
        >>> is_right_expression(CountdownProblem((3, 4, 15, 17), 32), "(17*3)-(15+4)")
        True
    """
    used: list[int] = []

    def value(node: ast.expr) -> int | None:
        match node:
            case ast.Constant(value=int(number)):
                used.append(number)
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                sides = value(left), value(right)
                return None if sides[0] is None or sides[1] is None else apply(sides[0], _OPERATORS[type(op)], sides[1])
            case _:
                return None

    if not _EXPRESSION.fullmatch(expression):  # nothing but short arithmetic is worth parsing
        return False
    try:
        result = value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError):
        return False
    return result == problem.target and tuple(sorted(used)) == problem.numbers
