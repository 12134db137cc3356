"""The `story` family: word problems about who has how many; generator, exact checker.

A solution works out one person's number per line: the fact it uses, the numbers it looks up, and what follows; in any
order that works, then the total when the question asks for several people. Its last line names the answer::

    as Ben owns 3 boxes of 14: 3*14=42, Ben has 42
    with Ben, Cara owns 9 more: Ben has 42, 42+9=51, Cara has 51
    total of Ben and Cara: Ben has 42, Cara has 51, 42+51=93. Answer: 93

Whatever is known reads "NAME has NUMBER", in the problem and in the lines, and a line repeats its fact word for word: a
small model can then find everything by what stood before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

LEVELS = tuple(range(3, 11))  # level = how many steps
MAX_VALUE = 999

NAMES = (
    "Ana Ben Cara Dan Eva Finn Gia Hugo Ida Jack Kim Leo Mia Nico Olga Paul Rosa Sam Tess Uma Vera Will Yara Zoe"
).split()
ITEMS = "apples books cards coins eggs flags keys lamps maps pens plums rings shells stamps toys trees".split()
SHARES = {"half": 2, "a third": 3, "a quarter": 4, "a fifth": 5}

_OPENING = "Some friends compare what they have."
_TEMPLATES = {  # relation -> wording; {b} has so much, compared with {a} and {c}
    "given": "{b} has {n} {item}.",
    "boxes": "{b} owns {n} boxes of {m} {item} each.",
    "more": "Compared with {a}, {b} owns {n} more {item}.",
    "fewer": "Compared with {a}, {b} owns {n} fewer {item}.",
    "times": "Compared with {a}, {b} owns {n} times as many {item}.",
    "share": "Compared with {a}, {b} owns {share} as many {item}.",
    "both": "Compared with {a} and {c}, {b} owns as many {item} as both.",
}
_QUESTION_ONE = "How many {item} does {b} have?"
_QUESTION_MANY = "How many {item} do {people} have together?"
_GROUPS = {
    "a": rf"(?P<a>{'|'.join(NAMES)})",
    "b": rf"(?P<b>{'|'.join(NAMES)})",
    "c": rf"(?P<c>{'|'.join(NAMES)})",
    "n": r"(?P<n>[0-9]{1,3})",
    "m": r"(?P<m>[0-9]{1,3})",
    "share": rf"(?P<share>{'|'.join(SHARES)})",
    "item": rf"(?P<item>{'|'.join(ITEMS)})",
}


def _pattern(template: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return _GROUPS[name]

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(template)))


_PATTERNS = [(relation, _pattern(template)) for relation, template in _TEMPLATES.items()]
_PATTERN_ONE = re.compile(rf"How many (?P<item>{'|'.join(ITEMS)}) does (?P<b>{'|'.join(NAMES)}) have\?")
_PATTERN_MANY = re.compile(rf"How many (?P<item>{'|'.join(ITEMS)}) do (?P<people>.+) have together\?")
_SUBJECT = re.compile(r"(?:with [^:,]+, |as )?(total|[A-Z][a-z]+) ")
_ANSWER = re.compile(r"Answer: ([0-9]{1,6})$")


@dataclass(frozen=True, slots=True)
class Quantity:
    """How many `item` one person has: a given number (op ""), or an operation on others' numbers.

    `left op right` is number * number, name op number, or name + name.
    """

    item: str
    left: int | str
    op: str = ""
    right: int | str = 0


@dataclass(frozen=True, slots=True)
class StoryProblem:
    """Who has how many, and whose numbers are asked for, added in the order named."""

    text: str
    item: str
    quantities: Mapping[str, Quantity]
    asked: tuple[str, ...]

    def render(self) -> str:
        """The problem in words."""
        return self.text

    def values(self) -> dict[str, int]:
        """Every person's number."""
        known: dict[str, int] = {}

        def value(side: int | str) -> int:
            if isinstance(side, int):
                return side
            if side not in known:
                quantity = self.quantities[side]
                left = value(quantity.left)
                known[side] = calculate(left, quantity.op, value(quantity.right)) if quantity.op else left
            return known[side]

        for person in self.quantities:
            value(person)
        return known

    def answer(self) -> int:
        """The number asked for."""
        values = self.values()
        return sum(values[person] for person in self.asked)


