"""Calls through an adapter that does more than format and parse, as `dspy.Refine`'s: it is called with a stand-in LM.

DSPy lets an adapter's `__call__` change the question before the LM sees it, and the answer after. Such an adapter is
called once to see what it would ask, and once for each answer of the search to see what it makes of that. An `acall` of
its own is not called: none of this waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dspy

from ets_integrations.dspy.plan import Plan


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

    def _read_output(self, output: dict[str, Any]) -> dict[str, Any]:
        return self._call(lambda messages, config: [output])[0]

    def _view(self) -> None:
        return None

    def _call(self, answer: Callable[[list[dict[str, Any]], dict[str, Any]], list[Any]]) -> list[dict[str, Any]]:
        lm = _StandIn(self.lm, answer)
        return self.adapter(lm, dict(self.config), self.signature, self.demos, dict(self.inputs))


class _StandIn:
    """An LM whose calls are answered by a function."""

    def __init__(self, lm: Any, answer: Callable[[list[dict[str, Any]], dict[str, Any]], list[Any]]) -> None:
        self._lm = lm
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def __call__(self, prompt: Any = None, *, messages: Any = None, **config: Any) -> list[Any]:
        return self._answer(messages or [{"role": "user", "content": prompt}], config)


class _Asked(BaseException):
    """Ends a call once its question is known; no `Exception`, which an adapter may catch to ask again."""

    def __init__(self, messages: list[dict[str, Any]], config: dict[str, Any]) -> None:
        super().__init__()
        self.messages = messages
        self.config = config
