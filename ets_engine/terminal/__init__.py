"""What a search looks like in a terminal: pure views of events and results; nothing here runs a search."""

from ets_engine.terminal.bench import BenchProgress
from ets_engine.terminal.progress import LiveProgress, progress_view
from ets_engine.terminal.report import no_answer_reason, result_view
from ets_engine.terminal.tree import tree_view

__all__ = ["BenchProgress", "LiveProgress", "no_answer_reason", "progress_view", "result_view", "tree_view"]
