"""The keys of clients: how a client makes one, and which of them the coordinator admits, until when.

    nodes/NAME.pub               an admitted key, one line: ecdsa-sha2-nistp384 KEY NAME until=YYYY-MM-DD
    nodes/removed/NAME-TIME.pub  a key that was admitted once and is refused now

`until` is the last day on which the key is valid, in UTC. A key that was admitted by an older version has none. Every
change of an admitted key is one step on the disk, so that a running server reads a whole file at any moment.
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

from fedamole.data.settings import NAME
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

CLIENT_DAYS = 365
"""Days for which a client's key is valid unless another number is given."""
_COMMENT = re.compile(r"(\S+?)(?: until=([0-9]{4}-[0-9]{2}-[0-9]{2}))?")
"""What follows the key on its line; the gateway reads the same and ignores a file that says anything else."""

KeyState = Literal["valid", "ends soon", "expired", "removed"]


@dataclass(frozen=True)
class ClientKey:
    """A key that was admitted under a client's name."""

    name: str
    path: Path
    key: ec.EllipticCurvePublicKey
    until: date | None
    """Last valid day in UTC; None: no end (admitted by an older version)."""
    removed: bool = False

    @property
    def state(self) -> KeyState:
        """What a server makes of the key today."""
        if self.removed:
            return "removed"
        if self.until is None:
            return "valid"
        left = self.until - dates.now().date()
        return "expired" if left.days < 0 else "ends soon" if left < dates.SOON else "valid"


def key_files(folder: Path) -> dict[str, Path]:
    """Return the files of the admitted keys by client name; nothing is read."""
    found = {path.name.removesuffix(".pub"): path for path in sorted((folder / "nodes").glob("*.pub"))}
    return {name: path for name, path in found.items() if NAME.fullmatch(name)}


def admitted_keys(folder: Path) -> dict[str, ClientKey]:
    """Return the admitted keys by client name, expired ones too; ConfigError for a file that is no such key."""
    return {name: read(name, path) for name, path in key_files(folder).items()}


def read(name: str, path: Path, removed: bool = False) -> ClientKey:
    """Return the key of one file of nodes/ or nodes/removed/; ConfigError for anything else."""
    key, said = load_public(path), comment(path)
    match = _COMMENT.fullmatch(said)
    try:
        until = date.fromisoformat(match[2]) if match is not None and match[2] else None
    except ValueError:
        match = None
    if match is None or match[1] != name:
        raise ConfigError(
            f"{path}: after the key the line must say {name} until=YYYY-MM-DD; correct it, or remove the file and "
            "admit the key by `fedamole certs --admit`"
        )
    return ClientKey(name, path, key, until, removed)


def removed(folder: Path) -> list[tuple[str, Path]]:
    """Return client name and file of every removed key, oldest first for each client."""
    files = sorted((folder / "nodes" / "removed").glob("*.pub*"))
    return [(match[1], path) for path in files if (match := re.fullmatch(r"(.+)-\d{8}T\d{6}Z\.pub(\.\d+)?", path.name))]


def make_own_key(folder: Path, name: str, passphrase: bytes | None = None) -> Path:
    """Make a client's key where it will be used: node.key, node.pub and node.csr; returns the path of node.csr.

    node.csr is a certificate signing request; its signature proves that the sender has the key. With a passphrase
    node.key is locked by it. Existing files are kept. Raises ConfigError for a name that cannot be used, for files
    that do not belong together, and where a passphrase is given and the existing key is not locked.
    """
    check_name(name)
    key_file = folder / "node.key"
    if passphrase is not None and key_file.exists() and not is_locked(key_file):
        raise ConfigError(
            f"{key_file} exists and is not locked by a passphrase: give none, or lock the key first by "
            f"`ssh-keygen -p -m PKCS8 -f {key_file}`"
        )
    key = make_pair(folder, name, [], [], passphrase)
    path = folder / "node.csr"
    if path.exists():
        if _common_name(load_request(path)) != name or load_request(path).public_key() != key.public_key():
            raise ConfigError(f"{path} is not for {name!r} or not for the key beside it; remove it and try again")
        return path
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder(subject).sign(key, hashes.SHA384())
    write(path, request.public_bytes(Encoding.PEM))
    return path


def make_pair(
    folder: Path, name: str, written: list[Path], kept: list[Path], passphrase: bytes | None = None
) -> ec.EllipticCurvePrivateKey:
    """Make node.key and node.pub in a folder where they are missing; the key is returned."""
    key_file, pub = folder / "node.key", folder / "node.pub"
    if key_file.exists():
        key = load_private(key_file, passphrase)
        kept.append(key_file)
    elif pub.exists():
        raise ConfigError(f"{pub} is there without node.key; put that back, or move node.pub away to make a new pair")
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
        raise ConfigError(f"{pub} does not belong to node.key beside it; remove it and try again")
    return key


def read_sent_key(name: str, file: Path) -> ec.EllipticCurvePublicKey:
    """Return the public key that a client sent, from its node.csr (checked: signature and name) or its node.pub."""
    if not is_request(file):
        return load_public(file)
    request = load_request(file)
    if (said := _common_name(request)) != name:
        raise ConfigError(f"{file}: the request is for the client {said!r}, not for {name!r}; give it under its name")
    return requested_key(file, request)


