"""A server certificate from the organisation's own CA, through a signing request; server.key never leaves its machine.

`request_server` writes server.key and server.csr. The organisation's CA signs server.csr. `install_server` checks the
returned certificate, and installs it as server.crt and the CA certificate as ca.crt.
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
    """Write server.key, if it is missing, and server.csr, a PKCS#10 request for these hosts; make the order key.

    `hosts` are the names and addresses by which clients reach the server; without any, those of the existing
    server.crt. An older request for other hosts is kept as server.csr.old. The passphrase encrypts a new
    coordinator.key; server.key is never encrypted. Raises ConfigError for a folder with its own CA.
    """
    _refuse_own_ca(folder)
    crt, csr, key_file = folder / "server.crt", folder / "server.csr", folder / "server.key"
    names = list(dict.fromkeys(map(general_name, hosts)))
    if not names and crt.exists():
        names = names_of(load_certificates(crt)[0])
    if not names:
        raise ConfigError("--request: give every name by which clients reach the server, such as --host fl.example.org")
    changes = FileChanges()
    if key_file.exists():
        key = load_private(key_file, passphrase)
        changes.kept.append(key_file)
    elif crt.exists():
        raise ConfigError(f"{crt} exists without server.key; restore server.key, or move server.crt away")
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
    common_name = str(names[0].value)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if len(common_name) <= 64 else [])
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
    """Check a certificate signed by the organisation's CA, then install it as server.crt and its CA as ca.crt.

    `signed` and `ca` are PEM files; intermediate certificates may be in either, the root must be in `ca`. server.crt
    gets the certificate and its intermediates, ca.crt the root certificates of `ca`. The checks cover the match with
    server.key, the chain to the root, dates, names (`hosts`, else those of server.csr), usage, and a TLS handshake.
    Existing files are kept as .old. If anything is wrong, it raises ConfigError and changes nothing.
    """
    _refuse_own_ca(folder)
    key_file = folder / "server.key"
    if not key_file.exists():
        raise ConfigError(f"{key_file} is missing: make it and the request with `fedamole certs --request --host NAME`")
    key, received, trusted = public_half(key_file, passphrase), load_certificates(signed), load_certificates(ca)
    leaf = next((certificate for certificate in received if certificate.public_key() == key), None)
    if leaf is None:
        raise ConfigError(f"{signed} does not belong to {key_file}: ask the CA to sign {folder / 'server.csr'}")
    required_names = _required_names(folder, hosts) or names_of(leaf)
    _check_leaf(leaf, signed, required_names)
    roots = [certificate for certificate in trusted if is_issued_by(certificate, certificate)]
    chain = _chain(
        leaf, [*(certificate for certificate in received if certificate is not leaf), *trusted], roots, signed, ca
    )
    for certificate in chain:
        _check_dates(certificate, signed)
    crt_pem, ca_pem = _pem(chain[:-1]), _pem([chain[-1], *(root for root in roots if root != chain[-1])])
    _check_handshake(crt_pem, key_file, passphrase, ca_pem, required_names[0])
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
            f"{folder} has its own CA (ca.key); renew its certificate with --renew. For the organisation's CA choose "
            "another --folder, or move ca.key, ca.crt and server.crt away; clients then need the new ca.crt"
        )


def _required_names(folder: Path, hosts: Sequence[str]) -> list[x509.GeneralName]:
    if hosts:
        return [general_name(host) for host in hosts]
    csr = folder / "server.csr"
    return names_of(load_request(csr)) if csr.exists() else []


def _check_leaf(leaf: x509.Certificate, path: Path, required: list[x509.GeneralName]) -> None:
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
        raise ConfigError(f"{path} is not a server certificate; ask the CA for the extended key usage serverAuth")
    names = names_of(leaf)
    if missing := [name for name in required if name not in names]:
        raise ConfigError(
            f"{path} is for {listed(names)}, not for {listed(missing)}; ask the CA to include every requested name in "
            "the subject alternative names"
        )
    if not names:
        raise ConfigError(f"{path} has no names; ask the CA for subject alternative names")


def _chain(
    leaf: x509.Certificate, pool: list[x509.Certificate], roots: list[x509.Certificate], signed: Path, ca: Path
) -> list[x509.Certificate]:
    """Return the certificates from the server's to the root, each issued by the next."""
    chain = [leaf]
    while not is_issued_by(chain[-1], chain[-1]):
        child = chain[-1]
        parents = [candidate for candidate in pool if candidate not in chain and is_issued_by(child, candidate)]
        if not parents:
            raise ConfigError(
                f"{signed}: the certificate of its issuer, {child.issuer.rfc4514_string()!r}, is in neither file; "
                f"add it to {ca}: all intermediate certificates and the root are needed"
            )
        chain.append(parents[0])
    if chain[-1] not in roots:
        raise ConfigError(
            f"{ca}: the root, {chain[-1].subject.rfc4514_string()!r}, is only in {signed}; it must be in --ca, because "
            "clients trust that file"
        )
    if len(chain) == 1:
        raise ConfigError(f"{signed} is self-signed; ask the CA to sign server.csr")
    return chain


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, dates.now()
    subject = certificate.subject.rfc4514_string() or "the server's certificate"
    if now > end:
        raise ConfigError(f"{path}: {subject!r} expired on {end:%Y-%m-%d}; ask the CA for one that is valid")
    if now < start:
        raise ConfigError(
            f"{path}: {subject!r} is not valid before {start:%Y-%m-%d %H:%M} UTC; wait, or correct the clock"
        )


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _check_handshake(
    crt_pem: bytes, key_file: Path, passphrase: bytes | None, ca_pem: bytes, name: x509.GeneralName
) -> None:
    """Perform a client's TLS handshake with OpenSSL's strict rules, the default since Python 3.13."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        with TemporaryDirectory() as folder:
            crt = Path(folder) / "server.crt"
            crt.write_bytes(crt_pem)
            server.load_cert_chain(crt, key_file, lambda: passphrase or b"")
        client.load_verify_locations(cadata=ca_pem.decode())
        handshaking = [
            client.wrap_bio(to_client, to_server, server_hostname=str(name.value)),
            server.wrap_bio(to_server, to_client, server_side=True),
        ]
        while handshaking:
            handshaking = [end for end in handshaking if not _handshake_done(end)]
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"TLS clients would refuse this certificate: {error.verify_message}; ask the CA for certificates that "
            "follow RFC 5280, which Python 3.13 and later check"
        ) from error
    except ssl.SSLError as error:
        raise ConfigError(f"no TLS server can use this certificate ({error.reason}); ask the CA for another") from error


def _handshake_done(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
