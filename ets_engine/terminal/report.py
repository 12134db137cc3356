"""The view of a finished search: the answer, why it was believed, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ets_engine.terminal.words import (
    bandwidth,
    clean,
    count,
    one_line,
    plural,
    score_bar,
    score_style,
    seconds,
    size,
)
from ets_engine.types import Candidate, KVStats, SearchResult

_HEADINGS = 11  # cells of the left column: the longest heading
_OTHERS_SHOWN = 5  # runner-up answers; the rest are in the JSON
_MEASURE = 100  # cells; longer lines are hard to read, however wide the terminal


def result_view(result: SearchResult) -> RenderableType:
    """The whole result of a search, without its tree."""
    return _Report(result)


def no_answer_reason(result: SearchResult) -> str:
    """Why a result has no answer, in half a sentence."""
    finished = plural(result.trajectories, "trajectory", "trajectories") + " finished"
    match result.finish_reason:
        case "cancelled" | "deadline" if not result.trajectories:
            return "stopped before any trajectory finished"
        case "cancelled" | "deadline":
            return f"stopped early: {finished}, none with a legible answer"
        case "error":
            return f"every branch failed ({plural(result.num_errors, 'error')})"
        case _ if result.trajectories:
            return f"{finished}, none with a legible answer"
        case _:
            return "every branch ran out of tokens"


@dataclass(frozen=True, slots=True)
class _Report:
    result: SearchResult

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Sections below each other, their headings in a column of their own."""
        ascii_only, result = options.ascii_only, self.result
        dot = "-" if ascii_only else "·"
        sections: list[tuple[str, RenderableType]] = [
            ("Problem", Text(clean(result.problem).strip())),
            ("Answer", _answer(result, dot)),
        ]
        if result.steps:
            sections.append(("Steps" if result.answer is not None else "Best path", _steps(result, ascii_only)))
        if others := result.candidates[1:] if result.answer is not None else result.candidates:
            sections.append(("Runner-up" if len(others) == 1 else "Runners-up", _others(others)))
        narrow = options.update(width=min(options.max_width, _MEASURE))
        for heading, section in sections:
            page = Table.grid(padding=(0, 2, 0, 0), expand=True)
            page.add_column(width=_HEADINGS, style="dim")
            page.add_column(ratio=1, overflow="fold")
            page.add_row(heading, section)
            yield from console.render(page, narrow)
            yield Text()
        yield from console.render(_figures(result, dot), narrow)


def _answer(result: SearchResult, dot: str) -> RenderableType:
    if result.answer is None:
        lines = [Text("none", "bold red"), Text(no_answer_reason(result), "dim")]
        return Group(*lines)
    lines = [Text(clean(result.answer).strip(), "bold green")]
    support = [f"score {result.score:.2f}"]
    if result.candidates:
        winner = result.candidates[0]
        support.append(f"{count(winner.votes)} of {plural(result.trajectories, 'trajectory', 'trajectories')}")
        support.append(f"weight {winner.weight:.2f}")
    lines.append(Text(f" {dot} ".join(support), "dim"))
    if result.finish_reason in ("cancelled", "deadline"):
        lines.append(Text("stopped early: the best so far", "yellow"))
    return Group(*lines)


def _steps(result: SearchResult, ascii_only: bool) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="dim")
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for number, step in enumerate(result.steps, start=1):
        table.add_row(
            str(number),
            Text(text) if (text := clean(step.text).strip()) else Text("(no text)", "dim italic"),
            score_bar(step.score, ascii_only=ascii_only),
            Text(f"{step.score:.2f}", score_style(step.score)),
        )
    return table


def _others(candidates: tuple[Candidate, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("answer", no_wrap=True, overflow="ellipsis")
    for name in ("votes", "weight", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    for candidate in candidates[:_OTHERS_SHOWN]:
        table.add_row(
            Text(one_line(candidate.answer)),
            count(candidate.votes),
            f"{candidate.weight:.2f}",
            Text(f"{candidate.score:.2f}", score_style(candidate.score)),
        )
    if len(candidates) > _OTHERS_SHOWN:
        table.add_row(Text(f"{len(candidates) - _OTHERS_SHOWN} more", "dim"))
    return table


def _figures(result: SearchResult, dot: str) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=_HEADINGS, style="dim")
    table.add_column(no_wrap=True, style="bold")
    table.add_column(style="dim")
    kv, timing = result.kv, result.timing
    if kv is not None:
        shared = f"{count(kv.path_tokens)} tokens on all paths, {count(kv.unique_tokens)} distinct"
        table.add_row("KV sharing", f"{kv.sharing_ratio:.2f}x", shared)
        table.add_row("KV policy", *_kv(kv, dot))
    if result.verifier_kv is not None:
        table.add_row("KV verifier", *_kv(result.verifier_kv, dot))
    if timing.bytes_moved:  # a server's are not known
        moved = f"{size(timing.bytes_moved)} moved through memory"
        table.add_row("Bandwidth", bandwidth(timing.bandwidth_gb_s), moved)
    parts = ("policy", timing.policy_s), ("verifier", timing.verifier_s), ("selection", timing.select_s)
    split = f" {dot} ".join(f"{name} {seconds(spent_s)}" for name, spent_s in parts)
    table.add_row("Time", seconds(timing.wall_s), split)
    rate = f" {dot} {count(result.generated_tokens / timing.wall_s)} per second" if timing.wall_s > 0 else ""
    read = f"generated{rate} {dot} verifier read {count(result.verifier_tokens)}"
    table.add_row("Tokens", count(result.generated_tokens), read)
    ended = f"{count(result.trajectories)} finished"
    if result.num_errors:
        ended += f" {dot} {count(result.num_errors)} failed"
    table.add_row("Search", result.strategy, f"width {count(result.width)} {dot} seed {result.seed} {dot} {ended}")
    return table


def _kv(kv: KVStats, dot: str) -> tuple[str, str]:
    """Peak and mean; in tokens alone where nobody here knows the bytes of one."""
    peak, mean = f"{count(kv.peak_tokens)} tokens", f"mean {count(kv.mean_tokens)} tokens"
    if not kv.bytes_per_token:
        return peak, f"peak {dot} {mean}"
    return size(kv.peak_bytes), f"peak, {peak} {dot} {mean} ({size(kv.mean_bytes)})"
