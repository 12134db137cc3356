"""Tool calls as models write them: found, held against their schemas, and counted as votes."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from ets_engine.answers import MathView
from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.hosted import HostedEngine, ProposalRequest
from ets_engine.tool_calls import MalformedCallError, Toolbox, ToolCall, ToolView, Turn
from ets_engine.types import Step, StopReason


def tool(name: str, parameters: Any = None, **properties: Any) -> dict[str, Any]:
    if parameters is None and properties:
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ADD = tool("add", a={"type": "integer"}, b={"type": "integer"})
NOW = tool("now")
BOX = Toolbox((ADD, NOW))
ONE = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
ADDED = ToolCall("add", {"a": 1, "b": 2})
CALLED_NOW = ToolCall("now", {})


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


# ---------------------------------------------------------------------- what is a call


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (tagged(ONE), "", [ADDED]),
        ("I add.\n" + tagged(ONE) + "\nDone.", "I add.\n\nDone.", [ADDED]),
        (tagged(ONE, '{"name": "now"}'), "", [ADDED, CALLED_NOW]),
        (tagged(f'{{"name": "add", "arguments": {json.dumps(json.dumps(ADDED.arguments))}}}'), "", [ADDED]),
        (tagged('{"name": "now", "arguments": ""}'), "", [CALLED_NOW]),
        (tagged('{"name": "now", "arguments": " "}'), "", [CALLED_NOW]),
        (tagged('{"name": "now", "arguments": null}'), "", [CALLED_NOW]),
        (tagged('{"name": "now", "arguments": {}}'), "", [CALLED_NOW]),
        (f"[TOOL_CALLS][{ONE}, {ONE}]", "", [ADDED, ADDED]),
        (f"Let me see. [TOOL_CALLS] {ONE}", "Let me see.", [ADDED]),
        (f"<|python_tag|>{ONE}", "", [ADDED]),
        (ONE, "", [ADDED]),
        (f"  {ONE}\n", "", [ADDED]),
        (ONE.replace("arguments", "parameters"), "", [ADDED]),
        (f"[{ONE}]", "", [ADDED]),
        (f"```json\n{ONE}\n```", "", [ADDED]),
        (f"```\n[{ONE}, {ONE}]```", "", [ADDED, ADDED]),
    ],
)
def test_calls_as_models_write_them(text: str, said: str, calls: list[ToolCall]) -> None:
    assert BOX.read(text) == Turn(said, tuple(calls))


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 3.",
        "",
        '{"answer": 3}',
        "[1, 2]",
        "[]",
        "{}",
        '{"name": "subtract", "arguments": {}}',  # may be what was asked for
        '{"name": ["add"], "arguments": {}}',
        f"[{ONE}, 3]",
        '{"name": "add", "arguments": ',
        f"So {ONE}",
        f"{ONE} it is",
        "```python\nadd(1, 2)\n```",
        "```json\nnot json\n```",
        "[" * 100_000,  # a model that repeats itself
        '{"a":' * 100_000,
    ],
)
def test_what_begins_no_call_is_text(text: str) -> None:
    assert BOX.read(text) == Turn(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (tagged('{"name": "subtract", "arguments": {}}'), r"calls none of \['add', 'now'\]"),
        (tagged('{"name": ["add"], "arguments": {}}'), "calls none of"),
        (tagged('{"name": null}'), "calls none of"),
        (tagged("3"), "calls none of"),
        (tagged("add(1, 2)"), "is no JSON"),
        (tagged(ONE, "oops"), "is no JSON"),
        (tagged("[" * 100_000), "is no JSON"),
        (tagged('{"name": "now", "arguments": "oops"}'), "is no JSON"),
        (tagged('{"name": "now", "arguments": []}'), "the arguments are no object"),
        (tagged('{"name": "now", "arguments": 0}'), "the arguments are no object"),
        (tagged('{"name": "now", "arguments": "[1]"}'), "the arguments are no object"),
        (tagged('{"name": "add", "arguments": {"a": "x", "b": 2}}'), "'x' is not of type 'integer'"),
        (tagged('{"name": "add", "arguments": {"a": 1}}'), "'b' is a required property"),
        (tagged('{"name": "add"}'), "is a required property"),
        (tagged('{"name": "now", "arguments": {"x": NaN}}'), "NaN is no JSON number"),
        (tagged('{"name": "now", "arguments": {"x": 1e999}}'), "1e999 is no JSON number"),
        (tagged('{"name": "now", "arguments": {"x": "\\ud83d"}}'), "surrogates"),
        (f"<tool_call>{ONE}", "a <tool_call> that belongs to no call"),
        (f"{ONE}</tool_call>", "a </tool_call> that belongs to no call"),
        (tagged(ONE) + "<tool_call>{", "a <tool_call> that belongs to no call"),
        (tagged(ONE) + f"[TOOL_CALLS][{ONE}]", r"a \[TOOL_CALLS\] that belongs to no call"),
        ("[TOOL_CALLS]", "is no JSON"),
        ("[TOOL_CALLS][]", r"no call after \[TOOL_CALLS\]"),
        (f"[TOOL_CALLS][{ONE}] there", "is no JSON"),
        ("<|python_tag|>print(1)", "is no JSON"),
        (ONE.replace("1", '"x"'), "'x' is not of type 'integer'"),
        (f"```json\n{ONE.replace('1', 'true')}\n```", "True is not of type 'integer'"),
    ],
)
def test_what_begins_a_call_must_be_one(text: str, message: str) -> None:
    with pytest.raises(MalformedCallError, match=message) as refused:
        BOX.read(text)
    assert len(str(refused.value)) < 400
    assert ToolView(BOX).answer("", text) is None


PIECES = [
    *(ONE, '{"name": "now"}', "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "```", "```json"),
    *("[", "]", "{", "}", ",", " ", "\n", "text", "null", '"a"'),
]


@given(st.lists(st.sampled_from(PIECES)))
def test_any_text_is_a_turn_or_malformed(pieces: list[str]) -> None:
    view, text = ToolView(BOX), "".join(pieces)
    answer = view.answer("", text)
    try:
        turn = BOX.read(text)
    except MalformedCallError:
        assert answer is None
    else:
        assert all(call in (ADDED, CALLED_NOW) for call in turn.calls)
        assert (answer is None) == (not turn.calls and not text.strip())


def test_a_fence_that_never_closes_is_read_in_time() -> None:
    began_s = time.perf_counter()
    assert BOX.read("```" + "\n" * 20_000).calls == () and BOX.read("```" + " " * 20_000 + "x").calls == ()
    assert BOX.read("```json" + " \n" * 10_000 + "``").calls == ()
    assert time.perf_counter() - began_s < 5


# ---------------------------------------------------------------------- whether calls are wanted


def test_forbidden_calls_are_text() -> None:
    assert Toolbox((ADD,), "none").read(tagged(ONE)) == Toolbox(()).read(tagged(ONE)) == Turn(tagged(ONE))
    assert Toolbox((ADD,), "none").read("<tool_call>").calls == ()


@pytest.mark.parametrize(("choice", "message"), [("any", "no call of a tool"), ("now", "no call of now")])
def test_a_turn_without_the_call_it_must_have_is_dead(choice: str, message: str) -> None:
    box = Toolbox((ADD, NOW), choice)
    assert box.is_forced
    with pytest.raises(MalformedCallError, match=message):
        box.read("The answer is 3.")
    assert ToolView(box).answer("", "The answer is 3.") is None
    assert box.read(tagged('{"name": "now"}')).calls == (CALLED_NOW,)


def test_another_tool_than_the_one_that_is_demanded_will_not_do() -> None:
    box = Toolbox((ADD, NOW), "now")
    with pytest.raises(MalformedCallError, match="no call of now"):
        box.read(tagged(ONE))
    assert box.read(tagged(ONE, '{"name": "now"}')).calls == (ADDED, CALLED_NOW)
    assert Toolbox((ADD, NOW), "any").read(tagged(ONE)).calls == (ADDED,)


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ((ADD,), "sub", r"tool_choice='sub': choose auto, none, any or one of \['add'\]"),
        ((), "any", "there are no tools"),
        ((), "add", "tool_choice='add'"),
        (({"type": "function", "function": {"parameters": {}}},), "auto", "has no name"),
        (({"type": "function", "function": "add"},), "auto", "has no name"),
        (({"name": 3},), "none", "has no name"),
        ((ADD, tool("add")), "auto", "two tools are called 'add'"),
        ((tool("f", [1]),), "auto", "the parameters of tool 'f' are no JSON schema of an object"),
        ((tool("f", {"properties": {"a": {"type": "number!"}}}),), "auto", "tool 'f' are no JSON schema: 'number!'"),
        ((tool("f", a={"type": "string", "pattern": "("}),), "auto", "tool 'f' are no JSON schema: .*'regex'"),
        ((tool("f", a={"$ref": "#/$defs/A"}),), "auto", "tool 'f' refer to '/\\$defs/A', which is not in them"),
    ],
)
def test_tools_that_could_never_be_honoured_are_refused_at_once(tools: Any, choice: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Toolbox(tools, choice)


# ---------------------------------------------------------------------- schemas


class Inner(BaseModel):
    """A part."""

    unit: Literal["m", "km"] = "m"
    lengths: list[float] = Field(min_length=1)


class Tree(BaseModel):
    """A thing of parts, itself among them: its schema is one reference to a definition."""

    inner: Inner
    children: list[Tree] = []


def test_schemas_that_pydantic_makes() -> None:
    assert "$ref" in Tree.model_json_schema()
    plant = tool("plant", Tree.model_json_schema())
    measure = tool("measure", {"properties": {"inner": {"$ref": "#/$defs/Inner"}}, "required": ["inner"],
                               "$defs": {"Inner": Inner.model_json_schema()}})  # fmt: skip
    box = Toolbox((plant, measure))

    def call(name: str, arguments: Any) -> Any:
        return box.read(tagged(json.dumps({"name": name, "arguments": arguments}))).calls[0].arguments

    good = {"inner": {"lengths": [1.5]}, "children": [{"inner": {"unit": "km", "lengths": [2]}}]}
    assert call("plant", good) == good and call("measure", {"inner": good["inner"]}) == {"inner": good["inner"]}
    for name, bad in [
        ("plant", {"inner": {"lengths": []}}),
        ("plant", {"inner": {"lengths": [1]}, "children": [{"inner": {"unit": "mile", "lengths": [2]}}]}),
        ("measure", {"inner": {}}),
    ]:
        with pytest.raises(MalformedCallError):
            call(name, bad)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": ["object", "null"], "required": ["a"]},
        {"required": ["a"]},
        {"$schema": "http://json-schema.org/draft-07/schema#", "required": ["a"], "definitions": {"A": {}}},
        {"$ref": "#/$defs/A", "$defs": {"A": {"required": ["a"]}}},
        {"$id": "https://example.com/tool", "$ref": "part", "$defs": {"A": {"$id": "part", "required": ["a"]}}},
    ],
)
def test_schemas_as_others_write_them(parameters: dict[str, Any]) -> None:
    box = Toolbox((tool("f", parameters),))
    assert box.read('{"name": "f", "arguments": {"a": 1}}').calls == (ToolCall("f", {"a": 1}),)
    for arguments in ("{}", "null", "[]", '"null"', "3"):
        with pytest.raises(MalformedCallError):
            box.read(f'{{"name": "f", "arguments": {arguments}}}')


def test_a_schema_that_is_nothing_but_itself_ends() -> None:
    with pytest.raises(MalformedCallError, match="nested too deep"):
        Toolbox((tool("f", {"$ref": "#"}),)).read('{"name": "f", "arguments": {}}')


def test_schemas_in_other_documents_are_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*what: object, **how: object) -> Any:
        pytest.fail(f"opened {what}")

    monkeypatch.setattr(urllib.request, "urlopen", fetched)
    monkeypatch.setattr(socket, "create_connection", fetched)
    (tmp_path / "schema.json").write_text("{}")
    for address in ("https://example.com/schema.json", (tmp_path / "schema.json").as_uri(), "other.json"):
        for parameters in ({"$ref": address}, {"properties": {"a": {"items": {"$ref": address}}}}):
            with pytest.raises(ConfigError, match="which is not in them"):
                Toolbox((tool("f", parameters),))
    standard = tool("f", {"properties": {"a": {"$ref": "https://json-schema.org/draft/2020-12/schema"}}})
    with pytest.raises(MalformedCallError):  # it comes with the library
        Toolbox((standard,)).read('{"name": "f", "arguments": {"a": {"type": 3}}}')


# ---------------------------------------------------------------------- votes


def test_equal_calls_are_one_vote_however_they_are_written() -> None:
    view = ToolView(BOX)
    same = [ONE, tagged('{"name": "add", "arguments": {"b": 2, "a": 1}}'), f"I add. [TOOL_CALLS][{ONE}]"]
    answers = {view.answer("", text) for text in same}
    assert answers == {'[["add", {"a": 1, "b": 2}]]'}
    assert view.answer("", ONE.replace("2", "3")) not in answers


def test_a_turn_without_a_call_is_read_by_the_other_view() -> None:
    math = MathView()
    view = ToolView(BOX, math.answer, math.same)
    assert view.answer("", "The answer is 1,000.") == "1,000"
    assert view.same("1,000", "1000.0") and not ToolView(BOX).same("1,000", "1000.0")
    assert ToolView(BOX).answer("", " text ") == "text" and ToolView(BOX).answer("", " ") is None


def test_calls_are_not_compared_as_answers() -> None:
    """Who compares answers overlooks spaces and signs that are another argument to a tool."""
    say = Toolbox((tool("say", a={"type": "string"}),))
    view = ToolView(say, MathView().answer, lambda left, right: True)
    spaced, tight = (
        view.answer("", tagged(f'{{"name": "say", "arguments": {{"a": "{text}"}}}}')) for text in ("a b", "ab")
    )
    assert spaced and tight and MathView().same(spaced, tight)
    assert view.same(spaced, spaced) and not view.same(spaced, tight)
    assert not view.same(spaced, "3") and not view.same("3", spaced) and view.same("3", "4")


def test_a_search_whose_leaves_partly_fail_to_parse_has_a_valid_winner() -> None:
    texts = [tagged(ONE.replace("1", '"x"')), tagged("oops"), "It is 3.", tagged(ONE), f"Let me add. {tagged(ONE)}"]
    scores = dict(zip(texts, [1.0, 0.9, 0.8, 0.3, 0.2], strict=True))

    def propose(request: ProposalRequest) -> list[Step]:
        assert request.tools == (ADD, NOW)
        return [Step(text, 5, StopReason.FINISHED) for text in texts]

    def judge(problem: str, steps: Any) -> float:
        return scores[steps[-1]]

    with HostedEngine(propose, judge, name="scripted") as engine:

        def winner(choice: str, vote: Any) -> Any:
            view = ToolView(Toolbox((ADD, NOW), choice))
            config = SearchConfig(width=5, strategy="best_of_n", vote=vote)
            return engine.search("1+2?", config, tools=(ADD, NOW), view=view)

        free, forced, impossible = winner("auto", "best"), winner("any", "best"), winner("now", "best")
        assert (free.answer, free.text, free.trajectories) == ("It is 3.", "It is 3.", 5)
        assert forced.text == tagged(ONE) and [one.votes for one in forced.candidates] == [2]
        assert BOX.read(forced.text).calls == (ADDED,)
        assert (
            winner("auto", "majority").candidates[0].votes == 2 and winner("auto", "majority").answer == forced.answer
        )
        assert (impossible.answer, impossible.finish_reason, impossible.text) == (None, "no_answer", texts[0])
