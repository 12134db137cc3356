"""The shipped models load as plain checkpoints, solve fresh problems, and give the same result for the same seed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from ets_engine import ETSEngine, ReferenceDomainError, SearchConfig, loading
from ets_engine.reference import generate_problems, is_right_answer, is_solved, policy_path, prm_path
from ets_engine.serving import scheduler
from ets_engine.serving.scheduler import Scheduler

SIZE_LIMIT_BYTES = 16_000_000
HISTORY = {"timing", "cached_prompt_tokens"}  # what depends on the machine and on earlier searches


@pytest.fixture(scope="module")
def engine() -> Iterator[ETSEngine]:
    with ETSEngine.from_pretrained("reference") as engine:
        yield engine


def test_they_are_plain_checkpoints_of_16_mb_in_all() -> None:
    from pathlib import Path

    policy = AutoModelForCausalLM.from_pretrained(policy_path())
    prm = AutoModelForTokenClassification.from_pretrained(prm_path())
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    assert policy.config.model_type == prm.config.model_type == "llama"
    assert prm.config.num_labels == 2
    assert tokenizer.decode(tokenizer("Use 12")["input_ids"], skip_special_tokens=True) == "Use 12"
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4  # digits stand alone
    files = [path for folder in (policy_path(), prm_path()) for path in Path(folder).iterdir()]
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT_BYTES


def test_search_beats_greedy_on_fresh_countdowns(engine: ETSEngine) -> None:
    """24 held-out problems; the gap measured over 200 (README) is far above the margin asked for here."""
    problems = [row.problem for row in generate_problems("countdown", 4, seed=11, count=24)]
    solved = {}
    for strategy in ("greedy", "ets"):
        results = [engine.search(one, SearchConfig(strategy=strategy, width=16)) for one in problems]
        solved[strategy] = sum(is_solved(result.problem, result.text) for result in results)
    assert solved["ets"] >= solved["greedy"] + 2


def test_search_beats_greedy_on_fresh_stories(engine: ETSEngine) -> None:
    """12 held-out stories of the level at which greedy begins to slip."""
    problems = [row.problem for row in generate_problems("story", 6, seed=11, count=12)]
    right = {}
    for strategy in ("greedy", "ets"):
        results = engine.search_many(problems, SearchConfig(strategy=strategy, width=16))
        right[strategy] = sum(is_right_answer(result.problem, result.answer or "") for result in results)
    assert right["ets"] >= right["greedy"] + 1 and right["ets"] >= 6


def test_the_same_seed_gives_the_same_result(engine: ETSEngine) -> None:
    problem = next(generate_problems("story", 5, seed=3, count=1)).problem
    config = SearchConfig(width=8, seed=5, trace=True)
    first, second = (engine.search(problem, config).model_dump(exclude=HISTORY) for _ in range(2))
    assert first == second
    assert engine.search(problem, SearchConfig(width=8, seed=6, trace=True)).trace != first["trace"]


def test_the_answer_of_a_right_solution_is_right(engine: ETSEngine) -> None:
    results = [engine.search(row.problem) for row in generate_problems("countdown", 4, seed=5, count=8)]
    right = [result for result in results if is_solved(result.problem, result.text)]
    assert right
    for result in right:
        assert result.answer is not None
        assert is_right_answer(result.problem, result.answer)


@pytest.fixture
def seen_threads(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """With how many threads the models of any engine compute."""
    seen: set[int] = set()
    tick = Scheduler.tick
    monkeypatch.setattr(Scheduler, "tick", lambda self: seen.add(torch.get_num_threads()) or tick(self))
    return seen


def test_they_run_on_one_thread_and_leave_the_others_to_everyone_else(seen_threads: set[int]) -> None:
    elsewhere: list[int] = []
    with two_threads(), ETSEngine.from_pretrained("reference") as one, ETSEngine.from_pretrained("reference") as two:
        for future in [engine.submit("Use 1, 2, 3 and 4 to make 24.", SearchConfig(width=2)) for engine in (one, two)]:
            future.result()
        asking = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        asking.start()
        asking.join()
        assert (seen_threads, elsewhere, torch.get_num_threads()) == ({1}, [2], 2)


def test_the_thread_that_loads_them_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[threading.Thread] = []
    load = loading.load_causal_lm
    monkeypatch.setattr(loading, "load_causal_lm", lambda *a: seen.append(threading.current_thread()) or load(*a))
    with ETSEngine.from_pretrained("reference"):
        assert seen[0] is not threading.current_thread() and not seen[0].is_alive()


def test_no_search_is_lost_where_no_thread_can_be_started(
    seen_threads: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "ets-threads":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with two_threads(), ETSEngine.from_pretrained("reference") as engine:
        assert engine.submit("Use 1, 2, 3 and 4 to make 24.", SearchConfig(width=2)).result(timeout=30).text
    assert seen_threads == {2}


def test_threads_do_not_matter(engine: ETSEngine, seen_threads: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = "Use 4, 6, 10 and 19 to make 16.", SearchConfig(width=4, seed=2)
    with two_threads():
        one = engine.search(problem, config)
        monkeypatch.setattr(scheduler, "are_small", lambda runners: False)
        with ETSEngine.from_pretrained("reference") as other:
            assert other.search(problem, config).text == one.text
    assert seen_threads == {1, 2}


@contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("problem", ["What is 2+2?", "", "Use 1 and 2 to make 3."])
def test_another_kind_of_problem_is_refused_with_the_way_out(engine: ETSEngine, problem: str) -> None:
    with pytest.raises(ReferenceDomainError, match="--model"):
        engine.search(problem)
