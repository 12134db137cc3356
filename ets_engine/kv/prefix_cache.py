"""Remembers the KV of read prompts, so that later prompts share their beginning; it decides what to forget.

A radix tree over whole pages of token ids (as SGLang's, arXiv 2312.07104): prompts that begin alike share KV nodes up
to the last full page in common. Nodes that no search uses are forgotten, least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ets_engine.kv.prefix_tree import PrefixTree

Page = tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Prefix:
    """Some pages that follow another prefix; their KV node is held."""

    ids: Page  # whole pages
    handle: int
    above: _Prefix | None
    below: dict[Page, _Prefix] = field(default_factory=dict)  # by first page
    used: int = 0  # when it was last asked for


class PrefixCache:
    """Prompt prefixes of one KV tree.

    Args:
        tree: Where their KV lies.
        max_tokens: Most tokens remembered; a prompt for which searches leave no room is not. 0 = remember nothing.

    Example:
        >>> from ets_engine.kv.pool import KVPool, LayerShape
        >>> tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
        >>> cache = PrefixCache(tree, max_tokens=100)
        >>> prompt, _ = cache.begin([5, 6, 7, 8, 9], owner="first")
        >>> slots = tree.append(prompt, 5)
        >>> cache.remember([5, 6, 7, 8, 9], prompt)
        4
        >>> cache.begin([5, 6, 7, 8, 1, 2], owner="second")[1]
        4
    """

    def __init__(self, tree: PrefixTree, max_tokens: int) -> None:
        """See the class."""
        self._tree = tree
        self._max_tokens = max_tokens
        self._first: dict[Page, _Prefix] = {}
        self._clock = 0
        self.num_tokens = 0  # remembered now

    @property
    def num_unused_tokens(self) -> int:
        """Tokens of the prefixes that no search uses, which `forget_one` can give back (count)."""
        tokens, unused = 0, set[int]()
        for one in reversed(self._all()):  # those below before those above
            used = self._tree.num_children(one.handle) > len(one.below)
            if not used and all(id(below) in unused for below in one.below.values()):
                unused.add(id(one))
                tokens += len(one.ids)
        return tokens

    def begin(self, ids: Sequence[int], owner: object) -> tuple[int, int]:
        """Open a leaf for a prompt below what is remembered of it; at least its last token is left to read.

        Args:
            ids: Of the prompt.
            owner: Whose tokens are counted, as in `PrefixTree.root`.

        Returns:
            The leaf, and how many of `ids` its path holds already.
        """
        found, known = self._match(ids[: len(ids) - 1])
        return (self._tree.root(owner) if found is None else self._tree.fork(found.handle, owner)), known

    def may_remember(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens can be remembered at all."""
        page = self._tree.pool.page_tokens
        return page <= num_tokens // page * page <= self._max_tokens

    def remember(self, ids: Sequence[int], leaf: int) -> int:
        """Keep the KV of a prompt's whole pages beyond the leaf's own life.

        Args:
            ids: Of the prompt.
            leaf: From `begin`, holding the rest of them; it goes on below what is remembered.

        Returns:
            Tokens of the leaf's path that are remembered, and no longer its owner's (count).
        """
        tree, page = self._tree, self._tree.pool.page_tokens
        whole = len(ids) // page * page
        known = tree.prefix_tokens(leaf)
        found, matched = self._match(ids[:whole])
        if whole > self._max_tokens or matched != known or known == whole:
            return known  # too long, or nothing new, or somebody else remembered the same meanwhile
        while self.num_tokens + whole - known > self._max_tokens:
            if not self.forget_one():  # what this prompt begins with is in use, by its leaf
                return known
        handle = tree.split(leaf, whole - known)
        new = _Prefix(tuple(ids[known:whole]), handle, found, used=self._clock)
        (self._first if found is None else found.below)[new.ids[:page]] = new
        self.num_tokens += len(new.ids)
        return whole

    def forget_one(self) -> bool:
        """Forget the least recently used prefix that no search uses; False when there is none."""
        unused = [one for one in self._all() if not one.below and not self._tree.num_children(one.handle)]
        if not unused:
            return False
        oldest = min(unused, key=lambda one: one.used)
        self._tree.release(oldest.handle)
        self.num_tokens -= len(oldest.ids)
        siblings = self._first if oldest.above is None else oldest.above.below
        del siblings[oldest.ids[: self._tree.pool.page_tokens]]
        return True

    def _match(self, ids: Sequence[int]) -> tuple[_Prefix | None, int]:
        """The deepest remembered prefix of `ids` and its tokens (count); one that goes on differently is split."""
        page = self._tree.pool.page_tokens
        self._clock += 1
        found: _Prefix | None = None
        known = 0
        while True:
            below = self._first if found is None else found.below
            one = below.get(tuple(ids[known : known + page]))
            if one is None:
                return found, known
            alike = page
            while alike < len(one.ids) and one.ids[alike : alike + page] == tuple(ids[known + alike :][:page]):
                alike += page
            if alike < len(one.ids):
                one = self._split(one, alike)
            one.used = self._clock
            found, known = one, known + alike

    def _split(self, one: _Prefix, num_tokens: int) -> _Prefix:
        """Cut a prefix in two; the first part."""
        page = self._tree.pool.page_tokens
        upper = _Prefix(one.ids[:num_tokens], self._tree.split(one.handle, num_tokens), one.above, used=one.used)
        (self._first if one.above is None else one.above.below)[one.ids[:page]] = upper
        one.ids, one.above = one.ids[num_tokens:], upper
        upper.below[one.ids[:page]] = one
        return upper

    def _all(self) -> list[_Prefix]:
        found, stack = [], list(self._first.values())
        while stack:
            found.append(stack.pop())
            stack += found[-1].below.values()
        return found

    def check_integrity(self) -> None:
        """Prove that every prefix is a held KV node of its tokens below its parent's, and that the count is right.

        Raises:
            AssertionError: Naming what is wrong; for tests and idle time.
        """
        for one in self._all():
            what = f"prefix {one.ids[:4]}..."
            assert one.ids and len(one.ids) % self._tree.pool.page_tokens == 0, f"{what} is not whole pages"
            assert self._tree.num_tokens(one.handle) == len(one.ids), f"{what} has another number of tokens"
            above = -1 if one.above is None else one.above.handle
            assert self._tree.parent(one.handle) == above, f"{what} is not below the prefix before it"
        assert self.num_tokens == sum(len(one.ids) for one in self._all()), "the prefix cache miscounts its tokens"
