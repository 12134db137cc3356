"""Values as people read them: numbers with units, model text that cannot harm a terminal, and the score bar."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rich.text import Text

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?", re.DOTALL)
_BAR_CELLS = 10


def count(number: float) -> str:
    """A count with thousands set apart, rounded to a whole.

    Example:
        >>> count(1234.6)
        '1,235'
    """
    return f"{number:,.0f}"


def plural(number: int, noun: str, nouns: str = "") -> str:
    """A count and its noun.

    Example:
        >>> plural(1, "vote"), plural(2, "vote"), plural(3, "trajectory", "trajectories")
        ('1 vote', '2 votes', '3 trajectories')
    """
    return f"{count(number)} {noun if number == 1 else nouns or noun + 's'}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units, as memory bandwidth is given.

    Example:
        >>> size(812), size(6_291_456), size(23.4e9)
        ('812 B', '6.29 MB', '23.4 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} B" if unit == "B" else f"{_three_digits(num_bytes)} {unit}"


def seconds(duration_s: float) -> str:
    """A duration.

    Example:
        >>> seconds(0.0004), seconds(0.31), seconds(2.345), seconds(42.34), seconds(125)
        ('<1 ms', '310 ms', '2.35 s', '42.3 s', '2 min 5 s')
    """
    if duration_s < 0.9995:
        return "<1 ms" if 0 < duration_s < 0.0005 else f"{duration_s * 1000:.0f} ms"
    if duration_s < 59.95:
        return f"{_three_digits(duration_s)} s"
    minutes, rest_s = divmod(round(duration_s), 60)
    return f"{minutes} min {rest_s} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def bandwidth(gb_s: float) -> str:
    """Bytes per second, given in GB/s.

    Example:
        >>> bandwidth(12.345), bandwidth(0.25)
        ('12.3 GB/s', '250 MB/s')
    """
    return f"{size(gb_s * 1e9)}/s"


def most(numbers: Sequence[float], digits: int, *, bound: str = "≤") -> str:
    """One number for several: their value when they look equal, else the largest, marked as a bound.

    Example:
        >>> most([0.25, 0.25], 2), most([0.25, 0.5], 2)
        ('0.25', '≤0.50')
    """
    shown = {f"{number:.{digits}f}" for number in numbers}
    return f"{bound if len(shown) > 1 else ''}{max(numbers):.{digits}f}"


def clean(text: str) -> str:
    r"""The text without terminal escapes, control and formatting characters; line breaks stay, tabs become spaces.

    Example:
        >>> clean("a\x1b[31mred\x1b[0m\tb\x07")
        'ared b'
    """
    text = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\t", " ")
    return "".join(sign for sign in text if sign == "\n" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs"))


def one_line(text: str) -> str:
    r"""The cleaned text with every run of white space made one space.

    Example:
        >>> one_line("so x is\n  5\n\n")
        'so x is 5'
    """
    return " ".join(clean(text).split())


def score_style(score: float) -> str:
    """Colour of a score in [0, 1]; the number always stands beside it."""
    return "green" if score >= 0.7 else "yellow" if score >= 0.3 else ""


def score_bar(score: float, *, ascii_only: bool = False) -> Text:
    """A score in [0, 1] as a bar of fixed length; legible without colour."""
    full = round(max(0.0, min(1.0, score)) * _BAR_CELLS)
    on, off = ("#", ".") if ascii_only else ("━", "╌")
    return Text.assemble((on * full, score_style(score)), (off * (_BAR_CELLS - full), "dim"))


def _three_digits(number: float) -> str:
    """A number in [1, 1000) with three digits."""
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{decimals}f}"
