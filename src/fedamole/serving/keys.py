"""API keys: one key per client, which gives access to this client's model. The key file holds hashes only."""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedamole.errors import ConfigError
from fedamole.files import exclusive


@dataclass(frozen=True)
class ApiKeys:
    """SHA-256 hashes of API keys, by client. Keys are 256 random bits, so the hashes need no salt."""

    hashes: Mapping[str, str]

    def owner(self, key: str) -> str | None:
        """Return the client that a key belongs to, or None. The time taken does not depend on the key."""
        key_hash, owner = _hash(key), None
        for client, client_hash in self.hashes.items():
            if hmac.compare_digest(client_hash, key_hash):
                owner = client
        return owner


def read_keys(path: Path) -> ApiKeys:
    """Read a key file written by `make_keys`.

    Raises ConfigError if the file is missing, malformed, or accessible to other users of this machine.
    """
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: other users can read or change this file; run `chmod 600 {path}`")
        hashes = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; create it with `fedamole serve RUN --make-keys {path}`") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}); recreate it with --make-keys") from error
    valid = isinstance(hashes, dict) and all(
        isinstance(value, str) and len(value) == 64 and value.isascii() for value in hashes.values()
    )
    if not valid or len(set(hashes.values())) < len(hashes):
        raise ConfigError(f"{path}: not a key file with one key per client; recreate it with --make-keys")
    return ApiKeys(hashes)


def make_keys(path: Path, clients: Sequence[str]) -> dict[str, str]:
    """Create a key for each client that has none in the file, and return the new keys by client.

    Only hashes are stored, in a file with mode 0600; the returned keys cannot be recovered later. Raises ConfigError
    for an invalid or unwritable file, and RunError while another process creates keys in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(f".{path.name}.lock"), f"{path}: another process is creating keys; try again"):
        return _make_keys(path, clients)


def _make_keys(path: Path, clients: Sequence[str]) -> dict[str, str]:
    hashes = dict(read_keys(path).hashes) if path.exists() else {}
    keys = {client: f"fedamole-{secrets.token_urlsafe(32)}" for client in clients if client not in hashes}
    content = json.dumps({**hashes, **{client: _hash(key) for client, key in keys.items()}}, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another path") from error
    return keys


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
