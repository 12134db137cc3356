"""The drawing of a search tree: every branch, what became of it, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ets_engine.terminal.fold import Fate, Row, best_path, fate_of, tree_rows
from ets_engine.terminal.words import count, most, one_line, score_style
from ets_engine.types import LeafVerdict, SearchResult, TraceNode

_NARROW = 72  # cells below which only score and share stand beside the text
_WIDE = 110  # cells from which on there is room for the reasons in words
_GUIDE_CELLS = 24  # deeper guides lose their left part, so that there is always room for the text

_NAMES = {
    Fate.KEPT: "kept",
    Fate.PRUNED: "pruned",
    Fate.FINISHED: "finished",
    Fate.LENGTH: "out of tokens",
    Fate.FAILED: "failed",
    Fate.OPEN: "undecided",
}
_STYLES = {
    Fate.KEPT: "cyan",
    Fate.PRUNED: "dim",
    Fate.FINISHED: "green",
    Fate.LENGTH: "yellow",
    Fate.FAILED: "red",
    Fate.OPEN: "yellow",
}
_BEST_STYLE = "bold green"
_MEANINGS = {
    "share": "children granted",
    "reward": "part of the width it earned",
    "cost": "price of the KV it adds",
    "cluster": "equal numbers at one depth are one idea",
}


@dataclass(frozen=True, slots=True)
class _Signs:
    """What a drawing is made of; each fate has a sign of its own, so that no colour is needed."""

    fates: dict[Fate, str]
    best: str
    times: str
    bound: str
    cut: str
    dot: str
    guides: dict[str, str]


_UNICODE = _Signs(
    {Fate.KEPT: "●", Fate.PRUNED: "✗", Fate.FINISHED: "◆", Fate.LENGTH: "~", Fate.FAILED: "!", Fate.OPEN: "○"},
    best="★",
    times="\N{MULTIPLICATION SIGN}",
    bound="≤",
    cut="⋯",
    dot="·",
    guides={"├": "├ ", "└": "└ ", "│": "│ ", " ": "  "},
)
_ASCII = _Signs(
    {Fate.KEPT: "o", Fate.PRUNED: "x", Fate.FINISHED: "#", Fate.LENGTH: "~", Fate.FAILED: "!", Fate.OPEN: "?"},
    best="*",
    times="x",
    bound="<",
    cut=">",
    dot="-",
    guides={"├": "+ ", "└": "` ", "│": "| ", " ": "  "},
)


def tree_view(result: SearchResult) -> RenderableType:
    """The tree of a search, from its trace.

    Raises:
        ValueError: The result has no trace.
    """
    if not result.trace:
        raise ValueError("the result has no trace; search with SearchConfig(trace=True)")
    return _Tree(result, result.trace)


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    show: Callable[[Row], str]


@dataclass(frozen=True, slots=True)
class _Tree:
    result: SearchResult
    trace: tuple[TraceNode, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line per row, figures in columns, and what the signs mean."""
        signs = _ASCII if options.ascii_only else _UNICODE
        on_path = best_path(self.trace, self.result.steps) if self.result.steps else frozenset[int]()
        path_name = "" if not on_path else "best path" if self.result.answer is None else "path to the answer"
        columns = _columns(self.trace, signs, wide=options.max_width >= _WIDE)
        if options.max_width < _NARROW:
            columns = columns[:2]
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(Text(one_line(self.result.problem), "bold"), ratio=1, no_wrap=True, overflow="ellipsis")
        for column in columns:
            words = column.name == "why"
            table.add_column(column.name, justify="left" if words else "right", no_wrap=True)
        for row in tree_rows(self.trace, on_path):
            style = _BEST_STYLE if row.best else "dim" if row.fate is Fate.PRUNED else ""
            figures = [Text(column.show(row), _figure_style(column, row)) for column in columns]
            table.add_row(_label(row, signs, style), *figures)
        yield table
        yield Text()
        yield from _flow(_legend(self.trace, signs, path_name), "   ", options.max_width)
        yield from _flow(_glossary(columns), f" {signs.dot} ", options.max_width)


def _label(row: Row, signs: _Signs, style: str) -> Text:
    guide = "".join(signs.guides[part] for part in row.guide)
    if len(guide) > _GUIDE_CELLS:
        guide = signs.cut + " " + guide[2 - _GUIDE_CELLS :]
    sign = signs.best if row.best else signs.fates[row.fate]
    label = Text.assemble((guide, "dim"), (sign, _BEST_STYLE if row.best else _STYLES[row.fate]), " ")
    label.append(row.text or _NAMES[row.fate], "dim italic" if row.rest or not row.text else style)
    if len(row.nodes) > 1 and not row.rest:
        label.append(f" {signs.times}{len(row.nodes)}", "dim" if row.fate is Fate.PRUNED else "bold")
    return label


