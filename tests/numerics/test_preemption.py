"""Searches that give up their KV for others and compute it again: later, and to the letter the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import PoolExhaustedError
from ets_engine.models import TreePolicy
from ets_engine.service import ETSEngine
from ets_engine.serving import Scheduler
from ets_engine.types import SearchResult, StopReason

from .test_serving import PROBLEMS, Essence, engine, half, make, scheduler, settings, settle, shared

__all__ = ["engine", "shared"]  # fixtures


@pytest.mark.parametrize("pool_tokens", [160, 240, 400])
def test_a_full_pool_costs_time_and_nothing_else(engine: ETSEngine, folders: tuple[str, str], pool_tokens: int) -> None:
    """Alone each search fits; together they take the KV from each other, the youngest first."""
    jobs = [(problem, settings(width=4, seed=seed)) for seed, problem in enumerate(PROBLEMS)]
    alone = [engine.search(*job) for job in jobs]
    assert max(one.kv.peak_tokens for one in alone if one.kv) < 130
    small = make(folders, kv_pool_tokens=pool_tokens)
    futures = [small.submit(*job) for job in jobs]
    together = [future.result(timeout=60) for future in futures]
    assert [Essence(one) for one in together] == [Essence(one) for one in alone]
    assert scheduler(small).num_dropped > 0, "the pool was too small for all"
    settle(small)
    small.close()


def test_the_oldest_search_is_never_the_one_that_waits(folders: tuple[str, str]) -> None:
    small = make(folders, kv_pool_tokens=160)
    order: list[int] = []
    futures = [small.submit(problem, settings(width=4)) for problem in PROBLEMS]
    for place, future in enumerate(futures):
        future.add_done_callback(lambda _, place=place: order.append(place))
    for future in futures:
        future.result(timeout=60)
    settle(small)
    assert order.index(0) <= 2 and order.index(len(PROBLEMS) - 1) >= 4, order
    small.close()


def test_a_search_that_waits_for_its_caller_gives_up_its_memory_first(folders: tuple[str, str]) -> None:
    """Else a verifier that searches could wait for memory that its own search holds."""
    small = make(folders, kv_pool_tokens=96)

    def nested(problem: str, steps: Sequence[str]) -> float:
        return small.search(PROBLEMS[1], settings(width=2, strategy="rebase")).score

    futures = [small.submit(problem, settings(width=2), verifier=nested) for problem in PROBLEMS[:3]]
    results = [future.result(timeout=120) for future in futures]
    assert all(result.trace is not None and len(result.trace) > 2 and not result.num_errors for result in results)
    settle(small)
    small.close()


def lone_policy(folders: tuple[str, str], pool_tokens: int) -> ETSEngine:
    """Without a PRM, and with the pages of every other engine."""
    config = EngineConfig(device="cpu", kv_pool_tokens=pool_tokens, prefix_cache_tokens=0)
    return ETSEngine.from_pretrained(folders[0], None, config)


WIDE = SearchConfig(
    strategy="best_of_n", width=8, max_steps=12, max_step_tokens=3, max_tokens=36, seed=1, trace=True
)  # it holds 258 tokens at most, most of them in pages of 16 that are not full


def displace(small: ETSEngine, config: SearchConfig) -> SearchResult:
    """What a search finds that another one takes the memory from as it waits for its caller."""
    gate, waits = threading.Event(), threading.Event()

    def slow(problem: str, steps: Sequence[str]) -> float:
        if len(steps) == 4:
            waits.set()
            gate.wait(30)
        return 0.5

    first = small.submit(PROBLEMS[1], config, verifier=slow)
    assert waits.wait(30)
    small.search(PROBLEMS[2], config.replace(width=16, max_steps=4, seed=2), verifier=half)
    assert small.stats().preemptions >= 1
    gate.set()
    return first.result(timeout=60)


def test_what_fitted_once_fits_again(folders: tuple[str, str]) -> None:
    small = lone_policy(folders, 352)
    alone = small.search(PROBLEMS[1], WIDE, verifier=half)
    assert not alone.num_errors and alone.kv is not None and alone.kv.peak_tokens > 200
    assert Essence(displace(small, WIDE)) == Essence(alone)
    settle(small)
    small.close()


def test_what_does_not_fit_again_ends_with_what_was_found(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = lone_policy(folders, 352)

    def refuse(policy: TreePolicy) -> None:
        raise PoolExhaustedError("no room")

    monkeypatch.setattr(TreePolicy, "restore", refuse)
    result = displace(small, WIDE)
    assert result.num_errors and result.trajectories and result.trajectories + result.num_errors == 8
    assert result.finish_reason in ("stop", "no_answer") and result.trace is not None
    assert len(result.trace) > 8 * 4, "what it had found is in the trace"
    settle(small)
    small.close()


def test_a_search_for_which_there_is_no_room_is_not_tried_in_every_tick(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make(folders, kv_pool_tokens=160)
    own, restore = scheduler(small), TreePolicy.restore
    tried: list[int] = []

    def refuse_beside_others(policy: TreePolicy) -> None:
        tried.append(1)
        if own._live:
            raise PoolExhaustedError("no room")
        restore(policy)

    monkeypatch.setattr(TreePolicy, "restore", refuse_beside_others)
    monkeypatch.setattr(type(own), "_has_room", lambda self, job: True)
    futures = [small.submit(problem, settings(width=4, max_steps=12, max_tokens=90)) for problem in PROBLEMS[:3]]
    for future in futures:
        future.result(timeout=60)
    assert 1 <= len(tried) < small.stats().policy_forwards / 4
    settle(small)
    small.close()


def test_remembered_prompts_are_room(folders: tuple[str, str]) -> None:
    small = make(folders, kv_pool_tokens=400, prefix_cache_tokens=380)
    for number in range(40):
        small.search(f"what is {number:x<9}+1?", settings(width=1, strategy="greedy", max_steps=1), verifier=half)
    pool = scheduler(small)._models.decoder.runner.tree.pool
    assert pool.free_pages_left is not None and pool.free_pages_left * pool.page_tokens < 6 * 8
    live: list[int] = []

    def look(problem: str, steps: Sequence[str]) -> float:
        live.append(small.stats().live)
        time.sleep(0.02)
        return 0.5

    for future in [small.submit(problem, settings(), verifier=look) for problem in PROBLEMS[:3]]:
        future.result(timeout=60)
    assert max(live) == 3
    settle(small)
    small.close()


def test_who_waits_for_a_search_without_room_gives_it_its_own(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller's verifier waits for a search that lost its KV and would fit again, were it not for the caller's own."""
    small = make(folders)
    own, restore, tick = scheduler(small), TreePolicy.restore, Scheduler.tick
    dropped: list[int] = []

    def refuse_beside_others(policy: TreePolicy) -> None:
        if own._live:
            raise PoolExhaustedError("no room")
        restore(policy)

    def drop_the_first_one(self: Scheduler) -> None:
        if not dropped and len(self._live) == 2 and self._live[max(self._live)].is_judging:
            dropped.append(min(self._live))
            self._drop(dropped[0])
        tick(self)

    monkeypatch.setattr(TreePolicy, "restore", refuse_beside_others)
    monkeypatch.setattr(Scheduler, "tick", drop_the_first_one)
    config = settings(width=4, max_steps=40, max_tokens=200)
    first = small.submit(PROBLEMS[0], config)
    second = small.submit(PROBLEMS[1], settings(), verifier=lambda problem, steps: first.result(timeout=30).score)
    assert second.result(timeout=60).finish_reason == "length" and dropped
    with make(folders) as other:
        assert Essence(first.result()) == Essence(other.search(PROBLEMS[0], config))
    settle(small)
    small.close()


