"""The gateway: a reverse proxy in front of the SuperLink, and the only externally reachable part of a deployment.

Flower 1.41 serves its Fleet, Control and Runtime APIs on one port, and anyone who reaches the Control API can submit
code. The gateway terminates TLS and forwards the Fleet calls that `fedamole client` needs, if they are signed with a
registered key. Calls are checked by their header before the body is read; of a refused call, bytes that arrived with
the header are dropped. The gateway runs in its own process and has no secrets except its TLS key and, if used, the
token for the SuperLink. Bodies are streamed, except those of push-messages, which are read completely and checked.

    python -m fedamole.deployment.gateway.process --host 0.0.0.0 --port 9092 --superlink 127.0.0.1:9093 \
        --certificate server.crt --key server.key --ca ca.crt --nodes nodes

Error statuses of the gateway, with a body {"error": WORD} if a word is listed:

    401  unknown-key, expired-key, bad-signature, clock: the call has no valid signature
    403  not-a-reply: a pushed message is not a reply of the caller to the server
    404  the call is not allowed (empty body)
    411 413 431  no-length, too-large, head-too-large: the request exceeds a limit
    502 503 504  temporary errors: retry. The word is busy if a limit is reached; otherwise the body is empty

`GET /health` needs no key. It returns 200 {"status": "ok"}, or 503 {"status": "superlink-down"} if the SuperLink does
not accept a TCP connection within a second.
"""

import argparse
import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from fedamole.deployment.gateway.guard import BODY_LIMITS, MIB, PUSH_OBJECT, TOTAL_BYTES, Budget
from fedamole.deployment.gateway.listener import Certificate, listener
from fedamole.deployment.gateway.proxy import TOKEN_HEADER, Gateway, superlink_client
from fedamole.deployment.security.keys import open_to_others
from fedamole.deployment.security.roster import Roster
from fedamole.terminal import PrintableFormatter

LOG = logging.getLogger("fedamole.gateway")


async def serve(app: Gateway, host: str, port: int, certificate: Certificate) -> None:
    """Run until SIGTERM or SIGINT; running calls have 10 s to finish."""
    async with app.superlink:
        LOG.info("forwarding https://%s:%d to the SuperLink at %s", host, port, app.address)
        LOG.info("%d registered clients; limit of bodies in transit: %d bytes", len(app.roster), app.budget.total)
        await listener(app, host, port, certificate, app.slots, app.limited_log).serve()


def host_and_port(text: str) -> str:
    """Return `text` if it is HOST:PORT; ValueError otherwise."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or not parts.port or parts.netloc != text or parts.username is not None:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return text


def mebibytes(text: str) -> int:
    """Convert a number of MiB, at least 1, to bytes; ValueError otherwise."""
    if (number := int(text)) < 1:
        raise ValueError(f"{text} MiB is less than 1 MiB")
    return number * MIB


def token_of(path: Path) -> str:
    """Return the token in a file; ValueError, which does not quote it, if it is invalid."""
    if open_to_others(path):
        raise ValueError(f"other users of this machine can read {path}; run `chmod 600 {path}`")
    token = path.read_bytes().strip()
    if not 16 <= len(token) <= 256 or not all(33 <= byte <= 126 for byte in token):
        raise ValueError(f"{path} does not contain a token of 16 to 256 visible ASCII characters")
    return token.decode("ascii")


def _stop(number: int, _: object) -> NoReturn:
    raise SystemExit(0)  # uvicorn shuts down gracefully, then raises the signal again


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m fedamole.deployment.gateway.process", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--host", required=True, help="address to listen on")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--superlink", required=True, type=host_and_port, help="HOST:PORT of the SuperLink on loopback")
    parser.add_argument(
        "--certificate", required=True, type=Path, help="PEM, the server certificate; may be renewed while running"
    )
    parser.add_argument("--key", required=True, type=Path, help="PEM, its private key")
    parser.add_argument("--ca", required=True, type=Path, help="PEM, verifies the SuperLink's certificate")
    parser.add_argument("--nodes", required=True, type=Path, help="folder with a file NAME.pub per client")
    parser.add_argument(
        "--superlink-token", type=Path, help=f"file with the token sent to the SuperLink in {TOKEN_HEADER}"
    )
    parser.add_argument(
        "--max-body-mib",
        type=mebibytes,
        default=BODY_LIMITS[PUSH_OBJECT],
        help=f"maximum body size of push-object (default: {BODY_LIMITS[PUSH_OBJECT] // MIB})",
    )
    parser.add_argument(
        "--max-total-mib",
        type=mebibytes,
        default=TOTAL_BYTES,
        help=f"maximum size of all bodies in transit (default: {TOTAL_BYTES // MIB})",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and serve. Exits with 2 on a wrong argument, 1 if the port is in use, 0 on SIGTERM."""
    parser = _parser()
    args = parser.parse_args(argv)
    for path in (args.certificate, args.key, args.ca):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    if not args.nodes.is_dir():
        parser.error(f"--nodes: there is no folder {args.nodes}; create it with `fedamole certs`")
    try:
        certificate = Certificate(args.certificate, args.key)
        superlink = superlink_client(args.ca)
    except OSError as error:  # ssl.SSLError is one
        parser.error(f"--certificate, --key or --ca cannot be used: {error.strerror or type(error).__name__}")
    try:
        token = token_of(args.superlink_token) if args.superlink_token else ""
    except (OSError, ValueError) as error:
        parser.error(f"--superlink-token: {error}")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it logs every malformed request
    limits = {**BODY_LIMITS, PUSH_OBJECT: args.max_body_mib}
    app = Gateway(superlink, args.superlink, Roster(args.nodes), Budget(args.max_total_mib), limits=limits, token=token)
    asyncio.run(serve(app, args.host, args.port, certificate))


if __name__ == "__main__":
    main()
