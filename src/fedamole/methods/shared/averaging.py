"""The mean over whoever returned a key, and the weights in it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


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


def capped(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Lower the largest weights to one common level, so that nobody's share of their sum is above `share`.

    Weights of 0 stay 0. Where `share` is too small for the clients that have a weight, all of them weigh alike.
    """
    order = sorted((weight for weight in weights.values() if weight > 0), reverse=True)
    rest, level = sum(order), math.inf
    for count, largest in enumerate(order):
        # With `count` weights at the level L and a sum R of the others: L = share (count L + R).
        free = 1 - count * share
        level = share * rest / free if free > 1e-9 else order[-1]
        if largest <= level or free <= 1e-9:
            break
        rest -= largest
    else:
        level = min(order, default=0.0)
    return {name: min(weight, level) for name, weight in weights.items()}
