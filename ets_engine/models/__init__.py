"""Models behind the seams of a search: a policy and its embeddings, and verifiers."""

from ets_engine.models.formats import PolicyFormat, PrmFormat
from ets_engine.models.policy import TreePolicy
from ets_engine.models.scorer import PrmScorer
from ets_engine.models.verifier import (
    PrmVerifier,
    ScoreRequest,
    VerifierUsage,
    score_together,
)

__all__ = [
    "PolicyFormat",
    "PrmFormat",
    "PrmScorer",
    "PrmVerifier",
    "ScoreRequest",
    "TreePolicy",
    "VerifierUsage",
    "score_together",
]
