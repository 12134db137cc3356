"""Where the shipped reference models lie, and which problems they know; it loads nothing."""

from __future__ import annotations

from pathlib import Path

from ets_engine.errors import ModelLoadError
from ets_engine.reference.problems import canonical

REFERENCE = "reference"
_HERE = Path(__file__).parent


def policy_path() -> str:
    """Folder of the shipped policy, a plain `AutoModelForCausalLM` checkpoint.

    Raises:
        ModelLoadError: The installation lacks it.
    """
    return _path("policy")


def prm_path() -> str:
    """Folder of the shipped PRM, a plain `AutoModelForTokenClassification` checkpoint.

    Raises:
        ModelLoadError: The installation lacks it.
    """
    return _path("prm")


def check_domain(problem: str) -> str:
    """The problem as the shipped models were trained to read it; refuses one that they were not trained on.

    Raises:
        ReferenceDomainError: It belongs to no family.
    """
    return canonical(problem)


def _path(name: str) -> str:
    folder = _HERE / name
    if not (folder / "model.safetensors").is_file():
        raise ModelLoadError(f"{folder} holds no model.safetensors: the installation is broken; reinstall the package")
    return str(folder)
