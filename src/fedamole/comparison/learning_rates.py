"""Grids of learning rates: how wide they are, and how they are widened while the best rate is at an edge."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

LEAST_RATES, LEAST_RATIO = 5, 100.0
"""Values and ratio of the highest to the lowest (two decades) below which a grid is narrow."""


class Choice(NamedTuple):
    """The learning rate of a method in a scenario."""

    rate: float
    at_edge: bool
    """Whether it is the lowest or the highest rate that was tried, so that a better one may lie beyond."""


def narrowness(rates: Sequence[float]) -> str:
    """Return a warning for a grid of few values or a small range; empty for a wide one, and for no grid."""
    # The tolerance accepts rounded values such as 0.00316 and 0.316.
    if not rates or (len(rates) >= LEAST_RATES and max(rates) / min(rates) >= 0.99 * LEAST_RATIO):
        return ""
    lowest, highest = min(rates), max(rates)
    return (
        f"learning_rates: {len(rates)} value{'s'[: len(rates) != 1]} from {lowest:g} to {highest:g} are a narrow grid, "
        "so a method may be compared at a rate that does not suit it; give at least five values over two decades, for "
        "example [1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1]"
    )


def widened(rates: Sequence[float], limit: int, best: Callable[[Sequence[float]], Sequence[float]]) -> list[float]:
    """Return the rates, sorted, with those that are added while a best one is at an edge.

    `best(rates)` returns the best rate of each method that shares the grid, or nothing while one of these rates has
    not been tried. On each side at most `limit` rates are added, one after the other, by the grid's mean ratio of
    neighbours. A grid of one value has no ratio and stays.
    """
    grid = sorted(rates)
    if not grid:
        return []
    lowest, highest = grid[0], grid[-1]
    step = (highest / lowest) ** (1 / max(1, len(grid) - 1))
    below = above = 0
    while True:
        found = best(grid)
        if step == 1:
            return grid
        added = []
        if grid[0] in found and below < limit:
            below += 1
            added.append(_rounded(lowest / step**below))
        if grid[-1] in found and above < limit:
            above += 1
            added.append(_rounded(highest * step**above))
        if not added:
            return grid
        grid = sorted([*grid, *added])


def chosen(losses: Mapping[float, float]) -> Choice:
    """Return the rate with the lowest loss; of equal ones, as where all diverged, the lowest rate."""
    rates = sorted(losses)
    rate = min(rates, key=lambda rate: losses[rate])
    return Choice(rate, rate in (rates[0], rates[-1]))


def _rounded(rate: float) -> float:
    """Three digits, as the rate names a folder."""
    return round(rate, 2 - math.floor(math.log10(rate)))
