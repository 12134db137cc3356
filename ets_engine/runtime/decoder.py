"""Decodes the live branches of any number of searches together, one token each per forward pass.

A step's last token is *pending*: it is sampled, but its K/V is computed only when the step gets children. Then each
distinct parent reads it once, keeps its last hidden state, and all its children fork from there; pruned leaves never
pay for it.

Children of one parent that draw the same tokens are one *row*: one hidden state, one copy of the K/V, and a draw for
each. They part where their draws do, and what they drew in common stays shared. Equal steps end in one leaf, below
which their children are together again. Where passes run ahead of the host, on a GPU, nobody knows in time who drew
what: each branch has a row of its own until its step ends.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ets_engine.errors import ContextLengthError, PoolExhaustedError
from ets_engine.runtime.branches import Branch, DecodeUsage, FinishedBranch, Leaf
from ets_engine.runtime.runner import Runner
from ets_engine.runtime.sampler import SamplingParams, certainties, check_drawn, draw, uniforms
from ets_engine.runtime.stops import CONTEXT_TOKENS, Detokenizer, StopFinder
from ets_engine.runtime.transfer import Readback, upload
from ets_engine.types import StopReason


@dataclass(slots=True, eq=False)
class _Live:
    branch: Branch
    logprob: float = 0.0
    certainty: float = 0.0


@dataclass(slots=True, eq=False)
class _Row:
    members: list[_Live]  # below one parent, with equal rules; they have drawn the same tokens so far
    handle: int
    state: int  # its place among the decoder's hidden states
    tokens: list[int] = field(default_factory=list)

    @property
    def first(self) -> Branch:
        return self.members[0].branch


class _Part(NamedTuple):
    """Members of a row that drew the same token, by their places among all draws, and why they stop there."""

    row: int
    members: list[int]
    token: int
    reason: StopReason | None  # None = they go on


class StepDecoder:
    """Continuous batching of steps over one runner; not thread-safe.

    Args:
        runner: The policy's.
        tokenizer: The policy's; only decodes.

    Example:
        decoder = StepDecoder(runner, tokenizer)
        prompt = decoder.start(tokenizer.encode("1+1="), search="a")
        decoder.submit([Branch(prompt, node, seed=0, sampling=SamplingParams(), stops=StopRules(), max_tokens=64)
                        for node in (1, 2)])
        steps = decoder.run()
    """

    def __init__(self, runner: Runner, tokenizer: Detokenizer) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self._stops = StopFinder(tokenizer)
        self._readback = Readback(runner.device)
        self._waiting: list[Branch] = []
        self._rows: list[_Row] = []
        self._states = torch.empty((0, runner.hidden_size), dtype=runner.dtype, device=runner.device)  # [B, hidden]
        self._sums = torch.empty((0, runner.hidden_size), device=runner.device)  # of states read, per row
        self._usage: dict[Hashable, DecodeUsage] = {}

    # ------------------------------------------------------------------ leaves

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
        if not prompt_ids or total >= self.runner.context_tokens:
            raise ContextLengthError(
                f"a prompt of {total} tokens does not fit a context of {self.runner.context_tokens} tokens with room "
                "to answer; give 1 to context - 1 tokens"
            )
        tree = self.runner.tree
        usage, ids, known = self.usage(search), tuple(prompt_ids), 0
        usage.prompt_tokens += len(ids)
        if below is None:
            handle, known = self.runner.prefixes.begin(ids, owner=search)
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
        num_tokens = min(max_tokens, len(leaf.pending) - 1)
        if num_tokens > 0:
            started_s, moved = time.perf_counter(), self.runner.stats.bytes_moved
            self.runner.extend_last([(leaf.handle, leaf.pending[:num_tokens])])
            leaf.pending = leaf.pending[num_tokens:]
            self.usage(leaf.search).read_tokens += num_tokens
            self._charge([leaf.search], time.perf_counter() - started_s, self.runner.stats.bytes_moved - moved)

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
            self.runner.tree.fork(leaf.handle),
            leaf.search,
            pending=ids,
            recent=(*leaf.recent, *ids)[-CONTEXT_TOKENS:],
            path_tokens=leaf.path_tokens + len(ids),
            prompt_tokens=leaf.prompt_tokens,
            carry=carry,
        )

    def open(self, leaves: Sequence[Leaf]) -> None:
        """Read the pending tokens of some leaves in one batch, so that children can fork from them.

        Raises:
            PoolExhaustedError: the KV pool is full; nothing has changed.
        """
        unread = list({id(leaf): leaf for leaf in leaves if leaf.hidden is None}.values())
        if not unread:
            return
        started_s, moved = time.perf_counter(), self.runner.stats.bytes_moved
        hidden = self.runner.extend_last([(leaf.handle, leaf.pending) for leaf in unread])
        for leaf, state in zip(unread, hidden, strict=True):
            self.usage(leaf.search).read_tokens += len(leaf.pending)
            leaf.hidden, leaf.pending = state, ()
            if leaf.prompt:
                usage, above = self.usage(leaf.search), self.runner.tree.prefix_tokens(leaf.handle)
                usage.shared_tokens += self.runner.prefixes.remember(leaf.prompt, leaf.handle) - above
                leaf.prompt = ()
        searches = [leaf.search for leaf in unread]
        self._charge(searches, time.perf_counter() - started_s, self.runner.stats.bytes_moved - moved)
        for search in set(searches):
            self._sample_residency(search)

    def release(self, leaf: Leaf) -> None:
        """Give up a leaf, one of its holders; KV that nothing else needs is free at once."""
        leaf.holders -= 1
        if not leaf.holders:
            self.runner.tree.release(leaf.handle)

    # ------------------------------------------------------------------ decoding

    @property
    def num_branches(self) -> int:
        """Branches waiting or live (count)."""
        return len(self._waiting) + sum(len(row.members) for row in self._rows)

    def submit(self, branches: Sequence[Branch]) -> None:
        """Queue steps; they join the next decode step. Hold their parents until then; afterwards their KV lives on."""
        self._waiting += branches

    def cancel(self, search: Hashable) -> int:
        """Forget every waiting and live branch of a search and free their KV; finished leaves stay the caller's.

        Returns:
            Tokens of theirs that were sampled in vain (count).
        """
        self._waiting = [branch for branch in self._waiting if branch.parent.search != search]
        gone = [row for row in self._rows if row.first.parent.search == search]
        for row in gone:
            self.runner.tree.release(row.handle)
        if gone:
            stay = [place for place, row in enumerate(self._rows) if row.first.parent.search != search]
            states = self._states[self._index([self._rows[place].state for place in stay])]
            self._keep([self._rows[place] for place in stay], stay, states)
        return sum(len(row.tokens) * len(row.members) for row in gone)

    def run(self) -> list[FinishedBranch]:
        """Decode until nothing is waiting or live; finished steps in the order in which they were submitted."""
        live = [one.branch for row in self._rows for one in row.members]
        order = {id(branch): i for i, branch in enumerate([*live, *self._waiting])}
        finished: list[FinishedBranch] = []
        while self.num_branches:
            finished += self.step()
        return sorted(finished, key=lambda one: order[id(one.branch)])

    @torch.inference_mode()
    def step(self) -> list[FinishedBranch]:
        """One token for every branch: sample, stop those that are done, feed the others.

        Returns:
            Branches whose step ended, in no order that matters.

        Raises:
            PoolExhaustedError: the KV pool is full. Every branch is as before: release leaves or `cancel` a search,
                and step again.
        """
        self._admit()
        finished = self._decode() if self._rows else []
        finished += [self._without_room(branch) for branch in self._waiting]
        self._waiting = []
        return finished

    def _admit(self) -> None:
        """Open the waiting branches' parents, fork, and put the children among the rows; who has no room waits."""
        joining = [branch for branch in self._waiting if self._tokens_left(branch) > 0]
        if not joining:
            return
        parents = list({id(branch.parent): branch.parent for branch in joining}.values())
        self.open(parents)
        state_of = {id(parent): place for place, parent in enumerate(parents, start=len(self._states))}
        alike: dict[Hashable, list[_Live]] = {}
        for branch in joining:
            together = branch.merges and not self.runner.runs_ahead
            alike.setdefault(_rules(branch) if together else id(branch), []).append(_Live(branch))
        for members in alike.values():
            parent = members[0].branch.parent
            handle = self.runner.tree.fork(parent.handle, fill_page=True)
            self._rows.append(_Row(members, handle, state_of[id(parent)]))
        self._states = torch.cat([self._states, *(parent.hidden[None] for parent in parents)])
        self._sums = torch.cat([self._sums, self._sums.new_zeros((len(alike), self._sums.shape[1]))])
        self._waiting = [branch for branch in self._waiting if self._tokens_left(branch) <= 0]

    def _decode(self) -> list[FinishedBranch]:
        """`step` for the live branches."""
        started_s, moved = time.perf_counter(), self.runner.stats.bytes_moved
        rows = self._rows
        drawn = self._draw()
        self._readback.mark()
        ahead = self._run_ahead(drawn[0])
        forked: list[int] = []
        leaves: dict[Hashable, Leaf] = {}  # of the steps that end now
        try:
            with self._readback.reading():
                tokens, logprobs, certainty = (one.tolist() for one in drawn)
                check_drawn(logprobs)
                parts = self._parts(tokens)
                done = [part for part in parts if part.reason is not None]
                means = self._means([part.row for part in done])
            handles = self._part_ways(parts, forked)
            going = [(part, handle) for part, handle in zip(parts, handles, strict=True) if part.reason is None]
            ended = [(part, handle) for part, handle in zip(parts, handles, strict=True) if part.reason is not None]
            live = [one for row in rows for one in row.members]
            finished = [
                FinishedBranch(
                    *(live[place].branch, leaf, ids, text, part.reason, mean.copy()),  # no view that keeps the batch's
                    num_sampled=len(rows[part.row].tokens) + 1,
                    logprob=live[place].logprob + logprobs[place],
                    certainty=live[place].certainty + certainty[place],
                )
                for (part, handle), mean in zip(ended, means, strict=True)
                for leaf, ids, text in [self._end(part, handle, leaves)]
                for place in part.members
            ]
            states = self._states[:0]
            if ahead is not None:
                self._forget_last(part.row for part, _ in ended)
                states = ahead[self._index([part.row for part, _ in going])] if ended else ahead
            elif going:
                states = self.runner.extend_last([(handle, [part.token]) for part, handle in going])
        except BaseException:
            if ahead is not None:
                self._forget_last(range(len(rows)))
            for handle in forked:
                self.runner.tree.release(handle)
            raise
        searches = [one.branch.parent.search for one in live]
        self._charge(searches, time.perf_counter() - started_s, self.runner.stats.bytes_moved - moved)
        for search, sampled in Counter(searches).items():
            self.usage(search).generated_tokens += sampled
        for place, one in enumerate(live):
            one.logprob += logprobs[place]
            one.certainty += certainty[place]
        self._go_on(going, states, ends={leaf.handle for leaf in leaves.values()}, handles=handles)
        return finished

    def _go_on(
        self, going: Sequence[tuple[_Part, int]], states: torch.Tensor, *, ends: set[int], handles: Sequence[int]
    ) -> None:
        """Commit a decode step, which cannot fail any more.

        Args:
            going: Who goes on, with their KV nodes.
            states: What each of them has read. Shape [len(going), hidden].
            ends: KV nodes of the leaves of steps that ended.
            handles: KV nodes of all parts.
        """
        live = [one for row in self._rows for one in row.members]
        rows: list[_Row] = []
        for part, handle in going:
            row = self._rows[part.row]
            if len(part.members) < len(row.members):
                row = _Row([live[place] for place in part.members], handle, row.state, [*row.tokens])
            row.tokens.append(part.token)
            rows.append(row)
        before = {row.handle for row in self._rows}
        for handle in (before | set(handles)) - {row.handle for row in rows} - ends:
            self.runner.tree.release(handle)  # rows that parted live on above those who drew on; equal steps are one
        for search, read in Counter(row.first.parent.search for row in rows).items():
            usage = self.usage(search)
            usage.read_tokens += read
            usage.decode_steps += 1
            usage.resident_token_steps += self._sample_residency(search)
        self._keep(rows, [part.row for part, _ in going], states)
        self._sums += states

    def _run_ahead(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Feed all rows their drawn tokens ([B]) before it is known who stops; None where that cannot be done.

        So the device is at work while the host looks at the tokens; who stops has done one pass in vain.
        """
        if not self.runner.runs_ahead:
            return None
        try:
            return self.runner.extend_drawn([row.handle for row in self._rows], tokens)
        except (PoolExhaustedError, ContextLengthError):  # only those that go on may fit
            return None

    def _parts(self, tokens: Sequence[int]) -> list[_Part]:
        """Who stays together at the tokens just drawn, row by row."""
        parts: list[_Part] = []
        places = count()
        for number, row in enumerate(self._rows):
            alike: dict[int, list[int]] = {}
            for place in islice(places, len(row.members)):
                alike.setdefault(tokens[place], []).append(place)
            parts += [_Part(number, members, token, self._reason(row, token)) for token, members in alike.items()]
        return parts

    def _part_ways(self, parts: Sequence[_Part], forked: list[int]) -> list[int]:
        """A KV node for each part, which those of a row that parts get below it; new ones are put into `forked`.

        The old node of such a row is its first part's where it holds no token yet, and no one's otherwise.
        """
        tree, going = self.runner.tree, {part.row for part in parts if part.reason is None}
        num_parts = Counter(part.row for part in parts)
        handles: list[int] = []
        taken: set[int] = set()
        for part in parts:
            handle = self._rows[part.row].handle
            if num_parts[part.row] > 1:
                if tree.num_tokens(handle):
                    handle = tree.fork(handle, fill_page=part.reason is None or part.row not in going)
                    forked.append(handle)
                elif part.row in taken:
                    handle = tree.fork(tree.parent(handle))
                    forked.append(handle)
                taken.add(part.row)
            handles.append(handle)
        return handles

    def _forget_last(self, rows: Iterable[int]) -> None:
        """Take the last token of some rows out of the KV tree again."""
        tree = self.runner.tree
        for row in rows:
            handle = self._rows[row].handle
            tree.truncate(handle, tree.num_tokens(handle) - 1)

    def _reason(self, row: _Row, token: int) -> StopReason | None:
        """Why those of a row who drew this token stop, None = they go on."""
        rules, parent, left = row.first.stops, row.first.parent, self._tokens_left(row.first)
        if not self._stops.may_end(rules, parent.recent, row.tokens, token, left, parent.carry):
            return None
        return self._stops.reason(rules, parent.recent, [*row.tokens, token], left, parent.num_written, parent.carry)

    def _means(self, rows: list[int]) -> NDArray[np.float32]:
        """Mean of the states that each of these rows has read, or its only one. [F, hidden]."""
        if not rows:
            return np.empty((0, self.runner.hidden_size), dtype=np.float32)
        read = self._index([len(self._rows[row].tokens) for row in rows])[:, None]
        states = self._states[self._index([self._rows[row].state for row in rows])]
        sums = self._sums[self._index(rows)]
        return torch.where(read > 0, sums / read.clamp_min(1), states.float()).cpu().numpy()

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return upload(numbers, self.runner.device, torch.int64)

    def _tokens_left(self, branch: Branch) -> int:
        return min(branch.max_tokens, self.runner.context_tokens - branch.parent.path_tokens)

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next token of every live branch, its log-probability, and the model's certainty where it is asked for.

        Shape [B] each, on the device, which may not have them yet. Repeating it gives the same tokens.
        """
        live = [one for row in self._rows for one in row.members]
        draws = uniforms(
            [one.branch.seed for one in live],
            [one.branch.node for one in live],
            [row.first.parent.path_tokens + len(row.tokens) for row in self._rows for _ in row.members],
        )
        kinds: dict[tuple[int, SamplingParams], int] = {}  # the distributions that tokens are drawn from
        drawn_from = [
            kinds.setdefault((row.state, one.branch.sampling), len(kinds)) for row in self._rows for one in row.members
        ]
        places, params = [state for state, _ in kinds], [sampling for _, sampling in kinds]
        asked = [place for place, one in enumerate(live) if one.branch.needs_certainty]
        if self.runner.uses_graphs and not asked:
            places, params = [places[kind] for kind in drawn_from], [one.branch.sampling for one in live]
            states = self._states if places == list(range(len(self._states))) else self._states[self._index(places)]
            tokens, logprobs = self.runner.draw(states, params, draws)
            return tokens, logprobs, torch.zeros_like(logprobs)
        logits = self.runner.logits(self._states)
        if places != list(range(len(logits))):
            logits = logits[self._index(places)]
        one_each = drawn_from == list(range(len(kinds)))
        tokens, logprobs = draw(logits, params, draws, None if one_each else drawn_from)
        certainty = torch.zeros_like(logprobs)
        if asked:
            measured = certainties(logits[self._index([drawn_from[place] for place in asked])])
            certainty[self._index(asked)] = measured
        return tokens, logprobs, certainty

    def _end(self, part: _Part, handle: int, leaves: dict[Hashable, Leaf]) -> tuple[Leaf, tuple[int, ...], str]:
        """The leaf in which those of a row who stopped at a token end, their step's tokens, and its text.

        It is one of `leaves` if an equal step ended there, or joins them.
        """
        row = self._rows[part.row]
        branch, parent = row.first, row.first.parent
        ended = part.token in branch.stops.eos_ids
        tokens = tuple(row.tokens) if ended else (*row.tokens, part.token)
        assert part.reason is not None
        text, carry = self._divide(branch, tokens, part.reason, ended)
        step = (*_rules(branch), ended, tokens) if branch.merges else id(row.members[0])
        if step in leaves:
            leaves[step].holders += len(part.members)
            return leaves[step], tokens, text
        leaves[step] = leaf = Leaf(
            handle=handle,
            search=parent.search,
            pending=() if ended else tokens[-1:],
            recent=(*parent.recent, *tokens)[-CONTEXT_TOKENS:],
            path_tokens=parent.path_tokens + len(tokens),
            prompt_tokens=parent.prompt_tokens,
            hidden=self._states[row.state].clone() if ended else None,
            carry=carry,
            holders=len(part.members),
        )
        return leaf, tokens, text

    def _divide(self, branch: Branch, tokens: tuple[int, ...], reason: StopReason, ended: bool) -> tuple[str, str]:
        """Text of a finished step, and what its tokens carry over to the next one."""
        rules, parent = branch.stops, branch.parent
        if reason is StopReason.BOUNDARY:
            return self._stops.split(rules, parent.recent, tokens, parent.carry)
        cut = None
        if reason is StopReason.FINISHED and not ended:
            cut = self._stops.cut(rules, parent.recent, tokens, parent.num_written, parent.carry)
        return parent.carry + self._stops.text(parent.recent, tokens) if cut is None else cut, ""

    def _without_room(self, branch: Branch) -> FinishedBranch:
        parent = branch.parent
        handle = self.runner.tree.root(owner=parent.search)  # a fork would keep an unread parent from being read later
        leaf = Leaf(handle, parent.search, (), parent.recent, parent.path_tokens, parent.prompt_tokens)
        empty = np.zeros(self.runner.hidden_size, dtype=np.float32)
        return FinishedBranch(
            *(branch, leaf, (), parent.carry, StopReason.LENGTH, empty), num_sampled=0, logprob=0.0, certainty=0.0
        )

    def _keep(self, rows: list[_Row], places: Sequence[int], states: torch.Tensor) -> None:
        """Go on with these rows, their places among the rows before, and a hidden state for each."""
        if list(places) != list(range(len(self._rows))):
            self._sums = self._sums[self._index(places)]
        self._rows, self._states = rows, states
        for state, row in enumerate(rows):
            row.state = state

    # ------------------------------------------------------------------ accounting

    def usage(self, search: Hashable) -> DecodeUsage:
        """What a search cost so far; the same object until `forget`."""
        return self._usage.setdefault(search, DecodeUsage())

    def forget(self, search: Hashable) -> None:
        """Drop a search's usage once it has been read."""
        self._usage.pop(search, None)

    def _charge(self, searches: Sequence[Hashable], seconds: float, moved_bytes: int) -> None:
        self.runner.stats.busy_s += seconds
        for search, rows in Counter(searches).items():
            usage = self.usage(search)
            share = rows / len(searches)
            usage.busy_s += seconds * share
            usage.bytes_moved += round(moved_bytes * share)

    def _sample_residency(self, search: Hashable) -> int:
        usage = self.usage(search)
        resident = self.runner.tree.resident_tokens_of(search) + usage.shared_tokens
        usage.peak_tokens = max(usage.peak_tokens, resident)
        return resident


def _rules(branch: Branch) -> tuple[Hashable, ...]:
    """What branches must have in common to be one for as long as they draw the same tokens."""
    return id(branch.parent), id(branch.stops), branch.max_tokens, branch.needs_certainty
