"""The Gaussian mechanism: how much noise (epsilon, delta)-differential privacy needs, and noise from a secret key.

A release of a function with L2 sensitivity D adds normal noise with standard deviation m D to each of its values; m is
the noise multiplier. T releases with one multiplier are together as private as one with m / sqrt(T), which is Gaussian
differential privacy with mu = sqrt(T) / m (Dong, Roth and Su, https://arxiv.org/abs/1905.02383). Epsilon and multiplier
are those of the analytic mechanism (Balle and Wang, ICML 2018, https://arxiv.org/abs/1805.06530), computed by
`dp_accounting`.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from fedamole.errors import ConfigError
from fedamole.federation.privacy.accounting import gaussian_epsilon

DRAWS = 4
"""Normal draws whose sum, divided by 2, is one value of the noise. A single draw in floating point leaves gaps between
its values by which noise can be recognised (Holohan and Braghin, 2021, https://arxiv.org/abs/2107.10138)."""


def noise_multiplier(epsilon: float, delta: float, releases: int = 1) -> float:
    """Return the smallest noise multiplier with which `releases` releases together are (epsilon, delta)-private.

    Raises ConfigError unless epsilon is above 0 and finite, delta is between 0 and 1, and there is a release.
    """
    _check("epsilon", epsilon, 0 < epsilon < math.inf, "above 0 and finite")
    _check_releases(delta, releases)
    from dp_accounting import get_sigma_gaussian  # takes a second to import, which no other method should wait for

    return math.sqrt(releases) * float(get_sigma_gaussian(epsilon, delta))


def spent_epsilon(multiplier: float, delta: float, releases: int = 1) -> float:
    """Return the epsilon, at `delta`, of `releases` releases with one noise multiplier.

    Raises ConfigError unless the multiplier is above 0 and finite, delta is between 0 and 1, and there is a release.
    """
    _check("noise multiplier", multiplier, 0 < multiplier < math.inf, "above 0 and finite")
    _check_releases(delta, releases)
    return gaussian_epsilon(math.sqrt(releases) / multiplier, delta)


def released(values: Tensor, sensitivity: float, multiplier: float, key: bytes) -> Tensor:
    """Return values (float64, on the CPU) with noise from `secret_noise`, which only the values and the key decide."""
    noise = secret_noise(key, values.numpy().tobytes(), values.numel())
    return values + sensitivity * multiplier * torch.from_numpy(noise).view_as(values)


def secret_noise(key: bytes, data: bytes, count: int) -> np.ndarray:
    """Return standard normal numbers (count), float64, that nobody can compute without the key.

    They are a function of key and data alone: the same data always get the same noise, so asking again reveals nothing
    new, and other data get independent noise. SHAKE-256 of both is the source of randomness.
    """
    prefix = len(key).to_bytes(8, "big") + key
    stream = hashlib.shake_256(prefix + data).digest(8 * 2 * DRAWS * count)
    bits = np.frombuffer(stream, "<u8") >> np.uint64(12)
    first, second = ((bits.astype(np.float64) + 0.5) * 2.0**-52).reshape(2, DRAWS, count)
    normals = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)  # Box and Muller
    total: np.ndarray = normals.sum(0) / math.sqrt(DRAWS)
    return total


def _check_releases(delta: float, releases: int) -> None:
    _check("delta", delta, 0 < delta < 1, "above 0 and below 1")
    _check("releases", releases, releases >= 1, "at least 1")


def _check(name: str, value: float, valid: bool, must: str) -> None:
    if not valid:
        raise ConfigError(f"{name} = {value}: must be {must}")
