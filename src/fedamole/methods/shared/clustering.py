"""Clusters of clients by the similarity of their trained tensors."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedamole.methods.shared.similarity import cosine_similarities

Distances = NDArray[np.float64]


def cosine_distances(rows: Sequence[Sequence[Tensor]], columns: Sequence[Sequence[Tensor]]) -> Distances:
    """Return (rows, columns): the mean over modules of 1 - cosine similarity; an entry is a tensor per module."""
    distances: Distances = (1 - cosine_similarities(rows, columns)).numpy()
    return distances


def silhouette_clusters(distances: Distances, max_clusters: int) -> NDArray[np.int64]:
    """Cluster agglomeratively into the number M of clusters with the highest mean silhouette; return labels 0 .. M - 1.

    M is from 2 to `max_clusters`; with fewer than three clients or `max_clusters` = 1 there is one cluster. Labels are
    numbered in the order of their first client.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    count = len(distances)
    best, labels = -np.inf, np.zeros(count, dtype=np.int64)
    square = (distances + distances.T) / 2
    np.fill_diagonal(square, 0)
    for clusters in range(2, min(max_clusters, count - 1) + 1):
        candidate = AgglomerativeClustering(clusters, metric="precomputed", linkage="average").fit_predict(square)
        score = silhouette_score(square, candidate, metric="precomputed")
        if score > best:
            best, labels = score, candidate
    order = {label: i for i, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([order[label] for label in labels.tolist()], dtype=np.int64)
