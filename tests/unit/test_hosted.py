"""Searches over a model behind a function: how they end, what its owner is told, and that none waits for ever."""

from __future__ import annotations

import contextvars
import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as TooSlow
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError, EngineClosedError, EngineError, ProtocolError
from ets_engine.hosted import HostedEngine, ProposalRequest, cut_step
from ets_engine.protocols import SearchService
from ets_engine.registry import register_service
from ets_engine.results import counted_kv
from ets_engine.search import Beam
from ets_engine.testing import hash_score
from ets_engine.types import SearchEvent, SearchResult, Step, StopReason

PATIENCE_S = 20  # a search that has not ended by then never will
PROBLEM = "What is 1+1?"


def invent(request: ProposalRequest) -> list[Step]:
    """Steps that depend on what their branch has written, its place and the seed; a third one is the last."""
    steps: list[Step] = []
    for place, partial in enumerate(request.partials):
        text = f"{request.config.seed}.{place} "
        ended = partial.count(" ") == 2
        steps.append(
            Step(
                f"The answer is {place % 3}." if ended else text,
                3,
                StopReason.FINISHED if ended else StopReason.BOUNDARY,
            )
        )
    return steps  # fmt: skip


def judge(problem: str, steps: Sequence[str]) -> float:
    return hash_score("".join(steps))


def small(**changes: Any) -> SearchConfig:
    return SearchConfig(**{"strategy": "ets", "width": 6, "max_steps": 5, "trace": True, **changes})


