"""Is one method better than another: paired differences, their interval and a rank test.

Pairs are (client, seed). All clients of a partition come from the same few data sets, take part in the same
federation, and share the base; one client's seeds share its data. So pairs are not independent draws: the interval is
too narrow and p over the pairs is optimistic. Averaging each client over its seeds first removes the worst of it; both
are given. Neither says anything about another partition, another base or other data.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats


@dataclass(frozen=True)
class Gain:
    """Differences of a reference and another method."""

    pairs: int
    mean: float
    low: float
    """Ends of the 95 % interval of the mean (Student's t over the pairs); NaN for a single pair."""
    high: float
    p_pairs: float
    """Two-sided Wilcoxon signed-rank test over the pairs; optimistic, see above."""
    p_clients: float
    """The same over the clients, each averaged over its seeds first."""
    wins: int
    """Pairs in which the reference is better."""
    ties: int
    losses: int


def gain(differences: Mapping[tuple[Any, ...], float], *, higher: bool) -> Gain:
    """Work out the gain from differences by (..., client, seed), at least one; `higher` values are the better ones."""
    values = list(differences.values())
    clients: dict[tuple[Any, ...], list[float]] = {}
    for key, value in differences.items():
        clients.setdefault(key[:-1], []).append(value)
    mean = statistics.fmean(values)
    half = math.nan
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    better, worse = sum(value > 0 for value in values), sum(value < 0 for value in values)
    if not higher:
        better, worse = worse, better
    averaged = [statistics.fmean(found) for found in clients.values()]
    return Gain(
        len(values), mean, mean - half, mean + half, signed_rank(values), signed_rank(averaged),
        better, len(values) - better - worse, worse,
    )


def signed_rank(differences: Sequence[float]) -> float:
    """p of the two-sided Wilcoxon signed-rank test, ties left out; 1 where all are ties, NaN where one is no number."""
    if any(math.isnan(value) for value in differences):
        return math.nan
    if not any(differences):
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="wilcox", alternative="two-sided").pvalue)
