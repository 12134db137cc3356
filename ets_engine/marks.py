"""The mark that a judge wrote down, wherever it stands in what it said."""

from __future__ import annotations

import re

_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
_MARKUP = re.compile(r"[*_`$]")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*\(?(?:/|out of|of)\s*(\d+(?:\.\d+)?)")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


def read_mark(said: str, scale: float) -> float | None:
    """A judge's mark as a share of the best one, in [0, 1]; None where there is none.

    The last fraction of `scale` or of 100 counts, else the last number, which may be a percentage. Other fractions are
    the solution's. What was thought aloud does not count, and a thought without an end leaves no mark.

    Example:
        >>> [read_mark(said, 10) for said in ("7", "Score: 8/10.", "90 %", "Step 2 is fine, so **10**", "good", "11")]
        [0.7, 0.8, 0.9, 1.0, None, None]
        >>> [read_mark(said, 10) for said in ("1/2 is right. 9", "It improves by 50%. Score: 2", "<think>It is 7 and")]
        [0.9, 0.2, None]
    """
    said = _MARKUP.sub("", _THOUGHT.sub("", said))
    if "<think>" in said:
        return None
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
