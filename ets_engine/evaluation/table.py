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


ACCURACY: dict[str, Cell] = {
    "solved": _number(lambda row: row.solved.mean, 1),
    "95 %": lambda row: f"{row.solved.low:.0f}-{row.solved.high:.0f}",
    "strict": _number(lambda row: row.strict.mean, 1),
    "lenient": _number(lambda row: row.lenient.mean, 1),
    "any": _number(lambda row: row.any_right, 0),
    "of those": _number(lambda row: row.selection, 0),
    "by level": lambda row: " ".join(f"{level}:{share:.0f}" for level, share in row.by_level.items()),
}
COST: dict[str, Cell] = {
    "KV mean": _number(lambda row: row.mean_kv_tokens, 0),
    "peak": _number(lambda row: row.peak_kv_tokens, 0),
    "MB": _number(lambda row: row.mean_kv_mb, 1),
    "sharing": _number(lambda row: row.sharing_ratio, 2),
    "tokens": _number(lambda row: row.generated_tokens, 0),
    "GB/s": _number(lambda row: row.gb_s, 1),
    "p50 s": _number(lambda row: row.p50_s, 2),
    "p95 s": _number(lambda row: row.p95_s, 2),
    "1/s": _number(lambda row: row.alone_per_s, 2),
    "1/s N": _number(lambda row: row.together_per_s, 2),
}


def summary_view(summary: Summary) -> RenderableType:
    """All rows, what the paired comparisons say, and which cost tells latency."""
    methods = list({row.method: row for row in summary.rows}.values())
    parts: list[RenderableType] = [
        _table(summary.rows, title(summary), ACCURACY, lambda row: row.name),
        _table(methods, cost_title(summary), COST, lambda row: row.method),
        *map(Text, comparison_lines(summary)),
    ]
    known = {name: value for name, value in summary.correlations.items() if value is not None}
    if known:
        shares = ", ".join(f"{name} {value:+.2f}" for name, value in known.items())
        parts.append(Text(f"Rank correlation with median latency: {shares}"))
    for one in summary.settings[-1:]:
        parts.append(Text(f"A large copy moves {one.copy_gb_s:.1f} GB/s on this machine."))
    parts += [Text(f"{row.name}: {row.failed} failed, e.g. {row.first_error}") for row in methods if row.failed]
    return Group(*parts)


def _table(rows: Sequence[Row], head: str, columns: dict[str, Cell], name: Callable[[Row], str]) -> Table:
    table = Table(title=Text(head), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=16)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column != "by level", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, (name(row), *(cell(row) for cell in columns.values()))))
    return table


def cost_title(summary: Summary) -> str:
    """What the columns of the cost table are in."""
    together = [row.concurrency for row in summary.rows if row.concurrency]
    company = f", 1/s N = {max(together)} in flight" if together else ""
    return f"Cost: KV in tokens of the policy, MB of both models; seconds and 1/s alone{company}"


def title(summary: Summary) -> str:
    """What was measured on."""
    counts = {row.problems for row in summary.rows}
    problems = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{next(iter(counts), 0)}"
    if not summary.settings:
        return f"{problems} problems"
    return f"{summary.settings[-1].data}: {problems} problems, {summary.settings[-1].model}; shares in %"


def _times(ratio: float, better: str, worse: str) -> str:
    """A ratio of theirs to ours, in words that are never below one."""
    return f"{ratio:.2f} x {better}" if ratio >= 1 else f"{1 / ratio:.2f} x {worse}"


def comparison_lines(summary: Summary) -> list[str]:
    """ETS against its neighbours, one line each."""
    lines: list[str] = []
    for row in summary.rows:
        if not row.name.startswith("ets"):
            continue
        for one in row.versus:
            mean, low, high = one.points.mean, one.points.low, one.points.high
            line = f"{row.name} against {one.other}: {mean:+.1f} points ({low:+.1f} to {high:+.1f})"
            line += "" if one.kv is None else f", {_times(one.kv, 'less KV', 'the KV')}"
            line += "" if one.latency is None else f", {_times(one.latency, 'faster', 'the seconds')}"
            lines.append(line)
    return lines
