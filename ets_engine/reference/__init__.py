"""The shipped problem families, their exact checkers, and the two small models trained on them."""

from ets_engine.reference.problems import (
    FAMILIES,
    ReferenceProblem,
    extract_answer,
    family_of,
    generate_problems,
    is_held_out,
    is_solved,
    label_steps,
)

__all__ = [
    "FAMILIES",
    "ReferenceProblem",
    "extract_answer",
    "family_of",
    "generate_problems",
    "is_held_out",
    "is_solved",
    "label_steps",
]
