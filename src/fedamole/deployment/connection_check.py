"""Whether a server can be reached and trusted from here, and if not, what stands in the way.

The question is asked as the client's own connection asks it: with httpx, which takes HTTPS_PROXY, ALL_PROXY and
NO_PROXY from the environment. No text made here holds a proxy's user name or password.
"""

import ipaddress
import json
import re
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from fedamole.deployment.security.dates import SOON
from fedamole.deployment.security.inspection import Fault
from fedamole.deployment.security.tls import client_context

TIMEOUT_S = 5.0
"""Seconds that one step of a connection may take."""
HEALTH_PATH = "/health"
"""What a gateway answers with `{"status": "ok"}`, to anybody."""
_MAX_BYTES = 4096
"""Bytes of the answer that are looked at."""
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})")
# OpenSSL's X509_V_ERR_...: what its verification stopped at.
_NOT_YET, _EXPIRED, _WRONG_NAME = (9,), (10,), (62, 64)
_WRONG_AUTHORITY = (2, 7, 18, 19, 20, 21, 24, 30)
_UNREACHED_BY_PROXY = (500, 502, 503, 504)


class RequestTrace:
    """How far a request has come; httpx's `trace` extension calls it at each step."""

    def __init__(self, host: str, port: int) -> None:
        """Begin a request for a server."""
        self.server, self.name, self.asked = (host.lower(), port), "", (host.lower(), port)
        self.secured = False
        """Whether TLS with the server stands."""

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        """Remember the step that has begun, and to whom a TCP connection is made."""
        name, _, state = event.rpartition(".")
        if state == "started":
            self.name = name
        if state == "complete" and self.with_server:
            self.secured = True
        if event == "connection.connect_tcp.started":
            self.asked = (str(info["host"]).lower(), int(info["port"]))

    @property
    def proxy(self) -> str | None:
        """HOST:PORT of the proxy that is asked instead of the server."""
        return None if self.asked == self.server else "{}:{}".format(*self.asked)

    @property
    def with_server(self) -> bool:
        """Whether the present TLS handshake is with the server, and not with a proxy that itself speaks TLS."""
        return self.name == ("connection.start_tls" if self.proxy is None else "proxy.start_tls")


def parse_address(server: str) -> tuple[str, int] | None:
    """Host and port of HOST:PORT, an IPv6 address in brackets; None for anything else."""
    match = _ADDRESS.fullmatch(server)
    if match is None or not 0 < int(match[3]) < 65536:
        return None
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback: such a connection never goes to a proxy."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_connection(server: str, ca: Path | None) -> tuple[str, list[Fault]]:
    """Try TCP, then TLS 1.3 against `ca`, then GET /health, through a proxy where the environment names one.

    `server` is HOST:PORT, an IPv6 address in brackets; without `ca` TCP alone is tried. Returns what to say where
    nothing is wrong, and what is wrong.
    """
    place = parse_address(server)
    if place is None:
        return "", [Fault(f"{server!r} is not HOST:PORT", "give these two alone, for example fed.example.org:8443")]
    host, port = place
    if ca is None:
        try:
            socket.create_connection((host, port), timeout=TIMEOUT_S).close()
        except OSError as error:
            return "", [_explain_tcp_failure(server, error)]
        return f"{server} answers", [without_tls(host)]
    try:
        context = client_context(ca)
    except OSError:
        text = f"{ca} cannot be read, so the identity of {server} cannot be checked"
        return "", [Fault(text, "ask the coordinator for ca.crt")]
    return _request_health(server, host, port, context)


def _request_health(server: str, host: str, port: int, context: ssl.SSLContext) -> tuple[str, list[Fault]]:
    """GET /health, and what it tells."""
    steps = RequestTrace(host, port)
    try:
        client = httpx.Client(verify=context, timeout=TIMEOUT_S, trust_env=not is_loopback(host))
    except (ValueError, ImportError, httpx.InvalidURL):  # their texts may hold the proxy's password
        text = "the proxy in HTTPS_PROXY or ALL_PROXY cannot be used"
        return "", [Fault(text, "write it as http://USER:PASSWORD@HOST:PORT (SOCKS is not supported)")]
    address = f"https://[{host}]:{port}{HEALTH_PATH}" if ":" in host else f"https://{host}:{port}{HEALTH_PATH}"
    try:
        with client, client.stream("GET", address, extensions={"trace": steps}) as response:
            secured: ssl.SSLObject = response.extensions["network_stream"].get_extra_info("ssl_object")
            end = ssl.cert_time_to_seconds(str((secured.getpeercert() or {})["notAfter"]))
            healthy = response.status_code == 200 and _says_ok(response)
            status = response.status_code
    except httpx.InvalidURL:
        return "", [Fault(f"{server}: this is no host name", "correct the name")]
    except httpx.HTTPError as error:
        return "", [_explain_failure(server, error, steps)]
    way = "" if steps.proxy is None else f" through the proxy {steps.proxy}"
    faults = []
    if status == 503:
        text = f"{server} has the right certificate, but says that it cannot serve now (503): its SuperLink is down"
        faults.append(Fault(text, "wait a minute, then look at the coordinator's logs"))
    elif not healthy:
        text = f"{server} has the right certificate, but its answer to GET {HEALTH_PATH} is not the expected one ({status})"
        faults.append(Fault(text, "use the same version of fedamole at the coordinator and here"))
    until = time.strftime("%Y-%m-%d", time.gmtime(end))
    if end - time.time() < SOON.total_seconds():
        faults.append(Fault(f"{server}: its certificate expires on {until}", "tell the coordinator", urgent=False))
    return f"{server} answers{way}; its certificate is trusted and valid until {until}", faults


