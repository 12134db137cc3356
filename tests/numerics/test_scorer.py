"""A PRM as a function: scores of whole paths, whoever asks in whatever order, and each step of a search read once."""

from __future__ import annotations

import threading
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ets_engine import ETSEngine, SearchConfig
from ets_engine.config import EngineConfig
from ets_engine.errors import PoolExhaustedError
from ets_engine.models import PrmScorer, TrlFormat
from ets_engine.models.scorer import _MAX_READINGS
from ets_engine.reference import generate_problems
from ets_engine.runtime import Runner

from .engines import tiny_prm, tiny_tokenizer

PROBLEM = "what is 1+1?"
ROOT_TOKENS = 1 + len(PROBLEM) + 1
TEXTS = ["ab", "c", "1+2=3", "so 4"]


def scorer_for(**changes: int) -> tuple[PrmScorer, Runner]:
    runner = Runner(tiny_prm("llama"), EngineConfig(page_tokens=4, prefix_cache_tokens=0, **changes))
    return PrmScorer(runner, TrlFormat(tiny_tokenizer()), "tiny"), runner


PLAIN = scorer_for()[0]


def plain(problem: str, paths: list[list[str]]) -> list[float]:
    """The same by a scorer that remembers nothing."""
    PLAIN._readings.clear()
    return PLAIN.score_many(problem, paths)


def rounds(rng: Random, depth: int = 4, width: int = 8) -> list[list[list[str]]]:
    """What a tree search asks, depth by depth: children of some leaves of the depth before, some of them alike."""
    found, leaves = list[list[list[str]]](), [list[str]()]
    for _ in range(depth):
        parents = [rng.choice(leaves) for _ in range(width)]
        found.append([[*parent, rng.choice(TEXTS)] for parent in parents])
        leaves = rng.sample(found[-1], 3)
    return found


def distinct_tokens(asked: list[list[list[str]]]) -> int:
    prefixes = {tuple(path[: n + 1]) for paths in asked for path in paths for n in range(len(path))}
    return sum(len(prefix[-1]) + 1 for prefix in prefixes)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_has_each_step_read_once(seed: int) -> None:
    scorer, runner = scorer_for()
    asked = rounds(Random(seed))
    for paths in asked:
        assert scorer.score_many(PROBLEM, paths) == pytest.approx(plain(PROBLEM, paths), abs=2e-5)
        runner.tree.check_integrity()
    assert runner.stats.tokens == ROOT_TOKENS + distinct_tokens(asked)
    assert scorer.score_many(PROBLEM, asked[-1]) == pytest.approx(plain(PROBLEM, asked[-1]), abs=2e-5)
    assert runner.stats.tokens == ROOT_TOKENS + distinct_tokens(asked), "nothing is new"


def test_searches_do_not_disturb_each_other() -> None:
    """In turn, of different problems: each is read as if it were alone."""
    scorer, runner = scorer_for()
    searches = [(f"what is {seed}+1?", rounds(Random(seed))) for seed in range(3)]
    for depth in range(4):
        for problem, asked in searches:
            assert scorer.score_many(problem, asked[depth]) == pytest.approx(plain(problem, asked[depth]), abs=2e-5)
    assert runner.stats.tokens == sum(ROOT_TOKENS + distinct_tokens(asked) for _, asked in searches)
    assert len(scorer._readings) == 3


def test_searches_of_one_problem_get_their_own_scores() -> None:
    """In turn; where one goes on from what another left, the other may have to be read again."""
    scorer, runner = scorer_for()
    searches = [rounds(Random(seed)) for seed in range(3)]
    for depth in range(4):
        for asked in searches:
            assert scorer.score_many(PROBLEM, asked[depth]) == pytest.approx(plain(PROBLEM, asked[depth]), abs=2e-5)
    runner.tree.check_integrity()
    from_scratch = 0
    for asked in searches:
        for depth in range(4):
            from_scratch += ROOT_TOKENS + distinct_tokens(asked[depth : depth + 1])
    assert runner.stats.tokens < 0.8 * from_scratch


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.lists(st.sampled_from(TEXTS), max_size=4), min_size=1, max_size=4), max_size=6), st.data())
def test_any_order_of_calls_gives_the_scores_of_whole_paths(calls: list[list[list[str]]], data: st.DataObject) -> None:
    scorer, runner = scorer_for()
    for paths in calls:
        problem = data.draw(st.sampled_from([PROBLEM, "2+2?"]))
        found = scorer.score_many(problem, paths)
        assert found == pytest.approx(plain(problem, paths), abs=2e-5, nan_ok=True)
        runner.tree.check_integrity()