@pytest.fixture
def made() -> Iterator[Callable[..., HostedEngine]]:
    """Makes engines and closes them."""
    engines: list[HostedEngine] = []

    def make(proposer: Any = invent, verifier: Any = judge, **options: Any) -> HostedEngine:
        engines.append(HostedEngine(proposer, verifier, **{"name": "tested", **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


Make = Callable[..., HostedEngine]


# ---------------------------------------------------------------------- results


@pytest.mark.parametrize("strategy", ["greedy", "best_of_n", "beam", "dvts", "rebase", "ets", "ets_kv", "dora"])
def test_every_kind_of_search(made: Make, strategy: Any) -> None:
    """With the default embedder: "ets" here prices and covers."""
    engine = made()
    result = engine.search(PROBLEM, small(strategy=strategy))
    assert (result.finish_reason, result.strategy, result.problem) == ("stop", strategy, PROBLEM)
    assert result.text == "".join(step.text for step in result.steps) and len(result.steps) == 3
    assert (result.kv, result.verifier_kv, result.verifier_tokens, result.timing.bytes_moved) == (None, None, 0, 0)
    assert result.trace is not None
    assert result.generated_tokens == sum(node.num_tokens for node in result.trace[1:])
    assert SearchResult.model_validate_json(result.model_dump_json()) == result
    timing = result.timing
    assert timing.wall_s >= timing.policy_s + timing.verifier_s + timing.select_s > 0
    again = engine.search(PROBLEM, small(strategy=strategy))
    assert again.model_dump(exclude={"timing"}) == result.model_dump(exclude={"timing"})


def test_an_embedder_of_the_callers_own_decides_what_is_covered(made: Make) -> None:
    asked: list[tuple[str, ...]] = []

    class Alike:
        def embed(self, nodes: Sequence[int], texts: Sequence[str]) -> Any:
            asked.append(tuple(texts))
            return [[1.0, 0.0]] * len(nodes)

    with_words = made().search(PROBLEM, small(lambda_b=0.1, width=8))
    without = made(embedder=Alike()).search(PROBLEM, small(lambda_b=0.1, width=8))
    assert asked and with_words.trace != without.trace


def test_the_proposer_is_told_everything(made: Make) -> None:
    requests: list[ProposalRequest] = []

    def propose(request: ProposalRequest) -> list[Step]:
        requests.append(request)
        return invent(request)

    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM}]
    engine = made(propose, count_tokens=len)
    future = engine.submit(messages, small(width=4, seed=7), tools=tools)
    tools[0]["type"] = "changed"  # too late
    result = future.result(PATIENCE_S)
    assert [list(request.messages) for request in requests] == [messages] * 3
    assert all(list(request.tools) == [{"type": "function", "function": {"name": "add"}}] for request in requests)
    assert {(request.config.seed, request.config.temperature) for request in requests} == {(7, 1.0)}
    assert requests[0].partials == [""] * 4 and result.trace is not None
    written = {node.id: node.text for node in result.trace}
    assert set(requests[1].partials) <= {written[node.id] for node in result.trace if node.depth == 1}
    assert result.prompt_tokens == len("Be brief." + PROBLEM) and result.problem == PROBLEM


def test_the_proposer_is_told_of_the_tree_and_gets_its_own_steps_back(made: Make) -> None:
    requests: list[ProposalRequest] = []
    proposed: dict[int, Step] = {}

    def propose(request: ProposalRequest) -> list[Step]:
        requests.append(request)
        steps = invent(request)
        proposed.update(zip(request.children, steps, strict=True))
        return steps

    result = made(propose).search(PROBLEM, small(max_tokens=100))
    assert result.trace is not None
    assert [node for request in requests for node in request.children] == [node.id for node in result.trace[1:]]
    assert [node for request in requests for node in request.parents] == [node.parent for node in result.trace[1:]]
    for request in requests:
        for path, partial, parent, left in zip(
            request.paths, request.partials, request.parents, request.tokens_left, strict=True
        ):
            assert "".join(step.text for step in path) == partial
            assert left == 100 - 3 * len(path)
            assert parent == 0 or path[-1] is proposed[parent]


def test_a_subclass_may_count_prompts_and_kv() -> None:
    class Counts(HostedEngine):
        def count_prompt(self, messages: Any, tools: Any = ()) -> int:
            return 7

        def count_kv(self, tree: Any) -> Any:
            return counted_kv(tree)

    with Counts(invent, judge, name="counts") as engine:
        result = engine.search(PROBLEM, small(strategy="best_of_n", width=2))
    assert result.kv is not None and result.prompt_tokens == 7
    assert (result.kv.peak_tokens, result.kv.mean_tokens) == (7 + 2 * 9, 7 + 2 * 6)
    assert (result.kv.unique_tokens, result.kv.path_tokens) == (7 + 2 * 9, 2 * (7 + 9))


def test_a_greedy_search_asks_for_temperature_0(made: Make) -> None:
    asked: list[tuple[float, int]] = []

    def propose(request: ProposalRequest) -> list[Step]:
        asked.append((request.config.temperature, len(request.partials)))
        return invent(request)

    made(propose).search(PROBLEM, small(strategy="greedy", temperature=0.7))
    assert asked == [(0.0, 1)] * 3


def test_names_and_counts(made: Make) -> None:
    engine = made(name="mine", max_concurrent_searches=3)
    assert isinstance(engine, SearchService)
    assert (engine.name, engine.max_concurrent_searches, engine.count_tokens("12345")) == ("mine", 3, 2)
    assert made(count_tokens=len).count_tokens("12345") == 5


# ---------------------------------------------------------------------- who judges


def test_without_a_verifier_only_searches_that_need_none(made: Make) -> None:
    engine = made(verifier=None)
    for config in (small(strategy="greedy"), small(width=1), small(strategy="best_of_n", vote="majority")):
        assert engine.search(PROBLEM, config).finish_reason == "stop"
    for config in (small(), small(strategy="best_of_n"), small(strategy="beam", vote="majority")):
        with pytest.raises(ConfigError, match="verifier=None"):
            engine.submit(PROBLEM, config)
    with pytest.raises(ConfigError, match="verifier=None"):
        engine.submit(PROBLEM, small(strategy="best_of_n", vote="majority"), selector=Beam(2))
    assert engine.search(PROBLEM, small(), verifier=judge).finish_reason == "stop"


def test_a_search_may_bring_its_own_verifier_even_one_that_is_empty(made: Make) -> None:
    class Judges(list[str]):
        """Like a registry of checks: without any, its truth value is False."""

        def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
            return [0.75] * len(paths)

    assert made().search(PROBLEM, small(), verifier=Judges()).score == 0.75


def test_a_verifier_that_fails_fails_its_branches(made: Make, caplog: pytest.LogCaptureFixture) -> None:
    def picky(problem: str, steps: Sequence[str]) -> float:
        return 1.0 if "1" in steps[-1] else 1 / 0

    result = made().search(PROBLEM, small(), verifier=picky)
    assert result.num_errors > 0 and len(caplog.records) == 1
    dead = made().search(PROBLEM, small(), verifier=lambda *_: 1 / 0)
    assert (dead.finish_reason, dead.num_errors, dead.answer) == ("error", 6, None)


# ---------------------------------------------------------------------- what goes wrong


def test_a_model_that_fails_on_every_branch_is_an_error_with_its_cause(made: Make) -> None:
    calls: list[int] = []

    def propose(request: ProposalRequest) -> list[Step]:
        calls.append(len(calls))
        if len(calls) > 1:
            raise TimeoutError(f"call {len(calls)}")
        return [Step("so ", 1) for _ in request.partials]

    with pytest.raises(
        EngineError, match="'tested' failed on every branch, first with: TimeoutError: call 2"
    ) as failed:
        made(propose).search(PROBLEM, small())
    assert isinstance(failed.value.__cause__, TimeoutError)


@pytest.mark.parametrize("said", ["the server is full", None])
def test_branches_that_say_they_failed(made: Make, said: str | None) -> None:
    def all_fail(request: ProposalRequest) -> list[Step]:
        return [Step("", 0, StopReason.ERROR, said) for _ in request.partials]

    with pytest.raises(EngineError, match=said or "says nothing of its error"):
        made(all_fail).search(PROBLEM, small())


def test_some_branches_that_fail_are_data(made: Make) -> None:
    def propose(request: ProposalRequest) -> list[Step]:
        steps = invent(request)
        return [Step("", 0, StopReason.ERROR, "refused"), *steps[1:]] if len(steps) > 1 else steps

    result = made(propose).search(PROBLEM, small(width=4))
    assert (result.finish_reason, result.num_errors > 0) == ("stop", True)


def test_a_search_that_was_stopped_while_branches_lived_is_no_failure(made: Make) -> None:
    """Its only closed branches have failed, and others were going on."""
    cancel = threading.Event()

    def propose(request: ProposalRequest) -> list[Step]:
        cancel.set()
        return [Step("", 0, StopReason.ERROR, "refused"), Step("so ", 1), Step("so ", 1)]

    result = made(propose).search(PROBLEM, small(width=3, strategy="best_of_n"), cancel=cancel)
    assert result.finish_reason == "cancelled"

    def grow(request: ProposalRequest) -> list[Step]:
        if any(request.partials):
            cancel.set()
        return [Step("", 0, StopReason.ERROR, "refused"), *[Step("so ", 1)] * 5][: len(request.partials)]

    cancel.clear()
    result = made(grow).search(PROBLEM, small(width=3, strategy="best_of_n"), cancel=cancel)
    assert (result.finish_reason, result.text, result.num_errors) == ("cancelled", "so ", 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "returned 0 steps for 4 children"),
        ([Step("a", 1)] * 3, "returned 3 steps for 4 children"),
        ([Step("a", 1)] * 5, "returned 5 steps for 4 children"),
        (["a"] * 4, "returned 'a' for node 1; return a Step"),
        ([None] * 4, "returned None for node 1"),
        (None, "returned NoneType"),
        (7, "returned int"),
        ([Step("a", -1)] * 4, "num_tokens=-1"),
    ],
)
def test_a_proposer_that_breaks_its_contract(made: Make, answer: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        made(lambda request: answer).search(PROBLEM, small(width=4))


def test_a_proposer_may_yield(made: Make) -> None:
    def lazily(request: ProposalRequest) -> Iterator[Step]:
        yield from invent(request)

    def fails_late(request: ProposalRequest) -> Iterator[Step]:
        yield Step("a", 1)
        raise ConnectionError("gone")

    assert made(lazily).search(PROBLEM, small()).trace == made().search(PROBLEM, small()).trace
    with pytest.raises(EngineError, match="ConnectionError: gone"):
        made(fails_late).search(PROBLEM, small())


def test_a_callback_that_raises_ends_its_own_search_only(made: Make) -> None:
    engine = made()

    def raising(event: SearchEvent) -> None:
        raise ZeroDivisionError("mine")

    futures = [engine.submit(PROBLEM, small(seed=seed), on_event=raising if seed == 1 else None) for seed in range(3)]
    with pytest.raises(ZeroDivisionError, match="mine"):
        futures[1].result(PATIENCE_S)
    assert all(futures[seed].result(PATIENCE_S).finish_reason == "stop" for seed in (0, 2))


def test_what_no_search_takes_is_refused_at_once(made: Make) -> None:
    engine: Any = made()
    with pytest.raises(TypeError, match="unexpected search option 'verfier'"):
        engine.submit(PROBLEM, small(), verfier=judge)
    with pytest.raises(TypeError, match="on_evnt"):
        engine.search(PROBLEM, on_evnt=print)
    with pytest.raises(ConfigError, match="give a text"):
        engine.submit(3)
    with pytest.raises(ConfigError, match="cannot honour a KV budget"):
        engine.search(PROBLEM, small(strategy="beam", kv_budget_tokens=10))
    assert engine.search(PROBLEM, small(), tools=None, cancel=None, view=None, selector=None).finish_reason == "stop"


# ---------------------------------------------------------------------- how it ends


def test_a_deadline_returns_the_best_so_far(made: Make) -> None:
    def slow(request: ProposalRequest) -> list[Step]:
        time.sleep(0.05)
        return [Step("so ", 1) for _ in request.partials]

    began_s = time.monotonic()
    result = made(slow).search(PROBLEM, small(max_steps=100, max_tokens=10_000, deadline_s=0.3))
    assert 0.3 <= time.monotonic() - began_s < PATIENCE_S
    assert result.finish_reason == "deadline" and result.text.startswith("so so")


def test_time_in_the_queue_counts(made: Make) -> None:
    gate = threading.Event()

    def wait(request: ProposalRequest) -> list[Step]:
        gate.wait(PATIENCE_S)
        return invent(request)

    engine = made(wait, max_concurrent_searches=1)
    first, late = engine.submit(PROBLEM, small()), engine.submit(PROBLEM, small(deadline_s=0.05))
    time.sleep(0.1)
    gate.set()
    assert first.result(PATIENCE_S).finish_reason == "stop"
    result = late.result(PATIENCE_S)
    assert (result.finish_reason, result.text, result.prompt_tokens) == ("deadline", "", 0)


def test_cancel_returns_the_best_so_far(made: Make) -> None:
    cancel = threading.Event()
    depths: list[int] = []

    def stop_at_2(event: SearchEvent) -> None:
        depths.append(event.depth)
        if event.depth == 2:
            cancel.set()

    config = small(strategy="best_of_n")
    result = made().search(PROBLEM, config, cancel=cancel, on_event=stop_at_2)
    assert result.finish_reason == "cancelled" and len(result.steps) == 2 and depths == [0, 1, 2, 2]
    assert made().search(PROBLEM, config, cancel=cancel).steps == (), "it was set before the start"


def test_a_future_cancelled_before_its_start_is_never_searched(made: Make) -> None:
    gate, asked = threading.Event(), list[str]()

    def wait(request: ProposalRequest) -> list[Step]:
        asked.append(str(request.messages[0]["content"]))
        gate.wait(PATIENCE_S)
        return invent(request)

    engine = made(wait, max_concurrent_searches=1)
    running, waiting = engine.submit(PROBLEM, small()), engine.submit("never asked", small())
    while not asked:
        time.sleep(0.001)
    assert waiting.cancel() and not running.cancel()
    gate.set()
    assert running.result(PATIENCE_S).finish_reason == "stop"
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE_S)
    engine.close()
    assert set(asked) == {PROBLEM}


