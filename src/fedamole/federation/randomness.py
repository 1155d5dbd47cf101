"""Every random number comes from (seed, purpose, client, round), so no result depends on what ran before it."""

import hashlib

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, client: str = "", round_: int = -1) -> int:
    """Return a 63-bit seed for one purpose of one client in one round."""
    key = f"{seed}\0{purpose}\0{client}\0{round_}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def torch_generator(seed: int, purpose: str, client: str = "", round_: int = -1) -> torch.Generator:
    """Return a CPU generator of torch for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, client, round_))


def numpy_generator(seed: int, purpose: str, client: str = "", round_: int = -1) -> np.random.Generator:
    """Return a generator of NumPy for one purpose."""
    return np.random.default_rng(derived_seed(seed, purpose, client, round_))
