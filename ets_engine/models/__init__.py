"""Models behind the seams of a search: a policy and its embeddings, and verifiers."""

from ets_engine.models.formats import PolicyFormat, PrmFormat
from ets_engine.models.policy import TreePolicy
from ets_engine.models.verifier import (
    CallableVerifier,
    PrmVerifier,
    ScoreRequest,
    StepScorer,
    VerifierUsage,
    score_together,
)

__all__ = [
    "CallableVerifier",
    "PolicyFormat",
    "PrmFormat",
    "PrmVerifier",
    "ScoreRequest",
    "StepScorer",
    "TreePolicy",
    "VerifierUsage",
    "score_together",
]
