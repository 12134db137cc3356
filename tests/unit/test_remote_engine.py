"""Searches over servers of every kind: what they are asked, what their replies mean, and that a fault is data."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from ets_engine.answers import MathView
from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, EngineError, ETSError
from ets_engine.hosted import ProposalRequest
from ets_engine.lexical import HashEmbedder
from ets_engine.models.presets import BOXED, STEP_MARK, Preset, StepBoundary
from ets_engine.protocols import SearchService
from ets_engine.remote import RemoteEngine, RemotePolicy, Replicas, Server, ServerError, connect, policy, prompts
from ets_engine.remote.presets import end_texts
from ets_engine.testing import hash_score
from ets_engine.types import Step, StopReason

KEY = "sk-very-secret-4711"
PROBLEM = "What is 1+1?"
CONTEXT = 400


def judge(problem: str, steps: Sequence[str]) -> float:
    return hash_score("".join(steps))


def small(**changes: Any) -> SearchConfig:
    return SearchConfig(**{"strategy": "rebase", "width": 6, "max_steps": 6, "trace": True, **changes})


class FakeServer:
    """A model of one character a token that writes two steps of one line, then the answer, then ends.

    Args:
        kind: "vllm", "sglang", "openai" (says nothing of stops, refuses what it does not know) or "transformers".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.model = "m"
        self.has_chat_template = True
        self.reply_opening = "<assistant>\n"  # what the chat template puts before a reply
        self.step_opening = ""  # what the model writes before its first line
        self.asked: list[dict[str, Any]] = []  # of completions, what each request held
        self.tokenized: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.fault: Callable[[httpx.Request, dict[str, Any]], httpx.Response | None] = lambda request, body: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.paths.append(path)
        body = json.loads(request.content) if request.content else {}
        if (fault := self.fault(request, body)) is not None:
            return fault
        if path == "/v1/models" and self.kind != "openai":
            more = {"max_model_len": CONTEXT} if self.kind == "vllm" else {}
            return httpx.Response(200, json={"data": [{"id": self.model, **more}]})
        if path == "/tokenize" and self.kind in ("vllm", "sglang"):
            return self.tokenize(body)
        if path == "/metrics" and self.kind == "sglang":
            return httpx.Response(200, text="sglang:cache_hit_rate 0.75")
        if path != "/v1/completions":
            return httpx.Response(404, json={"detail": "Not Found"})
        if body["model"] != self.model:
            return httpx.Response(404, json={"error": {"message": f"no model {body['model']!r}"}})
        self.asked.append(body)
        return self.complete(body)

    def tokenize(self, body: dict[str, Any]) -> httpx.Response:
        self.tokenized.append(body)
        text = body.get("prompt")
        if text is None and self.kind == "sglang":
            return httpx.Response(422, json={"detail": "prompt is missing"})
        if text is None and not self.has_chat_template:
            return httpx.Response(400, json={"message": "you must provide a chat template"})
        if text is None:
            text = "".join(f"<{turn['role']}>{turn['content']}" for turn in body["messages"]) + self.reply_opening
        return httpx.Response(200, json={"tokens": [ord(sign) for sign in text]})

    def complete(self, body: dict[str, Any]) -> httpx.Response:
        own = {"model", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "stop"}
        extras = set(body) - own - ({"generation_config"} if self.kind == "transformers" else set())
        if extras and self.kind in ("openai", "transformers"):
            return httpx.Response(422 if self.kind == "transformers" else 400, json={"detail": f"unexpected {extras}"})
        prompt, is_ids = body["prompt"], isinstance(body["prompt"], list)
        if is_ids and self.kind in ("openai", "transformers"):
            return httpx.Response(400, json={"detail": "prompt must be a string."})
        text = "".join(map(chr, prompt)) if is_ids else prompt
        config = json.loads(body.get("generation_config", "{}"))
        max_tokens = body.get("max_tokens", config.get("max_new_tokens", 16))
        is_sampled = config.get("do_sample", False) if self.kind == "transformers" else body.get("temperature", 1) > 0
        count = 1 if self.kind == "transformers" else body.get("n", 1)
        if self.kind == "vllm" and count > 1 and not is_sampled:
            return httpx.Response(400, json={"message": "n must be 1 when using greedy sampling"})
        choices = []
        for index in range(count):
            seed = f"{body.get('seed')} {index}" if is_sampled else ""
            choices.append({"index": index, **self.write(text, seed, max_tokens, body)})
        used = sum(choice.pop("used") for choice in choices)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": used, "total_tokens": len(prompt) + used}
        return httpx.Response(200, json={"choices": choices, "usage": usage})

    def write(self, prompt: str, seed: str, max_tokens: int, body: dict[str, Any]) -> dict[str, Any]:
        sign = hashlib.sha256(f"{prompt} {seed}".encode()).hexdigest()[0]
        lines = prompt.count("\n") - 1 if "\n" in prompt else 0
        whole = "".join(f"line {depth} {sign}\n" for depth in range(lines, 2)) + f"The answer is {int(sign, 16) % 3}."
        if lines == 0 and "\n" in prompt:
            whole = self.step_opening + whole
        stops = {stop: whole.find(stop) for stop in body.get("stop") or () if stop in whole}
        stop = min(stops, key=lambda one: stops[one], default=None)
        text = whole if stop is None else whole[: stops[stop] + len(stop)]
        reason = "stop" if len(text) < max_tokens or (stop and len(text) == max_tokens) else "length"
        text = text[:max_tokens]
        found: dict[str, Any] = {"finish_reason": reason, "used": len(text), "text": text}
        stop = stop if reason == "stop" else None
        kept = {"vllm": body.get("include_stop_str_in_output"), "sglang": body.get("no_stop_trim"), "openai": False}
        if self.kind == "vllm":
            found["stop_reason"] = stop
        if self.kind == "sglang":
            found["matched_stop"] = stop or (2 if reason == "stop" else None)
        if self.kind in ("vllm", "sglang") and body.get("return_token_ids"):
            found["token_ids"] = [ord(one) for one in text]
        if stop is not None and not kept.get(self.kind, True):
            found["text"] = text[: -len(stop)]
        return found


