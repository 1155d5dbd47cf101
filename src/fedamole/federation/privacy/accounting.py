"""Epsilon of noised training steps, and the noise that a budget requires.

A step samples each of n examples with probability q (a Poisson sample), sums their clipped gradients, and adds Gaussian
noise with standard deviation noise * clip. Neighbouring data sets differ in one example, which contributes nothing in
one of them. `dp_accounting` computes epsilon: with q < 1 from the privacy loss distribution (PLD), rounded up, and with
q = 1 exactly: Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018,
https://arxiv.org/abs/1805.06530, theorem 8, for sensitivity 1 and standard deviation 1 / sqrt(sum of steps / noise^2).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

PRECISION = 1e-3
"""Interval by which the PLD is discretised, and relative precision of `noise_for`."""


@dataclass(frozen=True)
class NoisedSteps:
    """Steps that were noised alike."""

    sampling: float
    """Probability q of an example to be in the batch of a step."""
    noise: float
    """Standard deviation of the noise as a multiple of the clip (noise multiplier)."""
    steps: int


def epsilon_of(releases: Iterable[NoisedSteps], delta: float) -> float:
    """Return epsilon at `delta` of all these steps together, on the same examples; 0 without steps."""
    counts = Counter[tuple[float, float]]()
    for release in releases:
        counts[release.sampling, release.noise] += release.steps
    return _epsilon(tuple(sorted((q, noise, steps) for (q, noise), steps in counts.items() if steps)), delta)


def parallel(epsilons: Iterable[float]) -> float:
    """Return epsilon of releases that each read another of several disjoint splits: the largest; 0 without any."""
    return max(epsilons, default=0.0)


@lru_cache(maxsize=4096)
def _epsilon(releases: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not releases:
        return 0.0
    if all(q >= 1 for q, _, _ in releases):
        return gaussian_epsilon(math.sqrt(sum(steps / noise**2 for _, noise, steps in releases)), delta)
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=PRECISION)
    for q, noise, steps in releases:
        step = GaussianDpEvent(noise) if q >= 1 else PoissonSampledDpEvent(q, GaussianDpEvent(noise))
        accountant.compose(SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at `delta` of a Gaussian mechanism with sensitivity / standard deviation `mu`."""
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(1 / mu, delta))


@lru_cache(maxsize=4096)
def noise_for(epsilon: float, delta: float, sampling: float, steps: int) -> float:
    """Return a noise multiplier with which `steps` steps have at most this epsilon, at most 0.1 % above the smallest.

    Returns infinity if a multiplier of 1e6 is not enough.
    """

    def enough(noise: float) -> bool:
        return epsilon_of([NoisedSteps(sampling, noise, steps)], delta) <= epsilon

    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, high * 2
        if high > 1e6:
            return math.inf
    while low == 0.0:  # below 0.1 the PLD becomes large, and more noise costs nothing there
        if high <= 0.2 or not enough(high / 2):
            low = high / 2
        else:
            high /= 2
    while high > low * (1 + PRECISION):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
