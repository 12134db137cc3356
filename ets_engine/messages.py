"""What a caller asks, as a text or as chat messages, and the plain text of it that verifiers read."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ets_engine.errors import ConfigError

Message = Mapping[str, Any]
"""One turn as chat templates take it: `role`, `content`, and where they apply `tool_calls`, `tool_call_id`, `name`."""

Prompt = str | Sequence[Message]
"""A problem in plain text, or the conversation that ends with it."""

ROLES = ("system", "developer", "user", "assistant", "tool")


def to_messages(prompt: Prompt) -> tuple[Message, ...]:
    """The conversation of a prompt, in copies of its own; a text is one user turn.

    Raises:
        ConfigError: It is neither a text nor messages, it is empty, or some part of a message is no valid text.

    Example:
        >>> to_messages("What is 1+1?")
        ({'role': 'user', 'content': 'What is 1+1?'},)
    """
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigError(f"problem={prompt!r:.100}: give a text, or messages with a role and a content")
    if not messages:
        raise ConfigError("problem=[]: give at least one message")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ConfigError(f"role={role!r} in {message!r:.100}: choose one of {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if not (isinstance(content, str) or (content is None and calls and role == "assistant")):
            raise ConfigError(f"content={content!r:.100} of a {role} message: give a text")
        if calls is not None and not (isinstance(calls, Sequence) and all(map(_is_call, calls))):
            raise ConfigError(f"tool_calls={calls!r:.100}: give OpenAI's layout")
        try:
            json.dumps(dict(message), ensure_ascii=False, default=str).encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"{message!r:.100} is no valid text: {error}") from None
    return tuple(copy.deepcopy(dict(message)) for message in messages)


def _is_call(call: object) -> bool:
    return isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping)


def last_user_text(messages: Sequence[Message]) -> str:
    """Content of the last user turn: what a model without a chat template reads.

    Raises:
        ConfigError: There is no user turn.
    """
    for message in reversed(messages):
        if message["role"] == "user":
            return message["content"]
    raise ConfigError("the conversation has no user message, and this policy, without a chat template, reads only that")


def split_reply(messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """The conversation up to a reply that is to be gone on with, and that reply: "" where there is none.

    Example:
        >>> turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is"}]
        >>> split_reply(turns)[1], split_reply(turns[:1])[1]
        ('It is', '')
    """
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        return messages, ""
    return messages[:-1], last["content"]


def problem_text(messages: Sequence[Message]) -> str:
    """What a verifier reads as the problem: the one question, or else the conversation but for instructions.

    Example:
        >>> problem_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}])
        '1+1?'
        >>> turns = [("user", "1+1?"), ("assistant", "2"), ("user", "And twice that?")]
        >>> print(problem_text([{"role": role, "content": content} for role, content in turns]))
        user: 1+1?
        assistant: 2
        user: And twice that?
    """
    turns = [message for message in messages if message["role"] not in ("system", "developer")] or list(messages)
    if len(turns) == 1:
        return _content(turns[0])
    return "\n".join(f"{turn['role']}: {_content(turn)}" for turn in turns)


def _content(turn: Message) -> str:
    calls = [call.get("function", call) for call in turn.get("tool_calls") or ()]
    called = "".join(f" [calls {call.get('name')}({call.get('arguments')})]" for call in calls)
    return (turn.get("content") or "") + called
