"""Clusters of clients by what they have learned."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Distances = NDArray[np.float64]


def cosine_distances(rows: Sequence[Sequence[Tensor]], columns: Sequence[Sequence[Tensor]]) -> Distances:
    """Mean over the modules of 1 - cosine, (rows, columns), between what each holds in every module."""
    return np.array(
        [
            [
                np.mean(
                    [
                        1 - float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
                        for a, b in zip(row, column, strict=True)
                    ]
                )
                for column in columns
            ]
            for row in rows
        ]
    )


def silhouette_clusters(distances: Distances, most: int) -> NDArray[np.int64]:
    """Labels 0 .. M - 1 by agglomerative clustering with the M from 2 to `most` of the highest mean silhouette.

    Fewer than three clients, or `most` = 1, are one cluster. Labels are numbered in the order of their first client.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    count = len(distances)
    best, labels = -np.inf, np.zeros(count, dtype=np.int64)
    square = (distances + distances.T) / 2
    np.fill_diagonal(square, 0)
    for clusters in range(2, min(most, count - 1) + 1):
        found = AgglomerativeClustering(clusters, metric="precomputed", linkage="average").fit_predict(square)
        score = silhouette_score(square, found, metric="precomputed")
        if score > best:
            best, labels = score, found
    order = {label: place for place, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([order[label] for label in labels.tolist()], dtype=np.int64)
