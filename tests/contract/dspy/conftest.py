"""A scripted model behind the real search loop, and DSPy's settings and caches as new for every test."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dspy
import pytest

from ets_engine.hosted import HostedEngine, ProposalRequest
from ets_engine.types import Step, StopReason

Write = Callable[[ProposalRequest, int], str]
"""The whole text of one branch of a request."""


class Script:
    """A model whose texts are written by a function; it stops where it is told to, and splits at blank lines.

    Attributes:
        requests: The first request of every search, in order.
    """

    def __init__(self, write: Write) -> None:
        self.requests: list[ProposalRequest] = []
        self._write = write
        self._texts: dict[tuple[str, int], list[str]] = {}
        self._lock = threading.Lock()

    def __call__(self, request: ProposalRequest) -> Sequence[Step]:
        key = repr(request.messages), request.config.seed
        with self._lock:
            if not any(request.partials):
                self.requests.append(request)
                self._texts[key] = [self._cut(request, place) for place in range(len(request.partials))]
            texts = self._texts[key]
        seen: Counter[str] = Counter()  # equal branches go on with different texts
        steps = []
        for partial in request.partials:
            going_on = [text for text in texts if text.startswith(partial)]
            steps.append(self._step(going_on[seen[partial] % len(going_on)], partial))
            seen[partial] += 1
        return steps

    def _cut(self, request: ProposalRequest, place: int) -> str:
        text = self._write(request, place)
        for stop in request.config.stop:
            text = text.partition(stop)[0].rstrip()
        return text

    @staticmethod
    def _step(text: str, partial: str) -> Step:
        head, gap, tail = text[len(partial) :].partition("\n\n")
        return Step(head + gap, len((head + gap).split()), StopReason.BOUNDARY if tail else StopReason.FINISHED)


def fields_asked(request: ProposalRequest) -> list[str]:
    """Output fields that a `dspy.ChatAdapter` prompt asks for."""
    asked = request.messages[-1]["content"].rpartition("Respond with the corresponding output fields")[2]
    return [name for name in re.findall(r"\[\[ ## (\w+) ## \]\]", asked) if name != "completed"]


def marked(**fields: Any) -> str:
    """An answer in `dspy.ChatAdapter`'s markup."""
    return "\n\n".join([*(f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items()), "[[ ## completed ## ]]"])


def scripted(
    write: Write, verifier: Callable[[str, Sequence[str]], float] | None = None, name: str = "scripted", **settings: Any
) -> HostedEngine:
    """A service over a script, which is its attribute `script`."""
    script = Script(write)
    engine = HostedEngine(script, verifier or (lambda problem, steps: 0.5), name=name, **settings)
    engine.script = script  # type: ignore[attr-defined]
    return engine


@pytest.fixture
def chat() -> Any:
    """The helpers above, for test files that cannot import this one."""

    class Helpers:
        marked = staticmethod(marked)
        scripted = staticmethod(scripted)
        fields_asked = staticmethod(fields_asked)

        @staticmethod
        def answering(*answers: Any, **settings: Any) -> HostedEngine:
            """Branch by branch one of these answers, whatever the fields before it are."""

            def write(request: ProposalRequest, place: int) -> str:
                *others, last = fields_asked(request)
                answer = answers[place % len(answers)]
                return marked(**{name: f"Think about {name} of {answer}." for name in others}, **{last: answer})

            return scripted(write, **settings)

    return Helpers


@pytest.fixture(autouse=True)
def fresh_dspy(tmp_path: Path) -> Iterator[None]:
    """An empty memory cache, no disk cache, and no settings of another test."""
    before = dspy.cache
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    with dspy.context(lm=None, adapter=None, callbacks=[], trace=[]):
        yield
    dspy.cache = before
