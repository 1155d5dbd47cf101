"""Masks: streams of pseudo-random 32-bit integers from the secrets of clients.

Two clients derive the same seed from their X25519 keys. For each tensor one of them adds the stream of this seed and
the other subtracts it (the order of the names decides), so that these pair masks cancel in the sum. Each client also
adds a mask of its own, whose seed it gives away only if its update is in the sum. Seeds are derived by HKDF-SHA256,
streams by ChaCha20.
"""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from fedamole.federation.secure.fixed_point import Words
from fedamole.federation.secure.statements import Context, canonical

SEED_BYTES = 32


def pair_secret(own: X25519PrivateKey, other: bytes, names: tuple[str, str], context: Context) -> bytes:
    """Return the secret that two clients share in one exchange; `names` are theirs in any order.

    Raises ValueError if `other` is not a public key, or one that gives the same secret with every key.
    """
    shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    info = canonical("pair", [*context], sorted(names))
    return HKDF(SHA256(), SEED_BYTES, salt=None, info=info).derive(shared)


def seed_of(secret: bytes, key: str) -> bytes:
    """Return the seed for one tensor; it says nothing about the secret or the seeds of other tensors."""
    return HKDFExpand(SHA256(), SEED_BYTES, canonical("seed", key)).derive(secret)


def stream(seed: bytes, numbers: int) -> Words:
    """Return the mask of a seed: (numbers) integers."""
    cipher = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(4 * numbers)), dtype="<u4").astype(np.uint32, copy=False)


def sign_of(own: str, other: str) -> int:
    """Return whether the client `own` adds (1) or subtracts (-1) the mask that it shares with another."""
    return 1 if own < other else -1


def add(total: Words, mask: Words, sign: int) -> None:
    """Add a mask to a sum in place, or subtract it if `sign` is -1."""
    (np.add if sign > 0 else np.subtract)(total, mask, out=total)