class MadeEngine:
    """Makes engines over fakes and closes them."""

    def __init__(self) -> None:
        self.engines: list[RemoteEngine] = []

    def __call__(self, server: Any, verifier: Any = judge, **options: Any) -> RemoteEngine:
        options = {"boundaries": ["\n"], "retries": 0, **options}
        address = options.pop("address", "openai:http://a#m")
        self.engines.append(connect(address, verifier, transport=httpx.MockTransport(server), **options))
        return self.engines[-1]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeEngine]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    make = MadeEngine()
    yield make
    for engine in make.engines:
        engine.close()


KINDS = ["vllm", "sglang", "openai", "transformers"]


# ---------------------------------------------------------------------- every kind of server


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["ets", "rebase", "greedy"])
def test_a_search_over_every_kind_of_server(made: MadeEngine, kind: str, strategy: Any) -> None:
    engine = made(FakeServer(kind), template="plain")
    assert isinstance(engine, SearchService)
    result = engine.search(PROBLEM, small(strategy=strategy))
    assert (result.finish_reason, result.num_errors, len(result.steps)) == ("stop", 0, 3)
    assert all(step.text.endswith("\n") for step in result.steps[:2]) and result.steps[2].text.startswith("The answer")
    assert result.trace is not None
    assert all(node.num_tokens == len(node.text) for node in result.trace[1:])
    assert result.generated_tokens == sum(len(node.text) for node in result.trace)
    again = engine.search(PROBLEM, small(strategy=strategy))
    assert again.model_dump(exclude={"timing"}) == result.model_dump(exclude={"timing"}), "the same seed"


