"""From a DSPy request to what a search service is asked; what the service cannot honour is refused, never dropped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dspy import lm15

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.messages import Message
from ets_engine.protocols import StepView
from ets_engine.scorers import Scorer
from ets_engine.tool_calls import Toolbox, ToolView
from ets_integrations.dspy.calls import Call
from ets_integrations.dspy.source import ServiceSource
from ets_integrations.dspy.view import (
    COMPLETED,
    StepReader,
    infer_view,
    is_marked,
    plain_problem,
    plain_scorer,
    plain_step,
    step_reader,
)
from ets_integrations.settings import WIDTHS, fresh_seed

SETTINGS = ("temperature", "max_tokens", "top_p", "top_k", "seed")
"""What DSPy's own parameters say; it goes before the search settings of the same names."""


def is_search_setting(name: str) -> bool:
    """Whether a search has such a setting, and DSPy's own parameters do not say it."""
    return name in SearchConfig.model_fields and name not in (*SETTINGS, "stop")


def refuse_search_settings(names: Iterable[str]) -> None:
    """Refuse what DSPy would hand to a model as a parameter of its own.

    Raises:
        ConfigError: A search setting is among these names.
    """
    stray = sorted(filter(is_search_setting, names))
    if stray:
        raise ConfigError(
            f"{', '.join(stray)}: an ETSLM takes search={{...}}, a call or a module **lm.search({stray[0]}=...)"
        )


_HONOURED = {*SETTINGS, "stop", "tool_choice", "reasoning", "cache", "extensions"}
_SEEDS = 2**63


@dataclass(frozen=True)
class Question:
    """What is asked of a search service.

    Attributes:
        messages: The conversation.
        config: Every setting, the seed included.
        toolbox: The tools that may be called, None = there are none.
        view: How texts map to answers, None = the service's own way.
        verifier: Judges instead of the service's own, None = that one.
        problem: What verifiers read as the problem.
        read_step: What verifiers read of a step of an answer in markup, None = there is none.
        key: Equal for questions whose callers would take each other's answer; None = nobody would.
    """

    messages: Sequence[Message]
    config: SearchConfig
    toolbox: Toolbox | None
    view: StepView | None
    verifier: Scorer | None
    problem: str
    read_step: StepReader | None
    key: str | None


def read_request(request: lm15.Request, source: ServiceSource, call: Call) -> Question:
    """What a request asks, of which service, in which call.

    Two requests in flight are the same question, and share one search, when DSPy itself would give both the same
    answer: they say the same, name the same models, verifier and view, and either fix the seed, or are cached and
    have the same `rollout_id`. So a straggler that DSPy submits again is searched once, and `dspy.BestOfN`'s
    attempts, or calls with `cache=False`, are searched one by one.

    Raises:
        ConfigError: A setting is out of range.
        lm15.UnsupportedFeatureError: It asks for what no search can honour.
    """
    _refuse(request.config)
    messages = read_messages(request)
    ets = dict((request.config.extensions or {}).get("metadata", {}).get("ets", {}))
    settings = _settings(request.config, ets.get("search", {}))
    if is_marked(messages) and COMPLETED not in settings.get("stop", ()):
        settings["stop"] = (*settings.get("stop", ()), COMPLETED)
    toolbox = _toolbox(request)
    view = call.view or infer_view(messages)
    if toolbox is not None:
        view = ToolView(toolbox) if view is None else ToolView(toolbox, view.answer, view.same)
    problem, read_step = plain_problem(messages), step_reader(messages)
    own = None if source.scorer is None else plain_scorer(source.scorer, problem, read_step or plain_step)
    key = _key(messages, settings, toolbox, ets, source, call)
    seed, sample = settings.pop("seed", None), (call.rollout_id or 0) + call.num_answered
    seed = fresh_seed() if seed is None else (seed + sample) % _SEEDS  # another sample, the same one each time
    return Question(
        messages,
        SearchConfig(**settings, seed=seed),
        toolbox,
        view,
        call.verifier or own,
        problem,
        read_step,
        key,
    )


