"""One search's policy over the shared decoder: tree nodes to KV leaves, decoded branches to steps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ets_engine.config import SearchConfig
from ets_engine.errors import PoolExhaustedError
from ets_engine.models.formats import PolicyFormat
from ets_engine.runtime import Branch, DecodeUsage, FinishedBranch, Leaf, SamplingParams, StepDecoder, StopRules
from ets_engine.types import Step, StopReason


class TreePolicy:
    """Proposes steps for one search; implements `Policy` and, with the states it reads anyway, `Embedder`.

    `expand` decodes until all its steps are done. A driver that serves several searches, or wants to look up between
    decode steps, calls `submit`, hands every `FinishedBranch` of this search to `take`, and asks `steps`.

    Args:
        decoder: Shared with the other searches of this model.
        format: Prompt and step boundaries.
        problem: What to solve.
        config: Sampling, limits and the seed.
        search: Name of this search among those of the decoder.
    """

    def __init__(
        self, decoder: StepDecoder, format: PolicyFormat, problem: str, config: SearchConfig, search: Hashable
    ) -> None:
        """See the class."""
        self._decoder = decoder
        self._prompt_ids = format.prompt_ids(problem)
        self._search = search
        self._seed = config.seed
        self._max_tokens = config.max_tokens
        temperature = 0.0 if config.strategy == "greedy" else config.temperature
        self._sampling = SamplingParams(temperature, config.top_p, config.top_k, config.min_p)
        self._stops = StopRules(format.boundaries, format.eos_ids, config.max_step_tokens)
        self._leaves: dict[int, Leaf] = {}  # nodes whose KV is held
        self._states: dict[int, NDArray[np.float32]] = {}  # mean hidden state of each node of the last round
        self._waiting: list[int] = []  # children of the round under way
        self._steps: dict[int, Step] = {}  # the decoded ones among them

    def start(self) -> int:
        """Take the prompt as node 0; it is read together with the first step.

        Raises:
            ContextLengthError: It leaves no room for a token.
        """
        self._leaves[0] = self._decoder.start(self._prompt_ids, self._search)
        return len(self._prompt_ids)

    def expand(self, parents: Sequence[int], children: Sequence[int]) -> list[Step]:
        """One step per child; where the KV pool ran full, the unfinished ones are errors."""
        self.submit(parents, children)
        while (steps := self.steps()) is None:
            self.advance()
        return steps

    def submit(self, parents: Sequence[int], children: Sequence[int]) -> None:
        """Queue one step per child, `children[i]` below `parents[i]`."""
        self._waiting, self._steps, self._states = list(children), {}, {}
        prompt_tokens = len(self._prompt_ids)
        self._decoder.submit(
            [
                Branch(
                    parent=(leaf := self._leaves[parent]),
                    node=child,
                    seed=self._seed,
                    sampling=self._sampling,
                    stops=self._stops,
                    max_tokens=self._max_tokens - (leaf.path_tokens - prompt_tokens),
                )
                for parent, child in zip(parents, children, strict=True)
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
        self._states[child] = finished.hidden_mean
        self._steps[child] = Step(finished.text, len(finished.token_ids), finished.stop)

    def fail(self, reason: str) -> None:
        """Give up the steps that are not decoded yet: they are errors from now on."""
        self._decoder.cancel(self._search)
        for child in self._waiting:
            self._steps.setdefault(child, Step("", 0, StopReason.ERROR, reason))

    def steps(self) -> list[Step] | None:
        """The steps of the round in the order of `submit`, None while some are being decoded."""
        if len(self._steps) < len(self._waiting):
            return None
        return [self._steps[child] for child in self._waiting]

    def retain(self, leaves: Sequence[int]) -> None:
        """Free the KV of every path that leads to none of these nodes, at once."""
        kept = {leaf: self._leaves[leaf] for leaf in leaves}
        for node, leaf in self._leaves.items():
            if node not in kept:
                self._decoder.release(leaf)
        self._leaves = kept

    def embed(self, nodes: Sequence[int], texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean of the policy's last hidden states over each step. Shape [L, hidden]."""
        return np.stack([self._states[node] for node in nodes])

    @property
    def usage(self) -> DecodeUsage:
        """What this search cost the policy so far."""
        return self._decoder.usage(self._search)

    def close(self) -> None:
        """Free everything this search holds; its `usage` must have been read."""
        self._decoder.cancel(self._search)
        self.retain(())
        self._decoder.forget(self._search)
