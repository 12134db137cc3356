"""`ChatETS`: a LangChain chat model whose answer is the winner of a tree search."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any, Literal, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, model_validator

import ets_engine
from ets_engine.answers import extract_answer, same_answer
from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError, NoUsableAnswerError
from ets_engine.messages import Message
from ets_engine.protocols import OnEvent, SearchOptions, SearchService
from ets_engine.tool_calls import MalformedCallError, Toolbox, ToolView, Turn
from ets_engine.types import SearchEvent, SearchResult
from ets_integrations.langchain.batches import SearchBatches
from ets_integrations.langchain.messages import (
    check_result,
    figures_of,
    from_langchain,
    read_tool_choice,
    tool_calls_of,
    usage_of,
)
from ets_integrations.langchain.watch import await_result, awatch, wait, watch


class ChatETS(SearchBatches, BaseChatModel):
    """A chat model that answers by tree search: one changed line in a chain, a graph or an agent.

    The search's tree, its KV cache and its verifier are the engine's; all searches of a process advance together, so
    `batch` and `abatch` are how to ask many questions. Nothing is loaded before the first call.

    Attributes:
        output: "full" returns the winning solution, "answer" its answer alone, with the solution as reasoning; nothing
            where no solution was finished. A finished one that states no answer, prose say, is returned whole.
        max_retries: Taken as from every chat model, and not used: a branch that fails leaves the others, and a search
            that fails is for `with_retry`.

    `SearchSettings` has the fields that decide the search. `width`, `strategy`, `temperature` and every other field of
    `SearchConfig` may also be given per call or with `bind`.

    Example:
        >>> from langchain_core.output_parsers import StrOutputParser
        >>> from langchain_core.prompts import PromptTemplate
        >>> prompt = PromptTemplate.from_template("Use {numbers} to make {goal}.")
        >>> chain = prompt | ChatETS(model="reference", width=16, seed=0, output="answer") | StrOutputParser()
        >>> eval(chain.invoke({"numbers": "1, 3, 7 and 17", "goal": 22}))
        22
    """

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True)

    output: Literal["full", "answer"] = "full"
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    max_retries: int | None = None
    streaming: bool = False

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        self.resolve_search()  # refuses what no search could honour
        return self

    @model_validator(mode="after")
    def _set_ets_version(self) -> Self:
        self._add_version("ets-integrations", ets_engine.__version__)
        return self

    # ------------------------------------------------------------------ answering

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._prepare(messages, stop, kwargs)
        return self._answer(call, wait(call.submit, run_manager))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = await self.make_off_loop(partial(self._prepare, messages, stop, kwargs), kwargs.get("model"))
        return self._answer(call, await await_result(call.submit, run_manager))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._prepare(messages, stop, kwargs)
        said = _Said(streams=self._streams_text(call))
        with closing(watch(call.submit, run_manager)) as items:
            for item in items:
                yield from self._chunks(call, said, item)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call = await self.make_off_loop(partial(self._prepare, messages, stop, kwargs), kwargs.get("model"))
        said = _Said(streams=self._streams_text(call))
        async with aclosing(awatch(call.submit, run_manager)) as items:
            async for item in items:
                for chunk in self._chunks(call, said, item):
                    yield chunk

    def _prepare(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]) -> _Call:
        """One call, checked; nothing is submitted yet."""
        tools = _read_tools(kwargs.get("tools") or ())
        choice, parallel = read_tool_choice(kwargs.get("tool_choice")), kwargs.get("parallel_tool_calls")
        toolbox = Toolbox(tuple(tools), choice, max_calls=1 if parallel is False else None)
        _check_format(kwargs.get("response_format"))
        config = self.draw_seed(self.resolve_search(kwargs, stop=stop), kwargs)
        options = SearchOptions(verifier=self.scorer())
        if tools and toolbox.choice != "none":
            options["tools"], options["tool_choice"] = tools, toolbox.choice
            options["view"] = ToolView(toolbox, _read_answer, same_answer)
        model = kwargs.get("model")
        return _Call(self.find_service(model), from_langchain(messages), config, options, toolbox, self.model_id(model))

    def _answer(self, call: _Call, result: SearchResult) -> ChatResult:
        turn = call.read(result)
        message = AIMessage(
            content=self._content(turn, result),
            additional_kwargs=self._reasoning(turn, result),
            tool_calls=tool_calls_of(turn),
            usage_metadata=usage_of(result),
            response_metadata=call.metadata(turn, result),
        )
        return ChatResult(generations=[ChatGeneration(message=message)], llm_output={"model_name": call.model})

    def _streams_text(self, call: _Call) -> bool:
        """Whether what all branches have in common is the beginning of the answer."""
        return self.output == "full" and "view" not in call.options

    def _chunks(self, call: _Call, said: _Said, item: SearchEvent | SearchResult) -> Iterator[ChatGenerationChunk]:
        """New text that no later pruning can take back, and all the rest with the result."""
        if isinstance(item, SearchEvent):
            if new := said.more(item.common_text):
                yield ChatGenerationChunk(message=AIMessageChunk(content=new))
            return
        turn = call.read(item)
        chunk = AIMessageChunk(
            content=said.rest(self._content(turn, item)),
            additional_kwargs=self._reasoning(turn, item),
            tool_call_chunks=[
                tool_call_chunk(name=one["name"], args=json.dumps(one["args"]), id=one["id"], index=index)
                for index, one in enumerate(tool_calls_of(turn))
            ],
            usage_metadata=usage_of(item),
            response_metadata=call.metadata(turn, item),
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=chunk)

    def _content(self, turn: Turn, result: SearchResult) -> str:
        if not self._is_split(turn, result):
            return turn.text
        return result.answer or ""

    def _reasoning(self, turn: Turn, result: SearchResult) -> dict[str, Any]:
        return {"reasoning_content": turn.text} if self._is_split(turn, result) else {}

    def _is_split(self, turn: Turn, result: SearchResult) -> bool:
        """Whether the text is the reasoning, and the answer, if there is one, the content; prose is its own answer."""
        is_prose = result.answer is None and result.trajectories
        return self.output == "answer" and not turn.calls and not is_prose

    # ------------------------------------------------------------------ composing

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools: a leaf that is no valid turn is no answer, and the winner's calls are returned.

        Nothing is called inside the search.

        Args:
            tools: As everywhere in LangChain.
            tool_choice: "auto", "none", "any" (or "required", True), a tool's name, or OpenAI's dict.
            strict: Whether schemas are marked as strict; every call is checked against its schema anyway.
            kwargs: More settings of the calls; with `parallel_tool_calls=False` a turn of two calls is no answer.

        Raises:
            ConfigError: `tool_choice` names none of the tools, or one is no function: a provider's own, for instance.
        """
        formatted = _read_tools(tools, strict)
        choice = read_tool_choice(tool_choice)
        known = ["auto", "none", "any", *(tool["function"]["name"] for tool in formatted)]
        if choice not in known:
            raise ConfigError(f"tool_choice={choice!r}: choose one of {known}")
        return super().bind(tools=formatted, tool_choice=choice, **kwargs)

    # ------------------------------------------------------------------ what LangChain asks about a model

    @property
    def _llm_type(self) -> str:
        return "ets"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**self.identity(), "output": self.output}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"], params["ls_model_name"] = "ets", self.model_id(kwargs.get("model"))
        config = self.resolve_search(kwargs, stop=stop)
        params["ls_temperature"] = config.temperature
        params["ls_max_tokens"] = config.max_tokens
        return params

    def _resolve_model_profile(self) -> ModelProfile:
        return ModelProfile(
            name=self.model, text_inputs=True, text_outputs=True, tool_calling=True, structured_output=False,
            reasoning_output=True,
        )  # fmt: skip

    def get_num_tokens(self, text: str) -> int:
        """Tokens of a text as the policy reads it (count)."""
        return self.find_service().count_tokens(text)

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of texts, tool calls and tools as the policy reads them (count); a chat template adds a few."""
        read: list[str] = []
        for message in from_langchain(messages, texts_only=True):
            read.append(message["content"] or "")
            read += [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
        read += [json.dumps(tool) for tool in _read_tools(tools or ())]
        return sum(map(self.get_num_tokens, read))

    def get_token_ids(self, text: str) -> list[int]:
        """Not offered: a search service counts tokens, it need not have a tokenizer here.

        Raises:
            NotImplementedError: Always; use `get_num_tokens`.
        """
        raise NotImplementedError("ChatETS counts tokens (get_num_tokens), it gives no ids")


def _read_answer(problem: str, text: str) -> str | None:
    """What a turn without calls votes for: the answer that it states, else all that it says."""
    return extract_answer(text) or text.strip() or None


def _read_tools(tools: Sequence[Any], strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools as OpenAI writes them.

    Raises:
        ConfigError: One is no function.
    """
    formatted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
    for tool in formatted:
        if "function" not in tool:
            kind = tool.get("type")
            raise ConfigError(f"tool of type {kind!r}: only its provider runs it; give a function, a tool or a schema")
    return formatted


