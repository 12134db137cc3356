"""One server and several: every way to fail is one line, what can be tried again is, and the key stays where it is."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from ets_engine.errors import ConfigError, EngineError
from ets_engine.remote import Address, Replicas, Server, ServerError
from ets_engine.remote.metrics import read_metrics
from ets_engine.remote.replicas import digest

KEY = "sk-very-secret-4711"
GOOD = {"choices": [{"index": 0, "text": "so", "finish_reason": "stop"}]}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


class Loopback(ThreadingHTTPServer):
    """Answers the requests in turn as it was told to, the last answer again and again."""

    daemon_threads = True

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.seen: list[tuple[str, str | None]] = []  # path and Authorization of each request
        self.gate = threading.Event()  # what hangs, hangs until then
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        self.gate.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        server: Any = self.server
        server.seen.append((self.path, self.headers.get("authorization")))
        answers = server.answers
        status, body, *headers = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == "hang":
            server.gate.wait(10)
            return
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(200 if status == "half" else status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if status == "half" else data)

    def log_message(self, format: str, *args: Any) -> None: ...


Make = Callable[..., tuple[Replicas, list[Loopback], list[float]]]


@pytest.fixture
def made() -> Iterator[Make]:
    """Makes replicas from lists of answers, one list per server; pauses are noted, not waited for."""
    closing: list[Any] = []

    def make(
        *scripts: list[Any], timeout_s: float = 10, **options: Any
    ) -> tuple[Replicas, list[Loopback], list[float]]:
        servers, pauses = [Loopback(*script) for script in scripts], list[float]()
        clients = [Server(one.url, timeout_s=timeout_s) for one in servers]
        replicas = Replicas(clients, **{"retries": 2, "sleep": pauses.append, **options})
        closing.extend([replicas.close, *(one.stop for one in servers)])
        return replicas, servers, pauses

    yield make
    for close in closing:
        close()


@pytest.mark.parametrize(
    ("script", "message", "tries"),
    [
        pytest.param([(500, "oops"), (200, GOOD)], None, 2, id="500 once"),
        pytest.param([("half", GOOD), (200, GOOD)], None, 2, id="half a body once"),
        pytest.param([("hang", ""), (200, GOOD)], None, 2, id="hangs once"),
        pytest.param([(429, {}, ("Retry-After", "3")), (200, GOOD)], None, 2, id="429 once"),
        pytest.param([(408, ""), (503, ""), (200, GOOD)], None, 3, id="408 and 503"),
        pytest.param([(500, {"error": {"message": "out of\nmemory"}})], "answered 500: out of memory", 3, id="500"),
        pytest.param([(404, "a\x1b[2J\x07\u202eb")], r"answered 404: a \[2J b; look at", 1, id="terminal escapes"),
        pytest.param([("half", GOOD)], "broke off: RemoteProtocolError", 3, id="half a body"),
        pytest.param([("hang", "")], "did not answer within 0.3 s", 3, id="hangs"),
        pytest.param([(200, "<html>hello")], "answered no JSON object: '<html>hello'", 1, id="garbage"),
        pytest.param([(200, "[1]")], "answered no JSON object", 1, id="a list"),
        pytest.param([(401, {"error": f"bad key {KEY}"})], "401: bad key .key.; put a valid key into", 1, id="401"),
        pytest.param([(404, {"detail": "no model x"})], "answered 404: no model x", 1, id="404"),
        pytest.param([(422, {"detail": [{"loc": "n"}]})], "answered 422:.*loc", 1, id="422"),
        pytest.param([(307, "", ("Location", "http://other.example/"))], "redirects are not followed", 1, id="307"),
        pytest.param([(429, "", ("Retry-After", "3600"))], "answered 429", 1, id="429 for an hour"),
    ],
)
def test_faults(
    made: Make, caplog: pytest.LogCaptureFixture, script: list[Any], message: str | None, tries: int
) -> None:
    caplog.set_level(logging.DEBUG)
    replicas, [server], _ = made(script, timeout_s=0.3 if ("hang", "") in script else 10)
    if message is None:
        assert replicas.post("/completions", {}) == GOOD
    else:
        with pytest.raises(ServerError, match=message) as caught:
            replicas.post("/completions", {})
        assert isinstance(caught.value, EngineError) and "\n" not in str(caught.value)
        assert KEY not in str(caught.value) + repr(caught.value) + repr(vars(caught.value))
    assert server.seen == [("/v1/completions", f"Bearer {KEY}")] * tries
    assert KEY not in caplog.text + repr(replicas.servers) + str(vars(replicas.servers[0]))


def test_pauses_grow_and_heed_what_the_server_asks_for(made: Make) -> None:
    replicas, _, pauses = made([(500, "")], retries=4)
    with pytest.raises(ServerError):
        replicas.post("/completions", {})
    assert [0.5 <= pause / base <= 1 for pause, base in zip(pauses, (0.5, 1, 2, 4), strict=True)] == [True] * 4
    replicas, _, pauses = made([(429, "", ("Retry-After", "7")), (200, GOOD)])
    replicas.post("/completions", {})
    assert pauses == [7.0]


def test_nobody_there_is_one_line() -> None:
    server = Server("http://127.0.0.1:9/v1")
    replicas = Replicas([server], retries=0)
    with pytest.raises(ServerError, match=r"^http://127.0.0.1:9/v1/completions broke off: ConnectError"):
        replicas.post("/completions", {})
    replicas.close()


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        pytest.param("so \ud83d", KEY, r"the request holds '\\ud83d', half a character", id="text"),
        pytest.param("so", "sk-\u00fc", "OPENAI_API_KEY holds a key that no header can hold", id="key"),
        pytest.param("so", f"{KEY}\n{KEY}", "a key that no header can hold", id="key of two lines"),
        pytest.param("so", f"{KEY}\r{KEY}", "a key that no header can hold", id="key with a return"),
        pytest.param("so", f"{KEY}\x7f{KEY}", "a key that no header can hold", id="key with a control character"),
    ],
)
def test_what_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, text: str, key: str, message: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = Server("http://a/v1", transport=httpx.MockTransport(lambda request: httpx.Response(200, json=GOOD)))
    with pytest.raises(ServerError, match=message) as caught:
        server.post("/completions", {"prompt": text})
    assert str(caught.value).isascii() and not caught.value.is_retryable and not caught.value.is_down
    assert KEY not in str(caught.value)


def test_a_key_file_may_end_with_a_line_end(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    replicas, [server], _ = made([(200, GOOD)])
    replicas.post("/completions", {})
    assert server.seen == [("/v1/completions", f"Bearer {KEY}")]


def test_a_request_that_breaks_the_protocol_is_refused_without_its_text() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError(f"Illegal header value {request.headers['authorization']!r}")

    server = Server("http://a/v1", transport=httpx.MockTransport(refuse))
    with pytest.raises(ServerError, match=r"^http://a/v1/completions: HTTP has no place") as caught:
        server.post("/completions", {})
    assert "Illegal" not in str(caught.value)
    assert not caught.value.is_retryable and not caught.value.is_down


def test_any_text_has_a_digest() -> None:
    assert len({digest(text) for text in ("", "so", "so \ud83d", "so \ud83e")}) == 4


@pytest.mark.parametrize("value", ["", "  "])
def test_without_a_key_no_header_is_sent(made: Make, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", value)
    replicas, [server], _ = made([(200, GOOD)])
    replicas.post("/completions", {})
    assert server.seen == [("/v1/completions", None)]


# ---------------------------------------------------------------------- several replicas


def test_a_subtree_stays_where_it_began_and_prompts_spread(made: Make) -> None:
    replicas, servers, _ = made([(200, GOOD)], [(200, GOOD)])
    for _ in range(4):
        replicas.post("/completions", {}, prefixes=("subtree", "prompt"))
    assert sorted(len(one.seen) for one in servers) == [0, 4]
    for branch in range(32):  # an idle home takes all the subtrees of its prompt
        replicas.post("/completions", {}, prefixes=(f"subtree {branch}", "prompt"))
    assert sorted(len(one.seen) for one in servers) == [0, 36]
    for prompt in range(64):  # fewer than 8 of 64 fair coins: once in 10^10
        replicas.post("/completions", {}, prefixes=(f"prompt {prompt}",))
    assert all(len(one.seen) >= 8 for one in servers)


def test_a_busy_replica_gets_no_new_subtrees_but_keeps_its_own(made: Make) -> None:
    replicas, servers, _ = made([(200, GOOD)], [(200, GOOD)])
    replicas.post("/completions", {}, prefixes=("old", "prompt"))
    home = next(one for one in servers if one.seen)
    home.answers[:] = [("hang", ""), (200, GOOD)]
    busy = threading.Thread(target=replicas.post, args=("/completions", {}), kwargs={"prefixes": ("old",), "load": 64})
    busy.start()
    while len(home.seen) < 2:
        threading.Event().wait(0.001)
    replicas.post("/completions", {}, prefixes=("new", "prompt"))
    assert [len(one.seen) for one in servers if one is not home] == [1]
    replicas.post("/completions", {}, prefixes=("old", "prompt"))
    assert len(home.seen) == 3
    home.gate.set()
    busy.join(10)


def test_a_dead_replica_loses_no_request_is_left_aside_and_asked_again(made: Make) -> None:
    now = [0.0]
    replicas, servers, pauses = made([(200, GOOD)], [(200, GOOD)], clock=lambda: now[0], cooldown_s=30, retries=0)
    replicas.post("/completions", {}, prefixes=("subtree",))
    dead, alive = sorted(servers, key=lambda one: -len(one.seen))
    dead.answers[:] = [(503, "")]
    for _ in range(3):
        assert replicas.post("/completions", {}, prefixes=("subtree",)) == GOOD
    assert (len(dead.seen), len(alive.seen), pauses) == (2, 3, [])
    dead.answers[:] = [(503, ""), (200, GOOD)]
    now[0] = 31.0  # it is asked, and still dead
    replicas.post("/completions", {}, prefixes=("other",))
    while len(dead.seen) < 3:
        time.sleep(0.001)
    replicas.post("/completions", {}, prefixes=("another",))
    assert [path for path, _ in dead.seen[2:]] == ["/v1/models"]
    now[0] = 62.0
    for number in range(2000):
        replicas.post("/completions", {}, prefixes=(f"fresh {number}",))
        if len(dead.seen) > 4:
            break
    assert dead.seen[3][0] == "/v1/models" and len(dead.seen) > 4


def test_all_dead_is_an_error_after_each_had_its_tries(made: Make) -> None:
    replicas, servers, pauses = made([(500, "")], [(500, "")], retries=3)
    with pytest.raises(ServerError, match="answered 500"):
        replicas.post("/completions", {})
    assert [len(one.seen) for one in servers] == [2, 2] and len(pauses) == 1


# ---------------------------------------------------------------------- addresses and metrics


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("openai:http://a:8000/v1#m", "openai:http://a:8000/v1#m"),
        ("openai:https://a, http://b:1/x/v1/#org/m#2", "openai:https://a/v1,http://b:1/x/v1#org/m#2"),
        ("openai:http://[::1]:8000#/a/folder", "openai:http://[::1]:8000/v1#/a/folder"),
    ],
)
def test_addresses(text: str, name: str) -> None:
    assert Address.parse(text).name == name == Address.parse(name).name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://a:8000/v1#m", "write openai:http"),
        ("openai:http://a:8000/v1", "write openai:http"),
        ("openai:#m", "write openai:http"),
        ("openai:a:8000#m", "must be like http://host"),
        ("openai:http://a:port#m", "must be like http://host"),
        ("openai:http://a,#m", "must be like http://host"),
        ("openai:http://me:hunter2@a#m", "of the server a holds a user name"),
        ("openai:http://a/v1?key=hunter2#m", "a password or a query"),
    ],
)
def test_addresses_that_are_none_are_refused_without_their_secrets(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Address.parse(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("# HELP\nvllm:gpu_prefix_cache_queries 10\nvllm:gpu_prefix_cache_hits 5\n", (10, 5, 0.5)),
        (
            'vllm:prefix_cache_queries{e="0"} 6\nvllm:prefix_cache_queries{} 2\nvllm:prefix_cache_hits 2',
            (8, 2, 0.25),
        ),
        ("vllm:prefix_cache_queries_total 0\nvllm:prefix_cache_hits_total 0", (0, 0, 0.0)),
        ('sglang:cache_hit_rate{model_name="a b"} 0.4', (None, None, 0.4)),
        ("vllm:gpu_prefix_cache_hit_rate 0.3", (None, None, 0.3)),
        ("sglang:cache_hit_rate NaN\nnothing else", None),
        ("", None),
    ],
)
def test_metrics(page: str, found: tuple[Any, ...] | None) -> None:
    metrics = read_metrics(page)
    assert found == (metrics and (metrics.queried_tokens, metrics.hit_tokens, metrics.hit_rate))


def test_a_transport_may_stand_for_the_network() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=GOOD))
    with_transport = Server("http://nowhere.example/v1", transport=transport)
    assert with_transport.post("/completions", {}) == GOOD
    with_transport.close()
