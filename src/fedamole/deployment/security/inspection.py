"""Read-only checks of a folder of certificates and keys."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cryptography import x509

from fedamole.deployment.security import dates
from fedamole.deployment.security.certificate_names import general_name, listed, names_of
from fedamole.deployment.security.certificates import is_issued_by
from fedamole.deployment.security.client_keys import key_files, read
from fedamole.deployment.security.keys import (
    is_locked,
    load_certificates,
    load_private,
    load_public,
    open_to_others,
    public_half,
)
from fedamole.errors import ConfigError


@dataclass(frozen=True)
class Fault:
    """A problem with certificates or keys; `urgent` if nothing works until it is fixed."""

    text: str
    remedy: str
    urgent: bool = True


def check_server(folder: Path, host: str, passphrase: bytes | None = None) -> tuple[list[str], list[str]]:
    """Return the errors that prevent a server from starting and the warnings for its operator."""
    faults = inspect_server(folder, host, passphrase)
    errors, warnings = (
        [f"{fault.text}; {fault.remedy}" for fault in faults if fault.urgent is urgent] for urgent in (True, False)
    )
    return errors, warnings


def inspect_server(folder: Path, host: str, passphrase: bytes | None = None) -> list[Fault]:
    """Check a coordinator's files: presence, dates, names, and whether they belong together.

    `host` is the name or address by which clients reach the server; 0.0.0.0, which stands for all addresses, is in no
    certificate and is not checked. The passphrase decrypts an encrypted coordinator.key. Approaching expiry, and the
    expiry of client keys, are not urgent.
    """
    ca, crt, key = folder / "ca.crt", folder / "server.crt", folder / "server.key"
    faults = _missing((ca, crt, key), "create them with `fedamole certs`, or choose the folder that has them")
    faults += _open_files(folder / name for name in ("server.key", "ca.key", "coordinator.key"))
    faults += _order_key(folder, passphrase)
    faults += _client_keys(folder)
    if not (ca.exists() and crt.exists()):
        return faults
    try:
        expected = None if _is_unspecified(host) else general_name(host)
        authorities, chain = load_certificates(ca), load_certificates(crt)
        if key.exists():
            faults += _server_key(key, chain[0])
    except ConfigError as error:
        return [*faults, Fault(str(error), "or create new ones with `fedamole certs` in another folder")]
    links = all(is_issued_by(child, parent) for child, parent in pairwise(chain))
    if not (links and any(is_issued_by(chain[-1], authority) for authority in authorities)):
        text = f"{crt} is not signed by ca.crt in the same folder, so clients will refuse the server"
        remedy = "restore the ca.crt it was made with, or renew the server certificate"
        faults.append(Fault(text, remedy))
    for certificate in chain:
        faults += _dates(certificate, crt, "renew the server certificate (a running server loads it at once)")
    faults += _authority_dates(authorities, ca, "make new certificates in another folder and send them to all clients")
    names = names_of(chain[0])
    if expected is not None and expected not in names:
        text = f"{crt} is for {listed(names)}, not for {host}"
        faults.append(Fault(text, "renew the server certificate with this host among others"))
    return faults


def inspect_client(folder: Path, passphrase: bytes | None = None) -> list[Fault]:
    """Check a client's files: ca.crt, coordinator.pub, node.key and, if present, node.pub.

    The passphrase decrypts an encrypted node.key.
    """
    ca, orders = folder / "ca.crt", folder / "coordinator.pub"
    key_file, pub = folder / "node.key", folder / "node.pub"
    faults = _missing((ca,), "ask the coordinator for ca.crt")
    faults += _missing((orders,), "ask the coordinator for coordinator.pub")
    faults += _missing((key_file,), "copy the key that you got or made here, or make one and send its .csr")
    faults += _open_files((key_file,))
    try:
        if key_file.exists():
            key = load_private(key_file, passphrase)
            if pub.exists() and load_public(pub) != key.public_key():
                faults.append(Fault(f"{pub} does not belong to node.key", "send the coordinator the .csr of this key"))
        if orders.exists():
            load_public(orders)
        if ca.exists():
            faults += _authority_dates(load_certificates(ca), ca, "ask the coordinator for new certificates")
    except ConfigError as error:
        faults.append(Fault(str(error), "or ask the coordinator for a new set"))
    return faults


def _server_key(path: Path, certificate: x509.Certificate) -> Iterator[Fault]:
    if is_locked(path):
        yield Fault(
            f"{path} is encrypted, but the server reads it unattended",
            f"remove the passphrase with `ssh-keygen -p -m PKCS8 -f {path}` (empty new passphrase), and protect the "
            "folder with disk encryption if needed",
        )
    elif public_half(path) != certificate.public_key():
        yield Fault(f"{path} does not belong to server.crt", "restore the key it was made for")


def _order_key(folder: Path, passphrase: bytes | None) -> list[Fault]:
    key_file, pub = folder / "coordinator.key", folder / "coordinator.pub"
    missing = _missing(
        (key_file, pub), f"create it with `fedamole certs --folder {folder}`; send coordinator.pub to clients"
    )
    if missing:
        return missing
    try:
        if load_private(key_file, passphrase).public_key() != load_public(pub):
            remedy = "restore the coordinator.pub that was sent to the clients, or the key that belongs to it"
            return [Fault(f"{key_file} does not belong to coordinator.pub, so clients would refuse its orders", remedy)]
    except ConfigError as error:
        return [Fault(str(error), "clients accept only orders signed with this key")]
    return []


def _client_keys(folder: Path) -> Iterator[Fault]:
    for name, path in key_files(folder).items():
        try:
            key = read(name, path)
        except ConfigError as error:
            yield Fault(str(error), f"or remove it with `fedamole clients remove {name}`")
            continue
        remedy = f"extend it with `fedamole clients extend {name}`"
        if key.until is None:
            yield Fault(f"{path} does not expire (it was made by an older version)", remedy, urgent=False)
        elif key.state == "expired":
            yield Fault(f"{path} expired after {key.until}: the client is refused", remedy, urgent=False)
        elif key.state == "ends soon":
            yield Fault(f"{path} expires soon, on {key.until}", remedy, urgent=False)


def _missing(files: Iterable[Path], remedy: str) -> list[Fault]:
    return [Fault(f"{path} is missing", remedy) for path in files if not path.exists()]


def _open_files(files: Iterable[Path]) -> list[Fault]:
    """Report private keys that every user of the machine can read, and so could use."""
    readable = [path for path in files if path.exists() and open_to_others(path)]
    return [Fault(f"{path} can be read by other users of this machine", f"run `chmod 600 {path}`") for path in readable]


def _authority_dates(authorities: list[x509.Certificate], path: Path, remedy: str) -> list[Fault]:
    """Check CA certificates; during a change of CA it is enough that one of them is valid."""
    faults_of_each = [_dates(authority, path, remedy) for authority in authorities]
    if any(not any(fault.urgent for fault in faults) for faults in faults_of_each):
        return [fault for faults in faults_of_each for fault in faults if not fault.urgent]
    return [fault for faults in faults_of_each for fault in faults]


def _dates(certificate: x509.Certificate, path: Path, remedy: str) -> list[Fault]:
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, dates.now()
    if now > end:
        return [Fault(f"{path} expired on {end:%Y-%m-%d}", remedy)]
    if now < start:
        return [Fault(f"{path} is not valid before {start:%Y-%m-%d %H:%M} UTC", "correct this machine's clock")]
    if end - now < dates.SOON:
        text = f"expires within {dates.SOON.days} days, on {end:%Y-%m-%d} ({(end - now).days} left)"
        return [Fault(f"{path} {text}", remedy, urgent=False)]
    return []


def _is_unspecified(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")