def _figure_style(column: _Column, row: Row) -> str:
    if row.fate is Fate.PRUNED:
        return "dim"
    if column.name == "score":
        return score_style(max(node.step_score for node in row.nodes))
    return "" if column.name == "share" else "dim"


def _columns(trace: Sequence[TraceNode], signs: _Signs, *, wide: bool) -> list[_Column]:
    """The figures that this search has: what a selector does not use is not shown."""
    verdicts = [node.verdict for node in trace if node.verdict is not None and node.parent >= 0]
    columns = [_Column("score", lambda row: _score(row, signs)), _Column("share", _share)]
    if any(verdict.reward for verdict in verdicts):
        columns.append(_Column("reward", lambda row: _number(row, signs, lambda verdict: verdict.reward)))
    if any(verdict.node_cost for verdict in verdicts):
        columns.append(_Column("cost", lambda row: _number(row, signs, lambda verdict: verdict.node_cost)))
    if any(verdict.cluster >= 0 for verdict in verdicts):
        columns.append(_Column("cluster", _cluster))
    if wide and any(not verdict.share for verdict in verdicts):
        covered = _covered(trace)
        columns.append(_Column("why", lambda row: _why(row, covered)))
    return columns


def _score(row: Row, signs: _Signs) -> str:
    if row.fate in (Fate.LENGTH, Fate.FAILED):
        return ""  # never scored
    return most([node.step_score for node in row.nodes], 2, bound=signs.bound)


def _share(row: Row) -> str:
    return count(sum(verdict.share for verdict in _verdicts(row.nodes))) if row.fate is Fate.KEPT else ""


def _number(row: Row, signs: _Signs, read: Callable[[LeafVerdict], float]) -> str:
    numbers = [read(verdict) for verdict in _verdicts(row.nodes)]
    return most(numbers, 3, bound=signs.bound) if numbers else ""


def _cluster(row: Row) -> str:
    clusters = {verdict.cluster for verdict in _verdicts(row.nodes)}
    return str(clusters.pop()) if len(clusters) == 1 else ""


def _why(row: Row, covered: dict[int, set[int]]) -> str:
    """Why a row was pruned, in a few words; nothing where its nodes differ."""
    reasons = {_reason(node, verdict, covered) for node in row.nodes if (verdict := node.verdict) and not verdict.share}
    return reasons.pop() if len(reasons) == 1 else ""


def _reason(node: TraceNode, verdict: LeafVerdict, covered: dict[int, set[int]]) -> str:
    if verdict.node_cost <= 0:
        return "share too small" if verdict.reward > 0 else "others scored higher"
    reason = "cost > reward" if verdict.node_cost > verdict.reward else "path not worth its KV"
    return f"{reason}, cluster {verdict.cluster} kept" if verdict.cluster in covered[node.depth] else reason


def _covered(trace: Sequence[TraceNode]) -> dict[int, set[int]]:
    """Clusters with a kept member, by depth."""
    covered: dict[int, set[int]] = defaultdict(set)
    for node in trace:
        if node.verdict is not None and node.verdict.share and node.verdict.cluster >= 0:
            covered[node.depth].add(node.verdict.cluster)
    return covered


def _verdicts(nodes: Iterable[TraceNode]) -> list[LeafVerdict]:
    return [node.verdict for node in nodes if node.verdict is not None]


def _legend(trace: Sequence[TraceNode], signs: _Signs, path_name: str) -> list[Text]:
    """Each sign, what it means, and how many nodes it stands for."""
    fates = Counter(fate_of(node) for node in trace if node.parent >= 0)
    parts = [Text.assemble((signs.best, _BEST_STYLE), f" {path_name}")] if path_name else []
    for fate, name in _NAMES.items():
        if fates[fate]:
            parts.append(Text.assemble((signs.fates[fate], _STYLES[fate]), f" {count(fates[fate])} {name}"))
    return parts


def _glossary(columns: Sequence[_Column]) -> list[Text]:
    """What the figures mean."""
    names = [column.name for column in columns]
    return [Text(f"{name}: {_MEANINGS[name]}", "dim") for name in names if name in _MEANINGS]


def _flow(parts: Sequence[Text], gap: str, width: int) -> Iterator[Text]:
    """Parts side by side in lines of at most `width` cells, never broken inside a part that fits."""
    line = Text()
    for part in parts:
        if line and line.cell_len + cell_len(gap) + part.cell_len > width:
            yield line
            line = Text()
        line = Text.assemble(line, (gap, "dim"), part) if line else part
    yield line