def calculate(left: int, op: str, right: int) -> int:
    """The result of one operation; -1 where a division leaves a remainder."""
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    return left // right if right and left % right == 0 else -1


def parse(text: str) -> StoryProblem | None:
    """The problem in `text`, or None when it is not a story of this family; spacing does not matter."""
    text = " ".join(text.split())
    opening, *sentences = re.split(r"(?<=\.) ", text)
    if opening != _OPENING or not sentences:
        return None
    *sentences, question = sentences
    many, one = _PATTERN_MANY.fullmatch(question), _PATTERN_ONE.fullmatch(question)
    if many:
        item, asked = many["item"], tuple(re.split(r", | and ", many["people"]))
    elif one:
        item, asked = one["item"], (one["b"],)
    else:
        return None
    facts: list[tuple[str, dict[str, str]]] = []
    for sentence in sentences:
        for relation, pattern in _PATTERNS:
            if match := pattern.fullmatch(sentence):
                facts.append((relation, match.groupdict()))
                break
        else:
            return None
    quantities = _resolve(facts)
    if quantities is None or not set(asked) <= set(quantities):
        return None
    problem = StoryProblem(text, item, quantities, asked)
    return problem if _is_sound(problem) else None


def _is_sound(problem: StoryProblem) -> bool:
    """Whether it takes steps to find, everybody has a positive whole number, and the item asked for is theirs."""
    steps = len(needed(problem)) + len(problem.asked) - 1
    return (
        1 <= steps <= LEVELS[-1]
        and len(set(problem.asked)) == len(problem.asked)
        and all(problem.quantities[person].item == problem.item for person in problem.asked)
        and all(0 < value <= MAX_VALUE for value in problem.values().values())
    )


def _resolve(facts: Sequence[tuple[str, dict[str, str]]]) -> dict[str, Quantity] | None:
    """Turn sentences into quantities, in any order in which everybody compared with is known."""
    quantities: dict[str, Quantity] = {}
    waiting = list(facts)
    while waiting:
        rest: list[tuple[str, dict[str, str]]] = []
        for relation, slots in waiting:
            name, quantity = _define(relation, slots, quantities)
            if name is None or quantity is None:
                rest.append((relation, slots))
            elif name in quantities:
                return None
            else:
                quantities[name] = quantity
        if len(rest) == len(waiting):
            return None  # somebody depends on a person the story never counts
        waiting = rest
    return quantities


def _define(
    relation: str, slots: dict[str, str], known: Mapping[str, Quantity]
) -> tuple[str, Quantity] | tuple[None, None]:
    b, item = slots["b"], slots["item"]
    if relation == "given":
        return b, Quantity(item, int(slots["n"]))
    if relation == "boxes":
        return b, Quantity(item, int(slots["n"]), "*", int(slots["m"]))
    a = slots["a"]
    if a not in known or ("c" in slots and slots["c"] not in known):
        return None, None
    if relation == "both":
        return b, Quantity(item, a, "+", slots["c"])
    if relation == "share":
        return b, Quantity(item, a, "/", SHARES[slots["share"]])
    return b, Quantity(item, a, {"more": "+", "fewer": "-", "times": "*"}[relation], int(slots["n"]))


def generate(rng: Random, level: int) -> tuple[StoryProblem, list[str]]:
    """A problem that takes `level` steps and one of its solutions, line by line."""
    while True:
        built = _build(rng, level)
        if built is not None:
            return built


