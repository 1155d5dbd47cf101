"""Sorted ids and tie hashes, which make an assignment independent of the order of experts and clients."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Index = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]


def sorted_index(expert_ids: Sequence[str], client_ids: Sequence[str]) -> Index:
    """Return the index arrays that read or write an (E, C) array in the order of sorted ids.

    Shapes: (E, 1) and (1, C). Errors: `ValueError` for duplicate ids.
    """
    return _index(tuple(expert_ids), tuple(client_ids))


def tie_hashes(expert_ids: Sequence[str], client_ids: Sequence[str]) -> Hashes:
    """Return a 64-bit hash of every (expert id, client id) pair.

    Shapes: (E, C), read-only, in the order of the given ids. The hash is blake2b, as Python's `hash` differs between
    processes.
    """
    return _hashes(tuple(expert_ids), tuple(client_ids))


# All modules of a round have the same ids, so the results are cached.
@lru_cache(maxsize=8)
def _index(expert_ids: tuple[str, ...], client_ids: tuple[str, ...]) -> Index:
    return _order(expert_ids)[:, None], _order(client_ids)[None, :]


@lru_cache(maxsize=8)
def _hashes(expert_ids: tuple[str, ...], client_ids: tuple[str, ...]) -> Hashes:
    experts = np.array([_digest("expert:" + i) for i in expert_ids], dtype=np.uint64)
    clients = np.array([_digest("client:" + c) for c in client_ids], dtype=np.uint64)
    hashes = _mix(_mix(experts)[:, None] + clients[None, :])
    hashes.flags.writeable = False
    return hashes


def _order(ids: tuple[str, ...]) -> npt.NDArray[np.intp]:
    if len(set(ids)) != len(ids):
        duplicates = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"ids must be unique, but {', '.join(duplicates)} occur more than once")
    order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.intp)
    order.flags.writeable = False
    return order


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: Hashes) -> Hashes:
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014): unsigned arithmetic that wraps by design.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
