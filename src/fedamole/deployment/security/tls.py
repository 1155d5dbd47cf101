"""TLS as every connection of a deployment has it."""

import ssl
from pathlib import Path


def require_tls_1_3(context: ssl.SSLContext) -> ssl.SSLContext:
    """Refuse older versions of TLS in a context, and return it."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def client_context(ca: Path) -> ssl.SSLContext:
    """A client's context that trusts the authority in a PEM file alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=ca)
    return require_tls_1_3(context)
