"""Whether a server can be reached and trusted from here, and if not, what stands in the way."""

import re
import socket
import ssl
import time
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

from fedamole.deployment.dates import SOON
from fedamole.deployment.inspection import Fault

PATIENCE = 5.0
"""Seconds that a connection may take."""
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})")
# OpenSSL's X509_V_ERR_...: what its verification stopped at.
_NOT_YET, _EXPIRED, _WRONG_NAME = (9,), (10,), (62, 64)
_WRONG_AUTHORITY = (2, 7, 18, 19, 20, 21, 24, 30)


def reach(server: str, ca: Path | None) -> tuple[str, list[Fault]]:
    """Try TCP, then TLS against `ca`, as Flower's client does; without it, TCP alone.

    `server` is HOST:PORT, an IPv6 address in brackets. Returns what to say where nothing is wrong, and what is.
    """
    match = _ADDRESS.fullmatch(server)
    if match is None or not 0 < int(match[3]) < 65536:
        return "", [Fault(f"{server!r} is not HOST:PORT", "give these two alone, for example fed.example.org:8443")]
    host, port = match[1] or match[2], int(match[3])
    faults = [_proxied(host)] if "https" in getproxies() and not proxy_bypass(host) else []
    fine = f"{server} answers"
    try:
        stream = socket.create_connection((host, port), timeout=PATIENCE)
    except OSError as error:
        return fine, [*faults, _unreached(server, error)]
    with stream:
        if ca is None:
            return fine, [*faults, without_tls(host)]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cafile=ca)
        except OSError:
            text = f"{server} accepts connections, but {ca} cannot be read, so its identity cannot be checked"
            return fine, [*faults, Fault(text, "ask the coordinator for ca.crt")]
        end = _handshake(context, stream, host, server)
    if isinstance(end, Fault):
        return fine, [*faults, end]
    until = time.strftime("%Y-%m-%d", time.gmtime(end))
    if end - time.time() < SOON.total_seconds():
        faults.append(Fault(f"{server}: its certificate expires on {until}", "tell the coordinator", urgent=False))
    return f"{fine}; its certificate is trusted and valid until {until}", faults


def without_tls(host: str) -> Fault:
    """What it means to run without certificates: bearable on this machine alone."""
    if host in ("localhost", "127.0.0.1", "::1"):
        return Fault("no certificates: for trials on this machine only", "make certificates", urgent=False)
    text = f"no certificates, yet {host or 'the server'} is not this machine alone: all would travel in the open"
    return Fault(text, "name the folder with the certificates")


def _proxied(host: str) -> Fault:
    text = f"HTTPS_PROXY is set, so Flower will ask that proxy for {host}; here it was tried without"
    return Fault(text, f"if the proxy does not lead there, add {host} to NO_PROXY", urgent=False)


def _unreached(server: str, error: OSError) -> Fault:
    """Why there is no TCP connection."""
    if isinstance(error, socket.gaierror):
        text, remedy = "the name has no address", "correct the name, or ask for the server's address"
    elif isinstance(error, ConnectionRefusedError):
        text, remedy = "refused: nothing listens there", "start the server, or correct the port"
    elif isinstance(error, TimeoutError):
        text = f"no answer within {PATIENCE:.0f} s (timeout)"
        remedy = "a firewall may drop the packets: ask for this port to be opened, or correct the address"
    else:
        text, remedy = f"no connection: {error.strerror or error}", "look at network, VPN and firewall"
    return Fault(f"{server}: {text}", remedy)


def _handshake(context: ssl.SSLContext, stream: socket.socket, host: str, server: str) -> float | Fault:
    """When the certificate shown expires, in seconds since 1970."""
    try:
        with context.wrap_socket(stream, server_hostname=host) as secured:
            shown = secured.getpeercert() or {}
            return float(ssl.cert_time_to_seconds(str(shown["notAfter"])))
    except ssl.SSLCertVerificationError as error:
        return _distrusted(server, error)
    except TimeoutError:
        text = f"{server} accepts connections, no TLS answer within {PATIENCE:.0f} s"
        return Fault(text, "it may be no FedAMoLE server; correct the port")
    except OSError as error:  # a TLS error, and a connection that is cut off
        reason = getattr(error, "reason", None) or type(error).__name__
        remedy = "the port speaks no TLS: the server runs without certificates, or the port is another program's"
        return Fault(f"{server} accepts connections, TLS fails: {reason}", remedy)


def _distrusted(server: str, error: ssl.SSLCertVerificationError) -> Fault:
    """Why the certificate shown is not accepted."""
    code = error.verify_code
    if code in _WRONG_NAME:
        text = "its certificate is not for this name"
        remedy = "connect by a name that it is for, or have the coordinator renew it with this name"
    elif code in _EXPIRED:
        text, remedy = "its certificate has expired", "the coordinator renews it; if it is recent, set this clock right"
    elif code in _NOT_YET:
        text, remedy = "its certificate is not valid yet", "set the clock of this machine right"
    elif code in _WRONG_AUTHORITY:
        text = "its certificate is not from the authority in ca.crt (wrong CA)"
        remedy = "ask the coordinator for the present ca.crt; if it is the same, somebody may stand in between"
    else:
        text, remedy = f"its certificate is refused: {error.verify_message}", "tell the coordinator"
    return Fault(f"{server}: {text}", remedy)
