"""Tree search in DSPy programs: an LM for `dspy.configure`, a module for `dspy.ChainOfThought`'s place, an adapter.

    dspy.configure(lm=ETSLM("ets/reference"))                 # every LM call of the program becomes a search
    solve = ETSReasoner("question -> answer: int", width=16)  # one module does, with typed candidates

Importing this package loads DSPy and no model library; weights are loaded by the first request.
"""

from __future__ import annotations

from ets_integrations.dspy.lm import ETSLM
from ets_integrations.dspy.plain import PlainAdapter
from ets_integrations.dspy.predict import ETSPredict
from ets_integrations.dspy.reasoner import ETSReasoner
from ets_integrations.dspy.reward import as_verifier

__all__ = ["ETSLM", "ETSPredict", "ETSReasoner", "PlainAdapter", "as_verifier"]