def read_messages(request: lm15.Request) -> list[Message]:
    """The conversation as chat templates take it.

    Raises:
        lm15.UnsupportedFeatureError: It holds something that is no text.
    """
    messages: list[Message] = []
    if request.system is not None:
        system = (lm15.TextPart(request.system),) if isinstance(request.system, str) else request.system
        messages.append({"role": "system", "content": _text(system)})
    for message in request.messages:
        if message.role == "tool":
            messages += [
                {"role": "tool", "content": _text(part.content), "tool_call_id": part.id}
                | ({"name": part.name} if part.name else {})
                for part in message.parts_of(lm15.ToolResultPart)
            ]
            continue
        calls = [
            {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.input}}
            for part in message.parts_of(lm15.ToolCallPart)
        ]
        said = _text([part for part in message.parts if not isinstance(part, lm15.ToolCallPart)])
        messages.append({"role": message.role, "content": said} | ({"tool_calls": calls} if calls else {}))
    return messages


def _text(parts: Sequence[Any]) -> str:
    texts: list[str] = []
    for part in parts:
        match part:
            case lm15.TextPart(text=text):
                texts.append(text)
            case lm15.DataPart(value=value):
                texts.append(json.dumps(value, ensure_ascii=False))
            case lm15.ThinkingPart():
                pass  # how an earlier answer was found is no part of the conversation
            case _:
                raise lm15.UnsupportedFeatureError(
                    f"a {part.type} in a message: tree search reads text only",
                    feature=f"messages[*].parts[{part.type}]",
                )
    return "\n".join(texts)


def _settings(config: lm15.Config, search: Mapping[str, Any]) -> dict[str, Any]:
    """The search settings of a request; DSPy's own parameters go first."""
    unknown = sorted(set(search) - set(SearchConfig.model_fields))
    if unknown:
        raise ConfigError(f"search={unknown}: no such settings; choose from {sorted(SearchConfig.model_fields)}")
    settings = dict(search)
    settings |= {name: value for name in SETTINGS if (value := getattr(config, name)) is not None}
    if config.stop:
        settings["stop"] = config.stop
    if config.reasoning is not None:
        effort = config.reasoning.effort
        if effort not in WIDTHS:
            raise ConfigError(f"reasoning_effort={effort!r}: choose one of {', '.join(WIDTHS)}")
        settings["width"] = WIDTHS[effort]
    return settings


def _toolbox(request: lm15.Request) -> Toolbox | None:
    if not request.tools:
        return None
    tools: list[Message] = []
    for tool in request.tools:
        if not isinstance(tool, lm15.FunctionTool):
            raise lm15.UnsupportedFeatureError(
                f"tool {tool.name!r} runs on a provider's server, and there is none", feature=f"tools[{tool.type}]"
            )
        function = {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters}
        tools.append({"type": "function", "function": function})
    choice = request.config.tool_choice
    max_calls = 1 if choice is not None and choice.parallel is False else None
    if choice is None or choice.mode == "auto":
        return Toolbox(tuple(tools), max_calls=max_calls)
    if choice.mode == "none":
        return Toolbox(tuple(tools), "none")
    if len(choice.allowed) > 1:
        raise lm15.UnsupportedFeatureError(
            f"tool_choice among {list(choice.allowed)}: name one tool, or pass only those",
            feature="tool_choice.allowed",
        )
    return Toolbox(tuple(tools), choice.allowed[0] if choice.allowed else "any", max_calls)


def _refuse(config: lm15.Config) -> None:
    asked = [
        one.name for one in fields(config) if one.name not in _HONOURED and getattr(config, one.name) not in (None, ())
    ]
    asked += [name for name in config.extensions or {} if name != "metadata"]
    if asked:
        raise lm15.UnsupportedFeatureError(
            f"{', '.join(asked)}: tree search has no such parameter; leave it out", feature=asked[0]
        )


def _key(
    messages: Sequence[Message],
    settings: Mapping[str, Any],
    toolbox: Toolbox | None,
    ets: Mapping[str, Any],
    source: ServiceSource,
    call: Call,
) -> str | None:
    is_seeded = settings.get("seed") is not None
    if not (is_seeded or call.cache):
        return None
    verifier = call.verifier or source.scorer
    named = call.verifier_name if call.verifier is not None else source.verifier_name
    asked = {
        "messages": messages,
        "settings": settings,
        "tools": None if toolbox is None else [toolbox.tools, toolbox.choice, toolbox.max_calls],
        "ets": ets,
        "sample": [call.rollout_id, call.num_answered],
        "verifier": None if verifier is None else named or id(verifier),
    }
    return json.dumps(asked, sort_keys=True, default=str)
