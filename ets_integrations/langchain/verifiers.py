"""Verifiers in LangChain's terms: any Runnable that scores, and a chat model that judges."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

from ets_engine.marks import read_mark
from ets_integrations.langchain.inner_calls import inner_batch

_LOGGER = logging.getLogger(__name__)

_JUDGE = ChatPromptTemplate.from_messages(
    [
        (
            "system",
            "You judge the last step of an unfinished solution. Answer with one integer from 0 to 10 and nothing else: "
            "10 = all steps are right and lead towards the answer, 0 = something is wrong.",
        ),
        ("human", "Problem:\n{problem}\n\nSteps so far:\n{text}\n\nScore of the last step:"),
    ]
)


class RunnableVerifier:
    """A Runnable as the verifier: it is given `{"problem", "steps", "text"}` and returns a score in [0, 1].

    All new steps of a depth are scored in one `batch`, all at once unless it has `with_config(max_concurrency=...)`.
    One that raises, or gives no number in [0, 1], fails its branch, and a warning says why.

    Args:
        runnable: Returns a number, or a message or text that holds one.
        id: Names it in caches, None = searches with it are never mixed with any other's.
        scale: What stands for 1.0: 10 for a judge that marks from 0 to 10.

    Example:
        >>> from langchain_core.runnables import RunnableLambda
        >>> verifier = RunnableVerifier(RunnableLambda(lambda given: 1.0 if "4" in given["steps"][-1] else 0.0))
        >>> verifier.score_many("2+2?", [["so 4"], ["so 5"]])
        [1.0, 0.0]
    """

    def __init__(self, runnable: Runnable[dict[str, Any], Any], *, id: str | None = None, scale: float = 1.0) -> None:
        """See the class."""
        self._runnable = runnable
        self._scale = scale
        self.id = id

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
        """Scores of the paths' last steps, NaN for one that cannot be judged."""
        given = [{"problem": problem, "steps": list(path), "text": "".join(path)} for path in paths]
        found = self._runnable.batch(given, inner_batch(self._runnable, len(given)), return_exceptions=True)
        scores = [self._read(one) for one in found]
        unread = [one for one, score in zip(found, scores, strict=True) if math.isnan(score)]
        if unread:
            first = unread[0].text if isinstance(unread[0], BaseMessage) else unread[0]
            _LOGGER.warning(
                "the verifier gave %d of %d steps no score from 0 to %g, first: %.300r",
                *(len(unread), len(found), self._scale, first),
            )
        return scores

    def _read(self, found: Any) -> float:
        if isinstance(found, BaseMessage):
            found = found.text
        if isinstance(found, str):
            mark = read_mark(found, self._scale)
            return math.nan if mark is None else mark
        try:
            score = float(found) / self._scale
        except (TypeError, ValueError, OverflowError):  # an exception, or no number
            return math.nan
        return score if 0.0 <= score <= 1.0 else math.nan


def judge(model: BaseChatModel, prompt: ChatPromptTemplate = _JUDGE, *, scale: float = 10.0) -> RunnableVerifier:
    """A chat model as the verifier; one call per new step, so take a cheap one.

    Args:
        model: Marks steps.
        prompt: Of `problem`, `steps` (a list) and `text` (the steps joined); asks for one number.
        scale: The best mark.

    Example:
        >>> from langchain_core.language_models import FakeListChatModel
        >>> judge(FakeListChatModel(responses=["7"])).score_many("2+2?", [["so 4"]])
        [0.7]
    """
    return RunnableVerifier(prompt | model, scale=scale)