def test_a_server_that_takes_tokens_is_sent_the_sampled_ones_once_per_parent(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    result = made(server).search(PROBLEM, small())
    assert result.trace is not None
    texts = {0: "<user>What is 1+1?<assistant>\n"}
    for node in result.trace[1:]:
        texts[node.id] = texts[node.parent] + node.text
    parents = [node.id for node in result.trace if any(one.parent == node.id for one in result.trace)]
    asked = server.asked[-len(parents) :]
    sent = ["".join(map(chr, body["prompt"])) for body in asked]
    assert sorted(sent) == sorted(texts[parent] for parent in parents)
    assert asked[0]["n"] == 6 and asked[0]["stop"] == ["\n"] and "seed" in asked[0]
    engine = made(server)
    engine.search("What is 2+2?", small())
    assert len({body["seed"] for body in asked + server.asked[-6:]}) == len(asked) + 6, "no two requests share one"
    assert result.prompt_tokens == len(texts[0])


def test_transformers_serve_is_told_to_sample(made: MadeEngine) -> None:
    server = FakeServer("transformers")
    result = made(server, template="plain").search(PROBLEM, small(temperature=0.7, top_p=0.9, top_k=5))
    assert result.trace is not None and len({node.text for node in result.trace if node.depth == 1}) > 1
    last = server.asked[-1]
    told = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    assert json.loads(last["generation_config"]) == told
    assert set(last) == {"model", "prompt", "max_tokens", "generation_config", "seed", "stop"}


def test_a_server_that_says_nothing_of_stops_is_not_asked_to_stop(made: MadeEngine, caplog: Any) -> None:
    server = FakeServer("openai")
    engine = made(server, template="plain")
    engine.search(PROBLEM, small())
    engine.search(PROBLEM, small())
    assert "stop" not in server.asked[-1]
    assert [record.message for record in caplog.records] == [
        "the server of 'm' does not say what stops it; steps are cut here"
    ]


def test_a_server_that_fails_over_stop_texts_is_not_asked_to_stop(made: MadeEngine) -> None:
    server = FakeServer("transformers")
    server.fault = lambda request, body: httpx.Response(500) if "stop" in body else None
    assert made(server, template="plain").search(PROBLEM, small()).finish_reason == "stop"


@pytest.mark.parametrize("kind", KINDS)
def test_limits(made: MadeEngine, kind: str) -> None:
    engine = made(FakeServer(kind), template="plain")
    short = engine.search(PROBLEM, small(max_step_tokens=4))
    assert short.trace is not None
    found = {(node.text, node.stop) for node in short.trace if node.depth == 1}
    assert found == {("line", StopReason.BOUNDARY)}, "a long step goes on in the next"
    cut = engine.search(PROBLEM, small(max_tokens=13))
    assert cut.trace is not None and cut.finish_reason == "length"
    assert all(node.stop is StopReason.LENGTH for node in cut.trace if node.depth == 2)
    assert max(len(node.text) for node in cut.trace if node.depth == 2) == 13 - len("line 0 x\n")


@pytest.mark.parametrize("kind", KINDS)
def test_stop_texts_of_the_search_finish_it(made: MadeEngine, kind: str) -> None:
    result = made(FakeServer(kind), template="plain").search(PROBLEM, small(stop=("answer", "line 1")))
    assert result.trace is not None
    ends = {node.text for node in result.trace if node.stop is StopReason.FINISHED}
    assert ends == {""}, "the second line begins with a stop text, which is no part of it"


@pytest.mark.parametrize("kind", KINDS)
def test_without_sampling_no_server_is_asked_for_several_choices(made: MadeEngine, kind: str) -> None:
    result = made(FakeServer(kind), template="plain").search(PROBLEM, small(temperature=0.0))
    assert result.trace is not None and (result.finish_reason, result.num_errors) == ("stop", 0)
    assert len({node.text for node in result.trace if node.depth == 1}) == 1


def test_a_full_context_ends_a_path(made: MadeEngine) -> None:
    result = made(FakeServer("vllm"), template="plain").search("x" * (CONTEXT - 15), small())
    assert (result.finish_reason, result.num_errors) == ("length", 0)


def test_sampling_that_a_server_lacks_is_refused(made: MadeEngine) -> None:
    engine = made(FakeServer("openai"), template="plain")
    with pytest.raises(EngineError, match=r"'top_k': 5.*leave the others out"):
        engine.search(PROBLEM, small(top_k=5))


@pytest.mark.parametrize("kind", KINDS)
def test_blank_lines_alone_are_no_step(made: MadeEngine, kind: str) -> None:
    server = FakeServer(kind)
    server.step_opening = "\n"
    result = made(server, template="plain").search(PROBLEM, small())
    assert result.trace is not None and (result.finish_reason, result.num_errors) == ("stop", 0)
    assert all(node.text.strip() and node.num_tokens == len(node.text) for node in result.trace[1:])
    assert result.steps[0].text.startswith("\nline ") and result.steps[0].text.endswith("\n")


def test_a_step_whose_second_half_fails_fails_alone(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    server.step_opening = "\n"
    begun = [ord(sign) for sign in f"<user>{PROBLEM}<assistant>\n\n"]
    server.fault = lambda request, body: httpx.Response(400, text="no") if body.get("prompt") == begun else None
    with pytest.raises(EngineError, match="answered 400: no"):
        made(server).search(PROBLEM, small())
    assert sum("top_p" in body for body in server.asked) == 1, "siblings with the same blank are gone on with together"


# ---------------------------------------------------------------------- presets

COUNTDOWN = "Use 1, 3, 7 and 17 to make 22."
QWEN = "Qwen/Qwen2.5-Math-7B-Instruct"


def preset(name: str) -> dict[str, Any]:
    """Options of `made` that leave the rest to a preset."""
    return {"config": EngineConfig(preset=name), "boundaries": None}


def sent(server: FakeServer) -> str:
    """The prompt of the last completion."""
    prompt = server.asked[-1]["prompt"]
    return prompt if isinstance(prompt, str) else "".join(map(chr, prompt))


@pytest.mark.parametrize("kind", KINDS)
def test_a_preset_decides_prompt_and_steps_and_their_longest(made: MadeEngine, kind: str) -> None:
    server = FakeServer(kind)
    result = made(server, **preset("reference")).search(COUNTDOWN, small())
    assert sent(server).startswith(f"{COUNTDOWN}\nline 0 ") and len(result.steps) == 3 and result.trace is not None
    assert all(node.text.endswith("\n") for node in result.trace[1:] if node.stop is StopReason.BOUNDARY)
    limits = json.loads(server.asked[-1].get("generation_config", "{}")) | server.asked[-1]
    assert limits["max_tokens"] == 48 and server.asked[-1].get("stop", ["\n"]) == ["\n"]
    assert result.answer is None, "the lines are none of a countdown, whatever numbers they end with"
    assert made(server, **preset("plain")).search(COUNTDOWN, small()).answer is not None


def test_a_served_model_is_known_by_its_name(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    server.model = QWEN
    engine = made(server, address=f"openai:http://a#{QWEN}", boundaries=None)
    engine.search(PROBLEM, small())
    assert sent(server).startswith(f"<system>{BOXED}<user>{PROBLEM}<assistant>")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM}]
    engine.search(asked, small())
    assert sent(server).startswith(f"<system>Be brief.<user>{PROBLEM}<assistant>"), "the conversation's own goes before"
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    engine.search(PROBLEM, small(), tools=[tool])
    assert sent(server).startswith(f"<user>{PROBLEM}<assistant>")
    found = engine.describe()
    assert (found.preset, found.boundaries) == ("qwen_math", ("\n\n",))
    assert found.prompts == f"the chat template, by the server's tokenizer, after the instruction {BOXED!r}"


def test_a_model_that_no_preset_is_for_is_asked_without_instructions(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    engine = made(server, boundaries=None)
    engine.search(PROBLEM, small())
    assert sent(server).startswith(f"<user>{PROBLEM}<assistant>") and server.asked[-1]["stop"] == ["\n\n"]
    assert engine.describe().preset == "chat"


def test_texts_that_finish_a_solution_go_before_the_searchs_own(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    made(server, **preset("qwen_math_base")).search(PROBLEM, small(stop=("END",)))
    assert server.asked[-1]["stop"] == ["\n\n", "\n\nQuestion:", "END"]
    assert sent(server).startswith(f"Question: {PROBLEM}\nAnswer:")


@pytest.mark.parametrize(("name", "thinks"), [("qwen3", True), ("qwen3_direct", False)])
def test_the_server_is_told_the_options_of_its_chat_template(made: MadeEngine, name: str, thinks: bool) -> None:
    server = FakeServer("vllm")
    made(server, **preset(name)).search(PROBLEM, small())
    told = [body["chat_template_kwargs"] for body in server.tokenized if "messages" in body]
    assert told and all(one == {"enable_thinking": thinks} for one in told)


@pytest.mark.parametrize("name", ["deepseek_r1", "auto"])
@pytest.mark.parametrize(
    ("opening", "begun", "answers"), [("<think>\n", "", False), ("", "", True), ("", "<think>So", False)]
)
def test_answers_of_a_model_come_after_the_thought_that_its_prompt_opened(
    made: MadeEngine, name: str, opening: str, begun: str, answers: bool
) -> None:
    server = FakeServer("vllm")
    server.reply_opening = f"<assistant>\n{opening}"
    asked = [{"role": "user", "content": PROBLEM}, *([{"role": "assistant", "content": begun}] if begun else [])]
    engine = made(server, **preset(name))
    assert (engine.search(asked, small()).answer is not None) == answers
    if name == "deepseek_r1" and not begun:
        assert sent(server).startswith(f"<user>{BOXED}\n\n{PROBLEM}<assistant>\n{opening}")
    given = made(server, **preset(name), view=MathView())
    assert given.search(asked, small()).answer is not None, "a view of the caller's goes before"
    assert engine.search(asked, small(), view=MathView()).answer is not None


def test_the_engines_own_verifier_reads_no_marks(made: MadeEngine) -> None:
    server, read = FakeServer("vllm"), list[str]()

    def reading(problem: str, steps: Sequence[str]) -> float:
        read.extend(steps)
        return judge(problem, steps)

    server.step_opening = STEP_MARK
    engine = made(server, reading, config=EngineConfig(preset="math_shepherd"))
    result = engine.search(PROBLEM, small())
    assert STEP_MARK in result.steps[0].text and read and not any(STEP_MARK in step for step in read)


def test_a_preset_without_a_chat_template_reads_the_last_question_as_the_problem(made: MadeEngine) -> None:
    seen: set[str] = set()

    def reading(problem: str, steps: Sequence[str]) -> float:
        seen.add(problem)
        return judge(problem, steps)

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi."}]
    made(FakeServer("vllm"), reading, **preset("plain")).search([*turns, {"role": "user", "content": PROBLEM}], small())
    assert seen == {PROBLEM}


@pytest.mark.parametrize("name", ["qwen_math", "qwen_math_base"])
def test_a_prompt_of_the_callers_goes_before_the_presets(made: MadeEngine, name: str) -> None:
    server = FakeServer("vllm")
    made(server, **preset(name), template="Q: {problem}\n").search(PROBLEM, small())
    assert sent(server).startswith(f"Q: {PROBLEM}\n")


def test_an_instruction_that_nothing_can_give_is_refused(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    server.has_chat_template = False
    engine = made(server, **preset("qwen_math"))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^preset='qwen_math' needs a chat template, and 'm' has none; choose"):
            engine.search(PROBLEM, small())


def test_steps_that_no_text_ends_are_refused_unless_the_caller_names_some(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    with pytest.raises(
        ConfigError, match=r"^preset='llama3': .* begin with '\\n## Step', .*connect\(boundaries=\[\.\.\.\]\)$"
    ):
        made(server, **preset("llama3"))
    found = made(server, config=EngineConfig(preset="llama3"), boundaries=["\n"]).describe()
    assert found.boundaries == ("\n",) and "after the instruction 'Solve the following math" in found.prompts
    with pytest.raises(ConfigError, match="preset='qwen' is unknown"):
        made(server, **preset("qwen"))


@pytest.mark.parametrize(
    "boundary",
    [StepBoundary(tokens=64), StepBoundary(ends=(".",), is_over=str.isspace), StepBoundary()],
    ids=["tokens", "a function", "none"],
)
def test_only_texts_end_a_step_there(boundary: StepBoundary) -> None:
    with pytest.raises(ConfigError, match=r"^preset='mine': its steps .*a server only stops at texts"):
        end_texts(Preset("mine", "for tests", boundary=boundary))


# ---------------------------------------------------------------------- prompts


def test_the_servers_tokenizer_writes_prompts_and_a_model_without_template_gets_a_line(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    server.has_chat_template = False
    made(server).search(PROBLEM, small())
    assert "".join(map(chr, server.asked[-1]["prompt"])).startswith(f"{PROBLEM}\nline 0")


def test_a_template_of_the_callers(made: MadeEngine) -> None:
    server = FakeServer("openai")
    made(server, template="Q: {problem} A:\n").search(PROBLEM, small())
    assert server.asked[-1]["prompt"].startswith(f"Q: {PROBLEM} A:\nline 0")
    with pytest.raises(ConfigError, match=r"has no \{problem\}"):
        made(server, template="nothing")


@pytest.mark.parametrize("kind", ["sglang", "openai"])
def test_unknown_ways_to_prompt_are_refused_with_the_way_out(made: MadeEngine, kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(prompts, "_load_cached", lambda name: None)
    with pytest.raises(ConfigError, match="pass tokenizer=folder or hub name"):
        made(FakeServer(kind)).search(PROBLEM, small())


def test_tools_need_a_chat_template(made: MadeEngine) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(ConfigError, match="without a chat template"):
        made(FakeServer("openai"), template="plain").search(PROBLEM, small(), tools=tools)


class CharacterTokenizer:
    """One token per character, and "^" at the beginning of a text."""

    bos_token, bos_token_id = "^", ord("^")

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(sign) for sign in ("^" if add_special_tokens else "") + text]}

    def apply_chat_template(self, turns: Any, *, tools: Any, add_generation_prompt: bool, tokenize: bool) -> str:
        if any(turn["role"] == "tool" for turn in turns):
            raise ValueError("no such role")
        return "^" + "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + f"{len(tools or ())}<me>\n"


@pytest.mark.parametrize(
    ("kind", "chat_template", "prompt"),
    [
        ("sglang", "some", "^<user>What is 1+1?0<me>\n"),
        ("transformers", "some", "<user>What is 1+1?0<me>\n"),  # this server adds the beginning itself
        ("sglang", None, "^What is 1+1?\n"),
        ("transformers", None, "What is 1+1?\n"),
    ],
)
def test_a_local_tokenizer(made: MadeEngine, monkeypatch: Any, kind: str, chat_template: Any, prompt: str) -> None:
    monkeypatch.setattr(prompts, "_load", lambda name: CharacterTokenizer(chat_template))
    server = FakeServer(kind)
    engine = made(server, tokenizer="its name")
    result = engine.search(PROBLEM, small())
    sent = next(body["prompt"] for body in server.asked if body.get("max_tokens") == small().max_step_tokens)
    assert (sent if isinstance(sent, str) else "".join(map(chr, sent))) == prompt
    assert isinstance(sent, list) == (kind == "sglang") and engine.count_tokens("12345") == 5
    assert (result.finish_reason, result.prompt_tokens) == ("stop", len(prompt))
    if chat_template:
        engine.search(PROBLEM, small(), tools=[{"type": "function", "function": {"name": "add"}}])
        with pytest.raises(ConfigError, match="chat template refuses these messages: no such role"):
            engine.search([{"role": "tool", "content": "1"}, {"role": "user", "content": "2"}], small())


BEGUN = [{"role": "user", "content": PROBLEM}, {"role": "assistant", "content": "So"}]


@pytest.mark.parametrize(
    ("kind", "options", "prompt"),
    [
        pytest.param("vllm", {}, "<user>What is 1+1?<assistant>\nSo", id="the server's tokenizer"),
        pytest.param("sglang", {"tokenizer": "its name"}, "^<user>What is 1+1?0<me>\nSo", id="a local one, ids"),
        pytest.param("openai", {"tokenizer": "its name"}, "<user>What is 1+1?0<me>\nSo", id="a local one, text"),
        pytest.param("vllm", {"template": "plain"}, "What is 1+1?\nSo", id="plain, ids"),
        pytest.param("openai", {"template": "plain"}, "What is 1+1?\nSo", id="plain, text"),
    ],
)
def test_a_reply_that_was_begun_is_gone_on_with(
    made: MadeEngine, monkeypatch: Any, kind: str, options: dict[str, str], prompt: str
) -> None:
    monkeypatch.setattr(prompts, "_load", lambda name: CharacterTokenizer("some"))
    server = FakeServer(kind)
    result = made(server, **options).search(BEGUN, small())
    sent = next(body["prompt"] for body in server.asked if body.get("max_tokens") == small().max_step_tokens)
    assert (sent if isinstance(sent, str) else "".join(map(chr, sent))).startswith(prompt)
    assert not result.text.startswith("So")


@pytest.mark.parametrize("opening", ["<assistant><think>\n", "<assistant><think>", "<assistant>\n<think>\n"])
def test_a_begun_thought_is_opened_once(made: MadeEngine, opening: str) -> None:
    server = FakeServer("vllm")
    server.reply_opening = opening
    engine = made(server)
    thinking = [BEGUN[0], {"role": "assistant", "content": "<think>\nSo"}]
    assert engine.count_prompt(thinking) == len(f"<user>{PROBLEM}{opening}So")
    server.reply_opening = "<assistant>\n"
    assert made(server).count_prompt(thinking) == len(f"<user>{PROBLEM}<assistant>\n<think>\nSo")


def test_a_reply_to_nothing_is_refused(made: MadeEngine) -> None:
    with pytest.raises(ConfigError, match="no question before the reply to go on with"):
        made(FakeServer("vllm")).search(BEGUN[1:], small())


def test_a_given_tokenizer_counts_from_the_beginning(made: MadeEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr(prompts, "_load", lambda name: CharacterTokenizer("some"))
    server = FakeServer("openai")
    assert made(server, tokenizer="its name").count_tokens("12345") == 5
    assert server.paths == []


def test_a_tokenizer_runs_no_code_of_its_own(monkeypatch: Any) -> None:
    from transformers import AutoTokenizer

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: told.append(options))
    prompts._load("its name")
    prompts._load_cached("its name")
    assert [options["trust_remote_code"] for options in told] == [False, False]


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(lambda: httpx.Response(500), "answered 500", id="500"),
        pytest.param(lambda: httpx.Response(200, text="hello"), "no JSON object: 'hello'", id="garbage"),
        pytest.param(lambda: httpx.Response(401, json={"error": KEY}), r"answered 401: \[key\]", id="401"),
        pytest.param(lambda: httpx.Response(200, json={"id": 1}), "has no choices, only", id="no choices"),
        pytest.param(lambda: httpx.Response(200, json={"choices": [{"text": 3}]}), "has no text", id="no text"),
        pytest.param(lambda: httpx.Response(200, json={"choices": [{"text": "a"}]}), "gave 1 choices, 6", id="too few"),
        pytest.param(
            lambda: httpx.Response(200, json={"choices": [{"text": "a", "finish_reason": "abort"}] * 6}),
            "ended a step for 'abort'",
            id="abort",
        ),
    ],
)
def test_a_server_that_breaks_after_it_was_probed(made: MadeEngine, caplog: Any, answer: Any, message: str) -> None:
    caplog.set_level(logging.DEBUG)
    server = FakeServer("vllm")
    server.fault = lambda request, body: answer() if "top_p" in body else None
    with pytest.raises(EngineError, match=message) as caught:
        made(server).search(PROBLEM, small())
    assert KEY not in str(caught.value) + caplog.text


def test_a_branch_whose_request_fails_dies_alone(made: MadeEngine, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    server = FakeServer("vllm")
    failed: list[int] = []

    def once(request: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if "top_p" in body and len(body["prompt"]) > 32 and not failed:
            failed.append(body.get("n", 1))
            return httpx.Response(400, json={"message": f"bad luck {KEY}"})
        return None

    server.fault = once
    engine = made(server)
    events: list[str] = []
    result = engine.search(PROBLEM, small(), on_event=lambda event: events.append(event.model_dump_json()))
    assert (result.finish_reason, result.num_errors) == ("stop", failed[0])
    assert KEY not in result.model_dump_json() + caplog.text + "".join(events) + repr(engine.__reduce__()) + engine.name


def test_a_replica_that_dies_in_the_middle_of_a_search_loses_nothing(made: MadeEngine) -> None:
    servers = {"a": FakeServer("vllm"), "b": FakeServer("vllm")}
    served: list[str] = []

    def route(request: httpx.Request) -> httpx.Response:
        host = request.url.host
        sampled = b"top_p" in request.content
        if served and host == served[0]:
            raise httpx.ConnectError("connection refused")
        if sampled:
            served.append(host)
        return servers[host](request)

    engine = made(route, address="openai:http://a,http://b#m")
    result = engine.search(PROBLEM, small())
    assert (result.finish_reason, result.num_errors) == ("stop", 0)
    assert set(served) == {"a", "b"} and len(set(served[1:])) == 1
    alone = made(FakeServer("vllm")).search(PROBLEM, small())
    assert alone.trace == result.trace


@pytest.mark.parametrize(
    ("kind", "model", "message"), [("vllm", "other", "answered 404: no model 'other'"), ("none", "m", "answered 404")]
)
def test_no_such_model_or_no_completions(made: MadeEngine, kind: str, model: str, message: str) -> None:
    server = FakeServer(kind)
    if kind == "none":
        server.fault = lambda request, body: httpx.Response(404)
    with pytest.raises(ServerError, match=message):
        made(server, address=f"openai:http://a#{model}", template="plain").search(PROBLEM, small())


def test_a_failed_probe_is_said_to_all_and_tried_again_later(made: MadeEngine, monkeypatch: Any) -> None:
    server = FakeServer("vllm")
    server.fault = lambda request, body: httpx.Response(503)
    engine = made(server)
    with pytest.raises(ServerError, match="answered 503"):
        engine.search(PROBLEM, small())
    tried = len(server.paths)
    with pytest.raises(ServerError, match="answered 503") as caught:
        engine.search(PROBLEM, small())
    assert caught.value.status == 503 and len(server.paths) == tried, "nobody waits for the same failure again"
    server.fault = lambda request, body: None
    monkeypatch.setattr(policy, "_FAILURE_KEPT_S", 0.0)
    assert engine.search(PROBLEM, small()).finish_reason == "stop"


# ---------------------------------------------------------------------- figures and names


def test_kv_figures_are_counted_from_the_tree(made: MadeEngine) -> None:
    result = made(FakeServer("vllm")).search(PROBLEM, small())
    assert result.kv is not None and result.trace is not None and result.verifier_kv is None
    assert result.kv.unique_tokens == sum(node.num_tokens for node in result.trace)
    assert result.kv.sharing_ratio > 1.5 and result.kv.bytes_per_token == 0
    first = result.prompt_tokens + sum(node.num_tokens for node in result.trace if node.depth == 1)
    assert result.kv.unique_tokens >= result.kv.peak_tokens >= result.kv.mean_tokens >= first


def test_server_metrics(made: MadeEngine) -> None:
    found = made(FakeServer("sglang"), address="openai:http://a:1/v1,http://b/x/v1#m").server_metrics()
    assert found["http://a:1/v1"] is not None and found["http://a:1/v1"].hit_rate == 0.75
    assert found["http://b/x/v1"] is None


def test_names(made: MadeEngine) -> None:
    def named(verifier: Any, **options: Any) -> str:
        return made(FakeServer("vllm"), verifier, **{"boundaries": ["\n\n"], **options}).name

    judge.id = "mine"  # type: ignore[attr-defined]
    try:
        assert named(None) == "openai:http://a/v1#m"
        assert named(judge) == "openai:http://a/v1#m+mine"
        assert named("judge:openai:http://c#j") == "openai:http://a/v1#m+judge:openai:http://c/v1#j"
        assert named(None, boundaries=["\n"], template="plain") != named(None, boundaries=["\n"])
    finally:
        del judge.id  # type: ignore[attr-defined]
    assert named(judge) != named(judge), "two functions without a name are never taken for each other"


def test_names_tell_views_and_embedders_apart(made: MadeEngine) -> None:
    names = [made(FakeServer("vllm"), None, view=MathView(), boundaries=["\n\n"]).name for _ in range(2)]
    names.append(made(FakeServer("vllm"), None, embedder=HashEmbedder(), boundaries=["\n\n"]).name)
    assert len(set(names)) == 3
    assert [name.partition(":http://a/v1#m+")[2][:12] for name in names] == ["view=object:"] * 2 + ["embedder=obj"]
    named = HashEmbedder()
    named.id = "words"  # type: ignore[attr-defined]
    engine = made(FakeServer("vllm"), None, embedder=named, boundaries=["\n\n"])
    assert engine.name == "openai:http://a/v1#m+embedder=words"


def test_a_name_says_what_decides_the_scores_of_a_prm_that_runs_here(made: MadeEngine, monkeypatch: Any) -> None:
    from ets_engine.models import PrmScorer

    monkeypatch.setattr(PrmScorer, "from_pretrained", lambda verifier, config: judge)

    def named(**settings: Any) -> str:
        return made(FakeServer("vllm"), "prm", config=EngineConfig(**settings), boundaries=["\n\n"]).name

    assert named() == named(page_tokens=8) == "openai:http://a/v1#m+prm"
    options = {"token": KEY, "revision": "x", "attention": {"b": 1, "a": 2}}
    assert named(verifier_format="trl", dtype="float64", step_separator="\n", verifier_load_options=options) == (
        "openai:http://a/v1#m+prm+dtype='float64'+step_separator='\\n'+verifier_format='trl'"
        "+verifier_load_options={'attention': {'a': 2, 'b': 1}, 'revision': 'x'}"
    )
    assert named(verifier_load_options={"token": KEY}) == named()


@pytest.mark.parametrize(
    ("verifier", "by"),
    [
        (None, "what each search brings"),
        (judge, "an object of the caller's"),
        ("judge:openai:http://c#j", "a chat model"),
    ],
    ids=["none", "function", "judge"],
)
@pytest.mark.parametrize("setting", [{"verifier_format": "trl"}, {"step_separator": "|"}], ids=["format", "separator"])
def test_settings_of_a_prm_need_one(made: MadeEngine, verifier: Any, by: str, setting: dict[str, Any]) -> None:
    [(name, value)] = setting.items()
    with pytest.raises(ConfigError, match=f"^{name}='{re.escape(value)}': no PRM is loaded here .* by {by}"):
        made(FakeServer("vllm"), verifier, config=EngineConfig(**setting))


def test_settings_of_a_served_prm_say_what_it_reads_and_are_in_the_name(made: MadeEngine) -> None:
    read: list[str] = []

    def pool(request: httpx.Request, body: dict[str, Any]) -> httpx.Response | None:
        if request.url.path != "/pooling":
            return None
        read.extend(body["input"])
        return httpx.Response(200, json={"data": [{"data": [0.25, 0.75]} for _ in body["input"]]})

    server = FakeServer("vllm")
    server.fault = pool
    config = EngineConfig(verifier_format="trl", step_separator="|")
    engine = made(server, "pooling:openai:http://c#prm", config=config)
    assert engine.name.endswith("+pooling:openai:http://c/v1#prm+verifier_format='trl'+step_separator='|'")
    result = engine.search(PROBLEM, small())
    assert (result.score, result.num_errors) == (0.75, 0)
    assert {text.rpartition("line")[0] for text in read if text.count("|") == 2} == {f"{PROBLEM}|"}


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        pytest.param(
            "vllm",
            {},
            {"context_tokens": CONTEXT, "token_prompts": True, "token_ids": True, "choices": True, "stop": "told"}
            | {"cuts": True, "prompts": "the chat template, by the server's tokenizer"},
            id="vllm",
        ),
        pytest.param(
            "sglang",
            {"template": "Q: {problem}"},
            {"stop": "told", "metrics": {"http://a/v1": True}, "token_ids": True}
            | {"prompts": "the problem in 'Q: {problem}', by the server's tokenizer"},
            id="sglang",
        ),
        pytest.param(
            "transformers",
            {"template": "plain"},
            {"stop": "kept", "choices": False, "token_prompts": False, "cuts": False, "context_tokens": None}
            | {"prompts": "the problem on a line of its own", "metrics": {"http://a/v1": False}},
            id="transformers",
        ),
        pytest.param("openai", {"template": "plain"}, {"stop": "silent", "choices": True, "seed": True}, id="openai"),
    ],
)
def test_what_is_known_of_a_server(made: MadeEngine, kind: str, options: Any, expected: dict[str, Any]) -> None:
    server = FakeServer(kind)
    found = made(server, "judge:openai:http://c#j", **options).describe()
    assert {name: getattr(found, name) for name in expected} == expected
    assert (found.name, found.urls, found.boundaries) == ("m", ("http://a/v1",), ("\n",))
    assert found.verifier_name == "judge:openai:http://c/v1#j" and found.call_s > 0
    assert [body["max_tokens"] for body in server.asked[-5:]] == [1] * 5


def find_again(*key: str) -> tuple[str, ...]:
    """What stands for an engine in another process."""
    return key


def test_an_engine_is_pickled_as_the_way_to_find_it_again(made: MadeEngine) -> None:
    engine = made(FakeServer("vllm"), rebuild=(find_again, ("openai:http://a#m", "judge")))
    assert pickle.loads(pickle.dumps(engine)) == ("openai:http://a#m", "judge")
    with pytest.raises(ETSError, match="registered"):
        pickle.loads(pickle.dumps(made(FakeServer("vllm"))))


def test_wrong_settings_are_refused_at_once(made: MadeEngine) -> None:
    server = FakeServer("vllm")
    for options, message in (
        ({"boundaries": []}, "give a list of texts"),
        ({"boundaries": "\n"}, "give a list of texts"),
        ({"verifier": 3}, "give a function, a BatchScorer or a name"),
        ({"verifier": "openai:http://c#j"}, "say what it is, judge:openai"),
        ({"verifier": "logprob"}, "which no server tells; give judge:openai"),
        ({"verifier": "self_certainty"}, "which no server tells; give judge:openai"),
        ({"verifier": "probe:no-such-file"}, "which no server tells; give judge:openai"),
        ({"verifier": "pooling:openai:http://c#unknown"}, "what the PRM 'unknown' reads is not known"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(server, **options)
    assert server.paths == []


def test_the_policy_alone_proposes_for_any_hosted_engine() -> None:
    replicas = Replicas([Server("http://a/v1", transport=httpx.MockTransport(FakeServer("vllm")))])
    request = ProposalRequest(
        [{"role": "user", "content": PROBLEM}],
        ["", ""],
        small(),
        parents=(0, 0),
        children=(1, 2),
        paths=[(), ()],
        tokens_left=[8, 8],
    )
    steps = RemotePolicy(replicas, "m", boundaries=["\n"])(request)
    assert [(step.text[:7], step.stop) for step in steps] == [("line 0 ", StopReason.LENGTH)] * 2
    foreign = replace(request, partials=["so"], parents=(3,), children=(4,), paths=[(Step("so", 1),)], tokens_left=[8])
    with pytest.raises(ServerError, match="the tokens of 'so' are not known"):
        RemotePolicy(replicas, "m", boundaries=["\n"])(foreign)
    replicas.close()


def test_importing_it_loads_no_model_library() -> None:
    code = "import sys, ets_engine.remote; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
