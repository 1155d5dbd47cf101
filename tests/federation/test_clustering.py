"""Clusters by the cosine distance of what clients have learned."""

import numpy as np
import pytest
import torch

from fedamole.federation.clustering import cosine_distances, silhouette_clusters


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
    found = silhouette_clusters(around(centres), most).tolist()
    assert found == labels if labels is not None else set(found) == {0, 1}
