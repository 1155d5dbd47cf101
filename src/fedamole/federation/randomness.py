"""Random generators derived from (seed, purpose, client, round).

A result never depends on what ran before it, so a resumed run repeats a round to the bit.
"""

import hashlib

import numpy as np
import torch


def derived_seed(seed: int, purpose: str, client: str = "", round_: int = -1) -> int:
    """Return a seed (63 bits) for one purpose, such as the order of batches, of one client in one round."""
    key = f"{seed}\0{purpose}\0{client}\0{round_}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def torch_generator(seed: int, purpose: str, client: str = "", round_: int = -1) -> torch.Generator:
    """Return a PyTorch generator on the CPU with the seed of `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, client, round_))


def numpy_generator(seed: int, purpose: str, client: str = "", round_: int = -1) -> np.random.Generator:
    """Return a NumPy generator with the seed of `derived_seed`."""
    return np.random.default_rng(derived_seed(seed, purpose, client, round_))


def exchange_seed(seed: int, exchange: int) -> int:
    """Return the seed of local training in one exchange of a round; that of the first (0) is the run's own seed."""
    return seed if exchange == 0 else derived_seed(seed, f"exchange/{exchange}")


def seeded_key(seed: int, client: str) -> bytes:
    """Return 32 bytes for the noise of a client; whoever knows the seed can compute them."""
    return hashlib.sha256(f"{seed}\0key\0{client}".encode()).digest()
