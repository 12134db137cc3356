"""Rewards of finished answers and of steps, as verifiers of a search; it knows no LM."""

from __future__ import annotations

import contextvars
import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from ets_integrations.dspy.view import StepReader, plain_step, plain_steps
from ets_integrations.settings import verifier_name

RewardFn = Callable[[dict[str, Any], dspy.Prediction], float]
"""`reward(args, pred)`, as `dspy.BestOfN` and `dspy.Refine` take it."""

StepRewardFn = Callable[[dict[str, Any], list[str]], float]
"""`reward(args, steps)`: how good the last step is, in [0, 1]."""

UNDECIDED = 0.5
"""Score of a step that nobody judges, before there is an answer."""

_LOGGER = logging.getLogger(__name__)


def as_verifier(metric: Callable[..., Any], example: dspy.Example | Mapping[str, Any] | None = None) -> RewardFn:
    """A DSPy metric as the reward function of an ETSReasoner, a `dspy.BestOfN` or a `dspy.Refine`.

    Args:
        metric: `metric(example, pred, trace)`, giving a number, a truth value, or a prediction with a `score`.
        example: What the metric compares with. None makes one of the module's inputs, for metrics that check an answer
            against the question alone.

    Example:
        >>> def even(example, pred, trace=None):
        ...     return pred.answer % 2 == 0
        >>> as_verifier(even)({"question": "An even number?"}, dspy.Prediction(answer=4))
        1.0
    """

    def reward(args: dict[str, Any], pred: dspy.Prediction) -> float:
        known = dspy.Example(**args).with_inputs(*args) if example is None else example
        return float(metric(known, pred, None))

    name = verifier_name(metric)
    if name is not None:
        known = "" if example is None else json.dumps(dict(example), sort_keys=True, default=repr)
        reward.id = f"metric:{name}:{hashlib.sha256(known.encode()).hexdigest()[:16]}"  # type: ignore[attr-defined]
    return reward


@dataclass
class Rewards:
    """The rewards of one question's answers: each text is judged once, in whatever thread comes first.

    Attributes:
        reward_fn: The user's.
        args: The module's inputs.
        parse: Gives the prediction of a text, None where it does not parse.
        threshold: A reward that is good enough, None = none is.
    """

    reward_fn: RewardFn
    args: dict[str, Any]
    parse: Callable[[str], dspy.Prediction | None]
    threshold: float | None = None
    _known: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    error: Exception | None = None

    def of(self, text: str) -> float | None:
        """The reward of a text, None where it does not parse or the function raised."""
        with self._lock:
            if text not in self._known:
                self._known[text] = self._ask(text)
            reward = self._known[text]
        return None if math.isnan(reward) else reward

    def is_enough(self, reward: float | None) -> bool:
        """Whether nothing better need be found."""
        return reward is not None and self.threshold is not None and reward >= self.threshold

    def _ask(self, text: str) -> float:
        pred = self.parse(text)
        if pred is None:
            return math.nan
        try:
            return float(_apart(self.reward_fn, self.args, pred))
        except Exception as error:
            if self.error is None:
                _LOGGER.warning("the reward function failed on %r: %r; such answers come last", text[-80:], error)
            self.error = self.error or error
            return math.nan


@dataclass
class RewardScorer:
    """Verifier of a search that judges finished answers by their reward, and steps by the user's function.

    A path that ends in white space may go on: it is never judged below what its step is worth, so a half-written
    answer does not end its branch.

    Attributes:
        step_reward_fn: The user's, None = steps are `UNDECIDED`.
        args: The module's inputs.
        rewards: Of finished answers, None = only steps are judged.
        read_step: What the user's function reads of a step.
        is_solved: Whether an answer was good enough.
    """

    step_reward_fn: StepRewardFn | None
    args: dict[str, Any]
    rewards: Rewards | None = None
    read_step: StepReader = plain_step
    is_solved: bool = False

    def __call__(self, problem: str, steps: Sequence[str]) -> float:
        """Score of the last of these steps."""
        text = "".join(steps)
        worth = UNDECIDED
        if self.step_reward_fn is not None and (plain := plain_steps(steps, self.read_step)):
            worth = float(_apart(self.step_reward_fn, self.args, plain))
        reward = None if self.rewards is None else self.rewards.of(text)
        if self.rewards is None or reward is None:
            return worth
        may_go_on = text[-1:].isspace()
        self.is_solved = self.is_solved or (not may_go_on and self.rewards.is_enough(reward))
        reward = min(1.0, max(0.0, reward))
        return max(worth, reward) if may_go_on else reward


def _apart(function: Callable[..., float], *args: Any) -> float:
    """What a user's function returns; what it asks an LM on the way leaves no trace in the program that is run."""

    def ask() -> float:
        with dspy.context(trace=[], send_stream=None):
            return function(*args)

    return contextvars.copy_context().run(ask)
