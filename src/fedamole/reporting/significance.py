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
    low, high = interval(values)
    better, worse = sum(value > 0 for value in values), sum(value < 0 for value in values)
    if not higher:
        better, worse = worse, better
    averaged = [statistics.fmean(found) for found in clients.values()]
    return Gain(
        len(values),
        statistics.fmean(values),
        low,
        high,
        signed_rank(values),
        signed_rank(averaged),
        better,
        len(values) - better - worse,
        worse,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the 95 % interval of the mean, by Student's t; NaN for a single value and where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation(values) / math.sqrt(len(values))
    return mean - half, mean + half


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation of at least two values; NaN where one is not finite, as the loss of a diverged run."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def clear_best(values: Mapping[str, Mapping[tuple[Any, ...], float]], *, higher: bool) -> str | None:
    """Return the name with the best mean if it is clearly better than the runner-up, else None.

    `values` holds each name's numbers by (..., seed); `higher` ones are the better ones. Clearly better means that the
    95 % interval of the paired differences to the runner-up lies wholly on the better side of zero. With fewer than two
    seeds that both have, nothing is clear.
    """
    means = {name: statistics.fmean(found.values()) for name, found in values.items() if found}
    ranked = sorted((name for name in means if math.isfinite(means[name])), key=lambda name: means[name])
    if len(ranked) < 2:
        return None
    first, second = (ranked[-1], ranked[-2]) if higher else ranked[:2]
    pairs = values[first].keys() & values[second].keys()
    if len({key[-1] for key in pairs}) < 2:
        return None
    low, high = interval([values[first][key] - values[second][key] for key in sorted(pairs)])
    return first if (low > 0 if higher else high < 0) else None


STAR = (
    "* best of the trained methods, where the 95 % interval of its paired difference to the second best (over clients "
    "and seeds) excludes zero; no star with one seed."
)
"""What a star means, for the note below a table."""


def signed_rank(differences: Sequence[float]) -> float:
    """p of the two-sided Wilcoxon signed-rank test, ties left out; 1 where all are ties, NaN where one is no number."""
    if any(math.isnan(value) for value in differences):
        return math.nan
    if not any(differences):
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="wilcox", alternative="two-sided").pvalue)
