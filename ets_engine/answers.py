"""When two answers are the same, and the views of solution texts that find and compare them; it grades nothing."""

from __future__ import annotations

import atexit
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from ets_engine.extraction import extract_answer
from ets_engine.symbolic import SymbolicProcess

_LONGEST = 300  # characters of an answer that more than a comparison of texts is worth

_POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_POWER = "|".join(_POWERS)
_ARITHMETIC = (  # words after a number that make it another one
    rf"\w*(?:{_POWER})\w*|plus|minus|mod|not|and|zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty"
)
_SHORT_WORDS = (
    "cm|mm|km|mi|in|ft|yd|sq|cu|kg|mg|lb|oz|ml|pt|qt|ms|hr|am|pm|kb|mb|gb|of|an|at|on|as"  # the others are variables
)
_NO_UNIT = rf"(?!(?:{_SHORT_WORDS})\b)[a-z]{{1,2}}|[abcxyz]+|pi|theta|sqrt|{_ARITHMETIC}"


def _improper(match: re.Match[str]) -> str:
    whole, over, under = map(int, match.groups())
    return rf"\frac{{{whole * under + over}}}{{{under}}}"


def _multiplied(match: re.Match[str]) -> str:
    power = sum(_POWERS[word.lower()] for word in re.findall(_POWER, match[3], re.IGNORECASE))
    return f"{Fraction(match[1].replace(',', '')) * 10**power}{match[2] or ' '}"


_WRITTEN_ALIKE = [  # (pattern, replacement), applied in order
    (r"\u2212", "-"),
    (r"\\[dtc]frac", r"\\frac"),
    (r",\s*\\!\s*|\{,\}\s*", ","),
    (r"(?<=,)(?:\\[,;: ]|~)", " "),
    (r"\\left(?![a-z])|\\right(?![a-z])|(?<!\\)\\[!,;: ()[\]]|\\displaystyle|~", ""),
    (r"(?<=\d)\s+(?:and|or)\s+(?=-?\d+(?![\d/]))", ", "),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\?[$%]", ""),
    (r"\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}", ", "),
    (r"\s*\.?$", ""),
    (r"(?<![\w.,/}^])(\d+)\s+(\d+)/(\d+)", _improper),
    (
        r"(?<![\w.,/}^])(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)\s*(\\(?:text|mbox|mathrm)\s*\{)?"
        rf"((?:\s*(?i:{_POWER})s?\b)+)",
        _multiplied,
    ),
    (  # a unit
        rf"(?<=[\w}})])\s*\\(?:text|mbox|mathrm)\s*\{{(?![^{{}}]*\b(?:{_ARITHMETIC})\b)[^{{}}]*\}}(?:\^\{{?\d\}}?)?$",
        "",
    ),
    (  # a unit in plain letters
        rf"^(-?(?:[\d.,/]*\d|\\frac\{{\d+\}}\{{\d+\}}))\s+(?!.*\b(?:{_NO_UNIT})\b)[a-z][a-z ]*(?:\^\d)?$",
        r"\1",
    ),
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (  # all blanks but one after a command, and one after a comma that would look like that of thousands
        r"((?<!\\)\\[a-zA-Z]+(?=\s+[a-zA-Z])|,(?=\s+\d{3}(?!\d)))\s+|\s+",
        lambda match: f"{match[1]} " if match[1] else "",
    ),
    (r"^\(([A-Za-z])\)$", r"\1"),  # a choice
    (r"\\(frac|sqrt)(\d)", r"\\\1{\2}"),
    (r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}"),
    (r"(?<![\w.,/}^])(\d+)\\frac\{(\d+)\}\{(\d+)\}", _improper),
    (r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3"),
    (r"^(-?\d{1,3}(?:,\d{3})+(?:\.\d+)?)$", lambda match: match[1].replace(",", "")),
    (r"\.$", ""),
]
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _WRITTEN_ALIKE]
_NAMED = re.compile(r"[a-zA-Z](?:=|\\in)([^=]+)")
_PLAIN_NUMBER = re.compile(r"([-+]?)(\d+|\d*\.(\d+)|\d+\.)(?:[eE]([-+]?\d{1,3}))?(?:/(\d+))?")
_BASE = re.compile(r"(?<=[\d)])_\{?(\d+)\}?")
_WORD = re.compile(r"[a-zA-Z]{3,}")
_RELATIVE = Fraction(1, 10_000)  # most that a decimal may be rounded by, however few digits it has
_UNORDERED = {"{}", "[]", ""}  # brackets of what math-verify compares as sets

_symbolic = SymbolicProcess()
atexit.register(_symbolic.close)


