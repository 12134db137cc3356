"""DORA (arXiv 2506.15707): REBASE's weights divided by how many leaves reason in the same direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ets_engine.protocols import Frontier, Selection
from ets_engine.search.allocate import largest_remainder_shares, softmax
from ets_engine.search.cluster import cosine_similarities
from ets_engine.search.selectors import check_positive
from ets_engine.types import LeafVerdict

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Dora:
    """Direction-oriented resource allocation.

    The paper rounds `width * weight` leaf by leaf, which need not sum to the width; here the rounding goes by largest
    remainders, which is the same rounding corrected until it does. The embedding is that of the newest step.

    Attributes:
        softmax_temperature: Temperature over step scores, > 0.
        similarity_temperature: Temperature over cosine similarities, > 0; small values tell directions apart sharply.

    Raises:
        ConfigError: A temperature is not positive.

    Example:
        >>> steps = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> leaves = Frontier((-1, 0, 0, 0), (9, 5, 5, 5), (1, 2, 3), (0.5,) * 3, (0, 1, 2), depth=1, embeddings=steps)
        >>> Dora().select(leaves, open_width=8).shares
        (2, 2, 4)
    """

    softmax_temperature: float = 0.1
    similarity_temperature: float = 0.01

    def __post_init__(self) -> None:
        """Refuse temperatures that softmax cannot use."""
        check_positive("softmax_temperature", self.softmax_temperature)
        check_positive("similarity_temperature", self.similarity_temperature)

    @property
    def needs_embeddings(self) -> bool:
        """Whether `Frontier.embeddings` must be filled: always."""
        return True

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """Split the width in proportion to the weights; a verdict's reward is the weight."""
        weights = dora_weights(
            frontier.scores,
            frontier.embeddings,
            softmax_temperature=self.softmax_temperature,
            similarity_temperature=self.similarity_temperature,
        ).tolist()
        shares = largest_remainder_shares(weights, max(open_width, 0), scores=frontier.scores)
        verdicts = tuple(
            LeafVerdict(node=node, share=share, reward=weight)
            for node, share, weight in zip(frontier.leaves, shares, weights, strict=True)
        )
        return Selection(shares, verdicts)


def dora_weights(
    scores: Sequence[float],
    embeddings: NDArray[np.floating] | None,
    *,
    softmax_temperature: float,
    similarity_temperature: float,
) -> NDArray[np.float64]:
    """Softmax of the scores times gamma_i, renormalised.

    `gamma_i` is the diagonal of the row-wise softmax of cosine similarities: 1 for a step that stands alone, about
    1/k for one of k steps in the same direction.

    Args:
        scores: One step score per leaf. Shape [L].
        embeddings: One vector per leaf, or None for a single leaf. Shape [L, D].
        softmax_temperature: > 0.
        similarity_temperature: > 0.

    Returns:
        Weights that sum to 1. Shape [L].

    Raises:
        ValueError: Embeddings are missing for more than one leaf.

    Example:
        >>> steps = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> dora_weights([0.5] * 3, steps, softmax_temperature=0.1, similarity_temperature=0.01).round(3).tolist()
        [0.25, 0.25, 0.5]
    """
    qualities = np.array(softmax(scores, softmax_temperature))  # [L]
    if len(scores) == 1:
        return qualities
    if embeddings is None:
        raise ValueError(f"{len(scores)} leaves need embeddings, got None; pass an embedder")
    logits = cosine_similarities(embeddings) / similarity_temperature  # [L, L], the diagonal is the largest of its row
    gammas = 1.0 / np.exp(logits - logits.diagonal()[:, None]).sum(axis=1)  # [L]
    weights = qualities * gammas
    return weights / weights.sum()