def test_a_prompt_is_counted_once_however_often_it_did_not_fit_again(folders: tuple[str, str]) -> None:
    config = EngineConfig(device="cpu", page_tokens=4, kv_pool_tokens=400)
    small = ETSEngine.from_pretrained(folders[0], None, config)
    models = scheduler(small)._models
    tree, prompt = models.decoder.runner.tree, "be brief and say why. what is 1+1?"
    first = TreePolicy(models.decoder, models.format, prompt, settings(), "first")
    first.start()
    first.expand([0], [1])
    first.close()  # the prompt is remembered
    policy = TreePolicy(models.decoder, models.format, prompt, settings(), "second")
    policy.start()
    parents = [0] * 6
    for first_child in (1, 7):
        children = [first_child + place for place in range(len(parents))]
        steps = zip(children, policy.expand(parents, children), strict=True)
        parents = [child for child, step in steps if step.stop is StopReason.BOUNDARY]
        policy.retain(parents)
    assert policy.usage.shared_tokens == 32  # all pages but the one that is read again
    policy.drop()
    other = tree.root("other")
    tree.append(other, 4 * tree.pool.free_pages_left - 4)
    for _ in range(3):
        with pytest.raises(PoolExhaustedError):
            policy.restore()
    tree.release(other)
    policy.restore()
    assert 32 <= policy.usage.shared_tokens <= policy.usage.prompt_tokens == 36
    policy.close()
    small.close()