def _check_format(response_format: Any) -> None:
    """Refuse a provider's own way to structured output.

    Raises:
        ConfigError: It asks for anything but text.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else response_format
    if kind not in (None, "text"):
        raise ConfigError(
            f"response_format={response_format!r:.100}: use with_structured_output(schema), or in an agent "
            "response_format=ToolStrategy(schema)"
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """One question: where it goes, with what, and how its result reads."""

    service: SearchService
    messages: list[Message]
    config: SearchConfig
    options: SearchOptions
    toolbox: Toolbox
    model: str

    def submit(self, on_event: OnEvent, cancel: Event) -> Future[SearchResult]:
        """Start it."""
        return self.service.submit(
            self.messages, self.config, **{**self.options, "on_event": on_event, "cancel": cancel}
        )

    def read(self, result: SearchResult) -> Turn:
        """The winner's text and calls.

        Raises:
            EngineError: Every branch failed.
            NoUsableAnswerError: No branch ended in a turn that the tools allow.
        """
        check_result(result)
        if "view" not in self.options:
            return Turn(result.text)
        try:
            return self.toolbox.read(result.text)
        except MalformedCallError as error:
            raise NoUsableAnswerError(
                f"none of {result.trajectories} finished branches is a turn that the tools allow; the best: {error}. "
                "Raise width, max_steps or max_tokens, or take a policy that was trained to call tools"
            ) from None

    def metadata(self, turn: Turn, result: SearchResult) -> dict[str, Any]:
        """What stands beside the message, as plain JSON."""
        reason = "tool_calls" if turn.calls else result.finish_reason
        return {"model_name": self.model, "finish_reason": reason, "ets": figures_of(result)}


@dataclass(slots=True)
class _Said:
    """What was streamed of an answer."""

    streams: bool
    text: str = ""

    def more(self, common_text: str) -> str:
        """What is new in the text that all branches share."""
        if not self.streams or not common_text.startswith(self.text):
            return ""
        new, self.text = common_text[len(self.text) :], common_text
        return new

    def rest(self, text: str) -> str:
        """What is left of the whole text."""
        assert text.startswith(self.text), "what all living branches share is what the winner begins with"
        return text[len(self.text) :]
