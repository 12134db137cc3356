"""From single searches to one row per method and vote: accuracy, KV, bandwidth, latency."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from statistics import fmean

import numpy as np

from ets_engine.evaluation.measured import Measured, group_by_method, is_right, mean_known, per_problem
from ets_engine.evaluation.methods import label
from ets_engine.evaluation.paired import compare_rows, percent
from ets_engine.evaluation.problems import EvalProblem
from ets_engine.evaluation.proxies import correlate_methods, correlate_searches
from ets_engine.evaluation.records import Line, Record, Settings
from ets_engine.evaluation.rows import VERSION, Row, Summary


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
    by_method = group_by_method(lines, problems)
    rows = [_row(method, vote, found) for method, found in by_method.items() for vote in found.votes]
    named = {row.name: row for row in rows}
    alone = [list(found.alone.values()) for found in by_method.values()]
    return Summary(
        version=VERSION,
        settings=tuple(line for line in lines if isinstance(line, Settings)),
        rows=tuple(row.model_copy(update={"versus": compare_rows(row, named, by_method)}) for row in rows),
        correlations=correlate_methods(alone),
        search_correlations=correlate_searches(record for records in alone for record in records),
        timed_methods=sum(bool(records) for records in alone),
        timed_searches=sum(map(len, alone)),
    )


def _row(method: str, vote: str, measured: Measured) -> Row:
    """A row without comparisons."""
    chosen, alone = measured.chosen(), list(measured.alone.values())
    done = [record for record in chosen if not record.error]
    solvable = [record for record in done if record.any_right]
    latencies = [record.wall_s for record in alone]
    model_s, model_calls = sum(record.model_s for record in alone), sum(record.model_calls for record in alone)
    bytes_moved = sum(record.bytes_moved for record in alone)
    together_per_s, concurrency, processes = measured.throughput()

    def mean(cost: str) -> float | None:
        return mean_known(getattr(record, cost) for record in done)

    return Row(
        name=label(method, vote),
        method=method,
        vote=vote,
        problems=len({record.problem for record in chosen}),
        searches=len(chosen),
        failed=len(chosen) - len(done),
        first_error=next((record.error for record in chosen if record.error), ""),
        solved=percent(per_problem(chosen, vote, "solved").values()),
        strict=percent(per_problem(chosen, vote, "strict").values()),
        lenient=percent(per_problem(chosen, vote, "lenient").values()),
        any_right=100 * fmean(record.any_right for record in chosen),
        selection=100 * fmean(is_right(record, vote, "lenient") for record in solvable) if solvable else None,
        by_level=_by_level(chosen, vote),
        mean_kv_tokens=mean("mean_kv_tokens"),
        peak_kv_tokens=mean("peak_kv_tokens"),
        max_kv_tokens=max(
            (one.peak_kv_tokens for one in measured.records if one.peak_kv_tokens is not None), default=None
        ),
        published_kv_tokens=mean("published_kv_tokens"),
        sharing_ratio=mean("sharing_ratio"),
        mean_prm_kv_tokens=mean("mean_prm_kv_tokens"),
        peak_prm_kv_tokens=mean("peak_prm_kv_tokens"),
        mean_policy_kv_mb=mean_known(_megabytes(record, "mean", ("",)) for record in done),
        peak_policy_kv_mb=mean_known(_megabytes(record, "peak", ("",)) for record in done),
        mean_prm_kv_mb=mean_known(_megabytes(record, "mean", ("prm_",)) for record in done),
        peak_prm_kv_mb=mean_known(_megabytes(record, "peak", ("prm_",)) for record in done),
        mean_kv_mb=mean_known(_megabytes(record, "mean", ("", "prm_")) for record in done),
        peak_kv_mb=mean_known(_megabytes(record, "peak", ("", "prm_")) for record in done),
        generated_tokens=mean("generated_tokens") or 0.0,
        verifier_tokens=mean("verifier_tokens") or 0.0,
        prompt_tokens=mean("prompt_tokens"),
        model_calls=mean("model_calls") or 0.0,
        flops=mean("flops"),
        p50_s=float(np.quantile(latencies, 0.5)) if latencies else None,
        p95_s=float(np.quantile(latencies, 0.95)) if latencies else None,
        gb_s=bytes_moved / model_s / 1e9 if model_s > 0 else None,
        mb_per_call=bytes_moved / model_calls / 1e6 if model_calls else None,
        alone_per_s=len(latencies) / sum(latencies) if sum(latencies) > 0 else None,
        together_per_s=together_per_s,
        concurrency=concurrency,
        processes=processes,
    )


def _by_level(records: Sequence[Record], vote: str) -> dict[str, float]:
    """Solved (%) per level, levels that are numbers first."""
    levels: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.level:
            levels[record.level].append(is_right(record, vote, "solved"))
    return {level: 100 * fmean(levels[level]) for level in sorted(levels, key=_by_number)}


def _by_number(level: str) -> tuple[float, str]:
    return (float(level), level) if level.replace(".", "", 1).isdigit() else (float("inf"), level)


def _megabytes(record: Record, which: str, models: Sequence[str]) -> float | None:
    """KV of some models together, those without any left out; None without any at all."""
    parts = [(getattr(record, f"{which}_{one}kv_tokens"), getattr(record, f"{one}kv_token_bytes")) for one in models]
    known = [tokens * size for tokens, size in parts if tokens is not None and size is not None]
    return sum(known) / 1e6 if known else None
