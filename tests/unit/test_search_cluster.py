"""Clusters of step embeddings: the corner cases have a defined answer."""

import numpy as np
import pytest

from ets_engine.search.cluster import cluster_steps, cosine_similarities
from ets_engine.testing import HashEmbedder


def test_one_leaf_is_one_cluster():
    assert cluster_steps(np.ones((1, 3)), 0.05) == (0,)


def test_identical_texts_share_a_cluster_even_at_cut_zero():
    vectors = HashEmbedder().embed([1, 2, 3, 4], ["so x is 5", "twice", "so x is 5", "so x is 5"])
    assert cluster_steps(vectors, 0.0) == (0, 1, 0, 0)
    assert cluster_steps(vectors.astype(np.float32), 0.0) == (0, 1, 0, 0)


def test_length_does_not_matter_and_opposites_are_two_apart():
    vectors = np.array([[1.0, 0.0], [1e-200, 0.0], [-1e200, 0.0]])
    assert cluster_steps(vectors, 0.05) == (0, 0, 1)
    assert cluster_steps(vectors, 2.0) == (0, 0, 0)
    assert cosine_similarities(vectors).tolist() == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]


def test_zero_vectors_are_alike_and_orthogonal_to_the_rest():
    vectors = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert cluster_steps(vectors, 0.05) == (0, 1, 0)
    assert cosine_similarities(vectors)[0].tolist() == [1.0, 0.0, 1.0]


def test_average_linkage_by_hand():
    # Angles 0, 60, 90 degrees: 60 and 90 are 1 - cos 30 = 0.134 apart; 0 is 0.5 and 1.0 away, 0.75 on average.
    angles = np.deg2rad([0, 60, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert cluster_steps(vectors, 0.13) == (0, 1, 2)
    assert cluster_steps(vectors, 0.14) == (0, 1, 1)
    assert cluster_steps(vectors, 0.74) == (0, 1, 1)
    assert cluster_steps(vectors, 0.76) == (0, 0, 0)


@pytest.mark.parametrize(("count", "dim"), [(2, 1), (17, 5), (40, 3000), (3, 250_000)])
def test_blocked_similarities_are_the_plain_ones(count, dim):
    vectors = np.random.default_rng(0).standard_normal((count, dim))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ours = cosine_similarities(vectors)
    np.testing.assert_allclose(ours, units @ units.T, rtol=0, atol=1e-12)
    assert (ours == ours.T).all()
    assert (ours.diagonal() == 1.0).all()
