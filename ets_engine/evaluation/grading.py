"""Whether a solution is right: the exact checkers where a task has one, else comparison with the known answer."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from ets_engine.answers import normal_answer, same_answer
from ets_engine.errors import ConfigError
from ets_engine.evaluation.problems import EvalProblem
from ets_engine.reference.problems import is_right_answer, is_solved

Mode = Literal["math", "numeric", "choice", "exact"]


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
            "math": as mathematics (math-verify). "numeric": equal numbers. "choice": the same letter.
            "exact": the same text, letter case and outer spaces aside.

    Raises:
        ConfigError: An unknown mode.

    Example:
        >>> half = EvalProblem(id="1", problem="1/2 + 0?", answer=r"\frac{1}{2}")
        >>> grade(half, "0.5")
        Grade(strict=False, lenient=True, solved=True)
        >>> grade(half, r"\frac12").strict, grade(half, None).solved
        (True, False)
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode={mode!r} is unknown: choose one of {list(get_args(Mode))}")
    if answer is None:
        return Grade(strict=False, lenient=False, solved=False)
    if problem.family:
        lenient = is_right_answer(problem.problem, answer)
        strict = lenient and is_solved(problem.problem, text)
        return Grade(strict, lenient, solved=strict)
    strict, lenient = _compare(answer, problem.answer, mode)
    return Grade(strict, lenient, solved=lenient)


def _compare(answer: str, gold: str, mode: Mode) -> tuple[bool, bool]:
    """Whether an answer is written as the gold one, and whether it means the same."""
    if mode == "exact":
        return answer.strip() == gold.strip(), answer.strip().casefold() == gold.strip().casefold()
    if mode == "choice":
        same = _letter(answer) == _letter(gold) != ""
        return same, same
    written_alike = normal_answer(answer) == normal_answer(gold)
    if mode == "numeric":
        return written_alike, _same_number(answer, gold)
    return written_alike, written_alike or same_answer(answer, gold)


def _letter(answer: str) -> str:
    """The choice that an answer names: "(B)", "B.", "B) 12" and "b" are all B; empty where it names none."""
    bare = normal_answer(answer).lstrip("( ")
    return bare[0].upper() if bare[:1].isalpha() and not bare[1:2].isalnum() else ""


def _same_number(answer: str, gold: str) -> bool:
    numbers = [normal_answer(one).replace("%", "").lstrip("$") for one in (answer, gold)]
    return all(any(sign.isdigit() for sign in one) for one in numbers) and same_answer(*numbers)
