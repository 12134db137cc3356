"""What a search looks like in a terminal: pure views of events and results; nothing here runs a search."""

from ets_engine.terminal.progress import LiveProgress, progress_view
from ets_engine.terminal.report import result_view
from ets_engine.terminal.tree import tree_view

__all__ = ["LiveProgress", "progress_view", "result_view", "tree_view"]
