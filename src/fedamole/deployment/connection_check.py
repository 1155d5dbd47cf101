"""Checks whether a server can be reached and trusted from this machine, and if not, explains why.

The check connects like the client itself: with httpx, which reads HTTPS_PROXY, ALL_PROXY and NO_PROXY from the
environment. No text produced here contains a proxy's user name or password.
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
"""Timeout in seconds of each step of the connection."""
HEALTH_PATH = "/health"
"""Path that a gateway answers with `{"status": "ok"}` without authentication."""
_MAX_BYTES = 4096
"""Maximum number of bytes read of the answer."""
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):(\d{1,5})")
# OpenSSL's X509_V_ERR_... codes of a failed verification.
_NOT_YET, _EXPIRED, _WRONG_NAME = (9,), (10,), (62, 64)
_WRONG_AUTHORITY = (2, 7, 18, 19, 20, 21, 24, 30)
_UNREACHED_BY_PROXY = (500, 502, 503, 504)


class RequestTrace:
    """The progress of a request; httpx's `trace` extension calls it at each step."""

    def __init__(self, host: str, port: int) -> None:
        """Start the trace of a request to a server."""
        self.server, self.name, self.asked = (host.lower(), port), "", (host.lower(), port)
        self.secured = False
        """Whether the TLS handshake with the server is complete."""

    def __call__(self, event: str, info: dict[str, Any]) -> None:
        """Record the current step and the target of a TCP connection."""
        name, _, state = event.rpartition(".")
        if state == "started":
            self.name = name
        if state == "complete" and self.with_server:
            self.secured = True
        if event == "connection.connect_tcp.started":
            self.asked = (str(info["host"]).lower(), int(info["port"]))

    @property
    def proxy(self) -> str | None:
        """HOST:PORT of the proxy that is contacted instead of the server; None without a proxy."""
        return None if self.asked == self.server else "{}:{}".format(*self.asked)

    @property
    def with_server(self) -> bool:
        """Whether the current TLS handshake is with the server rather than with a proxy that uses TLS itself."""
        return self.name == ("connection.start_tls" if self.proxy is None else "proxy.start_tls")


def parse_address(server: str) -> tuple[str, int] | None:
    """Return host and port of HOST:PORT, with IPv6 addresses in brackets; None for anything else."""
    match = _ADDRESS.fullmatch(server)
    if match is None or not 0 < int(match[3]) < 65536:
        return None
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine's loopback interface, which is never reached through a proxy."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_connection(server: str, ca: Path | None) -> tuple[str, list[Fault]]:
    """Test TCP, then TLS 1.3 against `ca`, then GET /health, through a proxy if the environment sets one.

    `server` is HOST:PORT, with IPv6 addresses in brackets; without `ca` only TCP is tested. Returns a text for success
    and the list of problems.
    """
    address = parse_address(server)
    if address is None:
        return "", [Fault(f"{server!r} is not HOST:PORT", "write host and port only, for example fed.example.org:8443")]
    host, port = address
    if ca is None:
        try:
            socket.create_connection((host, port), timeout=TIMEOUT_S).close()
        except OSError as error:
            return "", [_explain_tcp_failure(server, error)]
        return f"{server} answers", [without_tls(host)]
    try:
        context = client_context(ca)
    except OSError:
        text = f"{ca} cannot be read, so the certificate of {server} cannot be verified"
        return "", [Fault(text, "ask the coordinator for ca.crt")]
    return _request_health(server, host, port, context)


def _request_health(server: str, host: str, port: int, context: ssl.SSLContext) -> tuple[str, list[Fault]]:
    """Request /health and interpret the answer."""
    trace = RequestTrace(host, port)
    try:
        client = httpx.Client(verify=context, timeout=TIMEOUT_S, trust_env=not is_loopback(host))
    except (ValueError, ImportError, httpx.InvalidURL):  # the exception text may contain the proxy's password
        text = "the proxy setting in HTTPS_PROXY or ALL_PROXY is invalid"
        return "", [Fault(text, "write it as http://USER:PASSWORD@HOST:PORT (SOCKS is not supported)")]
    address = f"https://[{host}]:{port}{HEALTH_PATH}" if ":" in host else f"https://{host}:{port}{HEALTH_PATH}"
    try:
        with client, client.stream("GET", address, extensions={"trace": trace}) as response:
            secured: ssl.SSLObject = response.extensions["network_stream"].get_extra_info("ssl_object")
            end = ssl.cert_time_to_seconds(str((secured.getpeercert() or {})["notAfter"]))
            healthy = response.status_code == 200 and _is_ok(response)
            status = response.status_code
    except httpx.InvalidURL:
        return "", [Fault(f"{server}: this is not a host name", "correct the name")]
    except httpx.HTTPError as error:
        return "", [_explain_failure(server, error, trace)]
    route = "" if trace.proxy is None else f" through the proxy {trace.proxy}"
    faults = []
    if status == 503:
        text = f"{server} has a valid certificate, but is unavailable (503): its SuperLink is down"
        faults.append(Fault(text, "wait a minute, then check the coordinator's logs"))
    elif not healthy:
        text = f"{server} has a valid certificate, but its answer to GET {HEALTH_PATH} is unexpected ({status})"
        faults.append(Fault(text, "use the same version of fedamole at the coordinator and at the client"))
    until = time.strftime("%Y-%m-%d", time.gmtime(end))
    if end - time.time() < SOON.total_seconds():
        faults.append(Fault(f"{server}: its certificate expires on {until}", "tell the coordinator", urgent=False))
    return f"{server} answers{route}; its certificate is trusted and valid until {until}", faults


