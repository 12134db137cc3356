"""What a caller may ask: texts, conversations, and a message that says what is wrong with anything else."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ets_engine.errors import ConfigError
from ets_engine.messages import ROLES, last_user_text, problem_text, to_messages

ASKED = {"role": "user", "content": "1+1?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "2", "tool_call_id": "c1"}


@given(st.text())  # hypothesis draws no surrogates unless asked to
def test_any_text_is_one_user_turn_and_the_problem_itself(text: str) -> None:
    messages = to_messages(text)
    assert messages == ({"role": "user", "content": text},)
    assert last_user_text(messages) == problem_text(messages) == text
    assert to_messages(messages) == messages


@given(st.lists(st.builds(dict, role=st.sampled_from(ROLES), content=st.text(max_size=5)), min_size=1, max_size=5))
def test_a_conversation_stays_as_it_is(messages: list[dict[str, str]]) -> None:
    assert list(to_messages(messages)) == messages
    assert isinstance(problem_text(messages), str)


def test_calls_and_their_results_are_part_of_a_conversation() -> None:
    assert to_messages([ASKED, CALLING, TOLD]) == (ASKED, CALLING, TOLD)
    bare = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}
    assert to_messages((ASKED, bare)) == (ASKED, bare)


def test_what_the_caller_changes_later_changes_nothing() -> None:
    """A search reads its conversation some time after `submit` has returned."""
    given: Any = copy.deepcopy([ASKED, CALLING])
    messages = to_messages(given)
    given[0]["content"] = "2+2?"
    given[1]["tool_calls"][0]["function"]["name"] = "sub"
    assert messages == (ASKED, CALLING)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, r"problem=None: give a text, or messages with a role and a content"),
        (7, r"problem=7: give a text"),
        (b"1+1?", r"problem=b'1\+1\?': give a text"),
        (ASKED, r"problem={.*: give a text"),  # one message is no conversation
        (["1+1?"], r"problem=\['1\+1\?'\]: give a text"),
        ([ASKED, None], r"problem=\[.*: give a text"),
        ((message for message in [ASKED]), r"problem=<generator"),
        ([], r"problem=\[\]: give at least one message"),
        ([{"content": "1+1?"}], r"role=None in .*: choose one of system, developer, user, assistant, tool"),
        ([{"role": "human", "content": "1+1?"}], r"role='human'"),
        ([{"role": ["user"], "content": "1+1?"}], r"role=\['user'\]"),
        ([{"role": "user"}], r"content=None of a user message: give a text"),
        ([{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], r"content=\[.* of a user message"),
        ([{"role": "assistant", "content": None}], r"content=None of a assistant message"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], r"content=None"),
        ([{"role": "user", "content": None, "tool_calls": [CALL]}], r"content=None of a user message"),
        ([{"role": "assistant", "content": "", "tool_calls": ["add"]}], r"tool_calls=\['add'\]: give OpenAI's layout"),
        ([{"role": "assistant", "content": "", "tool_calls": 3}], r"tool_calls=3"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"function": "add"}]}], r"tool_calls=\["),
        ("half a pair \ud83d", r"is no valid text: .*surrogates not allowed"),
        ([ASKED, {"role": "assistant", "content": "\udc00"}], r"is no valid text"),
        ([{**ASKED, "name": "\udc00"}], r"is no valid text"),
        ([{**CALLING, "tool_calls": [{"name": "\udc00", "arguments": {}}]}], r"is no valid text"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        to_messages(prompt)
    assert len(str(refused.value)) < 400


def test_a_message_that_holds_itself_is_refused() -> None:
    endless: dict[str, Any] = dict(ASKED)
    endless["more"] = endless
    with pytest.raises(ConfigError, match="is no valid text"):
        to_messages([endless])


def test_long_refusals_are_cut_short() -> None:
    with pytest.raises(ConfigError) as refused:
        to_messages([{"role": "user", "content": ["x" * 10_000]}])
    assert len(str(refused.value)) < 300


def test_a_model_without_a_chat_template_reads_the_last_user_turn() -> None:
    assert last_user_text([ASKED, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]) == "2+2?"
    with pytest.raises(ConfigError, match="no user message"):
        last_user_text([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([ASKED], "1+1?"),
        ([{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "In English."}, ASKED], "1+1?"),
        ([{"role": "system", "content": "Be brief."}], "Be brief."),  # else there would be no problem at all
        (
            [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}],
            "system: A\ndeveloper: B",
        ),
        ([ASKED, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Twice?"}],
         "user: 1+1?\nassistant: 2\nuser: Twice?"),
        ([ASKED, CALLING, TOLD], 'user: 1+1?\nassistant:  [calls add({"a": 1})]\ntool: 2'),
        (
            [ASKED, {"role": "assistant", "content": "I add.", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}],
            "user: 1+1?\nassistant: I add. [calls add({'a': 1})]",
        ),
        ([CALLING], ' [calls add({"a": 1})]'),
    ],
)  # fmt: skip
def test_what_a_verifier_reads(messages: list[dict[str, Any]], expected: str) -> None:
    assert problem_text(to_messages(messages)) == expected


def test_messages_are_json() -> None:
    assert json.loads(json.dumps(to_messages([ASKED, CALLING, TOLD]))) == [ASKED, CALLING, TOLD]
