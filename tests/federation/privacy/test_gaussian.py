"""The Gaussian mechanism: published values, another accountant, and noise that nobody can predict."""

import math

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.special import ndtr
from scipy.stats import kstest

from fedamole.errors import ConfigError
from fedamole.federation.privacy.gaussian import noise_multiplier, released, secret_noise, spent_epsilon


@pytest.mark.parametrize(("epsilon", "multiplier"), [(1.0, 3.731), (4.0, 1.081), (8.0, 0.600)])
def test_the_noise_of_the_analytic_mechanism(epsilon: float, multiplier: float) -> None:
    assert noise_multiplier(epsilon, 1e-5) == pytest.approx(multiplier, abs=5e-4)
    assert spent_epsilon(multiplier, 1e-5) == pytest.approx(epsilon, abs=0.01)


@pytest.mark.parametrize("releases", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
def test_several_releases_spend_what_was_asked_for(epsilon: float, releases: int) -> None:
    """By the closed form of Gaussian differential privacy, mu = sqrt(T) / m, and by the privacy loss distribution."""
    multiplier = noise_multiplier(epsilon, 1e-5, releases)
    mu = math.sqrt(releases) / multiplier
    delta = ndtr(-epsilon / mu + mu / 2) - math.exp(epsilon) * ndtr(-epsilon / mu - mu / 2)
    assert delta == pytest.approx(1e-5, rel=1e-6)
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(multiplier), releases))
    assert spent_epsilon(multiplier, 1e-5, releases) == pytest.approx(epsilon, abs=1e-6)
    assert accountant.get_epsilon(1e-5) == pytest.approx(epsilon, abs=1e-3)


def test_extreme_budgets() -> None:
    """Beyond any use, but no overflow: the noise falls with epsilon."""
    noises = [noise_multiplier(epsilon, 1e-5) for epsilon in (1e-6, 0.01, 1.0, 1e6, 1e12)]
    assert noises == sorted(noises, reverse=True)
    assert noises[-1] > 0
    assert math.isfinite(noises[0])


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(ConfigError, match=rf"^epsilon = {epsilon}: must be above 0 and finite$"):
        noise_multiplier(epsilon, 1e-5)
    with pytest.raises(ConfigError, match=rf"^noise multiplier = {epsilon}: must be above 0 and finite$"):
        spent_epsilon(epsilon, 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    for function in (noise_multiplier, spent_epsilon):
        with pytest.raises(ConfigError, match=rf"^delta = {delta}: must be above 0 and below 1$"):
            function(1.0, delta)
        with pytest.raises(ConfigError, match=r"^releases = 0: must be at least 1$"):
            function(1.0, 1e-5, 0)


def test_noise_is_standard_normal() -> None:
    noise = secret_noise(b"key", b"data", 20_000)
    assert noise.shape == (20_000,)
    assert kstest(noise, "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.02


def test_noise_follows_from_key_and_data_alone() -> None:
    first = secret_noise(b"k" * 32, b"data", 4000)
    assert np.array_equal(first, secret_noise(b"k" * 32, b"data", 4000))
    for other in (secret_noise(b"l" * 32, b"data", 4000), secret_noise(b"k" * 32, b"date", 4000)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.06
    assert not np.array_equal(secret_noise(b"a", b"bc", 4), secret_noise(b"ab", b"c", 4))


def test_a_release_adds_noise_in_proportion_to_the_sensitivity() -> None:
    values = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    noise = torch.from_numpy(secret_noise(b"key", values.numpy().tobytes(), 6)).view(2, 3)
    assert torch.allclose(released(values, 4.0, 0.6, b"key"), values + 2.4 * noise)
    assert torch.equal(released(values, 0.0, 0.6, b"key"), values)
