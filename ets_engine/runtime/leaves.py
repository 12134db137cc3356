"""The open ends of a policy's paths: prompts and finished steps, read once somebody goes on from them.

A step's last token is *pending*: it is sampled, but its K/V is computed only when the step gets children. Then each
distinct parent reads it once, keeps its last hidden state, and all its children fork from there; pruned leaves never
pay for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from ets_engine.errors import ContextLengthError
from ets_engine.runtime.branches import Leaf
from ets_engine.runtime.runner import Runner
from ets_engine.runtime.stops import CONTEXT_TOKENS
from ets_engine.runtime.usage import Usages


class Leaves:
    """Makes, reads and gives up the leaves over one runner; not thread-safe.

    Args:
        runner: The policy's.
        usages: Where reading is charged.
    """

    def __init__(self, runner: Runner, usages: Usages) -> None:
        self._runner = runner
        self._usages = usages

    def start(self, prompt_ids: Sequence[int], search: Hashable, below: Leaf | None = None) -> Leaf:
        """A leaf that holds a prompt; it is read when it is opened or gets its first child.

        Args:
            prompt_ids: At least one token.
            search: Names whose KV it is.
            below: Shared beginning (system prompt, demonstrations) that `prompt_ids` follow; it is opened.

        Raises:
            ContextLengthError: the prompt leaves no room for a token.
        """
        total = len(prompt_ids) + (below.path_tokens if below else 0)
        if not prompt_ids or total >= self._runner.context_tokens:
            raise ContextLengthError(
                f"a prompt of {total} tokens does not fit a context of {self._runner.context_tokens} tokens with room "
                "to answer; give 1 to context - 1 tokens"
            )
        tree = self._runner.tree
        usage, ids, known = self._usages.of(search), tuple(prompt_ids), 0
        usage.prompt_tokens += len(ids)
        if below is None:
            handle, known = self._runner.prefixes.begin(ids, owner=search)
            usage.cached_prompt_tokens += known
            usage.shared_tokens += known
        else:
            self.open([below])
            handle = tree.fork(below.handle, owner=search)
        return Leaf(
            handle,
            search,
            pending=ids[known:],
            recent=ids[-CONTEXT_TOKENS:],
            path_tokens=total,
            prompt_tokens=total,
            prompt=() if below else ids,
        )

    def read_ahead(self, leaf: Leaf, max_tokens: int) -> None:
        """Read the next part of a long prompt, at most `max_tokens`, and leave at least one token for `open`.

        Raises:
            PoolExhaustedError: the KV pool is full; nothing has changed.
        """
        self._go_on_below_remembered(leaf)
        num_tokens = min(max_tokens, len(leaf.pending) - 1)
        if num_tokens > 0:
            meter = self._usages.read_meter()
            self._runner.extend_last([(leaf.handle, leaf.pending[:num_tokens])])
            leaf.pending = leaf.pending[num_tokens:]
            self._usages.of(leaf.search).read_tokens += num_tokens
            self._usages.charge([leaf.search], meter)

    def follow(self, leaf: Leaf, token_ids: Sequence[int], carry: str = "") -> Leaf:
        """A leaf of the same search that goes on from another, which is opened, by known tokens.

        Args:
            leaf: The other one.
            token_ids: Of a step that was decoded below it.
            carry: As in the leaf that was decoded then.

        Raises:
            PoolExhaustedError: the KV pool is full; nothing has changed.
        """
        self.open([leaf])
        ids = tuple(token_ids)
        return Leaf(
            self._runner.tree.fork(leaf.handle, fill_page=True),
            leaf.search,
            pending=ids,
            recent=(*leaf.recent, *ids)[-CONTEXT_TOKENS:],
            path_tokens=leaf.path_tokens + len(ids),
            prompt_tokens=leaf.prompt_tokens,
            carry=carry,
        )

    def open(self, leaves: Sequence[Leaf]) -> None:
        """Read the pending tokens of some leaves, so that children can fork from them.

        In one batch, but for prompts that begin alike: one of them is read first, and the others go on below it.

        Raises:
            PoolExhaustedError: the KV pool is full; what was read by then counts as read.
        """
        while unread := self.unread(leaves):
            now = self._first_of_each_kind(unread)
            meter = self._usages.read_meter()
            hidden = self._runner.extend_last([(leaf.handle, leaf.pending) for leaf in now])
            self._usages.charge([leaf.search for leaf in now], meter)
            self.accept(now, hidden)

    def _first_of_each_kind(self, unread: Sequence[Leaf]) -> list[Leaf]:
        """Those of some unread leaves that share no page with one before that nobody has read yet."""
        prompts = [leaf for leaf in unread if leaf.prompt]
        if len(prompts) < 2:
            return list(unread)
        for leaf in prompts:
            self._go_on_below_remembered(leaf)
        tree, prefixes = self._runner.tree, self._runner.prefixes
        page = tree.pool.page_tokens
        first: dict[Hashable, Leaf] = {}
        for leaf in unread:
            may_share = len(leaf.pending) > page and prefixes.may_remember(len(leaf.prompt))
            kind = (tree.path_tokens(leaf.handle), leaf.pending[:page]) if leaf.prompt and may_share else id(leaf)
            first.setdefault(kind, leaf)
        return list(first.values())

    def _go_on_below_remembered(self, leaf: Leaf) -> None:
        """Read no more of a prompt than what is new, if more of it was remembered since it was begun than is read."""
        if not leaf.prompt:
            return
        tree, usage = self._runner.tree, self._usages.of(leaf.search)
        handle, known = self._runner.prefixes.begin(leaf.prompt, owner=leaf.search)
        if known <= tree.path_tokens(leaf.handle):
            tree.release(handle)
            return
        more = known - tree.prefix_tokens(leaf.handle)
        usage.cached_prompt_tokens += more
        usage.shared_tokens += more
        tree.release(leaf.handle)
        leaf.handle, leaf.pending = handle, leaf.prompt[known:]

    def unread(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        """Those that have pending tokens, each once."""
        return list({id(leaf): leaf for leaf in leaves if leaf.hidden is None}.values())

    def accept(self, leaves: Sequence[Leaf], hidden: torch.Tensor) -> None:
        """Note that some leaves were read.

        Args:
            leaves: Unread so far.
            hidden: The state of each after its pending tokens. Shape [L, hidden].
        """
        for leaf, state in zip(leaves, hidden, strict=True):
            self._usages.of(leaf.search).read_tokens += len(leaf.pending)
            leaf.hidden, leaf.pending = state, ()
            if leaf.prompt:
                usage, above = self._usages.of(leaf.search), self._runner.tree.prefix_tokens(leaf.handle)
                usage.shared_tokens += self._runner.prefixes.remember(leaf.prompt, leaf.handle) - above
                leaf.prompt = ()
        for search in {leaf.search for leaf in leaves}:
            self._usages.sample_residency(search)

    def release(self, leaf: Leaf) -> None:
        """Give up a leaf, one of its holders; KV that nothing else needs is free at once."""
        leaf.holders -= 1
        if not leaf.holders:
            self._runner.tree.release(leaf.handle)
