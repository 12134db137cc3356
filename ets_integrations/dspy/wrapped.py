"""Calls through an adapter that does more than format and parse, as `dspy.Refine`'s: it is called with a stand-in LM.

DSPy lets an adapter's `__call__` change the question before the LM sees it, and the answer after. Such an adapter is
called once to see what it would ask, and once for each answer of the search to see what it makes of that. What else it
asks then, as whether an answer is right, goes to the LM itself, for each answer; where it asks the same again, because
it cannot read an answer for instance, that answer is dropped. An `acall` of its own is not called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.clients.call_context import stream_emitted
from dspy.utils.exceptions import AdapterParseError

from ets_integrations.dspy.lm import ETSLM
from ets_integrations.dspy.plan import Plan

_Answer = Callable[[list[dict[str, Any]], dict[str, Any]], list[Any] | None]


def is_wrapped(adapter: dspy.Adapter) -> bool:
    """Whether an adapter's `__call__` is not one of DSPy's own adapters'.

    Example:
        >>> is_wrapped(dspy.JSONAdapter())
        False
    """
    return not type(adapter).__call__.__module__.startswith("dspy.adapters.")


@dataclass
class WrappedPlan(Plan):
    """One call through such an adapter. Which leaves vote is read from the messages: it may ask a model to parse."""

    asked: list[dict[str, Any]] | None = None
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def listen(self) -> bool:
        """See what the adapter asks; False where it asks nothing."""

        def note(messages: list[dict[str, Any]], config: dict[str, Any]) -> list[Any]:
            raise _Asked(messages, config)

        try:
            self._call(note)
        except _Asked as asked:
            self.asked, self.config = asked.messages, asked.config
        return self.asked is not None

    @property
    def messages(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What it asks."""
        return self.asked or []

    def _parse(self, text: str) -> dict[str, Any]:
        if text not in self._known:  # what the adapter asks about an answer is asked once
            self._known[text] = super()._parse(text)
        return dict(self._known[text])

    def _read_output(self, output: dict[str, Any]) -> dict[str, Any]:
        unread = [output]

        def answer(messages: list[dict[str, Any]], config: dict[str, Any]) -> list[Any] | None:
            if messages != self.asked:
                return None
            if not unread:
                raise _Asked(messages, config)
            stream_emitted()  # by which DSPy's own adapters know that this is not to be asked again as JSON
            return [unread.pop()]

        try:
            return self._call(answer)[0]
        except _Asked:
            raise AdapterParseError(
                adapter_name=type(self.adapter).__name__,
                signature=self.signature,
                lm_response=str(output["text"]),
                message="The adapter asked the same again.",
            ) from None

    def _view(self) -> None:
        return None

    def _call(self, answer: _Answer) -> list[dict[str, Any]]:
        lm = _StandIn(self.lm, answer)
        return self.adapter(lm, dict(self.config), self.signature, self.demos, dict(self.inputs))


class _StandIn(ETSLM):
    """An LM of which a function may answer the calls; where that gives None, they are made."""

    def __init__(self, lm: ETSLM, answer: _Answer) -> None:
        vars(self).update(vars(lm))
        self._lm = lm
        self._answer = answer

    def copy(self, **kwargs: Any) -> ETSLM:
        return self._lm.copy(**kwargs)

    def __call__(self, prompt: Any = None, *, messages: Any = None, **config: Any) -> Any:
        answer = self._answer(messages or [{"role": "user", "content": prompt}], config)
        if answer is not None:
            return answer
        with dspy.context(send_stream=None):
            return super().__call__(prompt, messages=messages, **config)


class _Asked(BaseException):
    """Ends a call once its question is known; no `Exception`, which an adapter may catch to ask again."""

    def __init__(self, messages: list[dict[str, Any]], config: dict[str, Any]) -> None:
        super().__init__()
        self.messages = messages
        self.config = config
