"""From a trace to the rows of a drawing: what became of each node, what is told together, in which order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ets_engine.terminal.words import one_line
from ets_engine.types import ScoredStep, StopReason, TraceNode

_ENDS_SHOWN = 3  # rows of the same fate below one parent, where nothing comes after them; the rest share one row
_BRANCHES_SHOWN = 8  # rows below one parent that go on; the rest share one row


class Fate(IntEnum):
    """What became of a node, in the order in which siblings are drawn."""

    KEPT = 0  # it got children
    FINISHED = 1  # it ends a solution
    OPEN = 2  # the search ended before it was decided
    LENGTH = 3  # out of tokens
    FAILED = 4  # the policy or the verifier failed on it
    PRUNED = 5  # it got no children


@dataclass(frozen=True, slots=True)
class Row:
    """Siblings told together: the same text and fate, or "so many more" of one fate.

    Attributes:
        nodes: At least one.
        fate: Of all of them.
        best: Whether the best path leads through one of them.
        guide: The lines of the tree left of it: "│" and " " for each row above, "├" or "└" for itself.
        below: Nodes below them that are not drawn (count), None for a row whose children are.
    """

    nodes: tuple[TraceNode, ...]
    fate: Fate
    best: bool
    guide: str = ""
    below: int | None = None

    @property
    def rest(self) -> bool:
        """Whether it stands for different texts, told by their number."""
        return self.below is not None

    @property
    def text(self) -> str:
        """What is written on the row."""
        if self.below is None:
            return one_line(self.nodes[0].text)
        return f"{len(self.nodes)} more" + (f", {self.below} below" if self.below else "")


def fate_of(node: TraceNode) -> Fate:
    """What became of a node."""
    match node.stop:
        case StopReason.FINISHED:
            return Fate.FINISHED
        case StopReason.LENGTH:
            return Fate.LENGTH
        case StopReason.ERROR:
            return Fate.FAILED
        case StopReason.BOUNDARY:
            if node.verdict is None:
                return Fate.OPEN
            return Fate.KEPT if node.verdict.share else Fate.PRUNED


def best_path(trace: Sequence[TraceNode], steps: Sequence[ScoredStep]) -> frozenset[int]:
    """Ids of the nodes from the root to the first path that consists of these steps, finished ones first."""
    by_id = {node.id: node for node in trace}
    wanted = [(step.text, step.score) for step in reversed(steps)]
    for leaf in sorted(trace, key=lambda node: node.stop is not StopReason.FINISHED):
        if leaf.depth != len(wanted):
            continue
        path = list(_upwards(leaf, by_id))
        if [(node.text, node.step_score) for node in path[:-1]] == wanted:
            return frozenset(node.id for node in path)
    return frozenset()


def tree_rows(trace: Sequence[TraceNode], on_path: frozenset[int]) -> Iterator[Row]:
    """The rows of the whole tree below the root, top to bottom.

    Args:
        trace: Parents before children, the root first.
        on_path: Nodes of the best path.
    """
    children: dict[int, list[TraceNode]] = defaultdict(list)
    for node in trace:
        children[node.parent].append(node)
    pending = _siblings(children[-1], "", children, on_path)[::-1]  # no recursion: paths may be a thousand steps long
    while pending:
        row = pending.pop()
        if row.nodes[0].parent >= 0:
            yield row
        below = row.guide.replace("├", "│").replace("└", " ")
        if not row.rest:
            nodes = [child for node in row.nodes for child in children[node.id]]
            pending.extend(_siblings(nodes, below, children, on_path)[::-1])


def _siblings(
    nodes: Sequence[TraceNode], guide: str, children: Mapping[int, Sequence[TraceNode]], on_path: frozenset[int]
) -> list[Row]:
    """Rows for the children of one row, in the order in which they are drawn."""
    groups: dict[tuple[Fate, str], list[TraceNode]] = defaultdict(list)
    for node in nodes:
        groups[fate_of(node), one_line(node.text)].append(node)
    rows = [Row(tuple(group), fate, any(node.id in on_path for node in group)) for (fate, _), group in groups.items()]
    rows.sort(key=lambda row: (not row.best, row.fate, -max(node.step_score for node in row.nodes)))
    rows = _shorten(rows, children)
    if nodes and nodes[0].parent < 0:
        return rows
    marks = ["├"] * (len(rows) - 1) + ["└"]
    return [Row(row.nodes, row.fate, row.best, guide + mark, row.below) for row, mark in zip(rows, marks, strict=False)]


def _shorten(rows: Sequence[Row], children: Mapping[int, Sequence[TraceNode]]) -> list[Row]:
    """Tell the worst siblings of each fate together where there are more than a reader wants."""
    groups: dict[tuple[Fate, bool], list[Row]] = defaultdict(list)
    for row in rows:
        goes_on = row.best or any(children.get(node.id) for node in row.nodes)
        groups[row.fate, goes_on].append(row)
    shown: list[Row] = []
    for (fate, goes_on), group in groups.items():
        limit = _BRANCHES_SHOWN if goes_on else _ENDS_SHOWN
        if len(group) <= limit + 1:  # one row more is no longer than "1 more"
            shown.extend(group)
            continue
        hidden = tuple(node for row in group[limit:] for node in row.nodes)
        shown.extend([*group[:limit], Row(hidden, fate, best=False, below=_below(hidden, children))])
    return shown


def _below(nodes: Sequence[TraceNode], children: Mapping[int, Sequence[TraceNode]]) -> int:
    """Nodes below these (count)."""
    pending, total = list(nodes), -len(nodes)
    while pending:
        total += 1
        pending.extend(children.get(pending.pop().id, ()))
    return total


def _upwards(node: TraceNode, by_id: Mapping[int, TraceNode]) -> Iterator[TraceNode]:
    while True:
        yield node
        if node.parent < 0:
            return
        node = by_id[node.parent]
