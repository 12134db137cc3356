"""Who owns which KV pages: nodes, forks and reference counts; it never touches K or V themselves.

A node's tokens are never copied, so a shared prefix is stored once however many branches go on from it. They start in
pages of the node's own, or in what is free of its parent's last page, so that paths which part token by token, while
none of them is released, take no more pages than if they had never shared any. A node lives while its handle is held or
a descendant lives; its pages are free the moment both end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ets_engine.kv.pool import KVPool

Slots = NDArray[np.int64]


@dataclass(slots=True)
class _Node:
    parent: int  # -1 for a root
    prefix_tokens: int  # on the path above this node
    owner: Hashable
    held: bool = True  # its handle was not released yet
    num_children: int = 0  # live children
    num_tokens: int = 0
    lent: range = range(0)  # slots of an ancestor's last page, which its first tokens take
    tenant: int = -1  # the live child that has what is free of the last page
    pages: list[int] = field(default_factory=list)
    slots: Slots = field(default_factory=lambda: np.empty(16, dtype=np.int64))  # [capacity >= num_tokens]


class PrefixTree:
    """The KV tree of one model over a page pool; handles are opaque and never reused.

    Args:
        pool: Where the pages come from; this tree must be its only user.

    Example:
        >>> from ets_engine.kv.pool import KVPool, LayerShape
        >>> tree = PrefixTree(KVPool([LayerShape(1, 8)], page_tokens=4))
        >>> prompt = tree.root()
        >>> slots = tree.append(prompt, 6)
        >>> left, right = tree.fork(prompt), tree.fork(prompt)
        >>> slots = tree.append(left, 3)
        >>> tree.path_tokens(left), tree.path_tokens(right), tree.resident_tokens, tree.resident_pages
        (9, 6, 9, 3)
        >>> tree.release(left)
        >>> tree.resident_tokens
        6
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._nodes: dict[int, _Node] = {}
        self._next_handle = 0
        self._resident_of: dict[Hashable, int] = {}
        self.resident_tokens = 0
        self.resident_pages = 0
        self.peak_tokens = 0
        self.peak_pages = 0

    # ------------------------------------------------------------------ growing

    def root(self, owner: Hashable = None) -> int:
        """Open an empty tree; `owner` names whose tokens are counted by `resident_tokens_of`."""
        return self._open(_Node(parent=-1, prefix_tokens=0, owner=owner))

    def fork(self, parent: int, owner: Hashable = None, *, fill_page: bool = False) -> int:
        """Open an empty child that shares its parent's whole path.

        Args:
            parent: Any live node.
            owner: As in `root`, None = the parent's.
            fill_page: Whether the child goes on in what is free of the parent's last page, unless another child does.

        Raises:
            KeyError: the parent is gone.
        """
        above = self._node(parent)
        above.num_children += 1
        child = self._open(
            _Node(
                parent=parent,
                prefix_tokens=above.prefix_tokens + above.num_tokens,
                owner=above.owner if owner is None else owner,
            )
        )
        if fill_page and above.tenant < 0 and (free := self._free_slots(above)):
            above.tenant, self._nodes[child].lent = child, free
        return child

    def _free_slots(self, node: _Node) -> range:
        """What is left of the page in which a node's tokens end, empty where they end with it."""
        if not node.pages:
            return node.lent[node.num_tokens :]
        page_tokens = self.pool.page_tokens
        stop = (node.pages[-1] + 1) * page_tokens
        return range(stop - (len(node.lent) + len(node.pages) * page_tokens - node.num_tokens), stop)

    def _slots_between(self, node: _Node, start: int, stop: int) -> Slots:
        """Slots of a node's tokens `start` to `stop`, for which it has pages."""
        page_tokens, lent = self.pool.page_tokens, len(node.lent)
        index = np.arange(start, stop)
        slots = node.lent.start + index
        if stop > lent:
            index, pages = index[index >= lent] - lent, np.asarray(node.pages, dtype=np.int64)
            slots[len(slots) - len(index) :] = pages[index // page_tokens] * page_tokens + index % page_tokens
        return slots

    def _open(self, node: _Node) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._nodes[handle] = node
        return handle

    def append(self, handle: int, count: int) -> Slots:
        """Make room for `count` more tokens at the end of a leaf.

        Returns:
            The slots of the new tokens, in order. Shape [count].

        Raises:
            ValueError: the node has children or was released (its tokens are shared now), or `count` < 0.
            PoolExhaustedError: no pages are left; nothing has changed.
        """
        node = self._node(handle)
        if node.num_children or not node.held or count < 0:
            raise ValueError(
                f"cannot append {count} tokens to node {handle}: it has {node.num_children} children and is "
                f"{'held' if node.held else 'released'}; append to a held leaf, or fork first"
            )
        page_tokens = self.pool.page_tokens
        start, stop = node.num_tokens, node.num_tokens + count
        missing = self._num_pages(node, stop) - len(node.pages)
        if missing > 0:
            node.pages += self.pool.allocate(missing, after=node.pages[-1] if node.pages else -1)
            self.resident_pages += missing
            self.peak_pages = max(self.peak_pages, self.resident_pages)
        if stop > len(node.slots):
            grown = np.empty(max(stop, 2 * len(node.slots)), dtype=np.int64)
            grown[:start] = node.slots[:start]
            node.slots = grown
        own = start - len(node.lent)
        if count == 1 and own >= 0:  # in decoding, for nearly every row of every pass
            node.slots[start] = node.pages[own // page_tokens] * page_tokens + own % page_tokens
        else:
            node.slots[start:stop] = self._slots_between(node, start, stop)
        node.num_tokens = stop
        self._count(node.owner, count)
        return node.slots[start:stop]

    def append_each(self, rows: Iterable[tuple[int, int]]) -> None:
        """`append` to each of some leaves (handle, tokens), faster where one token goes right after the last.

        Raises:
            KeyError, ValueError, PoolExhaustedError: as `append`; rows before the one that raised have grown.
        """
        page_tokens, grown = self.pool.page_tokens, Counter[Hashable]()
        try:
            for handle, more in rows:
                node = self._node(handle)
                count = node.num_tokens
                own = count - len(node.lent)
                has_slot = own > 0 and own % page_tokens and count < len(node.slots)
                if more != 1 or not has_slot or node.num_children or not node.held:
                    self.append(handle, more)
                    continue
                node.slots[count] = node.slots[count - 1] + 1
                node.num_tokens = count + 1
                grown[node.owner] += 1
        finally:
            for owner, tokens in grown.items():
                self._count(owner, tokens)

    def truncate(self, handle: int, num_tokens: int) -> None:
        """Keep only a leaf's first `num_tokens` own tokens; undoes `append` after a failed batch.

        Raises:
            ValueError: the node has children, or fewer tokens than that.
        """
        node = self._node(handle)
        if node.num_children or not 0 <= num_tokens <= node.num_tokens:
            raise ValueError(
                f"cannot cut node {handle} to {num_tokens} tokens: it has {node.num_tokens} and "
                f"{node.num_children} children; only a leaf can be cut"
            )
        keep_pages = self._num_pages(node, num_tokens)
        self.pool.free(node.pages[keep_pages:])
        self.resident_pages -= len(node.pages) - keep_pages
        del node.pages[keep_pages:]
        self._count(node.owner, num_tokens - node.num_tokens)
        node.num_tokens = num_tokens

    def _num_pages(self, node: _Node, num_tokens: int) -> int:
        """Pages of its own that a node of so many tokens takes."""
        return max(0, -(-(num_tokens - len(node.lent)) // self.pool.page_tokens))

    def split(self, handle: int, num_tokens: int, owner: Hashable = None) -> int:
        """Put a node's first tokens into a node of their own above it; no K or V moves, all paths stay as they are.

        Args:
            handle: Goes on with the tokens after those, and keeps its children.
            num_tokens: Whole pages, >= 1 page and at most what the node has.
            owner: Whose the upper node's tokens are from now on, None = nobody's.

        Returns:
            The upper node, which the caller holds too.

        Raises:
            ValueError: `num_tokens` is no whole number of the node's pages, or its first page is another node's.
        """
        node = self._node(handle)
        num_pages = num_tokens // self.pool.page_tokens
        if not num_pages or num_tokens % self.pool.page_tokens or num_tokens > node.num_tokens or node.lent:
            raise ValueError(
                f"cannot split node {handle} after {num_tokens} of its {node.num_tokens} tokens: give a multiple of "
                f"{self.pool.page_tokens} that it has in pages of its own, it has {len(node.lent)} in another's"
            )
        above = _Node(node.parent, node.prefix_tokens, owner, num_children=1, num_tokens=num_tokens)
        above.pages, node.pages = node.pages[:num_pages], node.pages[num_pages:]
        above.slots, node.slots = node.slots[:num_tokens].copy(), node.slots[num_tokens:].copy()
        self._count(node.owner, -num_tokens)
        self._count(above.owner, num_tokens)
        node.num_tokens -= num_tokens
        node.prefix_tokens += num_tokens
        node.parent = self._open(above)
        return node.parent

    def release(self, handle: int) -> None:
        """Give up a handle; the pages of every node that nobody can reach any more are free at once.

        Raises:
            KeyError: the handle was released before.
        """
        node = self._node(handle)
        if not node.held:
            raise KeyError(f"node {handle} was released already; each handle is released once")
        node.held = False
        while not node.held and not node.num_children:
            self.pool.free(node.pages)
            self.resident_pages -= len(node.pages)
            self._count(node.owner, -node.num_tokens)
            del self._nodes[handle]
            if node.parent < 0:
                break
            gone, handle = handle, node.parent
            node = self._nodes[handle]
            node.num_children -= 1
            if node.tenant == gone:
                node.tenant = -1

    def _count(self, owner: Hashable, change: int) -> None:
        self.resident_tokens += change
        self.peak_tokens = max(self.peak_tokens, self.resident_tokens)
        total = self._resident_of.get(owner, 0) + change
        if total:
            self._resident_of[owner] = total
        else:
            self._resident_of.pop(owner, None)

    # ------------------------------------------------------------------ reading

    def _node(self, handle: int) -> _Node:
        try:
            return self._nodes[handle]
        except KeyError:
            raise KeyError(f"no KV node {handle}: it was released together with all of its descendants") from None

    def __contains__(self, handle: int) -> bool:
        """Whether the node's KV is resident."""
        return handle in self._nodes

    def __len__(self) -> int:
        """Live nodes (count)."""
        return len(self._nodes)

    def parent(self, handle: int) -> int:
        """The node above, -1 for a root."""
        return self._node(handle).parent

    def num_tokens(self, handle: int) -> int:
        """The node's own tokens (count)."""
        return self._node(handle).num_tokens

    def num_children(self, handle: int) -> int:
        """Live nodes right below (count)."""
        return self._node(handle).num_children

    def prefix_tokens(self, handle: int) -> int:
        """Tokens on the path above the node (count)."""
        return self._node(handle).prefix_tokens

    def path_tokens(self, handle: int) -> int:
        """Tokens from the root to the node's end (count): the position of the next token."""
        node = self._node(handle)
        return node.prefix_tokens + node.num_tokens

    def slots(self, handle: int) -> Slots:
        """The node's own slots in token order, a view that the next `append` may outdate. Shape [num_tokens]."""
        node = self._node(handle)
        return node.slots[: node.num_tokens]

    def lengths(self, handles: Iterable[int]) -> tuple[list[int], list[int]]:
        """`num_tokens` and `path_tokens` of some nodes (counts). [B] each."""
        nodes = [self._node(handle) for handle in handles]
        return [node.num_tokens for node in nodes], [node.prefix_tokens + node.num_tokens for node in nodes]

    def ends(self, handles: Iterable[int]) -> tuple[list[int], list[int]]:
        """Own tokens of some nodes that have any (counts), and where the K/V of the last one lies (slots). [B] each."""
        nodes = [self._node(handle) for handle in handles]
        return [node.num_tokens for node in nodes], [int(node.slots[node.num_tokens - 1]) for node in nodes]

    def resident_tokens_of(self, owner: Hashable) -> int:
        """Tokens resident for one owner, its shared prefixes counted once."""
        return self._resident_of.get(owner, 0)

    def reset_peak(self) -> None:
        """Start measuring the peaks from now."""
        self.peak_tokens, self.peak_pages = self.resident_tokens, self.resident_pages

    def check_integrity(self) -> None:
        """Prove that nothing leaks: free + owned = all, each page has one owner, every count is right.

        Raises:
            AssertionError: naming what is wrong. O(nodes + pages); for tests and idle time.
        """
        owned: list[int] = []
        used: list[int] = []
        children: dict[int, int] = {}
        tokens_of: dict[Hashable, int] = {}
        for handle, node in self._nodes.items():
            owned += node.pages
            children[node.parent] = children.get(node.parent, 0) + 1
            tokens_of[node.owner] = tokens_of.get(node.owner, 0) + node.num_tokens
            _require(node.held or node.num_children > 0, f"node {handle} is unreachable but not freed")
            used += node.slots[: node.num_tokens].tolist()
            page_tokens, own = self.pool.page_tokens, max(0, node.num_tokens - len(node.lent))
            _require(
                len(node.pages) == -(-own // page_tokens),
                f"node {handle} owns {len(node.pages)} pages for {own} tokens beyond those that lie in another's",
            )
            expected = [*node.lent][: node.num_tokens]
            expected += [node.pages[i // page_tokens] * page_tokens + i % page_tokens for i in range(own)]
            _require(node.slots[: node.num_tokens].tolist() == expected, f"node {handle}'s slots left its pages")
            tenant = self._nodes.get(node.tenant)
            _require(node.tenant < 0 or tenant is not None, f"node {handle}'s tenant {node.tenant} was freed")
            if tenant is not None:
                _require(tenant.parent == handle, f"node {node.tenant} is tenant of {handle}, which is not above it")
                _require(tenant.lent == self._free_slots(node), f"node {node.tenant} has other slots than are free")
            if node.parent >= 0:
                _require(node.parent in self._nodes, f"node {handle}'s parent {node.parent} was freed")
                is_tenant = self._nodes[node.parent].tenant == handle
                _require(not node.lent or is_tenant, f"node {handle} lies in a page that was not lent to it")
                above = self._nodes[node.parent]
                _require(
                    node.prefix_tokens == above.prefix_tokens + above.num_tokens,
                    f"node {handle} counts {node.prefix_tokens} prefix tokens, its parent's path differs",
                )
        for handle, node in self._nodes.items():
            _require(node.num_children == children.get(handle, 0), f"node {handle} miscounts its children")
        free = self.pool.free_pages()
        _require(len(owned) == len(set(owned)), "a page is owned by two nodes")
        _require(len(used) == len(set(used)), "a slot holds two tokens")
        _require(not free & set(owned), "an owned page is on the free list")
        _require(len(free) + len(owned) == self.pool.num_pages, "free + owned pages are not all pages")
        _require(len(free) == self.pool.num_free_pages, "the pool miscounts its free pages")
        _require(self.resident_pages == len(owned), "resident_pages is wrong")
        _require(self.resident_tokens == sum(tokens_of.values()), "resident_tokens is wrong")
        _require({k: v for k, v in tokens_of.items() if v} == self._resident_of, "tokens per owner are wrong")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"KV tree integrity: {message}")
