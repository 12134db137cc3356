"""Broken solutions of both families, the way policies break them: what the PRM learns from beside rollouts.

Some come out right by chance, so only `label_steps` says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from ets_engine.reference.countdown import MAX_GIVEN, CountdownProblem, Move, apply, merge, parse_step, walk
from ets_engine.reference.story import SHARES, Quantity, StoryProblem, calculate, tell_step


def corrupt(rng: Random, problem: CountdownProblem | StoryProblem, lines: Sequence[str]) -> list[str]:
    """Break one random line of a right solution, the later lines following from the broken state."""
    if isinstance(problem, CountdownProblem):
        return corrupt_countdown(rng, problem, lines)
    return corrupt_story(rng, problem, lines)


def corrupt_countdown(rng: Random, problem: CountdownProblem, lines: Sequence[str]) -> list[str]:
    """Break one random line the way policies break them, the later lines following from the broken state.

    Kinds: a wrong result, a wrong remainder, a number used twice, a legal move into a dead end. Some come out right by
    chance, so only `label_steps` says what is wrong.
    """
    at = rng.randrange(len(lines))
    state = problem.numbers if at == 0 else walk(problem, lines[:at])[-1][1]
    move = parse_step(lines[at])
    assert move is not None, "corrupt() takes legible solutions"
    last = at == len(lines) - 1
    kind = rng.choice(("result", "target", "pair") if last else ("result", "result", "rest", "twice", "deadend"))
    pool = list(state)
    if kind == "twice":
        left, right = rng.choice(pool), rng.randint(1, MAX_GIVEN)
        if right in pool:
            right = left
        result = apply(left, rng_op := rng.choice("+-*/"), right)
        if result is not None:
            rest = list(pool)
            rest.remove(left)
            if len(rest) > 1:
                rest.remove(rng.choice(rest))
            move = Move(left, rng_op, right, result, tuple(sorted([*rest, result])))
    elif kind in ("deadend", "pair", "target"):
        i, j = rng.sample(range(len(pool)), 2)
        op = rng.choice("+-*/")
        left, right = (max(pool[i], pool[j]), min(pool[i], pool[j])) if op in "+*" else (pool[i], pool[j])
        result = apply(left, op, right)
        if result is not None:
            move = Move(left, op, right, result, merge(pool, left, right, result))
        if kind == "target":  # claims the target whatever the operation gives
            move = Move(left, op, right, problem.target, (problem.target,))
    elif kind == "result":
        wrong = slip(rng, move.result)
        rest = list(move.rest)
        rest.remove(move.result)
        move = Move(move.left, move.op, move.right, wrong, tuple(sorted([*rest, wrong])))
    else:
        rest = list(move.rest)
        k = rng.randrange(len(rest))
        rest[k] = slip(rng, rest[k])
        if rng.random() < 0.3 and len(rest) > 2:
            rest.pop(k)
        move = Move(move.left, move.op, move.right, move.result, tuple(sorted(rest)))
    out, state = [*lines[:at], move.render()], move.rest
    while len(state) > 1 and len(out) < len(problem.numbers) - 1:  # go on from the broken state, towards the target
        options = [
            (a, op, b, result)
            for i, a in enumerate(state)
            for j, b in enumerate(state)
            if i != j
            for op in "+-*/"
            if (result := apply(a, op, b)) is not None and not (op in "+*" and a < b)
        ]
        if not options:
            break
        if len(state) == 2:
            hits = [option for option in options if option[3] == problem.target]
            options = hits or options
        a, op, b, result = rng.choice(options)
        state = merge(state, a, b, result)
        if len(state) == 1 and rng.random() < 0.7:
            result, state = problem.target, (problem.target,)
        out.append(Move(a, op, b, result, state).render())
    return out


def corrupt_story(rng: Random, problem: StoryProblem, lines: Sequence[str]) -> list[str]:
    """Break one random line, the later lines following from the broken number.

    Kinds: a wrong result, a wrong operand, another claim (person, number, relation), another person's line, an answer
    too early.
    """
    at = rng.randrange(len(lines))
    head, left, op, right, result, told = _split(lines[at])
    name = head.removeprefix("- ").partition(" ")[0]
    wrong = result
    kind = rng.choice(("result", "result", "result", "operand", "claim", "claim", "name"))
    if told is None and rng.random() < 0.05:
        return [*lines[:at], f"{lines[at]}. Answer: {result}"]
    if kind == "operand":
        others = [value for value in problem.values().values() if value not in (left, right)]
        other = rng.choice(others) if others and rng.random() < 0.7 else slip(rng, left)
        left, right = (other, right) if rng.random() < 0.5 else (left, other)
        wrong = calculate(left, op, right)
    elif kind == "claim" and name != "total":
        claim = _misread(rng, problem, name)
        head, left, op, right, wrong = _split(tell_step(name, claim, problem.values()))[:5]
    elif kind == "name" and name != "total":
        others = [other for other in problem.quantities if other != name]
        head = head.replace(name, rng.choice(others), 1)
    elif kind == "claim" or kind == "name":
        named = head.split()[-1]
        other = rng.choice([person for person in problem.quantities if person != named])
        head = " ".join(other if word == named else word for word in head.split())
        right = problem.values()[other] if rng.random() < 0.5 else right
        wrong = calculate(left, op, right)
    else:
        wrong = slip(rng, result)
    if not 0 < wrong <= 9999:
        wrong = slip(rng, result)
    out = [*lines[:at], _join(head, left, op, right, wrong, told is not None)]
    renamed = {result: wrong}  # what the later lines take for what
    for later in lines[at + 1 :]:
        head, left, op, right, result, told = _split(later)
        left, right = renamed.get(left, left), renamed.get(right, right)
        value = calculate(left, op, right)
        value = value if 0 < value <= 9999 else slip(rng, max(value, 7))
        if value != result:
            renamed[result] = value
        out.append(_join(head, left, op, right, value, told is not None))
    return out


def _misread(rng: Random, problem: StoryProblem, name: str) -> Quantity:
    """A person's quantity with another person, number or relation in it."""
    quantity = problem.quantities[name]
    sides: list[int | str] = [quantity.left, quantity.right]
    if isinstance(quantity.left, str) and isinstance(quantity.right, int) and rng.random() < 0.5:
        op = rng.choice([other for other in "+-*/" if other != quantity.op])
        return replace(quantity, op=op, right=rng.choice(list(SHARES.values())) if op == "/" else quantity.right)
    place = rng.randrange(2)
    side = sides[place]
    if isinstance(side, str):
        sides[place] = rng.choice([other for other in problem.quantities if other not in (side, name)])
    elif quantity.op == "/":
        sides[place] = rng.choice([parts for parts in SHARES.values() if parts != side])
    else:
        sides[place] = slip(rng, side)
    return replace(quantity, left=sides[0], right=sides[1])


