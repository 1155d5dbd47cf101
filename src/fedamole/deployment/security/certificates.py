"""A certificate authority (CA) of the federation's own, the server's certificate, the order key, and what clients get.

    ca.crt, ca.key                    the CA; ca.crt goes to every client, ca.key never leaves this folder
    server.crt, server.key            what the server shows
    coordinator.key, coordinator.pub  the order key: it signs what clients obey; coordinator.pub goes to every client
    nodes/NAME.pub                    the public keys that the server admits (client_keys.py)
    clients/NAME/                     what a client is handed: ca.crt, coordinator.pub, perhaps node.key and node.pub

An organisation with a CA of its own has it sign the server's certificate instead (signing_requests.py). A private key
has mode 0600 and is in a folder of mode 0700. No private key is ever overwritten.
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
from fedamole.deployment.security.client_keys import CLIENT_DAYS, admit_pair, checked_names, key_files, make_pair
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
BACKDATED = timedelta(hours=1)
"""Certificates begin this much earlier, as the clocks of two organisations never agree."""


@dataclass(frozen=True)
class FileChanges:
    """What was done in a folder of certificates."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    """Files that were there already and were left as they are."""

    def keep_or_write(self, path: Path, content: bytes) -> None:
        """Write a public file unless it is there."""
        if path.exists():
            self.kept.append(path)
        else:
            write(path, content)
            self.written.append(path)

    def replace(self, path: Path, content: bytes) -> None:
        """Write a public file; other content that is there is kept as a copy and replaced in one step."""
        if path.exists() and path.read_bytes() != content:
            self.written.append(replace_with_backup(path, content))
            self.written.append(path)
        else:
            self.keep_or_write(path, content)


def make_certificates(
    folder: Path,
    hosts: Sequence[str],
    clients: Sequence[str],
    days: int = 825,
    renew_server: bool = False,
    *,
    client_days: int = CLIENT_DAYS,
    again: bool = False,
    passphrase: bytes | None = None,
) -> FileChanges:
    """Make what is missing of the CA, the server's certificate, the order key and the clients' keys.

    `hosts` are the DNS names and IP addresses by which clients reach the server; none given means localhost alone,
    or, where there is a certificate already, the names that it has. `days` is how long a new server certificate is
    valid, never longer than the CA; `client_days` is the same for new client keys. `renew_server` issues it anew for
    the same key: the new file replaces the old one in one step, and the old one stays as server.crt.old. `again`
    allows client keys that were removed. The passphrase opens keys that are locked, and locks a new ca.key and
    coordinator.key.

    Raises ConfigError for a host or name that cannot be used, for other hosts than an existing certificate has, for
    half a key pair, and for a folder that waits for a certificate of the organisation's own CA.
    """
    names = checked_names(clients, key_files(folder))
    wanted = server_names(hosts)
    dates.checked_days(days, "--days")
    dates.last_day(client_days)
    if (folder / "server.csr").exists() and not (folder / "ca.crt").exists():
        raise ConfigError(
            f"{folder} waits for a certificate of the organisation's CA: `fedamole certs --install SIGNED.crt --ca "
            f"CA.crt` installs it. To make a CA here instead, move {folder / 'server.csr'} away"
        )
    changes = FileChanges()
    _make_authority(folder, passphrase, changes)
    _make_server(folder, wanted if hosts else None, days, renew_server, passphrase, changes)
    make_order_key(folder, passphrase, changes)
    for name in names:
        _make_client(folder, name, client_days, again, changes)
    hand_out(folder, names, changes)
    return changes


def make_order_key(folder: Path, passphrase: bytes | None, changes: FileChanges) -> None:
    """Make coordinator.key, which signs the orders that clients obey, and coordinator.pub where they are missing.

    With a passphrase a new coordinator.key is locked by it. ConfigError for one that does not belong to the other.
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
            f"{pub} is there without coordinator.key; put that back. If it is lost, move coordinator.pub away, run "
            "this again, and send the new coordinator.pub to every client"
        )
    else:
        key = new_key()
        write_private(key_file, key, PrivateFormat.PKCS8, passphrase)
        changes.written.append(key_file)
    write(pub, public_line(key.public_key(), "coordinator"))
    changes.written.append(pub)


def hand_out(folder: Path, names: Sequence[str], changes: FileChanges) -> None:
    """Put the present ca.crt and coordinator.pub into clients/NAME/ for these clients and those that have a folder."""
    there = {path.name for path in (folder / "clients").glob("*") if path.is_dir()}
    for name in sorted(there | set(names)):
        for file in ("ca.crt", "coordinator.pub"):
            changes.replace(folder / "clients" / name / file, (folder / file).read_bytes())


def make_loopback(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for this machine's loopback, and its key: loopback.crt and loopback.key in a private folder.

    Flower's SuperLink shows it to the processes beside it, which trust this one certificate and nothing else. So
    server.crt needs no name such as localhost, which most CAs do not sign, and nothing inside depends on its dates. It
    is for one start of a server: files of an earlier start are replaced.
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
    """Whether one certificate names the other as its issuer and is signed by its key."""
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _make_authority(folder: Path, passphrase: bytes | None, changes: FileChanges) -> None:
    crt, key_file = folder / "ca.crt", folder / "ca.key"
    if crt.exists():
        # Without its key a CA signs nothing more, but the coordinator may keep that key elsewhere.
        changes.kept.extend(path for path in (crt, key_file) if path.exists())
        return
    if key_file.exists():
        raise ConfigError(f"{key_file} is there without ca.crt; put that back, or move ca.key away to start anew")
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
    """`names` is None where nobody said which: those of the existing certificate, or localhost alone."""
    crt, key_file = folder / "server.crt", folder / "server.key"
    if crt.exists():
        if not key_file.exists():
            raise ConfigError(f"{crt} is there without server.key; put that back, or move server.crt away")
        present = names_of(load_certificates(crt)[0])
        if not renew:
            if names is not None and set(names) - set(server_names(())) != set(present) - set(server_names(())):
                raise ConfigError(
                    f"{crt} is for {listed(present)}, asked for is {listed(names)}; give the same hosts, or renew the "
                    "server's certificate (--renew): clients keep what they have"
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
        # Never locked: the gateway reads it unattended.
        write_private(key_file, key, PrivateFormat.PKCS8)
        changes.written.append(key_file)
    changes.replace(crt, pem)


def _issue(
    folder: Path, key: ec.EllipticCurvePublicKey, names: Sequence[x509.GeneralName], days: int, passphrase: bytes | None
) -> bytes:
    """A server certificate of this CA in PEM."""
    if not (folder / "ca.key").exists():
        raise ConfigError(
            f"{folder / 'ca.key'} is missing, and without it nothing can be signed; put it back. Where the CA is the "
            "organisation's own, use --request and --install"
        )
    authority, signer = load_certificates(folder / "ca.crt")[0], load_private(folder / "ca.key", passphrase)
    if signer.public_key() != authority.public_key():
        raise ConfigError(f"{folder}: ca.key does not belong to ca.crt; put the right one back")
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
    own, admitted = folder / "clients" / name, folder / "nodes" / f"{name}.pub"
    there = admitted.exists()
    if (own / "node.key").exists() or not there:
        make_pair(own, name, changes.written, changes.kept)
        admit_pair(folder, name, own / "node.pub", days, again)
    else:
        # The key was made elsewhere, or handed over and removed here: another would not be let in.
        load_public(admitted)
    (changes.kept if there else changes.written).append(admitted)


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
