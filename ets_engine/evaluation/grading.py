"""Whether a solution is right: the exact checkers where a task has one, else comparison with the known answer."""

from __future__ import annotations

import re
from collections.abc import Hashable
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

from ets_engine.answers import normal_answer, same_answer
from ets_engine.errors import ConfigError
from ets_engine.evaluation.problems import EvalProblem
from ets_engine.reference.problems import is_right_answer, is_solved

Mode = Literal["math", "numeric", "choice", "exact"]

_MARKUP = re.compile(
    r"\\(?:text(?:bf|it|rm)?|mbox|math(?:rm|bf)|left|right|boxed|quad)(?![a-z])|\\[ ,;!]|[{}$~`]"
)  # around a choice
_PROSE = re.compile(r"[Aa] +(?!(?:is|and|or|because|since)\b)[a-z]")  # "A cat"
_NAMED = r"(?:(?i:option|choice)\b)?[\s:(\[*]*(?![Ii] +[a-z])([A-Za-z])(?![\w'\u2019])"  # no "I think"
_AND = r"(?:\s*(?:[,;/&|+\u2013-]|\b(?:or|and)\b))+\s*"
_CHOICE = re.compile(_NAMED)
_MORE = re.compile(rf"[\s.):\]*]*{_AND}{_NAMED}|\s+([A-Z])(?=\s*$)")  # "A, B", "(A) or (B)", "A B"
_INSTEAD = re.compile(r"\bor\s+(?:option |choice )?[(*]*([A-Z])(?:[):]|\.\s)")  # "A. Paris or B. Rome"


class Grade(NamedTuple):
    """What a solution is worth.

    Attributes:
        strict: Reference families: every step is right. Else: the answer is written as the problem's own, apart from
            spacing and notation.
        lenient: The answer is right, however it was found or written.
        solved: What counts: strict where every step can be checked, else lenient.
    """

    strict: bool
    lenient: bool
    solved: bool


def grade(problem: EvalProblem, answer: str | None, text: str = "", mode: Mode = "math") -> Grade:
    r"""Grade one solution.

    Args:
        problem: What was asked.
        answer: What the solution answers, None = nothing.
        text: The whole solution; only the reference families' strict grade looks at it.
        mode: How answers are compared; the reference families use their exact checkers instead.
            "math": as mathematics (math-verify). "numeric": equal numbers. "choice": the same letter, or
            letters; one of two is not right. "exact": the same text, letter case and outer spaces aside.

    Raises:
        ConfigError: An unknown mode.

    Example:
        >>> half = EvalProblem(id="1", problem="1/2 + 0?", answer=r"\frac{1}{2}")
        >>> grade(half, "0.5")
        Grade(strict=False, lenient=True, solved=True)
        >>> grade(half, r"\frac12").strict, grade(half, None).solved
        (True, False)
    """
    check_mode(mode)
    if answer is None:
        return Grade(strict=False, lenient=False, solved=False)
    if problem.family:
        lenient = is_right_answer(problem.problem, answer)
        strict = lenient and is_solved(problem.problem, text)
        return Grade(strict, lenient, solved=strict)
    strict, lenient = _compare(answer, problem.answer, mode)
    return Grade(strict, lenient, solved=lenient)


def check_mode(mode: str) -> None:
    """Refuse a way of comparison that there is not.

    Raises:
        ConfigError: An unknown mode.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode={mode!r} is unknown: choose one of {list(get_args(Mode))}")


def key(answer: str, mode: Mode) -> Hashable:
    """What two known answers have in common where they are the same one, as far as that shows without mathematics.

    Example:
        >>> key("1/2", "numeric") == key("0.5", "numeric"), key("1/2", "math") == key("0.5", "math")
        (True, False)
    """
    match mode:
        case "choice":
            return _letters(answer)
        case "exact":
            return answer.strip().casefold()
        case "numeric":
            try:
                return Fraction(_bare_number(answer))
            except (ValueError, ZeroDivisionError):
                pass
    return normal_answer(answer)


def _compare(answer: str, gold: str, mode: Mode) -> tuple[bool, bool]:
    """Whether an answer is written as the gold one, and whether it means the same."""
    if mode == "exact":
        return answer.strip() == gold.strip(), answer.strip().casefold() == gold.strip().casefold()
    if mode == "choice":
        same = _letters(answer) == _letters(gold) != frozenset()
        return same, same
    written_alike = normal_answer(answer) == normal_answer(gold)
    if mode == "numeric":
        return written_alike, _same_number(answer, gold)
    return written_alike, written_alike or same_answer(answer, gold)


def _letters(answer: str) -> frozenset[str]:
    """The choices that an answer names; none where it names none.

    "(B)", "B.", "B) 12", "B 12", "option B", "**B**" and "b" are all B; "A, B", "A/B", "A-D" and "A or B" are two.
    """
    bare = " ".join(_MARKUP.sub(" ", answer).split())
    first = _CHOICE.match(bare)
    if first is None or _PROSE.match(bare):
        return frozenset()
    letters, end = [first[1]], first.end()
    while more := _MORE.match(bare, end):
        letter = more[1] or more[2]
        if letter.islower() and letters[0].isupper():  # "B, a city"
            break
        letters.append(letter)
        end = more.end()
    return frozenset(letter.upper() for letter in (*letters, *_INSTEAD.findall(bare, end)))


def _same_number(answer: str, gold: str) -> bool:
    numbers = [_bare_number(one) for one in (answer, gold)]
    return all(any(sign.isdigit() for sign in one) for one in numbers) and same_answer(*numbers)


def _bare_number(answer: str) -> str:
    return normal_answer(answer).replace("%", "").lstrip("$")
