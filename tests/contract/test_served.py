"""Both frameworks answer through a model behind a server, asked for by its address alone."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

SETTINGS = {"strategy": "rebase", "width": 2}


class _Server(BaseHTTPRequestHandler):
    """Answers every prompt in one step, and knows tokens as vLLM does: one a character."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            text = body.get("prompt") or "".join(turn["content"] for turn in body["messages"])
            self.reply({"tokens": [ord(sign) for sign in text]})
        elif self.path == "/v1/completions":
            text = "[[ ## answer ## ]]\nThe answer is 2.\n[[ ## completed ## ]]"
            choice = {"text": text, "finish_reason": "stop", "stop_reason": None, "token_ids": [*map(ord, text)]}
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(text) * body.get("n", 1)}
            self.reply({"choices": [{"index": place, **choice} for place in range(body.get("n", 1))], "usage": usage})
        else:
            self.reply({}, 404)

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "m", "max_model_len": 100_000}]}, 200 if self.path == "/v1/models" else 404)

    def reply(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"openai:http://127.0.0.1:{server.server_address[1]}#m"
    server.shutdown()
    server.server_close()
    thread.join()


def close(address: str) -> None:
    from ets_engine.remote import RemoteEngine
    from ets_engine.services import find_service

    engine = find_service(address)
    assert isinstance(engine, RemoteEngine)
    engine.close()


def judge(problem: str, steps: Any) -> float:
    return 0.5


def test_langchain(address: str) -> None:
    pytest.importorskip("langchain_core")
    from ets_integrations.langchain import ChatETS

    chat = ChatETS(**{"model": address, "verifier": judge, **SETTINGS})
    assert "The answer is 2." in str(chat.invoke("1+1?").content)
    again = pickle.loads(pickle.dumps(chat))
    assert again.identity() == chat.identity() and "The answer is 2." in str(again.invoke("1+1?").content)
    assert again.find_service() is chat.find_service()
    close(address)


def test_what_langchain_found_stays_until_it_is_closed(address: str) -> None:
    pytest.importorskip("langchain_core")
    from ets_integrations.langchain import ChatETS, ETSRunnable

    found = weakref.ref(ChatETS(model=address).find_service())
    gc.collect()
    assert found() is not None and ETSRunnable(model=address).find_service() is found()
    close(address)
    assert ChatETS(model=address, verifier=judge, width=1).invoke("1+1?").text, "by a new one"
    gc.collect()
    assert found() is None
    close(address)


def test_copies_of_a_chat_model_hold_names() -> None:
    pytest.importorskip("langchain_core")
    from ets_engine import register_service
    from ets_integrations.langchain import ChatETS

    lock = threading.Lock()  # which no copy holds
    service = SimpleNamespace(name="mine", max_concurrent_searches=1, submit=lock, count_tokens=len)
    register_service("mine", service)  # type: ignore[arg-type]
    chat = ChatETS(model="mine")
    for again in (chat.find_service() and pickle.loads(pickle.dumps(chat)), copy.deepcopy(chat)):
        assert again.find_service() is chat.find_service()


def test_dspy(address: str) -> None:
    dspy = pytest.importorskip("dspy")
    from ets_integrations.dspy import ETSLM

    with dspy.context(lm=ETSLM(address, verifier=judge, search=SETTINGS, cache=False)):
        assert dspy.Predict("question -> answer")(question="1+1?").answer == "The answer is 2."
    close(address)
