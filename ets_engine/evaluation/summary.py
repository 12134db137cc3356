"""From single searches to one row per method and vote: accuracy, KV, bandwidth, latency, and paired comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from ets_engine.config import Vote
from ets_engine.evaluation.methods import Method
from ets_engine.evaluation.records import Line, Pass, Record, Settings, searches
from ets_engine.evaluation.statistics import bootstrap, rank_correlation
from ets_engine.types import Value

PROXIES = ("mean_kv_tokens", "generated_tokens", "verifier_tokens", "model_calls", "flops")  # that might tell latency


class Estimate(Value):
    """A mean over problems and its 95 % interval."""

    mean: float
    low: float
    high: float


class Comparison(Value):
    """One row against another on the problems that both have.

    Attributes:
        other: Name of the other row.
        problems: In common (count).
        points: Strict accuracy, this minus other (percentage points).
        kv: Mean resident KV tokens, other over this; None without KV.
        latency: Median seconds, other over this; None where they were not measured alone.
    """

    other: str
    problems: int
    points: Estimate
    kv: float | None
    latency: float | None


class Row(Value):
    """One method under one vote, over all problems and seeds.

    Attributes:
        name: As tables call it.
        method: `Method.name`.
        vote: Over the trajectories.
        problems, searches, failed: Counts; a failed search counts as wrong.
        strict, lenient: Accuracy (%), see `Grade`.
        any_right: Problems with a right trajectory (%).
        selection: Of those, the ones that the vote gets right (%, lenient).
        by_level: Strict accuracy (%) per level.
        mean_kv_tokens, peak_kv_tokens, published_kv_tokens, sharing_ratio: Means over searches.
        mean_kv_mb, peak_kv_mb: Of policy and verifier together (MB).
        generated_tokens, verifier_tokens, model_calls, flops: Means over searches.
        p50_s, p95_s: Latency of searches that ran alone (seconds).
        gb_s: Bytes that had to move over seconds in forward passes, of searches that ran alone.
        alone_per_s, together_per_s: Searches per second, one at a time and `concurrency` at a time.
        concurrency: Of `together_per_s`.
        versus: Against the rows that it is usually compared with.
    """

    name: str
    method: str
    vote: str
    problems: int
    searches: int
    failed: int
    strict: Estimate
    lenient: Estimate
    any_right: float
    selection: float | None
    by_level: dict[str, float]
    mean_kv_tokens: float | None
    peak_kv_tokens: float | None
    published_kv_tokens: float | None
    sharing_ratio: float | None
    mean_kv_mb: float | None
    peak_kv_mb: float | None
    generated_tokens: float
    verifier_tokens: float
    model_calls: float
    flops: float | None
    p50_s: float | None
    p95_s: float | None
    gb_s: float | None
    alone_per_s: float | None
    together_per_s: float | None
    concurrency: int | None
    versus: tuple[Comparison, ...] = ()


class Summary(Value):
    """What a report shows.

    Attributes:
        settings: Of the run.
        rows: One per method and vote, in the order in which they were measured.
        correlations: Spearman's, over methods, of each cost with the median latency; None where there is too little.
    """

    settings: Settings | None
    rows: tuple[Row, ...]
    correlations: dict[str, float | None]


def summarise(lines: Iterable[Line]) -> Summary:
    """Every row of a run.

    Example:
        >>> summarise([]).rows
        ()
    """
    lines = list(lines)
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in searches(lines):
        by_method[record.method].append(record)
    passes = [line for line in lines if isinstance(line, Pass)]
    rows: list[Row] = []
    solved: dict[str, dict[str, float]] = {}
    for method, records in by_method.items():
        for vote in _votes(records):
            row, per_problem = _row(method, vote, records, [one for one in passes if one.method == method])
            rows.append(row)
            solved[row.name] = per_problem
    named = {row.name: row for row in rows}
    rows = [row.model_copy(update={"versus": _compare(row, named, solved)}) for row in rows]
    settings = [line for line in lines if isinstance(line, Settings)]
    return Summary(settings=settings[-1] if settings else None, rows=tuple(rows), correlations=_correlate(rows))


def _votes(records: Sequence[Record]) -> list[Vote]:
    found: dict[Vote, None] = {}
    for record in records:
        found.update(dict.fromkeys(record.outcomes))  # type: ignore[arg-type]
    return list(found) or ["weighted"]


def _row(method: str, vote: Vote, records: Sequence[Record], passes: Sequence[Pass]) -> tuple[Row, dict[str, float]]:
    """A row without comparisons, and the strict accuracy per problem."""
    chosen = _one_per_search(records)
    alone = [record for record in records if record.concurrency == 1 and not record.error]
    done = [record for record in chosen if not record.error]
    strict, lenient = _per_problem(chosen, vote, "strict"), _per_problem(chosen, vote, "lenient")
    solvable = [record for record in done if record.any_right]
    levels: dict[str, list[float]] = defaultdict(list)
    for record in chosen:
        levels[record.level].append(_is_right(record, vote, "strict"))
    together_s = sum(one.wall_s for one in passes)
    latencies = [record.wall_s for record in alone]
    model_s = sum(record.model_s for record in alone)
    return Row(
        name=_label(method, vote),
        method=method,
        vote=vote,
        problems=len(strict),
        searches=len(chosen),
        failed=len(chosen) - len(done),
        strict=_percent(strict.values()),
        lenient=_percent(lenient.values()),
        any_right=100 * fmean(record.any_right for record in chosen),
        selection=100 * fmean(_is_right(record, vote, "lenient") for record in solvable) if solvable else None,
        by_level={level: 100 * fmean(right) for level, right in sorted(levels.items(), key=_by_number) if level},
        mean_kv_tokens=_mean(record.mean_kv_tokens for record in done),
        peak_kv_tokens=_mean(record.peak_kv_tokens for record in done),
        published_kv_tokens=_mean(record.published_kv_tokens for record in done),
        sharing_ratio=_mean(record.sharing_ratio for record in done),
        mean_kv_mb=_mean(_megabytes(record, "mean") for record in done),
        peak_kv_mb=_mean(_megabytes(record, "peak") for record in done),
        generated_tokens=_mean(record.generated_tokens for record in done) or 0.0,
        verifier_tokens=_mean(record.verifier_tokens for record in done) or 0.0,
        model_calls=_mean(record.model_calls for record in done) or 0.0,
        flops=_mean(record.flops for record in done),
        p50_s=float(np.quantile(latencies, 0.5)) if latencies else None,
        p95_s=float(np.quantile(latencies, 0.95)) if latencies else None,
        gb_s=sum(record.bytes_moved for record in alone) / model_s / 1e9 if model_s > 0 else None,
        alone_per_s=len(latencies) / sum(latencies) if latencies else None,
        together_per_s=sum(one.searches for one in passes) / together_s if together_s > 0 else None,
        concurrency=max(one.concurrency for one in passes) if passes else None,
    ), strict


def _one_per_search(records: Sequence[Record]) -> list[Record]:
    """A search that was measured both together and alone counts once: its tree is the same."""
    chosen: dict[tuple[str, int], Record] = {}
    for record in records:
        key = record.problem, record.seed
        if key not in chosen or (chosen[key].concurrency == 1 and record.concurrency > 1):
            chosen[key] = record
    return list(chosen.values())


def _is_right(record: Record, vote: str, grade: str) -> float:
    outcome = record.outcomes.get(vote)
    return float(outcome is not None and getattr(outcome, grade))


def _per_problem(records: Sequence[Record], vote: str, grade: str) -> dict[str, float]:
    """Share of right searches per problem, over seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        found[record.problem].append(_is_right(record, vote, grade))
    return {problem: fmean(right) for problem, right in found.items()}


