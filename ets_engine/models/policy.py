"""One search's policy over the shared decoder: tree nodes to KV leaves, decoded branches to steps."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ets_engine.config import SearchConfig
from ets_engine.errors import PoolExhaustedError
from ets_engine.messages import Prompt
from ets_engine.models.formats import PolicyFormat
from ets_engine.models.paths import ancestors, count_alike, count_distinct
from ets_engine.runtime import Branch, DecodeUsage, FinishedBranch, Leaf, SamplingParams, StepDecoder, StopRules
from ets_engine.scorers import StepEvidence
from ets_engine.types import Step, StopReason


class TreePolicy:
    """Proposes steps for one search; implements `Policy` and, with the states it reads anyway, `Embedder`.

    `expand` decodes until all its steps are done. A driver that serves several searches calls `submit`, hands every
    `FinishedBranch` of this search to `take`, and asks `steps`; it may `drop` the search's KV for a while.

    Args:
        decoder: Shared with the other searches of this model.
        format: Prompt and step boundaries.
        prompt: What to solve.
        config: Sampling, limits and the seed.
        search: Name of this search among those of the decoder.
        tools: Functions that the policy may call.
        needs_certainty: Whether `StepEvidence.certainty` is to be filled.

    Attributes:
        distinct_tokens: Of the steps of all rounds; what they share with one another counts once.
    """

    def __init__(
        self,
        decoder: StepDecoder,
        format: PolicyFormat,
        prompt: Prompt,
        config: SearchConfig,
        search: Hashable,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        needs_certainty: bool = False,
    ) -> None:
        """See the class."""
        self._decoder = decoder
        self._prompt_ids = format.prompt_ids(prompt, tools)
        self._search = search
        self._seed = config.seed
        self._max_tokens = config.max_tokens
        self._merges = config.merge_branches
        temperature = 0.0 if config.strategy == "greedy" else config.temperature
        self._sampling = SamplingParams(temperature, config.top_p, config.top_k, config.min_p)
        self._stops = StopRules(
            format.preset.boundary.ends,
            format.eos_ids,
            config.max_step_tokens,
            (*format.preset.stop, *config.stop),
            format.preset.boundary.begins,
            format.preset.boundary.is_over,
        )
        self._paths: dict[int, tuple[int, tuple[int, ...]]] = {}  # kept paths: node -> parent, ids
        self._carries: dict[int, str] = {}  # of kept nodes whose children's text begins with some of it
        self._leaves: dict[int, Leaf] = {}  # nodes whose KV is held
        self._dropped: tuple[int, ...] = ()  # nodes whose KV was, until it was dropped
        self._parents: dict[int, int] = {}  # of the children of the round under way
        self._needs_certainty = needs_certainty
        self._evidence: dict[int, StepEvidence] = {}  # of each node of the last round
        self._steps: dict[int, Step] = {}  # the decoded ones among those children
        self._first = {0: 0}  # the first node with an equal path, of each that may be a parent
        self._is_counted = True  # whether `distinct_tokens` has the steps of the round
        self._lost: str | None = None  # why no KV can be had any more
        self.distinct_tokens = 0

    def start(self) -> int:
        """Take the prompt as node 0; it is read together with the first step.

        Raises:
            ContextLengthError: It leaves no room for a token.
        """
        self._leaves[0] = self._decoder.leaves.start(self._prompt_ids, self._search)
        self._paths[0] = -1, tuple(self._prompt_ids)
        return len(self._prompt_ids)

    def expand(self, parents: Sequence[int], children: Sequence[int]) -> list[Step]:
        """One step per child; where the KV pool ran full, the unfinished ones are errors."""
        self.submit(parents, children)
        while (steps := self.steps()) is None:
            self.advance()
        return steps

    def submit(self, parents: Sequence[int], children: Sequence[int]) -> None:
        """Queue one step per child, `children[i]` below `parents[i]`."""
        self._parents = dict(zip(children, parents, strict=True))
        self._steps, self._evidence, self._is_counted = {}, {}, False
        if self._lost is None:
            self._queue(children)
        else:
            self.fail(self._lost)

    @property
    def unread_tokens(self) -> int:
        """Tokens of the prompt that were not read yet (count)."""
        return len(self._leaves[0].pending) if 0 in self._leaves else 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt (count)."""
        return len(self._prompt_ids)

    def read_ahead(self, max_tokens: int) -> None:
        """Read the next part of a long prompt, at most `max_tokens`.

        Raises:
            PoolExhaustedError: The KV pool is full; nothing has changed.
        """
        self._decoder.leaves.read_ahead(self._leaves[0], max_tokens)

    def _queue(self, children: Iterable[int]) -> None:
        prompt_tokens = len(self._prompt_ids)
        self._decoder.submit(
            [
                Branch(
                    parent=(leaf := self._leaves[self._parents[child]]),
                    node=child,
                    seed=self._seed,
                    sampling=self._sampling,
                    stops=self._stops,
                    max_tokens=self._max_tokens - (leaf.path_tokens - prompt_tokens),
                    needs_certainty=self._needs_certainty,
                    merges=self._merges,
                )
                for child in children
            ]
        )

    def advance(self) -> None:
        """One decode step of the decoder, which must be serving this search alone."""
        try:
            for finished in self._decoder.step():
                self.take(finished)
        except PoolExhaustedError as error:
            self.fail(str(error))

    def take(self, finished: FinishedBranch) -> None:
        """Accept one decoded step."""
        child = finished.branch.node
        self._leaves[child] = finished.leaf
        self._paths[child] = self._parents[child], finished.token_ids
        if finished.leaf.carry:
            self._carries[child] = finished.leaf.carry
        self._evidence[child] = StepEvidence(
            finished.num_sampled, finished.logprob, finished.certainty, finished.hidden_mean
        )
        self._steps[child] = Step(finished.text, len(finished.token_ids), finished.stop, finished.error)

    def fail(self, reason: str) -> None:
        """Give up the steps that are not decoded yet: they are errors from now on."""
        self._decoder.cancel(self._search)
        for child in self._parents:
            self._steps.setdefault(child, Step("", 0, StopReason.ERROR, reason))

    def give_up(self, reason: str) -> None:
        """Dropped KV cannot be had again: steps that are not decoded yet, and all later ones, are errors."""
        self._lost, self._dropped = reason, ()
        self.fail(reason)

    def steps(self) -> list[Step] | None:
        """The steps of the round in the order of `submit`, None while some are being decoded."""
        if len(self._steps) < len(self._parents):
            return None
        if not self._is_counted:
            self._count()
        return [self._steps[child] for child in self._parents]

    def _count(self) -> None:
        """Look at the round once all of it is there: which steps are equal, and how many tokens they have."""
        self._is_counted = True
        decoded = [child for child in self._parents if child in self._paths]
        alike: dict[tuple[int, tuple[int, ...]], int] = {}
        below: dict[int, list[tuple[int, ...]]] = {}
        for child in decoded:
            parent, ids = self._paths[child]
            above = self._first[parent]
            self._first[child] = alike.setdefault((above, ids), child) if self._merges else child
            below.setdefault(above, []).append(ids)
        count = count_distinct if self._merges else lambda steps: sum(map(len, steps))
        self.distinct_tokens += sum(map(count, below.values()))

    def retain(self, leaves: Sequence[int]) -> None:
        """Free the KV of every path that leads to none of these nodes, at once."""
        kept = {leaf: self._leaves[leaf] for leaf in leaves if self._lost is None or leaf in self._leaves}
        for node, leaf in self._leaves.items():
            if node not in kept:
                self._decoder.leaves.release(leaf)
        self._leaves = kept
        self._paths = {node: self._paths[node] for node in ancestors(kept, self._paths)}
        self._carries = {node: carry for node, carry in self._carries.items() if node in kept}
        self._first = {node: first for node, first in self._first.items() if node in kept}

    def drop(self) -> None:
        """Free all KV for now; steps that are not decoded yet begin anew after `restore`."""
        self.usage.generated_tokens -= self._decoder.cancel(self._search)
        self.usage.shared_tokens = 0
        for leaf in self._leaves.values():
            self._decoder.leaves.release(leaf)
        self._dropped, self._leaves = tuple(self._leaves), {}

    def restore(self) -> None:
        """Compute dropped KV again, and queue the steps that were not decoded.

        Raises:
            PoolExhaustedError: The pool is full; all is dropped still.
        """
        closed = {node for node, step in self._steps.items() if step.stop is not StopReason.BOUNDARY}
        open_nodes = set(self._dropped) - closed
        needed = ancestors(open_nodes, self._paths)
        held: list[Leaf] = []  # once for each time that it is held
        built: dict[int, Leaf] = {}
        try:
            level = needed[:1]
            if level:
                counted = self.usage.prompt_tokens, self.usage.cached_prompt_tokens
                built[0] = self._decoder.leaves.start(self._paths[0][1], self._search)
                held.append(built[0])
                self.usage.prompt_tokens, self.usage.cached_prompt_tokens = counted
            while level:
                level = [node for node in needed if self._paths[node][0] in level]
                built |= self._read_again(level, built, held)
        except BaseException:
            for leaf in held:
                self._decoder.leaves.release(leaf)
            self.usage.shared_tokens = 0
            raise
        self._leaves, self._dropped = {node: leaf for node, leaf in built.items() if node in open_nodes}, ()
        for leaf in self._leaves.values():
            held.remove(leaf)
        for leaf in held:
            self._decoder.leaves.release(leaf)
        self._queue(child for child in self._parents if child not in self._steps)

    def _read_again(self, nodes: Sequence[int], above: Mapping[int, Leaf], held: list[Leaf]) -> dict[int, Leaf]:
        """A leaf for each of some nodes of one depth, sharing what they shared when they were decoded.

        Args:
            nodes: What they hold is read below their parents' leaves.
            above: The parents' leaves.
            held: Takes every leaf, once for each time that it is held.
        """
        found: dict[int, Leaf] = {}
        below: dict[tuple[int, int], tuple[Leaf, list[tuple[int, tuple[int, ...]]]]] = {}
        for node in nodes:
            parent, ids = self._paths[node]
            leaf = above[parent]
            below.setdefault((id(leaf), 0 if self._merges else node), (leaf, []))[1].append((node, ids))
        level = list(below.values())
        while level:
            self._decoder.leaves.open([leaf for leaf, _ in level])
            groups = [
                (leaf, list(group))
                for leaf, steps in level
                for _, group in groupby(sorted(steps, key=itemgetter(1)), key=lambda step: step[1][0])
            ]
            level = []
            for leaf, alike in groups:
                common = alike[0][1][: count_alike(alike[0][1], alike[-1][1])]
                ended = [node for node, ids in alike if len(ids) == len(common)]
                carry = self._carries.get(ended[0], "") if ended else ""
                one = self._decoder.leaves.follow(leaf, common, carry)
                held.append(one)
                for node in ended:
                    found[node] = one
                    one.holders += 1
                    held.append(one)
                if rest := [(node, ids[len(common) :]) for node, ids in alike if len(ids) > len(common)]:
                    level.append((one, rest))
        return found

    @property
    def dropped_tokens(self) -> int:
        """Tokens that `restore` would read (count)."""
        return sum(len(self._paths[node][1]) for node in ancestors(self._dropped, self._paths))

    def embed(self, nodes: Sequence[int], texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean of the policy's last hidden states over each step. Shape [L, hidden]."""
        return np.stack([self._evidence[node].hidden_mean for node in nodes])

    def evidence(self, nodes: Sequence[int]) -> list[StepEvidence]:
        """What was computed as these nodes, of the last round, were written. Shape [L]."""
        return [self._evidence[node] for node in nodes]

    @property
    def usage(self) -> DecodeUsage:
        """What this search cost the policy so far."""
        return self._decoder.usages.of(self._search)

    def close(self) -> None:
        """Free everything this search holds; its `usage` must have been read."""
        self._decoder.cancel(self._search)
        self.retain(())
        self._decoder.usages.forget(self._search)
