"""The live view of a running comparison: how far it is, what it measures, and the time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class BenchProgress:
    """A progress bar over searches; without a terminal it shows nothing.

    Args:
        console: Where it is drawn, usually on standard error.
    """

    def __init__(self, console: Console) -> None:
        """See the class."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("Loading the models", total=None)

    def start(self, total: int) -> None:
        """Say how many searches there will be."""
        self._progress.reset(self._task, total=total, description="Searching")

    def advance(self, method: str) -> None:
        """One search is done."""
        self._progress.update(self._task, advance=1, description=method)

    def __enter__(self) -> BenchProgress:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()
