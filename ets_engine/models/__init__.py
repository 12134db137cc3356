"""Models behind the seams of a search: a policy, verifiers, and embedders."""

from ets_engine.models.embedder import SentenceEmbedder
from ets_engine.models.formats import PolicyFormat
from ets_engine.models.intrinsic import EvidenceVerifier, LogProb, SelfCertainty, find_intrinsic
from ets_engine.models.policy import TreePolicy
from ets_engine.models.presets import PRESETS, Preset, StepBoundary, find_preset
from ets_engine.models.prm_formats import PrmFormat, QwenFormat, SkyworkFormat, TagFormat, TrlFormat, TurnFormat
from ets_engine.models.prm_loading import detect_format, load_prm
from ets_engine.models.probe import Probe
from ets_engine.models.readouts import Float32Head, probabilities
from ets_engine.models.scorer import PrmScorer
from ets_engine.models.verifier import (
    PrmVerifier,
    ScoreRequest,
    VerifierUsage,
    score_together,
)

__all__ = [
    "PRESETS",
    "EvidenceVerifier",
    "Float32Head",
    "LogProb",
    "PolicyFormat",
    "Preset",
    "PrmFormat",
    "PrmScorer",
    "PrmVerifier",
    "Probe",
    "QwenFormat",
    "ScoreRequest",
    "SelfCertainty",
    "SentenceEmbedder",
    "SkyworkFormat",
    "StepBoundary",
    "TagFormat",
    "TreePolicy",
    "TrlFormat",
    "TurnFormat",
    "VerifierUsage",
    "detect_format",
    "find_intrinsic",
    "find_preset",
    "load_prm",
    "probabilities",
    "score_together",
]
