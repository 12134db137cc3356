"""`dspy.Predict` by one tree search: every leaf is parsed, the best one answers, the others are its completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Literal

import dspy
from dspy.adapters.decision import resolve_adapter

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_integrations.dspy.lm import ETSLM, dump_search, override, said
from ets_integrations.dspy.plan import Plan
from ets_integrations.dspy.report import SearchReport
from ets_integrations.dspy.request import is_search_setting, refuse_search_settings
from ets_integrations.dspy.reward import RewardFn, Rewards, StepRewardFn
from ets_integrations.dspy.samples import asample, sample
from ets_integrations.dspy.wrapped import WrappedPlan, is_wrapped
from ets_integrations.settings import verifier_name

RewardMode = Literal["rerank", "search"]


class ETSPredict(dspy.Predict):
    """A predictor that answers by one tree search; optimizers, demos, traces and saving see a `dspy.Predict`.

    Leaves that do not parse into the signature's fields are dropped. Answers are told apart, and voted on, by the last
    output field, as in `dspy.majority`; the other fields are those of the best leaf that gave it. `pred.completions`
    holds the distinct answers, best first, and `pred._ets` the figures of the search. With an LM that is no ETSLM, the
    best of `n_candidates` samples answers, or of `width` samples where that alone is said.

    Args:
        signature: As in `dspy.Predict`.
        callbacks: As there.
        search: Search settings, all or some, that go before the LM's.
        effort: "low", "medium" or "high": the width where none is given.
        reward_fn: `reward(args, pred)` of an answer; the best reward wins.
        threshold: A reward that is good enough: no further answer is judged.
        reward: "rerank" judges the answers of a search, which DSPy may cache; "search" judges finished leaves inside,
            instead of the LM's verifier, and stops the search at the threshold. In there, rewards count from 0 to 1.
        step_reward_fn: `reward(args, steps) -> [0, 1]` judges steps, instead of the LM's verifier.
        **config: Search settings (`width=16`), and what the LM takes, as in `dspy.Predict`.

    Raises:
        ConfigError: A search setting is out of range, or `reward` is neither, or needs a `reward_fn`.

    Example:
        >>> predict = ETSPredict("question -> answer: int", width=8, temperature=0.7)
        >>> predict.settings, predict.config
        ({'width': 8}, {'temperature': 0.7})
    """

    def __init__(
        self,
        signature: str | type[dspy.Signature],
        callbacks: list[Any] | None = None,
        *,
        search: SearchConfig | Mapping[str, Any] | None = None,
        effort: str | None = None,
        reward_fn: RewardFn | None = None,
        threshold: float | None = None,
        reward: RewardMode = "rerank",
        step_reward_fn: StepRewardFn | None = None,
        **config: Any,
    ) -> None:
        """See the class."""
        if reward not in ("rerank", "search"):
            raise ConfigError(f"reward={reward!r}: choose rerank or search")
        if reward_fn is None and (reward == "search" or threshold is not None):
            raise ConfigError(f"{reward=}, {threshold=}: they need a reward_fn")
        given = said(search) | {name: config.pop(name) for name in list(config) if is_search_setting(name)}
        super().__init__(signature, callbacks, **config)
        self.settings = {**override(effort, {}), **given}
        dump_search(self.settings)  # refuses a bad one now
        self.threshold = threshold
        self.reward = reward
        # Functions, so that a module among them is not taken for a part of the program to be optimised.
        self._reward_fn = None if reward_fn is None else lambda *args: reward_fn(*args)
        self._step_reward_fn = None if step_reward_fn is None else lambda *args: step_reward_fn(*args)
        self._names = {"reward": verifier_name(reward_fn), "step_reward": verifier_name(step_reward_fn)}

    @property
    def verifier_name(self) -> str | None:
        """What tells the verifier of this predictor's searches from others, None where nothing does."""
        asked = {"step_reward": self._step_reward_fn}
        if self.reward == "search":  # where it stops the search is part of what it finds
            asked["reward"] = self._reward_fn
        names = {kind: self._names[kind] for kind, function in asked.items() if function is not None}
        if None in names.values():
            return None
        return json.dumps(names | ({"threshold": self.threshold} if "reward" in names else {}), sort_keys=True)

    def forward(self, **kwargs: Any) -> dspy.Prediction:
        """As `dspy.Predict`.

        Raises:
            AdapterParseError: No leaf parses.
        """
        plan = self._plan(kwargs)
        if plan is None:
            return super().forward(**kwargs)
        if not isinstance(plan.lm, ETSLM):
            return self._choose(plan, *sample(plan))
        with plan.asking() as (request, options):
            response = plan.lm(request, **options)
        return self._choose(plan, *plan.read(response))

    async def aforward(self, **kwargs: Any) -> dspy.Prediction:
        """As `forward`; a cancelled task stops its search.

        Raises:
            AdapterParseError: No leaf parses.
        """
        plan = self._plan(kwargs)
        if plan is None:
            return await super().aforward(**kwargs)
        if not isinstance(plan.lm, ETSLM):
            return self._choose(plan, *await asample(plan))
        with plan.asking() as (request, options):
            response = await plan.lm.acall(request, **options)
        return self._choose(plan, *await asyncio.to_thread(plan.read, response))  # an adapter may ask on

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """As `dspy.Predict`, with the search settings; functions are not saved."""
        search = dict(self.settings)
        if "stop" in search:
            search["stop"] = list(search["stop"])
        reward = {} if self._reward_fn is None else {"threshold": self.threshold, "reward": self.reward}
        return {**super().dump_state(json_mode), "ets": {"search": search, **reward}}

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> ETSPredict:
        """As `dspy.Predict`; the reward functions stay those that this predictor was made with.

        Raises:
            ConfigError: A search setting is out of range.
        """
        state = dict(state)
        own = state.pop("ets", None)
        super().load_state(state, allow_unsafe_lm_state=allow_unsafe_lm_state)
        if own is not None:
            dump_search(own["search"])
            self.settings = dict(own["search"])
            if self._reward_fn is not None:
                self.threshold, self.reward = own.get("threshold", self.threshold), own.get("reward", self.reward)
        return self

    def _plan(self, kwargs: dict[str, Any]) -> Plan | None:
        """What is known about one call before an LM is asked; None for an adapter that is to answer by itself."""
        given = {**self.config, **kwargs.get("config", {})}
        refuse_search_settings(given)
        lm, config, signature, demos, inputs = self._forward_preprocess(**kwargs)
        config.pop("temperature", None)  # DSPy sets one where it is to ask `n` times
        config |= given
        adapter = dspy.settings.adapter or dspy.ChatAdapter()
        if not isinstance(resolve_adapter(lm, adapter, signature, self.fields, self.signature), dspy.Adapter):
            return None
        if not isinstance(lm, ETSLM):
            return Plan(self, lm, adapter, signature, signature, demos, inputs, config)
        if is_wrapped(adapter):
            plan = WrappedPlan(self, lm, adapter, signature, signature, demos, inputs, config)
            return plan if plan.listen() else None
        rendered = adapter._call_preprocess(lm, config, signature, inputs)
        return Plan(self, lm, adapter, signature, rendered, demos, inputs, config)

    def _choose(
        self, plan: Plan, texts: list[str], values: list[dict[str, Any]], report: SearchReport | None
    ) -> dspy.Prediction:
        """The prediction of these answers, the best reward first."""
        rewards: list[float] = []
        if plan.rewards is not None:
            order, rewards = _rank(plan.rewards, texts)
            values = [values[place] for place in order]
        pred = self._forward_postprocess(values[: plan.num_shown], plan.signature, **plan.inputs)
        if report is not None:
            pred._ets = report.model_copy(update={"rewards": tuple(rewards[: plan.num_shown])})
        return pred


def _rank(rewards: Rewards, texts: list[str]) -> tuple[list[int], list[float]]:
    """Places of the texts by reward, best first, and the rewards; after one that is enough nobody is judged.

    Raises:
        Exception: What the reward function raised, where it raised for all.
    """
    judged: dict[int, float] = {}
    for place, text in enumerate(texts):
        reward = rewards.of(text)
        if reward is not None:
            judged[place] = reward
        if rewards.is_enough(reward):
            break
    if not judged and rewards.error is not None:
        raise rewards.error
    order = sorted(judged, key=lambda place: -judged[place])
    return [*order, *(place for place in range(len(texts)) if place not in judged)], [judged[place] for place in order]
