"""Branches that drew the same tokens are computed, stored and judged once, and nothing but the cost may tell.

The oracle is the same work without merging. Seeds are fixed: a draw that falls between the two, which read
batches of different sizes, has odds of about 1e-6 per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from random import Random
from typing import Any

import numpy as np
import pytest

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import PoolExhaustedError
from ets_engine.models import PrmVerifier, TreePolicy, TrlFormat
from ets_engine.runtime import Branch, FinishedBranch, Runner, SamplingParams, StepDecoder, StopRules
from ets_engine.service import ETSEngine
from ets_engine.types import SearchResult, StopReason

from .conftest import tiny_model
from .engines import tiny_prm, tiny_tokenizer
from .test_decoding import PROMPT, Letters

LETTERS = 9  # a vocabulary so small that many draws are equal
PROMPT_IDS = [one % LETTERS for one in PROMPT]
GREEDY, PLAIN = SamplingParams(temperature=0.0), SamplingParams()
SAMPLINGS = (
    GREEDY,
    SamplingParams(0.4),
    PLAIN,
    SamplingParams(top_p=0.7),
    SamplingParams(top_k=2),
    SamplingParams(2.0),
)
RULES = (
    StopRules(strings=(), max_step_tokens=4),
    StopRules(strings=(), eos_ids=frozenset([2]), max_step_tokens=7),
    StopRules(strings=("AB", "DC"), max_step_tokens=9),
)
LIMITS = (3, 12, 40)  # tokens of a trajectory

Path = tuple[object, ...]  # from the prompt: tokens, each with what makes it another's than an equal one


def decoder_for(name: str = "llama", letters: int = LETTERS, **settings: Any) -> StepDecoder:
    config = EngineConfig(page_tokens=4, prefix_cache_tokens=0, **settings)
    return StepDecoder(Runner(tiny_model(name, vocab_size=letters), config), Letters())


def prefixes(path: Path) -> Iterable[Path]:
    return (path[:length] for length in range(1, len(path) + 1))


def check_equal(found: FinishedBranch, expected: FinishedBranch) -> None:
    """Whole tokens to the letter, sums of floats as far as batches of other sizes agree."""
    assert (found.token_ids, found.stop, found.text) == (expected.token_ids, expected.stop, expected.text)
    assert found.num_sampled == expected.num_sampled
    assert found.leaf.pending == expected.leaf.pending and found.leaf.path_tokens == expected.leaf.path_tokens
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
    assert found.certainty == pytest.approx(expected.certainty, abs=1e-4)
    assert np.abs(found.hidden_mean - expected.hidden_mean).max() < 1e-4


class Pair:
    """Two decoders that get the same work, one of which merges; `check` compares them and what they held by hand.

    Two branches are one while they draw the same tokens if they began together, at the end of one path, under one set
    of rules and one limit.
    """

    def __init__(self, **settings: Any) -> None:
        self.decoders = decoder_for(**settings), decoder_for(**settings)
        self.trees = [decoder.runner.tree for decoder in self.decoders]
        self.leaves = {0: [decoder.leaves.start(PROMPT_IDS, "a") for decoder in self.decoders]}
        self.parent: dict[int, int] = {}
        self.labels: dict[int, list[object]] = {}  # of each node for each decoder: it shares with nodes of equal labels
        self.steps: dict[int, FinishedBranch] = {}
        self.live: dict[int, int] = {}  # nodes under way, with the tokens that they have drawn, -1 before they join
        self.log: list[list[tuple[dict[int, int], int]]] = [[], []]  # after each step: tokens of nodes, resident ones
        self.pages: list[tuple[int, int]] = []  # resident after each step

    def submit(self, parent: int, samplings: Sequence[SamplingParams], rules: StopRules, max_tokens: int) -> None:
        first, left = len(self.parent) + 1, max_tokens - self.leaves[parent][0].num_written
        nodes = range(first, first + len(samplings))
        for decoder, leaf, merges in zip(self.decoders, self.leaves[parent], (True, False), strict=True):
            decoder.submit(
                [
                    Branch(leaf, node, 5, sampling, rules, left, needs_certainty=True, merges=merges)
                    for node, sampling in zip(nodes, samplings, strict=True)
                ]
            )
        for node in nodes:
            self.parent[node], self.labels[node] = parent, [(len(self.pages), rules, left), node]
            self.live[node] = -1 if self.decoders[0]._rows and len(self.leaves[parent][0].pending) <= 1 else 0

    def step(self) -> None:
        found, expected = ({one.branch.node: one for one in decoder.step()} for decoder in self.decoders)
        assert found.keys() == expected.keys()
        for node, step in expected.items():
            check_equal(found[node], step)
            self.steps[node], self.leaves[node] = step, [found[node].leaf, step.leaf]
            del self.live[node]
        for node in self.live:
            self.live[node] += 1
        read = [node for node in self.leaves if node and self.steps[node].num_sampled]  # others had no room
        for place, tree in enumerate(self.trees):
            tree.check_integrity()
            stored = {node: len(self.steps[node].token_ids) - len(self.leaves[node][place].pending) for node in read}
            self.log[place].append(({**stored, **self.live}, tree.resident_tokens))  # all have joined by now
        self.pages.append((self.trees[0].resident_pages, self.trees[1].resident_pages))

    def release(self, node: int) -> None:
        for decoder, leaf in zip(self.decoders, self.leaves.pop(node), strict=True):
            decoder.leaves.release(leaf)

    def path(self, node: int, place: int, length: int | None = None) -> Path:
        if not node:
            return tuple(enumerate(PROMPT_IDS))
        ids = self.steps[node].token_ids[:length]
        above = self.path(self.parent[node], place)
        return (*above, *((self.labels[node][place], token) for token in ids))

    def check(self) -> None:
        """That each decoder held and read each distinct prefix once; to be called when all steps are done."""
        assert not self.live
        for place, decoder in enumerate(self.decoders):
            read: set[Path] = set()
            for lengths, resident in self.log[place]:
                ends = [self.path(node, place, length) for node, length in lengths.items()]
                held = {prefix for end in [self.path(0, place), *ends] for prefix in prefixes(end)}
                assert resident == len(held)
                read |= held
            usage = decoder.usages.of("a")
            assert usage.read_tokens == len(read)
            assert usage.generated_tokens == sum(step.num_sampled for step in self.steps.values())
        usages = [decoder.usages.of("a") for decoder in self.decoders]
        assert usages[0].decode_steps == usages[1].decode_steps
        assert usages[0].mean_tokens <= usages[1].mean_tokens and usages[0].peak_tokens <= usages[1].peak_tokens

    def finish(self) -> None:
        """Give everything back."""
        while self.leaves:
            self.release(next(iter(self.leaves)))
        for tree in self.trees:
            tree.check_integrity()
            assert (tree.resident_tokens, len(tree)) == (0, 0)


def grow(pair: Pair, rng: Random, num_steps: int = 40, *, prunes: bool = True) -> None:
    """Several rounds of children of random leaves, of which new ones join and old ones are given back at any time."""
    for _ in range(num_steps):
        open_leaves = [node for node in pair.leaves if not node or pair.steps[node].stop is StopReason.BOUNDARY]
        for node in rng.sample(open_leaves, min(len(open_leaves), 3)):
            if len(pair.live) < 16:
                rules, limit = rng.choice(RULES), rng.choice(LIMITS)
                samplings = [rng.choice(SAMPLINGS)] * rng.randint(1, 6)
                if rng.random() < 0.4:
                    samplings = [rng.choice(SAMPLINGS) for _ in samplings]
                pair.submit(node, samplings, rules, limit)
        pair.step()
        for node in rng.sample([*pair.leaves][1:], len(pair.leaves) // 4 if prunes else 0):
            pair.release(node)
    while pair.live:
        pair.step()


# ---------------------------------------------------------------------- decoding


@pytest.mark.parametrize("seed", range(3))
def test_ahead_of_the_host_equal_steps_end_in_one_leaf(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "runs_ahead", True)
    pair = Pair()
    grow(pair, Random(seed), prunes=False)
    ends: dict[object, set[int]] = {}
    for node, step in pair.steps.items():
        if step.num_sampled:
            ends.setdefault((pair.path(node, 0), step.num_sampled), set()).add(id(pair.leaves[node][0]))
    assert all(len(leaves) == 1 for leaves in ends.values())
    merged, plain = (decoder.usages.of("a") for decoder in pair.decoders)
    assert merged.mean_tokens < plain.mean_tokens and merged.generated_tokens == plain.generated_tokens
    assert all(merged <= plain for merged, plain in pair.pages)
    pair.finish()


@pytest.mark.parametrize("seed", range(5))
def test_merging_finds_the_same_and_holds_each_prefix_once(seed: int) -> None:
    pair = Pair()
    grow(pair, Random(seed))
    pair.check()
    assert {step.stop for step in pair.steps.values()} == {StopReason.BOUNDARY, StopReason.FINISHED, StopReason.LENGTH}
    merged, plain = (decoder.usages.of("a") for decoder in pair.decoders)
    assert merged.read_tokens < 0.95 * plain.read_tokens and merged.mean_tokens < 0.95 * plain.mean_tokens
    assert np.mean(pair.pages, axis=0)[0] < np.mean(pair.pages, axis=0)[1]
    pair.finish()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["llama_gqa_rope_scaled", "qwen2", "gemma2"])
def test_merging_finds_the_same_in_other_architectures(name: str, seed: int) -> None:
    pair = Pair(name=name, letters=31, prefill_chunk_tokens=3)
    grow(pair, Random(seed), num_steps=15)
    pair.check()
    pair.finish()


@pytest.mark.parametrize("seed", range(3))
def test_while_nothing_is_given_back_merging_takes_no_more_pages(seed: int) -> None:
    pair = Pair()
    grow(pair, Random(seed), prunes=False)
    assert all(merged <= plain for merged, plain in pair.pages)
    assert min(merged - plain for merged, plain in pair.pages) < -5


def test_greedy_branches_are_one_whatever_their_nodes() -> None:
    """Two rounds of 20 branches: one row, one node of KV and one leaf each; the last of its holders frees it."""
    decoder = decoder_for()
    tree, prompt = decoder.runner.tree, decoder.leaves.start(PROMPT_IDS, "a")
    decoder.submit([Branch(prompt, node, 5, GREEDY, RULES[0], 40) for node in range(1, 21)])
    first = decoder.run()
    assert len({step.leaf for step in first}) == len({step.token_ids for step in first}) == 1
    assert tree.resident_tokens == len(PROMPT_IDS) + 3 and len(tree) == 2
    decoder.submit([Branch(step.leaf, 100 + step.branch.node, 5, GREEDY, RULES[0], 40) for step in first])
    second = decoder.run()
    assert len({step.leaf for step in second}) == 1 and [step.branch.node for step in second] == [*range(101, 121)]
    assert tree.resident_tokens == len(PROMPT_IDS) + 4 + 3
    usage = decoder.usages.of("a")
    assert (usage.read_tokens, usage.generated_tokens) == (len(PROMPT_IDS) + 4 + 3, 2 * 20 * 4)
    for step in (*first, *second[1:]):
        decoder.leaves.release(step.leaf)
    assert tree.resident_tokens == len(PROMPT_IDS) + 4 + 3, "one holder is left"
    decoder.leaves.release(second[0].leaf)
    assert (tree.resident_tokens, len(tree)) == (len(PROMPT_IDS), 1)
    tree.check_integrity()


def test_what_differs_in_its_limits_or_in_what_it_asks_for_is_not_one_row() -> None:
    decoder = decoder_for()
    prompt = decoder.leaves.start(PROMPT_IDS, "a")
    four, seven = (StopRules(strings=(), max_step_tokens=tokens) for tokens in (4, 7))
    asked = [(four, 2, False), (four, 40, False), (four, 40, True), (seven, 40, True), (four, 3, True)]
    decoder.submit([Branch(prompt, i, 5, GREEDY, *one) for i, one in enumerate(asked * 2)])
    steps = decoder.run()
    assert [len(step.token_ids) for step in steps] == [2, 4, 4, 7, 3] * 2
    stops = [StopReason.LENGTH, StopReason.BOUNDARY, StopReason.BOUNDARY, StopReason.BOUNDARY, StopReason.LENGTH]
    assert [step.stop for step in steps] == stops * 2
    assert [step.certainty != 0 for step in steps] == [one[2] for one in asked] * 2
    assert len({step.leaf for step in steps}) == len(asked)
    assert decoder.runner.tree.resident_tokens == len(PROMPT_IDS) + 1 + 3 + 3 + 6 + 2


# ---------------------------------------------------------------------- what fails in the middle

NODES = range(1, 13)
MILD = SamplingParams(0.8)
NINE = StopRules(strings=("AB",), eos_ids=frozenset([2]), max_step_tokens=9)


def begin(decoder: StepDecoder) -> None:
    prompt = decoder.leaves.start(PROMPT_IDS, "a")
    decoder.submit([Branch(prompt, node, 5, MILD, NINE, 40) for node in NODES])


@pytest.fixture(scope="module")
def expected() -> dict[int, FinishedBranch]:
    """What `begin`'s branches find undisturbed."""
    decoder = decoder_for()
    begin(decoder)
    return {step.branch.node: step for step in decoder.run()}


