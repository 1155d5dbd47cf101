"""What makes an assignment depend on who is who and not on who stands where: sorted ids and tie hashes."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Place = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]


def sorted_place(expert_ids: Sequence[str], client_ids: Sequence[str]) -> Place:
    """Give the open mesh that reads (or writes) an (E, C) array in the order of sorted ids.

    Shapes: (E, 1) and (1, C). Errors: `ValueError` where an id stands twice.
    """
    return _place(tuple(expert_ids), tuple(client_ids))


def tie_hashes(expert_ids: Sequence[str], client_ids: Sequence[str]) -> Hashes:
    """Give every (expert, client) a 64-bit number that depends on nothing but the two ids.

    Shapes: (E, C), read-only, in the order of the given ids. Python's own `hash` differs from process to
    process, hence blake2b.
    """
    return _hashes(tuple(expert_ids), tuple(client_ids))


# All modules of a round share their ids, so both are worked out once a round.
@lru_cache(maxsize=8)
def _place(expert_ids: tuple[str, ...], client_ids: tuple[str, ...]) -> Place:
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
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"ids must be unique, but {', '.join(twice)} stand more than once")
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
