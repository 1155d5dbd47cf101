"""Keys of clients: generation at the client, and admission, expiry and removal at the coordinator.

    nodes/NAME.pub               an admitted key, one line: ecdsa-sha2-nistp384 KEY NAME until=YYYY-MM-DD
    nodes/removed/NAME-TIME.pub  a key that was admitted once and is now refused

`until` is the last valid day, in UTC. Keys admitted by an older version have none. Each change of an admitted key is
one atomic step on disk, so a running server always reads a complete file.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import NameOID

from fedamole.deployment.security import dates
from fedamole.deployment.security.keys import (
    comment,
    free_name,
    is_locked,
    is_request,
    load_private,
    load_public,
    load_request,
    new_key,
    public_line,
    replace,
    requested_key,
    write,
    write_private,
)
from fedamole.errors import ConfigError
from fedamole.received.names import NAME, checked_name

_COMMENT = re.compile(r"(\S+?)(?: until=([0-9]{4}-[0-9]{2}-[0-9]{2}))?")
"""Pattern of the comment after the key; the gateway uses the same and ignores files with any other comment."""

KeyState = Literal["valid", "ends soon", "expired", "removed"]


@dataclass(frozen=True)
class ClientKey:
    """A key that was admitted under a client's name."""

    name: str
    path: Path
    key: ec.EllipticCurvePublicKey
    until: date | None
    """Last valid day in UTC; None: no expiry (admitted by an older version)."""
    removed: bool = False

    @property
    def state(self) -> KeyState:
        """The state of the key today."""
        if self.removed:
            return "removed"
        if self.until is None:
            return "valid"
        left = self.until - dates.now().date()
        return "expired" if left.days < 0 else "ends soon" if left < dates.SOON else "valid"


def key_files(folder: Path) -> dict[str, Path]:
    """Return the files of the admitted keys by client name, without reading them."""
    files = {path.name.removesuffix(".pub"): path for path in sorted((folder / "nodes").glob("*.pub"))}
    return {name: path for name, path in files.items() if NAME.fullmatch(name)}


def admitted_keys(folder: Path) -> dict[str, ClientKey]:
    """Return the admitted keys by client name, including expired ones; ConfigError for an invalid file."""
    return {name: read(name, path) for name, path in key_files(folder).items()}


def read(name: str, path: Path, removed: bool = False) -> ClientKey:
    """Return the key in a file of nodes/ or nodes/removed/; ConfigError for anything else."""
    key, text = load_public(path), comment(path)
    match = _COMMENT.fullmatch(text)
    try:
        until = date.fromisoformat(match[2]) if match is not None and match[2] else None
    except ValueError:
        match = None
    if match is None or match[1] != name:
        raise ConfigError(
            f"{path}: the line must end with {name} until=YYYY-MM-DD after the key; correct it, or remove the file and "
            "admit the key with `fedamole certs --admit`"
        )
    return ClientKey(name, path, key, until, removed)


def removed(folder: Path) -> list[tuple[str, Path]]:
    """Return client name and file of every removed key, oldest first for each client."""
    files = sorted((folder / "nodes" / "removed").glob("*.pub*"))
    return [(match[1], path) for path in files if (match := re.fullmatch(r"(.+)-\d{8}T\d{6}Z\.pub(\.\d+)?", path.name))]


