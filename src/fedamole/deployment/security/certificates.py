"""The federation's own certificate authority (CA), the server certificate, the order key, and the files for clients.

    ca.crt, ca.key                    the CA; every client gets ca.crt, and ca.key never leaves this folder
    server.crt, server.key            the server's TLS certificate and key
    coordinator.key, coordinator.pub  the order key, which signs all orders; every client gets coordinator.pub
    nodes/NAME.pub                    the public keys that the server admits (client_keys.py)
    clients/NAME/                     the files for a client: ca.crt, coordinator.pub, optionally node.key and node.pub

An organisation with its own CA has it sign the server certificate instead (signing_requests.py). Private keys have mode
0600 in a folder of mode 0700, and are never overwritten.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedamole.deployment.security import dates
from fedamole.deployment.security.certificate_names import ALWAYS, listed, names_of, server_names
from fedamole.deployment.security.client_keys import admit_pair, checked_names, key_files, make_pair
from fedamole.deployment.security.keys import (
    load_certificates,
    load_private,
    load_public,
    new_key,
    public_line,
    replace_with_backup,
    write,
    write_private,
)
from fedamole.errors import ConfigError

AUTHORITY_DAYS = 3650
"""Validity of the CA certificate in days."""
BACKDATED = timedelta(hours=1)
"""Certificates become valid this much before they are made, as the clocks of two organisations differ."""


@dataclass(frozen=True)
class FileChanges:
    """The files written and kept by one command in a folder of certificates."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    """Existing files that were left unchanged."""

    def keep_or_write(self, path: Path, content: bytes) -> None:
        """Write a public file unless it exists."""
        if path.exists():
            self.kept.append(path)
        else:
            write(path, content)
            self.written.append(path)

    def replace(self, path: Path, content: bytes) -> None:
        """Write a public file; an existing file with other content is backed up and replaced atomically."""
        if path.exists() and path.read_bytes() != content:
            self.written.append(replace_with_backup(path, content))
            self.written.append(path)
        else:
            self.keep_or_write(path, content)


def make_certificates(
    folder: Path,
    hosts: Sequence[str],
    clients: Sequence[str],
    days: int = dates.SERVER_DAYS,
    renew_server: bool = False,
    *,
    client_days: int = dates.CLIENT_DAYS,
    again: bool = False,
    passphrase: bytes | None = None,
) -> FileChanges:
    """Make the missing ones among the CA, the server certificate, the order key and the client keys.

    `hosts` are the DNS names and IP addresses by which clients reach the server. Without any, the names of the existing
    certificate are used, or localhost if there is none. `days` is the validity of a new server certificate, limited by
    that of the CA; `client_days` is the same for new client keys. `renew_server` issues a new certificate for the same
    key: the new file replaces the old one atomically, and the old one is kept as server.crt.old. `again` admits client
    keys that were removed before. The passphrase decrypts encrypted keys, and encrypts a new ca.key and
    coordinator.key.

    Raises ConfigError for an invalid host or name, for hosts that differ from those of the existing certificate, for
    half a key pair, and for a folder that waits for a certificate from the organisation's own CA.
    """
    names = checked_names(clients, key_files(folder))
    requested = server_names(hosts)
    dates.checked_days(days, "--days")
    dates.last_day(client_days)
    if (folder / "server.csr").exists() and not (folder / "ca.crt").exists():
        raise ConfigError(
            f"{folder} waits for a certificate from the organisation's CA: install it with `fedamole certs --install "
            f"SIGNED.crt --ca CA.crt`. To make a CA here instead, move {folder / 'server.csr'} away"
        )
    changes = FileChanges()
    _make_authority(folder, passphrase, changes)
    _make_server(folder, requested if hosts else None, days, renew_server, passphrase, changes)
    make_order_key(folder, passphrase, changes)
    for name in names:
        _make_client(folder, name, client_days, again, changes)
    hand_out(folder, names, changes)
    return changes


def make_order_key(folder: Path, passphrase: bytes | None, changes: FileChanges) -> None:
    """Make coordinator.key, which signs the orders to clients, and coordinator.pub if they are missing.

    A passphrase encrypts a new coordinator.key. ConfigError if the two do not belong together.
    """
    key_file, pub = folder / "coordinator.key", folder / "coordinator.pub"
    if key_file.exists():
        changes.kept.append(key_file)
        if pub.exists():
            changes.kept.append(pub)
            return
        key = load_private(key_file, passphrase)
    elif pub.exists():
        raise ConfigError(
            f"{pub} exists without coordinator.key; restore that. If it is lost, move coordinator.pub away, run "
            "this command again, and send the new coordinator.pub to every client"
        )
    else:
        key = new_key()
        write_private(key_file, key, PrivateFormat.PKCS8, passphrase)
        changes.written.append(key_file)
    write(pub, public_line(key.public_key(), "coordinator"))
    changes.written.append(pub)


def hand_out(folder: Path, names: Sequence[str], changes: FileChanges) -> None:
    """Copy the current ca.crt and coordinator.pub to clients/NAME/ of these clients and of all existing folders."""
    existing = {path.name for path in (folder / "clients").glob("*") if path.is_dir()}
    for name in sorted(existing | set(names)):
        for file in ("ca.crt", "coordinator.pub"):
            changes.replace(folder / "clients" / name / file, (folder / file).read_bytes())


def make_loopback(folder: Path) -> tuple[Path, Path]:
    """Make a certificate and key for this machine's loopback: loopback.crt and loopback.key in a private folder.

    Flower's SuperLink presents it to the local processes, which trust only this certificate. Therefore server.crt needs
    no name such as localhost, which most CAs do not sign, and local connections do not depend on its dates. It is made
    anew at each start of a server and replaces earlier files.
    """
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"FedAMoLE loopback {os.urandom(4).hex()}")])
    certificate = (
        _certificate_builder(subject, subject, key.public_key(), dates.now() + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(digital_signature=True, key_cert_sign=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(server_names(ALWAYS)), critical=False)
        .sign(key, hashes.SHA384())
    )
    crt, key_file = folder / "loopback.crt", folder / "loopback.key"
    for path in (crt, key_file):
        path.unlink(missing_ok=True)
    write_private(key_file, key, PrivateFormat.PKCS8)
    write(crt, certificate.public_bytes(Encoding.PEM))
    return crt, key_file


def is_issued_by(child: x509.Certificate, parent: x509.Certificate) -> bool:
    """Return whether one certificate names the other as its issuer and carries a valid signature of its key."""
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _make_authority(folder: Path, passphrase: bytes | None, changes: FileChanges) -> None:
    crt, key_file = folder / "ca.crt", folder / "ca.key"
    if crt.exists():
        # ca.key may be missing: the coordinator may store it elsewhere, as it is needed only for signing.
        changes.kept.extend(path for path in (crt, key_file) if path.exists())
        return
    if key_file.exists():
        raise ConfigError(f"{key_file} exists without ca.crt; restore ca.crt, or move ca.key away to start over")
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"FedAMoLE authority {os.urandom(4).hex()}")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _certificate_builder(subject, subject, key.public_key(), dates.now() + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    write_private(key_file, key, PrivateFormat.PKCS8, passphrase)
    write(crt, certificate.public_bytes(Encoding.PEM))
    changes.written.extend((crt, key_file))


def _make_server(
    folder: Path,
    names: list[x509.GeneralName] | None,
    days: int,
    renew: bool,
    passphrase: bytes | None,
    changes: FileChanges,
) -> None:
    """Make the server certificate; without `names`, for those of the existing certificate or for localhost."""
    crt, key_file = folder / "server.crt", folder / "server.key"
    if crt.exists():
        if not key_file.exists():
            raise ConfigError(f"{crt} exists without server.key; restore server.key, or move server.crt away")
        present = names_of(load_certificates(crt)[0])
        if not renew:
            if names is not None and set(names) - set(server_names(())) != set(present) - set(server_names(())):
                raise ConfigError(
                    f"{crt} is for {listed(present)}, but {listed(names)} is requested; give the same hosts, or renew "
                    "the server certificate (--renew), for which clients need no new files"
                )
            changes.kept.extend((crt, key_file))
            return
        names = names or present
    if key_file.exists():
        key = load_private(key_file, passphrase)
        changes.kept.append(key_file)
    else:
        key = new_key()
    pem = _issue(folder, key.public_key(), names or server_names(()), days, passphrase)
    if not key_file.exists():
        # Never encrypted: the gateway reads it unattended.
        write_private(key_file, key, PrivateFormat.PKCS8)
        changes.written.append(key_file)
    changes.replace(crt, pem)


def _issue(
    folder: Path, key: ec.EllipticCurvePublicKey, names: Sequence[x509.GeneralName], days: int, passphrase: bytes | None
) -> bytes:
    """Return a server certificate issued by this CA, in PEM."""
    if not (folder / "ca.key").exists():
        raise ConfigError(
            f"{folder / 'ca.key'} is missing, and it is needed for signing; restore it. With the organisation's own "
            "CA, use --request and --install"
        )
    authority, signer = load_certificates(folder / "ca.crt")[0], load_private(folder / "ca.key", passphrase)
    if signer.public_key() != authority.public_key():
        raise ConfigError(f"{folder}: ca.key does not belong to ca.crt; restore the right one")
    end = min(dates.now() + timedelta(days=days), authority.not_valid_after_utc)
    if end <= dates.now():
        raise ConfigError(f"{folder / 'ca.crt'} expired on {end:%Y-%m-%d}; make new certificates in another folder")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedAMoLE server")])
    certificate = (
        _certificate_builder(subject, authority.subject, key, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return certificate.public_bytes(Encoding.PEM)


def _make_client(folder: Path, name: str, days: int, again: bool, changes: FileChanges) -> None:
    client_folder, admitted = folder / "clients" / name, folder / "nodes" / f"{name}.pub"
    is_admitted = admitted.exists()
    if (client_folder / "node.key").exists() or not is_admitted:
        make_pair(client_folder, name, changes.written, changes.kept)
        admit_pair(folder, name, client_folder / "node.pub", days, again)
    else:
        # The client made the key itself, or the coordinator deleted its copy: another key would be refused.
        load_public(admitted)
    (changes.kept if is_admitted else changes.written).append(admitted)


def _certificate_builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    builder = builder.not_valid_before(dates.now() - BACKDATED).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