def _build(rng: Random, level: int) -> tuple[StoryProblem, list[str]] | None:
    num_asked = rng.choice((1, 2, 3)) if level >= 3 else 1
    num_derived = level - (num_asked - 1)
    names = rng.sample(NAMES, len(NAMES))
    item = rng.choice(ITEMS)
    quantities: dict[str, Quantity] = {}
    values: dict[str, int] = {}
    sentences: list[str] = []
    unused: list[str] = []  # people nobody's number was computed from yet

    def tell(relation: str, **slots: int | str) -> None:
        sentences.append(_TEMPLATES[relation].format(item=slots.pop("item", item), **slots))

    def give(kind: str = item) -> str:
        name, number = names.pop(), rng.randint(3, 60)
        quantities[name], values[name] = Quantity(kind, number), number
        tell("given", b=name, n=number, item=kind)
        return name

    def pick() -> str:
        if not unused or rng.random() < 0.15:
            return give()
        name = unused.pop() if rng.random() < 0.6 else unused.pop(rng.randrange(len(unused)))
        return name

    def derive(source: str | None) -> str | None:
        name = names.pop()
        kind = rng.choices(("boxes", "more", "fewer", "times", "share", "both"), (2, 4, 4, 4, 3, 3))[0]
        if kind == "boxes" and source is None:
            n, m = rng.randint(2, 12), rng.randint(3, 30)
            quantity = Quantity(item, n, "*", m)
            slots: dict[str, int | str] = {"n": n, "m": m}
        else:
            a = source or pick()
            if kind == "both":
                c = pick() if source is None else rng.choice(list(quantities))
                if c == a:
                    return None
                quantity, slots = Quantity(item, a, "+", c), {"a": a, "c": c}
            elif kind == "share":
                word, n = rng.choice([pair for pair in SHARES.items() if values[a] % pair[1] == 0] or [("", 0)])
                if not n:
                    return None
                quantity, slots = Quantity(item, a, "/", n), {"a": a, "share": word}
            elif kind == "times" or kind == "boxes":
                kind, n = "times", rng.randint(2, 9)
                quantity, slots = Quantity(item, a, "*", n), {"a": a, "n": n}
            else:
                n = rng.randint(2, 99)
                quantity, slots = Quantity(item, a, "+" if kind == "more" else "-", n), {"a": a, "n": n}
        sides = [values[side] if isinstance(side, str) else side for side in (quantity.left, quantity.right)]
        value = calculate(sides[0], quantity.op, sides[1])
        if not 2 <= value <= MAX_VALUE:
            return None
        quantities[name], values[name] = quantity, value
        tell(kind, b=name, **slots)
        return name

    for _ in range(num_derived):
        name = derive(None)
        if name is None or len(names) < 5:
            return None
        unused.append(name)
    while len(unused) < num_asked and rng.random() < 0.5:
        unused.append(give())
    if len(unused) != num_asked:
        return None
    asked = tuple(rng.sample(unused, len(unused)))
    if sum(values[person] for person in asked) > MAX_VALUE:
        return None
    for _ in range(rng.choice((0, 1, 1, 2))):  # distractors: another item, or a person nobody asks about
        if rng.random() < 0.5:
            give(rng.choice([other for other in ITEMS if other != item]))
        else:
            derive(rng.choice([name for name in quantities if quantities[name].item == item]))
    order = rng.sample(range(len(sentences)), len(sentences))
    if num_asked == 1:
        question = _QUESTION_ONE.format(item=item, b=asked[0])
    else:
        people = f"{', '.join(asked[:-1])} and {asked[-1]}"
        question = _QUESTION_MANY.format(item=item, people=people)
    text = " ".join([_OPENING, *(sentences[i] for i in order), question])
    problem = StoryProblem(text, item, quantities, asked)
    return problem, solve(rng, problem)


def needed(problem: StoryProblem) -> list[str]:
    """The people whose numbers must be computed to answer, in no particular order."""
    out: list[str] = []
    stack = list(problem.asked)
    while stack:
        name = stack.pop()
        quantity = problem.quantities[name]
        if quantity.op and name not in out:
            out.append(name)
            stack += [side for side in (quantity.left, quantity.right) if isinstance(side, str)]
    return out


def tell_step(name: str, quantity: Quantity, values: Mapping[str, int]) -> str:
    """The line that computes a person's number.

    Example:
        >>> tell_step("Cara", Quantity("pens", "Ben", "+", 9), {"Ben": 42})
        'with Ben, Cara owns 9 more: Ben has 42, 42+9=51, Cara has 51'
    """
    left, op, right = quantity.left, quantity.op, quantity.right
    match (left, op, right):
        case (int(), _, _):
            fact = f"as {name} owns {left} boxes of {right}"
        case (_, "+", str()):
            fact = f"with {left} and {right}, {name} owns as many as both"
        case (_, "+", _):
            fact = f"with {left}, {name} owns {right} more"
        case (_, "-", _):
            fact = f"with {left}, {name} owns {right} fewer"
        case (_, "*", _):
            fact = f"with {left}, {name} owns {right} times as many"
        case _:
            share = next(word for word, parts in SHARES.items() if parts == right)
            fact = f"with {left}, {name} owns {share} as many"
    looked_up = "".join(f"{side} has {values[side]}, " for side in (left, right) if isinstance(side, str))
    first, second = (values[side] if isinstance(side, str) else side for side in (left, right))
    result = calculate(first, op, second)
    return f"{fact}: {looked_up}{first}{op}{second}={result}, {name} has {result}"