def make_own_key(folder: Path, name: str, passphrase: bytes | None = None) -> Path:
    """Make a client's key on the client's machine: node.key, node.pub and node.csr; return the path of node.csr.

    node.csr is a certificate signing request; its signature proves that the sender has the key. A passphrase encrypts
    node.key. Existing files are kept. Raises ConfigError for an invalid name, for files that do not belong together,
    and if a passphrase is given but the existing key is not encrypted.
    """
    check_name(name)
    key_file = folder / "node.key"
    if passphrase is not None and key_file.exists() and not is_locked(key_file):
        raise ConfigError(
            f"{key_file} exists and is not encrypted: give no passphrase, or encrypt the key first with "
            f"`ssh-keygen -p -m PKCS8 -f {key_file}`"
        )
    key = make_pair(folder, name, [], [], passphrase)
    path = folder / "node.csr"
    if path.exists():
        if _common_name(load_request(path)) != name or load_request(path).public_key() != key.public_key():
            raise ConfigError(f"{path} does not match {name!r} or node.key in the same folder; remove it and try again")
        return path
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder(subject).sign(key, hashes.SHA384())
    write(path, request.public_bytes(Encoding.PEM))
    return path


def make_pair(
    folder: Path, name: str, written: list[Path], kept: list[Path], passphrase: bytes | None = None
) -> ec.EllipticCurvePrivateKey:
    """Make node.key and node.pub in a folder if they are missing; return the key."""
    key_file, pub = folder / "node.key", folder / "node.pub"
    if key_file.exists():
        key = load_private(key_file, passphrase)
        kept.append(key_file)
    elif pub.exists():
        raise ConfigError(f"{pub} exists without node.key; restore node.key, or move node.pub away to make a new pair")
    else:
        key = new_key()
        write_private(key_file, key, PrivateFormat.OpenSSH, passphrase)
        written.append(key_file)
    if pub.exists():
        kept.append(pub)
    else:
        write(pub, public_line(key.public_key(), name))
        written.append(pub)
    if load_public(pub) != key.public_key():
        raise ConfigError(f"{pub} does not belong to node.key in the same folder; remove it and try again")
    return key


def read_sent_key(name: str, file: Path) -> ec.EllipticCurvePublicKey:
    """Return the public key that a client sent: from its node.csr (signature and name are checked) or its node.pub."""
    if not is_request(file):
        return load_public(file)
    request = load_request(file)
    if (requested_name := _common_name(request)) != name:
        raise ConfigError(
            f"{file}: the request is for the client {requested_name!r}, not for {name!r}; admit it under its own name"
        )
    return requested_key(file, request)


