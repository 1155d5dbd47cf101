"""Generators of the partition: from its seed and words that say what for, never from a global state."""

import hashlib

import numpy as np


def generator(seed: int, *words: str | int) -> np.random.Generator:
    """A generator that depends on the seed and on every word, so that one purpose never disturbs another."""
    digest = hashlib.sha256("\x1f".join(str(word) for word in words).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype="<u4").tolist()])


def derived_seed(seed: int, *words: str | int) -> int:
    """A seed in [0, 2^31) for a library that takes only an integer."""
    return int(generator(seed, *words).integers(2**31))