def _split(line: str) -> tuple[str, int, str, int, int, str | None]:
    """Claim, left, operation, right, result and answer of a legible line."""
    claim, _, equation = line.partition(": ")
    match = re.match(r"([0-9]+)([-+*/])([0-9]+)=(-?[0-9]+)(?:\. Answer: ([0-9]+))?$", equation)
    assert match is not None, f"not a step: {line!r}"
    return claim, int(match[1]), match[2], int(match[3]), int(match[4]), match[5]


def _join(claim: str, left: int, op: str, right: int, result: int, answers: bool) -> str:
    return f"{claim}: {left}{op}{right}={result}" + (f". Answer: {result}" if answers else "")


def slip(rng: Random, value: int) -> int:
    """A wrong number that looks like `value`: one digit off, a carry lost, two digits swapped."""
    digits = str(value)
    while True:
        kind = rng.random()
        if kind < 0.4:
            wrong = value + rng.choice((-10, -2, -1, 1, 2, 10))
        elif kind < 0.8:
            at = rng.randrange(len(digits))
            wrong = int(digits[:at] + str(rng.randrange(10)) + digits[at + 1 :])
        elif kind < 0.9:
            wrong = int(digits[::-1])
        else:
            wrong = rng.randint(1, 2 * value + 5)
        if wrong > 0 and wrong != value:
            return wrong
