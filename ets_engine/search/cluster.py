"""Steps that say the same thing: cosine similarity and average-linkage clusters of step embeddings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK_PRODUCTS = 200_000  # multiplications per BLAS call; OpenBLAS starts threads above 262,144
_SAME = 1e-9  # cosine distances below this are rounding noise between equal vectors


def cosine_similarities(embeddings: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine similarity of every pair of rows.

    A zero vector points nowhere: it is 1 to itself and to other zero vectors, 0 to everything else.

    Args:
        embeddings: Finite vectors. Shape [L, D].

    Returns:
        Symmetric, in [-1, 1], exactly 1 on the diagonal and between equal rows. Shape [L, L].

    Raises:
        ValueError: A vector has NaN or inf.

    Example:
        >>> cosine_similarities(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])).tolist()
        [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """
    vectors = np.asarray(embeddings, dtype=np.float64)  # [L, D]
    finite = np.isfinite(vectors).all(axis=1)  # [L]
    if not finite.all():
        raise ValueError(f"the embedding of leaf {int(finite.argmin())} has NaN or inf; embeddings must be finite")
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0.0)  # [L, 1]
    vectors = vectors / np.where(largest > 0, largest, 1.0)  # keeps the squares below from under- or overflowing
    norms = np.linalg.norm(vectors, axis=1)  # [L]
    units = vectors / np.where(norms > 0, norms, 1.0)[:, None]  # [L, D]
    similarities = np.clip(_gram(units), -1.0, 1.0)  # [L, L]
    zero = norms == 0
    similarities[np.ix_(zero, zero)] = 1.0
    similarities[similarities > 1.0 - _SAME] = 1.0
    return similarities


def _gram(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products of all rows, in blocks so small that BLAS stays in this thread.

    A threaded product waits for cores that other work holds (30 ms instead of 4 at 256 rows beside a busy core), and
    its sums depend on the number of threads, so that the same seed could give another tree on another machine.
    """
    count, dim = vectors.shape
    rows = max(1, math.isqrt(_BLOCK_PRODUCTS // max(dim, 1)))
    blocks = -(-count // rows)
    padded = np.zeros((blocks * rows, dim))  # [B * R, D]
    padded[:count] = vectors
    stacked = padded.reshape(blocks, rows, dim)
    products = np.zeros((blocks, blocks, rows, rows))  # [B, B, R, R]
    for block in range(blocks):
        np.matmul(stacked[block], stacked[block:].transpose(0, 2, 1), out=products[block, block:])
    upper = np.triu(products.transpose(0, 2, 1, 3).reshape(blocks * rows, blocks * rows)[:count, :count])
    return upper + np.triu(upper, k=1).T


def cluster_steps(embeddings: NDArray[np.floating], cut: float) -> tuple[int, ...]:
    """Semantic clusters: agglomerative, average linkage, cosine distance (ETS, arXiv 2502.13575).

    Args:
        embeddings: One finite vector per leaf. Shape [L, D], L >= 1.
        cut: Clusters further apart than this cosine distance stay apart, in [0, 2]. At 0 only equal directions join.

    Returns:
        Cluster of each leaf, numbered 0, 1, ... by first appearance. Shape [L].

    Raises:
        ValueError: A vector has NaN or inf.

    Example:
        >>> cluster_steps(np.array([[1.0, 0.0], [0.0, 1.0], [0.99, 0.01]]), cut=0.05)
        (0, 1, 0)
    """
    count = len(embeddings)
    if count == 1:
        return (0,)
    distances = 1.0 - cosine_similarities(embeddings)  # [L, L]
    condensed = distances[np.triu_indices(count, k=1)]  # [L * (L - 1) / 2]
    merges = cast("NDArray[np.float64]", linkage(condensed, method="average"))
    labels = cast("NDArray[np.int32]", fcluster(merges, t=cut, criterion="distance"))
    names: dict[int, int] = {}
    return tuple(names.setdefault(label, len(names)) for label in labels.tolist())
