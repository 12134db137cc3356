"""What one caller hands in, or one prompt does to the model, ends one search: the others go on, and none is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from ets_engine.errors import ConfigError, EngineError
from ets_engine.hosted import HostedEngine
from ets_engine.protocols import Frontier
from ets_engine.runtime.sampler import NO_NUMBERS
from ets_engine.search import SearchTree
from ets_engine.service import ETSEngine
from ets_engine.serving import Scheduler
from ets_engine.types import SearchEvent, StopReason

from .engines import tiny_tokenizer
from .test_serving import PROBLEMS, Essence, engine, half, make, scheduler, settings, settle, shared

__all__ = ["engine", "shared"]  # fixtures


class BadCancel:
    def is_set(self) -> bool:
        raise SystemExit("mine")


class BadSelector:
    needs_embeddings = False

    def select(self, frontier: Frontier, open_width: int) -> Any:
        raise asyncio.CancelledError("mine")


class BadView:
    def answer(self, problem: str, text: str) -> str | None:
        raise SystemExit("mine")

    def same(self, left: str, right: str) -> bool:
        return left == right


class EndingCancel:
    def is_set(self) -> bool:
        return next(iter(()))


def bad_read_step(text: str) -> str:
    raise ValueError("mine")


def empty_read_step(text: str) -> Any:
    return None


def ending_read_step(text: str) -> str:
    return next(iter(()))


def ending_on_event(event: SearchEvent) -> None:
    next(iter(()))


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"cancel": BadCancel()}, SystemExit),
        ({"selector": BadSelector()}, asyncio.CancelledError),
        ({"view": BadView()}, SystemExit),
        ({"read_step": bad_read_step}, ValueError),
    ],
)
def test_a_function_that_raises_whatever_it_likes_ends_its_own_search(
    engine: ETSEngine, wrong: Any, kind: type[BaseException]
) -> None:
    alone = [Essence(engine.search(problem, settings())) for problem in PROBLEMS[:3]]
    others = [engine.submit(problem, settings()) for problem in PROBLEMS[:3]]
    its_own = engine.submit(PROBLEMS[3], settings(), **wrong)
    with pytest.raises(kind, match="mine"):
        its_own.result(timeout=30)
    assert [Essence(one.result(timeout=30)) for one in others] == alone
    assert Essence(engine.search(PROBLEMS[0], settings())) == alone[0]


def test_a_step_that_is_read_as_no_text_ends_its_own_search(engine: ETSEngine) -> None:
    alone = [Essence(engine.search(problem, settings())) for problem in PROBLEMS[:3]]
    others = [engine.submit(problem, settings()) for problem in PROBLEMS[:3]]
    its_own = engine.submit(PROBLEMS[3], settings(), read_step=empty_read_step)
    with pytest.raises(TypeError, match="read_step gave None"):
        its_own.result(timeout=30)
    assert [Essence(one.result(timeout=30)) for one in others] == alone
    torn = engine.search(PROBLEMS[3], settings(), read_step=lambda text: "\ud800" + text)
    assert not torn.num_errors, "half a character is read as something"
    settle(engine)


def test_answers_are_compared_where_nobody_else_waits(engine: ETSEngine) -> None:
    """A view that takes its time holds up its own search only."""
    gate, asked = threading.Event(), threading.Event()

    class SlowView:
        def answer(self, problem: str, text: str) -> str:
            asked.set()
            gate.wait(30)
            return text

        def same(self, left: str, right: str) -> bool:
            return left == right

    slow = engine.submit(PROBLEMS[3], settings(), view=SlowView())
    assert asked.wait(30)
    assert engine.submit(PROBLEMS[0], settings()).result(timeout=30).trace is not None
    assert not slow.done()
    gate.set()
    assert slow.result(timeout=30).answer


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory: 9 bytes"])
def test_a_head_without_memory_costs_time_and_nothing_else(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    made = make(folders)
    alone = [Essence(made.search(problem, settings())) for problem in PROBLEMS[:4]]
    runner, refused = scheduler(made)._models.decoder.runner, []
    logits = runner._logits

    def few(hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > 8:
            refused.append(len(hidden))
            raise torch.OutOfMemoryError(message) if message.startswith("CUDA") else RuntimeError(message)
        return logits(hidden)

    monkeypatch.setattr(runner, "_logits", few)
    found = [made.submit(problem, settings()) for problem in PROBLEMS[:4]]
    assert [Essence(one.result(timeout=60)) for one in found] == alone and refused
    settle(made)
    made.close()


@pytest.mark.parametrize(
    "wrong", [{"cancel": EndingCancel()}, {"read_step": ending_read_step}, {"on_event": ending_on_event}]
)
def test_an_iterator_that_ends_in_a_function_ends_its_own_search(engine: ETSEngine, wrong: Any) -> None:
    alone = Essence(engine.search(PROBLEMS[0], settings()))
    other = engine.submit(PROBLEMS[0], settings())
    with pytest.raises(EngineError, match="StopIteration"):
        engine.submit(PROBLEMS[3], settings(), **wrong).result(timeout=30)
    with pytest.raises(EngineError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(engine.asearch(PROBLEMS[3], settings(), **wrong), 30))
    assert Essence(other.result(timeout=30)) == alone


@pytest.mark.parametrize("wrong", [object(), threading.Event])
def test_a_cancel_that_cannot_be_asked_is_refused(engine: ETSEngine, wrong: Any) -> None:
    hosted = HostedEngine(lambda request: [], half, name="none")
    for service in (engine, hosted):
        for ask in (service.submit, service.search):
            with pytest.raises(ConfigError, match="cancel="):
                ask(PROBLEMS[0], settings(), cancel=wrong)


@pytest.fixture
def fragile(folders: tuple[str, str]) -> Iterator[ETSEngine]:
    """An engine whose policy computes no numbers from an "s" on."""
    found = make(folders)
    model = scheduler(found)._models.decoder.runner.model
    letter = tiny_tokenizer().encode("s", add_special_tokens=False)[0]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, torch.nn.Embedding) and isinstance(head, torch.nn.Linear)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        head.weight[letter] = 0.0  # which it never writes itself, drawing from its four likeliest letters
        embedding.weight[letter] = float("nan")
    yield found
    settle(found)
    found.close()


def test_a_prompt_that_a_model_makes_no_numbers_of_fails_alone(
    fragile: ETSEngine, caplog: pytest.LogCaptureFixture
) -> None:
    calm = [problem.replace("s", "z") for problem in PROBLEMS[:3]]
    alone = [fragile.search(problem, settings(top_k=4)) for problem in calm]
    others = [fragile.submit(problem, settings(top_k=4)) for problem in calm]
    broken = fragile.submit("what is 1+1?", settings(top_k=4))
    assert [Essence(one.result(timeout=30)) for one in others] == [Essence(one) for one in alone]
    result = broken.result(timeout=30)
    assert result.trace is not None and result.finish_reason == "error" and result.num_errors == 6
    assert {node.stop for node in result.trace[1:]} == {StopReason.ERROR} and NO_NUMBERS in caplog.text
    assert all(one.finish_reason != "error" for one in alone)


# ---------------------------------------------------------------------- threads that cannot be started


class NoThread:
    """The next thread of that name cannot be started."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        start, self.failed = threading.Thread.start, 0

        def fail_once(thread: threading.Thread) -> None:
            if thread.name.startswith(name) and not self.failed:
                self.failed += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", fail_once)


