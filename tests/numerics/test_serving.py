"""Many searches at once on tiny random models: each as if alone, none lost, nothing left behind."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ets_engine.config import EngineConfig, SearchConfig, Strategy
from ets_engine.errors import EngineClosedError, EngineError, ETSError, QueueFullError
from ets_engine.kv import Row
from ets_engine.models import TreePolicy
from ets_engine.runtime import Runner, StepDecoder
from ets_engine.runtime.passes import Passes
from ets_engine.service import ETSEngine, get_engine
from ets_engine.serving import Scheduler
from ets_engine.types import SearchEvent, SearchResult

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PROBLEMS = [f"what is {i}+{i * i}?" for i in range(8)]


def make(folders: tuple[str, str], **changes: Any) -> ETSEngine:
    return ETSEngine.from_pretrained(*folders, EngineConfig(device="cpu", page_tokens=4, **changes))


@pytest.fixture(scope="module")
def shared(folders: tuple[str, str]) -> ETSEngine:
    return make(folders)


@pytest.fixture
def engine(shared: ETSEngine) -> Iterator[ETSEngine]:
    yield shared
    settle(shared)


def settings(**changes: Any) -> SearchConfig:
    small = {"strategy": "ets", "width": 6, "max_steps": 4, "max_step_tokens": 8, "max_tokens": 32, "trace": True}
    return SearchConfig(**{**small, **changes})


def scheduler(engine: ETSEngine) -> Scheduler:
    assert engine._worker._scheduler is not None
    return engine._worker._scheduler


def settle(engine: ETSEngine) -> None:
    """Nothing is live, owned or remembered; the last future may be done a moment before its search is gone."""
    own = scheduler(engine)
    until_s = time.monotonic() + 10
    while (own.num_jobs or engine._worker._inbox) and time.monotonic() < until_s:
        time.sleep(0.001)
    assert (own._live, list(own._waiting), own._parked, own._couriers) == ({}, [], [], {})
    for runner in own._models.runners:
        runner.tree.check_integrity()
        runner.prefixes.check_integrity()
        while runner.prefixes.forget_one():
            pass
        assert (runner.tree.resident_tokens, len(runner.tree)) == (0, 0)
    assert (own._models.decoder.num_branches, len(own._models.decoder.usages)) == (0, 0)


class Essence:
    """A result's tree to the letter, its scores as far as batches of different sizes agree, and what was counted."""

    def __init__(self, result: SearchResult) -> None:
        assert result.trace is not None
        self.exact = (
            [(node.id, node.parent, node.text, node.stop) for node in result.trace],
            (result.text, result.answer, result.finish_reason, result.trajectories, result.num_errors),
            (result.generated_tokens, result.verifier_tokens),
        )
        self.scores = [*(node.step_score for node in result.trace), result.score]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Essence)
            and self.exact == other.exact
            and all(abs(one - two) < 1e-4 for one, two in zip(self.scores, other.scores, strict=True))
        )

    def __repr__(self) -> str:
        return f"Essence({self.exact}, {self.scores})"


def half(problem: str, steps: Sequence[str]) -> float:
    return 0.5


# ---------------------------------------------------------------------- together as alone


def test_searches_of_all_kinds_share_batches_and_each_is_as_if_alone(
    engine: ETSEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        (problem, settings(strategy=strategy, width=4 + seed % 5, seed=seed, temperature=0.7 + 0.1 * (seed % 4)))
        for seed, (strategy, problem) in enumerate(zip(STRATEGIES * 3, PROBLEMS * 4, strict=False))
    ]
    alone = [Essence(engine.search(problem, config)) for problem, config in jobs]
    rows: dict[str, list[int]] = {"decode": [], "score": []}
    searches: list[int] = []
    extend, step = Runner.extend_last, StepDecoder.step

    def noting_extend(self: Runner, batch: Any) -> Any:
        is_policy = self is scheduler(engine)._models.decoder.runner
        rows["decode" if is_policy else "score"].append(len(batch))
        return extend(self, batch)

    def noting_step(self: StepDecoder) -> Any:
        searches.append(len({row.first.parent.search for row in self._rows}))
        return step(self)

    monkeypatch.setattr(Runner, "extend_last", noting_extend)
    monkeypatch.setattr(StepDecoder, "step", noting_step)
    futures = [engine.submit(problem, config) for problem, config in jobs]
    assert [Essence(future.result(timeout=60)) for future in futures] == alone
    assert max(searches) >= 20 and max(rows["decode"]) > 60, "policy batches hold many searches"
    assert max(rows["score"]) > 12, "PRM batches do too"