def _says_ok(response: httpx.Response) -> bool:
    """Whether a body, of which a few bytes are read, is the gateway's."""
    body, end = b"", time.monotonic() + TIMEOUT_S
    for piece in response.iter_raw(_MAX_BYTES):
        body += piece
        if len(body) > _MAX_BYTES or time.monotonic() > end:
            return False
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("status") == "ok"


def without_tls(host: str) -> Fault:
    """What it means to run without certificates: bearable on this machine alone."""
    if host in ("localhost", "127.0.0.1", "::1"):
        return Fault("no certificates: for trials on this machine only", "make certificates", urgent=False)
    text = f"no certificates, yet {host or 'the server'} is not this machine alone: all would travel in the open"
    return Fault(text, "name the folder with the certificates")


def _explain_failure(server: str, error: httpx.HTTPError, steps: RequestTrace) -> Fault:
    """Why there is no answer, by the step that failed and the error below httpx's own."""
    cause = next((below for below in _causes(error) if isinstance(below, OSError)), None)
    if isinstance(error, httpx.ProxyError):
        return _explain_proxy_refusal(server, str(error), steps)
    if steps.name == "connection.connect_tcp":
        return _explain_tcp_failure(server, cause, steps.proxy)
    if steps.with_server and not steps.secured:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _explain_untrusted(server, cause, steps.proxy)
        return _explain_tls_failure(server, cause)
    if not steps.secured:
        text = f"the proxy {steps.proxy} accepts connections, but does not answer as an HTTP proxy"
        return Fault(text, "correct HTTPS_PROXY: its host, its port, and http:// or https:// before them")
    text = f"{server} has the right certificate, but does not answer GET {HEALTH_PATH} ({type(error).__name__})"
    return Fault(text, "look at the coordinator's logs; the port may be another program's")


def _causes(error: BaseException) -> Iterator[BaseException]:
    below: BaseException | None = error
    while below is not None:
        yield below
        below = below.__cause__ or below.__context__


def _explain_proxy_refusal(server: str, answer: str, steps: RequestTrace) -> Fault:
    """What a proxy's answer to CONNECT means; of its words the number alone is used."""
    status = int(answer[:3]) if answer[:3].isdigit() else 0
    where = f"the proxy {steps.proxy}"
    if status == 407:
        text = f"{where} asks for a user name and password, or does not accept those given (407)"
        return Fault(text, "write HTTPS_PROXY as http://USER:PASSWORD@HOST:PORT, special characters as %XX")
    if status in _UNREACHED_BY_PROXY:
        return Fault(f"{where} cannot reach {server} ({status})", "correct the address, or ask who runs the proxy")
    text = f"{where} refuses a connection to {server} ({status or 'no HTTP answer'})"
    return Fault(text, f"ask for CONNECT to {server} to be allowed, or add the host to NO_PROXY if no proxy is needed")


def _explain_tcp_failure(server: str, error: OSError | None, proxy: str | None = None) -> Fault:
    """Why there is no TCP connection, to the server or to the proxy before it."""
    if isinstance(error, socket.gaierror):
        text, remedy = "the name has no address", "correct the name, or ask for the server's address"
    elif isinstance(error, ConnectionRefusedError):
        text, remedy = "refused: nothing listens there", "start the server, or correct the port"
    elif isinstance(error, TimeoutError):
        text = f"no answer within {TIMEOUT_S:.0f} s (timeout)"
        remedy = "a firewall may drop the packets: ask for this port to be opened, or correct the address"
    else:
        text = f"no connection: {getattr(error, 'strerror', None) or type(error).__name__}"
        remedy = "look at network, VPN and firewall"
    if proxy is None:
        return Fault(f"{server}: {text}", remedy)
    host = server.rpartition(":")[0]
    remedy = f"correct HTTPS_PROXY, or add {host} to NO_PROXY if the server can be reached without a proxy"
    return Fault(f"the proxy {proxy} (HTTPS_PROXY) cannot be reached: {text}", remedy)


def _explain_tls_failure(server: str, error: OSError | None) -> Fault:
    """A TLS handshake that is cut off or never answered."""
    if isinstance(error, TimeoutError):
        text = f"{server} accepts connections, no TLS answer within {TIMEOUT_S:.0f} s"
        return Fault(text, "it may be no FedAMoLE server; correct the port")
    reason = getattr(error, "reason", None) or type(error).__name__
    remedy = "the port speaks no TLS 1.3: the server runs without certificates, or the port is another program's"
    return Fault(f"{server} accepts connections, TLS fails: {reason}", remedy)


def _explain_untrusted(server: str, error: ssl.SSLCertVerificationError, proxy: str | None) -> Fault:
    """Why the certificate shown is not accepted."""
    code = error.verify_code
    if code in _WRONG_NAME:
        text = "its certificate is not for this name"
        remedy = "connect by a name that it is for, or have the coordinator renew it with this name"
    elif code in _EXPIRED:
        text, remedy = "its certificate has expired", "the coordinator renews it; if it is recent, set this clock right"
    elif code in _NOT_YET:
        text, remedy = "its certificate is not valid yet", "set the clock of this machine right"
    elif code in _WRONG_AUTHORITY and proxy is not None:
        text = f"the certificate is not from the authority in ca.crt: the proxy {proxy} opens TLS itself, or wrong CA"
        remedy = "ask who runs the proxy to pass this server through unopened; else ask for the present ca.crt"
    elif code in _WRONG_AUTHORITY:
        text = "its certificate is not from the authority in ca.crt (wrong CA)"
        remedy = "ask the coordinator for the present ca.crt; if it is the same, somebody may stand in between"
    else:
        text, remedy = f"its certificate is refused: {error.verify_message}", "tell the coordinator"
    return Fault(f"{server}: {text}", remedy)
