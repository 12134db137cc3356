"""The comparison in a terminal of 80 columns; what stands in it is decided elsewhere."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ets_engine.evaluation.columns import FLOPS, Block, blocks, comparison_lines, correlations, failure_lines
from ets_engine.evaluation.rows import Summary
from ets_engine.terminal.words import one_line


def summary_view(summary: Summary) -> RenderableType:
    """All rows, what the paired comparisons say, and which cost tells latency."""
    parts: list[RenderableType] = [*map(_table, blocks(summary)), *map(_text, comparison_lines(summary))]
    for what, found in correlations(summary).items():
        shares = ", ".join(f"{name} {value:+.2f}" for name, value in found.items())
        parts.append(Text(f"Rank correlation with latency over {what}: {shares}"))
    for one in summary.settings[-1:]:
        parts.append(Text(f"A large copy moves {one.copy_gb_s:.1f} GB/s on this machine."))
    parts += [Text(FLOPS), *map(_text, failure_lines(summary))]
    return Group(*parts)


def _table(block: Block) -> Table:
    table = Table(title=_text(block.head), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", min_width=16)
    for column in block.columns:
        table.add_column(column.head, justify="right", no_wrap=column.head != "by level", overflow="fold")
    for name, row in block.rows:
        table.add_row(*map(_text, (name, *(column.show(row) for column in block.columns))))
    return table


def _text(said: str) -> Text:
    """Names, levels and errors are a file's or a server's, and may hold anything."""
    return Text(one_line(said))
