"""One call of an ETSPredict: the request it makes, what travels beside that, and what its answers parse into."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dspy
from dspy import lm15

from ets_engine.tool_calls import Toolbox
from ets_engine.types import SearchEvent
from ets_integrations.dspy.calls import calling
from ets_integrations.dspy.plain import PlainAdapter
from ets_integrations.dspy.report import SearchReport
from ets_integrations.dspy.request import SETTINGS
from ets_integrations.dspy.response import read_turn
from ets_integrations.dspy.reward import Rewards, RewardScorer
from ets_integrations.dspy.view import ParsedView, plain_step, same_value, step_reader
from ets_integrations.settings import verifier_name

if TYPE_CHECKING:
    from ets_integrations.dspy.predict import ETSPredict

_CONTROLS = {"n", "num_generations", "rollout_id", "cache", "prompt_cache"}  # what DSPy does with a call


@dataclass
class Plan:
    """One call of a predictor."""

    predict: ETSPredict
    lm: Any
    adapter: dspy.Adapter
    signature: type[dspy.Signature]
    rendered: type[dspy.Signature]  # without the fields that the LM's own features fill
    demos: list[Any]
    inputs: dict[str, Any]
    config: dict[str, Any]
    cancel: threading.Event = field(default_factory=threading.Event)

    @cached_property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation that the adapter makes of the inputs."""
        return self.adapter.format(self.rendered, self.demos, self.inputs)

    @cached_property
    def toolbox(self) -> Toolbox | None:
        """The tools that the LM may call by itself."""
        tools = self.config.get("tools")
        max_calls = 1 if self.config.get("parallel_tool_calls") is False else None
        return Toolbox(tuple(tools), max_calls=max_calls) if tools else None

    @property
    def num_shown(self) -> int | None:
        """How many completions are wanted, None = every answer."""
        n = self.config.get("n")
        return n if isinstance(n, int) and n > 1 else None

    @cached_property
    def rewards(self) -> Rewards | None:
        """The rewards of this call's answers, where a function judges them."""
        if self.predict._reward_fn is None:
            return None
        return Rewards(self.predict._reward_fn, self.inputs, self._prediction, self.predict.threshold)

    @property
    def searches_for_reward(self) -> bool:
        """Whether they are asked inside the search."""
        return self.predict.reward == "search" and self.rewards is not None

    @contextmanager
    def asking(self) -> Iterator[tuple[lm15.Request, dict[str, Any]]]:
        """The request, how DSPy is to treat it, and meanwhile what travels beside it and where progress is told."""
        settings = self.predict.settings if self._called is None else {}
        own = {name: settings[name] for name in (*SETTINGS, "stop") if name in settings}
        asked = {**self.lm.kwargs, **own, **self.config}
        options = {name: asked[name] for name in ("rollout_id", "cache") if asked.get(name) is not None}
        scorer = self._scorer()
        view = self._view()
        body = {name: value for name, value in asked.items() if name not in _CONTROLS and value is not None}
        body["metadata"] = {**(asked.get("metadata") or {}), "ets": self._ets(scorer, view)}
        request = lm15.request_from_openai_chat({**body, "model": self.lm.model, "messages": self.messages})
        nameless_view = view is not None and self._view_name is None
        if nameless_view or (scorer is not None and self.predict.verifier_name is None):
            options["cache"] = False

        def stop_when_solved(event: SearchEvent) -> None:
            if scorer is not None and scorer.is_solved:
                self.cancel.set()

        parts = {
            "view": view,
            "verifier": scorer,
            "verifier_name": self.predict.verifier_name if scorer is not None else None,
            "cancel": self.cancel,
            "on_event": None if scorer is None else stop_when_solved,
        }
        predict, stream = self.predict, dspy.settings.send_stream
        if self.rewards is not None or not predict._should_stream():
            # Which answer wins is not known before all were judged: nothing is streamed but progress.
            told = stream if predict._should_stream() else None
            with calling(**parts, status=told), dspy.context(send_stream=None):
                yield request, options
        else:
            with calling(**parts), dspy.context(caller_predict=predict):
                yield request, options

    def read(self, response: lm15.Response) -> tuple[list[str], list[dict[str, Any]], SearchReport]:
        """The candidates' texts and what they parse into, best first.

        Raises:
            Exception: None parses: what the adapter raised for the first, an AdapterParseError mostly.
        """
        report = SearchReport.model_validate(response.provider_data["ets"])
        texts = [one.text for one in report.candidates] or [response.text or ""]
        kept, values, first = [], [], None
        for text in texts:
            try:
                values.append(self._parse(text))
                kept.append(text)
            except Exception as error:  # an adapter of the user's may raise anything
                first = first or error
        if not values:
            raise first or AssertionError("there is one text at least")
        return kept, values, report

    def _parse(self, text: str) -> dict[str, Any]:
        turn = read_turn(text, self.toolbox)
        output: dict[str, Any] = {"text": turn.text}
        if turn.calls:
            output["tool_calls"] = [
                {"id": f"call_{uuid4().hex[:24]}", "function": {"name": one.name, "arguments": one.arguments}}
                for one in turn.calls
            ]
        return self._read_output(output)

    def _read_output(self, output: dict[str, Any]) -> dict[str, Any]:
        """The output fields of what an LM of DSPy's would return."""
        return self.adapter._call_postprocess(self.rendered, self.signature, [output], self.lm, self.config)[0]

    def _prediction(self, text: str) -> dspy.Prediction | None:
        try:
            return dspy.Prediction.from_completions([self._parse(text)], signature=self.signature)
        except Exception:  # of a half-written answer an adapter may raise anything
            return None

    def _view(self) -> ParsedView | None:
        """Only leaves that parse may vote; an adapter that may ask a model to parse is not asked within a search."""
        if not isinstance(self.adapter, dspy.ChatAdapter | PlainAdapter):
            return None
        parse = getattr(type(self.adapter).parse, "__wrapped__", type(self.adapter).parse)  # without callbacks
        last = list(self.rendered.output_fields.values())[-1] if self.rendered.output_fields else None
        same = None
        if isinstance(self.adapter, PlainAdapter):
            same = self.adapter.view_for(self.messages[-1]["content"]).same
        elif last is not None and last.annotation is str:
            same = same_value
        return ParsedView(lambda text: parse(self.adapter, self.rendered, text), same)

    def _scorer(self) -> RewardScorer | None:
        rewards = self.rewards if self.searches_for_reward else None
        if rewards is None and self.predict._step_reward_fn is None:
            return None
        read_step = step_reader(self.messages) or plain_step
        return RewardScorer(self.predict._step_reward_fn, self.inputs, rewards, read_step)

    def _ets(self, scorer: RewardScorer | None, view: ParsedView | None) -> dict[str, Any]:
        """What the request says of the search: the call's own settings before the predictor's before the LM's."""
        ets, search = dict(self._called or {}), self.predict.settings
        if self._called is not None:  # all of them, of which some are the call's
            own = self.lm.complete_search({})["search"]
            search = {name: one for name, one in self._called.get("search", {}).items() if one != own.get(name)}
        shown = {"n_candidates": self.num_shown} if self.num_shown is not None and self.rewards is None else {}
        ets["search"] = {**self._for_rewards(search), **shown}
        if scorer is not None:
            ets["reward"] = self.predict.verifier_name
        if view is not None:
            kind = type(self.adapter)
            fields = {name: str(one.annotation) for name, one in self.rendered.output_fields.items()}
            ets["view"] = {"adapter": f"{kind.__module__}.{kind.__qualname__}", "fields": fields}
            ets["view"]["reads"] = id(self.adapter) if self._view_name is None else self._view_name
        return self.lm.complete_search(ets)

    @property
    def _called(self) -> dict[str, Any] | None:
        """What the call says of the search, which then says all of it."""
        return (self.config.get("metadata") or {}).get("ets")

    @property
    def _view_name(self) -> str | None:
        """What tells how the adapter reads answers from how others of its class do, None where nothing does."""
        if not type(self.adapter).parse.__module__.startswith(("dspy.adapters.", PlainAdapter.__module__)):
            return verifier_name(self.adapter)
        return self.adapter.view_name if isinstance(self.adapter, PlainAdapter) else ""

    def _for_rewards(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings under which no answer is missing when rewards are to choose among them."""
        if self.rewards is None:
            return settings
        own = self.lm.complete_search({"search": settings})["search"]
        best = {"vote": "best", "reduce": "last"} if self.searches_for_reward else {}
        return {"n_candidates": max(own["n_candidates"], own["width"]), **best, **settings}
