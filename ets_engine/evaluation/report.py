"""The comparison as one HTML page that needs no network: Pareto plots, tables, settings, machine."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ets_engine.errors import ConfigError
from ets_engine.evaluation.summary import Row, Summary
from ets_engine.evaluation.table import ACCURACY, COST, Cell, comparison_lines, cost_title, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = """
:root { color-scheme: light; } body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1b1f24;
font: 15px/1.5 system-ui, sans-serif; } h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; }
th { border-bottom: 2px solid #d0d7de; font-weight: 600; } td { border-bottom: 1px solid #eaeef2; }
th:first-child, td:first-child { text-align: left; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots svg { max-width: 100%; height: auto; } .note { color: #57606a; } li { margin: .15rem 0; }
"""


def report_page(summary: Summary) -> str:
    """The page.

    Raises:
        ConfigError: There is nothing to report, or matplotlib is missing.
    """
    if not summary.rows:
        raise ConfigError("nothing was measured, so there is nothing to report")
    methods = list({row.method: row for row in summary.rows}.values())
    plots = [
        _plot(summary.rows, lambda row: row.mean_kv_tokens, "mean resident KV (tokens of the policy)"),
        _plot(summary.rows, lambda row: row.p50_s, "median latency (seconds, one search at a time)"),
    ]
    parts = [
        f"<h1>{escape(title(summary))}</h1>",
        "<p class='note'>Accuracy with 95 % intervals by resampling problems; every method on the same problems and "
        "seeds. The line joins what no other method beats in both directions.</p>",
        f"<div class='plots'>{''.join(plots)}</div>",
        "<h2>Accuracy</h2>",
        _table(summary.rows, ACCURACY, lambda row: row.name),
        f"<h2>{escape(cost_title(summary))}</h2>",
        _table(methods, COST, lambda row: row.method),
        "<h2>Paired comparisons</h2>",
        _list(comparison_lines(summary)),
        *_failures(methods),
        *_correlations(summary),
        *_settings(summary),
    ]
    body = "\n".join(parts)
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>Comparison</title>"
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def require_matplotlib() -> None:
    """Refuse a report that could not be drawn.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("a report needs matplotlib: pip install 'ets-integrations[bench]'")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats, cheapest first: none costs less and is at least as good.

    Example:
        >>> pareto([(1, 30), (2, 20), (3, 50), (3, 40)])
        [(1, 30), (3, 50)]
    """
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found


def _plot(rows: Sequence[Row], cost: Callable[[Row], float | None], label: str) -> str:
    """Accuracy against a cost, one colour per strategy, its widths joined; inline SVG, empty without the cost."""
    known = [(row, value) for row in rows if (value := cost(row)) is not None and value > 0]
    if not known:
        return ""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[tuple[Row, float]]] = defaultdict(list)
    for row, value in known:
        families[row.name.partition("@")[0]].append((row, value))
    for family, members in families.items():
        _draw_family(axes, family, sorted(members, key=lambda member: member[1]))
    frontier = pareto([(value, row.solved.mean) for row, value in known])
    axes.plot(*zip(*frontier, strict=True), color="0.6", linewidth=1, linestyle="--", zorder=1)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("solved (%)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _draw_family(axes: Axes, family: str, members: Sequence[tuple[Row, float]]) -> None:
    costs = [value for _, value in members]
    means = [row.solved.mean for row, _ in members]
    errors = [
        [row.solved.mean - row.solved.low for row, _ in members],
        [row.solved.high - row.solved.mean for row, _ in members],
    ]
    axes.errorbar(costs, means, yerr=errors, marker="o", markersize=5, linewidth=1.2, capsize=2, label=family, zorder=2)
    for row, value in members:
        width = row.name.partition("@")[2]
        if width:
            axes.annotate(width, (value, row.solved.mean), textcoords="offset points", xytext=(5, 4), fontsize=7)


def _table(rows: Sequence[Row], columns: dict[str, Cell], name: Callable[[Row], str]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in ("method", *columns))
    lines = [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in (name(row), *(show(row) for show in columns.values())))
        for row in rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{'</tr>'.join(lines)}</tr></tbody></table>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else "<p>None.</p>"


def _correlations(summary: Summary) -> list[str]:
    known = [f"{name}: {value:+.2f}" for name, value in summary.correlations.items() if value is not None]
    if not known:
        return []
    return ["<h2>Which cost tells latency (rank correlation over methods)</h2>", _list(known)]


def _failures(rows: Sequence[Row]) -> list[str]:
    failed = [f"{row.name}: {row.failed} of {row.searches}, e.g. {row.first_error}" for row in rows if row.failed]
    return ["<h2>Failed searches, which count as wrong</h2>", _list(failed)] if failed else []


def _settings(summary: Summary) -> list[str]:
    parts: list[str] = []
    for one in summary.settings[:1]:
        facts = {"model": one.model, "verifier": one.verifier, "weights": one.weights, "data": one.data}
        facts |= {"device": one.device, "dtype": one.dtype, **one.search}
        parts += ["<h2>Settings</h2>", _list([f"{name}: {value}" for name, value in facts.items()])]
    for one in summary.settings:
        machine = {**one.machine, "memory copy (GB/s)": one.copy_gb_s}
        parts += ["<h2>Machine</h2>", _list([f"{name}: {value}" for name, value in machine.items()])]
    return parts
