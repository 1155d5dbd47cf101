"""Grid search over learning rates: width of a grid, and widening while the best rate is at an edge."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

MIN_RATES, MIN_RATIO = 5, 100.0
"""A grid with fewer values, or with a smaller ratio of highest to lowest (two decades), is narrow."""


class Choice(NamedTuple):
    """The learning rate chosen for a method in a scenario."""

    rate: float
    at_edge: bool
    """Whether it is the lowest or highest rate tried, so that a better one may lie beyond."""


def narrowness(rates: Sequence[float]) -> str:
    """Return a warning for a grid with few values or a small range; empty for a wide grid and for none."""
    # The tolerance accepts rounded values such as 0.00316 and 0.316.
    if not rates or (len(rates) >= MIN_RATES and max(rates) / min(rates) >= 0.99 * MIN_RATIO):
        return ""
    lowest, highest = min(rates), max(rates)
    return (
        f"learning_rates: {len(rates)} value{'s'[: len(rates) != 1]} from {lowest:g} to {highest:g} are a narrow grid, "
        "so a method may be compared at an unsuitable rate; give at least five values over two decades, for "
        "example [1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1]"
    )


def widened(rates: Sequence[float], limit: int, best: Callable[[Sequence[float]], Sequence[float]]) -> list[float]:
    """Return the sorted rates, extended while a best rate is at an edge.

    Rates are added one at a time, by the grid's mean ratio of neighbours. A grid of one value has no ratio and is not
    extended.

    Args:
        rates: The configured grid.
        limit: Maximum number of rates to add on each side.
        best: Returns the best rate of each method that shares the grid; empty while a rate has not been tried.
    """
    grid = sorted(rates)
    if not grid:
        return []
    lowest, highest = grid[0], grid[-1]
    ratio = (highest / lowest) ** (1 / max(1, len(grid) - 1))
    below = above = 0
    while True:
        best_rates = best(grid)
        if ratio == 1:
            return grid
        added = []
        if grid[0] in best_rates and below < limit:
            below += 1
            added.append(_rounded(lowest / ratio**below))
        if grid[-1] in best_rates and above < limit:
            above += 1
            added.append(_rounded(highest * ratio**above))
        if not added:
            return grid
        grid = sorted([*grid, *added])


def chosen(losses: Mapping[float, float]) -> Choice:
    """Return the rate with the lowest loss; of equal losses (all diverged, for example), the lowest rate."""
    rates = sorted(losses)
    rate = min(rates, key=lambda rate: losses[rate])
    return Choice(rate, rate in (rates[0], rates[-1]))


def _rounded(rate: float) -> float:
    """Round to three digits, because the rate is part of a folder name."""
    return round(rate, 2 - math.floor(math.log10(rate)))