def admit(folder: Path, name: str, file: Path, days: int = dates.CLIENT_DAYS, again: bool = False) -> Path:
    """Admit a client's key (node.csr or node.pub) for `days` days; return nodes/NAME.pub.

    A key that is already admitted under this name is left unchanged. Raises ConfigError if the key is not EC P-384, if
    a request is not signed by its own key or names another client, if another client has the key, if the name has
    another key, and, unless `again`, if the key was removed before.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; create it with `fedamole certs`, or correct the path")
    present = key_files(folder)
    checked_names([name], {other: path for other, path in present.items() if other != name})
    until, key = dates.last_day(days), read_sent_key(name, file)
    target = folder / "nodes" / f"{name}.pub"
    if target.exists() and load_public(target) == key:
        return target
    check_new(folder, name, key, file, again)
    if target.exists():
        raise ConfigError(
            f"{name!r} is admitted with another key ({target}); replace it: `fedamole clients replace {name} {file}`"
        )
    write(target, _key_line(key, name, until))
    return target


def check_new(folder: Path, name: str, key: ec.EllipticCurvePublicKey, source: Path, again: bool = False) -> None:
    """Raise ConfigError if a key that is new for this name belongs to another client or was removed before."""
    for other, path in key_files(folder).items():
        if other != name and load_public(path) == key:
            raise ConfigError(
                f"{source}: {other!r} already has this key ({path}), and the server identifies clients by their "
                f"keys; {name!r} must make its own key"
            )
    for _, path in removed(folder) if not again else ():
        if _is_key(path, key):
            raise ConfigError(
                f"{source}: this key was removed ({path}); the client must make a new key, or admit the old one "
                "again with `fedamole certs --again`"
            )


def extend(folder: Path, name: str, days: int) -> ClientKey:
    """Set the expiry of an admitted key to `days` days from today; ConfigError unless that is later than now."""
    old = read(name, _admitted(folder, name))
    until = dates.last_day(days, "--days")
    if old.until is not None and until <= old.until:
        raise ConfigError(
            f"the key of {name!r} is already valid until {old.until}, not earlier than {until}; give more days, or end "
            f"it now with `fedamole clients remove {name}`"
        )
    replace(old.path, _key_line(old.key, name, until))
    return read(name, old.path)


def remove(folder: Path, name: str) -> Path:
    """Revoke an admitted key: move its file to nodes/removed/; return the new path."""
    path = _admitted(folder, name)
    target = _removed_name(folder, name)
    try:
        os.rename(path, target)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be moved to {target} ({error.strerror}); correct the permissions of the folder"
        ) from error
    return target


def replace_key(folder: Path, name: str, file: Path, days: int = dates.CLIENT_DAYS) -> tuple[ClientKey, Path]:
    """Replace a client's key by a new one in one step; return the new key and the file of the removed one.

    All checks of the new key come first. ConfigError as for `admit`, and if it is the client's present key.
    """
    path = _admitted(folder, name)
    until, key = dates.last_day(days, "--days"), read_sent_key(name, file)
    if _is_key(path, key):
        raise ConfigError(f"{file}: {name!r} already has this key; extend it with `fedamole clients extend`")
    check_new(folder, name, key, file)
    target = _removed_name(folder, name)
    write(target, path.read_bytes())
    replace(path, _key_line(key, name, until))
    return read(name, path), target


def check_name(name: str) -> None:
    """Raise ConfigError for an invalid client name."""
    checked_name(name, "client", ConfigError)


def checked_names(names: Sequence[str], present: dict[str, Path]) -> list[str]:
    """Return the names if each is valid and none differs from another, or from an existing one, only in case."""
    known = {name.casefold(): name for name in present}
    seen: set[str] = set()
    for name in names:
        check_name(name)
        if name in seen:
            raise ConfigError(f"client name {name!r} is given twice: names must be unique")
        if (other := known.setdefault(name.casefold(), name)) != name:
            raise ConfigError(f"client names {other!r} and {name!r} are the same file on some systems; choose another")
        seen.add(name)
    return list(names)


def admit_pair(folder: Path, name: str, pub: Path, days: int, again: bool = False) -> Path:
    """Admit the key of a pair made by the coordinator; see `admit`."""
    target = folder / "nodes" / f"{name}.pub"
    if target.exists() and not _is_key(target, load_public(pub)):
        raise ConfigError(f"{target} and {pub} hold different keys; move away the one that is not in use")
    return admit(folder, name, pub, days, again)


def _admitted(folder: Path, name: str) -> Path:
    check_name(name)
    known = key_files(folder)
    if name not in known:
        raise ConfigError(
            f"{folder}: no key of {name!r} is admitted (admitted: {', '.join(known) or 'none'}); "
            f"admit one with `fedamole certs --admit {name}=FILE`"
        )
    return known[name]


def _removed_name(folder: Path, name: str) -> Path:
    """Return a new file name in nodes/removed/, and create that folder if needed."""
    removed_folder = folder / "nodes" / "removed"
    try:
        removed_folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{removed_folder}: cannot be created ({error.strerror}); correct the permissions of {folder}/nodes"
        ) from error
    return free_name(removed_folder / f"{name}-{dates.now():%Y%m%dT%H%M%SZ}.pub")


def _is_key(path: Path, key: ec.EllipticCurvePublicKey) -> bool:
    """Return whether a file holds this key; False for an invalid file."""
    try:
        return load_public(path) == key
    except ConfigError:
        return False


def _key_line(key: ec.EllipticCurvePublicKey, name: str, until: date) -> bytes:
    return public_line(key, f"{name} until={until.isoformat()}")


def _common_name(request: x509.CertificateSigningRequest) -> str | None:
    names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else None
