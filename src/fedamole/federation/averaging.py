"""The mean over whoever returned a key."""

from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def mean_by_key(replies: Mapping[str, Tensors], weights: Mapping[str, float], previous: Tensors) -> dict[str, Tensor]:
    """Average tensors by name over the clients that returned the name; what nobody returned keeps its value.

    `weights` (by client, any positive scale) are normalised among the holders of each key. Clients are summed in
    the order of their names and in float64, so the result does not depend on the order of arrival.
    """
    sums: dict[str, Tensor] = {}
    totals: dict[str, float] = {}
    for client in sorted(replies):
        for key, tensor in replies[client].items():
            part = tensor.to(torch.float64) * weights[client]
            sums[key] = sums[key] + part if key in sums else part
            totals[key] = totals.get(key, 0.0) + weights[client]
    means = {key: (total / totals[key]).to(_dtype(replies, key)) for key, total in sums.items()}
    return {**previous, **means}


def _dtype(replies: Mapping[str, Tensors], key: str) -> torch.dtype:
    """Return the dtype in which a key was returned."""
    return next(tensors[key].dtype for tensors in replies.values() if key in tensors)
