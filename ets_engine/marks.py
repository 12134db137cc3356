"""The mark that a judge wrote down, wherever it stands in what it said."""

from __future__ import annotations

import re

_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
_MARKUP = re.compile(r"[*_`$]")
_SHARE = re.compile(r"(?<!\d)(\d+(?:\.\d+)?)\s{0,9}\(?(?:/|out of|of)\s{0,9}(\d+(?:\.\d+)?)")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
_SCALE = re.compile(r"\bscale (?:from|of) (?:\d{1,9}(?:\.\d{1,9})?\s?(?:to|-|\u2013)\s?)?\d{1,9}", re.IGNORECASE)

_MARK = r"(-?\d+(?:\.\d+)?(?:\s?%|\s?\(?(?:/|out of|of)\s?\d+(?:\.\d+)?)?)"
_LABEL = r"\b(?:score|rating|mark)"
_PLACES = [  # of a mark that needs no guess, the surest first
    re.compile(rf"{_LABEL}(?:\s?\([^()\n]{{0,30}}\))?\s?(?:is\b|[:=])\s?{_MARK}", re.IGNORECASE),
    re.compile(rf"{_LABEL} of {_MARK}", re.IGNORECASE),
    re.compile(rf"\n\s?{_MARK}[^\w\n]{{0,9}}\Z"),  # alone on the last line
    re.compile(rf"\A{_MARK}[^\w\n]{{0,9}}(?=\n)"),  # or on the first one
]
_FIRST_BOLD = re.compile(rf"\A\s{{0,9}}\*\*{_MARK}\*\*")


def read_mark(said: str, scale: float) -> float | None:
    """A judge's mark as a share of the best one, in [0, 1]; None where there is none.

    A number behind "score", "rating" or "mark" counts, else one alone on the last or the first line or in bold at the
    start, else the last fraction of `scale` or of 100, else the last number. Each may be a percentage. Other fractions
    are the solution's, and those of "on a scale from 0 to 10" nobody's. What was thought aloud does not count, and a
    thought without an end leaves no mark.

    Example:
        >>> [read_mark(said, 10) for said in ("7", "Score: 8/10.", "90 %", "Step 2 is fine, so **10**", "good", "11")]
        [0.7, 0.8, 0.9, 1.0, None, None]
        >>> [read_mark(said, 10) for said in ("1/2 is right. 9", "It improves by 50%. Score: 2", "<think>It is 7 and")]
        [0.9, 0.2, None]
        >>> read_mark("Score: 9. It is true that 3 + 4 = 7.", 10)
        0.9
    """
    said = _THOUGHT.sub("", said)
    if "<think>" in said:
        return None
    said = _where_it_stands(said)
    shares = [(float(mark), float(best)) for mark, best in _SHARE.findall(said)]
    marks = [share for share in shares if share[1] in (scale, 100.0)]
    rest = _SHARE.sub(" ", said)
    if not marks and (numbers := list(_NUMBER.finditer(rest))):
        is_percent = rest[numbers[-1].end() :].lstrip().startswith("%")
        marks = [(float(numbers[-1].group()), 100.0 if is_percent else scale)]
    if not marks:
        return None
    mark, best = marks[-1]
    return mark / best if 0 <= mark <= best else None


def _where_it_stands(said: str) -> str:
    """As much of what was said as the mark is looked for in."""
    plain = _SCALE.sub(" ", _MARKUP.sub("", said)).strip()
    for place in _PLACES:
        if marks := place.findall(plain):
            return marks[-1]
    bold = _FIRST_BOLD.match(said)
    return bold[1] if bold else plain
