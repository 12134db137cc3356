"""Models behind the seams of a search: a policy, verifiers, and embedders; each loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "EvidenceVerifier": "intrinsic",
    "Float32Head": "readouts",
    "LogProb": "intrinsic",
    "PRESETS": "presets",
    "PolicyFormat": "formats",
    "Preset": "presets",
    "PrmFormat": "prm_formats",
    "PrmScorer": "scorer",
    "PrmVerifier": "verifier",
    "Probe": "probe",
    "QwenFormat": "prm_formats",
    "ScoreRequest": "verifier",
    "SelfCertainty": "intrinsic",
    "SentenceEmbedder": "embedder",
    "SkyworkFormat": "prm_formats",
    "StepBoundary": "presets",
    "TagFormat": "prm_formats",
    "TreePolicy": "policy",
    "TrlFormat": "prm_formats",
    "TurnFormat": "prm_formats",
    "VerifierUsage": "verifier",
    "detect_format": "prm_loading",
    "find_intrinsic": "intrinsic",
    "find_preset": "presets",
    "load_prm": "prm_loading",
    "probabilities": "readouts",
    "score_together": "verifier",
}  # public name -> the module that defines it

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


def __getattr__(name: str) -> Any:
    """Load a public name from its home module and keep it, so that this runs once per name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
