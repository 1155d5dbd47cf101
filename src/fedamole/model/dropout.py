"""Dropout masks as a function of place: of (client, step, example, position in it) and (module, feature) alone.

A mask from a generator depends on how many numbers were drawn before it, hence on batch, padding and neighbours. Here
every number of a mask is the hash of a key of its row and a key of its column, so a client's masks are the same
alone, in a group, padded, packed, on a CPU and on a GPU, and one expression draws them for all clients at once.
"""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
LONGEST = 2**20
"""More positions than any sequence has."""


def _mixed(values: np.ndarray) -> Tensor:
    """Scatter 64-bit integers over all 31-bit ones (the finaliser of SplitMix64), as int32."""
    z = values.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int32))


def row_keys(seeds: np.ndarray, examples: np.ndarray, positions: np.ndarray) -> Tensor:
    """Keys (T) of tokens: `seeds` (T) stand for (client, step), `examples` and `positions` (T) for the places in it."""
    place = examples.astype(np.uint64) * np.uint64(LONGEST) + positions.astype(np.uint64) + np.uint64(1)
    return _mixed(seeds.astype(np.uint64) + place * np.uint64(_GOLDEN))


def column_keys(module: int, features: int) -> Tensor:
    """Keys (d) of the features of a module, the `module`-th of its base."""
    place = np.arange(features, dtype=np.uint64) + np.uint64(module + 1) * np.uint64(2**32)
    return _mixed(place * np.uint64(_GOLDEN))


def dropped(rows: Tensor, columns: Tensor, share: float) -> Tensor:
    """Mask (T, d) of bool that is true for about this share of the values, from keys (T) and (d) of int32."""
    z = rows.unsqueeze(1) ^ columns
    # Multiplications wrap round; two of them with a shift between let every bit of a key reach the highest bits.
    z.mul_(0x7FEB352D).bitwise_xor_(z >> 15).mul_(0x846CA68B - 2**32)
    return z < round(share * 2**32) - 2**31