def _is_ok(response: httpx.Response) -> bool:
    """Return whether a response body, of which only a few bytes are read, is the gateway's."""
    body, end = b"", time.monotonic() + TIMEOUT_S
    for piece in response.iter_raw(_MAX_BYTES):
        body += piece
        if len(body) > _MAX_BYTES or time.monotonic() > end:
            return False
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and answer.get("status") == "ok"


def without_tls(host: str) -> Fault:
    """Return the problem of running without certificates: a warning on loopback, an error elsewhere."""
    if host in ("localhost", "127.0.0.1", "::1"):
        return Fault("no certificates: suitable only for tests on this machine", "make certificates", urgent=False)
    text = f"no certificates, but {host or 'the server'} is reachable from other machines: traffic would be unencrypted"
    return Fault(text, "give the folder with the certificates")


def _explain_failure(server: str, error: httpx.HTTPError, trace: RequestTrace) -> Fault:
    """Explain a failed request by its last step and the exception that caused it."""
    cause = next((link for link in _causes(error) if isinstance(link, OSError)), None)
    if isinstance(error, httpx.ProxyError):
        return _explain_proxy_refusal(server, str(error), trace)
    if trace.name == "connection.connect_tcp":
        return _explain_tcp_failure(server, cause, trace.proxy)
    if trace.with_server and not trace.secured:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _explain_untrusted(server, cause, trace.proxy)
        return _explain_tls_failure(server, cause)
    if not trace.secured:
        text = f"the proxy {trace.proxy} accepts connections, but is not an HTTP proxy"
        return Fault(text, "correct HTTPS_PROXY: host, port, and the prefix http:// or https://")
    text = f"{server} has a valid certificate, but does not answer GET {HEALTH_PATH} ({type(error).__name__})"
    return Fault(text, "check the coordinator's logs; another program may use the port")


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _explain_proxy_refusal(server: str, answer: str, trace: RequestTrace) -> Fault:
    """Explain a proxy's refusal of CONNECT; only the status number of its answer is used."""
    status = int(answer[:3]) if answer[:3].isdigit() else 0
    proxy = f"the proxy {trace.proxy}"
    if status == 407:
        text = f"{proxy} requires a user name and password, or rejects the given ones (407)"
        return Fault(text, "write HTTPS_PROXY as http://USER:PASSWORD@HOST:PORT, with special characters as %XX")
    if status in _UNREACHED_BY_PROXY:
        return Fault(
            f"{proxy} cannot reach {server} ({status})", "correct the address, or ask the operator of the proxy"
        )
    text = f"{proxy} refuses a connection to {server} ({status or 'no HTTP answer'})"
    return Fault(
        text, f"ask the operator to allow CONNECT to {server}, or add the host to NO_PROXY if no proxy is needed"
    )


def _explain_tcp_failure(server: str, error: OSError | None, proxy: str | None = None) -> Fault:
    """Explain a failed TCP connection to the server or to the proxy."""
    if isinstance(error, socket.gaierror):
        text, remedy = "the name has no address", "correct the name, or ask for the server's address"
    elif isinstance(error, ConnectionRefusedError):
        text, remedy = "refused: nothing listens there", "start the server, or correct the port"
    elif isinstance(error, TimeoutError):
        text = f"no answer within {TIMEOUT_S:.0f} s (timeout)"
        remedy = "a firewall may drop the packets: ask to have this port opened, or correct the address"
    else:
        text = f"no connection: {getattr(error, 'strerror', None) or type(error).__name__}"
        remedy = "check network, VPN and firewall"
    if proxy is None:
        return Fault(f"{server}: {text}", remedy)
    host = server.rpartition(":")[0]
    remedy = f"correct HTTPS_PROXY, or add {host} to NO_PROXY if the server can be reached without a proxy"
    return Fault(f"the proxy {proxy} (HTTPS_PROXY) cannot be reached: {text}", remedy)


def _explain_tls_failure(server: str, error: OSError | None) -> Fault:
    """Explain a TLS handshake that fails or times out."""
    if isinstance(error, TimeoutError):
        text = f"{server} accepts connections, but sends no TLS answer within {TIMEOUT_S:.0f} s"
        return Fault(text, "it may not be a FedAMoLE server; check the port")
    reason = getattr(error, "reason", None) or type(error).__name__
    remedy = "the port does not support TLS 1.3: the server runs without certificates, or another program uses the port"
    return Fault(f"{server} accepts connections, but TLS fails: {reason}", remedy)


def _explain_untrusted(server: str, error: ssl.SSLCertVerificationError, proxy: str | None) -> Fault:
    """Explain why the server's certificate is not trusted."""
    code = error.verify_code
    if code in _WRONG_NAME:
        text = "its certificate is not for this name"
        remedy = "connect by a name in the certificate, or ask the coordinator to renew it with this name"
    elif code in _EXPIRED:
        text, remedy = (
            "its certificate has expired",
            "ask the coordinator to renew it; if it is recent, correct this machine's clock",
        )
    elif code in _NOT_YET:
        text, remedy = "its certificate is not valid yet", "correct this machine's clock"
    elif code in _WRONG_AUTHORITY and proxy is not None:
        text = (
            f"its certificate was not issued by the CA in ca.crt: the proxy {proxy} intercepts TLS, or the CA is wrong"
        )
        remedy = (
            "ask the operator of the proxy not to intercept this server, or ask the coordinator for the current ca.crt"
        )
    elif code in _WRONG_AUTHORITY:
        text = "its certificate was not issued by the CA in ca.crt (wrong CA)"
        remedy = (
            "ask the coordinator for the current ca.crt; if it is the same, somebody may be intercepting the connection"
        )
    else:
        text, remedy = f"its certificate is refused: {error.verify_message}", "tell the coordinator"
    return Fault(f"{server}: {text}", remedy)