def parts_at(drawn: int, steps: dict[int, FinishedBranch]) -> bool:
    """Whether two branches that agreed so far draw other tokens now, an end of text among them."""
    rows: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for step in steps.values():
        if step.num_sampled > drawn:
            rows.setdefault(step.token_ids[:drawn], set()).add(step.token_ids[drawn : drawn + 1])
    return any(len(tokens) > 1 for tokens in rows.values())


def books(decoder: StepDecoder) -> tuple[object, ...]:
    """What a decode step may change."""
    tree, usage = decoder.runner.tree, decoder.usages.of("a")
    tree.check_integrity()
    counted = usage.read_tokens, usage.generated_tokens, usage.decode_steps, usage.resident_token_steps
    held = tree.resident_tokens, tree.resident_tokens_of("a"), tree.resident_pages, tree.pool.num_free_pages
    return (*held, len(tree), decoder.num_branches, *counted)


def decode_through(
    decoder: StepDecoder, error: type[Exception], mend: Callable[[], None], expected: dict[int, FinishedBranch]
) -> list[int]:
    """Decode `begin`'s branches with a step that fails, and prove that it changed nothing; tokens drawn before it."""
    failed, found, drawn = list[int](), list[FinishedBranch](), 0
    while decoder.num_branches:
        before = books(decoder)
        try:
            found += decoder.step()
            drawn += 1
        except error:
            assert not drawn or books(decoder) == before, "the first step may have read the prompt"
            failed.append(drawn)
            mend()
    assert len(found) == len(expected)
    for step in found:
        check_equal(step, expected[step.branch.node])
    return failed


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_pool_that_is_full_as_rows_part_changes_nothing(
    expected: dict[int, FinishedBranch], runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another search holds all but 2 to 20 pages until a step has failed."""
    monkeypatch.setattr(Runner, "runs_ahead", runs_ahead)
    parted = 0
    for free_pages in range(2, 22, 2):
        decoder = decoder_for(kv_pool_tokens=200)
        other = decoder.leaves.start([3] * (200 - 4 * free_pages), "b")
        decoder.leaves.open([other])
        begin(decoder)
        failed = decode_through(decoder, PoolExhaustedError, partial(decoder.leaves.release, other), expected)
        assert len(failed) <= 1
        parted += any(parts_at(drawn, expected) for drawn in failed)
    assert parted > 3


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_forward_pass_that_fails_as_rows_part_changes_nothing(
    expected: dict[int, FinishedBranch], runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Runner, "runs_ahead", runs_ahead)
    parted = 0
    for failing in range(9):
        decoder = decoder_for()
        layer, calls = decoder.runner.model.model.layers[1], count()
        usual = layer.forward

        def forward(*args: Any, usual: Any = usual, calls: Any = calls, failing: int = failing, **kwargs: Any) -> Any:
            if next(calls) == failing:
                raise RuntimeError("a layer failed")
            return usual(*args, **kwargs)

        layer.forward = forward
        begin(decoder)
        failed = decode_through(decoder, RuntimeError, lambda: None, expected)
        assert len(failed) == 1
        parted += parts_at(failed[0], expected)
    assert parted > 3


@pytest.mark.parametrize("num_steps", range(1, 9, 2))
def test_a_search_can_be_cancelled_among_others(expected: dict[int, FinishedBranch], num_steps: int) -> None:
    """Whatever parted before, the other search finds what it finds alone, and nothing of the cancelled one is left."""
    decoder = decoder_for()
    tree = decoder.runner.tree
    other = decoder.leaves.start([4, 7, 3], "b")
    decoder.submit([Branch(other, node, 9, MILD, NINE, 40) for node in range(1, 7)])
    begin(decoder)
    decoder.submit([Branch(other, node, 9, MILD, NINE, 40) for node in range(7, 13)])
    found = [step for _ in range(num_steps) for step in decoder.step()]
    ended = [step for step in found if step.leaf.search == "b"]
    drawn = decoder.usages.of("b").generated_tokens - sum(step.num_sampled for step in ended)
    assert decoder.cancel("b") == drawn == num_steps * (12 - len(ended))
    for step in ended:
        decoder.leaves.release(step.leaf)
    tree.check_integrity()
    assert tree.resident_tokens_of("b") == 3, "its prompt"
    found = [step for step in found if step.leaf.search == "a"] + decoder.run()
    assert len(found) == len(expected)
    for step in found:
        check_equal(step, expected[step.branch.node])
        decoder.leaves.release(step.leaf)
    tree.check_integrity()
    assert tree.resident_tokens == len(PROMPT_IDS) + 3


# ---------------------------------------------------------------------- the PRM

PROBLEM = "what is 1+1?"
ROOT_TOKENS = 1 + len(PROBLEM) + 1


def verifier_for(merges: bool, **settings: Any) -> tuple[PrmVerifier, Runner]:
    config = EngineConfig(page_tokens=4, prefix_cache_tokens=0, **settings)
    runner = Runner(tiny_prm("llama"), config)
    return PrmVerifier(runner, TrlFormat(tiny_tokenizer()), PROBLEM, search="a", merges=merges), runner


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equal_steps_are_read_once_and_judged_alike(seed: int, drops: bool) -> None:
    """Four rounds of ten children of three leaves, with three texts to choose from."""
    (merging, runner), (plain, _), rng = verifier_for(True), verifier_for(False), Random(seed)
    paths: dict[int, tuple[str, ...]] = {0: ()}
    read: set[tuple[str, ...]] = set()
    kept, scores = [0], dict[tuple[str, ...], float]()

    def tokens(ends: Iterable[Path]) -> int:
        return ROOT_TOKENS + sum(len(str(prefix[-1])) + 1 for prefix in {one for end in ends for one in prefixes(end)})

    for _ in range(4):
        parents = [rng.choice(kept) for _ in range(10)]
        nodes = list(range(len(paths), len(paths) + len(parents)))
        texts = [rng.choice(["ab", "c", "1+2=3"]) for _ in parents]
        paths |= {node: (*paths[up], text) for node, up, text in zip(nodes, parents, texts, strict=True)}
        found = merging.score(nodes, parents, texts)
        assert found == pytest.approx(plain.score(nodes, parents, texts), abs=2e-5)
        for node, score in zip(nodes, found, strict=True):
            assert scores.setdefault(paths[node], score) == score, "equal steps have equal scores to the last digit"
        read |= {paths[node] for node in nodes}
        assert merging.usage.tokens == tokens(read)
        assert merging.usage.path_tokens == plain.usage.path_tokens
        kept = rng.sample(nodes, 3)
        for verifier in (merging, plain):
            verifier.retain(kept)
            if drops:
                verifier.drop()
                verifier.open()
        runner.tree.check_integrity()
        assert runner.tree.resident_tokens == tokens(paths[node] for node in kept)
    assert merging.usage.tokens < 0.8 * plain.usage.tokens
    assert merging.usage.mean_tokens < plain.usage.mean_tokens and merging.usage.peak_tokens < plain.usage.peak_tokens
    merging.close()
    assert (runner.tree.resident_tokens, len(runner.tree)) == (0, 0)


def test_one_of_two_equal_steps_keeps_what_both_need() -> None:
    verifier, runner = verifier_for(True)
    one, two, three = verifier.score([1, 2, 3], [0, 0, 0], ["ab", "ab", "c"])
    assert one == two != three
    assert runner.tree.resident_tokens == ROOT_TOKENS + 3 + 2 and len(runner.tree) == 3
    verifier.retain([2])
    assert runner.tree.resident_tokens == ROOT_TOKENS + 3
    verifier.retain([2])
    below = verifier.score([4, 5], [2, 2], ["x", "x"])
    assert below[0] == below[1] != one
    assert runner.tree.resident_tokens == ROOT_TOKENS + 3 + 2
    assert verifier.usage.path_tokens == (ROOT_TOKENS + 3) + (ROOT_TOKENS + 2) + 2 * (ROOT_TOKENS + 3 + 2)
    verifier.retain([])
    assert (runner.tree.resident_tokens, len(runner.tree)) == (0, 0)
    runner.tree.check_integrity()


def test_below_equal_steps_equal_steps_are_one_too() -> None:
    verifier, runner = verifier_for(True)
    verifier.score([1, 2], [0, 0], ["ab", "ab"])
    below = verifier.score([3, 4, 5], [1, 2, 2], ["x", "x", "y"])
    assert below[0] == below[1] != below[2]
    assert verifier.usage.tokens == ROOT_TOKENS + 3 + 2 + 2 == runner.tree.resident_tokens
    verifier.retain([4])
    assert runner.tree.resident_tokens == ROOT_TOKENS + 3 + 2


def test_equal_steps_take_the_room_of_one() -> None:
    """Pages of 4: the problem takes 4 of 8, each step 2."""
    texts = ["abcde", "fghij"] * 3
    merging, runner = verifier_for(True, kv_pool_tokens=32)
    scores = merging.score(range(1, 7), [0] * 6, texts)
    assert not any(map(math.isnan, scores)) and len({*scores}) == 2
    runner.tree.check_integrity()
    plain, _ = verifier_for(False, kv_pool_tokens=32)
    assert sum(map(math.isnan, plain.score(range(1, 7), [0] * 6, texts))) == 4


# ---------------------------------------------------------------------- whole searches

PROBLEMS = [f"what is {i}+{i * i}?" for i in range(6)]


@pytest.fixture(scope="module")
def engine(folders: tuple[str, str]) -> ETSEngine:
    return engine_for(folders)


def engine_for(folders: tuple[str, str], **changes: Any) -> ETSEngine:
    return ETSEngine.from_pretrained(
        *folders, EngineConfig(device="cpu", page_tokens=4, prefix_cache_tokens=0, **changes)
    )


def settings(**changes: Any) -> SearchConfig:
    small = {"width": 8, "max_steps": 4, "max_step_tokens": 6, "max_tokens": 24, "temperature": 0.4, "trace": True}
    return SearchConfig(**{**small, **changes})


def check_same(found: SearchResult, expected: SearchResult) -> None:
    """All that a search finds, its scores as far as batches of other sizes agree."""
    assert found.trace is not None and expected.trace is not None
    for one, two in zip(found.trace, expected.trace, strict=True):
        assert (one.id, one.parent, one.text, one.stop, one.num_tokens) == (
            *(two.id, two.parent, two.text, two.stop, two.num_tokens),
        )
        assert one.step_score == pytest.approx(two.step_score, abs=1e-4)
    for name in ("text", "answer", "finish_reason", "trajectories", "num_errors", "generated_tokens", "path_tokens"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.score == pytest.approx(expected.score, abs=1e-4)
    assert [one.answer for one in found.candidates] == [one.answer for one in expected.candidates]
    assert found.kv is not None and expected.kv is not None
    assert found.kv.path_tokens == expected.kv.path_tokens


def check_nothing_is_left(engine: ETSEngine) -> None:
    scheduler = engine._worker._scheduler
    assert scheduler is not None
    for runner in scheduler._models.runners:
        runner.tree.check_integrity()
        while runner.prefixes.forget_one():
            pass
        assert (runner.tree.resident_tokens, len(runner.tree)) == (0, 0)
    assert scheduler._models.decoder.num_branches == 0


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("strategy", ["best_of_n", "beam", "rebase", "ets"])
def test_a_search_finds_the_same_for_less(engine: ETSEngine, strategy: str, temperature: float) -> None:
    merged, plain = (
        engine.search(PROBLEM, settings(strategy=strategy, temperature=temperature, merge_branches=merges))
        for merges in (True, False)
    )
    check_same(merged, plain)
    assert merged.kv and plain.kv and merged.verifier_kv and plain.verifier_kv
    assert merged.kv.mean_tokens < plain.kv.mean_tokens and merged.kv.peak_tokens <= plain.kv.peak_tokens
    assert merged.verifier_tokens <= plain.verifier_tokens
    assert merged.verifier_kv.mean_tokens <= plain.verifier_kv.mean_tokens
    assert merged.verifier_kv.path_tokens == plain.verifier_kv.path_tokens
    check_nothing_is_left(engine)


def test_the_shipped_models_find_the_same_for_less() -> None:
    problem = "Use 4, 6, 10 and 19 to make 16."
    results: list[SearchResult] = []
    with ETSEngine.from_pretrained("reference", config=EngineConfig(device="cpu", dtype="float32")) as engine:
        for merges in (True, False):
            results.append(engine.search(problem, SearchConfig(width=8, trace=True, merge_branches=merges)))
            check_nothing_is_left(engine)
    check_same(*results)
    merged, plain = results
    assert merged.kv and plain.kv and merged.kv.mean_tokens < 0.9 * plain.kv.mean_tokens
    assert merged.verifier_tokens < 0.9 * plain.verifier_tokens


@pytest.mark.parametrize("pool_tokens", [160, 240])
def test_searches_that_lose_their_memory_find_the_same(
    engine: ETSEngine, folders: tuple[str, str], pool_tokens: int
) -> None:
    """Together they take the KV from each other, in the middle of steps and of rows."""
    jobs = [(problem, settings(seed=seed)) for seed, problem in enumerate(PROBLEMS)]
    with engine_for(folders, kv_pool_tokens=pool_tokens) as small:
        futures = [small.submit(*job) for job in jobs]
        results = [future.result(timeout=60) for future in futures]
        scheduler = small._worker._scheduler
        assert scheduler is not None and scheduler.num_dropped > 0, "the pool was too small for all"
    for result, job in zip(results, jobs, strict=True):
        check_same(result, engine.search(job[0], job[1].model_copy(update={"merge_branches": False})))
        assert result.num_errors == 0


@pytest.mark.parametrize("num_advanced", [0, 2, 5, 6])
def test_equal_steps_share_again_after_a_drop(engine: ETSEngine, num_advanced: int) -> None:
    """A greedy policy: all its branches are one, before and after its KV was dropped in or after the second round."""
    scheduler = engine._worker._scheduler
    assert scheduler is not None
    decoder, format = scheduler._models.decoder, engine._format
    tree, found = decoder.runner.tree, []
    for drops in (False, True):
        policy = TreePolicy(decoder, format, PROBLEM, settings(temperature=0.0), "mine")
        prompt_tokens = policy.start()
        first = policy.expand([0] * 4, [1, 2, 3, 4])
        policy.retain([2, 3, 4])
        policy.submit([2, 2, 3, 4], [5, 6, 7, 8])
        for _ in range(num_advanced):
            policy.advance()
        if drops:
            policy.drop()
            assert tree.resident_tokens_of("mine") == 0
            policy.restore()
        while (second := policy.steps()) is None:
            policy.advance()
        policy.retain([5, 8])
        third = policy.expand([5, 8, 8], [9, 10, 11])
        found.append((first, second, third, policy.usage.generated_tokens))
        assert all({*steps} == {steps[0]} for steps in (first, second, third))
        assert [steps[0].num_tokens for steps in (first, second, third)] == [6, 6, 6]
        assert tree.resident_tokens_of("mine") == prompt_tokens + 6 + 6 + 5
        policy.retain([10])
        assert tree.resident_tokens_of("mine") == prompt_tokens + 6 + 6 + 5
        policy.close()
        check_nothing_is_left(engine)
    assert found[0] == found[1]


def test_equal_steps_below_other_steps_stay_apart_after_a_drop(engine: ETSEngine) -> None:
    """Steps of one token, so that many are equal, below parents that are not."""
    scheduler = engine._worker._scheduler
    assert scheduler is not None
    found = []
    for drops in (False, True):
        one_token = settings(max_step_tokens=1, temperature=0.7)
        policy = TreePolicy(scheduler._models.decoder, engine._format, PROBLEM, one_token, "mine")
        policy.start()
        kept, rounds = [0], []
        for depth in range(4):
            parents, children = kept * (8 if depth == 0 else 2), count(100 * depth + 1)
            nodes = dict(zip(children, parents, strict=False))
            steps = dict(zip(nodes, policy.expand([*nodes.values()], [*nodes]), strict=True))
            rounds.append(steps)
            kept = [node for node, step in steps.items() if step.stop is StopReason.BOUNDARY][:12]
            policy.retain(kept)
            if drops:
                policy.drop()
                policy.restore()
        found.append(rounds)
        policy.close()
        check_nothing_is_left(engine)
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_begin_alike_share_again_after_a_drop(engine: ETSEngine, seed: int) -> None:
    """What a search holds after each round is the same whether its KV was dropped before it or not."""
    scheduler = engine._worker._scheduler
    assert scheduler is not None
    tree, held = scheduler._models.decoder.runner.tree, list[list[int]]()
    for drops in (False, True):
        policy = TreePolicy(
            scheduler._models.decoder, engine._format, PROBLEM, settings(temperature=0.4, seed=seed), "mine"
        )
        policy.start()
        kept, tokens = [0], list[int]()
        for depth in range(3):
            nodes = list(range(100 * depth + 1, 100 * depth + 1 + (16 if depth == 0 else 2 * len(kept))))
            steps = policy.expand([kept[place % len(kept)] for place in range(len(nodes))], nodes)
            tokens.append(tree.resident_tokens_of("mine"))
            kept = [node for node, step in zip(nodes, steps, strict=True) if step.stop is StopReason.BOUNDARY][:10]
            policy.retain(kept)
            if drops:
                policy.drop()
                policy.restore()
        held.append([*tokens, policy.distinct_tokens])
        policy.close()
        check_nothing_is_left(engine)
    assert held[0] == held[1]
