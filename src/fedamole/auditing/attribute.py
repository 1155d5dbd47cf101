"""Attribute inference: does the coordinator learn which kind of data a client has from its mean token embeddings?

Each client is classified by the nearest centroid of the other clients' embeddings.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedamole.auditing.release import NotApplicableError
from fedamole.data.examples import Example

KINDS = ("category", "source", "task")
"""Attributes of a client in the order in which they are tried: the most frequent category of its training examples (or
its most frequent answer, if they have options), the name of its data source, the template of its source."""
PERMUTATIONS = 200
"""Random exchanges of the clients' attributes, for the level of chance."""


def category_of(examples: Sequence[Example]) -> str | None:
    """Return the most frequent category, or answer among options, of examples; None if they have neither."""
    values = Counter(
        example.category if example.category is not None else example.answer if example.options else None
        for example in examples
    )
    return values.most_common(1)[0][0]


def chosen_attribute(attributes: Mapping[str, Mapping[str, str | None]]) -> tuple[str, dict[str, str]]:
    """Return an attribute and its values by client, without clients whose value no other client has.

    `attributes` has a value by kind for each client. Raises NotApplicableError if no attribute has two values with at
    least two clients each.
    """
    for kind in KINDS:
        values = {client: of_client[kind] for client, of_client in attributes.items()}
        counts = Counter(values.values())
        if None not in counts and sum(count > 1 for count in counts.values()) > 1:
            return kind, {client: value for client, value in values.items() if value and counts[value] > 1}
    raise NotApplicableError(
        "the clients do not form groups: at least two categories, sources or tasks with two clients each are needed"
    )


def nearest_centroids(vectors: np.ndarray, labels: Sequence[str]) -> float:
    """Return the share of vectors (N, d) whose nearest centroid, computed without them, is that of their label."""
    names, correct = sorted(set(labels)), 0
    own = np.asarray(labels)
    for i, vector in enumerate(vectors):
        others = np.arange(len(vectors)) != i
        distances = [np.linalg.norm(vector - vectors[others & (own == name)].mean(0)) for name in names]
        correct += names[int(np.argmin(distances))] == labels[i]
    return correct / len(vectors)


def infer_attribute(
    embeddings: Mapping[str, Mapping[str, Any]], attributes: Mapping[str, Mapping[str, str | None]]
) -> dict[str, Any]:
    """Return the accuracy for audit.json.

    Args:
        embeddings: Mean token embeddings (r) by module and client.
        attributes: Values by client and kind.

    Raises:
        NotApplicableError: The clients do not form groups.
    """
    sent = {client for by_client in embeddings.values() for client in by_client}
    kind, labels = chosen_attribute({client: values for client, values in attributes.items() if client in sent})
    clients = [client for client in labels if all(client in by_client for by_client in embeddings.values())]
    rows = [
        np.concatenate([by_client[client].float().numpy() for by_client in embeddings.values()]) for client in clients
    ]
    vectors = np.stack(rows)
    vectors = (vectors - vectors.mean(0)) / np.maximum(vectors.std(0), 1e-12)
    values = [labels[client] for client in clients]
    random = np.random.default_rng(0)
    chance = [nearest_centroids(vectors, random.permutation(values).tolist()) for _ in range(PERMUTATIONS)]
    accuracy = nearest_centroids(vectors, values)
    return {
        "attribute": kind,
        "accuracy": accuracy,
        "chance": float(np.mean(chance)),
        "p_value": float(np.mean([value >= accuracy for value in chance])),
        "clients": len(clients),
        "values": len(set(values)),
    }
