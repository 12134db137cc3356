"""Tool calls in a model's text: found, checked against their schemas, and compared as votes; nothing is called here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ets_engine.errors import ConfigError
from ets_engine.messages import Message

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

# Hermes and Qwen: <tool_call>{...}</tool_call>. Mistral: [TOOL_CALLS][{...}]. Llama: the object alone is the text, or
# comes after <|python_tag|>.
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_LISTED = re.compile(r"\[TOOL_CALLS\]|<\|python_tag\|>")
_MARK = re.compile(rf"</?tool_call>|{_LISTED.pattern}")
_FENCED = re.compile(r"```(?:json)?(.*)```", re.DOTALL)


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
        max_calls: Most calls of one turn, None = no limit.

    Raises:
        ConfigError: A tool has no name, two have the same, its parameters are no JSON schema of an object (references
            to other documents are never fetched), or `choice` names none of them.

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
    max_calls: int | None = None

    def __post_init__(self) -> None:
        """Refuse what could never be honoured."""
        if self.choice not in ("auto", "none", "any", *self._validators):
            names = list(self._validators)
            raise ConfigError(f"tool_choice={self.choice!r}: choose auto, none, any or one of {names}")
        if self.choice == "any" and not self.tools:
            raise ConfigError("tool_choice='any': there are no tools")

    @cached_property
    def _validators(self) -> dict[str, Validator]:
        found: dict[str, Validator] = {}
        for tool in self.tools:
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str):
                raise ConfigError(f"tool={tool!r:.100} has no name; give OpenAI's layout")
            if name in found:
                raise ConfigError(f"two tools are called {name!r}; a call of it would say nothing")
            found[name] = _validator(name, function.get("parameters"))
        return found

    @property
    def is_forced(self) -> bool:
        """Whether a turn without a call is no answer."""
        return self.choice not in ("auto", "none")

    def read(self, text: str) -> Turn:
        """Text and calls of a turn.

        Raises:
            MalformedCallError: It begins a call that is no valid one, lacks the one it must have, or has too many.
        """
        turn = self._read(text)
        if self.max_calls is not None and len(turn.calls) > self.max_calls:
            raise MalformedCallError(f"{len(turn.calls)} calls, of at most {self.max_calls}")
        if self.is_forced and not any(self.choice in ("any", call.name) for call in turn.calls):
            raise MalformedCallError(f"no call of {'a tool' if self.choice == 'any' else self.choice}")
        return turn

    def _read(self, text: str) -> Turn:
        if not self.tools or self.choice == "none":
            return Turn(text)
        tagged = _TAGGED.findall(text)
        if tagged:
            said = _TAGGED.sub("", text)
            if mark := _MARK.search(said):
                raise MalformedCallError(f"a {mark[0]} that belongs to no call")
            return Turn(said.strip(), tuple(self._check(_load(part)) for part in tagged))
        if listed := _LISTED.search(text):
            found = _items(_load(text[listed.end() :]))
            if not found:
                raise MalformedCallError(f"no call after {listed[0]}")
            return Turn(text[: listed.start()].strip(), tuple(map(self._check, found)))
        if mark := _MARK.search(text):
            raise MalformedCallError(f"a {mark[0]} that belongs to no call")
        fenced = _FENCED.fullmatch(text.strip())
        bare = (fenced[1] if fenced else text).strip()
        if bare[:1] not in ("{", "["):
            return Turn(text)
        try:
            found = _items(_load(bare))
        except MalformedCallError:
            return Turn(text)
        if not found or not all(self._name(call) for call in found):
            return Turn(text)  # JSON, but no call
        return Turn("", tuple(map(self._check, found)))

    def _name(self, call: Any) -> str | None:
        """The tool that a piece of JSON calls."""
        name = call.get("name") if isinstance(call, dict) else None
        return name if isinstance(name, str) and name in self._validators else None

    def _check(self, call: Any) -> ToolCall:
        """The call, if its tool exists and its arguments fit."""
        from jsonschema.exceptions import best_match

        name = self._name(call)
        if name is None:
            raise MalformedCallError(f"{call!r:.100} calls none of {list(self._validators)}")
        arguments = call.get("arguments", call.get("parameters"))
        if isinstance(arguments, str):
            arguments = _load(arguments) if arguments.strip() else None
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise MalformedCallError(f"{name}({arguments!r:.100}): the arguments are no object")
        try:
            error = best_match(self._validators[name].iter_errors(arguments))
        except RecursionError:
            raise MalformedCallError(f"{name}({arguments!r:.100}): nested too deep") from None
        if error is not None:
            raise MalformedCallError(f"{name}({arguments!r:.100}): {error.message}")
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
        if left == right or self._same is None:
            return left == right
        return not (_are_calls(left) or _are_calls(right)) and self._same(left, right)


def _are_calls(answer: str) -> bool:
    """Whether an answer of `ToolView` stands for calls."""
    return answer.startswith('[["')


def _load(text: str) -> Any:
    try:
        found = json.loads(text, parse_constant=_finite, parse_float=_finite)
        json.dumps(found, ensure_ascii=False).encode()  # half a character can be written as an escape
    except (ValueError, RecursionError) as error:
        raise MalformedCallError(f"{text!r:.100} is no JSON: {error}") from None
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


def _items(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _validator(name: str, parameters: object) -> Validator:
    """What holds arguments against a tool's schema, without ever fetching another document."""
    import jsonschema  # a tenth of a second, and only where there are tools
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    if parameters is not None and not isinstance(parameters, Mapping):
        raise ConfigError(f"the parameters of tool {name!r} are no JSON schema of an object: {parameters!r:.100}")
    schema = {"type": "object", **(parameters or {})}
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
        resource = specification_with(schema.get("$schema", ""), default=DRAFT202012).create_resource(schema)
        _check_references(resource, REGISTRY.resolver_with_root(resource))
    except jsonschema.SchemaError as error:
        raise ConfigError(f"the parameters of tool {name!r} are no JSON schema: {error.message}") from None
    except Unresolvable as error:
        raise ConfigError(f"the parameters of tool {name!r} refer to {error.ref!r}, which is not in them") from None
    return kind(schema, registry=Registry())  # the default one opens URLs, of files too


def _check_references(schema: Any, resolver: Any) -> None:
    """Follow every reference once."""
    if isinstance(schema.contents, Mapping) and isinstance(reference := schema.contents.get("$ref"), str):
        resolver.lookup(reference)
    for part in schema.subresources():
        _check_references(part, resolver.in_subresource(part))
