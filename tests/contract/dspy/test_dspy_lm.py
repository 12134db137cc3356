"""ETSLM keeps `dspy.LM`'s contract: caches, errors, streams, usage, saving, cancelling, shared requests."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import dspy
import pytest
from dspy import lm15
from dspy.utils.callback import BaseCallback

from ets_engine import errors
from ets_engine.config import SearchConfig
from ets_engine.hosted import HostedEngine, ProposalRequest
from ets_engine.protocols import SearchService
from ets_engine.registry import register_service
from ets_engine.types import SearchResult, Step
from ets_integrations.dspy import ETSLM

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "rebase"}


def ask(lm: dspy.LM, **config: Any) -> dspy.Prediction:
    with dspy.context(lm=lm):
        return dspy.Predict("question -> answer")(**QUESTION, config=config)


def never() -> tuple[HostedEngine, threading.Event, threading.Event]:
    """A service whose searches go on until they are stopped, and whether one began and whether it was stopped."""
    began, ended = threading.Event(), threading.Event()

    def propose(request: ProposalRequest) -> Sequence[Step]:
        began.set()
        time.sleep(0.01)
        return [Step("on and on\n\n", 3) for _ in request.partials]

    class Watched(HostedEngine):
        def submit(self, *args: Any, **kwargs: Any) -> Future[SearchResult]:
            future = super().submit(*args, **kwargs)
            future.add_done_callback(lambda _: ended.set())
            return future

    return Watched(propose, lambda problem, steps: 0.5, name="never"), began, ended


# ---------------------------------------------------------------------- what a request says


def test_nothing_is_loaded_before_the_first_request() -> None:
    lm = ETSLM("ets/no/such/model")
    assert lm.model == "ets/no/such/model" and not lm.source.is_found
    with pytest.raises(dspy.LMUnsupportedModelError, match="no/such/model"):
        lm("hello")


def test_the_complete_settings_travel_in_every_request(chat: Any) -> None:
    engine = chat.answering("42")
    lm = ETSLM(service=engine, search={"lambda_d": 2.0}, effort="low", temperature=0.5)
    ets = lm.kwargs["metadata"]["ets"]
    assert set(ets["search"]) == set(SearchConfig.model_fields) and ets["model"] == "scripted"
    assert (ets["search"]["width"], ets["search"]["lambda_d"], ets["search"]["temperature"]) == (4, 2.0, 0.5)
    json.dumps(ets)
    ask(lm)
    config = engine.script.requests[0].config
    assert (config.width, config.lambda_d, config.temperature) == (4, 2.0, 0.5)


def test_dspys_own_parameters_go_before_the_search_settings(chat: Any) -> None:
    engine = chat.answering("42")
    lm = ETSLM(service=engine, search=SMALL, cache=False)
    ask(lm, temperature=0.25, max_tokens=77, seed=5, stop=["END"], reasoning_effort="medium")
    config = engine.script.requests[-1].config
    assert (config.temperature, config.max_tokens, config.seed, config.width) == (0.25, 77, 5, 16)
    assert set(config.stop) == {"END", "[[ ## completed ## ]]"}
    ask(lm, **lm.search(width=2, strategy="best_of_n"))
    config = engine.script.requests[-1].config
    assert (config.width, config.strategy) == (2, "best_of_n")
    ask(lm, metadata={"run": "7"})  # replaces the LM's metadata in DSPy; the settings stay
    assert engine.script.requests[-1].config.width == 4
    for other in (lm.copy(metadata={"run": "8"}), lm.copy(metadata=None)):
        ask(other)
        assert engine.script.requests[-1].config.width == 4
        ask(other, **other.search(width=2))
        assert engine.script.requests[-1].config.width == 2


def test_a_typed_request_gets_the_settings_too(chat: Any) -> None:
    engine = chat.scripted(lambda request, place: "42")
    lm = ETSLM(service=engine, search={**SMALL, "width": 3})
    response = lm(lm15.Request(lm.model, (lm15.Message.user("20+22?"),)))
    assert isinstance(response, lm15.Response) and response.text == "42"
    assert engine.script.requests[0].config.width == 3
    assert lm("20+22?") == ["42"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
    ],
)
def test_what_no_search_honours_is_refused(chat: Any, config: dict[str, Any], named: str) -> None:
    with pytest.raises(dspy.LMUnsupportedFeatureError, match=named):
        ask(ETSLM(service=chat.answering("42")), **config)


def test_bad_settings_are_refused_where_they_are_given(chat: Any) -> None:
    engine = chat.answering("42")
    with pytest.raises(errors.ConfigError, match="width=0"):
        ETSLM(service=engine, search={"width": 0})
    with pytest.raises(errors.ConfigError, match="wdith"):
        ETSLM(service=engine).search(wdith=3)
    with pytest.raises(errors.ConfigError, match="has its own"):
        ETSLM(service=engine, verifier="some/prm")
    with pytest.raises(dspy.LMInvalidRequestError, match="reasoning_effort='xhigh'"):
        ask(ETSLM(service=engine), reasoning_effort="xhigh")


# ---------------------------------------------------------------------- seeds and samples


def test_without_a_seed_every_search_is_another_sample(chat: Any) -> None:
    engine = chat.answering("42")
    lm = ETSLM(service=engine, search=SMALL, cache=False)
    for _ in range(3):
        ask(lm)
    assert len({one.config.seed for one in engine.script.requests}) == 3


def test_an_explicit_seed_is_kept_and_samples_count_on_from_it(chat: Any) -> None:
    engine = chat.answering("42")
    lm = ETSLM(service=engine, search=SMALL, seed=7, cache=False)
    ask(lm), ask(lm), ask(lm, rollout_id=2, temperature=1.0), ask(lm, n=3)
    assert [one.config.seed for one in engine.script.requests] == [7, 7, 9, 7, 8, 9]


# ---------------------------------------------------------------------- caches


def opinion(problem: str, steps: Sequence[str]) -> float:
    return 0.25


def other_opinion(problem: str, steps: Sequence[str]) -> float:
    return 0.75


def use_disk_cache(folder: Path) -> None:
    dspy.configure_cache(enable_disk_cache=True, enable_memory_cache=False, disk_cache_dir=str(folder))


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_two_searches_never_share_a_cache_entry(chat: Any, tmp_path: Path, disk: bool) -> None:
    if disk:
        use_disk_cache(tmp_path)
    engine = chat.answering("42")
    other = chat.answering("43", name="other")
    base = {"service": engine, "search": SMALL}
    lms = [
        ETSLM(**base),
        ETSLM(**base | {"search": {**SMALL, "width": 8}}),
        ETSLM(**base | {"search": {**SMALL, "strategy": "ets"}}),
        ETSLM(**base, verifier=opinion),
        ETSLM(**base, verifier=other_opinion),
        ETSLM(**base, temperature=0.3),
        ETSLM(**base, seed=1),
        ETSLM(service=other, search=SMALL),
    ]
    for lm in lms:
        ask(lm)
    assert (len(engine.script.requests), len(other.script.requests)) == (7, 1)
    answers = [ask(lm).answer for lm in lms]
    assert answers == ["42"] * 7 + ["43"]
    assert (len(engine.script.requests), len(other.script.requests)) == (7, 1), "each finds its own entry"
    ask(lms[0], **lms[0].search(width=5))
    assert len(engine.script.requests) == 8
    if disk:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)


def test_a_disk_entry_keeps_the_candidates(chat: Any, tmp_path: Path) -> None:
    use_disk_cache(tmp_path)
    lm = ETSLM(service=chat.answering("42", "41"), search=SMALL)
    request = lm15.Request(lm.model, (lm15.Message.user("[[ ## question ## ]]\n1"),))
    first = lm(request).provider_data["ets"]
    use_disk_cache(tmp_path)
    assert lm(request).provider_data["ets"] == first and first["candidates"]
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)


def test_a_verifier_without_a_name_is_not_cached(chat: Any) -> None:
    engine, limit = chat.answering("42"), 0.5
    lm = ETSLM(service=engine, search=SMALL, verifier=lambda problem, steps: limit)
    ask(lm), ask(lm)
    assert len(engine.script.requests) == 2


# ---------------------------------------------------------------------- what comes back


def test_usage_history_and_figures(chat: Any) -> None:
    lm = ETSLM(service=chat.answering("42", "41", "42", "42"), search=SMALL)
    with dspy.track_usage() as tracker:
        ask(lm)
        first = tracker.get_total_tokens()[lm.model]
        ask(lm)  # from the cache
        assert tracker.get_total_tokens()[lm.model] == first
        ask(lm, rollout_id=1, temperature=1.0)
        twice = tracker.get_total_tokens()[lm.model]
    assert twice["completion_tokens"] == 2 * first["completion_tokens"]
    entry = lm.history[0]
    ets = entry["response"].provider_data["ets"]
    assert first["completion_tokens"] == ets["generated_tokens"] > ets["path_tokens"]
    reasoning = first["completion_tokens_details"]["reasoning_tokens"]
    assert reasoning == ets["generated_tokens"] - ets["path_tokens"]
    assert first["prompt_tokens"] == ets["prompt_tokens"] > 0
    assert len(lm.history) == 3 and entry["outputs"] and "42" in entry["outputs"][0]
    assert [(one["answer"], one["votes"]) for one in ets["candidates"]] == [("42", 3), ("41", 1)]
    assert all("[[ ## answer ## ]]" in one["text"] for one in ets["candidates"])
    assert json.loads(json.dumps(ets)) == ets and "trace" not in ets


def test_a_vote_reads_the_answer_not_the_markup(chat: Any) -> None:
    """Three branches say 42 in three ways; as texts, or by their last number, 7 would win."""

    def write(request: ProposalRequest, place: int) -> str:
        said = ("42", "42.0", "42", "7", "7")[place % 5]
        return chat.marked(reasoning=f"way {place}", answer=said) if place != 4 else "So the answer is 7"

    lm = ETSLM(service=chat.scripted(write), search={"width": 5, "strategy": "best_of_n", "vote": "majority"})
    with dspy.context(lm=lm):
        assert dspy.ChainOfThought("question -> answer: float")(**QUESTION).answer == 42.0
    votes = {one["answer"]: one["votes"] for one in lm.history[0]["response"].provider_data["ets"]["candidates"]}
    assert votes == {"42": 3, "7": 1}


@pytest.mark.parametrize("whose", ["the LM's", "the service's own"])
def test_a_verifier_reads_no_markup(chat: Any, whose: str) -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []

    def watching(problem: str, steps: Sequence[str]) -> float:
        seen.append((problem, tuple(steps)))
        return 0.5

    if whose == "the LM's":
        lm = ETSLM(service=chat.answering("42"), search=SMALL, verifier=watching)
    else:
        lm = ETSLM(service=chat.answering("42", verifier=watching), search=SMALL)
    with dspy.context(lm=lm):
        dspy.ChainOfThought("question -> answer")(**QUESTION)
    assert {problem for problem, _ in seen} == {"What is 20+22?"}
    assert any(steps[-1].strip() == "42" for _, steps in seen)
    assert not any("##" in step for _, steps in seen for step in steps)


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()], ids=["chat", "json"])
def test_leaves_that_do_not_parse_do_not_vote(chat: Any, adapter: dspy.Adapter) -> None:
    """So that no second search is made: DSPy falls back to JSON where it cannot parse."""

    def write(request: ProposalRequest, place: int) -> str:
        if place % 4:
            return "no fields here"
        return '{"answer": "42"}' if isinstance(adapter, dspy.JSONAdapter) else chat.marked(answer="42")

    engine = chat.scripted(write)
    with dspy.context(adapter=adapter):
        assert ask(ETSLM(service=engine, search={**SMALL, "strategy": "best_of_n"})).answer == "42"
    assert len(engine.script.requests) == 1


# ---------------------------------------------------------------------- errors

RAISED = [
    (errors.ContextLengthError, dspy.ContextWindowExceededError, 1),
    (errors.QueueFullError, dspy.LMRateLimitError, 2),
    (errors.EngineError, dspy.LMServerError, 2),
    (errors.EngineClosedError, dspy.LMInvalidRequestError, 1),
    (errors.PoolExhaustedError, dspy.LMInvalidRequestError, 1),
    (errors.ConfigError, dspy.LMInvalidRequestError, 1),
    (errors.ProtocolError, dspy.LMInvalidRequestError, 1),
    (errors.ReferenceDomainError, dspy.LMInvalidRequestError, 1),
    (ZeroDivisionError, dspy.LMUnexpectedError, 1),
]


class Failing:
    """A service that fails."""

    name = "failing"
    max_concurrent_searches = 4

    def __init__(self, error: type[Exception]) -> None:
        self.error = error
        self.num_asked = 0

    def submit(self, problem: Any, config: Any = None, **options: Any) -> Future[SearchResult]:
        self.num_asked += 1
        future: Future[SearchResult] = Future()
        future.set_exception(self.error("it failed"))
        return future

    def count_tokens(self, text: str) -> int:
        return len(text)


@pytest.mark.parametrize(("raised", "expected", "attempts"), RAISED, ids=[one[0].__name__ for one in RAISED])
def test_errors_mean_the_same_in_dspy_and_only_some_are_retried(
    monkeypatch: pytest.MonkeyPatch, raised: type[Exception], expected: type[Exception], attempts: int
) -> None:
    monkeypatch.setattr("dspy.clients.execution._delay", lambda error, attempt: 0.0)
    service = Failing(raised)
    assert isinstance(service, SearchService)
    with pytest.raises(expected, match="it failed"):
        ETSLM(service=service, num_retries=1)("hello")
    assert service.num_asked == attempts

    async def twice() -> None:
        with pytest.raises(expected, match="it failed"):
            await ETSLM(service=service, num_retries=0).acall("hello")

    asyncio.run(twice())


def test_a_full_queue_says_when_to_come_back() -> None:
    with pytest.raises(dspy.LMRateLimitError) as told:
        ETSLM(service=Failing(errors.QueueFullError), num_retries=0)("hello")
    assert told.value.retry_after == 1.0


def test_a_search_whose_every_branch_failed_is_an_error_and_not_retried(chat: Any, caplog: Any) -> None:
    def broken(problem: str, steps: Sequence[str]) -> float:
        raise KeyError("no such opinion")

    engine = chat.answering("42", verifier=broken)
    with pytest.raises(dspy.LMProviderError, match="all 4 branches failed"):
        ask(ETSLM(service=engine, search=SMALL))
    assert len(engine.script.requests) == 1 and "no such opinion" in caplog.text


# ---------------------------------------------------------------------- copies, saving


def test_copies_share_the_service(chat: Any) -> None:
    engine = chat.answering("42")
    lm = ETSLM(service=engine, search=SMALL)
    for other in (copy.deepcopy(lm), lm.copy(temperature=0.5), copy.copy(lm)):
        assert other.source is lm.source and other.source.find() is engine
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(lm)
    assert program.deepcopy().get_lm().source.find() is engine


def test_save_and_load_a_program(chat: Any, tmp_path: Path) -> None:
    engine = chat.answering("42", name="saved-engine")
    register_service("saved-engine", engine)
    lm = ETSLM(service="saved-engine", search=SMALL, temperature=0.5, seed=None, num_retries=1)
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(lm)
    program.save(tmp_path / "program.json")
    fresh = dspy.ChainOfThought("question -> answer")
    with pytest.raises(ValueError, match="allow_unsafe_lm_state"):
        fresh.load(tmp_path / "program.json")
    fresh.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    loaded = fresh.get_lm()
    assert isinstance(loaded, ETSLM) and loaded.kwargs == lm.kwargs and loaded.num_retries == 1
    assert fresh(**QUESTION).answer == "42" and loaded.source.find() is engine
    with pytest.raises(TypeError, match="function"):
        ETSLM(service=engine, verifier=opinion).dump_state()


@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_pickles_hold_names(chat: Any, pickler: Any) -> None:
    engine = chat.answering("42", name="pickled-engine")
    register_service("pickled-engine", engine)
    for lm in (ETSLM(service=engine, search=SMALL), ETSLM(service="pickled-engine", search=SMALL)):
        data = pickler.dumps(lm)
        loaded = pickler.loads(data)
        assert loaded.kwargs == lm.kwargs and len(data) < 5000
        assert ask(loaded).answer == "42" and loaded.source.find() is engine


def test_a_whole_program_survives_cloudpickle(chat: Any) -> None:
    engine = chat.answering("42", name="whole-engine")
    register_service("whole-engine", engine)
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(ETSLM(service="whole-engine", search=SMALL))
    assert cloudpickle.loads(cloudpickle.dumps(program))(**QUESTION).answer == "42"


def test_a_service_that_nobody_registered_here_is_missed_at_the_first_request() -> None:
    lm = ETSLM(service="registered elsewhere")
    with pytest.raises(dspy.LMInvalidRequestError, match="'registered elsewhere' is not registered"):
        lm("hello")


# ---------------------------------------------------------------------- cancelling


def test_a_cancelled_task_stops_its_search() -> None:
    engine, began, ended = never()
    lm = ETSLM(service=engine, search={**SMALL, "max_steps": 1000, "max_tokens": 10**6})

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lm.acall("hello"), timeout=0.2)

    asyncio.run(leave())
    assert began.is_set() and ended.wait(5), "the search went on"


def test_a_stream_that_is_closed_stops_its_search() -> None:
    engine, began, ended = never()
    lm = ETSLM(service=engine, search={**SMALL, "max_steps": 1000, "max_tokens": 10**6})
    request = lm15.Request(lm.model, (lm15.Message.user("hello"),))
    stream = lm.engine.stream(request)
    assert [next(stream).type, next(stream).type] == ["start", "delta"]
    stream.close()
    assert began.is_set() and ended.wait(5), "the search went on"


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_a_reader_who_leaves_a_streamed_program_stops_its_search(is_async: bool) -> None:
    engine, began, ended = never()
    program = dspy.streamify(dspy.Predict("question -> answer"), is_async_program=is_async)
    with dspy.context(lm=ETSLM(service=engine, search={**SMALL, "max_steps": 1000, "max_tokens": 10**6})):
        seen = asyncio.Event()

        async def read() -> None:
            async for _ in program(**QUESTION):
                seen.set()

        reader = asyncio.create_task(read())
        await seen.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
    assert began.is_set() and await asyncio.to_thread(ended.wait, 5), "the search went on"


def test_an_interrupted_call_stops_its_search(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, began, ended = never()
    lm = ETSLM(service=engine, search={**SMALL, "max_steps": 1000, "max_tokens": 10**6})

    class Interrupted:
        def put(self, item: Any) -> None: ...

        def get(self) -> Any:
            began.wait(5)
            raise KeyboardInterrupt

    monkeypatch.setattr("ets_integrations.dspy.engine.queue.SimpleQueue", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm("hello")
    assert ended.wait(5), "the search went on"


# ---------------------------------------------------------------------- requests in flight


def slow(chat: Any, **settings: Any) -> HostedEngine:
    def write(request: ProposalRequest, place: int) -> str:
        time.sleep(0.02)
        return chat.marked(answer="42")

    return chat.scripted(write, **settings)


def together(count: int, call: Any) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def test_equal_requests_in_flight_share_a_search(chat: Any) -> None:
    """As DSPy's stragglers: the same call, submitted again while the first one runs."""
    engine = slow(chat)
    lm = ETSLM(service=engine, search={**SMALL, "width": 8})
    answers = together(4, lambda _: ask(lm).answer)
    assert answers == ["42"] * 4 and len(engine.script.requests) == 1


