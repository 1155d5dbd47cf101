"""Statistics of paired differences: confidence interval, Wilcoxon signed-rank test, and the star of a table.

A pair is one client with one seed. All clients of a partition come from the same few data sets, train in the same
federation and share the base, and the seeds of one client share its data. The pairs are therefore not independent: the
interval is too narrow and the p-value over pairs is optimistic. The p-value over clients, which averages each client
over its seeds first, removes most of this bias. Neither p-value extends to other partitions, bases or data.

The functions use the standard library only. Importing scipy.stats takes about a second, and `fedamole show` and
`fedamole report` need nothing else from it.
"""

import functools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STAR = (
    "* best of the trained methods, where the 95 % interval of its paired difference to the second best (over clients "
    "and seeds) excludes zero; no star with one seed."
)
"""Explanation of the star, for the caption of a table."""

EXACT_LIMIT, EXACT_LIMIT_WITH_TIES = 50, 13
"""Most differences for which the signed-rank test is exact: all distinct in size and non-zero, or any. As in SciPy."""


@dataclass(frozen=True)
class Gain:
    """Differences between a reference and another method, summarised over pairs."""

    pairs: int
    mean: float
    low: float
    """Lower end of the 95 % interval of the mean (Student's t over the pairs); NaN for a single pair."""
    high: float
    """Upper end of the interval."""
    p_pairs: float
    """p-value of the two-sided Wilcoxon signed-rank test over the pairs; optimistic, see the module's docstring."""
    p_clients: float
    """p-value of the same test over the clients, each averaged over its seeds first."""
    wins: int
    """Pairs in which the reference is better."""
    ties: int
    losses: int


def gain(differences: Mapping[tuple[Any, ...], float], *, higher: bool) -> Gain:
    """Summarise differences (reference minus other method).

    Args:
        differences: At least one difference by (..., client, seed).
        higher: Whether higher values are better.
    """
    values = list(differences.values())
    by_client: dict[tuple[Any, ...], list[float]] = {}
    for key, value in differences.items():
        by_client.setdefault(key[:-1], []).append(value)
    low, high = interval(values)
    positive, negative = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return Gain(
        pairs=len(values),
        mean=statistics.fmean(values),
        low=low,
        high=high,
        p_pairs=signed_rank(values),
        p_clients=signed_rank([statistics.fmean(of_client) for of_client in by_client.values()]),
        wins=positive if higher else negative,
        ties=len(values) - positive - negative,
        losses=negative if higher else positive,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean, by Student's t.

    Both ends are NaN for a single value, and if a value is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    mean = statistics.fmean(values)
    half_width = t_quantile(len(values) - 1) * deviation(values) / math.sqrt(len(values))
    return mean - half_width, mean + half_width


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation of at least two values; NaN if one is not finite (a diverged run)."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


@functools.cache
def t_quantile(degrees: int) -> float:
    """Return the 0.975 quantile of Student's t distribution with a whole number of degrees of freedom.

    P(|T| <= t) is a finite series in theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun, 26.7.3 and 26.7.4), which
    is inverted by bisection over theta.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (theta, high) if _probability_within(theta, degrees) < 0.95 else (low, theta)
    return math.sqrt(degrees) * math.tan(high)


def _probability_within(theta: float, degrees: int) -> float:
    """Return P(|T| <= sqrt(degrees) * tan(theta)) for Student's t."""
    odd = degrees % 2
    sine, cosine = math.sin(theta), math.cos(theta)
    term = cosine if odd else 1.0
    series = 0.0
    for power in range(odd, degrees - 1, 2):
        series += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + sine * series) if odd else sine * series


def signed_rank(differences: Sequence[float]) -> float:
    """Return the p-value of the two-sided Wilcoxon signed-rank test; zero differences are left out.

    The test is exact for few differences (see EXACT_LIMIT) and a normal approximation with a correction for ties for
    more, as `scipy.stats.wilcoxon(method="auto")`. The result is 1 if all differences are zero, and NaN if one is NaN.
    """
    if any(math.isnan(value) for value in differences):
        return math.nan
    nonzero = [value for value in differences if value]
    if not nonzero:
        return 1.0
    counts = Counter(map(abs, nonzero))
    doubled_ranks = _doubled_ranks(counts)
    ranks = [doubled_ranks[abs(value)] for value in nonzero]
    positive = sum(rank for rank, value in zip(ranks, nonzero, strict=True) if value > 0)
    distinct = len(counts) == len(differences)
    if len(differences) <= (EXACT_LIMIT if distinct else EXACT_LIMIT_WITH_TIES):
        return _exact_p(ranks, positive)
    number = len(nonzero)
    tied = sum(count**3 - count for count in counts.values())
    error = math.sqrt((number * (number + 1) * (2 * number + 1) - tied / 2) / 24)
    return math.erfc(abs(positive / 2 - number * (number + 1) / 4) / error / math.sqrt(2))


def _doubled_ranks(counts: Mapping[float, int]) -> dict[float, int]:
    """Return twice the rank of each size, which is a whole number also where equal sizes share their mean rank."""
    ranks, before = {}, 0
    for size in sorted(counts):
        ranks[size] = 2 * before + counts[size] + 1
        before += counts[size]
    return ranks


def _exact_p(ranks: Sequence[int], positive: int) -> float:
    """Return the two-sided p-value of a sum of positive ranks, where every choice of signs is equally likely."""
    ways = Counter({0: 1})
    for rank in ranks:
        ways.update({total + rank: number for total, number in ways.items()})
    below: int = sum(number for total, number in ways.items() if total <= positive)
    above: int = sum(number for total, number in ways.items() if total >= positive)
    return min(1.0, 2.0 * min(below, above) / 2.0 ** len(ranks))


def clear_best(values: Mapping[str, Mapping[tuple[Any, ...], float]], *, higher: bool) -> str | None:
    """Return the name with the best mean if it is clearly better than the second best, else None.

    Clearly better: the 95 % interval of the paired differences to the second best lies on the better side of zero. This
    needs at least two seeds that both names have.

    Args:
        values: Values of each name by (..., seed).
        higher: Whether higher values are better.
    """
    means = {name: statistics.fmean(by_key.values()) for name, by_key in values.items() if by_key}
    ranked = sorted((name for name in means if math.isfinite(means[name])), key=lambda name: means[name])
    if len(ranked) < 2:
        return None
    first, second = (ranked[-1], ranked[-2]) if higher else ranked[:2]
    pairs = values[first].keys() & values[second].keys()
    if len({key[-1] for key in pairs}) < 2:
        return None
    low, high = interval([values[first][key] - values[second][key] for key in sorted(pairs)])
    return first if (low > 0 if higher else high < 0) else None
