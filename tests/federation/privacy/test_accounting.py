"""Epsilon equals that of dp_accounting and of the closed form; the noise is the smallest that a budget allows."""

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

from fedamole.federation.privacy.accounting import NoisedSteps, epsilon_of, gaussian_epsilon, noise_for, parallel


@pytest.mark.parametrize(("q", "noise", "steps"), [(0.008, 0.73, 750), (0.064, 2.25, 600), (0.5, 3.0, 9)])
def test_sampled_steps_equal_the_library(q: float, noise: float, steps: int) -> None:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    assert epsilon_of([NoisedSteps(q, noise, steps)], 1e-4) == pytest.approx(accountant.get_epsilon(1e-4), abs=1e-9)


def test_the_figures_of_a_published_table() -> None:
    """PLD of q = 0.008, noise 0.73, 750 steps, delta 1e-4: 2.35; unsampled noise 5.68 for 30 rounds, delta 1e-3: 3."""
    assert epsilon_of([NoisedSteps(0.008, 0.73, 750)], 1e-4) == pytest.approx(2.35, abs=0.01)
    assert epsilon_of([NoisedSteps(1.0, 5.68, 30)], 1e-3) == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("mu", [0.01, 0.5, 1.0, 3.0, 10.0])
def test_the_closed_form_solves_the_equation_of_balle_and_wang(mu: float) -> None:
    for delta in (1e-9, 1e-5, 1e-3):
        epsilon = gaussian_epsilon(mu, delta)
        reached = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        assert epsilon == 0 or reached == pytest.approx(delta, rel=1e-6)
    assert epsilon_of([NoisedSteps(1.0, 2.0, 3), NoisedSteps(1.0, 4.0, 4)], 1e-5) == pytest.approx(
        gaussian_epsilon(math.sqrt(3 / 4 + 4 / 16), 1e-5), abs=1e-12
    )


def test_releases_are_composed_whatever_their_order() -> None:
    parts = [NoisedSteps(0.1, 2.0, 5), NoisedSteps(0.2, 3.0, 4), NoisedSteps(0.1, 2.0, 2)]
    joined = [NoisedSteps(0.2, 3.0, 4), NoisedSteps(0.1, 2.0, 7)]
    assert epsilon_of(parts, 1e-5) == epsilon_of(joined, 1e-5) > epsilon_of(parts[:2], 1e-5)
    assert epsilon_of([], 1e-5) == epsilon_of([NoisedSteps(0.1, 0.0, 0)], 1e-5) == 0
    assert parallel([1.0, 3.0, 2.0]) == 3.0


@pytest.mark.parametrize(("epsilon", "q", "steps"), [(3.0, 0.008, 750), (8.0, 0.2, 9), (1.0, 1.0, 30), (60.0, 0.5, 2)])
def test_the_noise_meets_the_budget_and_hardly_less_would(epsilon: float, q: float, steps: int) -> None:
    noise = noise_for(epsilon, 1e-4, q, steps)
    assert epsilon_of([NoisedSteps(q, noise, steps)], 1e-4) <= epsilon
    if noise > 0.2:
        assert epsilon_of([NoisedSteps(q, noise / 1.005, steps)], 1e-4) > epsilon
