"""Prompts in any order: each finds the longest remembered beginning, and the books stay right."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ets_engine.kv import KVPool, LayerShape, PrefixCache, PrefixTree

PAGE_TOKENS, MAX_TOKENS = 2, 24
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=11)


class PrefixCacheMachine(RuleBasedStateMachine):
    """The cache against the plain set of all remembered page-aligned beginnings."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree(KVPool([LayerShape(1, 1)], page_tokens=PAGE_TOKENS))
        self.cache = PrefixCache(self.tree, MAX_TOKENS)
        self.ids_at: dict[int, int] = {}  # slot -> the token that was written there
        self.leaves: dict[int, list[int]] = {}

    def path_ids(self, handle: int) -> list[int]:
        ids: list[int] = []
        while handle >= 0:
            ids = [self.ids_at[slot] for slot in self.tree.slots(handle).tolist()] + ids
            handle = self.tree.parent(handle)
        return ids

    def remembered(self) -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = set()
        for one in self.cache._all():
            ids = self.path_ids(one.handle)
            found |= {tuple(ids[:end]) for end in range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS)}
        return found

    @rule(ids=PROMPTS)
    def read(self, ids: list[int]) -> None:
        alike = [one for one in self.remembered() if len(one) < len(ids) and ids[: len(one)] == [*one]]
        expected = max(map(len, alike), default=0)
        leaf, known = self.cache.begin(ids, owner="search")
        assert known == expected == self.tree.path_tokens(leaf)
        for slot, token in zip(self.tree.append(leaf, len(ids) - known).tolist(), ids[known:], strict=True):
            self.ids_at[slot] = token
        shared = self.cache.remember(ids, leaf)
        assert shared == self.tree.prefix_tokens(leaf) <= len(ids)
        self.leaves[leaf] = ids

    @precondition(lambda self: self.leaves)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        leaf = data.draw(st.sampled_from(sorted(self.leaves)))
        self.tree.release(leaf)
        del self.leaves[leaf]

    @rule()
    def forget(self) -> None:
        before = self.cache.num_tokens
        assert self.cache.forget_one() == (self.cache.num_tokens < before)

    @rule()
    def forget_all_that_is_unused(self) -> None:
        before, unused = self.cache.num_tokens, self.cache.num_unused_tokens
        while self.cache.forget_one():
            assert self.cache.num_unused_tokens < unused
        assert before - self.cache.num_tokens == unused and not self.cache.num_unused_tokens

    @invariant()
    def books_are_right(self) -> None:
        self.tree.check_integrity()
        self.cache.check_integrity()
        for leaf, ids in self.leaves.items():
            assert self.path_ids(leaf) == ids, "no search loses a token of its prompt"
        assert self.cache.num_tokens <= MAX_TOKENS
        if not self.leaves:
            assert self.cache.num_tokens == self.tree.resident_tokens

    def teardown(self) -> None:
        for leaf in self.leaves:
            self.tree.release(leaf)
        while self.cache.forget_one():
            pass
        assert (len(self.tree), self.tree.resident_tokens, self.cache.num_tokens) == (0, 0, 0)


PrefixCacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPrefixCache = PrefixCacheMachine.TestCase
