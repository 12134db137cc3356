"""The engines behind an ETSLM, sync and async: one attempt per request; caching, retries and history are DSPy's."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import aclosing, closing, suppress
from functools import cache
from typing import Any, Self

import anyio
import dspy
from dspy import lm15
from dspy.streaming import StatusMessage

from ets_engine.protocols import Cancel, OnEvent, SearchService
from ets_engine.types import SearchEvent, SearchResult
from ets_integrations.dspy.calls import Call, between_calls, current_call
from ets_integrations.dspy.coalesce import Ticket
from ets_integrations.dspy.errors import dspy_errors
from ets_integrations.dspy.request import Question, read_request
from ets_integrations.dspy.response import progress_text, stream_rest, stream_text, to_response
from ets_integrations.dspy.source import ServiceSource

_LOGGER = logging.getLogger(__name__)
_END = object()  # the search is through


class _Engine:
    """What both engines have in common: where they search, and how they are saved.

    Args:
        source: Where searches run.

    Attributes:
        supports_function_calling: Tool calls are read from the answers.
    """

    supports_function_calling = True
    supports_reasoning = False  # the thinking is the answer's own text
    supports_response_schema = False  # nothing constrains the decoding
    supported_params = frozenset(
        {"temperature", "max_tokens", "top_p", "top_k", "stop", "seed", "tools", "tool_choice", "reasoning_effort"}
    )

    def __init__(self, source: ServiceSource) -> None:
        """See the class."""
        self.source = source

    def dump_state(self) -> dict[str, Any]:
        """Names, as JSON."""
        return self.source.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> Self:
        """The engine of these names; nothing is loaded yet."""
        return cls(ServiceSource(state["model"].removeprefix("ets/"), state.get("verifier"), state.get("service")))


class SearchEngine(_Engine):
    """Answers one `dspy.lm15.Request` by one tree search, in the calling thread."""

    def complete(self, request: lm15.Request) -> lm15.Response:
        """The winner, with candidates and figures in `provider_data["ets"]`.

        Raises:
            lm15.LM15Error: As `dspy_errors` says.
        """
        with dspy_errors():
            call = current_call()
            question = read_request(request, self.source, call)
            with closing(self._follow(question, call)) as items:
                for item in items:
                    if isinstance(item, SearchResult):
                        _count(item, question, call)
                        return to_response(request.model, item, question.toolbox)
                    _send(call.status, item)
        raise AssertionError("a search ends with a result")

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Text as soon as no branch can contradict it, progress as status messages, the rest at the end.

        Raises:
            lm15.LM15Error: As `dspy_errors` says.
        """
        yield lm15.StreamStartEvent(model=request.model)
        with dspy_errors():
            call, status = current_call(), dspy.settings.send_stream
            question, sent = read_request(request, self.source, call), ""
            with closing(self._follow(question, call)) as items:
                for item in items:
                    if isinstance(item, SearchResult):
                        _count(item, question, call)
                        yield from stream_rest(item, question.toolbox, sent)
                        return
                    _send(status, item)
                    more = _committed(item, question, sent)
                    sent += more
                    yield from stream_text(more)

    def close(self) -> None:
        """Nothing: services are borrowed."""

    def _follow(self, question: Question, call: Call) -> Generator[SearchEvent | SearchResult]:
        """The events of a search, the latest one where several wait, and then its result."""
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        ticket = _join(self.source, self.source.find(), question, call, items.put)
        try:
            ticket.future.add_done_callback(lambda _: items.put(_END))
            while (item := items.get()) is not _END:
                if items.empty():
                    yield item
            yield ticket.future.result()
        finally:
            ticket.leave()


