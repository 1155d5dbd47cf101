"""Who may speak to whom: a private certificate authority, the server's certificate, a key pair per organisation.

    ca.crt, ca.key            the authority; ca.crt goes to every organisation, ca.key never leaves this folder
    server.crt, server.key    what the server shows
    nodes/NAME.pub            the public keys that the server lets in
    clients/NAME/             what an organisation is handed: ca.crt, node.key, node.pub

A private key has mode 0600 and lies in a folder of mode 0700. Nothing that exists is ever overwritten.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedamole.data.settings import NAME
from fedamole.deployment.hosts import general_name, listed, names_of, server_names
from fedamole.deployment.keys import (
    load_certificates,
    load_private,
    load_public,
    new_key,
    open_to_others,
    public_half,
    public_line,
    write,
    write_private,
)
from fedamole.errors import ConfigError

AUTHORITY_DAYS = 3650
BACKDATED = timedelta(hours=1)
"""Certificates begin this much earlier, as the clocks of two organisations never agree."""
SOON = timedelta(days=30)
"""A certificate that expires within this time is told of."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with certificates or keys; `urgent` where nothing works until it is mended."""

    text: str
    remedy: str
    urgent: bool = True


@dataclass(frozen=True)
class Made:
    """What `make_certificates` did; together all files of the folder that it is in charge of."""

    written: tuple[Path, ...]
    kept: tuple[Path, ...]
    """Files that were there already and were left as they are."""


def make_certificates(
    folder: Path, hosts: Sequence[str], clients: Sequence[str], days: int = 825, renew_server: bool = False
) -> Made:
    """Make what is missing of the authority, the server's certificate and the clients' keys.

    `hosts` are the DNS names and IP addresses by which clients reach the server; none given means localhost alone,
    or, where there is a certificate already, the names that it has. `days` is how long a new server certificate is
    valid, never longer than the authority. `renew_server` issues it anew, for the same key, and keeps the old file as
    server.crt.old. A client admitted with a key of its own is handed ca.crt and no key. Raises ConfigError for a
    host or name that cannot be used, for other hosts than an existing certificate has, and for half a key pair.
    """
    names = _checked_names(clients, roster(folder))
    wanted = server_names(hosts)
    if days < 1:
        raise ConfigError(f"days = {days}: a certificate must be valid for at least 1 day")
    written: list[Path] = []
    kept: list[Path] = []
    _make_authority(folder, written, kept)
    _make_server(folder, wanted if hosts else None, days, renew_server, written, kept)
    for name in names:
        _make_client(folder, name, written, kept)
    return Made(tuple(written), tuple(kept))


def make_own_key(folder: Path, name: str) -> Path:
    """Make an organisation's key pair where it will be used, node.key and node.pub; the .pub alone is sent away.

    An existing pair is kept. Raises ConfigError for a name that cannot be used and for a .pub without its key.
    """
    _check_name(name)
    written: list[Path] = []
    return _pair(folder, name, written, [])


def admit(folder: Path, name: str, public_key: Path) -> Path:
    """Put an organisation's public key among those that the server lets in; returns nodes/NAME.pub.

    Raises ConfigError for anything but an OpenSSH public key of kind EC P-384, for a key that another name has, and
    for a name that has another key.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; `fedamole certs` makes it, or correct the folder")
    present = roster(folder)
    _checked_names([name], {other: path for other, path in present.items() if other != name})
    key = load_public(public_key)
    for other, path in present.items():
        if other != name and load_public(path) == key:
            raise ConfigError(
                f"{public_key}: {other!r} has this key already ({path}), and the server tells clients apart by their "
                f"keys; let {name!r} make a pair of its own, or remove that file if it was a mistake"
            )
    target = folder / "nodes" / f"{name}.pub"
    if target.exists():
        if load_public(target) == key:
            return target
        raise ConfigError(
            f"{name!r} is admitted with another key ({target}); choose another name, or remove that file to replace it"
        )
    write(target, public_line(key, name))
    return target


def roster(folder: Path) -> dict[str, Path]:
    """The organisations that the server lets in, by name: their public keys."""
    found = {path.name.removesuffix(".pub"): path for path in sorted((folder / "nodes").glob("*.pub"))}
    return {name: path for name, path in found.items() if NAME.fullmatch(name)}


def check_server(folder: Path, host: str) -> list[str]:
    """What is wrong with a server's certificate and key, each with its remedy; see `inspect_server`."""
    return [f"{fault.text}; {fault.remedy}" for fault in inspect_server(folder, host)]


