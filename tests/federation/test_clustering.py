"""Clusters by the cosine distance of what clients have learned."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from fedamole.methods.shared.clustering import cosine_distances, silhouette_clusters


def test_distances_by_hand() -> None:
    """One module turned by 90 degrees, the other the same: (1 + 0) / 2; both opposite: 2."""
    a = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0], [0.0]])]
    b = [torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]])]
    c = [-a[0], -5 * a[1]]
    np.testing.assert_allclose(cosine_distances([a], [a, b, c]), [[0.0, 0.5, 2.0]], atol=1e-12)


def around(centres: list[int], seed: int = 0) -> np.ndarray:
    """Distances between clients near the axes named."""
    draw = torch.Generator().manual_seed(seed)
    points = [[torch.eye(4)[centre] + 0.05 * torch.randn(4, generator=draw)] for centre in centres]
    return cosine_distances(points, points)


@pytest.mark.parametrize(
    ("centres", "most", "labels"),
    [
        ([0, 0, 1, 1, 0], 4, [0, 0, 1, 1, 0]),
        ([2, 1, 2, 0, 1, 0], 4, [0, 1, 0, 2, 1, 2]),  # numbered by their first client
        ([2, 1, 2, 0, 1, 0], 2, None),  # two at most
        ([0, 1, 0, 1], 1, [0, 0, 0, 0]),
        ([0, 1], 4, [0, 0]),  # too few to tell
        ([0], 4, [0]),
    ],
)
def test_as_many_clusters_as_there_are(centres: list[int], most: int, labels: list[int] | None) -> None:
    result = silhouette_clusters(around(centres), most).tolist()
    assert result == labels if labels is not None else set(result) == {0, 1}


def silhouette(distances: np.ndarray, labels: list[int]) -> float:
    """Mean over the clients of (b - a) / max(a, b), Rousseeuw 1987: a the mean distance to the others of the own
    cluster, b the least mean distance to another cluster; 0 for a client that is alone.
    """
    results = []
    for i, own in enumerate(labels):
        members = {k: [j for j, label in enumerate(labels) if label == k and j != i] for k in set(labels)}
        a = float(np.mean(distances[i, members[own]])) if members[own] else 0.0
        b = min(float(np.mean(distances[i, rest])) for k, rest in members.items() if k != own)
        results.append((b - a) / max(a, b) if members[own] else 0.0)
    return float(np.mean(results))


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 9), st.integers(2, 6), st.integers(0, 999))
def test_the_clusters_are_those_of_average_linkage_with_the_best_silhouette(count: int, most: int, seed: int) -> None:
    """SciPy's agglomerative clustering cut into 2, 3, .. clusters, scored by the definition."""
    points = np.random.default_rng(seed).normal(size=(count, 3))
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    tree = linkage(distances[np.triu_indices(count, 1)], "average")
    cuts = [fcluster(tree, clusters, "maxclust").tolist() for clusters in range(2, min(most, count - 1) + 1)]
    best = max(cuts, key=lambda labels: silhouette(distances, labels))
    assert silhouette_clusters(distances, most).tolist() == [list(dict.fromkeys(best)).index(label) for label in best]


def test_average_linkage_breaks_a_chain() -> None:
    """0, 2, 4.1, 6.3, 8.6 on a line: by nearest ends the last would stay alone. By mean distances 0 and 2 join, 4.1 and
    6.3 (2.2 apart), then 8.6 with these (3.4 away, where 0 and 2 are 4.2 away).
    """
    indices = np.array([0.0, 2.0, 4.1, 6.3, 8.6])
    assert silhouette_clusters(np.abs(indices[:, None] - indices), 2).tolist() == [0, 0, 1, 1, 1]


def test_nothing_learned_is_no_error() -> None:
    """All B's 0, as before any step: distances of 1 between all, as torch has it, and still labels from 0."""
    zeros = [[torch.zeros(2, 1)] for _ in range(4)]
    assert silhouette_clusters(cosine_distances(zeros, zeros), 4)[0] == 0
