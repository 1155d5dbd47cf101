"""TLS settings of all connections of a deployment."""

import ssl
from pathlib import Path


def require_tls_1_3(context: ssl.SSLContext) -> ssl.SSLContext:
    """Set TLS 1.3 as the minimum version of a context, and return it."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def client_context(ca: Path) -> ssl.SSLContext:
    """Return a client's TLS context that trusts only the certificate authority in a PEM file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=ca)
    return require_tls_1_3(context)
