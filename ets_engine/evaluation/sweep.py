"""Sweeps of one setting on held-out problems: which methods they take, and what their rows say; it runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ets_engine.evaluation.methods import parse_strategy, split_name
from ets_engine.evaluation.plot import Cost, Panel, Point, Series, panel_of
from ets_engine.evaluation.rows import Row, Summary
from ets_engine.types import Value

BUDGET = "kv_budget_tokens"
PEERS = ("rebase", "beam")  # that a budget's row is compared with


class Sweep(Value):
    """What a sweep leaves behind.

    Attributes:
        version: Of this format.
        command: That gives it again.
        settings: Sweeps of settings, and ablations, at one width.
        budgets: ETS under hard KV budgets, others at several widths.
    """

    version: int = 1
    command: str
    settings: Summary | None = None
    budgets: Summary | None = None


class EqualMemory(Value):
    """One KV budget: ETS under it, and the widest that each peer can be without ever going over it.

    Attributes:
        budget_tokens: The cap (tokens).
        ets: Its row.
        peers: Rows of the peers, None where even the narrowest one went over.
    """

    budget_tokens: int
    ets: Row
    peers: dict[str, Row | None]


def variants(strategy: str, setting: str, values: Iterable[float]) -> list[str]:
    """The strategy with one setting changed, once per value, as `methods_of` reads it.

    Example:
        >>> variants("ets", "lambda_b", [0.5, 2])
        ['ets:lambda_b=0.5', 'ets:lambda_b=2']
    """
    return [f"{strategy}:{setting}={value:g}" for value in values]


def swept_value(row: Row, setting: str, base: dict[str, Any]) -> float | None:
    """The row's value of a setting, None where it has other changed settings or its strategy is not ETS.

    Args:
        row: Of a summary.
        setting: That is swept.
        base: `Settings.search` of the run.
    """
    family, _, note = split_name(row.method)
    if family != "ets":
        return None
    _, changes = parse_strategy(":".join([family, *note.split()]))
    if not changes:
        return base.get(setting)
    return dict(changes)[setting] if [name for name, _ in changes] == [setting] else None


def sweep_rows(summary: Summary, setting: str) -> list[tuple[float, Row]]:
    """ETS at each value of a setting, smallest first; the run's own value among them."""
    base = summary.settings[-1].search if summary.settings else {}
    found = [(value, row) for row in summary.rows if (value := swept_value(row, setting, base)) is not None]
    return sorted(found, key=lambda pair: pair[0])


def sweep_panel(summary: Summary, setting: str, cost: Cost, cost_label: str, title: str) -> Panel:
    """ETS at each value of a setting, joined in that order, and the rows without changed settings beside it."""
    swept = sweep_rows(summary, setting)
    shown = {row.name for _, row in swept}
    others = [row for row in summary.rows if row.name not in shown and not split_name(row.name)[2]]
    known = [(value, row, at) for value, row in swept if (at := cost(row)) is not None]
    points = tuple(Point(at, row.solved, f"{value:g}") for value, row, at in known)
    beside = panel_of(others, cost, cost_label, title)
    return Panel(beside.title, cost_label, (*beside.series, *([Series("ets", points)] if points else ())))


def check_budgets(rows: Iterable[Row]) -> None:
    """The promise of a hard KV budget.

    Raises:
        AssertionError: Some search held more KV tokens than its budget.
    """
    for row in rows:
        budget = swept_value(row, BUDGET, {})
        if budget is not None and (row.max_kv_tokens is None or row.max_kv_tokens > budget):
            raise AssertionError(f"{row.name}: a search held {row.max_kv_tokens} KV tokens, budget {budget:g}")


def at_equal_memory(rows: Sequence[Row]) -> list[EqualMemory]:
    """ETS under each budget beside the widest of each peer that never went over it."""
    found: list[EqualMemory] = []
    for row in rows:
        budget = swept_value(row, BUDGET, {})
        if budget is None:
            continue
        peers: dict[str, Row | None] = {}
        for name in PEERS:
            within = [
                (width, one)
                for one in rows
                if one.max_kv_tokens is not None and one.max_kv_tokens <= budget
                for family, width, note in [split_name(one.name)]
                if family == name and width is not None and not note
            ]
            peers[name] = max(within, key=lambda pair: pair[0])[1] if within else None
        found.append(EqualMemory(budget_tokens=int(budget), ets=row, peers=peers))
    return sorted(found, key=lambda one: one.budget_tokens)


def sweep_lines(summary: Summary, setting: str) -> list[str]:
    """One line per value, at most 80 columns, and the rows without changed settings below."""
    swept = sweep_rows(summary, setting)
    shown = {row.name for _, row in swept}
    others = [(row.name, row) for row in summary.rows if row.name not in shown and not split_name(row.name)[2]]
    lines = [f"{setting:<20}{'solved':>8}{'95 %':>10}{'KV mean':>9}{'peak':>7}{'largest':>9}{'summed':>8}{'failed':>8}"]
    for name, row in [*((f"{value:g}", row) for value, row in swept), *others]:
        interval = f"{row.solved.low:.0f}-{row.solved.high:.0f}"
        costs = row.mean_kv_tokens, row.peak_kv_tokens, row.max_kv_tokens, row.published_kv_tokens
        mean, peak, largest, summed = ("" if cost is None else f"{cost:.0f}" for cost in costs)
        lines.append(
            f"{name:<20}{row.solved.mean:>8.1f}{interval:>10}{mean:>9}{peak:>7}{largest:>9}{summed:>8}{row.failed:>8}"
        )
    return lines


def budget_lines(found: Sequence[EqualMemory]) -> list[str]:
    """One line per budget: what ETS solves under it, and what each peer solves within it, with its width."""
    lines = [f"{'KV budget':<12}{'ets':>8}{'largest peak':>14}" + "".join(f"{name:>16}" for name in PEERS)]
    for one in found:
        peers = [
            "none fits" if row is None else f"{row.solved.mean:.1f} (@{split_name(row.name)[1]})"
            for row in one.peers.values()
        ]
        ours = f"{one.budget_tokens:<12}{one.ets.solved.mean:>8.1f}{one.ets.max_kv_tokens or 0:>14}"
        lines.append(ours + "".join(f"{text:>16}" for text in peers))
    return lines
