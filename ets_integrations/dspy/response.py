"""From a search's result to DSPy's response, whole or streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from dspy import lm15

from ets_engine.tool_calls import MalformedCallError, Toolbox, Turn
from ets_engine.types import SearchEvent, SearchResult
from ets_integrations.dspy.report import describe

_PIECE = re.compile(r"\S+\s*|\s+")


def to_response(model: str, result: SearchResult, toolbox: Toolbox | None) -> lm15.Response:
    """The winner as one assistant turn; its tool calls are parts, and nobody has called them.

    Raises:
        lm15.ProviderError: Every branch failed, or none had written anything at the deadline.
    """
    turn = read_turn(result.text, toolbox)
    return lm15.Response(
        id=f"ets-{uuid4().hex}",
        model=model,
        message=lm15.Message("assistant", (*_said(turn), *to_parts(turn))),
        finish_reason=_finish_reason(result, turn),
        usage=to_usage(result),
        provider_data={"ets": describe(result)},
    )


def stream_rest(result: SearchResult, toolbox: Toolbox | None, sent: str) -> Iterator[lm15.StreamDeltaEvent | Any]:
    """The events that are still to come once a search is through.

    Args:
        result: Of the search.
        toolbox: The tools, None = there are none.
        sent: What was streamed already.

    Raises:
        lm15.ProviderError: As `to_response`, or what was streamed is no part of the answer.
    """
    turn = read_turn(result.text, toolbox)
    reason = _finish_reason(result, turn)
    if not turn.text.startswith(sent):
        raise lm15.ProviderError(f"the search ended with {turn.text[:80]!r} after {sent[-80:]!r} was streamed")
    yield from stream_text(turn.text[len(sent) :])
    for place, part in enumerate(to_parts(turn), 1):
        delta = lm15.ToolCallDelta(json.dumps(part.input), part_index=place, id=part.id, name=part.name)
        yield lm15.StreamDeltaEvent(delta)
    yield lm15.StreamEndEvent(reason, to_usage(result), {"ets": describe(result)})


def stream_text(text: str) -> Iterator[lm15.StreamDeltaEvent]:
    """A text word by word: `dspy.streaming.StreamListener` takes a piece with whole fields in it for a cache hit."""
    for piece in _PIECE.findall(text):
        yield lm15.StreamDeltaEvent(lm15.TextDelta(piece))


def to_usage(result: SearchResult) -> lm15.Usage:
    """Tokens as reasoning models report them: output is the whole tree, reasoning what the answer does not show."""
    return lm15.Usage(
        input_tokens=result.prompt_tokens,
        output_tokens=result.generated_tokens,
        cache_read_tokens=result.cached_prompt_tokens,
        reasoning_tokens=max(0, result.generated_tokens - result.path_tokens),
    )


def read_turn(text: str, toolbox: Toolbox | None) -> Turn:
    """Text and calls of a turn; one whose calls are no valid ones is text."""
    if toolbox is None:
        return Turn(text)
    try:
        return toolbox.read(text)
    except MalformedCallError:
        return Turn(text)


def to_parts(turn: Turn) -> list[lm15.ToolCallPart]:
    """A turn's calls as parts of a message."""
    return [lm15.ToolCallPart(f"call_{uuid4().hex[:24]}", call.name, call.arguments) for call in turn.calls]


def progress_text(event: SearchEvent) -> str:
    """One line about a depth.

    Example:
        >>> progress_text(SearchEvent(kind="step", depth=3, frontier=12, kept=5, pruned=7, finished=4, best_score=0.83,
        ...     kv_unique_tokens=120, kv_path_tokens=300, generated_tokens=400))
        'ets step 3: 5 of 12 branches kept, 4 finished, best score 0.83'
    """
    branches = f"{event.kept} of {event.frontier} branches kept"
    return f"ets step {event.depth}: {branches}, {event.finished} finished, best score {event.best_score:.2f}"


def _said(turn: Turn) -> list[lm15.TextPart]:
    return [lm15.TextPart(turn.text)] if turn.text or not turn.calls else []


def _finish_reason(result: SearchResult, turn: Turn) -> Any:
    if result.finish_reason == "error":
        raise lm15.ProviderError(
            f"all {result.num_errors} branches failed: the model's or the verifier's function raised on each; the log "
            "has the first error of a verifier"
        )
    if result.finish_reason == "deadline" and not result.text.strip():
        raise lm15.ProviderError("deadline_s passed before a branch had written anything: give the search more time")
    if turn.calls:
        return "tool_call"
    return "stop" if result.answer is not None or result.finish_reason == "no_answer" else "length"
