"""By which names and addresses a server may be called, and how they stand in its certificate."""

import ipaddress
import re
from collections.abc import Sequence

from cryptography import x509

from fedamole.errors import ConfigError

ALWAYS = ("localhost", "127.0.0.1")
"""Names every server certificate holds: Flower's own processes beside the server speak to it by these."""
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def server_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """What a certificate for these hosts holds, each once; ConfigError for one that is neither name nor address."""
    return list(dict.fromkeys(general_name(host) for host in (*hosts, *ALWAYS)))


def general_name(host: str) -> x509.GeneralName:
    """A host as certificates hold it; ConfigError for a URL, a port, or an address that only a server listens on."""
    host = host.lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        if len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit():
            return x509.DNSName(host)
        raise ConfigError(
            f"host {host!r}: neither an IP address nor a DNS name; give it without https://, port and brackets, and "
            "letters outside ASCII as xn--..."
        ) from None
    if address.is_unspecified:
        raise ConfigError(f"host {host!r}: is no address that clients can connect to; give the one that they use")
    return x509.IPAddress(address)


def names_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    """Return the names that a certificate or a request is for, DNS names in lower case."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [x509.DNSName(name.value.lower()) if isinstance(name, x509.DNSName) else name for name in names]


def listed(names: Sequence[x509.GeneralName]) -> str:
    """Names for a person, sorted."""
    return ", ".join(sorted(str(name.value) for name in names)) or "no name"
