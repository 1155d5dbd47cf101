"""A server's certificate from the organisation's own CA, by a signing request: server.key never leaves its machine.

`request_server` writes server.key and server.csr. The organisation's CA signs server.csr. `install_server` checks the
certificate that came back, and installs it as server.crt and the CA as ca.crt.
"""

import ssl
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedamole.deployment.security import dates
from fedamole.deployment.security.certificate_names import general_name, listed, names_of
from fedamole.deployment.security.certificates import FileChanges, hand_out, is_issued_by, make_order_key
from fedamole.deployment.security.keys import (
    load_certificates,
    load_private,
    load_request,
    new_key,
    public_half,
    write_private,
)
from fedamole.errors import ConfigError


def request_server(folder: Path, hosts: Sequence[str], passphrase: bytes | None = None) -> FileChanges:
    """Write server.key, where it is missing, and server.csr, a PKCS#10 request for these hosts; makes the order key.

    `hosts` are the names and addresses by which clients reach the server; none given means those of the existing
    server.crt. An older request for other hosts stays as server.csr.old. The passphrase locks a new coordinator.key;
    server.key is never locked by this function. Raises ConfigError for a folder with a CA of its own.
    """
    _refuse_own_ca(folder)
    crt, csr, key_file = folder / "server.crt", folder / "server.csr", folder / "server.key"
    names = list(dict.fromkeys(map(general_name, hosts)))
    if not names and crt.exists():
        names = names_of(load_certificates(crt)[0])
    if not names:
        raise ConfigError("--request: give each name by which clients reach the server, such as --host fl.example.org")
    changes = FileChanges()
    if key_file.exists():
        key = load_private(key_file, passphrase)
        changes.kept.append(key_file)
    elif crt.exists():
        raise ConfigError(f"{crt} is there without server.key; put that back, or move server.crt away")
    else:
        key = new_key()
        write_private(key_file, key, PrivateFormat.PKCS8)
        changes.written.append(key_file)
    make_order_key(folder, passphrase, changes)
    if csr.exists():
        present = load_request(csr)
        if present.public_key() == key.public_key() and set(names_of(present)) == set(names):
            changes.kept.append(csr)
            return changes
    common = str(names[0].value)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if len(common) <= 64 else [])
    request = (
        x509.CertificateSigningRequestBuilder(subject)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA384())
    )
    changes.replace(csr, request.public_bytes(Encoding.PEM))
    return changes


def install_server(
    folder: Path, signed: Path, ca: Path, hosts: Sequence[str] = (), passphrase: bytes | None = None
) -> FileChanges:
    """Check a certificate that the organisation's CA signed, then install it as server.crt and its CA as ca.crt.

    `signed` and `ca` are PEM files; intermediate certificates may be in either, the root has to be in `ca`. server.crt
    becomes the certificate and its intermediates, ca.crt the root certificates of `ca`. Checked are: that it belongs
    to server.key, the chain to the root, dates, names (`hosts`, else those of server.csr), usage, and a TLS handshake.
    Files that were there stay as .old. Raises ConfigError, with nothing changed, for whatever is wrong.
    """
    _refuse_own_ca(folder)
    key_file = folder / "server.key"
    if not key_file.exists():
        raise ConfigError(f"{key_file} is missing: `fedamole certs --request --host NAME` makes it and the request")
    key, sent, trusted = public_half(key_file, passphrase), load_certificates(signed), load_certificates(ca)
    leaf = next((certificate for certificate in sent if certificate.public_key() == key), None)
    if leaf is None:
        raise ConfigError(f"{signed} does not belong to {key_file}: have the CA sign {folder / 'server.csr'}")
    wanted = _wanted(folder, hosts) or names_of(leaf)
    _check_leaf(leaf, signed, wanted)
    roots = [certificate for certificate in trusted if is_issued_by(certificate, certificate)]
    chain = _chain(leaf, [*(one for one in sent if one is not leaf), *trusted], roots, signed, ca)
    for certificate in chain:
        _check_dates(certificate, signed)
    crt_pem, ca_pem = _pem(chain[:-1]), _pem([chain[-1], *(root for root in roots if root != chain[-1])])
    _check_handshake(crt_pem, key_file, passphrase, ca_pem, wanted[0])
    changes = FileChanges()
    make_order_key(folder, passphrase, changes)
    changes.replace(folder / "ca.crt", ca_pem)
    changes.replace(folder / "server.crt", crt_pem)
    changes.kept.append(key_file)
    hand_out(folder, (), changes)
    return changes