def test_a_search_that_nobody_can_be_told_of_ends_with_an_error(
    engine: ETSEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_thread = NoThread("ets-callbacks", monkeypatch)
    futures = [engine.submit(problem, settings()) for problem in PROBLEMS[:4]]
    errors = [future.exception(timeout=30) for future in futures]
    assert no_thread.failed and [type(one) for one in errors if one] == [EngineError]
    settle(engine)


def test_an_engine_without_a_thread_refuses_and_tries_again(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    NoThread("ets-engine", monkeypatch)
    with make(folders) as fresh:
        with pytest.raises(RuntimeError, match="new thread"):
            fresh.submit(PROBLEMS[0], settings())
        assert fresh.search(PROBLEMS[0], settings()).trajectories


def test_nobody_waits_for_a_thread_that_died(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = make(folders)

    def die(self: Scheduler, job: Any, outcome: SearchTree | BaseException) -> None:
        raise SystemExit("mine")

    monkeypatch.setattr(Scheduler, "_end", die)
    futures = [fresh.submit(problem, settings()) for problem in PROBLEMS[:3]]
    for future in futures:
        assert isinstance(future.exception(timeout=30), EngineError)
    assert fresh.is_closed
    with pytest.raises(EngineError):
        fresh.submit(PROBLEMS[0], settings())


# ---------------------------------------------------------------------- many, late, and over


def test_a_batch_is_never_too_large_for_the_queue(folders: tuple[str, str]) -> None:
    with make(folders, max_queued_searches=4) as narrow:
        assert narrow.max_concurrent_searches == 4
        many = [PROBLEMS[place % 8] for place in range(24)]
        assert [one.problem for one in narrow.search_many(many, settings(width=2))] == many


def test_what_is_refused_of_a_batch_stops_none_of_the_others(engine: ETSEngine) -> None:
    done = threading.Event()
    problems: list[Any] = [*PROBLEMS[:4], 5, *PROBLEMS[4:]]
    searched: list[str] = []

    def judge(problem: str, steps: Sequence[str]) -> float:
        searched.append(problem)
        return 0.5

    with pytest.raises(ConfigError):
        engine.search_many(problems, settings(width=2), verifier=judge)
    done.set()
    assert set(searched) == set(PROBLEMS)


def test_telling_how_it_came_about_does_not_hold_up_a_late_result(engine: ETSEngine) -> None:
    heard: list[str] = []

    def slow(event: SearchEvent) -> None:
        heard.append(event.kind)
        time.sleep(0.3)

    began_s = time.monotonic()
    cancel = threading.Timer(0.1, lambda: stop.set())
    stop = threading.Event()
    cancel.start()
    config = settings(max_steps=200, max_tokens=2000, width=4)
    result = engine.submit(PROBLEMS[0], config, on_event=slow, cancel=stop).result(timeout=30)
    assert result.finish_reason == "cancelled" and heard[0] == "start" and heard[-1] == "end"
    assert time.monotonic() - began_s < 1.5 and len(heard) <= 4


def test_who_is_told_the_result_may_close_the_engine(folders: tuple[str, str]) -> None:
    own = make(folders)
    closed = threading.Event()

    def close(_: object) -> None:
        own.close()
        closed.set()

    own.submit(PROBLEMS[0], settings()).add_done_callback(close)
    assert closed.wait(30) and own.is_closed
