"""Decodes the live branches of any number of searches together, one token each per forward pass.

Children of one parent that draw the same tokens are one *row*: one hidden state, one copy of the K/V, and a draw for
each. They part where their draws do, and what they drew in common stays shared. Equal steps end in one leaf, below
which their children are together again. Where passes run ahead of the host, on a GPU, nobody knows in time who drew
what: each branch has a row of its own until its step ends.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ets_engine.errors import ContextLengthError, PoolExhaustedError
from ets_engine.runtime.branches import Branch, FinishedBranch, Leaf
from ets_engine.runtime.leaves import Leaves
from ets_engine.runtime.runner import Runner
from ets_engine.runtime.sampler import NO_NUMBERS, certainties, draw, uniforms
from ets_engine.runtime.stops import CONTEXT_TOKENS, Detokenizer, StopFinder
from ets_engine.runtime.transfer import Readback, upload
from ets_engine.runtime.usage import Usages
from ets_engine.types import StopReason

_LOGGER = logging.getLogger(__name__)


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
    quiet: Mapping[int, bool] | None  # see `StopFinder.quiet_tokens`
    most_tokens: int  # that the step may have
    tokens: list[int] = field(default_factory=list)

    @property
    def first(self) -> Branch:
        return self.members[0].branch


class _Part(NamedTuple):
    """Members of a row that drew the same token, by their places among all draws, and why they stop there."""

    row: int
    members: list[int]
    token: int  # -1 = their logits are no numbers
    reason: StopReason | None  # None = they go on


class StepDecoder:
    """Continuous batching of steps over one runner; not thread-safe.

    Args:
        runner: The policy's.
        tokenizer: The policy's; only decodes.

    Example:
        decoder = StepDecoder(runner, tokenizer)
        prompt = decoder.leaves.start(tokenizer.encode("1+1="), search="a")
        decoder.submit([Branch(prompt, node, seed=0, sampling=SamplingParams(), stops=StopRules(), max_tokens=64)
                        for node in (1, 2)])
        steps = decoder.run()
    """

    def __init__(self, runner: Runner, tokenizer: Detokenizer) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.usages = Usages(runner)
        self.leaves = Leaves(runner, self.usages)
        self._stops = StopFinder(tokenizer)
        self._readback = Readback(runner.device)
        self._waiting: list[Branch] = []
        self._rows: list[_Row] = []
        self._states = torch.empty((0, runner.hidden_size), dtype=runner.dtype, device=runner.device)  # [B, hidden]
        self._sums = torch.empty((0, runner.hidden_size), device=runner.device)  # of states read, per row

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
        """One token for every live branch: sample, stop those that are done, feed the others.

        Waiting branches join at once; those below a finished step, where others are live, once it was read with them.

        Returns:
            Branches whose step ended, in no order that matters.

        Raises:
            PoolExhaustedError: the KV pool is full. Every branch is as before: release leaves or `cancel` a search,
                and step again.
        """
        joining = [branch for branch in self._waiting if self._tokens_left(branch) > 0]
        short = [branch for branch in joining if self._rows and self._is_short(branch.parent)]
        late = {id(branch) for branch in short}
        self._admit([branch for branch in joining if id(branch) not in late])  # may find the pool full
        finished = self._decode([branch.parent for branch in short]) if self._rows else []  # so may this
        self._admit(short)  # but not this: nothing is left to be read
        finished += [self._without_room(branch) for branch in self._waiting]
        self._waiting = []
        return finished

    def _is_short(self, parent: Leaf) -> bool:
        """Whether a leaf needs no pass of its own: the one that feeds the rows can read what is left of it."""
        return len(parent.pending) <= 1 and not self.runner.runs_ahead

    def _admit(self, joining: Sequence[Branch]) -> None:
        """Open some waiting branches' parents, fork, and put the children among the rows."""
        if not joining:
            return
        parents = list({id(branch.parent): branch.parent for branch in joining}.values())
        self.leaves.open(parents)
        state_of = {id(parent): place for place, parent in enumerate(parents, start=len(self._states))}
        alike: dict[Hashable, list[_Live]] = {}
        for branch in joining:
            together = branch.merges and not self.runner.runs_ahead
            alike.setdefault(_rules(branch) if together else id(branch), []).append(_Live(branch))
        for members in alike.values():
            first = members[0].branch
            handle = self.runner.tree.fork(first.parent.handle, fill_page=True)
            most = min(self._tokens_left(first), first.stops.max_step_tokens)
            quiet = self._stops.quiet_tokens(first.stops)
            self._rows.append(_Row(members, handle, state_of[id(first.parent)], quiet, most))
        self._states = torch.cat([self._states, *(parent.hidden[None] for parent in parents)])
        self._sums = torch.cat([self._sums, self._sums.new_zeros((len(alike), self._sums.shape[1]))])
        joined = {id(branch) for branch in joining}
        self._waiting = [branch for branch in self._waiting if id(branch) not in joined]

    def _decode(self, parents: Sequence[Leaf] = ()) -> list[FinishedBranch]:
        """`step` for the live branches; the pass that feeds them reads these leaves too."""
        meter, rows, unread = self.usages.read_meter(), self._rows, self.leaves.unread(parents)
        drawn = self._draw()
        self._readback.mark()
        ahead = self._run_ahead(drawn[0])
        forked: list[int] = []
        leaves: dict[Hashable, Leaf] = {}  # of the steps that end now
        try:
            with self._readback.reading():
                tokens, logprobs = drawn[0].tolist(), drawn[1].tolist()
                certainty = [0.0] * len(tokens) if drawn[2] is None else drawn[2].tolist()
                if any(map(math.isnan, logprobs)):
                    tokens, logprobs, certainty = _mark_lost(tokens, logprobs, certainty)
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
                    num_sampled=len(rows[part.row].tokens) + (part.token >= 0),
                    logprob=live[place].logprob + logprobs[place],
                    certainty=live[place].certainty + certainty[place],
                    error=_why(part),
                )
                for (part, handle), mean in zip(ended, means, strict=True)
                for leaf, ids, text in [self._end(part, handle, leaves)]
                for place in part.members
            ]
            states = opened = self._states[:0]
            if ahead is not None:
                states = ahead[self._index([part.row for part, _ in going])] if ended else ahead
                self._forget_last(part.row for part, _ in ended)
            elif going or unread:
                fed = [(handle, [part.token]) for part, handle in going]
                read = self.runner.extend_last(fed + [(leaf.handle, leaf.pending) for leaf in unread])
                states, opened = read[: len(going)], read[len(going) :].clone()  # leaves live longer than rows
        except BaseException:
            if ahead is not None:
                self.runner.take_back([row.handle for row in rows])
            for handle in forked:
                self.runner.tree.release(handle)
            raise
        searches = [one.branch.parent.search for one in live]
        self.usages.charge(searches + [leaf.search for leaf in unread], meter)
        if unread:
            self.leaves.accept(unread, opened)
        for search, sampled in Counter(searches).items():
            self.usages.of(search).generated_tokens += sampled
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
                members = [live[place] for place in part.members]
                row = _Row(members, handle, row.state, row.quiet, row.most_tokens, [*row.tokens])
            row.tokens.append(part.token)
            rows.append(row)
        before = {row.handle for row in self._rows}
        for handle in (before | set(handles)) - {row.handle for row in rows} - ends:
            self.runner.tree.release(handle)  # rows that parted live on above those who drew on; equal steps are one
        for search, read in Counter(row.first.parent.search for row in rows).items():
            usage = self.usages.of(search)
            usage.read_tokens += read
            usage.decode_steps += 1
            usage.resident_token_steps += self.usages.sample_residency(search)
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
        stop = 0
        for number, row in enumerate(self._rows):
            start, stop = stop, stop + len(row.members)
            alike = {tokens[start]: [start]}
            for place in range(start + 1, stop):
                alike.setdefault(tokens[place], []).append(place)
            quiet, read = row.quiet, row.tokens
            goes_on = quiet is not None and read and len(read) + 1 < row.most_tokens and quiet[read[-1]]
            for token, members in alike.items():
                reason = StopReason.ERROR
                if token >= 0:
                    reason = None if goes_on and quiet[token] else self._reason(row, token)
                parts.append(_Part(number, members, token, reason))
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

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The next token of every live branch, its log-probability, and the model's certainty where it is asked for.

        Shape [B] each, on the device, which may not have them yet; certainty is None where nobody asks. Repeating it
        gives the same tokens.
        """
        live = [one for row in self._rows for one in row.members]
        draws = uniforms(
            [one.branch.seed for one in live],
            [one.branch.node for one in live],
            [row.first.parent.path_tokens + len(row.tokens) for row in self._rows for _ in row.members],
        )
        asked = [place for place, one in enumerate(live) if one.branch.needs_certainty]
        if self.runner.uses_graphs and not asked:
            states = [row.state for row in self._rows for _ in row.members]
            own = states == list(range(len(self._states)))
            params = [one.branch.sampling for one in live]
            return *self.runner.draw(self._states if own else self._states[self._index(states)], params, draws), None
        kinds: dict[tuple[int, int], int] = {}  # the distributions that tokens are drawn from
        places: list[int] = []  # of each, among the states
        params = []
        drawn_from: list[int] = []
        for row in self._rows:
            for one in row.members:
                sampling = one.branch.sampling
                kind = kinds.setdefault((row.state, id(sampling)), len(kinds))
                if kind == len(places):
                    places.append(row.state)
                    params.append(sampling)
                drawn_from.append(kind)
        logits = self.runner.logits(self._states)
        if places != list(range(len(logits))):
            logits = logits[self._index(places)]
        one_each = drawn_from == list(range(len(kinds)))
        tokens, logprobs = draw(logits, params, draws, None if one_each else drawn_from)
        if not asked:
            return tokens, logprobs, None
        certainty = torch.zeros_like(logprobs)
        certainty[self._index(asked)] = certainties(logits[self._index([drawn_from[place] for place in asked])])
        return tokens, logprobs, certainty

    def _end(self, part: _Part, handle: int, leaves: dict[Hashable, Leaf]) -> tuple[Leaf, tuple[int, ...], str]:
        """The leaf in which those of a row who stopped at a token end, their step's tokens, and its text.

        It is one of `leaves` if an equal step ended there, or joins them.
        """
        row = self._rows[part.row]
        branch, parent = row.first, row.first.parent
        ended = part.token < 0 or part.token in branch.stops.eos_ids
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


def _mark_lost(
    tokens: Sequence[int], logprobs: Sequence[float], certainty: Sequence[float]
) -> tuple[list[int], list[float], list[float]]:
    """What was drawn, with token -1 and nothing to count where the logits are no numbers; one prompt may do that."""
    lost = [math.isnan(one) for one in logprobs]
    _LOGGER.warning("%d branches fail: %s", sum(lost), NO_NUMBERS)
    drawn = zip(lost, tokens, logprobs, certainty, strict=True)
    kept = [(-1, 0.0, 0.0) if is_lost else rest for is_lost, *rest in drawn]
    return [one[0] for one in kept], [one[1] for one in kept], [one[2] for one in kept]


def _why(part: _Part) -> str | None:
    """What failed, of a part that stops for an error."""
    if part.reason is not StopReason.ERROR:
        return None
    return NO_NUMBERS if part.token < 0 else "the step boundary's is_over raised on this text"


def _rules(branch: Branch) -> tuple[Hashable, ...]:
    """What branches must have in common to be one for as long as they draw the same tokens."""
    return id(branch.parent), id(branch.stops), branch.max_tokens, branch.needs_certainty
