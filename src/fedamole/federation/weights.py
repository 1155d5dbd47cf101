"""Weights of clients in an average."""

import math
from collections.abc import Mapping


def capped(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Lower the largest weights to a common level, so that no client's share of the sum is above `share`.

    Weights of 0 stay 0. If `share` is too small for the number of clients with a weight, all of these get the same.
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
