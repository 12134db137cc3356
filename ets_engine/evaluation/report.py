"""The comparison as one HTML page that needs no network: Pareto plots, tables, settings, machine."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ets_engine.errors import ConfigError
from ets_engine.evaluation.columns import (
    FLOPS,
    Block,
    behind_lines,
    blocks,
    comparison_lines,
    correlations,
    failure_lines,
    title,
)
from ets_engine.evaluation.plot import Cost, draw, panel_of
from ets_engine.evaluation.rows import Summary

COSTS: dict[str, Cost] = {
    "mean resident KV (tokens of the policy)": lambda row: row.mean_kv_tokens,
    "median latency (seconds, one search at a time)": lambda row: row.p50_s,
}

_STYLE = """
:root { color-scheme: light; } body { margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1b1f24;
background: #fff; font: 15px/1.5 system-ui, sans-serif; } h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .7rem; text-align: right; }
th { border-bottom: 2px solid #d0d7de; font-weight: 600; } td { border-bottom: 1px solid #eaeef2; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; } .note { color: #57606a; } li { margin: .15rem 0; }
@media print { html { font-size: 11px; } body { margin: 0; max-width: none; font-size: 10px; }
  .scroll { overflow: visible; } .plots { grid-template-columns: 1fr 1fr; }
  th, td { padding: .1rem .3rem; } h2, tr, svg { break-inside: avoid; break-after: auto; } h2 { break-after: avoid; } }
"""


def report_page(summary: Summary) -> str:
    """The page.

    Raises:
        ConfigError: There is nothing to report, or matplotlib is missing.
    """
    if not summary.rows:
        raise ConfigError("nothing was measured, so there is nothing to report")
    accuracy, *costs = blocks(summary)
    parts = [
        f"<h1>{escape(accuracy.head)}</h1>",
        "<p class='note'>Accuracy with 95 % intervals over problems; every method on the same problems and seeds."
        " The dotted line joins what no other method beats in both directions.</p>",
        f"<div class='plots'>{''.join(_plots(summary))}</div>",
        "<h2>Accuracy</h2>",
        _table(accuracy),
        *(part for block in costs for part in (f"<h2>{escape(block.head)}</h2>", _table(block))),
        f"<p class='note'>{escape(FLOPS)}</p>",
        "<h2>Paired comparisons</h2>",
        _list(comparison_lines(summary)),
        "<h2>Where ETS solves fewer, by the whole interval</h2>",
        _list(behind_lines(summary)),
        *_section("Failed searches, which count as wrong", failure_lines(summary)),
        *_correlations(summary),
        *_settings(summary),
    ]
    body = "\n".join(parts)
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title(summary))}</title>"
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _plots(summary: Summary) -> list[str]:
    """Accuracy against each cost that was measured, as inline SVG."""
    panels = [panel_of(summary.rows, cost, name) for name, cost in COSTS.items()]
    return [draw([panel]) for panel in panels if panel.series]


def _table(block: Block) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in ("method", *(column.head for column in block.columns)))
    lines = [
        "".join(f"<td>{escape(cell)}</td>" for cell in (name, *(column.show(row) for column in block.columns)))
        for name, row in block.rows
    ]
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else "<p>None.</p>"


def _section(head: str, lines: Sequence[str]) -> list[str]:
    return [f"<h2>{escape(head)}</h2>", _list(lines)] if lines else []


def _correlations(summary: Summary) -> list[str]:
    found = correlations(summary)
    if not found:
        return []
    names = list(dict.fromkeys(name for shares in found.values() for name in shares))
    head = "".join(f"<th>{escape(f'over {what}')}</th>" for what in found)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{shares[name]:+.2f}</td>" if name in shares else "<td></td>" for shares in found.values())
        + "</tr>"
        for name in names
    )
    table = f"<div class='scroll'><table><thead><tr><th>cost</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    return ["<h2>Which cost tells latency (rank correlation)</h2>", table]


def _settings(summary: Summary) -> list[str]:
    parts: list[str] = []
    for one in summary.settings[:1]:
        facts = {"model": one.model, "verifier": one.verifier, "weights": one.weights, "data": one.data}
        facts |= {"device": one.device, "dtype": one.dtype, **one.search}
        parts += _section("Settings", [f"{name}: {value}" for name, value in facts.items()])
    for one in summary.settings:
        machine = {**one.machine, "memory copy (GB/s)": one.copy_gb_s}
        parts += _section("Machine", [f"{name}: {value}" for name, value in machine.items()])
    return parts
