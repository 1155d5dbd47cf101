"""A file of keys: whose key opens which client's model. It holds hashes, so a copy of it opens nothing."""

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
class Keys:
    """SHA-256 of each client's key, which is as random as its hash is long and so needs no salt."""

    hashes: Mapping[str, str]

    def owner(self, key: str) -> str | None:
        """The client whose key this is; takes as long whosever it is, and for a wrong one."""
        wanted, found = _hash(key), None
        for client, known in self.hashes.items():
            if hmac.compare_digest(known, wanted):
                found = client
        return found


def read_keys(path: Path) -> Keys:
    """Read a file made by `make_keys`; one that is damaged, or open to others, is a ConfigError."""
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others on this machine can read or change it; `chmod 600 {path}`")
        hashes = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}; make it by `fedamole serve RUN --make-keys {path}`") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}); make it anew by --make-keys") from error
    fit = isinstance(hashes, dict) and all(
        isinstance(one, str) and len(one) == 64 and one.isascii() for one in hashes.values()
    )
    if not fit or len(set(hashes.values())) < len(hashes):
        raise ConfigError(f"{path}: not a file of keys, each of one client; make it anew by --make-keys")
    return Keys(hashes)


def make_keys(path: Path, clients: Sequence[str]) -> dict[str, str]:
    """Make a key for each client that has none in the file yet, and return the new ones: they are kept nowhere.

    The file is written for its owner alone. Raises ConfigError, and RunError while another process makes keys in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(f".{path.name}.lock"), f"{path}: another process is making keys; try again"):
        return _make_keys(path, clients)


def _make_keys(path: Path, clients: Sequence[str]) -> dict[str, str]:
    hashes = dict(read_keys(path).hashes) if path.exists() else {}
    made = {client: f"fedamole-{secrets.token_urlsafe(32)}" for client in clients if client not in hashes}
    content = json.dumps({**hashes, **{client: _hash(key) for client, key in made.items()}}, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    return made


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
