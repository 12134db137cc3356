"""A probe: a small head on the policy's own hidden states that says whether a step is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.scorers import StepEvidence

FORMAT = "ets-probe-1"

Layer = tuple[NDArray[np.floating], NDArray[np.floating]]
"""Weight [out, in] and bias [out] of one linear layer."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Scores a step by sigmoid(MLP(mean hidden state of the step)), in [0, 1]; one layer is logistic regression.

    After the probes of ReProbe (arXiv 2511.06209), which verify steps from the states of the policy that wrote them;
    theirs are small transformers. A probe knows one policy: its file names it, and another width is refused.

    Args:
        layers: Applied in turn with a ReLU between two; the first reads [hidden], the last has one output.
        policy: The model whose states it was trained on.

    Raises:
        ConfigError: The layers do not fit each other.

    Example:
        >>> probe = Probe(((np.array([[2.0, -1.0]]), np.array([0.5])),), policy="tiny")
        >>> evidence = StepEvidence(3, -1.0, 0.0, np.array([0.5, 1.5], dtype=np.float32))
        >>> probe.score_evidence([[evidence]])
        [0.5]
    """

    layers: tuple[Layer, ...]
    policy: str

    needs_certainty = False

    def __post_init__(self) -> None:
        """Check that the layers make a chain with one output."""
        sizes = [(weight.shape, bias.shape) for weight, bias in self.layers]
        chain = all(len(weight) == 2 and bias == weight[:1] for weight, bias in sizes)
        chain = chain and all(one[0][0] == two[0][1] for one, two in pairwise(sizes))
        if not sizes or not chain or sizes[-1][0][0] != 1:
            raise ConfigError(f"layers of shapes {sizes}: a probe needs [out, in] and [out] in turn, the last out = 1")

    @property
    def hidden_size(self) -> int:
        """Width of the policy that it reads."""
        return self.layers[0][0].shape[1]

    def fingerprint(self) -> str:
        """Short hash of its layers and policy: a probe that was trained again has another."""
        digest = hashlib.sha256(self.policy.encode())
        for part in (part for layer in self.layers for part in layer):
            digest.update(str(part.shape).encode() + np.ascontiguousarray(part, dtype=np.float32).tobytes())
        return digest.hexdigest()[:16]

    def check_width(self, hidden_size: int) -> None:
        """Refuse the states of a policy that it was not trained on.

        Raises:
            ConfigError: The policy has another width.
        """
        if hidden_size != self.hidden_size:
            raise ConfigError(
                f"the probe reads {self.hidden_size} hidden units of policy={self.policy!r}, this policy has "
                f"{hidden_size}; train one for it"
            )

    def score_evidence(self, paths: Sequence[Sequence[StepEvidence]]) -> list[float]:
        """Of the last step of each path, whatever the steps above it.

        Raises:
            ConfigError: The policy has another width.
        """
        states = np.stack([path[-1].hidden_mean for path in paths]).astype(np.float64)  # [L, hidden]
        self.check_width(states.shape[1])
        last = len(self.layers) - 1
        for place, (weight, bias) in enumerate(self.layers):
            states = states @ weight.T.astype(np.float64) + bias
            states = states if place == last else np.maximum(states, 0.0)
        with np.errstate(over="ignore"):
            return (1.0 / (1.0 + np.exp(-states[:, 0]))).tolist()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: `layers.N.weight`, `layers.N.bias`, and the policy's name as JSON metadata."""
        tensors = {
            f"layers.{place}.{name}": np.ascontiguousarray(part, dtype=np.float32)
            for place, layer in enumerate(self.layers)
            for name, part in zip(("weight", "bias"), layer, strict=True)
        }
        save_file(tensors, path, metadata={"ets_probe": json.dumps({"format": FORMAT, "policy": self.policy})})

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read what `save` wrote; no code of the file is ever run.

        Raises:
            ModelLoadError: There is no such file, or it holds no probe.
        """
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {}).get("ets_probe", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise ModelLoadError(
                f"verifier='probe:{path}' cannot be read: {error}; give a file of Probe.save"
            ) from error
        count = len(tensors) // 2
        names = {f"layers.{place}.{name}" for place in range(count) for name in ("weight", "bias")}
        if not isinstance(about, dict) or about.get("format") != FORMAT or tensors.keys() != names:
            raise ModelLoadError(
                f"verifier='probe:{path}' holds {sorted(tensors)[:4]} of format {about!r:.60}, no probe of format "
                f"{FORMAT!r}; write it with Probe.save"
            )
        layers = [(tensors[f"layers.{place}.weight"], tensors[f"layers.{place}.bias"]) for place in range(count)]
        try:
            return cls(tuple(layers), str(about["policy"]))
        except (ConfigError, KeyError) as error:
            raise ModelLoadError(f"verifier='probe:{path}': {error}") from error
