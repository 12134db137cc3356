"""The comparison as a terminal table; it computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ets_engine.evaluation.summary import Row, Summary

Cell = Callable[[Row], str]


def _number(read: Callable[[Row], float | None], digits: int) -> Cell:
    def show(row: Row) -> str:
        value = read(row)
        return "" if value is None else f"{value:.{digits}f}"

    return show


_ACCURACY: dict[str, Cell] = {
    "solved %": _number(lambda row: row.strict.mean, 1),
    "95 %": lambda row: f"{row.strict.low:.0f}-{row.strict.high:.0f}",
    "answer %": _number(lambda row: row.lenient.mean, 1),
    "any %": _number(lambda row: row.any_right, 0),
    "of those": _number(lambda row: row.selection, 0),
    "by level %": lambda row: " ".join(f"{level}:{share:.0f}" for level, share in row.by_level.items()),
}
_COST: dict[str, Cell] = {
    "KV mean": _number(lambda row: row.mean_kv_tokens, 0),
    "peak": _number(lambda row: row.peak_kv_tokens, 0),
    "MB": _number(lambda row: row.mean_kv_mb, 1),
    "sharing": _number(lambda row: row.sharing_ratio, 2),
    "tokens": _number(lambda row: row.generated_tokens, 0),
    "GB/s": _number(lambda row: row.gb_s, 1),
    "p50 s": _number(lambda row: row.p50_s, 2),
    "p95 s": _number(lambda row: row.p95_s, 2),
    "1/s": _number(lambda row: row.together_per_s or row.alone_per_s, 2),
}


def summary_view(summary: Summary) -> RenderableType:
    """All rows, what the paired comparisons say, and which cost tells latency."""
    cost = f"cost (KV in tokens of the policy, MB of both models; seconds alone, 1/s {_company(summary)})"
    methods = list({row.method: row for row in summary.rows}.values())
    parts: list[RenderableType] = [
        _table(summary.rows, _title(summary), _ACCURACY, lambda row: row.name),
        _table(methods, cost, _COST, lambda row: row.method),
        *_comparisons(summary),
    ]
    known = {name: value for name, value in summary.correlations.items() if value is not None}
    if known:
        shares = ", ".join(f"{name} {value:+.2f}" for name, value in known.items())
        parts.append(Text(f"Rank correlation with median latency: {shares}"))
    if summary.settings is not None:
        parts.append(Text(f"A large copy moves {summary.settings.copy_gb_s:.1f} GB/s on this machine."))
    return Group(*parts)


def _table(rows: Sequence[Row], title: str, columns: dict[str, Cell], name: Callable[[Row], str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for head in columns:
        table.add_column(head, justify="right", overflow="fold" if head == "by level %" else "ellipsis")
    for row in rows:
        failed = f" ({row.failed} failed)" if row.failed else ""
        table.add_row(name(row) + failed, *(cell(row) for cell in columns.values()))
    return table


def _company(summary: Summary) -> str:
    together = [row.concurrency for row in summary.rows if row.together_per_s is not None and row.concurrency]
    return f"{max(together)} together" if together else "one at a time"


def _title(summary: Summary) -> str:
    settings = summary.settings
    counts = {row.problems for row in summary.rows}
    problems = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{next(iter(counts), 0)}"
    return f"{settings.data}: {problems} problems, {settings.model}" if settings else f"{problems} problems"


def _times(ratio: float, better: str, worse: str) -> str:
    """A ratio of theirs to ours, in words that are never below one."""
    return f"{ratio:.2f} x {better}" if ratio >= 1 else f"{1 / ratio:.2f} x {worse}"


def _comparisons(summary: Summary) -> list[Text]:
    lines: list[Text] = []
    for row in summary.rows:
        if not row.name.startswith("ets"):
            continue
        for one in row.versus:
            mean, low, high = one.points.mean, one.points.low, one.points.high
            line = f"{row.name} against {one.other}: {mean:+.1f} points ({low:+.1f} to {high:+.1f})"
            line += "" if one.kv is None else f", {_times(one.kv, 'less KV', 'the KV')}"
            line += "" if one.latency is None else f", {_times(one.latency, 'faster', 'the seconds')}"
            lines.append(Text(line))
    return lines
