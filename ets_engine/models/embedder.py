"""A sentence-transformers model that says how differently steps reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, EngineError, ModelLoadError
from ets_engine.runtime import resolve_device
from ets_engine.runtime.checkpoints import first_line
from ets_engine.runtime.loading import quietly

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH_TEXTS = 64  # as in the code published with ETS


class SentenceEmbedder:
    """Embeds the text of each step with a sentence-transformers model; implements `Embedder`.

    ETS clusters steps with such a model (arXiv 2502.13575 takes a BERT trained on mathematical text). What a step has
    beyond the model's own `max_seq_length` tokens is not read.

    Args:
        model: In evaluation mode, on its device.
        name: Names it in errors.

    Example:
        embedder = SentenceEmbedder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
        vectors = embedder.embed([1, 2], ["Add 3 to both sides.", "Both sides plus 3."])  # [2, 384]
    """

    def __init__(self, model: SentenceTransformer, name: str) -> None:
        """See the class."""
        self._model = model
        self._name = name

    @classmethod
    def from_pretrained(cls, name: str, config: EngineConfig | None = None) -> SentenceEmbedder:
        """Load a model in float32 whatever the dtype of the others: it is small, and clusters are cut at a distance.

        Args:
            name: A folder, or a hub name that is in the local cache or reachable.
            config: Device, and whether code from the checkpoint may run.

        Raises:
            ConfigError: The package sentence-transformers is not installed, or the device is absent.
            ModelLoadError: There is no such model, or its transformer has no safetensors weights.
        """
        config = config or EngineConfig()
        device = resolve_device(config)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                f"embedder={name!r} needs sentence-transformers: {first_line(error)}; pip install sentence-transformers"
            ) from error
        try:
            with quietly():
                model = SentenceTransformer(
                    name,
                    device=str(device),
                    trust_remote_code=config.trust_remote_code,
                    model_kwargs={"use_safetensors": True, "dtype": "float32"},
                )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, SafetensorError) as error:
            raise ModelLoadError(
                f"embedder={name!r} cannot be loaded: {first_line(error)}; give a sentence-transformers model with "
                "*.safetensors weights, as a folder or as a hub name that is cached here or reachable"
            ) from error
        return cls(model.eval(), name)

    def embed(self, nodes: Sequence[int], texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector per text; they share batches. Shape [len(nodes), D].

        Raises:
            EngineError: The model failed, for want of memory perhaps.
        """
        try:
            return self._model.encode(
                list(texts), batch_size=BATCH_TEXTS, show_progress_bar=False, convert_to_numpy=True
            )
        except RuntimeError as error:
            raise EngineError(f"embedder={self._name!r} failed on {len(texts)} steps: {first_line(error)}") from error
