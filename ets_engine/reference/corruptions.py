"""Broken solutions of both families, the way policies break them: what the PRM learns from beside rollouts.

Some come out right by chance, so only `label_steps` says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from ets_engine.reference.countdown import MAX_GIVEN, CountdownProblem, Move, apply, merge, walk
from ets_engine.reference.story import SHARES, Quantity, StoryProblem, claimed, tell_step

_LAST = re.compile(r"[0-9]+")


def corrupt(rng: Random, problem: CountdownProblem | StoryProblem, lines: Sequence[str]) -> list[str]:
    """Break one random line of a right solution, the later lines following from the broken state."""
    if isinstance(problem, CountdownProblem):
        return corrupt_countdown(rng, problem, lines)
    return corrupt_story(rng, problem, lines)


def corrupt_countdown(rng: Random, problem: CountdownProblem, lines: Sequence[str]) -> list[str]:
    """Leave the solution at a random line, and go on from there, towards the target.

    Kinds: a legal move that may lead nowhere, a wrong result, a wrong remainder, a number used twice; and in the last
    line a near miss, or a false equation that claims the target.
    """
    at = rng.randrange(len(lines))
    out = list(lines[:at])
    state = walk(problem, out)[-1][1] if out else problem.numbers
    kind = rng.choice(("legal", "legal", "result", "result", "rest", "rest", "twice"))
    while len(state) > 1 and len(out) < len(problem.numbers) - 1:
        options = legal_moves(state)
        if not options:
            break
        if len(state) == 2:
            move = _close(rng, problem.target, options)
        else:
            move = rng.choice(options)
            if kind != "legal":
                move = _break(rng, kind, state, move)
                kind = "legal"
        out.append(move.render())
        state = move.rest
    return out


def legal_moves(state: Sequence[int]) -> list[Move]:
    """Every legal move of a state, the larger number first where order does not matter."""
    return [
        Move(a, op, b, result, merge(state, a, b, result))
        for i, a in enumerate(state)
        for j, b in enumerate(state)
        if i != j
        for op in "+-*/"
        if (result := apply(a, op, b)) is not None and not (op in "+*" and a < b)
    ]


def _close(rng: Random, target: int, options: Sequence[Move]) -> Move:
    """A last line: the target where it can be reached, a near miss, or an equation bent to claim the target."""
    kind = rng.random()
    hits = [move for move in options if move.result == target]
    if hits and kind < 0.5:
        return rng.choice(hits)
    near = sorted(options, key=lambda move: abs(move.result - target))[:2]
    move = rng.choice(near if rng.random() < 0.6 else options)
    if kind < 0.75:
        return move
    result = target if kind < 0.9 else slip(rng, move.result)
    return replace(move, result=result, rest=(result,))


def _break(rng: Random, kind: str, state: Sequence[int], move: Move) -> Move:
    """An illegal move like `move`."""
    rest = list(move.rest)
    if kind == "result":
        wrong = slip(rng, move.result)
        rest.remove(move.result)
        return replace(move, result=wrong, rest=tuple(sorted([*rest, wrong])))
    if kind == "rest":
        place = rng.randrange(len(rest))
        if rng.random() < 0.3 and len(rest) > 2:
            rest.pop(place)
        else:
            rest[place] = slip(rng, rest[place])
        return replace(move, rest=tuple(sorted(rest)))
    right = move.left if rng.random() < 0.5 else rng.randint(1, MAX_GIVEN)  # used twice, or not there at all
    result = apply(move.left, move.op, right)
    if result is None:
        return move
    rest.remove(move.result)
    return Move(move.left, move.op, right, result, tuple(sorted([*rest, result])))


def corrupt_story(rng: Random, problem: StoryProblem, lines: Sequence[str]) -> list[str]:
    """Break one random line, the later lines following from the broken number.

    Kinds: a wrong result, a number remembered wrongly, a misread fact, a person counted too early, another order of
    the total, an answer too early.
    """
    names = [claimed(line) for line in lines]
    at = rng.randrange(len(names))
    kind = rng.choice(("result", "result", "result", "memory", "memory", "fact", "fact", "order"))
    if kind == "order" and names[at] != "total":
        later = [name for name in names[at + 1 :] if name != "total"]
        if later:
            other = names.index(rng.choice(later))
            names[at], names[other] = names[other], names[at]
    asked = list(problem.asked)
    if kind == "order" and names[at] == "total":
        place = len(asked) - (len(names) - at)
        others = [name for name in problem.quantities if name != asked[place]]
        asked[place] = rng.choice(others)
    known = problem.values() if rng.random() < 0.5 else {}  # what a person counted too early has: right, or anything
    known = {name: known.get(name, rng.randint(2, 99)) for name in problem.quantities}
    known |= {name: q.left for name, q in problem.quantities.items() if not q.op and isinstance(q.left, int)}
    out: list[str] = []
    for place, name in enumerate(names):
        breaks = kind if place == at else ""
        quantity = _total(asked, len(names) - place, known) if name == "total" else problem.quantities[name]
        if breaks == "fact" and name != "total":
            quantity = _misread(rng, problem, name)
        seen = dict(known)
        sides = [side for side in (quantity.left, quantity.right) if isinstance(side, str)]
        if breaks == "memory" and sides:
            side = rng.choice(sides)
            seen[side] = rng.choice(list(known.values())) if rng.random() < 0.5 else slip(rng, seen[side])
        line = _tell(rng, name, quantity, seen, "result" if breaks in ("result", "memory") and not sides else breaks)
        if place == len(names) - 1 or (kind == "order" and place == at and rng.random() < 0.1):
            line += f". Answer: {_LAST.findall(line)[-1]}"
        known[name] = int(_LAST.findall(line)[-1])
        out.append(line)
    return out


def _total(asked: Sequence[str], lines_left: int, known: Mapping[str, int]) -> Quantity:
    return Quantity("", asked[0] if lines_left == len(asked) - 1 else "total", "+", asked[-lines_left])


def _tell(rng: Random, name: str, quantity: Quantity, known: Mapping[str, int], breaks: str) -> str:
    """A line, its result off when `breaks` is "result"."""
    if name == "total":
        first, person = quantity.left, quantity.right
        numbers = (known[str(first)], known[str(person)])
        names = [str(person)] if first == "total" else [str(first), str(person)]
        looked_up = ", ".join(f"{one} has {known[one]}" for one in names)
        claim = f"total plus {person}" if first == "total" else f"total of {first} and {person}"
        line = f"{claim}: {looked_up}, {numbers[0]}+{numbers[1]}={sum(numbers)}"
    else:
        line = tell_step(name, quantity, known)
    head, result = re.split(r"(?<==)(?=-?[0-9]+)", line, maxsplit=1)
    number = re.match(r"-?[0-9]+", result)
    assert number is not None
    right = int(number[0])
    if breaks != "result" and 0 < right <= 9999:
        return line
    wrong = slip(rng, right) if 0 < right <= 9999 else rng.randint(2, 99)
    if name != "total" and breaks == "result" and rng.random() < 0.1:  # right in the equation, then copied wrongly
        return f"{head}{right}, {name} has {wrong}"
    return head + str(wrong) + ("" if name == "total" else f", {name} has {wrong}")


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


def slip(rng: Random, value: int) -> int:
    """A wrong number that looks like `value`: one digit off, a carry lost, two digits swapped."""
    digits = str(value)
    while True:
        kind = rng.random()
        if kind < 0.5:
            wrong = value + rng.choice((-10, -2, -2, -1, -1, 1, 1, 2, 2, 10))
        elif kind < 0.8:
            at = rng.randrange(len(digits))
            wrong = int(digits[:at] + str(rng.randrange(10)) + digits[at + 1 :])
        elif kind < 0.9:
            wrong = int(digits[::-1])
        else:
            wrong = rng.randint(1, 2 * value + 5)
        if wrong > 0 and wrong != value:
            return wrong