def admit(folder: Path, name: str, file: Path, days: int = CLIENT_DAYS, again: bool = False) -> Path:
    """Admit a client's key (node.csr or node.pub) for `days` days; returns nodes/NAME.pub.

    A key that is admitted under this name already is left as it is. Raises ConfigError for anything but a key of kind
    EC P-384, for a request that is not signed by its own key or is for another name, for a key that another client
    has, for a name that has another key, and, unless `again`, for a key that was removed before.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; `fedamole certs` makes it, or correct the folder")
    present = key_files(folder)
    checked_names([name], {other: path for other, path in present.items() if other != name})
    until, key = dates.last_day(days), read_sent_key(name, file)
    target = folder / "nodes" / f"{name}.pub"
    if target.exists() and load_public(target) == key:
        return target
    check_new(folder, name, key, file, again)
    if target.exists():
        raise ConfigError(
            f"{name!r} is admitted with another key ({target}); `fedamole clients replace {name} {file}` takes the new "
            "key in its place"
        )
    write(target, _key_line(key, name, until))
    return target


def check_new(folder: Path, name: str, key: ec.EllipticCurvePublicKey, source: Path, again: bool = False) -> None:
    """Raise ConfigError where a key that is new for this name belongs to another client or was removed before."""
    for other, path in key_files(folder).items():
        if other != name and load_public(path) == key:
            raise ConfigError(
                f"{source}: {other!r} has this key already ({path}), and the server tells clients apart by their "
                f"keys; let {name!r} make a key of its own"
            )
    for _, path in removed(folder) if not again else ():
        if _is_key(path, key):
            raise ConfigError(
                f"{source}: this key was removed ({path}); let the client make a new key, or admit the old one once "
                "more by `fedamole certs` with --again"
            )


def extend(folder: Path, name: str, days: int) -> ClientKey:
    """Let an admitted key be valid for `days` days from today; ConfigError where it would end earlier than now."""
    old = read(name, _admitted(folder, name))
    until = dates.last_day(days, "--days")
    if old.until is not None and until <= old.until:
        raise ConfigError(
            f"the key of {name!r} is valid until {old.until}, which is not before {until}; give more days, or end it "
            f"now by `fedamole clients remove {name}`"
        )
    replace(old.path, _key_line(old.key, name, until))
    return read(name, old.path)


def remove(folder: Path, name: str) -> Path:
    """Refuse an admitted key from now on: move its file to nodes/removed/, the path of which is returned."""
    path = _admitted(folder, name)
    target = _removed_name(folder, name)
    try:
        os.rename(path, target)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be moved to {target} ({error.strerror}); mend the folder's mode") from error
    return target


def replace_key(folder: Path, name: str, file: Path, days: int = CLIENT_DAYS) -> tuple[ClientKey, Path]:
    """Take a client's new key in place of its old one, in one step; returns the new key and the old one's removed file.

    Everything about the new key is checked before. ConfigError as `admit`, and for the key that the client has now.
    """
    path = _admitted(folder, name)
    until, key = dates.last_day(days, "--days"), read_sent_key(name, file)
    if _is_key(path, key):
        raise ConfigError(f"{file}: is the key that {name!r} has already; `fedamole clients extend` lets it end later")
    check_new(folder, name, key, file)
    target = _removed_name(folder, name)
    write(target, path.read_bytes())
    replace(path, _key_line(key, name, until))
    return read(name, path), target


def check_name(name: str) -> None:
    """Raise ConfigError for a client name that cannot be used."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"client name {name!r}: use letters, digits, dot, dash and underscore only, a letter or digit first"
        )


def checked_names(names: Sequence[str], present: dict[str, Path]) -> list[str]:
    """Return the names, if each can be used and none differs from another, or one present, only by its case."""
    known = {name.casefold(): name for name in present}
    seen: set[str] = set()
    for name in names:
        check_name(name)
        if name in seen:
            raise ConfigError(f"client name {name!r} is given twice: names must differ")
        if (other := known.setdefault(name.casefold(), name)) != name:
            raise ConfigError(f"client names {other!r} and {name!r} are one file on some systems; choose another")
        seen.add(name)
    return list(names)


def admit_pair(folder: Path, name: str, pub: Path, days: int, again: bool = False) -> Path:
    """Admit the key of a pair that the coordinator made; see `admit`."""
    target = folder / "nodes" / f"{name}.pub"
    if target.exists() and not _is_key(target, load_public(pub)):
        raise ConfigError(f"{target} and {pub} are not the same key; move the one away that is not in use")
    return admit(folder, name, pub, days, again)


def _admitted(folder: Path, name: str) -> Path:
    check_name(name)
    known = key_files(folder)
    if name not in known:
        raise ConfigError(
            f"{folder}: no key of {name!r} is admitted (admitted: {', '.join(known) or 'none'}); "
            f"`fedamole certs --admit {name}=FILE` admits one"
        )
    return known[name]


def _removed_name(folder: Path, name: str) -> Path:
    """A new file name in nodes/removed/, which is made where it is missing."""
    place = folder / "nodes" / "removed"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{place}: cannot be made ({error.strerror}); mend the mode of {folder}/nodes") from error
    return free_name(place / f"{name}-{dates.now():%Y%m%dT%H%M%SZ}.pub")


def _is_key(path: Path, key: ec.EllipticCurvePublicKey) -> bool:
    """Whether a file holds this key; a file that holds none does not."""
    try:
        return load_public(path) == key
    except ConfigError:
        return False


def _key_line(key: ec.EllipticCurvePublicKey, name: str, until: date) -> bytes:
    return public_line(key, f"{name} until={until.isoformat()}")


def _common_name(request: x509.CertificateSigningRequest) -> str | None:
    found = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else None
