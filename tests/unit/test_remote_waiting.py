"""A search over servers waits for none of them beyond its deadline or its end, and keeps what it had until then."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from ets_engine.config import SearchConfig
from ets_engine.deadline import remaining_s
from ets_engine.hosted import HostedEngine, ProposalRequest
from ets_engine.remote import Replicas, Server, ServerError, connect
from ets_engine.types import Step, StopReason

PROBLEM = "What is 1+1?"
SOON_S = 2.0  # long for a machine, short beside any of the waits that are to be cut short
Fault = Callable[[httpx.Request], None]


def works(request: httpx.Request) -> None:
    """No fault at all."""


def hangs(request: httpx.Request) -> None:
    """As a server that takes requests and never answers, for as long as the client waits."""
    time.sleep(request.extensions["timeout"]["read"])
    raise httpx.ReadTimeout("", request=request)


def refuses(request: httpx.Request) -> None:
    raise Answer(400)


def is_busy(request: httpx.Request) -> None:
    raise Answer(429, {"Retry-After": "20"})


class Answer(Exception):
    """What a server answers instead.

    Args:
        status: Of the answer.
        headers: Of the answer.
    """

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.response = httpx.Response(status, headers=headers)


class Model:
    """Writes a step for ever, judges everything alike, and has whatever fault it is told to have.

    Attributes:
        fault: What happens to a request before it is answered.
        hosts: That were asked, in order.
    """

    def __init__(self, fault: Fault = works) -> None:
        self.fault = fault
        self.hosts: list[str] = []
        self.steps = 0  # requests for steps

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.hosts.append(request.url.host)
        try:
            self.fault(request)
        except Answer as instead:
            return instead.response
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "max_model_len": 9999}]})
        if request.url.path == "/v1/chat/completions":
            return httpx.Response(200, json={"choices": [{"message": {"content": "5"}}]})
        if request.url.path != "/v1/completions":
            return httpx.Response(404)
        body = json.loads(request.content)
        self.steps += PROBLEM in body["prompt"]
        said = {"text": "so\n", "finish_reason": "stop", "stop_reason": "\n"}
        return httpx.Response(200, json={"choices": [{**said, "index": place} for place in range(body.get("n", 1))]})


def of(path: str, fault: Fault, *, after: Callable[[], bool] = lambda: True) -> Fault:
    """A fault of one page alone, from some moment on."""
    return lambda request: fault(request) if request.url.path == path and after() else None


class Gate:
    """A fault that lasts until it is opened: requests wait there.

    Attributes:
        is_reached: Whether a request waits, or did.
    """

    def __init__(self) -> None:
        self._opened = threading.Event()
        self.is_reached = threading.Event()

    def __call__(self, request: httpx.Request) -> None:
        self.is_reached.set()
        self._opened.wait(2 * SOON_S)

    @contextlib.contextmanager
    def holds(self) -> Iterator[None]:
        """Open it at the end; a request waits there from the beginning."""
        assert self.is_reached.wait(SOON_S)
        try:
            yield
        finally:
            self._opened.set()


def judge(problem: str, steps: Sequence[str]) -> float:
    return 0.5


def small(**changes: Any) -> SearchConfig:
    return SearchConfig(**{"strategy": "best_of_n", "width": 1, "max_steps": 50, "max_tokens": 9999, **changes})


def reach(model: Model, verifier: Any = judge, **options: Any) -> Any:
    how: dict[str, Any] = {"template": "plain", "boundaries": ["\n"], "transport": httpx.MockTransport(model)}
    return connect("openai:http://a#m", verifier, **{**how, "timeout_s": 30.0, **options})


@pytest.fixture
def took() -> Iterator[None]:
    """The test itself is over soon, so whatever it did was."""
    began_s = time.monotonic()
    yield
    assert time.monotonic() - began_s < SOON_S


@pytest.mark.usefixtures("took")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models"])
def test_a_deadline_holds_while_the_server_is_not_known_yet(path: str) -> None:
    with reach(Model(of(path, hangs))) as engine:
        result = engine.search(PROBLEM, small(deadline_s=0.3))
    assert (result.finish_reason, result.text, result.num_errors) == ("deadline", "", 0)


@pytest.mark.usefixtures("took")
def test_a_deadline_cuts_a_request_short_and_what_was_there_is_the_result() -> None:
    model = Model()
    model.fault = of("/v1/completions", hangs, after=lambda: model.steps >= 3)
    with reach(model) as engine:
        result = engine.search(PROBLEM, small(deadline_s=0.5))
    assert (result.finish_reason, result.text, result.num_errors) == ("deadline", "so\n" * 3, 0)


@pytest.mark.usefixtures("took")
def test_so_it_does_with_a_served_verifier_which_has_not_failed_by_that(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(of("/v1/chat/completions", hangs))
    with reach(model, "judge:openai:http://b#m") as engine:
        result = engine.search(PROBLEM, small(strategy="rebase", deadline_s=0.3))
        assert (result.finish_reason, result.num_errors) == ("deadline", 0) and caplog.text == ""
        model.fault = of("/v1/chat/completions", refuses)
        assert engine.search(PROBLEM, small(strategy="rebase")).finish_reason == "error"
    assert "the judge 'm' failed: " in caplog.text


@pytest.mark.usefixtures("took")
def test_a_cancelled_search_pauses_for_no_other_try() -> None:
    cancel, model = threading.Event(), Model()

    model.fault = of("/v1/completions", is_busy, after=lambda: model.steps >= 2)
    with reach(model) as engine:
        threading.Timer(0.3, cancel.set).start()
        result = engine.search(PROBLEM, small(), cancel=cancel)
    assert (result.finish_reason, result.text, result.num_errors) == ("cancelled", "so\n" * 2, 0)


@pytest.mark.usefixtures("took")
def test_who_has_no_time_says_nothing_about_the_server_to_others() -> None:
    model = Model(hangs)
    with reach(model) as engine:
        assert engine.search(PROBLEM, small(deadline_s=0.2)).finish_reason == "deadline"
        model.fault = works
        assert engine.search(PROBLEM, small(max_steps=2)).text == "so\n" * 2


@pytest.mark.usefixtures("took")
def test_who_has_no_time_leaves_no_replica_aside() -> None:
    model = Model()
    transport = httpx.MockTransport(model)
    replicas = Replicas([Server(f"http://{host}/v1", transport=transport) for host in "ab"])

    def propose(request: ProposalRequest) -> list[Step]:
        replicas.post("/completions", {"prompt": PROBLEM}, prefixes=("home",))
        return [Step("so", 1, StopReason.FINISHED) for _ in request.partials]

    with HostedEngine(propose, judge, name="two replicas") as engine:
        engine.search(PROBLEM, small())
        model.fault = hangs
        assert engine.search(PROBLEM, small(deadline_s=0.2)).finish_reason == "deadline"
        model.fault = works
        engine.search(PROBLEM, small())
    assert len(model.hosts) == 3 and len(set(model.hosts)) == 1
    replicas.close()


def ends_soon(engine: Any, end: str) -> bool:
    """Whether a search that cannot go on ends for want of time, or because somebody no longer wants it."""
    cancel, began_s = threading.Event(), time.monotonic()
    if end == "cancelled":
        threading.Timer(0.3, cancel.set).start()
    result = engine.search(PROBLEM, small(deadline_s=0.3 if end == "deadline" else None), cancel=cancel)
    return result.finish_reason == end and time.monotonic() - began_s < SOON_S


@pytest.mark.parametrize("end", ["deadline", "cancelled"])
def test_no_search_waits_for_room_behind_another_for_longer_than_it_goes_on(end: str) -> None:
    model, gate = Model(), Gate()
    with reach(model, max_concurrent_requests=1) as engine:
        engine.search(PROBLEM, small(max_steps=1))
        model.fault = of("/v1/completions", gate)
        other = engine.submit(PROBLEM, small(max_steps=2))
        with gate.holds():
            assert ends_soon(engine, end)
        assert other.result().text == "so\n" * 2


@pytest.mark.parametrize("end", ["deadline", "cancelled"])
@pytest.mark.parametrize("first", ["search", "describe"])
def test_no_search_waits_for_what_another_finds_out_for_longer_than_it_goes_on(first: str, end: str) -> None:
    gate = Gate()
    with reach(Model(of("/v1/completions", gate))) as engine, ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: engine.describe() if first == "describe" else engine.search(PROBLEM, small()))
        with gate.holds():
            assert ends_soon(engine, end)
        assert other.result()
        assert engine.search(PROBLEM, small(max_steps=2)).text == "so\n" * 2


@pytest.mark.usefixtures("took")
def test_no_search_waits_while_a_replica_that_was_dead_is_asked() -> None:
    model, gate, now = Model(), Gate(), [0.0]
    servers = [Server(f"http://{host}/v1", transport=httpx.MockTransport(model)) for host in "ab"]
    replicas = Replicas(servers, cooldown_s=30, clock=lambda: now[0])

    def propose(request: ProposalRequest) -> list[Step]:
        replicas.post("/completions", {"prompt": PROBLEM})
        return [Step("The answer is 2.", 5, StopReason.FINISHED) for _ in request.partials]

    def fails_once(request: httpx.Request) -> None:
        model.fault = of("/v1/models", gate)
        raise Answer(503)

    model.fault = fails_once
    with HostedEngine(propose, judge, name="two replicas") as engine:
        engine.search(PROBLEM, small())
        assert model.hosts == ["a", "b"]
        now[0] = 31.0
        assert engine.search(PROBLEM, small(deadline_s=0.5)).answer == "2"
        with gate.holds():
            assert engine.search(PROBLEM, small(deadline_s=0.5)).answer == "2"
        assert sorted(model.hosts) == ["a", "a", "b", "b", "b"]
        while model.hosts[-1] != "a" and len(model.hosts) < 1000:
            engine.search(PROBLEM, small())
        assert model.hosts[-1] == "a"  # it has answered, so it gets requests again
    replicas.close()


def test_a_dead_replica_is_asked_however_many_requests_wait() -> None:
    model, gate, now, asked = Model(), Gate(), [0.0], threading.Event()
    servers = [Server(f"http://{host}/v1", transport=httpx.MockTransport(model)) for host in "ab"]
    replicas = Replicas(servers, max_concurrent_requests=1, cooldown_s=30, clock=lambda: now[0])

    def fails_once(request: httpx.Request) -> None:
        model.fault = works
        raise Answer(503)

    def holds_completions(request: httpx.Request) -> None:
        if request.url.path == "/v1/models":
            asked.set()
        elif request.url.path == "/v1/completions":
            gate(request)

    model.fault = fails_once
    replicas.post("/completions", {"prompt": PROBLEM})
    assert model.hosts == ["a", "b"]
    now[0], model.fault = 31.0, holds_completions
    with ThreadPoolExecutor(1) as pool:
        pool.submit(replicas.map, lambda path: replicas.post(path, {"prompt": PROBLEM}), ["/completions"] * 3)
        with gate.holds():
            assert asked.wait(SOON_S)
    replicas.close()


def test_what_is_left_of_a_search_is_known_to_all_that_it_asks() -> None:
    cancel, seen = threading.Event(), list[float]()
    replicas = Replicas([Server("http://a/v1")])

    def end(item: int) -> None:
        cancel.set()
        seen.append(remaining_s())

    def propose(request: ProposalRequest) -> list[Step]:
        seen.extend([remaining_s(), *replicas.map(lambda item: remaining_s(), [1, 2])])
        replicas.map(end, [1])
        seen.append(remaining_s())
        return [Step("so ", 1) for _ in request.partials]

    with HostedEngine(propose, judge, name="curious") as engine:
        engine.search(PROBLEM, small(), cancel=cancel)
        assert seen == [math.inf] * 3 + [0.0] * 2
        cancel.clear()
        engine.search(PROBLEM, small(deadline_s=60), cancel=cancel)
        assert all(0 < left_s < 60 for left_s in seen[5:8]) and seen[8:] == [0.0] * 2
    assert remaining_s() == math.inf
    replicas.close()


def test_a_model_that_fails_before_its_time_is_up_is_still_an_error() -> None:
    with reach(Model(refuses)) as engine, pytest.raises(ServerError, match="answered 400"):
        engine.search(PROBLEM, small(deadline_s=60))