def inspect_server(folder: Path, host: str) -> list[Fault]:
    """Missing or unreadable files, dates, names, and whether key, certificate and authority belong together.

    `host` is the name or address by which clients reach the server; an address that means all (0.0.0.0) is in no
    certificate and is not looked for.
    """
    crt, key_file, ca = folder / "server.crt", folder / "server.key", folder / "ca.crt"
    faults = _missing((ca, crt, key_file), "`fedamole certs` makes them, or name the folder that has them")
    faults += _open_files(path for path in (key_file, folder / "ca.key") if path.exists())
    if not (ca.exists() and crt.exists()):
        return faults
    try:
        wanted = None if _is_unspecified(host) else general_name(host)
        (authority, *_), chain = load_certificates(ca), load_certificates(crt)
        if key_file.exists() and public_half(key_file) != chain[0].public_key():
            faults.append(Fault(f"{key_file} does not belong to server.crt", "put the key back that it was made for"))
    except ConfigError as error:
        return [*faults, Fault(str(error), "or `fedamole certs` in another folder")]
    if not all(_issued(child, parent) for child, parent in pairwise([*chain, authority])):
        faults.append(Fault(
            f"{crt} is not signed by ca.crt beside it, so clients will refuse the server",
            "put the ca.crt back that it was made with, or renew the server's certificate",
        ))
    faults += _dates(chain[0], crt, "renew the server's certificate, then restart the server")
    faults += _dates(authority, ca, "make new certificates in another folder and hand them out again")
    names = names_of(chain[0])
    if wanted is not None and wanted not in names:
        text = f"{crt} is for {listed(names)}, not for {host}"
        faults.append(Fault(text, "renew the server's certificate with this host among others"))
    return faults


def inspect_client(folder: Path) -> list[Fault]:
    """The same for what an organisation holds: ca.crt, node.key and, where it is there, node.pub."""
    ca, key_file, pub = folder / "ca.crt", folder / "node.key", folder / "node.pub"
    faults = _missing((ca,), "ask the coordinator for ca.crt")
    faults += _missing((key_file,), "put the key here that you were handed or made, or make one and send its .pub")
    try:
        if key_file.exists():
            faults += _open_files([key_file])
            key = load_private(key_file)
            if pub.exists() and load_public(pub) != key.public_key():
                faults.append(Fault(f"{pub} does not belong to node.key", "send the coordinator the .pub of this key"))
        if ca.exists():
            faults += _dates(load_certificates(ca)[0], ca, "ask the coordinator for new certificates")
    except ConfigError as error:
        faults.append(Fault(str(error), "or ask the coordinator for a new set"))
    return faults


def _missing(paths: Iterable[Path], remedy: str) -> list[Fault]:
    return [Fault(f"{path} is missing", remedy) for path in paths if not path.exists()]


def _open_files(paths: Iterable[Path]) -> list[Fault]:
    """A private key for every user of the machine lets each of them pose as its owner."""
    lax = [path for path in paths if open_to_others(path)]
    return [Fault(f"{path} can be read by others on this machine", f"`chmod 600 {path}`") for path in lax]


def _dates(certificate: x509.Certificate, path: Path, remedy: str) -> list[Fault]:
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, _now()
    if now > end:
        return [Fault(f"{path} expired on {end:%Y-%m-%d}", remedy)]
    if now < start:
        return [Fault(f"{path} is not valid before {start:%Y-%m-%d %H:%M} UTC", "set this machine's clock right")]
    if end - now < SOON:
        days = (end - now).days
        return [Fault(f"{path} expires within {SOON.days} days, on {end:%Y-%m-%d} ({days} left)", remedy, urgent=False)]
    return []


def _issued(child: x509.Certificate, parent: x509.Certificate) -> bool:
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _is_unspecified(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"client name {name!r}: use letters, digits, dot, dash and underscore only, a letter or digit first"
        )


def _checked_names(names: Sequence[str], present: dict[str, Path]) -> list[str]:
    """The names, if each can be used and none differs from another, or from one present, by upper and lower case."""
    known = {name.casefold(): name for name in present}
    seen: set[str] = set()
    for name in names:
        _check_name(name)
        if name in seen:
            raise ConfigError(f"client name {name!r} is given twice: names must differ")
        if (other := known.setdefault(name.casefold(), name)) != name:
            raise ConfigError(f"client names {other!r} and {name!r} are one file on some systems; choose another")
        seen.add(name)
    return list(names)


