"""Tool calls in a model's text: found, checked against their schemas, and compared as votes; nothing is called here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ets_engine.errors import ConfigError
from ets_engine.messages import Message

# Hermes and Qwen: <tool_call>{...}</tool_call>. Mistral: [TOOL_CALLS][{...}]. Llama: the object alone is the text.
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_MARK = re.compile(r"</?tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>")
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_LISTED = "[TOOL_CALLS]"


class MalformedCallError(ValueError):
    """A text begins a tool call that is no valid call of any of the tools."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that a model asks for.

    Attributes:
        name: Of the tool.
        arguments: By parameter; they fit the tool's schema.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A model's whole turn.

    Attributes:
        text: What it says beside its calls.
        calls: In the order in which it asks for them.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request, and whether they must be used.

    Attributes:
        tools: JSON schemas in OpenAI's layout (`{"type": "function", "function": {name, parameters, ...}}`).
        choice: "auto" leaves it to the model, "none" forbids calls, "any" demands one, a name demands that tool.

    Raises:
        ConfigError: A tool has no name, or `choice` names none of them.

    Example:
        >>> add = {"type": "function", "function": {"name": "add", "parameters": {
        ...     "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}
        >>> box = Toolbox((add,))
        >>> box.read('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>').calls
        (ToolCall(name='add', arguments={'a': 1}),)
        >>> box.read('<tool_call>{"name": "add", "arguments": {"a": "x"}}</tool_call>')
        Traceback (most recent call last):
        ets_engine.tool_calls.MalformedCallError: add({'a': 'x'}): 'x' is not of type 'integer'
    """

    tools: tuple[Message, ...]
    choice: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what could never be honoured."""
        if self.choice not in ("auto", "none", "any") and self.choice not in self._schemas:
            raise ConfigError(f"tool_choice={self.choice!r}: choose auto, none, any or one of {list(self._schemas)}")
        if self.choice == "any" and not self.tools:
            raise ConfigError("tool_choice='any': there are no tools")

    @cached_property
    def _schemas(self) -> dict[str, Message]:
        found: dict[str, Message] = {}
        for tool in self.tools:
            function = tool.get("function", tool)
            if not isinstance(function.get("name"), str):
                raise ConfigError(f"tool={tool!r:.100} has no name; give OpenAI's layout")
            found[function["name"]] = function.get("parameters") or {}
        return found

    @property
    def is_forced(self) -> bool:
        """Whether a turn without a call is no answer."""
        return self.choice not in ("auto", "none")

    def read(self, text: str) -> Turn:
        """Text and calls of a turn.

        Raises:
            MalformedCallError: It begins a call that is no valid one, or lacks the one it must have.
        """
        turn = self._read(text)
        if self.is_forced and not any(self.choice in ("any", call.name) for call in turn.calls):
            raise MalformedCallError(f"no call of {'a tool' if self.choice == 'any' else self.choice}")
        return turn

    def _read(self, text: str) -> Turn:
        if not self.tools or self.choice == "none":
            return Turn(text)
        tagged = _TAGGED.findall(text)
        if tagged:
            said = _TAGGED.sub("", text)
            if _MARK.search(said):
                raise MalformedCallError("an unclosed <tool_call>")
            return Turn(said.strip(), tuple(self._check(_load(part)) for part in tagged))
        if _LISTED in text:
            said, _, listed = text.partition(_LISTED)
            return Turn(said.strip(), tuple(self._check(call) for call in _items(_load(listed))))
        if _MARK.search(text):
            raise MalformedCallError("an unclosed <tool_call>")
        fenced = _FENCED.fullmatch(text.strip())
        bare = fenced[1] if fenced else text.strip()
        if bare[:1] not in ("{", "["):
            return Turn(text)
        try:
            found = list(_items(json.loads(bare)))
        except (ValueError, MalformedCallError):
            return Turn(text)
        if not found or not all(isinstance(call, dict) and call.get("name") in self._schemas for call in found):
            return Turn(text)  # JSON, but no call
        return Turn("", tuple(self._check(call) for call in found))

    def _check(self, call: Any) -> ToolCall:
        """The call, if its tool exists and its arguments fit."""
        import jsonschema  # a tenth of a second, and only where there are tools

        name = call.get("name") if isinstance(call, dict) else None
        if name not in self._schemas:
            raise MalformedCallError(f"{call!r:.100} calls none of {list(self._schemas)}")
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = _load(arguments)
        try:
            jsonschema.validate(arguments, {"type": "object", **self._schemas[name]})
        except jsonschema.ValidationError as error:
            raise MalformedCallError(f"{name}({arguments!r:.100}): {error.message}") from None
        except jsonschema.SchemaError as error:
            raise ConfigError(f"the parameters of tool {name!r} are no JSON schema: {error.message}") from None
        return ToolCall(name, arguments)


class ToolView:
    """`StepView` of turns that may call tools: a turn that is no valid one is no answer, equal calls are one vote.

    Args:
        toolbox: The tools.
        answer: Gives the answer of a turn without a call, `StepView.answer` of another view, say.
        same: Whether two of those are the same.

    Example:
        >>> view = ToolView(Toolbox(()))
        >>> view.answer("1+1?", "It is 2.")
        'It is 2.'
    """

    def __init__(
        self,
        toolbox: Toolbox,
        answer: Callable[[str, str], str | None] | None = None,
        same: Callable[[str, str], bool] | None = None,
    ) -> None:
        """See the class."""
        self._toolbox = toolbox
        self._answer = answer
        self._same = same

    def answer(self, problem: str, text: str) -> str | None:
        """The calls as canonical JSON, the answer of a turn without, None when it must not stand."""
        try:
            turn = self._toolbox.read(text)
        except MalformedCallError:
            return None
        if turn.calls:
            return json.dumps([[call.name, call.arguments] for call in turn.calls], sort_keys=True)
        return self._answer(problem, text) if self._answer else text.strip() or None

    def same(self, left: str, right: str) -> bool:
        """Whether two answers are the same vote."""
        return left == right or (self._same is not None and self._same(left, right))


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise MalformedCallError(f"{text!r:.100} is no JSON: {error}") from None


def _items(found: Any) -> Iterator[Any]:
    yield from found if isinstance(found, list) else [found]