class AsyncSearchEngine(_Engine):
    """Answers one `dspy.lm15.Request` by one tree search; a cancelled task stops its search."""

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """As `SearchEngine.complete`.

        Raises:
            lm15.LM15Error: As `dspy_errors` says.
        """
        with dspy_errors():
            call = current_call()
            question = read_request(request, self.source, call)
            async with aclosing(self._follow(question, call)) as items:
                async for item in items:
                    if isinstance(item, SearchResult):
                        _count(item, question, call)
                        return to_response(request.model, item, question.toolbox)
                    await _asend(call.status, item)
        raise AssertionError("a search ends with a result")

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """As `SearchEngine.stream`.

        Raises:
            lm15.LM15Error: As `dspy_errors` says.
        """
        yield lm15.StreamStartEvent(model=request.model)
        with dspy_errors():
            call, status = current_call(), dspy.settings.send_stream
            question, sent = read_request(request, self.source, call), ""
            async with aclosing(self._follow(question, call)) as items:
                async for item in items:
                    if isinstance(item, SearchResult):
                        _count(item, question, call)
                        for event in stream_rest(item, question.toolbox, sent):
                            yield event
                        return
                    await _asend(status, item)
                    more = _committed(item, question, sent)
                    sent += more
                    for delta in stream_text(more):
                        yield delta

    async def aclose(self) -> None:
        """Nothing: services are borrowed."""

    async def _follow(self, question: Question, call: Call) -> AsyncGenerator[SearchEvent | SearchResult]:
        find = self.source.find
        service = find() if self.source.is_found else await asyncio.to_thread(find)  # loading weights takes seconds
        loop, items = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def put(item: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(items.put_nowait, item)

        ticket = _join(self.source, service, question, call, put)
        try:
            ticket.future.add_done_callback(lambda _: put(_END))
            while (item := await items.get()) is not _END:
                if items.empty():
                    yield item
            yield ticket.future.result()
        finally:
            ticket.leave()


def _join(
    source: ServiceSource, service: SearchService, question: Question, call: Call, put: Callable[[SearchEvent], None]
) -> Ticket:
    """Start the search of a question, or take part in the one that is under way."""

    def start(on_event: OnEvent, cancel: Cancel) -> Future[SearchResult]:
        def tell(event: SearchEvent) -> None:
            on_event(event)
            if call.on_event is not None:
                call.on_event(event)

        with between_calls(), dspy.context(send_stream=None, trace=[]):  # what a verifier asks is its own affair
            return service.submit(
                question.messages,
                question.config,
                verifier=question.verifier,
                view=question.view,
                tools=question.toolbox.tools if question.toolbox else (),
                tool_choice=question.toolbox.choice if question.toolbox else "auto",
                problem_text=question.problem,
                read_step=question.read_step,
                on_event=tell,
                cancel=cancel,
            )

    return source.flights.join(question.key, start, on_event=put, cancel=call.cancel)


def _count(result: SearchResult, question: Question, call: Call) -> None:
    """Say that a question was answered, and once that its answers could not vote."""
    call.count(result)
    if question.view is None and result.finish_reason == "no_answer" and result.width > 1:
        _say_once()


@cache
def _say_once() -> None:
    _LOGGER.warning(
        "no branch states an answer that could be read, so nobody voted and the best score decided: ask through an "
        "adapter that marks the fields of an answer, as dspy.ChatAdapter, JSONAdapter and XMLAdapter do"
    )


def _committed(event: SearchEvent, question: Question, sent: str) -> str:
    """What an event adds to the text that every answer will begin with; where tools may be called, nothing does."""
    if question.toolbox is not None or not event.common_text.startswith(sent):
        return ""
    return event.common_text[len(sent) :]


def _send(stream: Any, event: SearchEvent) -> None:
    if stream is not None and event.kind == "step":
        with suppress(RuntimeError):  # a thread that is none of the stream's, one of `dspy.Parallel`'s for instance
            anyio.from_thread.run(stream.send, StatusMessage(progress_text(event)))


async def _asend(stream: Any, event: SearchEvent) -> None:
    if stream is not None and event.kind == "step":
        await stream.send(StatusMessage(progress_text(event)))
