"""What a comparison shows, in cells and sentences; it knows neither terminal nor page, and computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ets_engine.evaluation.proxies import PROXIES
from ets_engine.evaluation.rows import Comparison, Row, Summary

FLOPS = (
    "FLOPs are 2 x parameters x tokens read, of both models; what attention spends on the context is left out. A call "
    "is a decode step: one forward pass of the policy over all live branches."
)


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a row.

    Attributes:
        head: As tables call it.
        show: What stands in the cell, empty = unknown.
    """

    head: str
    show: Callable[[Row], str]


def _number(head: str, read: Callable[[Row], float | None], digits: int = 0) -> Column:
    def show(row: Row) -> str:
        value = read(row)
        return "" if value is None else f"{value:.{digits if value < 1000 else 0}f}"

    return Column(head, show)


ACCURACY = (
    _number("solved", lambda row: row.solved.mean, 1),
    Column("95 %", lambda row: f"{row.solved.low:.0f}-{row.solved.high:.0f}"),
    _number("strict", lambda row: row.strict.mean, 1),
    _number("lenient", lambda row: row.lenient.mean, 1),
    _number("any", lambda row: row.any_right),
    _number("of those", lambda row: row.selection),
    Column("by level", lambda row: " ".join(f"{level}:{share:.0f}" for level, share in row.by_level.items())),
)
KV = (
    _number("mean", lambda row: row.mean_kv_tokens),
    _number("peak", lambda row: row.peak_kv_tokens),
    _number("largest", lambda row: row.max_kv_tokens),
    _number("MB", lambda row: row.mean_policy_kv_mb, 2),
    _number("peak MB", lambda row: row.peak_policy_kv_mb, 2),
    _number("sharing", lambda row: row.sharing_ratio, 2),
    _number("summed", lambda row: row.published_kv_tokens),
)
WORK = (
    _number("mean", lambda row: row.mean_prm_kv_tokens),
    _number("peak", lambda row: row.peak_prm_kv_tokens),
    _number("MB", lambda row: row.mean_prm_kv_mb, 2),
    _number("peak MB", lambda row: row.peak_prm_kv_mb, 2),
    _number("tokens", lambda row: row.generated_tokens),
    _number("judged", lambda row: row.verifier_tokens),
    _number("calls", lambda row: row.model_calls),
    _number("GFLOP", lambda row: None if row.flops is None else row.flops / 1e9, 1),
)
TIME = (
    _number("MB/call", lambda row: row.mb_per_call, 1),
    _number("GB/s", lambda row: row.gb_s, 1),
    _number("p50 s", lambda row: row.p50_s, 2),
    _number("p95 s", lambda row: row.p95_s, 2),
    _number("1/s", lambda row: row.alone_per_s, 2),
    _number("1/s N", lambda row: row.together_per_s, 2),
)


@dataclass(frozen=True, slots=True)
class Block:
    """One table of the comparison.

    Attributes:
        head: What it shows, and in what.
        columns: Its figures.
        rows: Its rows, by name.
    """

    head: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, Row], ...]


def blocks(summary: Summary) -> tuple[Block, ...]:
    """The tables: accuracy per method and vote, then what each method costs."""
    votes = tuple((row.name, row) for row in summary.rows)
    methods = tuple({row.method: (row.method, row) for row in summary.rows}.values())
    together = [row.concurrency for row in summary.rows if row.concurrency]
    company = f", 1/s N {max(together)} at a time" if together else ""
    found = (
        Block(title(summary), ACCURACY, votes),
        Block("KV of the policy in tokens and MB; summed: the published metric", KV, methods),
        Block("KV of the PRM; tokens written and judged, decode steps, GFLOP", WORK, methods),
        Block(f"Memory traffic and seconds of searches that run alone{company}", TIME, methods),
    )
    return tuple(_without_unknown(block) for block in found)


def _without_unknown(block: Block) -> Block:
    """Without columns in which nothing is known."""
    known = [column for column in block.columns if any(column.show(row) for _, row in block.rows)]
    return Block(block.head, tuple(known), block.rows)


def correlations(summary: Summary) -> dict[str, dict[str, float]]:
    """What is known of each cost's rank correlation with latency, by what it is over."""
    found = {
        f"{summary.timed_methods or 'the'} methods": summary.correlations,
        f"{summary.timed_searches} single searches": summary.search_correlations,
    }
    known = {
        what: {PROXIES[name]: value for name, value in shares.items() if value is not None}
        for what, shares in found.items()
    }
    return {what: shares for what, shares in known.items() if shares}


def title(summary: Summary) -> str:
    """What was measured on."""
    counts = {row.problems for row in summary.rows}
    problems = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{next(iter(counts), 0)}"
    if not summary.settings:
        return f"{problems} problems"
    return f"{summary.settings[-1].data}: {problems} problems, {summary.settings[-1].model}; shares in %"


def comparison_lines(summary: Summary) -> list[str]:
    """ETS against its neighbours, one line each; with settings of its own, only against itself without them."""
    return [f"{row.name} against {_comparison(one)}" for row, one in _told(summary)]


def failure_lines(summary: Summary) -> list[str]:
    """Methods with searches that failed, which count as wrong."""
    methods = {row.method: row for row in summary.rows if row.failed}.values()
    return [f"{row.method}: {row.failed} failed of {row.searches}, e.g. {row.first_error}" for row in methods]


def behind_lines(summary: Summary) -> list[str]:
    """Where ETS solves fewer than a neighbour, and the whole interval says so."""
    return [f"{row.name} against {_comparison(one)}" for row, one in _told(summary) if one.points.high < 0]


def _told(summary: Summary) -> list[tuple[Row, Comparison]]:
    found: list[tuple[Row, Comparison]] = []
    for row in summary.rows:
        plain, _, changes = row.name.partition(" ")
        if row.name.startswith("ets"):
            found += [(row, one) for one in row.versus if not changes or one.other == plain]
    return found


def _comparison(one: Comparison) -> str:
    mean, low, high = one.points.mean, one.points.low, one.points.high
    parts = [f"{one.other}: {mean:+.1f} points ({low:+.1f} to {high:+.1f})"]
    if one.kv is not None:
        parts.append(_times(one.kv, "less KV", "the KV"))
    if one.latency is not None:
        parts.append(_times(one.latency, "faster", "the seconds"))
    if one.throughput is not None:
        parts.append(f"{one.throughput:.2f} x the searches per second")
    return ", ".join(parts)


def _times(ratio: float, better: str, worse: str) -> str:
    """A ratio of theirs to ours, in words that are never below one."""
    return f"{ratio:.2f} x {better}" if ratio >= 1 else f"{1 / ratio:.2f} x {worse}"