def test_what_is_kept_for_others_makes_room() -> None:
    asked = rounds(Random(1))
    needed = 0
    for paths in asked:
        scorer, runner = scorer_for()
        scorer.score_many(PROBLEM, paths)
        needed = max(needed, runner.tree.peak_pages)
    scorer, runner = scorer_for(kv_pool_tokens=4 * (needed + 2))
    for depth in range(4):
        for problem in ("1+1?", "2+2?", PROBLEM):
            found = scorer.score_many(problem, asked[depth])
            assert found == pytest.approx(plain(problem, asked[depth]), abs=2e-5), "never a step for lack of room"
            runner.tree.check_integrity()


def test_only_so_many_searches_are_kept() -> None:
    scorer, runner = scorer_for()
    for number in range(_MAX_READINGS + 6):
        scorer.score_many(f"{number}+1?", [["ab"], ["c"]])
    assert len(scorer._readings) == _MAX_READINGS
    resident, read = runner.tree.resident_tokens, runner.stats.tokens
    scorer.score_many("69+1?", [["ab", "c"], ["c", "c"]])
    assert runner.stats.tokens - read == 4, "the last is known"
    assert runner.tree.resident_tokens == resident + 4
    scorer.score_many("5+1?", [["ab", "c"]])
    assert runner.stats.tokens - read == 4 + 1 + len("5+1?") + 1 + 3 + 2, "the first is forgotten"


@pytest.mark.parametrize("error", [PoolExhaustedError("full"), RuntimeError("broken")])
def test_a_pass_that_fails_leaves_nothing_behind(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, runner = scorer_for()
    asked = rounds(Random(2))
    scorer.score_many(PROBLEM, asked[0])
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise error

        patch.setattr(runner, "extend_last", fail)
        if isinstance(error, PoolExhaustedError):
            assert all(score != score for score in scorer.score_many(PROBLEM, asked[1]))  # NaN: no room
        else:
            with pytest.raises(RuntimeError, match="broken"):
                scorer.score_many(PROBLEM, asked[1])
    runner.tree.check_integrity()
    if isinstance(error, RuntimeError) and not isinstance(error, PoolExhaustedError):
        assert runner.tree.resident_tokens == 0
        assert scorer.score_many(PROBLEM, asked[1]) == pytest.approx(plain(PROBLEM, asked[1]), abs=2e-5)


def test_threads_take_turns() -> None:
    scorer, runner = scorer_for()
    asked = {f"{seed}+1?": rounds(Random(seed)) for seed in range(6)}
    found: dict[str, list[list[float]]] = {}

    def search(problem: str) -> None:
        found[problem] = [scorer.score_many(problem, paths) for paths in asked[problem]]

    threads = [threading.Thread(target=search, args=(problem,)) for problem in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for problem, scores in found.items():
        for some, paths in zip(scores, asked[problem], strict=True):
            assert some == pytest.approx(plain(problem, paths), abs=2e-5)
    runner.tree.check_integrity()


def test_a_search_with_the_prm_as_a_function_reads_what_the_engines_own_does() -> None:
    problem = next(generate_problems("countdown", 5, seed=3, count=1)).problem
    config = SearchConfig(width=16, seed=0)
    scorer = PrmScorer.from_pretrained("reference")
    with ETSEngine.from_pretrained("reference", config=EngineConfig(device="cpu", dtype="float32")) as engine:
        own = engine.search(problem, config)
        given_one = engine.search(problem, config, verifier=scorer)
    assert given_one.text == own.text
    assert scorer._runner.stats.tokens == own.verifier_tokens
