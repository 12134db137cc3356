"""A DSPy module that thinks in a tree: what `dspy.ChainOfThought` is to one sample, for one search."""

from __future__ import annotations

from typing import Any

import dspy
from dspy.signatures.signature import ensure_signature

from ets_integrations.dspy.predict import ETSPredict


class ETSReasoner(dspy.Module):
    """`dspy.ChainOfThought` by tree search: reasons step by step, and the best of many lines of thought answers.

    Args:
        signature: As there; a `reasoning` field is put before the outputs where there is none.
        **settings: As in `ETSPredict`: search settings, `reward_fn`, `threshold`, `reward`, `step_reward_fn`, and what
            the LM takes.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> from ets_engine.hosted import HostedEngine
        >>> from ets_engine.types import Step, StopReason
        >>> from ets_integrations.dspy import ETSLM, PlainAdapter
        >>> def propose(request):
        ...     return [Step("1 and 1. The answer is 2.", 8, StopReason.FINISHED) for _ in request.partials]
        >>> engine = HostedEngine(propose, lambda problem, steps: 0.9, name="two")
        >>> solve = ETSReasoner("question -> answer: int", width=4)
        >>> with dspy.context(lm=ETSLM(service=engine, cache=False), adapter=PlainAdapter()):
        ...     pred = solve(question="What is 1+1?")
        >>> pred.answer, pred._ets.candidates[0].votes
        (2, 4)
    """

    def __init__(self, signature: str | type[dspy.Signature], **settings: Any) -> None:
        """See the class."""
        super().__init__()
        signature = ensure_signature(signature)
        if "reasoning" not in signature.output_fields:
            signature = signature.prepend("reasoning", dspy.OutputField(desc="${reasoning}"), type_=str)
        self.predict = ETSPredict(signature, **settings)

    def forward(self, *args: Any, **inputs: Any) -> dspy.Prediction:
        """The answer, with the others in `pred.completions` and the figures of the search in `pred._ets`.

        Raises:
            AdapterParseError: No leaf parses into the signature's fields.
        """
        return self.predict(*args, **inputs)

    async def aforward(self, *args: Any, **inputs: Any) -> dspy.Prediction:
        """As `forward`; a cancelled task stops its search.

        Raises:
            AdapterParseError: No leaf parses into the signature's fields.
        """
        return await self.predict.acall(*args, **inputs)
