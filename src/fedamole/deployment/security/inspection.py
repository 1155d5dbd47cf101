"""What is wrong with a folder of certificates and keys; nothing here changes anything."""

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
    """Something wrong with certificates or keys; `urgent` where nothing works until it is mended."""

    text: str
    remedy: str
    urgent: bool = True


def check_server(folder: Path, host: str, passphrase: bytes | None = None) -> tuple[list[str], list[str]]:
    """Return what keeps a server from starting, and what its operator should be warned of; see `inspect_server`."""
    faults = inspect_server(folder, host, passphrase)
    errors, warnings = (
        [f"{fault.text}; {fault.remedy}" for fault in faults if fault.urgent is urgent] for urgent in (True, False)
    )
    return errors, warnings


def inspect_server(folder: Path, host: str, passphrase: bytes | None = None) -> list[Fault]:
    """Look at the files of a coordinator: presence, dates, names, and whether they belong together.

    `host` is the name or address by which clients reach the server; an address that means all (0.0.0.0) is in no
    certificate and is not looked for. The passphrase opens a locked coordinator.key. Dates near the end, and the ends
    of clients' keys, are not urgent.
    """
    ca, crt, key = folder / "ca.crt", folder / "server.crt", folder / "server.key"
    faults = _missing((ca, crt, key), "`fedamole certs` makes them, or name the folder that has them")
    faults += _open_files(folder / name for name in ("server.key", "ca.key", "coordinator.key"))
    faults += _order_key(folder, passphrase)
    faults += _client_keys(folder)
    if not (ca.exists() and crt.exists()):
        return faults
    try:
        wanted = None if _is_unspecified(host) else general_name(host)
        authorities, chain = load_certificates(ca), load_certificates(crt)
        if key.exists():
            faults += _server_key(key, chain[0])
    except ConfigError as error:
        return [*faults, Fault(str(error), "or `fedamole certs` in another folder")]
    links = all(is_issued_by(child, parent) for child, parent in pairwise(chain))
    if not (links and any(is_issued_by(chain[-1], authority) for authority in authorities)):
        text = f"{crt} is not signed by ca.crt beside it, so clients will refuse the server"
        remedy = "put the ca.crt back that it was made with, or renew the server's certificate"
        faults.append(Fault(text, remedy))
    for certificate in chain:
        faults += _dates(certificate, crt, "renew the server's certificate (a running server takes it at once)")
    faults += _authority_dates(authorities, ca, "make new certificates in another folder and hand them out again")
    names = names_of(chain[0])
    if wanted is not None and wanted not in names:
        text = f"{crt} is for {listed(names)}, not for {host}"
        faults.append(Fault(text, "renew the server's certificate with this host among others"))
    return faults


def inspect_client(folder: Path, passphrase: bytes | None = None) -> list[Fault]:
    """Look at what a client holds: ca.crt, coordinator.pub, node.key and, where it is there, node.pub.

    The passphrase opens a locked node.key.
    """
    ca, orders = folder / "ca.crt", folder / "coordinator.pub"
    key_file, pub = folder / "node.key", folder / "node.pub"
    faults = _missing((ca,), "ask the coordinator for ca.crt")
    faults += _missing((orders,), "ask the coordinator for coordinator.pub")
    faults += _missing((key_file,), "put the key here that you were handed or made, or make one and send its .csr")
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
            f"{path} is locked by a passphrase, and the server reads it unattended",
            f"remove the passphrase by `ssh-keygen -p -m PKCS8 -f {path}` (empty new passphrase), or keep the folder "
            "on an encrypted disk",
        )
    elif public_half(path) != certificate.public_key():
        yield Fault(f"{path} does not belong to server.crt", "put the key back that it was made for")


def _order_key(folder: Path, passphrase: bytes | None) -> list[Fault]:
    key_file, pub = folder / "coordinator.key", folder / "coordinator.pub"
    missing = _missing((key_file, pub), f"`fedamole certs --folder {folder}` makes it; send coordinator.pub to clients")
    if missing:
        return missing
    try:
        if load_private(key_file, passphrase).public_key() != load_public(pub):
            remedy = "put the coordinator.pub back that was sent to the clients, or the key that belongs to it"
            return [Fault(f"{key_file} does not belong to coordinator.pub, so clients would refuse its orders", remedy)]
    except ConfigError as error:
        return [Fault(str(error), "clients obey only orders that are signed with this key")]
    return []


def _client_keys(folder: Path) -> Iterator[Fault]:
    for name, path in key_files(folder).items():
        try:
            found = read(name, path)
        except ConfigError as error:
            yield Fault(str(error), f"or `fedamole clients remove {name}`")
            continue
        remedy = f"`fedamole clients extend {name}` gives it a later last day"
        if found.until is None:
            yield Fault(f"{path} has no last valid day (it was made by an older version)", remedy, urgent=False)
        elif found.state == "expired":
            yield Fault(f"{path} expired after {found.until}: the client is refused", remedy, urgent=False)
        elif found.state == "ends soon":
            yield Fault(f"{path} is valid until {found.until} only", remedy, urgent=False)


def _missing(files: Iterable[Path], remedy: str) -> list[Fault]:
    return [Fault(f"{path} is missing", remedy) for path in files if not path.exists()]


def _open_files(files: Iterable[Path]) -> list[Fault]:
    """A private key for every user of the machine lets each of them pose as its owner."""
    lax = [path for path in files if path.exists() and open_to_others(path)]
    return [Fault(f"{path} can be read by others on this machine", f"`chmod 600 {path}`") for path in lax]


def _authority_dates(authorities: list[x509.Certificate], path: Path, remedy: str) -> list[Fault]:
    """Of several CAs, as while one follows another, one that is valid is enough."""
    found = [_dates(authority, path, remedy) for authority in authorities]
    if any(not any(fault.urgent for fault in faults) for faults in found):
        return [fault for faults in found for fault in faults if not fault.urgent]
    return [fault for faults in found for fault in faults]


def _dates(certificate: x509.Certificate, path: Path, remedy: str) -> list[Fault]:
    start, end, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, dates.now()
    if now > end:
        return [Fault(f"{path} expired on {end:%Y-%m-%d}", remedy)]
    if now < start:
        return [Fault(f"{path} is not valid before {start:%Y-%m-%d %H:%M} UTC", "set this machine's clock right")]
    if end - now < dates.SOON:
        left = f"expires within {dates.SOON.days} days, on {end:%Y-%m-%d} ({(end - now).days} left)"
        return [Fault(f"{path} {left}", remedy, urgent=False)]
    return []


def _is_unspecified(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")