def test_from_many_threads(engine: ETSEngine) -> None:
    jobs = [(problem, settings(seed=seed)) for seed in range(4) for problem in PROBLEMS]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda job: Essence(engine.search(*job)), jobs))
    assert found == [Essence(engine.search(*job)) for job in jobs]


def test_search_many_keeps_the_order(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ets_engine.service._IN_FLIGHT", 3)
    results = engine.search_many(PROBLEMS, settings())
    assert [result.problem for result in results] == PROBLEMS
    assert [Essence(one) for one in results] == [Essence(engine.search(one, settings())) for one in PROBLEMS]
    with pytest.raises(ETSError, match="tokens"):
        engine.search_many([*PROBLEMS, "a" * 300], settings())


def test_from_an_event_loop(engine: ETSEngine) -> None:
    async def both() -> list[SearchResult]:
        return list(await asyncio.gather(*(engine.asearch(problem, settings()) for problem in PROBLEMS)))

    assert [Essence(one) for one in asyncio.run(both())] == [
        Essence(engine.search(problem, settings())) for problem in PROBLEMS
    ]


# ---------------------------------------------------------------------- memory


def test_prompts_that_begin_alike_are_read_once(folders: tuple[str, str]) -> None:
    engine, plain = make(folders), make(folders, prefix_cache_tokens=0)
    system = "be brief and say why. "
    asked = [system + problem for problem in PROBLEMS[:4]]
    expected = [plain.search(problem, settings()) for problem in asked]
    assert [one.cached_prompt_tokens for one in expected] == [0] * 4
    found = [engine.search(problem, settings()) for problem in [*asked, asked[0]]]
    assert [Essence(one) for one in found[:4]] == [Essence(one) for one in expected]
    whole_pages = (1 + len(system + "what is ")) // 4 * 4  # the prompt's first token begins the text
    assert [one.cached_prompt_tokens for one in found[:4]] == [0, *[whole_pages] * 3]
    assert found[4].cached_prompt_tokens == (found[4].prompt_tokens - 1) // 4 * 4
    for one, other in zip(found, [*expected, expected[0]], strict=True):
        assert one.kv and other.kv and one.kv.model_dump() == other.kv.model_dump(), "a shared prompt counts for each"
        assert one.verifier_kv == other.verifier_kv
    settle(engine)
    engine.close()
    plain.close()


@pytest.mark.parametrize("chunk_tokens", [8, 512])
def test_prompts_that_begin_alike_are_read_once_when_they_come_together(
    folders: tuple[str, str], chunk_tokens: int
) -> None:
    engine, plain = make(folders, prefill_chunk_tokens=chunk_tokens), make(folders, prefix_cache_tokens=0)
    asked = ["be brief and say why. " + problem for problem in PROBLEMS[:4]] + PROBLEMS[:2]
    expected = [plain.search(problem, settings()) for problem in asked]
    gate = threading.Event()
    first = engine.submit("z", settings(), on_event=lambda event: gate.wait(10))
    found = [engine.submit(problem, settings()) for problem in asked]  # let in at once
    gate.set()
    results = [one.result(timeout=60) for one in found]
    assert [Essence(one) for one in results] == [Essence(one) for one in expected] and first.result(timeout=60)
    shared = sorted(one.cached_prompt_tokens for one in results[:4])
    whole_pages = (1 + len("be brief and say why. what is ")) // 4 * 4
    assert shared == [0, *[whole_pages] * 3]
    for one, other in zip(results, expected, strict=True):
        assert one.kv and other.kv and one.kv.peak_tokens == other.kv.peak_tokens, "a shared prompt counts for each"
        assert one.timing.read_tokens <= other.timing.read_tokens
    settle(engine)
    engine.close()
    plain.close()


def test_remembered_prompts_make_room(folders: tuple[str, str]) -> None:
    """A pool that one search and its prompt nearly fill, and prompt after prompt to remember."""
    small = make(folders, kv_pool_tokens=96)
    for problem in PROBLEMS:
        assert small.search(problem, settings(width=2)).num_errors == 0
    assert scheduler(small)._models.decoder.runner.prefixes.num_tokens > 12
    settle(small)
    small.close()


def test_a_long_prompt_is_read_between_the_decode_steps_of_others(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, whole = make(folders, prefill_chunk_tokens=16), make(folders)
    long = "a" * 150
    expected = Essence(whole.search(long, settings()))
    passes: list[tuple[int, int]] = []
    extend = Runner.extend_last

    def noting_extend(self: Runner, rows: Any) -> Any:
        if self is scheduler(engine)._models.decoder.runner:
            passes.append((len(rows), max(len(ids) for _, ids in rows)))
        return extend(self, rows)

    monkeypatch.setattr(Runner, "extend_last", noting_extend)
    first = engine.submit(PROBLEMS[0], settings(max_step_tokens=60, max_tokens=120, strategy="best_of_n", width=8))
    second = engine.submit(long, settings())
    assert Essence(second.result(timeout=20)) == expected
    first.result(timeout=20)
    chunks = [place for place, (_, longest) in enumerate(passes) if longest == 16]
    assert len(chunks) >= 8 and max(longest for _, longest in passes) <= 16
    assert sum(passes[place][0] > 1 for place in range(chunks[0], chunks[-1])) >= 5, "others decode in between"
    settle(engine)
    engine.close()
    whole.close()


def test_a_device_out_of_memory_is_a_full_pool(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [(problem, settings(seed=seed)) for seed, problem in enumerate(PROBLEMS)]
    alone = [Essence(engine.search(*job)) for job in jobs]
    read, before = Passes.read, engine.stats().preemptions

    def large_ones_fail(self: Passes, ids: torch.Tensor, rows: Sequence[Row]) -> Any:
        if len(rows) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, ids, rows)

    monkeypatch.setattr(Passes, "read", large_ones_fail)
    futures = [engine.submit(*job) for job in jobs]
    assert [Essence(future.result(timeout=30)) for future in futures] == alone
    assert engine.stats().preemptions > before


def test_the_pool_takes_its_share_of_free_memory(folders: tuple[str, str]) -> None:
    small, large = make(folders, kv_memory_fraction=0.01), make(folders, kv_memory_fraction=0.2)
    pools = [scheduler(one)._models.decoder.runner.tree.pool.max_pages for one in (small, large)]
    assert pools[0] and pools[1] and 10 < pools[1] / pools[0] < 30


# ---------------------------------------------------------------------- control


def test_cancel_and_deadline_return_the_best_so_far(engine: ETSEngine) -> None:
    long = settings(width=16, max_steps=200, max_tokens=200, strategy="best_of_n")
    cancel = threading.Event()
    future = engine.submit(PROBLEMS[0], long, cancel=cancel)
    cancel.set()
    assert future.result(timeout=5).finish_reason == "cancelled"
    began_s = time.monotonic()
    result = engine.search(PROBLEMS[0], long.model_copy(update={"deadline_s": 0.2}))
    assert result.finish_reason == "deadline" and 0.2 <= time.monotonic() - began_s < 2
    assert result.trace is not None
    slow = engine.submit(PROBLEMS[0], settings(deadline_s=0.05), verifier=lambda *_: time.sleep(1) or 0.5)
    assert slow.result(timeout=5).finish_reason == "deadline"


def test_a_caller_that_left(engine: ETSEngine) -> None:
    """An interrupted call and a cancelled task stop their searches; a cancelled future never starts."""
    long = settings(width=16, max_steps=200, max_tokens=200)

    async def leave() -> None:
        task = asyncio.create_task(engine.asearch(PROBLEMS[0], long))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    settle(engine)
    gate = threading.Event()
    busy = engine.submit(PROBLEMS[0], settings(), on_event=lambda event: gate.wait(5))
    gate.set()
    busy.result(timeout=10)

    orphaned: list[Future[SearchResult]] = []

    async def submit_only() -> None:
        orphaned.append(engine.submit(PROBLEMS[1], settings()))
        asyncio.wrap_future(orphaned[0])  # its loop is closed before the result is there

    asyncio.run(submit_only())
    with suppress(CancelledError):  # the loop may take its future along
        orphaned[0].result(timeout=10)
    assert engine.search(PROBLEMS[2], settings()).trace is not None, "the engine goes on"


def test_slow_and_raising_callbacks_disturb_nobody(engine: ETSEngine) -> None:
    release = threading.Event()
    events: list[SearchEvent] = []

    def slow(event: SearchEvent) -> None:
        events.append(event)
        release.wait(10)

    def raising(event: SearchEvent) -> None:
        raise ZeroDivisionError("mine")

    blocked = engine.submit(PROBLEMS[0], settings(), on_event=slow)
    broken = engine.submit(PROBLEMS[1], settings(), on_event=raising)
    judged = engine.submit(PROBLEMS[2], settings(), verifier=lambda *_: 1 / 0)
    expected = Essence(engine.search(PROBLEMS[3], settings()))
    assert not blocked.done() and len(events) == 1
    with pytest.raises(ZeroDivisionError, match="mine"):
        broken.result(timeout=10)
    assert judged.result(timeout=10).finish_reason == "error"
    release.set()
    assert Essence(blocked.result(timeout=10)) == Essence(engine.search(PROBLEMS[0], settings()))
    assert expected == Essence(engine.search(PROBLEMS[3], settings()))


def test_events_are_left_out_rather_than_piled_up(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ets_engine.serving.job.MAX_EVENTS", 2)
    release, seen = threading.Event(), list[SearchEvent]()

    def slow(event: SearchEvent) -> None:
        seen.append(event)
        release.wait(10)

    config = settings(width=4, max_steps=20, max_tokens=160, strategy="best_of_n")
    future = engine.submit(PROBLEMS[0], config, on_event=slow)
    until_s = time.monotonic() + 10
    while (not seen or scheduler(engine).num_jobs) and time.monotonic() < until_s:
        time.sleep(0.005)
    release.set()
    result = future.result(timeout=10)
    assert result.trace is not None and max(node.depth for node in result.trace) > 5
    assert len(seen) <= 5 and (seen[0].kind, seen[-1].kind) == ("start", "end")


def test_callers_functions_see_the_callers_context(engine: ETSEngine) -> None:
    name = contextvars.ContextVar("name", default="nobody")
    seen: set[str] = set()

    def verifier(problem: str, steps: Sequence[str]) -> float:
        seen.add(name.get())
        return 0.5

    name.set("me")
    engine.search(PROBLEMS[0], settings(), verifier=verifier, on_event=lambda event: seen.add(name.get()))
    assert seen == {"me"}


def test_a_full_queue_refuses(folders: tuple[str, str]) -> None:
    small = make(folders, kv_pool_tokens=160, max_queued_searches=2)
    gate = threading.Event()

    def wait(problem: str, steps: Sequence[str]) -> float:
        gate.wait(20)
        return 0.5

    futures = [small.submit(PROBLEMS[0], settings(width=4), verifier=wait)]
    with pytest.raises(QueueFullError, match="max_queued_searches"):
        for problem in PROBLEMS * 2:
            futures.append(small.submit(problem, settings(width=4), verifier=wait))
    cancelled = futures[-1].cancel()
    gate.set()
    for future in futures[:-1]:
        assert future.result(timeout=30).trace is not None
    assert cancelled and futures[-1].cancelled(), "who was still queued can be called off"
    settle(small)
    assert small.search(PROBLEMS[0], settings(width=4)).trace is not None
    small.close()


def test_a_failing_forward_pass_ends_its_searches_and_not_the_engine(
    engine: ETSEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: StepDecoder) -> Any:
        raise RuntimeError("the device fell over")

    monkeypatch.setattr(StepDecoder, "step", broken)
    futures = [engine.submit(problem, settings()) for problem in PROBLEMS]
    for future in futures:
        with pytest.raises(EngineError, match="fell over"):
            future.result(timeout=10)
    monkeypatch.undo()
    settle(engine)
    assert engine.search(PROBLEMS[0], settings()).trace is not None


def test_a_failing_score_leaves_no_kv_behind(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Runner, hidden: Any) -> Any:
        if self is scheduler(engine)._models.runners[1]:
            raise RuntimeError("the PRM fell over")
        return logits(self, hidden)

    logits = Runner.logits
    monkeypatch.setattr(Runner, "logits", broken)
    with pytest.raises(EngineError, match="PRM fell over"):
        engine.search(PROBLEMS[0], settings())
    monkeypatch.undo()
    settle(engine)


def test_a_search_called_off_and_stopped_while_it_waited(engine: ETSEngine) -> None:
    """As a cancelled task leaves it: its future is cancelled, and its `cancel` is set."""
    cancel = threading.Event()
    cancel.set()
    futures = [engine.submit(problem, settings(), cancel=cancel) for problem in PROBLEMS]
    called_off = [future.cancel() for future in futures]
    for future, off in zip(futures, called_off, strict=True):
        assert future.cancelled() if off else future.result(timeout=10).finish_reason == "cancelled"


# ---------------------------------------------------------------------- one engine per process


def test_copies_and_pickles_are_the_engine_itself(folders: tuple[str, str]) -> None:
    config = EngineConfig(device="cpu", page_tokens=4)
    engine = get_engine(*folders, config)
    assert get_engine(*folders, config) is engine is copy.deepcopy(engine) is copy.copy(engine)
    data = pickle.dumps(engine)
    assert pickle.loads(data) is engine and len(data) < 2000
    engine.close()
    fresh = get_engine(*folders, config)
    assert fresh is not engine and fresh.search(PROBLEMS[0], settings()).trace is not None
    fresh.close()


def test_an_engine_that_nobody_holds_is_gone(folders: tuple[str, str]) -> None:
    engine = make(folders)
    assert engine.search(PROBLEMS[0], settings()).trace is not None
    thread, gone = engine._worker._thread, weakref.ref(engine)
    assert thread is not None
    del engine
    gc.collect()
    thread.join(timeout=10)
    assert gone() is None and not thread.is_alive()


def test_tensors_are_freed_in_the_engines_thread(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch frees them without the GIL; a callback's thread that does so while the process ends would abort it."""
    threads: list[str] = []

    class Watched(TreePolicy):
        def __del__(self) -> None:
            threads.append(threading.current_thread().name)

    monkeypatch.setattr("ets_engine.serving.scheduler.TreePolicy", Watched)
    for _ in range(3):
        engine.search(PROBLEMS[0], SearchConfig(width=2, max_steps=2), on_event=lambda event: None)
    for _ in range(100):
        if len(threads) == 3:
            break
        time.sleep(0.02)
    assert threads == ["ets-engine"] * 3


def test_close_finishes_what_was_submitted(folders: tuple[str, str]) -> None:
    engine = make(folders)
    futures = [engine.submit(problem, settings()) for problem in PROBLEMS]
    engine.close()
    assert all(future.result(timeout=10).trace is not None for future in futures)
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit(PROBLEMS[0], settings())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused_at_once(engine: ETSEngine, tmp_path: Path) -> None:
    engine.search(PROBLEMS[0], settings())
    child = os.fork()
    if child == 0:
        try:
            engine.submit(PROBLEMS[0], settings())
        except EngineClosedError as error:
            (tmp_path / "said").write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert "forked" in (tmp_path / "said").read_text()


def test_stats_count_what_was_done(folders: tuple[str, str]) -> None:
    engine = make(folders, prefix_cache_tokens=0)
    results = engine.search_many(PROBLEMS[:3], settings())
    settle(engine)
    stats = engine.stats()
    assert stats.verifier_tokens == sum(result.verifier_tokens for result in results)
    assert 0 < stats.policy_tokens <= sum(result.prompt_tokens + result.generated_tokens for result in results)
    assert (stats.live, stats.waiting, stats.preemptions, stats.kv_tokens) == (0, 0, 0, 0)
    assert stats.policy_forwards > stats.verifier_forwards > 0 < stats.policy_s
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.stats()


@pytest.mark.parametrize("ending", ["[future.result() for future in futures]", "futures[0].result()", "pass"])
def test_a_process_may_end_while_searches_run(folders: tuple[str, str], ending: str) -> None:
    """What the engine's thread was doing in C++ used to abort the process, with a core dump as its last word."""
    program = f"""
from ets_engine import ETSEngine, SearchConfig
def main():
    engine = ETSEngine.from_pretrained(*{folders!r})
    config = SearchConfig(width=16, max_steps=50, max_step_tokens=8, max_tokens=400)
    futures = [engine.submit(f"what is {{i}}+1?", config) for i in range(12)]
    {ending}
main()
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]