def _refuse_own_ca(folder: Path) -> None:
    if (folder / "ca.key").exists():
        raise ConfigError(
            f"{folder} has a CA of its own (ca.key), whose certificates --renew makes. For the organisation's CA name "
            "another --folder, or move ca.key, ca.crt and server.crt away; clients then need the new ca.crt"
        )


def _wanted(folder: Path, hosts: Sequence[str]) -> list[x509.GeneralName]:
    if hosts:
        return [general_name(host) for host in hosts]
    csr = folder / "server.csr"
    return names_of(load_request(csr)) if csr.exists() else []


def _check_leaf(leaf: x509.Certificate, path: Path, wanted: list[x509.GeneralName]) -> None:
    extensions = leaf.extensions
    try:
        is_ca = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_ca = False
    if is_ca:
        raise ConfigError(f"{path} is a CA certificate; ask the CA for a server certificate without CA rights")
    try:
        purposes = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        purposes = []
    if ExtendedKeyUsageOID.SERVER_AUTH not in purposes:
        raise ConfigError(f"{path} is not for servers; ask the CA for the extended key usage serverAuth")
    names = names_of(leaf)
    if missing := [name for name in wanted if name not in names]:
        raise ConfigError(
            f"{path} is for {listed(names)}, not for {listed(missing)}; ask the CA to put each requested name into the "
            "subject alternative names"
        )
    if not names:
        raise ConfigError(f"{path} is for no name; ask the CA for subject alternative names")


def _chain(
    leaf: x509.Certificate, pool: list[x509.Certificate], roots: list[x509.Certificate], signed: Path, ca: Path
) -> list[x509.Certificate]:
    """The certificates from the server's to the root, each issued by the next."""
    chain = [leaf]
    while not is_issued_by(chain[-1], chain[-1]):
        child = chain[-1]
        parents = [one for one in pool if one not in chain and is_issued_by(child, one)]
        if not parents:
            raise ConfigError(
                f"{signed}: the certificate of its issuer, {child.issuer.rfc4514_string()!r}, is in neither file; "
                f"add it to {ca}: all intermediate certificates and the root are needed"
            )
        chain.append(parents[0])
    if chain[-1] not in roots:
        raise ConfigError(
            f"{ca}: the root, {chain[-1].subject.rfc4514_string()!r}, is in {signed} only; --ca must have it, as it "
            "decides whom clients trust"
        )
    if len(chain) == 1:
        raise ConfigError(f"{signed} is signed by its own key; have the CA sign server.csr")
    return chain


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, dates.now()
    who = certificate.subject.rfc4514_string() or "the server's certificate"
    if now > end:
        raise ConfigError(f"{path}: {who!r} expired on {end:%Y-%m-%d}; ask the CA for one that is valid")
    if now < start:
        raise ConfigError(
            f"{path}: {who!r} is not valid before {start:%Y-%m-%d %H:%M} UTC; wait, or set the clock right"
        )


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _check_handshake(
    crt_pem: bytes, key_file: Path, passphrase: bytes | None, ca_pem: bytes, name: x509.GeneralName
) -> None:
    """Do what a client will do, with OpenSSL's strict rules, which are Python's default from 3.13 on."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        with TemporaryDirectory() as place:
            crt = Path(place) / "server.crt"
            crt.write_bytes(crt_pem)
            server.load_cert_chain(crt, key_file, lambda: passphrase or b"")
        client.load_verify_locations(cadata=ca_pem.decode())
        ends = [
            client.wrap_bio(to_client, to_server, server_hostname=str(name.value)),
            server.wrap_bio(to_server, to_client, server_side=True),
        ]
        while ends:
            ends = [end for end in ends if not _shaken(end)]
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"TLS clients would refuse this certificate: {error.verify_message}; ask the CA for certificates that "
            "follow RFC 5280, which Python 3.13 and later check"
        ) from error
    except ssl.SSLError as error:
        raise ConfigError(f"no TLS server can use this certificate ({error.reason}); ask the CA for another") from error


def _shaken(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
