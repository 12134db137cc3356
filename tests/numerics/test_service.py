"""Whole searches on tiny random models: reproducible, counted right, and nothing is left behind however they end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

import ets_engine.loading
import ets_engine.models.prm_loading
import ets_engine.reference.shipped
from ets_engine.config import EngineConfig, SearchConfig, Strategy
from ets_engine.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    ETSError,
    ModelLoadError,
    ProtocolError,
    ReferenceDomainError,
)
from ets_engine.models import TreePolicy
from ets_engine.protocols import Frontier, Selection
from ets_engine.runtime import Runner
from ets_engine.runtime.passes import Passes
from ets_engine.search.selectors import Rebase
from ets_engine.service import ETSEngine
from ets_engine.serving import Models
from ets_engine.types import SearchEvent, SearchResult, StopReason

from .engines import save, tiny_prm

PROBLEM = "what is 1+1?"
PROMPT_TOKENS = 1 + len(PROBLEM) + 1
PAGES = EngineConfig(device="cpu", page_tokens=4, prefix_cache_tokens=0)
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@pytest.fixture(scope="module")
def engine(folders: tuple[str, str]) -> ETSEngine:
    """One engine for all tests of this file, which proves at every turn that the last one left nothing behind."""
    return ETSEngine.from_pretrained(folders[0], folders[1], PAGES)


def settings(strategy: Strategy = "rebase", **changes: Any) -> SearchConfig:
    small = {"width": 6, "max_steps": 5, "max_step_tokens": 8, "max_tokens": 36, "seed": 3}
    return SearchConfig(strategy=strategy, **{**small, **changes})


def everything_but_time(result: SearchResult) -> dict[str, Any]:
    return result.model_dump(exclude={"timing"})


def models(engine: ETSEngine) -> Models:
    assert engine._worker._scheduler is not None
    return engine._worker._scheduler._models


def runners(engine: ETSEngine) -> tuple[Runner, ...]:
    return models(engine).runners


def check_nothing_is_left(engine: ETSEngine) -> None:
    for runner in runners(engine):
        runner.tree.check_integrity()
        runner.prefixes.check_integrity()
        while runner.prefixes.forget_one():
            pass
        assert (runner.tree.resident_tokens, runner.tree.resident_pages, len(runner.tree)) == (0, 0, 0)
    assert (models(engine).decoder.num_branches, len(models(engine).decoder.usages)) == (0, 0)


def half(problem: str, steps: Sequence[str]) -> float:
    return 0.5


# ---------------------------------------------------------------------- results


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(engine: ETSEngine, folders: tuple[str, str], strategy: Strategy) -> None:
    result = engine.search(PROBLEM, settings(strategy, trace=True))
    check_nothing_is_left(engine)
    assert everything_but_time(engine.search(PROBLEM, settings(strategy, trace=True))) == everything_but_time(result)
    assert SearchResult.model_validate_json(result.model_dump_json()) == result
    assert (result.problem, result.strategy, result.seed) == (PROBLEM, strategy, 3)
    assert result.width == (1 if strategy == "greedy" else 6)
    check_figures(result)


def check_figures(result: SearchResult) -> None:
    """The figures against the tree they come from; the PRM reads one token per character."""
    assert result.trace is not None and result.kv is not None and result.verifier_kv is not None
    nodes = {node.id: node for node in result.trace}
    inner = {node.parent for node in result.trace}

    def path(node: int) -> list[int]:
        return [] if node < 0 else [*path(nodes[node].parent), node]

    assert result.prompt_tokens == nodes[0].num_tokens == PROMPT_TOKENS
    steps = {node: tuple(nodes[above].text for above in path(node)[1:]) for node in nodes}
    stored = {(*above, step[:end]) for *above, step in list(steps.values())[1:] for end in range(1, len(step) + 1)}
    most = sum(node.num_tokens for node in result.trace)
    assert PROMPT_TOKENS + len(stored) <= result.kv.unique_tokens <= most, "what steps have in common counts once"
    leaves = [node for node in nodes if node not in inner]
    assert result.kv.path_tokens == sum(nodes[above].num_tokens for leaf in leaves for above in path(leaf))
    ended = sum(node.stop is StopReason.FINISHED for node in result.trace)
    assert result.trajectories == ended
    assert result.generated_tokens == sum(node.num_tokens for node in result.trace[1:]) + ended, "each end is a token"
    assert PROMPT_TOKENS <= result.kv.mean_tokens <= result.kv.peak_tokens <= result.kv.unique_tokens
    scored = [n for n in result.trace[1:] if n.stop in (StopReason.BOUNDARY, StopReason.FINISHED)]
    judged = {steps[node.id] for node in scored}
    assert result.verifier_tokens == PROMPT_TOKENS + sum(len(path[-1].strip()) + 1 for path in judged)
    assert result.verifier_kv.unique_tokens == result.verifier_tokens
    assert 1 <= result.verifier_kv.mean_tokens <= result.verifier_kv.peak_tokens <= result.verifier_tokens
    assert result.verifier_kv.published_tokens is None
    depths = {node.depth for node in result.trace}
    opened = [[n.id for n in result.trace if n.depth == d and n.stop is StopReason.BOUNDARY] for d in depths]
    unions = [{above for node in nodes for above in path(node)} for nodes in opened]
    assert result.kv.published_tokens == sum(nodes[node].num_tokens for union in unions for node in union)
    assert result.num_errors == 0
    assert result.text == "".join(step.text for step in result.steps)
    assert result.path_tokens == sum(step.num_tokens for step in result.steps)
    if result.finish_reason == "stop":
        best = result.candidates[0]
        assert (best.answer, best.score, best.steps) == (result.answer, result.score, result.steps)
    timing = result.timing
    assert timing.wall_s >= timing.policy_s + timing.verifier_s + timing.select_s > 0
    assert timing.bytes_moved > 0 and timing.bandwidth_gb_s > 0 and timing.decode_steps > 0


def test_the_seed_decides(engine: ETSEngine, folders: tuple[str, str]) -> None:
    result = engine.search(PROBLEM, settings("ets", trace=True))
    another = ETSEngine.from_pretrained(folders[0], folders[1], PAGES)
    assert everything_but_time(another.search(PROBLEM, settings("ets", trace=True))) == everything_but_time(result)
    traces = {engine.search(PROBLEM, settings("ets", trace=True, seed=seed)).trace for seed in range(3, 6)}
    assert len(traces) == 3 and result.trace in traces


def test_greedy_has_no_seed_in_it(engine: ETSEngine) -> None:
    assert engine.search(PROBLEM, settings("greedy", seed=1)).text == engine.search(PROBLEM, settings("greedy")).text


def test_a_search_of_the_callers_own(engine: ETSEngine) -> None:
    """A verifier function, a selector and events instead of the built-in ones."""
    seen: list[tuple[str, ...]] = []
    events: list[SearchEvent] = []

    class First:
        needs_embeddings = False

        def select(self, frontier: Frontier, open_width: int) -> Selection:
            return Selection((open_width, *[0] * (len(frontier.leaves) - 1)))

    def scorer(problem: str, steps: Sequence[str]) -> float:
        assert problem == PROBLEM
        seen.append(tuple(steps))
        return 1.0 if "a" in steps[-1] else 0.25

    result = engine.search(PROBLEM, settings(trace=True), verifier=scorer, selector=First(), on_event=events.append)
    check_nothing_is_left(engine)
    assert result.strategy == "First" and result.verifier_kv is None and result.verifier_tokens == 0
    assert result.trace is not None
    assert [node.step_score for node in result.trace if node.id and node.stop is StopReason.BOUNDARY] == [
        1.0 if "a" in node.text else 0.25 for node in result.trace if node.id and node.stop is StopReason.BOUNDARY
    ]
    assert max(map(len, seen)) > 1 and {steps[:-1] for steps in seen} <= {(), *seen}
    assert [event.kind for event in events] == ["start", *["step"] * (len(events) - 2), "end"]
    assert [event.depth for event in events[1:-1]] == list(range(1, len(events) - 1))


# ---------------------------------------------------------------------- KV by hand


def test_peak_and_mean_by_hand(engine: ETSEngine) -> None:
    """Two branches, three rounds of four tokens, every last token unread until its step gets a child.

    Decode steps read one token per branch: 2, 4, 6; the boundary tokens are read between rounds: 8; then 10, 12, 14.
    """
    for seed in itertools.count():
        config = settings("best_of_n", width=2, max_steps=3, max_step_tokens=4, seed=seed, trace=True)
        result = engine.search(PROBLEM, config)
        assert result.trace is not None and result.kv is not None and result.verifier_kv is not None
        if len(result.trace) == 7 and not result.trajectories:
            break
    held = [PROMPT_TOKENS + tokens for tokens in (2, 4, 6, 10, 12, 14, 18, 20, 22)]
    assert result.kv.peak_tokens == held[-1] and result.timing.decode_steps == len(held)
    assert result.kv.mean_tokens == pytest.approx(sum(held) / len(held))
    assert result.kv.unique_tokens == PROMPT_TOKENS + 24 and result.kv.path_tokens == 2 * (PROMPT_TOKENS + 12)
    assert result.kv.published_tokens == PROMPT_TOKENS + (PROMPT_TOKENS + 8) + (PROMPT_TOKENS + 16)
    assert result.kv.sharing_ratio == pytest.approx((2 * PROMPT_TOKENS + 24) / (PROMPT_TOKENS + 24))
    assert result.kv.bytes_per_token == 3 * 2 * 2 * 8 * 4  # layers, K and V, KV heads, head dim, float32
    lengths = [len(node.text.strip()) + 1 for node in result.trace]
    rounds = [PROMPT_TOKENS + sum(lengths[1:3]), PROMPT_TOKENS + sum(lengths[1:5])]
    assert result.verifier_kv.peak_tokens == rounds[-1], "the last steps are out of depth, and nobody reads them"
    assert result.verifier_kv.mean_tokens == pytest.approx(sum(rounds) / 2)
    assert result.verifier_kv.path_tokens == rounds[-1] + PROMPT_TOKENS


def test_pruned_pages_are_free_before_the_next_forward_pass(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass after each selection reads the kept steps' last tokens, with the kept paths alone in memory."""
    kept: list[tuple[int, ...]] = []
    seen: list[tuple[tuple[int, ...], int, int]] = []
    policy_tree = runners(engine)[0].tree
    retain, read = TreePolicy.retain, Passes.read

    def noting_retain(self: TreePolicy, leaves: Sequence[int]) -> None:
        retain(self, leaves)
        kept.append(tuple(leaves))

    def noting_read(self: Passes, *arguments: Any) -> Any:
        if self._tree is policy_tree and kept:
            seen.append((kept.pop(), self._tree.resident_tokens, self._tree.resident_pages))
            self._tree.check_integrity()
        return read(self, *arguments)

    monkeypatch.setattr(TreePolicy, "retain", noting_retain)
    monkeypatch.setattr(Passes, "read", noting_read)
    result = engine.search(PROBLEM, settings("beam", width=8, trace=True, merge_branches=False))
    assert result.trace is not None and len(seen) >= 3
    parents = {node.id: node.parent for node in result.trace}
    pruned = 0
    for leaves, tokens, pages in seen:
        union: set[int] = set()
        for node in leaves:
            while node >= 0:
                union.add(node)
                node = parents[node]
        assert tokens == sum(result.trace[node].num_tokens for node in union)
        assert pages <= sum(-(-result.trace[node].num_tokens // PAGES.page_tokens) for node in union)
        pruned += len({node.id for node in result.trace if node.depth == result.trace[leaves[0]].depth} - union)
    assert pruned > 8


@pytest.mark.parametrize("strategy", ["ets", "ets_kv"])
def test_a_hard_budget_holds(engine: ETSEngine, strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the figure nor what the pool really held in any forward pass is above the budget."""
    tree, read, peak = runners(engine)[0].tree, Passes.read, 0

    def noting_read(self: Passes, *arguments: Any) -> Any:
        nonlocal peak
        if self._tree is tree:
            peak = max(peak, tree.resident_tokens)
        return read(self, *arguments)

    monkeypatch.setattr(Passes, "read", noting_read)
    cut = 0
    for seed, extra in itertools.product(range(6), (8, 30, 60)):
        budget = PROMPT_TOKENS + extra
        peak = 0
        result = engine.search(PROBLEM, settings(strategy, seed=seed, kv_budget_tokens=budget))
        check_nothing_is_left(engine)
        assert result.kv is not None and peak == result.kv.peak_tokens <= budget
        assert result.num_errors == 0
        free = engine.search(PROBLEM, settings(strategy, seed=seed))
        assert free.kv is not None
        cut += free.kv.peak_tokens > budget
    assert cut >= 6, "the budget made a difference"
    with pytest.raises(ContextLengthError, match="kv_budget_tokens"):
        engine.search(PROBLEM, settings(strategy, kv_budget_tokens=PROMPT_TOKENS))
    check_nothing_is_left(engine)


def test_a_search_that_could_never_fit_is_refused_with_what_it_needs(folders: tuple[str, str]) -> None:
    small = ETSEngine.from_pretrained(*folders, EngineConfig(device="cpu", page_tokens=4, kv_pool_tokens=16))
    with pytest.raises(ContextLengthError, match=r"prompt of 16 tokens .* take 20 tokens of KV.* has 16"):
        small.search(f"{PROBLEM}??", settings())
    check_nothing_is_left(small)
    assert small.search("1+1", settings("greedy")).num_errors == 1, "it may still run full"


@pytest.mark.parametrize("pool_tokens", [32, 64, 128])
def test_a_small_pool_gives_errors_as_data(folders: tuple[str, str], pool_tokens: int) -> None:
    small = ETSEngine.from_pretrained(*folders, EngineConfig(device="cpu", page_tokens=4, kv_pool_tokens=pool_tokens))
    result = small.search(PROBLEM, settings(width=16, trace=True))
    check_nothing_is_left(small)
    assert result.num_errors > 0 and result.trace is not None
    failed = [node for node in result.trace if node.stop is StopReason.ERROR]
    assert len(failed) == result.num_errors and all(node.step_score == 0 for node in failed)
    assert small.search(PROBLEM, settings("greedy")).num_errors == (pool_tokens <= 32)
    check_nothing_is_left(small)


def test_a_round_that_ran_out_of_memory_frees_what_it_decoded(folders: tuple[str, str]) -> None:
    """Pages of 4 in a pool of 32: the prompt takes 4 of 8, so that 5 branches cannot all have one."""
    small = ETSEngine.from_pretrained(*folders, EngineConfig(device="cpu", page_tokens=4, kv_pool_tokens=32))
    policy = TreePolicy(models(small).decoder, small._format, PROBLEM, settings(), "mine")
    assert policy.start() == PROMPT_TOKENS
    steps = policy.expand([0] * 5, range(1, 6))
    assert [step.stop for step in steps] == [StopReason.ERROR] * 5
    assert all(step.error is not None and "kv_pool_tokens" in step.error for step in steps)
    assert runners(small)[0].tree.resident_tokens == PROMPT_TOKENS
    assert [step.stop for step in policy.expand([0] * 2, [6, 7])] == [StopReason.BOUNDARY] * 2, "others may go on"
    policy.close()
    check_nothing_is_left(small)


def test_a_prompt_that_is_too_long_is_refused(engine: ETSEngine) -> None:
    with pytest.raises(ContextLengthError, match="256"):
        engine.search("a" * 300, settings())
    check_nothing_is_left(engine)


# ---------------------------------------------------------------------- stopping and failing


class Countdown:
    """Says yes at its n-th call, and only then."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def is_set(self) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 8, 14, 22, 30])
def test_stopping(engine: ETSEngine, calls: int) -> None:
    """Some of these stop before the first step, most in the middle of a round; one yes is enough."""
    whole = engine.search(PROBLEM, settings(trace=True))
    stop, events = Countdown(calls), list[SearchEvent]()
    result = engine.search(PROBLEM, settings(trace=True), cancel=stop, on_event=events.append)
    check_nothing_is_left(engine)
    assert result.finish_reason == "cancelled" and stop.left == 0, "nobody asked again"
    assert result.trace is not None and whole.trace is not None
    assert [(n.id, n.parent, n.text) for n in result.trace] == [
        (n.id, n.parent, n.text) for n in whole.trace[: len(result.trace)]
    ]
    paths = {"": 0.0}
    for node in result.trace[1:]:
        above = next(text for text, seen in paths.items() if seen == node.parent) if node.parent else ""
        paths[above + node.text] = node.id
    assert result.text in paths
    assert not events or events[-1].kind == "end"
    assert everything_but_time(engine.search(PROBLEM, settings(trace=True))) == everything_but_time(whole)


def test_a_stop_after_something_finished_returns_the_best_of_it(engine: ETSEngine) -> None:
    config = settings("best_of_n", width=24, max_steps=8, max_tokens=64, trace=True)
    whole = engine.search(PROBLEM, config)
    assert whole.trace is not None and whole.finish_reason == "stop"
    for calls in range(20, 80):
        result = engine.search(PROBLEM, config, cancel=Countdown(calls))
        if 2 <= result.trajectories < whole.trajectories:
            break
    assert result.finish_reason == "cancelled" and result.answer is not None and result.score > 0


@pytest.mark.parametrize("kind", ["start", "step", "end"])
def test_a_raising_callback(engine: ETSEngine, kind: str) -> None:
    def on_event(event: SearchEvent) -> None:
        if event.kind == kind:
            raise ZeroDivisionError("mine")

    before = engine.search(PROBLEM, settings())
    with pytest.raises(ZeroDivisionError, match="mine"):
        engine.search(PROBLEM, settings(), on_event=on_event)
    check_nothing_is_left(engine)
    assert everything_but_time(engine.search(PROBLEM, settings())) == everything_but_time(before)


def test_a_raising_stop_callback_in_the_middle_of_a_round(engine: ETSEngine) -> None:
    class Raising:
        calls = itertools.count()

        def is_set(self) -> bool:
            if next(self.calls) == 6:
                raise ZeroDivisionError("mine")
            return False

    with pytest.raises(ZeroDivisionError, match="mine"):
        engine.search(PROBLEM, settings(), cancel=Raising())
    check_nothing_is_left(engine)


def test_a_raising_verifier_fails_branches(engine: ETSEngine) -> None:
    result = engine.search(PROBLEM, settings(), verifier=lambda problem, steps: 1 / 0)
    check_nothing_is_left(engine)
    assert (result.finish_reason, result.num_errors, result.answer, result.score) == ("error", 6, None, 0.0)

    def picky(problem: str, steps: Sequence[str]) -> float:
        return 0.5 if "a" in steps[-1] else float("nan")

    result = engine.search(PROBLEM, settings(trace=True), verifier=picky)
    assert result.trace is not None
    assert {node.stop for node in result.trace} >= {StopReason.ERROR, StopReason.BOUNDARY}
    assert all("a" in node.text for node in result.trace[1:] if node.stop is StopReason.BOUNDARY)


def test_a_score_out_of_range_breaks_the_contract(engine: ETSEngine) -> None:
    with pytest.raises(ProtocolError, match=r"7\.0"):
        engine.search(PROBLEM, settings(), verifier=lambda problem, steps: 7)
    check_nothing_is_left(engine)


def test_callbacks_cannot_lock_the_engine_up(engine: ETSEngine) -> None:
    """They may search, one inside the other; they may not wait for the engine's end."""
    inner: list[SearchResult] = []
    engine.search(PROBLEM, settings(), on_event=lambda event: inner.append(engine.search(PROBLEM, settings())))
    assert len(inner) > 2 and {result.finish_reason for result in inner} == {inner[0].finish_reason}
    with pytest.raises(EngineError, match="callback"):
        engine.search(PROBLEM, settings(), on_event=lambda event: engine.close())
    check_nothing_is_left(engine)


def test_two_threads_get_what_each_would_get_alone(engine: ETSEngine) -> None:
    jobs = [(problem, seed) for seed in (1, 2) for problem in (PROBLEM, "what is 2+2?")]
    alone = [everything_but_time(engine.search(problem, settings("ets", seed=seed))) for problem, seed in jobs]
    together: list[Any] = [None] * len(jobs)

    def work(places: Iterable[int]) -> None:
        for place in places:
            problem, seed = jobs[place]
            together[place] = everything_but_time(engine.search(problem, settings("ets", seed=seed)))

    threads = [threading.Thread(target=work, args=(places,)) for places in ([0, 1], [2, 3])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert together == alone
    check_nothing_is_left(engine)


# ---------------------------------------------------------------------- making and closing


def test_without_a_prm_every_search_brings_a_verifier(folders: tuple[str, str]) -> None:
    with ETSEngine.from_pretrained(folders[0], config=PAGES) as plain:
        with pytest.raises(ConfigError, match="verifier=None"):
            plain.search(PROBLEM, settings())
        result = plain.search(PROBLEM, settings(), verifier=half)
        assert result.verifier_kv is None
        check_nothing_is_left(plain)
    with pytest.raises(ETSError, match="closed"):
        plain.search(PROBLEM, settings(), verifier=half)


def test_a_closed_engine_refuses(folders: tuple[str, str]) -> None:
    closed = ETSEngine.from_pretrained(*folders, PAGES)
    closed.close()
    with pytest.raises(ETSError, match="closed"):
        closed.search(PROBLEM, settings())
    closed.close()


def test_contradictions_are_refused(engine: ETSEngine, folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'beam' cannot honour a KV budget"):
        engine.search(PROBLEM, settings("beam", kv_budget_tokens=100))
    check_nothing_is_left(engine)
    with pytest.raises(ConfigError, match="only knows the problems of model='reference'"):
        ETSEngine.from_pretrained(folders[0], "reference", PAGES)
    with pytest.raises(ModelLoadError, match="cannot tell which PRM this is"):
        ETSEngine.from_pretrained(folders[0], folders[0], PAGES)
    with pytest.raises(ModelLoadError, match="3 labels"):
        ETSEngine.from_pretrained(folders[0], save(tmp_path, tiny_prm("llama", num_labels=3)), PAGES)


def test_an_installation_without_weights_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ets_engine.reference.shipped, "_HERE", tmp_path)
    with pytest.raises(ModelLoadError, match="reinstall"):
        ETSEngine.from_pretrained("reference")
    assert isinstance(ETSEngine, type)


def test_the_reference_engine_reads_its_own_problems_only(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny models in the place of the shipped ones: what is around them is what is tested."""
    monkeypatch.setattr(ets_engine.loading, "policy_path", lambda: folders[0])
    monkeypatch.setattr(ets_engine.models.prm_loading, "prm_path", lambda: folders[1])
    reference = ETSEngine.from_pretrained(config=PAGES)
    problem = "Use 4, 6, 10 and 19 to make 16."
    loose = "use 19, 10, 6 and  4 to make 16"
    wide = SearchConfig(strategy="rebase", width=16, max_steps=2, seed=1, trace=True)
    result, same = reference.search(problem, wide), reference.search(loose, wide)
    assert result.trace == same.trace and (result.problem, same.problem) == (problem, loose)
    assert result.prompt_tokens == 1 + len(problem) + 1
    assert result.trace is not None and max(node.num_tokens for node in result.trace[1:]) == 48
    assert all("\n" not in node.text.strip() for node in result.trace), "a line is a step"
    assert result.answer is None, "random lines state no expression"
    with pytest.raises(ReferenceDomainError, match="--model"):
        reference.search(PROBLEM)
    check_nothing_is_left(reference)


def test_the_selector_named_and_given_agree(engine: ETSEngine) -> None:
    named = engine.search(PROBLEM, settings("rebase", trace=True))
    given = engine.search(PROBLEM, settings("beam", trace=True), selector=Rebase(0.2))
    assert named.trace == given.trace and given.strategy == "Rebase"
