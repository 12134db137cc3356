"""Models behind the seams of a search: a policy and its embeddings, and verifiers."""

from ets_engine.models.formats import PolicyFormat, PrmFormat
from ets_engine.models.policy import TreePolicy
from ets_engine.models.verifier import CallableVerifier, PrmVerifier, StepScorer, VerifierUsage

__all__ = [
    "CallableVerifier",
    "PolicyFormat",
    "PrmFormat",
    "PrmVerifier",
    "StepScorer",
    "TreePolicy",
    "VerifierUsage",
]
