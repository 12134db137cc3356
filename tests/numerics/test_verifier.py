"""Step scores are those of plain transformers on the whole text, and every token is read once."""

from __future__ import annotations

import logging
import math
from random import Random

import pytest
import torch

from ets_engine.config import EngineConfig
from ets_engine.errors import ContextLengthError, PoolExhaustedError
from ets_engine.models import PrmVerifier, TrlFormat, score_together
from ets_engine.runtime import Runner
from ets_engine.scorers import CallableVerifier

from .engines import tiny_prm, tiny_tokenizer

PROBLEM = "what is 1+1?"
ROOT_TOKENS = 1 + len(PROBLEM) + 1
LETTERS = "abcdef 0123456789+-*/="


def verifier_for(name: str = "llama", problem: str = PROBLEM, **settings: int) -> tuple[PrmVerifier, Runner]:
    runner = Runner(tiny_prm(name), EngineConfig(page_tokens=4, prefix_cache_tokens=0, **settings))
    return PrmVerifier(runner, TrlFormat(tiny_tokenizer()), problem, search="a"), runner


@torch.inference_mode()
def plain_scores(model: torch.nn.Module, steps: list[str]) -> list[float]:
    """Scores at all line ends of the whole text but the problem's, by plain transformers."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("\n".join([PROBLEM, *(step.strip() for step in steps)]) + "\n", return_tensors="pt")["input_ids"]
    right = model(input_ids=ids, use_cache=False).logits[0].softmax(-1)[:, 1]
    ends = (ids[0] == tokenizer.convert_tokens_to_ids("\n")).nonzero()[1:, 0]
    return right[ends].tolist()


def invent(rng: Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 12))).strip() + "s\n"


@pytest.mark.parametrize("name", ["llama_gqa_rope_scaled", "qwen2"])
def test_scores_of_a_random_tree(name: str) -> None:
    verifier, runner = verifier_for(name)
    plain, rng = tiny_prm(name), Random(name)
    paths: dict[int, list[str]] = {0: []}
    parent_of: dict[int, int] = {}
    kept, scores = [0], {}

    def tokens_to(node: int) -> int:
        return ROOT_TOKENS + sum(len(step.strip()) + 1 for step in paths[node])

    for _ in range(4):
        verifier.retain(kept)
        parents = [rng.choice(kept) for _ in range(7)]
        nodes = list(range(len(paths), len(paths) + len(parents)))
        for node, parent in zip(nodes, parents, strict=True):
            paths[node], parent_of[node] = [*paths[parent], invent(rng)], parent
        found = verifier.score(nodes, parents, [paths[node][-1] for node in nodes])
        scores |= zip(nodes, found, strict=True)
        kept = rng.sample(nodes, 3)
        runner.tree.check_integrity()
    for node, score in scores.items():
        assert score == pytest.approx(plain_scores(plain, paths[node])[-1], abs=1e-4)
    assert max(scores.values()) - min(scores.values()) > 0.05  # random weights wide enough to tell steps apart

    distinct = ROOT_TOKENS + sum(len(steps[-1].strip()) + 1 for steps in paths.values() if steps)
    assert verifier.usage.tokens == runner.stats.tokens == distinct
    leaves = [node for node in paths if node not in parent_of.values()]
    assert verifier.usage.path_tokens == sum(map(tokens_to, leaves))
    assert verifier.usage.rounds == 4
    assert verifier.usage.bytes_moved == runner.stats.bytes_moved
    assert verifier.usage.busy_s == pytest.approx(runner.stats.busy_s) and runner.stats.busy_s > 0

    verifier.retain(kept[:1])
    assert runner.tree.resident_tokens == tokens_to(kept[0])
    verifier.close()
    runner.tree.check_integrity()
    assert (runner.tree.resident_tokens, len(runner.tree)) == (0, 0)


def test_residency_by_hand() -> None:
    verifier, _ = verifier_for()
    verifier.score([1, 2], [0, 0], ["abc\n", "a\n"])
    assert verifier.usage.peak_tokens == ROOT_TOKENS + 4 + 2
    verifier.retain([1])
    verifier.score([3], [1], ["ab"])
    verifier.retain([3])
    assert verifier.usage.mean_tokens == ROOT_TOKENS + (4 + 2 + 4 + 3) / 2
    assert verifier.usage.peak_tokens == ROOT_TOKENS + 4 + 3
    assert verifier.usage.path_tokens == (ROOT_TOKENS + 4 + 3) + (ROOT_TOKENS + 2)


def test_a_step_goes_on_in_the_page_of_the_step_before() -> None:
    verifier, runner = verifier_for()
    parent, pool = 0, runner.tree.pool
    for node in range(1, 13):
        verifier.score([node], [parent], ["a\n"])
        verifier.retain([node])
        parent = node
    used = pool.num_pages - pool.num_free_pages
    assert used == -(-(ROOT_TOKENS + 12 * 2) // 4)
    runner.tree.check_integrity()


def test_a_step_that_cannot_be_placed_leaves_nothing_behind() -> None:
    verifier, runner = verifier_for()
    verifier.score([1], [0], ["abc\n"])
    held = runner.tree.resident_tokens, len(runner.tree)
    with pytest.raises(AttributeError):
        verifier.score_read([2, 3], [1, 1], ["ok\n", None])  # type: ignore[list-item]
    assert held == (runner.tree.resident_tokens, len(runner.tree))
    verifier.close()
    assert runner.tree.resident_tokens == 0


def test_a_step_without_text_is_scored_at_its_mark() -> None:
    verifier, _ = verifier_for()
    assert verifier.score([1], [0], [""]) == pytest.approx(plain_scores(tiny_prm("llama"), [""]), abs=1e-4)


def test_two_searches_do_not_mix() -> None:
    first, runner = verifier_for()
    second = PrmVerifier(runner, TrlFormat(tiny_tokenizer()), "what is 2+2?", search="b")
    alone, _ = verifier_for()
    expected = alone.score([1, 2], [0, 0], ["one", "two"])
    second.score([1], [0], ["four"])
    assert first.score([1, 2], [0, 0], ["one", "two"]) == pytest.approx(expected, abs=1e-5)
    assert first.usage.tokens == alone.usage.tokens and first.usage.peak_tokens == alone.usage.peak_tokens
    first.close()
    assert runner.tree.resident_tokens == runner.tree.resident_tokens_of("b") == second.usage.tokens


def test_new_problems_are_read_in_one_pass_and_equal_ones_once() -> None:
    runner = Runner(tiny_prm("llama"), EngineConfig(page_tokens=4))
    problems = ["1+1 is what?", "2+2 is what?", "1+1 is what?", "3+3 is what?"]
    verifiers = [PrmVerifier(runner, TrlFormat(tiny_tokenizer()), one, search=i) for i, one in enumerate(problems)]
    expected = []
    for problem in problems:
        alone, _ = verifier_for(problem=problem)
        expected.append(alone.score([1], [0], ["two"]))
    found = score_together([(one, [1], [0], ["two"]) for one in verifiers])
    assert [pytest.approx(one, abs=1e-5) for one in expected] == found
    assert runner.stats.forwards == 3, "three problems, the rest of the repeated one, the steps"
    assert runner.stats.tokens == 3 * ROOT_TOKENS + ROOT_TOKENS % 4 + 4 * len("two\n"), (
        "all pages but the last are known"
    )
    for verifier in verifiers:
        verifier.close()
    runner.tree.check_integrity()


def test_problems_that_begin_alike_read_their_beginning_once() -> None:
    problems = [f"instructions for all of them: what is {i}+{i}?" for i in (1, 2, 1, 3, 1)]
    read, held = [], []
    for together in (True, False):
        runner = Runner(tiny_prm("llama"), EngineConfig(page_tokens=4))
        verifiers = [PrmVerifier(runner, TrlFormat(tiny_tokenizer()), one, search=i) for i, one in enumerate(problems)]
        requests = [(one, [1], [0], ["two"]) for one in verifiers]
        found = score_together(requests) if together else [score_together([one])[0] for one in requests]
        assert [pytest.approx(found[0], abs=1e-5)] * 2 == [found[2], found[4]]
        read.append(runner.stats.tokens)
        held.append(runner.tree.resident_tokens)
        for verifier in verifiers:
            verifier.close()
        runner.tree.check_integrity()
    assert read[0] == read[1] and held[0] == held[1]


def test_a_full_pool_leaves_no_new_problem_half_read() -> None:
    runner = Runner(tiny_prm("llama"), EngineConfig(page_tokens=4, kv_pool_tokens=32, prefix_cache_tokens=0))
    problems = [f"{i}+{i} is what?" for i in range(3)]
    verifiers = [PrmVerifier(runner, TrlFormat(tiny_tokenizer()), one, search=one) for one in problems]
    with pytest.raises(PoolExhaustedError):
        score_together([(one, [1], [0], ["two"]) for one in verifiers])
    runner.tree.check_integrity()
    assert len(runner.tree) == 0
    assert not math.isnan(verifiers[0].score([1], [0], ["two"])[0])


def test_what_outgrows_the_context_fails_alone() -> None:
    verifier, runner = verifier_for()
    room = runner.context_tokens - ROOT_TOKENS
    fits, too_long = "a" * (room - 1), "a" * room
    scores = verifier.score([1, 2, 3], [0, 0, 0], [fits, too_long, "b"])
    assert [math.isnan(score) for score in scores] == [False, True, False]
    assert scores[2] == pytest.approx(plain_scores(tiny_prm("llama"), ["b"])[0], abs=1e-4)
    assert math.isnan(verifier.score([4], [1], ["b"])[0])
    runner.tree.check_integrity()
    assert len(runner.tree) == 3, "the problem and two steps"
    assert verifier.usage.tokens == ROOT_TOKENS + room + 2
    verifier.close()
    assert len(runner.tree) == 0


def test_a_problem_without_room_for_a_step_is_refused() -> None:
    verifier_for(problem="a" * 253)
    with pytest.raises(ContextLengthError, match=r"256 tokens.*256"):
        verifier_for(problem="a" * 254)


def test_a_full_pool_fails_what_does_not_fit_and_nothing_else() -> None:
    """Pages of 4: the problem takes 4 of 16, each step 2, so that 6 of 8 steps fit."""
    texts = ["abcd" + letter for letter in "abcdefgh"]
    verifier, runner = verifier_for(kv_pool_tokens=64)
    scores = verifier.score(range(1, 9), [0] * 8, texts)
    assert [math.isnan(score) for score in scores] == [False] * 6 + [True] * 2
    roomy, _ = verifier_for()
    assert scores[:6] == pytest.approx(roomy.score(range(1, 9), [0] * 8, texts)[:6], abs=1e-5)
    runner.tree.check_integrity()
    assert len(runner.tree) == 1 + 6 and verifier.usage.tokens == ROOT_TOKENS + 6 * 6
    assert verifier.usage.path_tokens == 6 * (ROOT_TOKENS + 6)
    verifier.retain([2])
    again = verifier.score([9, 10], [2, 2], ["x", "y"])
    assert again[0] == pytest.approx(plain_scores(tiny_prm("llama"), [texts[1], "x"])[-1], abs=1e-4)
    assert not math.isnan(again[1])
    verifier.close()
    runner.tree.check_integrity()
    assert (runner.tree.resident_pages, len(runner.tree)) == (0, 0)


def test_a_pool_too_small_for_the_problem_fails_every_step() -> None:
    verifier, runner = verifier_for(problem="a" * 40, kv_pool_tokens=32)
    for node in (1, 2):
        assert math.isnan(verifier.score([node], [0], ["b"])[0])
        assert (len(runner.tree), verifier.usage.tokens, verifier.usage.path_tokens) == (0, 0, 0)
    verifier.retain([])
    verifier.close()
    runner.tree.check_integrity()


def test_a_function_sees_the_steps_so_far() -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []

    def scorer(problem: str, steps: object) -> float:
        seen.append((problem, tuple(steps)))  # type: ignore[arg-type]
        return 0.25

    verifier = CallableVerifier(scorer, "1+1?")
    assert verifier.score([1, 2], [0, 0], ["a", "b"]) == [0.25, 0.25]
    verifier.retain([2])
    verifier.score([3], [2], ["c"])
    assert seen == [("1+1?", ("a",)), ("1+1?", ("b",)), ("1+1?", ("b", "c"))]
    with pytest.raises(KeyError):
        verifier.score([4], [1], ["d"])


@pytest.mark.parametrize("result", [ZeroDivisionError("oh"), "high", None])
def test_a_failing_function_fails_its_branch_and_is_logged_once(
    result: object, caplog: pytest.LogCaptureFixture
) -> None:
    def scorer(problem: str, steps: object) -> float:
        if "b" not in steps[-1]:  # type: ignore[index]
            return 1.0
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[return-value]

    verifier = CallableVerifier(scorer, "1+1?")
    with caplog.at_level(logging.WARNING):
        scores = verifier.score([1, 2, 3, 4], [0] * 4, ["a", "b", "c", "bb"])
    assert [math.isnan(score) for score in scores] == [False, True, False, True]
    assert len(caplog.records) == 1 and "'b'" in caplog.text