def _percent(values: Iterable[float]) -> Estimate:
    found = bootstrap([100 * value for value in values])
    return Estimate(mean=found.mean, low=found.low, high=found.high)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _megabytes(record: Record, which: str) -> float | None:
    parts = [
        (getattr(record, f"{which}_kv_tokens"), record.kv_token_bytes),
        (getattr(record, f"{which}_prm_kv_tokens"), record.prm_kv_token_bytes),
    ]
    known = [tokens * size for tokens, size in parts if tokens is not None and size is not None]
    return sum(known) / 1e6 if known else None


def _label(method: str, vote: str) -> str:
    strategy, _, rest = method.partition("@")
    if strategy != "best_of_n":
        return method
    width, _, note = rest.partition(" ")
    return Method("best_of_n", int(width), note).label(vote)


def _by_number(item: tuple[str, object]) -> tuple[float, str]:
    level = item[0]
    return (float(level), level) if level.replace(".", "", 1).isdigit() else (float("inf"), level)


def _compare(row: Row, rows: dict[str, Row], solved: dict[str, dict[str, float]]) -> tuple[Comparison, ...]:
    """Against greedy, and against majority vote, weighted vote, REBASE and published ETS at the same width."""
    width = row.name.partition("@")[2]
    others = ["greedy", *(f"{name}@{width}" for name in ("majority", "weighted", "rebase", "ets_published") if width)]
    found: list[Comparison] = []
    for other in others:
        if other == row.name or other not in rows:
            continue
        common = [problem for problem in solved[row.name] if problem in solved[other]]
        if not common:
            continue
        theirs = rows[other]
        found.append(
            Comparison(
                other=other,
                problems=len(common),
                points=_percent(solved[row.name][problem] - solved[other][problem] for problem in common),
                kv=_ratio(theirs.mean_kv_tokens, row.mean_kv_tokens),
                latency=_ratio(theirs.p50_s, row.p50_s),
            )
        )
    return tuple(found)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _correlate(rows: Sequence[Row]) -> dict[str, float | None]:
    measured: dict[str, Row] = {row.method: row for row in rows if row.p50_s is not None}
    found: dict[str, float | None] = {}
    for proxy in PROXIES:
        pairs: list[tuple[Any, float | None]] = [(getattr(row, proxy), row.p50_s) for row in measured.values()]
        known = [(cost, latency) for cost, latency in pairs if cost is not None and latency is not None]
        found[proxy] = rank_correlation([cost for cost, _ in known], [latency for _, latency in known])
    return found
