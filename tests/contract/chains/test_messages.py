"""Histories of other models, as a search reads them."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from ets_engine import ConfigError
from ets_integrations.langchain.messages import from_langchain

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"name": "add", "args": {"a": 1, "b": 2}, "id": "c1"}

TURNS = {
    "of the Responses API": [
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "output_text", "text": "I add.", "annotations": []},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1, "b": 2}'},
    ],
    "of Anthropic": [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
        {"type": "text", "text": "I add."},
        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1, "b": 2}},
    ],
    "in LangChain's own blocks": [
        {"type": "server_tool_call", "id": "s1", "name": "web_search", "args": {}},
        {"type": "non_standard", "value": {}},
        "I add.",
        {"type": "tool_call", "id": "c1", "name": "add", "args": {"a": 1, "b": 2}},
    ],
    "with no type": [{"cachePoint": {"type": "default"}}, {"type": "text", "text": "I add."}],
}


@pytest.mark.parametrize("blocks", TURNS.values(), ids=TURNS)
def test_of_a_model_s_turn_the_text_and_the_calls_are_read(blocks: list[Any]) -> None:
    (turn,) = from_langchain([AIMessage(blocks, tool_calls=[CALL])])
    assert turn["content"] == "I add."
    assert [call["function"]["name"] for call in turn["tool_calls"]] == ["add"]


def test_a_refusal_is_what_the_model_said() -> None:
    assert from_langchain([AIMessage([{"type": "refusal", "refusal": "I won't."}])])[0]["content"] == "I won't."


UNREADABLE = [HumanMessage([IMAGE]), SystemMessage([IMAGE]), ToolMessage([IMAGE], tool_call_id="c1")]


@pytest.mark.parametrize("message", UNREADABLE, ids=lambda message: message.type)
def test_what_a_search_cannot_read_is_refused_unless_texts_are_enough(message: BaseMessage) -> None:
    with pytest.raises(ConfigError, match=f"'image_url' in a {message.type} message"):
        from_langchain([message])
    assert from_langchain([message], texts_only=True)[0]["content"] == ""


def test_a_turn_is_a_model_s_by_its_role() -> None:
    assert from_langchain([ChatMessage(content=[*TURNS["of Anthropic"]], role="assistant")])[0]["content"] == "I add."
