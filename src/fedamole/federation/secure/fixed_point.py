"""Numbers as 32-bit integers whose sums are exact, so that masks cancel to the last bit.

A value x is round(clip(x) * 2^20) modulo 2^32. The sum of n values does not wrap while n * clip < 2048; the mean of n
values differs from that of the unrounded ones by at most 2^-21.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedamole.federation.secure.settings import FRACTION_BITS
from fedamole.federation.secure.statements import SecureAggregationError

Words = npt.NDArray[np.uint32]
"""Integers modulo 2^32; additions of NumPy wrap."""
SCALE = 2.0**FRACTION_BITS


class Encoded(NamedTuple):
    """Values as integers."""

    words: Words
    clipped: int
    """How many values were outside -clip .. clip and were cut to it."""


def encode(values: npt.NDArray[np.float64], clip: float) -> Encoded:
    """Return values (n) as integers (n). Raises SecureAggregationError for NaN, which has no integer."""
    if np.isnan(values).any():
        raise SecureAggregationError("an update holds NaN, which cannot be summed")
    inside = np.clip(values, -clip, clip)
    integers = np.rint(inside * SCALE).astype(np.int64)
    return Encoded((integers % 2**32).astype(np.uint32), int((inside != values).sum()))


def decode(total: Words) -> npt.NDArray[np.float64]:
    """Return a sum (n) of encoded values as numbers (n)."""
    return total.astype(np.int32).astype(np.float64) / SCALE
