"""Counter-based dropout masks: a function of (client, step, example, position) and (module, feature) alone.

A mask from a random generator depends on how many numbers were drawn before, and so on batch, padding and the other
clients. Here each element of a mask is a hash of a row key and a column key. A client's masks are therefore the same
alone and in a group, padded and packed, on a CPU and on a GPU, and one expression computes them for all clients.
"""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
LONGEST = 2**20
"""Upper bound of the positions of a sequence."""


def _hash(values: np.ndarray) -> Tensor:
    """Hash 64-bit integers to 31 bits (the finaliser of SplitMix64), as int32."""
    z = values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int32))


def row_keys(seeds: np.ndarray, examples: np.ndarray, positions: np.ndarray) -> Tensor:
    """Return the row keys (T) of tokens, from the seed of (client, step), the example and the position, (T) each."""
    index = examples.astype(np.uint64) * np.uint64(LONGEST) + positions.astype(np.uint64) + np.uint64(1)
    return _hash(seeds.astype(np.uint64) + index * np.uint64(_GOLDEN))


def column_keys(module: int, features: int) -> Tensor:
    """Return the column keys (d) of the features of the `module`-th adapted module of a base."""
    index = np.arange(features, dtype=np.uint64) + np.uint64(module + 1) * np.uint64(2**32)
    return _hash(index * np.uint64(_GOLDEN))


def dropped(rows: Tensor, columns: Tensor, probability: float) -> Tensor:
    """Return a bool mask (T, d) that is True with this probability, from int32 row keys (T) and column keys (d)."""
    z = rows.unsqueeze(1) ^ columns
    # Multiplication wraps around. Two of them with a shift between propagate every bit to the highest bits.
    z.mul_(0x7FEB352D).bitwise_xor_(z >> 15).mul_(0x846CA68B - 2**32)
    return z < round(probability * 2**32) - 2**31
