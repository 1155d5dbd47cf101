"""Random numbers that nobody but the client can know: the Poisson samples and the noise of private training.

All other random numbers of a run come from its seed, which the coordinator has. These come from a key of the operating
system's generator, expanded by SHAKE-256. Each training gets a new key, which lives in memory only; so no noise is ever
used twice, and there is no key on a disk that could be copied or read.
"""

import hashlib
import os

import numpy as np

DRAWS = 4
"""Gaussian draws whose mean, times 2, is one noise value. Single draws in floating point leave gaps between values by
which noise can be recognised (Holohan and Braghin, ESORICS 2021, https://arxiv.org/abs/2107.10138)."""


class SecretRandom:
    """A stream of random numbers with a secret key."""

    def __init__(self, key: bytes | None = None) -> None:
        """Start a stream; `key` is for tests, by default it is new."""
        self._key, self._reads = os.urandom(32) if key is None else key, 0

    def __repr__(self) -> str:
        """Return a text without the key."""
        return "SecretRandom()"

    def __reduce__(self) -> str:
        """Raise TypeError: the key never leaves the process."""
        raise TypeError("a SecretRandom cannot be pickled or copied")

    def uniform(self, count: int) -> np.ndarray:
        """Return numbers (count) above 0 and below 1, float64."""
        label = self._reads.to_bytes(8, "big")
        self._reads += 1
        stream = hashlib.shake_256(self._key + label).digest(8 * count)
        return ((np.frombuffer(stream, "<u8") >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def poisson_sample(self, count: int, probability: float) -> list[int]:
        """Return the indices below `count` in a sample that includes each with this probability, independently."""
        return np.flatnonzero(self.uniform(count) < probability).tolist()

    def normal(self, count: int) -> np.ndarray:
        """Return standard normal numbers (count), float64; each is the sum of `DRAWS` draws, divided by 2."""
        total = np.zeros(count)
        for _ in range(DRAWS // 2):  # Box and Muller: two uniform numbers become two normal ones
            radius, angle = np.sqrt(-2 * np.log(self.uniform(count))), 2 * np.pi * self.uniform(count)
            total += radius * np.cos(angle) + radius * np.sin(angle)
        total /= np.sqrt(DRAWS)
        return total
