"""Random generators for partitioning, derived from a seed and the names of their purpose; no global state."""

import hashlib

import numpy as np


def generator(seed: int, *words: str | int) -> np.random.Generator:
    """Return a generator that depends on the seed and on all words, so that purposes are independent."""
    digest = hashlib.sha256("\x1f".join(str(word) for word in words).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype="<u4").tolist()])


def derived_seed(seed: int, *words: str | int) -> int:
    """Return a seed in [0, 2^31) for libraries that accept only an integer."""
    return int(generator(seed, *words).integers(2**31))