@pytest.mark.parametrize(
    ("settings", "config", "searches"),
    [
        ({"cache": False}, {}, 4),  # a new sample each time is what this asks for
        ({"cache": False, "seed": 3}, {}, 1),  # the same answer anyway
        ({}, {"rollout_id": True}, 4),  # four samples, as `dspy.BestOfN` would ask for them
    ],
    ids=["uncached", "seeded", "rollouts"],
)
def test_only_callers_who_would_get_the_same_answer_share(
    chat: Any, settings: dict[str, Any], config: dict[str, Any], searches: int
) -> None:
    engine = slow(chat)
    lm = ETSLM(service=engine, search={**SMALL, "width": 8}, **settings)

    def call(place: int) -> str:
        return ask(lm, **({"rollout_id": place, "temperature": 1.0} if config else {})).answer

    assert together(4, call) == ["42"] * 4 and len(engine.script.requests) == searches


def test_one_who_leaves_does_not_stop_the_others() -> None:
    engine, _, ended = never()
    lm = ETSLM(service=engine, search={**SMALL, "max_steps": 60, "max_tokens": 10**6})

    async def both() -> str:
        first = asyncio.create_task(lm.acall("hello"))
        second = asyncio.create_task(lm.acall("hello"))
        await asyncio.sleep(0.15)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not ended.is_set()
        return (await second)[0]

    assert asyncio.run(both()).startswith("on and on")


def test_the_straggler_that_dspy_submits_again_is_searched_once(chat: Any) -> None:
    class Counter(BaseCallback):
        num_calls = 0

        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            self.num_calls += 1

    def write(request: ProposalRequest, place: int) -> str:
        time.sleep(0.6)
        return chat.marked(answer="42")

    engine, counter = chat.scripted(write), Counter()
    lm = ETSLM(service=engine, search={**SMALL, "width": 4}, callbacks=[counter])
    program = dspy.Predict("question -> answer")
    examples = [dspy.Example(question="1").with_inputs("question")]
    with dspy.context(lm=lm):
        found = program.batch(examples, num_threads=4, timeout=1, disable_progress_bar=True)
    assert [one.answer for one in found] == ["42"]
    assert counter.num_calls >= 2 and len(engine.script.requests) == 1
