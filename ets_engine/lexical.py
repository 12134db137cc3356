"""An embedder without a model: texts that share words are close."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class HashEmbedder:
    """Embeds a text as the sum of a fixed random vector per word: equal texts are equal, shared words pull together.

    Args:
        dim: Length of the vectors.

    Example:
        >>> vectors = HashEmbedder(dim=4).embed([1, 2, 3], ["add both", "both add", "x is 5"])
        >>> bool(np.allclose(vectors[0], vectors[1])), bool(np.allclose(vectors[0], vectors[2]))
        (True, False)
    """

    def __init__(self, dim: int = 16) -> None:
        """See the class."""
        self._dim = dim

    def embed(self, nodes: Sequence[int], texts: Sequence[str]) -> NDArray[np.float64]:
        """One vector per text; an empty text is the zero vector. Shape [len(nodes), dim]."""
        return np.array([self._embed(text) for _, text in zip(nodes, texts, strict=True)])  # [L, D]

    def _embed(self, text: str) -> NDArray[np.float64]:
        vector = np.zeros(self._dim)  # [D]
        for word in text.split():
            vector += _word_vector(word, self._dim)
        return vector


@lru_cache(maxsize=10_000)
def _word_vector(word: str, dim: int) -> NDArray[np.float64]:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8])
    return np.random.default_rng(seed).standard_normal(dim)
