"""The shipped problem families, their exact checkers, and the two small models trained on them."""

from ets_engine.reference.problems import (
    FAMILIES,
    ReferenceProblem,
    canonical,
    extract_answer,
    family_of,
    generate_problems,
    is_held_out,
    is_right_answer,
    is_solved,
    label_steps,
)
from ets_engine.reference.shipped import REFERENCE, check_domain, policy_path, prm_path

__all__ = [
    "FAMILIES",
    "REFERENCE",
    "ReferenceProblem",
    "canonical",
    "check_domain",
    "extract_answer",
    "family_of",
    "generate_problems",
    "is_held_out",
    "is_right_answer",
    "is_solved",
    "label_steps",
    "policy_path",
    "prm_path",
]
