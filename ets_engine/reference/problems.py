"""The reference problem families behind one face: make, recognise, grade, label; nothing here knows a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from types import ModuleType
from typing import Any

from ets_engine.errors import ConfigError, ReferenceDomainError
from ets_engine.reference import countdown, story

FAMILIES: dict[str, ModuleType] = {"countdown": countdown, "story": story}
HELD_OUT_PARTS = 8  # one problem in so many is never trained on


@dataclass(frozen=True, slots=True)
class ReferenceProblem:
    """One problem as text, an answer that is right, and where it comes from.

    A countdown problem has many right answers: `answer` is one of them, `is_solved` accepts all.
    """

    problem: str
    answer: str
    family: str
    level: int

    def to_dict(self) -> dict[str, str | int]:
        """Plain JSON."""
        return asdict(self)


def is_held_out(problem: str) -> bool:
    """Whether training may never see this problem: a fixed eighth of all problems, by hash of the text's numbers.

    Example:
        >>> is_held_out("Use 1, 2, 3 and 4 to make 10.")
        False
    """
    key = " ".join(re.findall(r"\d+", problem))
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_PARTS == 0


def draw(rng: Random, family: str, level: int, *, held_out: bool) -> tuple[ReferenceProblem, list[str]]:
    """One problem of the training or of the held-out part, and the lines of one solution."""
    module = FAMILIES[family]
    while True:
        problem, lines = module.generate(rng, level)
        text = problem.render()
        if is_held_out(text) == held_out:
            answer = countdown.compose(lines) if family == "countdown" else str(problem.answer())
            return ReferenceProblem(text, answer or "", family, level), lines


def generate_problems(family: str, level: int | None, seed: int, count: int) -> Iterator[ReferenceProblem]:
    """Fresh held-out problems, the same ones for the same arguments.

    Args:
        family: "countdown" or "story".
        level: Numbers to use (4 to 6) or steps to take (3 to 10); None takes the levels in turn.
        seed: Any integer.
        count: How many, >= 0.

    Raises:
        ConfigError: unknown family or level, or a negative count.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family={family!r} is unknown: choose one of {sorted(FAMILIES)}")
    levels = FAMILIES[family].LEVELS
    if level is not None and level not in levels:
        raise ConfigError(f"level={level!r} is outside {family}'s levels: choose one of {list(levels)}")
    if count < 0:
        raise ConfigError(f"count={count} is negative: ask for 0 or more problems")
    rng = Random(f"fresh/{family}/{level}/{seed}")
    return (draw(rng, family, level or levels[i % len(levels)], held_out=True)[0] for i in range(count))


def _read(problem: str) -> tuple[str, Any]:
    """The family a text belongs to, and the problem as that family's module knows it.

    Raises:
        ReferenceDomainError: it belongs to none.
    """
    for family, module in FAMILIES.items():
        if (parsed := module.parse(problem)) is not None:
            return family, parsed
    raise ReferenceDomainError(
        f"the shipped reference models only know two kinds of problems and {problem[:80]!r} is neither: "
        "'Use 4, 6, 10 and 19 to make 16.' (4 to 6 numbers), or a story as printed by "
        "`python -m ets_engine.reference --family story`. For anything else pass a model: "
        "`ets solve --model NAME_OR_PATH --verifier NAME_OR_PATH`, or "
        "`ETSEngine.from_pretrained(NAME_OR_PATH, verifier=NAME_OR_PATH)`."
    )


def family_of(problem: str) -> str:
    """The family a text belongs to.

    Raises:
        ReferenceDomainError: it belongs to none.
    """
    return _read(problem)[0]


def canonical(problem: str) -> str:
    """The problem as the models were trained to read it: its spacing, and countdown's order and letter case, put right.

    Raises:
        ReferenceDomainError: it belongs to no family.

    Example:
        >>> canonical("use 19, 4, 10, and 6  to make 16")
        'Use 4, 6, 10 and 19 to make 16.'
    """
    return _read(problem)[1].render()


def split_lines(text: str) -> list[str]:
    """The steps of a solution text."""
    return [line for line in text.split("\n") if line.strip()]


def extract_answer(problem: str, text: str) -> str | None:
    """The answer that a solution text claims, unchecked: composed expression or number; None when illegible."""
    lines = split_lines(text)
    return countdown.compose(lines) if family_of(problem) == "countdown" else story.answer(lines)


def is_solved(problem: str, text: str) -> bool:
    """Whether a solution text solves the problem, every step checked exactly."""
    family, parsed = _read(problem)
    return FAMILIES[family].is_solved(parsed, split_lines(text))


def label_steps(problem: str, lines: Sequence[str]) -> list[bool]:
    """Per line: is everything so far right, and can the problem still be solved from here?"""
    family, parsed = _read(problem)
    return countdown.label_steps(parsed, lines) if family == "countdown" else story.check_steps(parsed, lines)


def is_right_answer(problem: str, answer: str) -> bool:
    """Whether an answer alone is right: an expression that uses each number once and makes the target, or the number.

    Example:
        >>> is_right_answer("Use 3, 4, 15 and 17 to make 32.", "(17*3)-(15+4)")
        True
    """
    family, parsed = _read(problem)
    if family == "countdown":
        return countdown.is_right_expression(parsed, answer)
    return answer.strip() == str(parsed.answer())