def tell_totals(asked: Sequence[str], values: Mapping[str, int]) -> list[str]:
    """The lines that add up the people asked for, in the order of the question; none for one person."""
    lines: list[str] = []
    total = values[asked[0]]
    for place, person in enumerate(asked[1:]):
        number = values[person]
        start = f"of {asked[0]} and {person}: {asked[0]} has {total}, " if place == 0 else f"plus {person}: "
        lines.append(f"total {start}{person} has {number}, {total}+{number}={total + number}")
        total += number
    return lines


def solve(rng: Random, problem: StoryProblem) -> list[str]:
    """One solution of the problem, in a random order that works."""
    values = problem.values()
    todo, done, lines = needed(problem), {n for n, q in problem.quantities.items() if not q.op}, []
    while todo:
        ready = [
            name
            for name in todo
            if all(
                side in done
                for side in (problem.quantities[name].left, problem.quantities[name].right)
                if isinstance(side, str)
            )
        ]
        name = rng.choice(ready)
        lines.append(tell_step(name, problem.quantities[name], values))
        done.add(name)
        todo.remove(name)
    lines += tell_totals(problem.asked, values)
    lines[-1] += f". Answer: {problem.answer()}"
    return lines


def check_steps(problem: StoryProblem, lines: Sequence[str]) -> list[bool]:
    """Per line: is everything up to and including it right? Right but needless lines before the answer are right."""
    values = problem.values()
    known = {name for name, quantity in problem.quantities.items() if not quantity.op}
    totals, totalled = tell_totals(problem.asked, values), 0
    valid, answered, out = True, False, []
    for line in lines:
        body, _, told = line.strip().partition(". Answer: ")
        name = claimed(body)
        valid = valid and not answered
        if name == "total":
            valid = valid and body in totals[totalled : totalled + 1] and set(problem.asked[: totalled + 2]) <= known
            totalled += 1
        else:
            valid = valid and _defines(problem, known, values, name, body)
            known.add(name)
        if valid and ". Answer" in line:
            valid = totalled == len(totals) and set(problem.asked) <= known and told == str(problem.answer())
            valid = answered = valid and name in ("total", *(problem.asked if not totals else ()))
        out.append(valid)
    return out


def all_lines(problem: StoryProblem) -> list[str]:
    """Every line that is right somewhere in some solution, and each of them with the answer after it."""
    values = problem.values()
    lines = [
        tell_step(name, way, values)
        for name, quantity in problem.quantities.items()
        if quantity.op
        for way in _ways(quantity)
    ] + tell_totals(problem.asked, values)
    return [line + end for line in lines for end in ("", f". Answer: {problem.answer()}")]


def claimed(line: str) -> str:
    """Whose number a line works out ("total" for a sum); empty when it says nobody's."""
    match = _SUBJECT.match(line)
    return match[1] if match else ""


def _defines(problem: StoryProblem, known: set[str], values: Mapping[str, int], name: str, body: str) -> bool:
    quantity = problem.quantities.get(name)
    if quantity is None or not quantity.op or name in known:
        return False
    if any(isinstance(side, str) and side not in known for side in (quantity.left, quantity.right)):
        return False
    return body in [tell_step(name, way, values) for way in _ways(quantity)]


def _ways(quantity: Quantity) -> list[Quantity]:
    """The quantity, and with its two people swapped where that changes nothing."""
    if quantity.op == "+" and isinstance(quantity.right, str):
        return [quantity, replace(quantity, left=quantity.right, right=quantity.left)]
    return [quantity]


def answer(lines: Sequence[str]) -> str | None:
    """The number after "Answer:" in the last line, or None."""
    match = _ANSWER.search(lines[-1].strip()) if lines else None
    return match[1] if match else None


def is_solved(problem: StoryProblem, lines: Sequence[str]) -> bool:
    """Whether every line is right and the last one answers."""
    return bool(lines) and all(check_steps(problem, lines)) and answer(lines) == str(problem.answer())
