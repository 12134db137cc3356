"""Any chat model as the policy of a tree search: it is asked for one more step of each branch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, convert_to_messages

from ets_engine.hosted import ProposalRequest, estimate_tokens
from ets_engine.types import Step, StopReason
from ets_integrations.langchain.inner_calls import inner_batch

_FINAL = re.compile(r"answer is|\\boxed\{|####", re.IGNORECASE)
_NEXT = (
    "Write only the next step of your solution, one short paragraph. Do not repeat earlier steps. When the answer is "
    'known, the step is the last one: it is "The answer is", the answer and a full stop.'
)


def is_final_step(text: str) -> bool:
    r"""Whether a step states the answer, by one of the usual phrases.

    Example:
        >>> is_final_step("So x = 3."), is_final_step("The answer is 3."), is_final_step(r"\boxed{3}")
        (False, True, True)
    """
    return _FINAL.search(text) is not None


class LangChainPolicy:
    r"""Proposes steps by a chat model: what a branch has written so far stands in the conversation as its own turn.

    The tree lives here, the KV cache there: prefixes are shared only as far as the model's server caches them. Give it
    to a `HostedEngine`, and that to `ChatETS(engine=...)` or `ETSRunnable(engine=...)`. Temperature, seed and limits
    are the model's own, whatever the search's config says. All branches of a depth are asked at once, unless the model
    has `with_config(max_concurrency=...)`.

    Args:
        model: Samples; its temperature decides how different branches are, so keep it above 0.6.
        instruction: Asks for the next step.
        is_final: Whether a step is the last one of its solution.

    Example:
        >>> from langchain_core.language_models import FakeListChatModel
        >>> from ets_engine.hosted import HostedEngine
        >>> policy = LangChainPolicy(FakeListChatModel(responses=["1+1 makes 2.", "The answer is 2."]))
        >>> with HostedEngine(policy, lambda problem, steps: 1.0, name="fake") as engine:
        ...     engine.search("What is 1+1?").answer
        '2'
    """

    def __init__(
        self, model: BaseChatModel, *, instruction: str = _NEXT, is_final: Callable[[str], bool] = is_final_step
    ) -> None:
        """See the class."""
        self._model = model
        self._instruction = instruction
        self._is_final = is_final

    def __call__(self, request: ProposalRequest) -> list[Step]:
        """The next step of every branch, in one `batch`; a call that raises fails its branch alone."""
        given = convert_to_messages([dict(message) for message in request.messages])
        turns = [
            [*given, *([AIMessage(partial)] if partial else []), HumanMessage(self._instruction)]
            for partial in request.partials
        ]
        model: Any = self._model
        config = inner_batch(model, len(turns))
        if request.tools:
            forced = {} if request.tool_choice == "auto" else {"tool_choice": request.tool_choice}
            model = model.bind_tools([dict(tool) for tool in request.tools], **forced)
        return [self._read(reply) for reply in model.batch(turns, config, return_exceptions=True)]

    def _read(self, reply: AIMessage | Exception) -> Step:
        if isinstance(reply, Exception):
            return Step("", 0, StopReason.ERROR, f"{type(reply).__name__}: {reply}")
        calls = [json.dumps({"name": call["name"], "arguments": call["args"]}) for call in reply.tool_calls]
        text = "\n".join([reply.text.strip(), *(f"<tool_call>{call}</tool_call>" for call in calls)]).strip()
        if not text:
            return Step("", 0, StopReason.ERROR, "the model wrote nothing")
        used = (reply.usage_metadata or {}).get("output_tokens") or estimate_tokens(text)
        final = bool(calls) or self._is_final(text)
        return Step(text if final else text + "\n\n", used, StopReason.FINISHED if final else StopReason.BOUNDARY)
