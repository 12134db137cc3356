"""Prompts for servers whose chat templates know no instructions: these go where the template reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from ets_engine.errors import ConfigError
from ets_engine.messages import Message
from ets_engine.models.presets import Preset
from ets_engine.remote import Replicas, Server, ServerError, prompts
from ets_engine.remote.capabilities import Capabilities
from ets_engine.remote.prompts import PromptWriter

Roles = tuple[str, ...]


def turns(*said: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in said]


ASKED = turns(("system", "Be brief."), ("user", "1+1?"))
DEVELOPED = turns(("developer", "Be brief."), ("user", "1+1?"))


def render(messages: Any, known: Roles, dropped: Roles = ()) -> str:
    """A chat template that refuses any role it does not know, and leaves out some that it does."""
    for message in messages:
        if message["role"] not in (*known, *dropped):
            raise ValueError(f"{message['role'].title()} role\nnot supported")
    return "".join(f"<{one['role']}>{one['content']}" for one in messages if one["role"] in known) + "<model>"


class Tokenizer:
    """One token per character."""

    chat_template, bos_token, bos_token_id = "some", None, None

    def __init__(self, known: Roles, dropped: Roles = ()) -> None:
        self.known, self.dropped = known, dropped

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return render(messages, self.known, self.dropped)


class Tokenizing:
    """A server with `/tokenize` alone.

    Args:
        known: Roles that its chat template takes.
        status: What it answers where that refuses some.
    """

    def __init__(self, known: Roles, status: int = 400) -> None:
        self.known, self.status = known, status
        self.asked = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.asked += 1
        try:
            text = body["prompt"] if "prompt" in body else render(body["messages"], self.known)
        except ValueError as error:
            return httpx.Response(self.status, json={"message": str(error)})
        return httpx.Response(200, json={"tokens": list(map(ord, text))})


Make = Callable[..., PromptWriter]


@pytest.fixture
def made() -> Iterator[Make]:
    opened: list[Replicas] = []

    def make(server: Any = None, *, token_prompts: bool = True, **options: Any) -> PromptWriter:
        opened.append(Replicas([Server("http://a/v1", transport=httpx.MockTransport(server))], retries=0))
        able = Capabilities(
            extras=True,
            seed=True,
            choices=True,
            stop="told",
            token_prompts=token_prompts,
            token_ids=token_prompts,
            generation_config=False,
            context_tokens=None,
        )
        return PromptWriter(opened[-1], "m", lambda: able, **options)

    yield make
    for one in opened:
        one.close()


def text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "".join(map(chr, prompt))


CASES = [
    pytest.param(ASKED, ("user",), "<user>Be brief.\n\n1+1?<model>", id="no instructions"),
    pytest.param(ASKED, ("system", "user"), "<system>Be brief.<user>1+1?<model>", id="system"),
    pytest.param(DEVELOPED, ("system", "user"), "<system>Be brief.<user>1+1?<model>", id="developer as system"),
    pytest.param(DEVELOPED, ("user",), "<user>Be brief.\n\n1+1?<model>", id="developer"),
]


@pytest.mark.parametrize(("asked", "known", "expected"), CASES)
def test_the_servers_template_gets_instructions_where_it_reads_them(
    made: Make, asked: list[Message], known: Roles, expected: str
) -> None:
    assert text(made(Tokenizing(known)).write(asked)) == expected


@pytest.mark.parametrize("token_prompts", [True, False])
@pytest.mark.parametrize(("asked", "known", "expected"), CASES)
def test_so_does_a_template_here(
    made: Make, monkeypatch: Any, asked: list[Message], known: Roles, expected: str, token_prompts: bool
) -> None:
    monkeypatch.setattr(prompts, "_load", lambda name: Tokenizer(known))
    assert text(made(token_prompts=token_prompts, tokenizer="its name").write(asked)) == expected


def test_a_template_here_that_leaves_instructions_out_gets_them_in_the_question(made: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr(prompts, "_load", lambda name: Tokenizer(("user",), dropped=("system",)))
    assert text(made(tokenizer="its name").write(ASKED)) == "<user>Be brief.\n\n1+1?<model>"


def test_a_presets_own_instruction_goes_there_too(made: Make) -> None:
    preset = Preset("brief", "for tests", system="Be brief.")
    assert text(made(Tokenizing(("user",)), preset=preset).write(ASKED[1:])) == "<user>Be brief.\n\n1+1?<model>"


def test_what_no_shape_helps_against_is_said_as_it_was_said_first(made: Make, monkeypatch: Any) -> None:
    asked = [*ASKED, *turns(("tool", "2"))]
    with pytest.raises(ServerError, match="answered 400: System role not supported"):
        made(Tokenizing(("user",))).write(asked)
    monkeypatch.setattr(prompts, "_load", lambda name: Tokenizer(("user",)))
    with pytest.raises(ConfigError, match=r"chat template refuses these messages: System role not supported$"):
        made(tokenizer="its name").write(asked)


def test_only_a_refusal_is_tried_in_another_shape(made: Make) -> None:
    server = Tokenizing(("user",), status=503)
    writer = made(server)
    writer.write(ASKED[1:])
    before = server.asked
    with pytest.raises(ServerError, match="answered 503"):
        writer.write(ASKED)
    assert server.asked == before + 1
