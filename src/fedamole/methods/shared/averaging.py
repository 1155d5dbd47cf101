"""The weighted mean of tensors over the clients that returned them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedamole.model.params import Tensors


def mean_by_key(replies: Mapping[str, Tensors], weights: Mapping[str, float], previous: Tensors) -> dict[str, Tensor]:
    """Average tensors by name over the clients that returned the name; what nobody returned keeps its value.

    `weights` (by client, any positive scale) are normalised among the holders of each key. Clients are summed in
    the order of their names and in float64, so the result does not depend on the order of arrival.
    """
    holders: dict[str, list[str]] = {}
    for client in sorted(replies):
        for key in replies[client]:
            holders.setdefault(key, []).append(client)
    means = {}
    for key, clients in holders.items():  # one key after the other, so that float64 takes no second pool of memory
        first = replies[clients[0]][key]
        total = torch.zeros_like(first, dtype=torch.float64)
        for client in clients:
            total += replies[client][key].to(torch.float64) * weights[client]
        means[key] = (total / sum(weights[client] for client in clients)).to(first.dtype)
    return {**previous, **means}
