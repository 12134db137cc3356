"""How many samples cost what a search costs: best-of-N rows to set beside it at equal KV or equal time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ets_engine.evaluation.methods import Method, split_name
from ets_engine.evaluation.rows import Row

COSTS = {"KV": "mean_kv_tokens", "time": "p50_s"}  # what a row's note calls it -> field of `Row`
_NOTE = "(same "  # begins the note of every method here


def same_cost_methods(rows: Sequence[Row]) -> list[Method]:
    """Best-of-N with the N that costs as much as each ETS row, by KV and by time.

    N is read off the line through what was measured at two widths or more, in logarithms. At equal width, whatever
    spends more per trajectory looks better.

    Args:
        rows: Measured, best-of-N at two widths or more among them; those with settings of their own are left aside.

    Returns:
        One method per ETS row and cost; none where a cost was not measured.
    """
    plain = {row.method: (*split_name(row.method), row) for row in rows}
    samples = [(width, row) for family, width, note, row in plain.values() if family == "best_of_n" and not note]
    found: list[Method] = []
    for family, _, note, row in plain.values():
        if family != "ets" or note:
            continue
        for name, field in COSTS.items():
            points = [(width or 1, getattr(one, field)) for width, one in samples]
            count = samples_for(points, getattr(row, field))
            if count is not None:
                found.append(Method("best_of_n", count, f"{_NOTE}{name} as {row.method})"))
    return found


def stale_methods(rows: Sequence[Row]) -> set[str]:
    """Names of the same-cost methods among some rows whose N does not follow from the others' figures, or no longer.

    Args:
        rows: Measured, as in `same_cost_methods`.
    """
    noted = {row.method for row in rows if split_name(row.method)[2].startswith(_NOTE)}
    return noted - {method.name for method in same_cost_methods(rows)}


def samples_for(points: Sequence[tuple[int, float | None]], cost: float | None) -> int | None:
    """The number of samples that costs `cost`.

    None where it cannot be told: fewer than two points, a cost that does not rise with samples (a model that is not
    busy yet), or one that lies further than a factor of two outside of what was measured.

    Args:
        points: (samples, what they cost).
        cost: Positive.

    Example:
        >>> samples_for([(16, 100.0), (64, 400.0)], 200.0)
        32
    """
    known = sorted((math.log(one), math.log(width)) for width, one in points if one and width > 0)
    if len(known) < 2 or not cost or known[0][0] == known[-1][0]:
        return None
    wanted = math.log(cost)
    place = next((i for i in range(1, len(known) - 1) if known[i][0] >= wanted), len(known) - 1)
    (low, low_width), (high, high_width) = known[place - 1], known[place]
    if high <= low or high_width <= low_width:
        return None
    width = math.exp(low_width + (wanted - low) * (high_width - low_width) / (high - low))
    widths = [one for _, one in known]
    outside = width < math.exp(min(widths)) / 2 or width > math.exp(max(widths)) * 2
    return None if outside else max(1, round(width))
