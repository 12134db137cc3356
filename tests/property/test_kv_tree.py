"""Any order of root, fork, append, truncate, split and release keeps the KV tree's books right."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ets_engine.errors import PoolExhaustedError
from ets_engine.kv import KVPool, LayerShape, PrefixTree

PAGE_TOKENS, MAX_TOKENS = 3, 60


class KVTreeMachine(RuleBasedStateMachine):
    """The tree against a model of itself: which tokens each node holds, whose it is, and who still wants it."""

    def __init__(self) -> None:
        super().__init__()
        pool = KVPool([LayerShape(1, 1)], page_tokens=PAGE_TOKENS, max_tokens=MAX_TOKENS, initial_tokens=6)
        self.tree = PrefixTree(pool)
        self.parent: dict[int, int] = {}
        self.count: dict[int, int] = {}
        self.lent: dict[int, int] = {}  # slots of an ancestor's page that a node's first tokens take
        self.tenant: dict[int, int] = {}  # who has the rest of a node's last page
        self.held: set[int] = set()
        self.peak = 0

    def pages(self, node: int, more: int = 0) -> int:
        return max(0, -(-(self.count[node] + more - self.lent.get(node, 0)) // PAGE_TOKENS))

    def room(self, node: int) -> int:
        return self.lent.get(node, 0) + self.pages(node) * PAGE_TOKENS - self.count[node]

    def alive(self) -> set[int]:
        alive = set()
        for node in self.held:
            while node >= 0 and node not in alive:
                alive.add(node)
                node = self.parent[node]
        return alive

    def leaves(self) -> list[int]:
        parents = {self.parent[node] for node in self.alive()}
        return sorted(self.held - parents)

    @rule(owner=st.sampled_from(["a", "b"]))
    def root(self, owner: str) -> None:
        handle = self.tree.root(owner)
        assert handle not in self.parent, "handles are never reused"
        self.parent[handle], self.count[handle] = -1, 0
        self.held.add(handle)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), fill_page=st.booleans())
    def fork(self, data: st.DataObject, fill_page: bool) -> None:
        parent = data.draw(st.sampled_from(sorted(self.held)))
        if fill_page and self.room(parent) and self.tenant.get(parent) not in self.alive():
            self.tenant[parent] = self.tree.fork(parent, fill_page=True)
            handle, self.lent[self.tenant[parent]] = self.tenant[parent], self.room(parent)
        else:
            handle = self.tree.fork(parent, fill_page=fill_page)
        self.parent[handle], self.count[handle] = parent, 0
        self.held.add(handle)

    @precondition(lambda self: self.leaves())
    @rule(data=st.data(), count=st.integers(0, 12))
    def append(self, data: st.DataObject, count: int) -> None:
        leaf = data.draw(st.sampled_from(self.leaves()))
        before = self.tree.slots(leaf).tolist()
        pages = sum(self.pages(node) for node in self.alive())
        wanted = self.pages(leaf, count) - self.pages(leaf)
        if pages + wanted > MAX_TOKENS // PAGE_TOKENS:
            with pytest.raises(PoolExhaustedError, match=str(MAX_TOKENS)):
                self.tree.append(leaf, count)
            assert self.tree.slots(leaf).tolist() == before
            return
        slots = self.tree.append(leaf, count).tolist()
        assert self.tree.slots(leaf).tolist() == before + slots
        self.count[leaf] += count

    @precondition(lambda self: self.leaves())
    @rule(data=st.data(), count=st.sampled_from([1, 1, 2]))
    def append_each(self, data: st.DataObject, count: int) -> None:
        """As `append`, one after the other: those before the one that finds no page have grown."""
        leaves = data.draw(st.lists(st.sampled_from(self.leaves()), min_size=1, unique=True))
        room = MAX_TOKENS // PAGE_TOKENS - sum(self.pages(node) for node in self.alive())
        fit = 0
        for leaf in leaves:
            room -= self.pages(leaf, count) - self.pages(leaf)
            if room < 0:
                break
            fit += 1
        before = {leaf: self.tree.slots(leaf).tolist() for leaf in leaves}
        with nullcontext() if fit == len(leaves) else pytest.raises(PoolExhaustedError, match=str(MAX_TOKENS)):
            self.tree.append_each((leaf, count) for leaf in leaves)
        for place, leaf in enumerate(leaves):
            self.count[leaf] += count * (place < fit)
            slots = self.tree.slots(leaf).tolist()
            assert slots[: len(before[leaf])] == before[leaf] and len(slots) == self.count[leaf]

    @precondition(lambda self: set(self.parent.values()) & self.held)
    @rule(data=st.data())
    def append_to_a_shared_node_is_refused(self, data: st.DataObject) -> None:
        shared = sorted(self.held - set(self.leaves()))
        if shared:
            with pytest.raises(ValueError, match="children"):
                self.tree.append(data.draw(st.sampled_from(shared)), 1)

    @precondition(lambda self: self.leaves())
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        leaf = data.draw(st.sampled_from(self.leaves()))
        keep = data.draw(st.integers(0, self.count[leaf]))
        self.tree.truncate(leaf, keep)
        self.count[leaf] = keep

    def whole(self) -> list[int]:
        return sorted(one for one in self.alive() if self.count[one] >= PAGE_TOKENS and not self.lent.get(one))

    @precondition(lambda self: self.whole())
    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(self.whole()))
        pages = data.draw(st.integers(1, self.count[node] // PAGE_TOKENS))
        before = self.tree.slots(node).tolist()
        upper = self.tree.split(node, pages * PAGE_TOKENS)
        assert self.tree.slots(upper).tolist() + self.tree.slots(node).tolist() == before
        self.parent[upper], self.parent[node] = self.parent[node], upper
        self.count[upper] = pages * PAGE_TOKENS
        self.count[node] -= pages * PAGE_TOKENS
        self.held.add(upper)
        if self.count[node]:
            with pytest.raises(ValueError, match="multiple"):
                self.tree.split(node, self.count[node] + PAGE_TOKENS)

    @precondition(lambda self: any(map(self.lent.get, self.alive())))
    @rule(data=st.data())
    def split_in_a_page_of_another_is_refused(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(one for one in self.alive() if self.lent.get(one))))
        with pytest.raises(ValueError, match="in another's"):
            self.tree.split(node, PAGE_TOKENS)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.held)))
        self.tree.release(handle)
        self.held.remove(handle)
        with pytest.raises(KeyError, match="released"):
            self.tree.release(handle)

    @invariant()
    def books_are_right(self) -> None:
        self.tree.check_integrity()
        alive = self.alive()
        assert {node for node in self.parent if node in self.tree} == alive
        assert self.tree.resident_tokens == sum(self.count[node] for node in alive)
        assert self.tree.resident_tokens == sum(self.tree.resident_tokens_of(owner) for owner in ("a", "b", None))
        assert self.tree.resident_pages == sum(self.pages(node) for node in alive)
        self.peak = max(self.peak, self.tree.resident_tokens)
        assert self.tree.peak_tokens == self.peak
        owned = [slot for node in alive for slot in self.tree.slots(node).tolist()]
        assert len(owned) == len(set(owned)), "two nodes share a slot"
        for node in alive:
            above = self.parent[node]
            prefix = self.tree.path_tokens(above) if above >= 0 else 0
            assert self.tree.path_tokens(node) == prefix + self.count[node]


KVTreeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKVTree = KVTreeMachine.TestCase
