"""What goes into the decoder and comes out of it: leaves, branches to decode, and decoded steps."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ets_engine.runtime.sampler import SamplingParams
from ets_engine.runtime.stops import StopRules
from ets_engine.types import StopReason


@dataclass(slots=True, eq=False)
class Leaf:
    """The open end of a path; `Leaves` and the decoder alone change it, each holder gives it back (`Leaves.release`).

    Attributes:
        handle: Its KV node.
        search: Whose it is.
        pending: Tokens at the end of the path whose K/V is not computed yet.
        hidden: Last hidden state of the path, None while tokens are pending. Shape [hidden].
        prompt: Ids of a prompt that is to be remembered once it is read.
        recent: Last few tokens of the path, for decoding what follows.
        path_tokens: Tokens of the path, pending ones included (count).
        prompt_tokens: Those of them that no model wrote (count).
        carry: Text of the path's last tokens that belongs to the next step; see `StopRules.openers`.
        holders: Branches that ended here and did not give it back yet (count).
    """

    handle: int
    search: Hashable
    pending: tuple[int, ...]
    recent: tuple[int, ...]
    path_tokens: int
    prompt_tokens: int
    hidden: torch.Tensor | None = None
    prompt: tuple[int, ...] = ()
    carry: str = ""
    holders: int = 1

    @property
    def num_written(self) -> int:
        """Tokens of the path below the prompt (count)."""
        return self.path_tokens - self.prompt_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A step to be decoded below a leaf.

    Attributes:
        parent: Where it goes on from.
        node: The step's id in its search tree; with `seed` it decides the step's random numbers.
        seed: Of the search.
        sampling: How tokens are drawn.
        stops: When the step ends.
        max_tokens: Tokens left to the trajectory; the step ends with LENGTH when they or the context run out.
        needs_certainty: Whether `FinishedBranch.certainty` is asked for.
        merges: Whether it may share computation and K/V with siblings that draw the same tokens.
    """

    parent: Leaf
    node: int
    seed: int
    sampling: SamplingParams
    stops: StopRules
    max_tokens: int
    needs_certainty: bool = False
    merges: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class FinishedBranch:
    """A decoded step.

    Attributes:
        branch: As submitted.
        leaf: The new end of the path, the same for all that drew the same tokens; each receiver releases it.
        token_ids: Of the step, without an end-of-text token.
        text: What they add to the path's text: the parent's `carry` and their own text, without the leaf's `carry`.
        stop: BOUNDARY, FINISHED, LENGTH or ERROR.
        hidden_mean: Mean of the last hidden states at the step's tokens that were read (all but the last; of a
            single-token step, the state it was sampled from). Shape [hidden], float32.
        num_sampled: Tokens sampled, an end-of-text token included (count).
        logprob: Sum of their log-probabilities under the model.
        certainty: Sum of `sampler.certainties` where they were sampled; 0.0 when the branch did not ask.
        error: One line saying what failed, only with ERROR.
    """

    branch: Branch
    leaf: Leaf
    token_ids: tuple[int, ...]
    text: str
    stop: StopReason
    hidden_mean: NDArray[np.float32]
    num_sampled: int
    logprob: float
    certainty: float
    error: str | None = None
