"""Answers in solution texts: how to find them, and when two of them are the same; it grades nothing."""

from __future__ import annotations

import logging
import re
from functools import lru_cache

_HOPED = re.compile(r"final answer is:?\s*\$(.+?)\$\.? I hope", re.DOTALL)
_STATED = re.compile(r"answer is:?\s*(.+?)\s*(?:\.\s|\.?$|\n)", re.IGNORECASE)
_HASHES = re.compile(r"####\s*(.+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_NOISE = re.compile(r"\\left|\\right|\\text(?:bf|rm)?|\\mathrm|\\!|\\,|\\;|\\%|\\\$|[$%°]|\^\\circ|\s")
_LONGEST = 300  # characters of an answer that symbolic comparison is worth


def extract_answer(text: str) -> str | None:
    r"""The answer that a solution states, None when it states none.

    In this order: "final answer is $...$. I hope", the last `\boxed{}`, "#### ...", the last "answer is ...", the last
    number.

    Example:
        >>> extract_answer(r"So $x=2$ and the total is $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
        >>> extract_answer("Then 3 + 4 = 7.\nThe answer is 7."), extract_answer("no idea")
        ('7', None)
    """
    if hoped := _HOPED.findall(text):
        return _clean(hoped[-1])
    if (boxed := _last_boxed(text)) is not None:
        return _clean(boxed)
    for pattern in (_HASHES, _STATED):
        if found := pattern.findall(text):
            return _clean(found[-1])
    numbers = _NUMBER.findall(text)
    return _clean(numbers[-1]) if numbers else None


def same_answer(left: str, right: str) -> bool:
    r"""Whether two answers mean the same: as text, as numbers, or as math-verify understands them.

    Example:
        >>> same_answer("1,000", "1000.0"), same_answer(r"\frac{1}{2}", "0.5"), same_answer("x+1", "1+x")
        (True, True, True)
        >>> same_answer("12", "21")
        False
    """
    first, second = _normal(left), _normal(right)
    if first == second:
        return True
    numbers = _number(first), _number(second)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if max(len(first), len(second)) > _LONGEST:
        return False
    return _same_mathematics(first, second)


class MathView:
    """`StepView` of mathematics and anything else that states its answer in one of the usual ways."""

    def answer(self, problem: str, text: str) -> str | None:
        """See `extract_answer`."""
        return extract_answer(text)

    def same(self, left: str, right: str) -> bool:
        """See `same_answer`."""
        return same_answer(left, right)


class ReferenceView:
    """`StepView` of the shipped problem families: composed expressions and numbers, compared to the letter."""

    def answer(self, problem: str, text: str) -> str | None:
        """The answer that a solution claims, unchecked."""
        from ets_engine.reference.problems import extract_answer

        return extract_answer(problem, text)

    def same(self, left: str, right: str) -> bool:
        """Whether they are equal."""
        return left == right


def _clean(answer: str) -> str | None:
    return answer.strip().strip("$").strip().removesuffix(".") or None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def _normal(answer: str) -> str:
    short = _NOISE.sub("", answer.replace("dfrac", "frac").replace("tfrac", "frac"))
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", short).removesuffix(".")


def _number(answer: str) -> float | None:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)(?:/(\d+))?", answer)
    if match is None or match[2] == "0":
        return None
    return float(match[1]) / float(match[2] or 1)


@lru_cache(maxsize=10_000)
def _same_mathematics(left: str, right: str) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # no timeouts: they need signals, which only the main thread gets
    first, second = (parse(f"${one}$", parsing_timeout=None) for one in (left, right))  # type: ignore[arg-type]
    return bool(first and second and verify(first, second, timeout_seconds=None))  # type: ignore[arg-type]
