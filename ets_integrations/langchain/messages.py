"""Between LangChain's messages and the engine's: conversations in, one assistant turn out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import ToolCall, tool_call

from ets_engine.errors import ConfigError, EngineError
from ets_engine.messages import Message
from ets_engine.tool_calls import Turn
from ets_engine.types import SearchResult

ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "function": "tool"}
_TEXTS = {"text": "text", "output_text": "text", "refusal": "refusal"}  # of a block's type, the key of its text
_ASIDES = ("tool_use", "tool_call", "reasoning", "thinking", "non_standard")  # left out of any message


def from_langchain(messages: Sequence[BaseMessage], *, texts_only: bool = False) -> list[Message]:
    """The conversation as chat templates take it.

    Of an assistant's content the text is read; its other blocks repeat calls or are the provider's own bookkeeping.

    Args:
        messages: A conversation, of whichever model.
        texts_only: Leave out what is no text, an image, instead of refusing it.

    Raises:
        ConfigError: Another message holds something else than text, or one is of an unknown kind.

    Example:
        >>> from langchain_core.messages import HumanMessage
        >>> from_langchain([HumanMessage("What is 1+1?")])
        [{'role': 'user', 'content': 'What is 1+1?'}]
    """
    return [_one(message, texts_only) for message in messages]


def _one(message: BaseMessage, texts_only: bool) -> Message:
    role = getattr(message, "role", None) or ROLES.get(message.type.removesuffix("MessageChunk").lower())
    if role is None:
        raise ConfigError(f"message of type {message.type!r}: send human, ai, system and tool messages")
    found: dict[str, Any] = {"role": role, "content": _text(message, texts_only or role == "assistant")}
    if message.name:
        found["name"] = message.name
    if isinstance(message, AIMessage) and message.tool_calls:
        found["tool_calls"] = [
            {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        found["tool_call_id"] = message.tool_call_id
        if message.status == "error":
            found["content"] = f"Error: {found['content']}"
    return found


def _text(message: BaseMessage, texts_only: bool) -> str:
    if isinstance(message.content, str):
        return message.content
    parts: list[str] = []
    for block in message.content:
        if isinstance(block, str):
            parts.append(block)
        elif (kind := block.get("type")) in _TEXTS:
            parts.append(block[_TEXTS[kind]])
        elif not texts_only and kind not in _ASIDES:
            raise ConfigError(f"content of type {kind!r} in a {message.type} message: the search reads text alone")
    return "\n".join(parts)


def read_tool_choice(choice: str | Mapping[str, Any] | bool | None) -> str:
    """How `Toolbox` names what LangChain and OpenAI write in several ways.

    Raises:
        ConfigError: It says neither a name nor a kind.

    Example:
        >>> [read_tool_choice(one) for one in (None, True, "required", {"function": {"name": "add"}})]
        ['auto', 'any', 'any', 'add']
    """
    if choice is None or choice is False:
        return "auto"
    if choice is True or choice == "required":
        return "any"
    if isinstance(choice, Mapping):
        named, kind = choice.get("function", choice), choice.get("type")
        if isinstance(named, Mapping) and isinstance(name := named.get("name"), str):
            return name
        if not isinstance(kind, str) or "function" in choice:
            raise ConfigError(
                f'tool_choice={choice!r:.100}: give a name, or {{"type": "function", "function": {{"name": ...}}}}'
            )
        return read_tool_choice(kind)
    return choice


def check_result(result: SearchResult) -> SearchResult:
    """The result, unless nothing came of the search.

    Raises:
        EngineError: Every branch failed.
    """
    if result.finish_reason == "error":
        raise EngineError(f"all {result.num_errors} branches of the search failed; the log says why")
    return result


def usage_of(result: SearchResult) -> UsageMetadata:
    """Tokens as every LangChain model reports them: the prompt once, all that was generated in the tree."""
    return UsageMetadata(
        input_tokens=result.prompt_tokens,
        output_tokens=result.generated_tokens,
        total_tokens=result.prompt_tokens + result.generated_tokens,
        input_token_details=InputTokenDetails(cache_read=min(result.cached_prompt_tokens, result.prompt_tokens)),
        output_token_details=OutputTokenDetails(reasoning=max(0, result.generated_tokens - result.path_tokens)),
    )


def figures_of(result: SearchResult) -> dict[str, Any]:
    """What a search found and cost, as plain JSON: it may go through any cache, checkpoint or trace."""
    kv = result.kv
    return {
        "answer": result.answer,
        "score": result.score,
        "strategy": result.strategy,
        "width": result.width,
        "seed": result.seed,
        "steps": len(result.steps),
        "trajectories": result.trajectories,
        "failed_branches": result.num_errors,
        "generated_tokens": result.generated_tokens,
        "verifier_tokens": result.verifier_tokens,
        "wall_s": result.timing.wall_s,
        "bandwidth_gb_s": result.timing.bandwidth_gb_s,
        "kv": None
        if kv is None
        else {
            "sharing_ratio": kv.sharing_ratio,
            "peak_tokens": kv.peak_tokens,
            "mean_tokens": kv.mean_tokens,
            "peak_bytes": kv.peak_bytes,
        },
        "candidates": [
            {"answer": one.answer, "score": one.score, "votes": one.votes, "weight": one.weight}
            for one in result.candidates
        ],
    }


def tool_calls_of(turn: Turn) -> list[ToolCall]:
    """The calls of a turn under new ids."""
    return [tool_call(name=call.name, args=call.arguments, id=f"call_{uuid4().hex}") for call in turn.calls]
