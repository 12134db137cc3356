"""A search service whose policy is a script: the real loop, selectors, votes and tool views, no model."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ets_engine.hosted import HostedEngine, ProposalRequest
from ets_engine.types import Step, StopReason

Reply = Callable[[ProposalRequest], str]


class Script:
    """Writes whole turns in a few steps; every branch of a search writes the same, but for a branch letter.

    Args:
        reply: What it writes, blank lines between steps; None answers as the tools and the messages ask.
        delay_s: Of every depth.

    Attributes:
        requests: All that it was asked.
        most_at_once: Most searches that it served at a time.
        gate: While it is clear, no step is written.
    """

    def __init__(self, reply: Reply | None = None, *, delay_s: float = 0.0) -> None:
        self._reply = reply or answer
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._at_once = 0
        self.requests: list[ProposalRequest] = []
        self.most_at_once = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, request: ProposalRequest) -> list[Step]:
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.gate.wait(30)
            time.sleep(self._delay_s)
            whole = self._reply(request)
            return [self._next(whole, partial) for partial in request.partials]
        finally:
            with self._lock:
                self._at_once -= 1

    def _next(self, whole: str, partial: str) -> Step:
        left = whole[len(partial) :]
        end = left.find("\n\n")
        if end < 0:
            return Step(left, len(left.split()) or 1, StopReason.FINISHED)
        return Step(left[: end + 2], len(left[:end].split()) or 1)


def answer(request: ProposalRequest) -> str:
    """A tool call where tools are given and the last message is no tool's, else two steps of text."""
    last = request.messages[-1]
    if not request.tools or last["role"] == "tool":
        seen = (last.get("content") or "")[:60]
        return f"Hello, you said: {seen}\n\nThe answer is 42."
    text = " ".join(message.get("content") or "" for message in request.messages)
    tool = pick_tool(request.tools, last.get("content") or "")
    function = tool.get("function", tool)
    call = {"name": function["name"], "arguments": make_arguments(function.get("parameters") or {}, text)}
    return f"I call a tool.\n\n<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"


def pick_tool(tools: Sequence[Mapping[str, Any]], text: str) -> Mapping[str, Any]:
    """The tool that the text names, else the first."""
    return next((tool for tool in tools if tool.get("function", tool)["name"] in text), tools[0])


def make_arguments(schema: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Arguments that fit a schema, numbers and quoted texts taken from the conversation."""
    required = schema.get("required") or ()
    return {name: _make(part, text) for name, part in (schema.get("properties") or {}).items() if name in required}


def _make(schema: Mapping[str, Any], text: str) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "integer":
            return int((re.findall(r"\((\d+)\)|(?<!\w)(\d+)(?!\w)", text) or [("3", "")])[-1][0] or 3)
        case "number":
            return 3.0
        case "boolean":
            return True
        case "array":
            return []
        case "object":
            return make_arguments(schema, text)
        case _:
            quoted = re.findall(r"'([^']+)'|\"([^\"]+)\"", text)
            return next((one or two for one, two in quoted), "something")


def scripted(
    reply: Reply | None = None, *, name: str = "fake/ets", delay_s: float = 0.0, verifier: Any = None
) -> tuple[HostedEngine, Script]:
    """A service and its script."""
    script = Script(reply, delay_s=delay_s)
    return HostedEngine(script, verifier or prefer_long, name=name), script


def prefer_long(problem: str, steps: Sequence[str]) -> float:
    return min(1.0, 0.1 * len(steps))


class Spy:
    """A service that remembers what was submitted to another one."""

    def __init__(self, service: HostedEngine) -> None:
        self._service = service
        self.name = service.name
        self.max_concurrent_searches = service.max_concurrent_searches
        self.submitted: list[tuple[Any, Any, Any]] = []  # problem, config, options
        self.futures: list[Any] = []

    def submit(self, problem: Any, config: Any = None, **options: Any) -> Any:
        self.submitted.append((problem, config, options))
        self.futures.append(self._service.submit(problem, config, **options))
        return self.futures[-1]

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def reasons(self) -> list[str]:
        """Why each search ended."""
        return ["uncalled" if one.cancelled() else one.result(timeout=30).finish_reason for one in self.futures]


def spied(reply: Reply | None = None, **changes: Any) -> tuple[Spy, Script]:
    """A spied service and its script."""
    service, script = scripted(reply, **changes)
    return Spy(service), script