def _make_authority(folder: Path, written: list[Path], kept: list[Path]) -> None:
    crt, key_file = folder / "ca.crt", folder / "ca.key"
    if crt.exists():
        # Without its key an authority signs nothing more, but a coordinator may well keep that key elsewhere.
        kept.extend(path for path in (crt, key_file) if path.exists())
        return
    if key_file.exists():
        raise ConfigError(f"{key_file} is there without ca.crt; put that back, or move ca.key away to start anew")
    key = new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"FedAMoLE authority {os.urandom(4).hex()}")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _begun(subject, subject, key.public_key(), _now() + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    write_private(key_file, key, PrivateFormat.PKCS8)
    write(crt, certificate.public_bytes(Encoding.PEM))
    written.extend((crt, key_file))


def _make_server(
    folder: Path, names: list[x509.GeneralName] | None, days: int, renew: bool, written: list[Path], kept: list[Path]
) -> None:
    """`names` is None where nobody said which: those of the existing certificate, or localhost alone."""
    crt, key_file = folder / "server.crt", folder / "server.key"
    if crt.exists():
        if not key_file.exists():
            raise ConfigError(f"{crt} is there without server.key; put that back, or move server.crt away")
        present = names_of(load_certificates(crt)[0])
        if not renew:
            if names is not None and set(names) != set(present):
                raise ConfigError(
                    f"{crt} is for {listed(present)}, asked for is {listed(names)}; give the same hosts, or renew the "
                    "server's certificate (--renew): clients keep what they have, the server must be restarted"
                )
            kept.extend((crt, key_file))
            return
        names = names or present
    if key_file.exists():
        key = load_private(key_file)
        kept.append(key_file)
    else:
        key = new_key()
    pem = _issue(folder, key.public_key(), names or server_names(()), days)
    if not key_file.exists():
        write_private(key_file, key, PrivateFormat.PKCS8)
        written.append(key_file)
    if crt.exists():
        places = (crt.with_name(f"server.crt.old{number}") for number in ("", *(f".{at}" for at in range(2, 1000))))
        crt.rename(next(place for place in places if not place.exists()))
    write(crt, pem)
    written.append(crt)


def _issue(folder: Path, key: ec.EllipticCurvePublicKey, names: Sequence[x509.GeneralName], days: int) -> bytes:
    """A server certificate of this authority in PEM."""
    if not (folder / "ca.key").exists():
        raise ConfigError(f"{folder / 'ca.key'} is missing, and without it nothing can be signed; put it back")
    authority, signer = load_certificates(folder / "ca.crt")[0], load_private(folder / "ca.key")
    if signer.public_key() != authority.public_key():
        raise ConfigError(f"{folder}: ca.key does not belong to ca.crt; put the right one back")
    end = min(_now() + timedelta(days=days), authority.not_valid_after_utc)
    if end <= _now():
        raise ConfigError(f"{folder / 'ca.crt'} expired on {end:%Y-%m-%d}; make new certificates in another folder")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedAMoLE server")])
    certificate = (
        _begun(subject, authority.subject, key, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return certificate.public_bytes(Encoding.PEM)


def _make_client(folder: Path, name: str, written: list[Path], kept: list[Path]) -> None:
    own, admitted = folder / "clients" / name, folder / "nodes" / f"{name}.pub"
    if (own / "node.key").exists() or not admitted.exists():
        pub = _pair(own, name, written, kept)
        _keep_or_write(admitted, pub.read_bytes(), written, kept)
        if load_public(admitted) != load_public(pub):
            raise ConfigError(f"{admitted} and {pub} are not the same key; remove the one that is not in use")
    else:
        # The key was made elsewhere, or handed over and removed here: another would not be let in.
        kept.append(admitted)
    _keep_or_write(own / "ca.crt", (folder / "ca.crt").read_bytes(), written, kept)


def _pair(folder: Path, name: str, written: list[Path], kept: list[Path]) -> Path:
    """node.key and node.pub in a folder, made where missing; returns the latter."""
    key_file, pub = folder / "node.key", folder / "node.pub"
    if key_file.exists():
        key = load_private(key_file)
        kept.append(key_file)
    elif pub.exists():
        raise ConfigError(f"{pub} is there without node.key; put that back, or move node.pub away to make a new pair")
    else:
        key = new_key()
        write_private(key_file, key, PrivateFormat.OpenSSH)
        written.append(key_file)
    _keep_or_write(pub, public_line(key.public_key(), name), written, kept)
    if load_public(pub) != key.public_key():
        raise ConfigError(f"{pub} does not belong to node.key beside it; remove it and try again")
    return pub


def _keep_or_write(path: Path, content: bytes, written: list[Path], kept: list[Path]) -> None:
    if path.exists():
        kept.append(path)
    else:
        write(path, content)
        written.append(path)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
    builder = builder.not_valid_before(_now() - BACKDATED).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature, key_cert_sign=key_cert_sign, crl_sign=crl_sign, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
