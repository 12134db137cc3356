"""Agent middleware: the hard model calls of a LangChain agent become tree searches, or best-of-N by a verifier."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from langchain.agents.middleware.types import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableLambda

from ets_engine.errors import ConfigError
from ets_engine.messages import problem_text
from ets_engine.scorers import CallableVerifier, Scorer
from ets_integrations.langchain.chat import ChatETS
from ets_integrations.langchain.inner_calls import INNER
from ets_integrations.langchain.messages import from_langchain
from ets_integrations.langchain.settings import CALL_SETTINGS, FIXED

_OWN_SETTINGS = frozenset("model temperature top_p top_k min_p max_tokens seed timeout effort stop".split())
"""What an agent's settings say of its own model, and would mean something else to a search."""

Condition = Callable[[ModelRequest[Any]], bool]
"""Decides from a model call whether it is searched."""


def always(request: ModelRequest[Any]) -> bool:
    """Every model call."""
    return True


def first_turn(request: ModelRequest[Any]) -> bool:
    """The call that plans: nothing was said since the user's last message."""
    return not any(isinstance(message, AIMessage) for message in _since_user(request.messages))


def no_pending_tools(request: ModelRequest[Any]) -> bool:
    """The call that is likely to answer: there are no tools, or what they were asked has come back."""
    if not request.tools:
        return True
    turn = _since_user(request.messages)
    asked = {call["id"] for message in turn if isinstance(message, AIMessage) for call in message.tool_calls}
    answered = {message.tool_call_id for message in turn if isinstance(message, ToolMessage)}
    return bool(asked) and asked <= answered


def budget_left(searches: int) -> Condition:
    """At most so many searched calls per user message (count)."""

    def is_left(request: ModelRequest[Any]) -> bool:
        turn = _since_user(request.messages)
        done = sum(isinstance(message, AIMessage) and "ets" in message.response_metadata for message in turn)
        return done < searches

    return is_left


class ETSMiddleware(AgentMiddleware[Any, Any, Any]):
    """Sends some of an agent's model calls through a tree search; the others go to the agent's own model.

    The search proposes whole turns, tool calls among them; the agent calls the winner's tools, the search none. What
    the agent's `model_settings` say of sampling and limits is for its own model alone.

    Args:
        model: Searches. Its policy must have been trained to call tools, unless `tools` is off.
        when: Which calls are searched: `always`, `first_turn`, `no_pending_tools`, `budget_left(2)`, or any function
            of the request.
        tools: Whether the searched call may ask for tools; a policy without a chat template needs False.
        name: Of this middleware in traces, None = the class's. An agent takes several under different names.
        settings: Of these searches, as `width=8`.

    Raises:
        ConfigError: A setting is unknown, out of range, or one that a call cannot change.

    Example:
        agent = create_agent(
            plain_model, tools, middleware=[ETSMiddleware(ChatETS(model=...), when=no_pending_tools, width=8)]
        )
    """

    def __init__(
        self,
        model: ChatETS,
        when: Condition = always,
        *,
        tools: bool = True,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        """See the class."""
        super().__init__()
        self.tools = []
        self._name = name
        self._not_for_it = _OWN_SETTINGS | FIXED.keys() | settings.keys()
        self._model = model.with_search(settings)  # refuses what no search could honour
        self._when = when
        self._may_call = tools
        if unknown := sorted(settings.keys() - {*CALL_SETTINGS, "model"}):
            allowed = ", ".join(sorted(CALL_SETTINGS))
            raise ConfigError(f"{type(self).__name__} has no setting {', '.join(unknown)}; choose from {allowed}")

    @property
    def name(self) -> str:
        """What tells it from the agent's other middleware."""
        return self._name or super().name

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Search this call, or let it pass."""
        return handler(self._redirect(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """Search this call, or let it pass."""
        return await handler(self._redirect(request))

    def _redirect(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        if not self._when(request):
            return request
        settings = {name: value for name, value in request.model_settings.items() if name not in self._not_for_it}
        found = request.override(model=self._model, model_settings=settings)
        return found if self._may_call else found.override(tools=[], tool_choice=None)


class VerifierMiddleware(AgentMiddleware[Any, Any, Any]):
    """Asks the agent's own model several times and keeps the turn that a verifier likes best.

    That is best-of-N over any model, a hosted one too; it shares no KV cache, so it costs N calls. LangGraph's
    `stream_mode="messages"` shows the kept turn alone, whole; what is no text in the conversation, the model reads and
    the verifier does not.

    Args:
        verifier: `verifier(problem, steps) -> [0, 1]`, a `RunnableVerifier`, a judge, or a `PrmScorer`; the turn is
            its one step.
        samples: Calls of the model (count).
        when: Which calls are sampled.
        name: Of this middleware in traces, None = the class's. An agent takes several under different names.

    Raises:
        ConfigError: Fewer than one sample.

    Example:
        agent = create_agent(plain_model, tools, middleware=[VerifierMiddleware(judge(cheap_model), samples=4)])
    """

    def __init__(
        self, verifier: Scorer, samples: int = 4, when: Condition = no_pending_tools, *, name: str | None = None
    ) -> None:
        """See the class."""
        super().__init__()
        if samples < 1:
            raise ConfigError(f"samples={samples}: take 1 or more")
        self.tools = []
        self._name = name
        self._verifier = verifier
        self._samples = samples
        self._when = when

    @property
    def name(self) -> str:
        """What tells it from the agent's other middleware."""
        return self._name or super().name

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """The best of some calls."""
        if not self._when(request):
            return handler(request)
        draft = RunnableLambda(lambda _: handler(request), name="draft")
        with ThreadPoolExecutor(self._samples) as pool:
            runs = [contextvars.copy_context().run for _ in range(self._samples)]
            calls = [pool.submit(run, draft.invoke, None, INNER) for run in runs]
        found = [call.exception() or call.result() for call in calls]
        return self._pick(request, found)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """The best of some calls."""
        if not self._when(request):
            return await handler(request)

        async def call(_: None) -> ModelResponse[Any]:
            return await handler(request)

        draft = RunnableLambda(call, name="draft")
        drafts = (draft.ainvoke(None, INNER) for _ in range(self._samples))
        found = await asyncio.gather(*drafts, return_exceptions=True)
        return await asyncio.to_thread(self._pick, request, found)

    def _pick(
        self, request: ModelRequest[Any], found: Sequence[ModelResponse[Any] | BaseException]
    ) -> ModelResponse[Any]:
        turns = [one for one in found if not isinstance(one, BaseException)]
        if not turns:
            raise next(one for one in found if isinstance(one, BaseException))
        judged = CallableVerifier(self._verifier, problem_text(from_langchain(request.messages, texts_only=True)))
        nodes = range(1, len(turns) + 1)
        scores = judged.score(nodes, [0] * len(turns), [_text(turn) for turn in turns])
        ranked = [-1.0 if math.isnan(score) else score for score in scores]
        return turns[ranked.index(max(ranked))]


def _text(turn: ModelResponse[Any]) -> str:
    """A turn as one step, its calls written out."""
    messages = [message for message in turn.result if isinstance(message, AIMessage)]
    return problem_text(from_langchain(messages)) if messages else ""


def _since_user(messages: Sequence[AnyMessage]) -> list[AnyMessage]:
    """What was said after the user's last message."""
    last = max((place for place, one in enumerate(messages) if isinstance(one, HumanMessage)), default=-1)
    return list(messages[last + 1 :])
