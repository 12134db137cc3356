"""One row against another on the problems that both have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ets_engine.evaluation.measured import Measured, mean_known, per_problem
from ets_engine.evaluation.methods import split_name
from ets_engine.evaluation.records import Record
from ets_engine.evaluation.rows import Comparison, Estimate, Row
from ets_engine.evaluation.statistics import interval

NEIGHBOURS = ("majority", "weighted", "rebase", "ets_published")  # of the same width


def compare_rows(row: Row, rows: Mapping[str, Row], measured: Mapping[str, Measured]) -> tuple[Comparison, ...]:
    """Against greedy, its neighbours of the same width, itself without changed settings, and samples of its cost.

    Args:
        row: The one.
        rows: All of them, by name.
        measured: What is known of each method, by name.
    """
    family, width, note = split_name(row.name)
    others = ["greedy", *(f"{name}@{width}" for name in NEIGHBOURS if width is not None)]
    if note:
        others.append(family if width is None else f"{family}@{width}")
    others += [name for name in rows if name.endswith(f" as {row.method})")]
    pairs = [(row, rows[other]) for other in dict.fromkeys(others) if other != row.name and other in rows]
    found = [_compare(one, other, measured[one.method], measured[other.method]) for one, other in pairs]
    return tuple(one for one in found if one is not None)


def percent(shares: Iterable[float], least: float = 0.0) -> Estimate:
    """Mean and interval of shares, or of their differences (`least` -1.0), as percentages."""
    mean, low, high = interval(list(shares), least)
    return Estimate(mean=100 * mean, low=100 * low, high=100 * high)


def _compare(one: Row, other: Row, ours: Measured, theirs: Measured) -> Comparison | None:
    """None where they have no problem in common."""
    records = ours.chosen(), theirs.chosen()
    solved = [per_problem(found, row.vote, "solved") for row, found in zip((one, other), records, strict=True)]
    common = [problem for problem in solved[0] if problem in solved[1]]
    if not common:
        return None
    sides = [[record for record in side if record.problem in set(common)] for side in records]
    timed = [key for key in ours.alone if key in theirs.alone]
    seconds = [_median([side.alone[key].wall_s for key in timed]) for side in (ours, theirs)]
    same_company = (one.concurrency, one.processes) == (other.concurrency, other.processes)
    return Comparison(
        other=other.name,
        problems=len(common),
        points=percent((solved[0][problem] - solved[1][problem] for problem in common), least=-1.0),
        kv=_saving(sides, "mean_kv_tokens"),
        published_kv=_saving(sides, "published_kv_tokens"),
        latency=_ratio(seconds[1], seconds[0]),
        throughput=_ratio(one.together_per_s, other.together_per_s) if same_company else None,
    )


def _saving(sides: list[list[Record]], cost: str) -> float | None:
    ours, theirs = (mean_known(getattr(record, cost) for record in side) for side in sides)
    return _ratio(theirs, ours)


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None