def same_answer(left: str, right: str) -> bool:
    r"""Whether two answers mean the same: as text, as numbers, part by part, or as math-verify understands them.

    Notation, units, thousands commas and `x =` in front do not count; of a numeral's base, only that two agree. A
    decimal is as good as its last digit, all other numbers are exact. Lists and sets have no order, a tuple has one.

    Example:
        >>> same_answer("1,000", "1000.0"), same_answer(r"\frac{1}{2}", "0.5"), same_answer("x+1", "1+x")
        (True, True, True)
        >>> same_answer("12", "21"), same_answer("(1,2)", "(2,1)")
        (False, False)
    """
    whole = normal_answer(left), normal_answer(right)
    first, second = map(_unnamed, whole)
    if first == second:
        return True
    if not first or not second or max(len(first), len(second)) > _LONGEST:
        return False
    numbers = _number(first), _number(second)
    if numbers[0] is not None and numbers[1] is not None:
        return _close(numbers[0], numbers[1])
    if _WORD.fullmatch(first) or _WORD.fullmatch(second):  # math-verify would multiply the letters
        return first.casefold() == second.casefold()
    bases = set(_BASE.findall(first)), set(_BASE.findall(second))
    if all(bases) and bases[0] != bases[1]:  # math-verify does not look at them
        return False
    one, other = _parts(first), _parts(second)
    if one is not None and other is not None:
        kinds = {one[0], other[0]}
        if kinds == {"[]"} or not kinds <= _UNORDERED:
            is_kind = len(kinds) == 1 or kinds == {"()", ""}
            return is_kind and len(one[1]) == len(other[1]) and all(map(same_answer, one[1], other[1]))
    return _symbolic.same(*whole)


def after_thought(text: str, in_thought: bool = False) -> str | None:
    r"""What a solution says after its <think> section, all of it without such a section, None while one is open.

    Args:
        text: Of the solution.
        in_thought: Whether the prompt has opened the section already.

    Example:
        >>> after_thought("<think>\nIs it 3? No, 4.\n</think>\n\nIt is 4.")
        '\n\nIt is 4.'
        >>> after_thought("Is it 3?", in_thought=True), after_thought("It is 4.")
        (None, 'It is 4.')
    """
    _, closing, said = text.rpartition("</think>")
    is_open = "<think>" in said or (in_thought and not closing)
    return None if is_open else said


@dataclass(frozen=True, slots=True)
class MathView:
    """`StepView` of mathematics and anything else that states its answer in one of the usual ways.

    A solution that thinks answers after its thoughts: without an end of them it abstains.

    Attributes:
        in_thought: Whether the prompt opens a <think> section.
        step_mark: What ends the solution's steps for a PRM's sake and is no part of an answer.
    """

    in_thought: bool = False
    step_mark: str | None = None

    def answer(self, problem: str, text: str) -> str | None:
        """See `extract_answer` and `after_thought`."""
        said = after_thought(text, self.in_thought)
        if said is None:
            return None
        return extract_answer(said.replace(self.step_mark, "") if self.step_mark else said)

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


@lru_cache(maxsize=10_000)
def normal_answer(answer: str) -> str:
    """The answer as everybody would write it."""
    answer = answer.strip()
    if len(answer) > 2 * _LONGEST:
        return answer
    for pattern, replacement in _RULES:
        answer = pattern.sub(replacement, answer)
    return answer


def _unnamed(answer: str) -> str:
    match = _NAMED.fullmatch(answer)
    return match[1] if match else answer


def _number(answer: str) -> tuple[Fraction, Fraction] | None:
    """What a number is, and by how much its last decimal may be rounded: 0 without a decimal point."""
    match = _PLAIN_NUMBER.fullmatch(answer)
    if match is None or (match[5] is not None and int(match[5]) == 0):
        return None
    unit = Fraction(10) ** int(match[4] or 0) / int(match[5] or 1)
    value = Fraction(match[2]) * unit
    return -value if match[1] == "-" else value, unit / 10 ** len(match[3]) / 2 if match[3] else Fraction(0)


def _close(left: tuple[Fraction, Fraction], right: tuple[Fraction, Fraction]) -> bool:
    rounded = min(max(left[1], right[1]), _RELATIVE * max(abs(left[0]), abs(right[0])))
    return abs(left[0] - right[0]) <= rounded


def _parts(answer: str) -> tuple[str, list[str]] | None:
    r"""Brackets and components of a tuple, an interval, a set, or a list without brackets; None without several."""
    bare = answer.replace("\\{", "{").replace("\\}", "}")
    kind = bare[0] + bare[-1]
    inside = _split(bare[1:-1]) if kind in ("()", "(]", "[)", "[]", "{}") else None
    if inside is not None:
        return (kind, inside) if len(inside) > 1 else None
    apart = _split(bare)
    return ("", apart) if apart is not None and len(apart) > 1 else None


def _split(answer: str) -> list[str] | None:
    """What stands between its commas, those in brackets aside; None where brackets close what is not open."""
    depth, parts = 0, [""]
    for sign in answer:
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return None  # (a)(b)
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts if depth == 0 else None
