"""`ETSRunnable`: a tree search as a LangChain Runnable, with its scores, candidates and figures; and as a tool."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, closing, contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Event
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.messages import BaseMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.tools import BaseTool, StructuredTool, ToolException
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ets_engine.errors import ConfigError, ContextLengthError, EngineError, PoolExhaustedError, ReferenceDomainError
from ets_engine.messages import Prompt
from ets_engine.protocols import SearchOptions
from ets_engine.types import SearchEvent, SearchResult
from ets_integrations.langchain.batches import SearchBatches
from ets_integrations.langchain.events import Progress, emit
from ets_integrations.langchain.inner_calls import SearchLimit, within
from ets_integrations.langchain.messages import check_result, from_langchain
from ets_integrations.langchain.watch import Submit, await_result, awatch, wait, watch

Question = str | Mapping[str, Any] | Sequence[Any] | PromptValue
"""A text, messages, a prompt's output, or a dict that holds one of them under "problem", "question" or "input"."""

KEYS = ("problem", "question", "input", "messages")


class ETSRunnable(SearchBatches, RunnableSerializable[Any, SearchResult]):
    """Answers a question by tree search and returns all that was found: answer, candidates, scores, KV figures.

    `stream` and `astream` yield the search's events, then the result; callbacks hear of its progress however it is
    called. `SearchSettings` has the fields; they can be made configurable, and `SearchConfig`'s may be given per call.

    Example:
        >>> solve = ETSRunnable(model="reference", width=16, seed=0)
        >>> result = solve.invoke("Use 1, 3, 7 and 17 to make 22.")
        >>> eval(result.answer), result.kv.sharing_ratio > 1.0
        (22, True)
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True)

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        self.resolve_search()  # refuses what no search could honour
        return self

    def invoke(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> SearchResult:
        """Search, and wait; progress goes to the callbacks of `config` as "ets.*" events.

        Raises:
            EngineError: Every branch failed, or the engine did.
            ETSError: The question or a setting is refused.
        """
        return self._call_with_config(partial(self._search, settings=kwargs), input, config, run_type="chain")

    async def ainvoke(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> SearchResult:
        """`invoke` for an event loop; a cancelled task stops its search."""
        return await self._acall_with_config(partial(self._asearch, settings=kwargs), input, config, run_type="chain")

    def batch(
        self,
        inputs: list[Question],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[SearchResult]:
        """Search for all answers together: as many at a time as the engine takes, or `max_concurrency`.

        Progress goes to the callbacks of each one's `config`, as with `invoke`.

        Args:
            inputs: Questions.
            config: For all, or one each.
            return_exceptions: Whether what one question raises stands in its place, instead of being raised.
            kwargs: Settings of these searches.
        """
        first = config if config is None or isinstance(config, Mapping) else next(iter(config), None)
        most = ensure_config(first).get("max_concurrency")  # LangChain reads the first one's too
        most = None if isinstance(most, SearchLimit) else most
        return self._batch_with_config(
            partial(self._search_all, most=most, settings=kwargs),
            inputs,
            config,
            return_exceptions=return_exceptions,
        )

    def stream(
        self, input: Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[SearchEvent | SearchResult]:  # type: ignore[override]
        """The search's events, then its result; leaving the iterator stops the search."""
        yield from self._transform_stream_with_config(
            iter([input]), partial(self._watch, settings=kwargs), config, run_type="chain"
        )

    async def astream(
        self, input: Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[SearchEvent | SearchResult]:  # type: ignore[override]
        """`stream` for an event loop."""

        async def questions() -> AsyncIterator[Question]:
            yield input

        items = self._atransform_stream_with_config(
            questions(), partial(self._awatch, settings=kwargs), config, run_type="chain"
        )
        async with aclosing(items):
            async for item in items:
                yield item

    def _submit(self, question: Question, settings: Mapping[str, Any]) -> Submit:
        prompt = read_question(question)
        service = self.find_service(settings.get("model"))
        config = self.draw_seed(self.resolve_search(settings), settings)
        options = SearchOptions(verifier=self.scorer())

        def submit(on_event: Callable[[SearchEvent], None], cancel: Event) -> Future[SearchResult]:
            return service.submit(prompt, config, **{**options, "on_event": on_event, "cancel": cancel})

        return submit

    def _search(
        self, question: Question, run_manager: CallbackManagerForChainRun, settings: Mapping[str, Any]
    ) -> SearchResult:
        return check_result(wait(self._submit(question, settings), run_manager))

    async def _asearch(
        self, question: Question, run_manager: AsyncCallbackManagerForChainRun, settings: Mapping[str, Any]
    ) -> SearchResult:
        submit = await self.make_off_loop(partial(self._submit, question, settings), settings.get("model"))
        return check_result(await await_result(submit, run_manager))

    def _search_all(
        self,
        questions: list[Question],
        run_manager: list[CallbackManagerForChainRun],
        config: list[RunnableConfig],
        most: int | None,
        settings: Mapping[str, Any],
    ) -> list[SearchResult | Exception]:
        """All answers; what a search tells comes to its own callbacks, in this thread."""
        most = max(1, most or self.find_service(settings.get("model")).max_concurrent_searches)
        told: SimpleQueue[tuple[int, SearchEvent | None]] = SimpleQueue()  # by question; None = that search has ended
        progress = [Progress() for _ in questions]
        begun: list[Future[SearchResult] | Exception] = []
        running, cancels = 0, [Event() for _ in questions]
        try:
            while running or len(begun) < len(questions):
                if running < most and (place := len(begun)) < len(questions):
                    tell = partial(_tell, told, place)
                    run = run_manager[place], config[place]
                    begun.append(self._begin(questions[place], run, settings, tell, cancels[place]))
                    running += isinstance(begun[-1], Future)
                    continue
                place, event = told.get()
                if event is None:
                    running -= 1
                    continue
                try:
                    for name, data in progress[place].pick(event):
                        emit(run_manager[place], name, data)
                except Exception as error:  # of a handler that is to be heard
                    begun[place] = error
                    cancels[place].set()
            return [_outcome(one) for one in begun]
        finally:
            for cancel in cancels:  # after an interrupt nobody waits for the others
                cancel.set()

    def _begin(
        self,
        question: Question,
        run: tuple[CallbackManagerForChainRun, RunnableConfig],
        settings: Mapping[str, Any],
        tell: Callable[[SearchEvent | None], None],
        cancel: Event,
    ) -> Future[SearchResult] | Exception:
        """A search that tells its events, and None at its end; or why there is none."""
        try:
            with within(run[0], config=run[1]) as context:
                future = context.run(self._submit(question, settings), tell, cancel)
        except Exception as error:
            return error
        future.add_done_callback(lambda _: tell(None))
        return future

    def _watch(
        self, questions: Iterator[Question], run_manager: CallbackManagerForChainRun, settings: Mapping[str, Any]
    ) -> Iterator[SearchEvent | SearchResult]:
        for question in questions:
            with closing(watch(self._submit(question, settings), run_manager)) as items:
                for item in items:
                    yield check_result(item) if isinstance(item, SearchResult) else item

    async def _awatch(
        self,
        questions: AsyncIterator[Question],
        run_manager: AsyncCallbackManagerForChainRun,
        settings: Mapping[str, Any],
    ) -> AsyncIterator[SearchEvent | SearchResult]:
        async for question in questions:
            submit = await self.make_off_loop(partial(self._submit, question, settings), settings.get("model"))
            async with aclosing(awatch(submit, run_manager)) as items:
                async for item in items:
                    yield check_result(item) if isinstance(item, SearchResult) else item


def _tell(told: SimpleQueue[tuple[int, SearchEvent | None]], place: int, event: SearchEvent | None) -> None:
    told.put((place, event))


class _Problem(BaseModel):
    question: str = Field(description="The whole question, with every figure and condition that the answer needs.")


def ets_tool(
    solver: ETSRunnable,
    name: str = "solve_hard_problem",
    description: str = (
        "Solves one hard, self-contained problem by careful search over many lines of reasoning. Slow: use it only "
        "where a direct answer is likely to be wrong. Give the whole problem in plain text."
    ),
) -> BaseTool:
    """A tool for agents: it takes a question and returns the answer with its reasoning.

    A question that is refused, and a search that fails, is an error message to the agent, which may try another way;
    settings and models that cannot work are raised.

    Args:
        solver: Searches.
        name: How the agent calls it.
        description: When the agent should.

    Example:
        >>> tool = ets_tool(ETSRunnable(model="reference", width=16, seed=0))
        >>> eval(tool.invoke({"question": "Use 1, 3, 7 and 17 to make 22."}).splitlines()[0].removeprefix("Answer: "))
        22
    """

    def solve(question: str) -> str:
        with _told():
            return _report(solver.invoke(question))

    async def asolve(question: str) -> str:
        with _told():
            return _report(await solver.ainvoke(question))

    return StructuredTool.from_function(
        solve, coroutine=asolve, name=name, description=description, args_schema=_Problem, handle_tool_error=True
    )


@contextmanager
def _told() -> Iterator[None]:
    """What an agent can do something about becomes its tool's error message."""
    try:
        yield
    except (ReferenceDomainError, ContextLengthError, EngineError, PoolExhaustedError) as error:
        raise ToolException(f"The search failed: {error}") from error


def read_question(question: Question) -> Prompt:
    """The engine's prompt for whatever a chain hands over.

    Raises:
        ConfigError: It holds no question.

    Example:
        >>> read_question({"question": "What is 1+1?"})
        'What is 1+1?'
    """
    if isinstance(question, str):
        return question
    if isinstance(question, PromptValue):
        return from_langchain(question.to_messages())
    if isinstance(question, BaseMessage):
        return from_langchain([question])
    if isinstance(question, Mapping) and "role" not in question:
        found = next((question[key] for key in KEYS if key in question), None)
        if found is None:
            raise ConfigError(f"input={question!r:.100}: give it one of the keys {', '.join(KEYS)}")
        return read_question(found)
    if isinstance(question, Sequence):
        return from_langchain(convert_to_messages(question))
    raise ConfigError(f"input={question!r:.100}: give a text, messages, a prompt's output or a dict")


def _report(result: SearchResult) -> str:
    if result.answer is None:
        return f"No answer was found ({result.finish_reason}). The best attempt:\n{result.text}"
    return f"Answer: {result.answer}\nReasoning:\n{result.text}"


def _outcome(pending: Future[SearchResult] | Exception) -> SearchResult | Exception:
    if isinstance(pending, Exception):
        return pending
    try:
        return check_result(pending.result())
    except Exception as error:
        return error
