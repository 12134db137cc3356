"""From single searches to one row per method and vote: accuracy, KV, bandwidth, latency, and paired comparisons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from ets_engine.config import Vote
from ets_engine.evaluation.methods import Method
from ets_engine.evaluation.problems import EvalProblem
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
        points: Solved, this minus other (percentage points).
        kv: Mean resident KV tokens on those problems, other over this; None without KV.
        latency: Median seconds on the problems that both solved alone, other over this; None without any.
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
        solved, strict, lenient: Accuracy (%), see `Grade`.
        first_error: Of a failed search, empty = none failed.
        any_right: Problems with a right trajectory (%).
        selection: Of those, the ones that the vote gets right (%, leniently).
        by_level: Solved (%) per level.
        mean_kv_tokens, peak_kv_tokens, published_kv_tokens, sharing_ratio: Means over searches.
        mean_kv_mb, peak_kv_mb: Of policy and verifier together (MB).
        generated_tokens, verifier_tokens, model_calls, flops: Means over searches.
        p50_s, p95_s: Latency of searches that ran alone (seconds).
        gb_s: Bytes that had to move over seconds in forward passes, of searches that ran alone.
        alone_per_s, together_per_s: Searches per second, one at a time and `concurrency` at a time. These and all
            other seconds are from the machine that measured last.
        concurrency: Of `together_per_s`, the largest one.
        versus: Against the rows that it is usually compared with.
    """

    name: str
    method: str
    vote: str
    problems: int
    searches: int
    failed: int
    first_error: str
    solved: Estimate
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
        settings: Of the run, once per machine or commit that took part.
        rows: One per method and vote, in the order in which they were measured.
        correlations: Spearman's, over methods, of each cost with the median latency; None where there is too little.
    """

    settings: tuple[Settings, ...]
    rows: tuple[Row, ...]
    correlations: dict[str, float | None]


def summarise(lines: Iterable[Line], problems: Collection[EvalProblem] | None = None) -> Summary:
    """Every row of a run.

    Args:
        lines: Of a `results.jsonl`.
        problems: Only searches of these count; None = of all.

    Example:
        >>> summarise([]).rows
        ()
    """
    lines = list(lines)
    wanted = None if problems is None else {(one.id, one.digest) for one in problems}
    by_method: dict[str, _Measured] = defaultdict(_Measured)
    for record in searches(lines):
        if wanted is None or record.key[0] in wanted:
            by_method[record.method].records.append(record)
    for line in _last_machine(lines):
        if isinstance(line, Settings) or line.method not in by_method:
            continue
        if isinstance(line, Pass):
            by_method[line.method].passes.append(line)
        elif line.concurrency == 1 and not line.error and (wanted is None or line.key[0] in wanted):
            by_method[line.method].alone[(line.problem, line.seed)] = line
    rows = [_row(method, vote, found) for method, found in by_method.items() for vote in _votes(found.records)]
    named = {row.name: row for row in rows}
    rows = [row.model_copy(update={"versus": _compare(row, named, by_method)}) for row in rows]
    settings = tuple(line for line in lines if isinstance(line, Settings))
    return Summary(settings=settings, rows=tuple(rows), correlations=_correlate(rows))


@dataclass(slots=True)
class _Measured:
    """What is known of one method."""

    records: list[Record] = field(default_factory=list)
    alone: dict[tuple[str, int], Record] = field(default_factory=dict)  # by problem and seed, on the last machine
    passes: list[Pass] = field(default_factory=list)  # on the last machine


def _last_machine(lines: Sequence[Line]) -> Sequence[Line]:
    """The lines since the machine last changed."""
    start, current = 0, None
    for place, line in enumerate(lines):
        if isinstance(line, Settings):
            if current is not None and not line.same_speed(current):
                start = place
            current = line
    return lines[start:]


def _votes(records: Sequence[Record]) -> list[Vote]:
    found: dict[Vote, None] = {}
    for record in records:
        found.update(dict.fromkeys(record.outcomes))  # type: ignore[arg-type]
    return list(found) or ["weighted"]


def _row(method: str, vote: Vote, measured: _Measured) -> Row:
    """A row without comparisons."""
    chosen, alone = _one_per_search(measured.records), list(measured.alone.values())
    done = [record for record in chosen if not record.error]
    solvable = [record for record in done if record.any_right]
    levels: dict[str, list[float]] = defaultdict(list)
    for record in chosen:
        levels[record.level].append(_is_right(record, vote, "solved"))
    most = max((one.concurrency for one in measured.passes), default=None)
    passes = [one for one in measured.passes if one.concurrency == most]
    together_s = sum(one.wall_s for one in passes)
    latencies = [record.wall_s for record in alone]
    model_s = sum(record.model_s for record in alone)
    return Row(
        name=_label(method, vote),
        method=method,
        vote=vote,
        problems=len({record.problem for record in chosen}),
        searches=len(chosen),
        failed=len(chosen) - len(done),
        first_error=next((record.error for record in chosen if record.error), ""),
        solved=_percent(_per_problem(chosen, vote, "solved").values()),
        strict=_percent(_per_problem(chosen, vote, "strict").values()),
        lenient=_percent(_per_problem(chosen, vote, "lenient").values()),
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
        alone_per_s=len(latencies) / sum(latencies) if sum(latencies) > 0 else None,
        together_per_s=sum(one.searches for one in passes) / together_s if together_s > 0 else None,
        concurrency=most,
    )


def _one_per_search(records: Sequence[Record]) -> list[Record]:
    """A search that was measured both together and alone counts once, by the one that worked: its tree is the same."""
    chosen: dict[tuple[str, int], Record] = {}
    for record in records:
        key = record.problem, record.seed
        if key not in chosen or (bool(chosen[key].error), chosen[key].concurrency == 1) > (
            bool(record.error),
            record.concurrency == 1,
        ):
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


def _compare(row: Row, rows: dict[str, Row], measured: dict[str, _Measured]) -> tuple[Comparison, ...]:
    """Against greedy, against its neighbours of the same width, and against samples of the same cost."""
    width = row.name.partition("@")[2]
    others = ["greedy", *(f"{name}@{width}" for name in ("majority", "weighted", "rebase", "ets_published") if width)]
    others += [name for name in rows if name.endswith(f" as {row.method})")]
    found: list[Comparison] = []
    for other in others:
        if other == row.name or other not in rows:
            continue
        sides = [(one, measured[one.method]) for one in (row, rows[other])]
        solved = [_per_problem(_one_per_search(known.records), one.vote, "solved") for one, known in sides]
        common = [problem for problem in solved[0] if problem in solved[1]]
        if not common:
            continue
        ours, theirs = ([one for one in known.records if one.problem in set(common)] for _, known in sides)
        alone = [known.alone for _, known in sides]
        timed = [key for key in alone[0] if key in alone[1]]
        seconds = [float(np.median([one[key].wall_s for key in timed])) if timed else None for one in alone]
        kv = [_mean(one.mean_kv_tokens for one in _one_per_search(side)) for side in (ours, theirs)]
        found.append(
            Comparison(
                other=other,
                problems=len(common),
                points=_percent(solved[0][problem] - solved[1][problem] for problem in common),
                kv=_ratio(kv[1], kv[0]),
                latency=_ratio(seconds[1], seconds[0]),
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