def test_a_caller_who_leaves_stops_the_search(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when KeyboardInterrupt reaches a thread that waits: nobody wants to pay for the rest."""
    depths: list[int] = []
    entered, left = threading.Event(), threading.Event()

    def wait(request: ProposalRequest) -> list[Step]:
        depths.append(len(depths))
        entered.set()
        left.wait(PATIENCE_S)
        return [Step("so ", 1) for _ in request.partials]

    engine = made(wait)

    def interrupted(future: Any) -> Any:
        assert entered.wait(PATIENCE_S)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("concurrent.futures.Future.result", interrupted)
        engine.search(PROBLEM, small(max_steps=20))
    left.set()
    engine.close()
    assert depths == [0]


# ---------------------------------------------------------------------- many at once


def test_searches_run_side_by_side(made: Make) -> None:
    together = threading.Barrier(32)

    def propose(request: ProposalRequest) -> list[Step]:
        if not any(request.partials):
            together.wait(PATIENCE_S)  # broken unless all 32 are in flight at once
        return invent(request)

    engine = made(propose, max_concurrent_searches=32)
    futures = [engine.submit(PROBLEM, small(seed=seed)) for seed in range(32)]
    results = [future.result(PATIENCE_S) for future in futures]
    assert [result.seed for result in results] == list(range(32))
    alone = made()
    assert all(result.trace == alone.search(PROBLEM, small(seed=result.seed)).trace for result in results[::8])


def test_callers_functions_see_the_callers_context(made: Make) -> None:
    who = contextvars.ContextVar("who", default="nobody")
    seen: set[tuple[str, str]] = set()

    def propose(request: ProposalRequest) -> list[Step]:
        seen.add(("proposer", who.get()))
        return invent(request)

    def noting(problem: str, steps: Sequence[str]) -> float:
        seen.add(("verifier", who.get()))
        return 0.5

    who.set("me")
    engine = made(propose)
    future = engine.submit(PROBLEM, small(), verifier=noting, on_event=lambda event: seen.add(("event", who.get())))
    who.set("somebody else")
    future.result(PATIENCE_S)
    assert seen == {("proposer", "me"), ("verifier", "me"), ("event", "me")}


@pytest.mark.parametrize("deep", [1, 3])
def test_a_search_inside_a_search_waits_for_no_other(made: Make, deep: int) -> None:
    """With one thread, a verifier that searches would else wait for itself."""
    engine = made(max_concurrent_searches=1)

    def nested(depth: int) -> Callable[[str, Sequence[str]], float]:
        def ask(problem: str, steps: Sequence[str]) -> float:
            return engine.submit(PROBLEM, small(width=2), verifier=nested(depth - 1)).result(PATIENCE_S / 2).score

        return ask if depth else judge

    future = engine.submit(PROBLEM, small(width=2), verifier=nested(deep))
    try:
        assert future.result(PATIENCE_S).num_errors == 0
    except TooSlow:
        pytest.fail("it waits for itself")


# ---------------------------------------------------------------------- closing and copying


def test_close_waits_and_refuses_later_searches(made: Make) -> None:
    def slow(request: ProposalRequest) -> list[Step]:
        time.sleep(0.02)
        return invent(request)

    engine = made(slow, max_concurrent_searches=2)
    futures = [engine.submit(PROBLEM, small(seed=seed)) for seed in range(5)]
    engine.close()
    assert all(future.done() and future.result().finish_reason == "stop" for future in futures)
    for ask in (engine.submit, engine.search):
        with pytest.raises(EngineClosedError, match="'tested' was closed"):
            ask(PROBLEM, small())
    engine.close()  # again
    with made() as other:
        pass
    with pytest.raises(EngineClosedError):
        other.submit(PROBLEM)


def test_a_callback_cannot_close_its_engine(made: Make) -> None:
    engine = made()
    with pytest.raises(EngineError, match="do that after the search"):
        engine.search(PROBLEM, small(), on_event=lambda event: engine.close())
    assert engine.search(PROBLEM, small()).finish_reason == "stop", "it is open"


def test_copies_are_the_engine_and_pickles_its_name(made: Make) -> None:
    engine = made(name="pickled-by-name")
    assert copy.copy(engine) is copy.deepcopy(engine) is copy.deepcopy([engine])[0] is engine
    data = pickle.dumps(engine)
    with pytest.raises(ConfigError, match="'pickled-by-name' is not registered in this process"):
        pickle.loads(data)  # and no model of that name is looked for on the hub
    register_service("pickled-by-name", engine)
    assert pickle.loads(data) is engine and len(data) < 200


# ---------------------------------------------------------------------- stop texts


def test_a_stop_text_finishes_a_trajectory_wherever_the_model_wrote_it(made: Make) -> None:
    script = {"": "1+1 is", "1+1 is": " 2. E", "1+1 is 2. E": "ND and more", "so": "never asked"}

    def propose(request: ProposalRequest) -> list[Step]:
        return [Step(script[partial], 2) for partial in request.partials]

    result = made(propose).search(PROBLEM, small(stop=("END", "\n\n"), width=2))
    assert (result.text, result.answer, result.trajectories, len(result.steps)) == ("1+1 is 2. E", "2", 2, 3)


@given(
    above=st.text("ab", max_size=4),
    text=st.text("ab", max_size=6),
    stops=st.lists(st.text("ab", min_size=1, max_size=3)),
)
def test_steps_are_cut_where_a_search_for_the_text_would_cut_them(above: str, text: str, stops: list[str]) -> None:
    whole = above + text
    starts = [
        start
        for stop in stops
        for start in range(len(whole))
        if whole.startswith(stop, start) and start + len(stop) > len(above)  # else it was found before
    ]
    step = Step(text, 3)
    expected = Step(text[: max(0, min(starts) - len(above))], 3, StopReason.FINISHED) if starts else step
    assert cut_step(step, above, stops) == expected
    failed = Step(text, 3, StopReason.ERROR, "refused")
    assert cut_step(failed, above, stops) == failed
