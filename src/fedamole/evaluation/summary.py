"""Scores over the clients of a federation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class OverClients:
    """One number per client, summarised."""

    mean: float
    worst: float
    """The lowest value, and whose it is."""
    worst_client: str
    spread: float
    """Standard deviation over the clients (population)."""


def over_clients(values: Mapping[str, float]) -> OverClients:
    """Summarise a score (higher is better) by client."""
    mean = sum(values.values()) / len(values)
    worst = min(values, key=lambda name: (values[name], name))
    spread = math.sqrt(sum((value - mean) ** 2 for value in values.values()) / len(values))
    return OverClients(mean, values[worst], worst, spread)
