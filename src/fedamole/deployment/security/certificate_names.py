"""DNS names and IP addresses of a server, and their form in its certificate."""

import ipaddress
import re
from collections.abc import Sequence

from cryptography import x509

from fedamole.errors import ConfigError

ALWAYS = ("localhost", "127.0.0.1")
"""Names in every server certificate: Flower's own processes on the server use them to connect to it."""
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def server_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return the certificate names for these hosts, without duplicates; ConfigError for an invalid one."""
    return list(dict.fromkeys(general_name(host) for host in (*hosts, *ALWAYS)))


def general_name(host: str) -> x509.GeneralName:
    """Return the certificate name of a host; ConfigError for a URL, a port, or a listen-only address."""
    host = host.lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        if len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit():
            return x509.DNSName(host)
        raise ConfigError(
            f"host {host!r}: neither an IP address nor a DNS name; give it without https://, port and brackets, and "
            "write letters outside ASCII as xn--..."
        ) from None
    if address.is_unspecified:
        raise ConfigError(f"host {host!r}: clients cannot connect to this address; give the one that they use")
    return x509.IPAddress(address)


def names_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    """Return the names of a certificate or signing request, DNS names in lower case."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [x509.DNSName(name.value.lower()) if isinstance(name, x509.DNSName) else name for name in names]


def listed(names: Sequence[x509.GeneralName]) -> str:
    """Return the names as a sorted, comma-separated list."""
    return ", ".join(sorted(str(name.value) for name in names)) or "no name"
