"""The live view of a running search: what the last event said, and how fast tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ets_engine.terminal.words import count, one_line, seconds
from ets_engine.types import SearchEvent

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAMES_ASCII = "|/-\\"
_FRAMES_PER_S = 8


def progress_view(
    event: SearchEvent | None,
    *,
    elapsed_s: float,
    event_s: float = 0.0,
    width: int,
    stopping: bool = False,
    ascii_only: bool = False,
) -> RenderableType:
    """A few calm lines about a search under way; one line until its first depth is done.

    Args:
        event: The last event, None before the first.
        elapsed_s: Since the search was asked for.
        event_s: From then to the last event: the time over which its tokens were generated.
        width: Trajectories that the search keeps alive.
        stopping: Whether the caller asked it to stop.
        ascii_only: Whether the terminal knows nothing else.
    """
    frames, dot = (_FRAMES_ASCII, "-") if ascii_only else (_FRAMES, "·")
    if stopping:
        title = "Stopping: the best so far follows (Ctrl-C again aborts)"
    elif event is None or event.depth == 0:
        title = "Searching"
    else:
        title = f"Searching {dot} depth {event.depth}"
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(width=1)
    head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    head.add_column(justify="right", no_wrap=True)
    spinner = frames[int(elapsed_s * _FRAMES_PER_S) % len(frames)]
    head.add_row(Text(spinner, "cyan"), Text(title, "bold"), Text(seconds(elapsed_s), "dim"))
    if event is None or event.depth == 0:
        return head

    body = Table.grid(expand=True, padding=(0, 2, 0, 0))
    body.add_column(width=8, no_wrap=True, style="dim")
    body.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    rate = f" ({count(event.generated_tokens / event_s)} tokens/s)" if event_s > 0 else ""
    body.add_row(
        "frontier",
        _facts((event.frontier, "open"), (event.kept, "kept"), (event.pruned, "pruned"), dot=dot)
        + Text(f" {dot} best score {event.best_score:.2f}" if event.frontier else ""),
    )
    body.add_row("finished", Text(f"{count(event.finished)} of {count(width)}"))
    body.add_row("tokens", Text(f"{count(event.generated_tokens)} generated{rate}"))
    shared = f", {count(event.kv_path_tokens)} without sharing" if event.kv_path_tokens else ""
    body.add_row("KV cache", Text(f"{count(event.kv_unique_tokens)} tokens{shared}"))
    if settled := one_line(event.common_text):
        body.add_row("settled", Text(settled, "italic"))
    return Group(head, Padding(body, (0, 0, 0, 2)))


class LiveProgress:
    """Draws the progress of one search on a console until the block is left; then it is gone without a trace.

    It may be told of events from any thread. On a console that is no terminal it draws nothing.

    Args:
        console: Where to draw.
        width: Trajectories that the search keeps alive.
        is_stopping: Whether the caller asked it to stop.
        clock: Seconds as a number.
    """

    def __init__(
        self,
        console: Console,
        *,
        width: int,
        is_stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See the class."""
        self._width = width
        self._clock = clock
        self._started_s = clock()
        self._event: SearchEvent | None = None
        self._event_s = 0.0
        self._is_stopping = is_stopping
        self._live = Live(
            self, console=console, transient=True, refresh_per_second=_FRAMES_PER_S, redirect_stdout=False
        )

    def __enter__(self) -> LiveProgress:
        """Start drawing; the time counts from here."""
        self._started_s = self._clock()
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wipe what was drawn."""
        self._live.stop()

    def update(self, event: SearchEvent) -> None:
        """Show this event from the next refresh on."""
        self._event_s = self._clock() - self._started_s
        self._event = event

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The view of this moment."""
        yield progress_view(
            self._event,
            elapsed_s=self._clock() - self._started_s,
            event_s=self._event_s,
            width=self._width,
            stopping=self._is_stopping(),
            ascii_only=options.ascii_only,
        )


def _facts(*facts: tuple[int, str], dot: str) -> Text:
    return Text(f" {dot} ").join([Text(f"{count(number)} {word}") for number, word in facts])
