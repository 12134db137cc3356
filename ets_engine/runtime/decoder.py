"""Decodes the live branches of any number of searches together, one token each per forward pass.

A step's last token is *pending*: it is sampled, but its K/V is computed only when the step gets children. Then each
distinct parent reads it once, keeps its last hidden state, and all its children fork from there; pruned leaves never
pay for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ets_engine.errors import ContextLengthError, PoolExhaustedError
from ets_engine.runtime.branches import Branch, DecodeUsage, FinishedBranch, Leaf
from ets_engine.runtime.runner import Runner
from ets_engine.runtime.sampler import certainties, check_drawn, draw, uniforms
from ets_engine.runtime.stops import CONTEXT_TOKENS, Detokenizer, StopFinder
from ets_engine.runtime.transfer import Readback, upload
from ets_engine.types import StopReason


@dataclass(slots=True, eq=False)
class _Live:
    branch: Branch
    handle: int
    state: int  # its row in the decoder's hidden states
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    certainty: float = 0.0


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
        self._live: list[_Live] = []
        self._states = torch.empty((0, runner.hidden_size), dtype=runner.dtype, device=runner.device)  # [B, hidden]
        self._sums = torch.empty((0, runner.hidden_size), device=runner.device)  # of states read, per live branch
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
        count = min(max_tokens, len(leaf.pending) - 1)
        if count > 0:
            started_s, moved = time.perf_counter(), self.runner.stats.bytes_moved
            self.runner.extend_last([(leaf.handle, leaf.pending[:count])])
            leaf.pending = leaf.pending[count:]
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
        """Give up a leaf; KV that nothing else needs is free at once."""
        self.runner.tree.release(leaf.handle)

    # ------------------------------------------------------------------ decoding

    @property
    def num_branches(self) -> int:
        """Branches waiting or live (count)."""
        return len(self._waiting) + len(self._live)

    def submit(self, branches: Sequence[Branch]) -> None:
        """Queue steps; they join the next decode step. Hold their parents until then; afterwards their KV lives on."""
        self._waiting += branches

    def cancel(self, search: Hashable) -> int:
        """Forget every waiting and live branch of a search and free their KV; finished leaves stay the caller's.

        Returns:
            Tokens of theirs that were sampled in vain (count).
        """
        self._waiting = [branch for branch in self._waiting if branch.parent.search != search]
        gone = [live for live in self._live if live.branch.parent.search == search]
        for live in gone:
            self.runner.tree.release(live.handle)
        if gone:
            self._keep([row for row, live in enumerate(self._live) if live.branch.parent.search != search])
        return sum(len(live.tokens) for live in gone)

    def run(self) -> list[FinishedBranch]:
        """Decode until nothing is waiting or live; finished steps in the order in which they were submitted."""
        order = {id(branch): i for i, branch in enumerate([*(live.branch for live in self._live), *self._waiting])}
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
        finished = self._decode() if self._live else []
        finished += [self._without_room(branch) for branch in self._waiting]
        self._waiting = []
        return finished

    def _admit(self) -> None:
        """Open the waiting branches' parents, fork, and put the children among the live ones; who has no room waits."""
        joining = [branch for branch in self._waiting if self._tokens_left(branch) > 0]
        if not joining:
            return
        parents = list({id(branch.parent): branch.parent for branch in joining}.values())
        self.open(parents)
        state_of = {id(parent): row for row, parent in enumerate(parents, start=len(self._states))}
        tree = self.runner.tree
        self._live += [_Live(one, tree.fork(one.parent.handle), state_of[id(one.parent)]) for one in joining]
        self._states = torch.cat([self._states, *(parent.hidden[None] for parent in parents)])
        self._sums = torch.cat([self._sums, self._sums.new_zeros((len(joining), self._sums.shape[1]))])
        self._waiting = [branch for branch in self._waiting if self._tokens_left(branch) <= 0]

    def _decode(self) -> list[FinishedBranch]:
        """`step` for the live branches."""
        started_s, moved = time.perf_counter(), self.runner.stats.bytes_moved
        live = self._live
        drawn = self._draw()
        self._readback.mark()
        ahead = self._run_ahead(drawn[0]) if self.runner.runs_ahead else None
        try:
            with self._readback.reading():
                tokens, logprobs, certainty = (one.tolist() for one in drawn)
                check_drawn(logprobs)
                reasons = self._reasons(tokens)
                done = {row: reason for row, reason in enumerate(reasons) if reason is not None}
                means = self._means(list(done))
            finished = [
                self._finish(row, tokens[row], logprobs[row], certainty[row], reason, mean)
                for (row, reason), mean in zip(done.items(), means, strict=True)
            ]
        except BaseException:
            if ahead is not None:
                self._forget_last(range(len(live)))
            raise
        going = [row for row, reason in enumerate(reasons) if reason is None]
        states = self._states[:0]
        if ahead is not None:
            self._forget_last(done)
            states = ahead[upload(going, self.runner.device, torch.int64)] if done else ahead
        elif going:
            states = self.runner.extend_last([(live[row].handle, [tokens[row]]) for row in going])
        # nothing below can fail: commit
        searches = [one.branch.parent.search for one in live]
        self._charge(searches, time.perf_counter() - started_s, self.runner.stats.bytes_moved - moved)
        for search, count in Counter(searches).items():
            self.usage(search).generated_tokens += count
        for row in going:
            live[row].tokens.append(tokens[row])
            live[row].logprob += logprobs[row]
            live[row].certainty += certainty[row]
        for search in {searches[row] for row in going}:
            usage = self.usage(search)
            usage.decode_steps += 1
            usage.resident_token_steps += self._sample_residency(search)
        self._keep(going, states)
        self._sums += states
        return finished

    def _run_ahead(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Feed all live branches their drawn tokens ([B]) before it is known who stops; None where there is no room.

        So the device is at work while the host looks at the tokens; who stops has done one pass in vain.
        """
        try:
            return self.runner.extend_drawn([one.handle for one in self._live], tokens)
        except (PoolExhaustedError, ContextLengthError):  # only those that go on may fit
            return None

    def _forget_last(self, rows: Iterable[int]) -> None:
        """Take the last token of some live branches out of the KV tree again."""
        tree = self.runner.tree
        for row in rows:
            handle = self._live[row].handle
            tree.truncate(handle, tree.num_tokens(handle) - 1)

    def _reasons(self, tokens: Sequence[int]) -> list[StopReason | None]:
        """Why each live branch stops at the token just drawn, None = it goes on."""
        reasons: list[StopReason | None] = []
        for one, token in zip(self._live, tokens, strict=True):
            rules, parent, left = one.branch.stops, one.branch.parent, self._tokens_left(one.branch)
            reason = None
            if self._stops.may_end(rules, parent.recent, one.tokens, token, left, parent.carry):
                so_far = [*one.tokens, token]
                reason = self._stops.reason(rules, parent.recent, so_far, left, parent.num_written, parent.carry)
            reasons.append(reason)
        return reasons

    def _means(self, rows: list[int]) -> NDArray[np.float32]:
        """Mean of the states that each of these live branches has read, or its only one. [F, hidden]."""
        if not rows:
            return np.empty((0, self.runner.hidden_size), dtype=np.float32)
        device = self.runner.device
        read = upload([len(self._live[row].tokens) for row in rows], device, torch.int64)[:, None]
        states = self._states[upload([self._live[row].state for row in rows], device, torch.int64)]
        sums = self._sums[upload(rows, device, torch.int64)]
        return torch.where(read > 0, sums / read.clamp_min(1), states.float()).cpu().numpy()

    def _tokens_left(self, branch: Branch) -> int:
        return min(branch.max_tokens, self.runner.context_tokens - branch.parent.path_tokens)

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next token of every live branch, its log-probability, and the model's certainty where it is asked for.

        Shape [B] each, on the device, which may not have them yet. Repeating it gives the same tokens.
        """
        live, device = self._live, self.runner.device
        params = [one.branch.sampling for one in live]
        draws = uniforms(
            [one.branch.seed for one in live],
            [one.branch.node for one in live],
            [one.branch.parent.path_tokens + len(one.tokens) for one in live],
        )
        rows = [one.state for one in live]
        index = None if rows == list(range(len(self._states))) else upload(rows, device, torch.int64)
        asked = [row for row, one in enumerate(live) if one.branch.needs_certainty]
        if self.runner.uses_graphs and not asked:
            tokens, logprobs = self.runner.draw(self._states if index is None else self._states[index], params, draws)
            return tokens, logprobs, torch.zeros_like(logprobs)
        logits = self.runner.logits(self._states)  # children of one parent share a state
        logits = logits if index is None else logits[index]
        tokens, logprobs = draw(logits, params, draws)
        certainty = torch.zeros_like(logprobs)
        if len(asked) == len(live):
            certainty = certainties(logits)
        elif asked:
            index = upload(asked, device, torch.int64)
            certainty[index] = certainties(logits[index])
        return tokens, logprobs, certainty

    def _finish(
        self,
        row: int,
        token: int,
        logprob: float,
        certainty: float,
        reason: StopReason,
        mean: NDArray[np.float32],
    ) -> FinishedBranch:
        """The finished step of the live branch whose last token was just drawn; changes nothing."""
        one = self._live[row]
        ended = token in one.branch.stops.eos_ids
        tokens = tuple(one.tokens) if ended else (*one.tokens, token)
        parent = one.branch.parent
        text, carry = self._divide(one.branch, tokens, reason, ended)
        leaf = Leaf(
            handle=one.handle,
            search=parent.search,
            pending=() if ended else tokens[-1:],
            recent=(*parent.recent, *tokens)[-CONTEXT_TOKENS:],
            path_tokens=parent.path_tokens + len(tokens),
            prompt_tokens=parent.prompt_tokens,
            hidden=self._states[one.state].clone() if ended else None,
            carry=carry,
        )
        return FinishedBranch(
            one.branch,
            leaf,
            tokens,
            text,
            reason,
            mean.copy(),  # not a view that keeps those of the whole batch
            num_sampled=len(one.tokens) + 1,
            logprob=one.logprob + logprob,
            certainty=one.certainty + certainty,
        )

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

    def _keep(self, rows: list[int], states: torch.Tensor | None = None) -> None:
        """Keep only these live branches, each with a hidden state of its own: the given ones, or those it has."""
        device = self.runner.device
        if states is None:
            states = self._states[upload([self._live[row].state for row in rows], device, torch.int64)]
        self._states = states
        if len(rows) < len(self._live):
            self._sums = self._sums[upload(rows, device, torch.int64)]
            self._live = [self._live[row] for row in rows]
        for state, one in enumerate(self._live):
            one.state = state

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
