"""The registered clients that may call the gateway, read from the public keys in `nodes/*.pub`.

Each file holds one OpenSSH public key of type ecdsa-sha2-nistp384 on one line. The comment of the line is the client's
name, optionally followed by the last day (UTC) on which the key is accepted:

    ecdsa-sha2-nistp384 AAAAE2Vj... hospital-a until=2027-06-30

The folder is checked again while the gateway runs, so a key that is removed, replaced or expired is refused without a
restart.
"""

import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

LOG = logging.getLogger("fedamole.roster")

RESCAN_S = 0.5
"""Seconds between two scans of the folder: a change takes effect after this time at the latest."""

MAX_BYTES = 16 * 1024
"""Maximum size in bytes of a public key file."""

COMMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?: until=(?P<until>\d{4}-\d{2}-\d{2}))?")

FolderState = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RegisteredClient:
    """A registered client: its name, its public key, and the last day (UTC) on which the key is accepted."""

    name: str
    key: ec.EllipticCurvePublicKey
    until: date | None = None

    def expired(self, today: date) -> bool:
        """Return whether `today` (UTC) is after the last day of the key."""
        return self.until is not None and today > self.until


class Roster:
    """The registered clients of a folder, by public key; follows changes of the folder."""

    def __init__(self, folder: Path) -> None:
        """Read the folder. Invalid files are skipped, each with one log line."""
        self.folder = folder
        self._clients: dict[bytes, RegisteredClient] = {}
        self._scanned: FolderState | None = {"": ()}  # matches no folder, so that the first scan reads it
        self._checked = float("-inf")
        self._refresh()

    def find(self, key: bytes) -> RegisteredClient | None:
        """Return the client with this public key, or None.

        `key` is the key as Flower's nodes send it: PEM (SubjectPublicKeyInfo), not base64-encoded.
        """
        self._refresh()
        return self._clients.get(key)

    def __len__(self) -> int:
        """Return the number of valid keys."""
        self._refresh()
        return len(self._clients)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < RESCAN_S:
            return
        self._checked = now
        try:
            state = self._scan()
        except OSError as error:
            if self._scanned is not None:
                LOG.error("%s cannot be read (%s): all clients are refused", self.folder, error.strerror)
            self._clients, self._scanned = {}, None
            return
        if state != self._scanned:
            self._clients, self._scanned = self._read(state), state

    def _scan(self) -> FolderState:
        """Return inode, times and size of each file, by file name, to detect changes."""
        state = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".pub"):
                    with suppress(OSError):  # deleted meanwhile, or a broken link
                        status = entry.stat()
                        state[entry.name] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        return state

    def _read(self, state: FolderState) -> dict[bytes, RegisteredClient]:
        clients: dict[bytes, RegisteredClient] = {}
        for name in sorted(state):
            path = self.folder / name
            try:
                client = _read_client(path)
            except ValueError as error:
                LOG.warning("%s is skipped: %s", path, error)
                continue
            pem = client.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            if pem in clients:
                LOG.warning("%s is skipped: %s has the same key", path, clients[pem].name)
                continue
            clients[pem] = client
        LOG.info("%d registered clients in %s", len(clients), self.folder)
        return clients


def _read_client(path: Path) -> RegisteredClient:
    """Return the client of a file; ValueError states the problem without quoting the file."""
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise ValueError("it is too large for a public key")
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if len(lines) != 1:
        raise ValueError("it does not hold exactly one line")
    kind, *rest = lines[0].split(None, 2)
    if kind != b"ecdsa-sha2-nistp384" or not rest:
        raise ValueError("it is not a public key of type ecdsa-sha2-nistp384")
    try:
        key = load_ssh_public_key(b" ".join((kind, rest[0])))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("its key is damaged") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise ValueError("it is not a public key of type ecdsa-sha2-nistp384")
    comment = COMMENT.fullmatch(rest[1].decode("ascii", "replace") if len(rest) > 1 else "")
    if comment is None:
        raise ValueError("the text after the key is not `NAME` or `NAME until=YYYY-MM-DD`")
    try:
        until = date.fromisoformat(comment["until"]) if comment["until"] else None
    except ValueError as error:
        raise ValueError("its last day is not a date") from error
    return RegisteredClient(comment["name"], key, until)
