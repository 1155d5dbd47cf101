"""Shared by the gateway tests: a fake SuperLink, the gateway as a process, and callers."""

import asyncio
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fedamole.deployment.gateway.connection_slots import ConnectionSlots
from fedamole.deployment.gateway.guard import BODY_LIMITS, MIB, PUSH_OBJECT, RateLimitedLog
from fedamole.deployment.gateway.listener import Certificate, listener
from fedamole.deployment.gateway.proxy import LOG, Gateway, superlink_client
from fedamole.deployment.security.keys import load_private
from fedamole.deployment.security.roster import Roster

HOST = "127.0.0.1"
PUSH = PUSH_OBJECT.decode()
PULL = "/v1/fleet/pull-messages"
PUSH_MESSAGES = "/v1/fleet/push-messages"
LIMIT_MIB = 8
"""Maximum body size of push-object in these tests."""
HALF = 400_000
Running = tuple[int, subprocess.Popen[bytes]]
Key = ec.EllipticCurvePrivateKey


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def until(what: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((HOST, port), 1):
        return True
    return False


def signature(key: Key, age: float = 0.0, stamp: str | None = None) -> dict[str, str]:
    """The headers of Flower's node signature, made `age` seconds ago."""
    stamp = stamp or (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": b64encode(signed).decode(),
    }


def reply(
    node: int = 7, source: int = 7, to: int = 1, answers: str = "order", messages: int = 1, trees: int = 1
) -> bytes:
    """The body of a push-messages call; valid by default."""
    metadata = Metadata(
        run_id=5, message_id="m", src_node_id=source, dst_node_id=to, reply_to_message_id=answers, message_type="query"
    )
    request = PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[Message(metadata=metadata)] * messages,
        message_object_trees=[ObjectTree(object_id="m", children=[ObjectTree(object_id="c")])] * trees,
        clientapp_runtime_list=[1.5],
    )
    return bytes(request.SerializeToString())


@contextmanager
def process(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its own group, whose output goes to `log`; the group is killed at the end."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("ab") as out:
        running = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, "PATH": path, **environment}
        )
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait(10)


@contextmanager
def gateway(
    tls: Path, superlink: int, log: Path, *more: str, ca: Path | None = None, port: int = 0
) -> Iterator[Running]:
    """Start a gateway; return port and process once it listens. `more` are arguments."""
    port = port or free_port()
    command = (
        f"{sys.executable} -m fedamole.deployment.gateway.process --host {HOST} --port {port} "
        f"--superlink {HOST}:{superlink} "
        f"--certificate {tls / 'server.crt'} --key {tls / 'server.key'} --ca {ca or tls / 'ca.crt'} "
        f"--nodes {tls / 'nodes'} --max-body-mib {LIMIT_MIB}"
    )
    with process(log, *command.split(), *more) as running:
        until(lambda: listens(port))
        yield port, running


@contextmanager
def threaded(server: uvicorn.Server, port: int) -> Iterator[None]:
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    until(lambda: listens(port))
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


@dataclass
class FakeSuperLink:
    """Replaces the SuperLink: records calls, and answers according to the header `flwr-ask`."""

    port: int = field(default_factory=free_port)
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    arrived: int = 0
    """Number of received bytes of the latest body."""
    go_on: threading.Event = field(default_factory=threading.Event)

    async def answer(self, request: Request) -> Response:
        body, self.arrived = bytearray(), 0
        with suppress(ClientDisconnect):
            async for piece in request.stream():
                body += piece
                self.arrived += len(piece)
        self.seen.append((request.scope["raw_path"].decode(), dict(request.headers), bytes(body)))
        ask = request.headers.get("flwr-ask", "")
        if ask == "hang":
            await asyncio.sleep(5)
        if ask == "refuse":
            return Response('{"code": 2004}', 412, {"keep-alive": "9", "connection": "keep-alive, x-hop", "x-hop": "1"})
        if ask in ("halves", "break"):
            return StreamingResponse(self.halves(ask == "break"), headers={"content-length": str(2 * HALF)})
        return Response(bytes(body), headers={"x-flower": "1.41"}, media_type="application/x-protobuf")

    async def halves(self, breaks: bool) -> AsyncIterator[bytes]:
        yield b"1" * HALF
        while not self.go_on.is_set():
            await asyncio.sleep(0.01)
        if breaks:
            raise ConnectionError("broken on purpose")
        yield b"2" * HALF

    def server(self, tls: Path, highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> uvicorn.Server:
        app = Starlette(routes=[Route("/{rest:path}", self.answer, methods=["GET", "POST", "PUT"])])
        config = uvicorn.Config(app, host=HOST, port=self.port, log_config=None, lifespan="off")
        config.ssl_certfile, config.ssl_keyfile = tls / "server.crt", tls / "server.key"
        config.load()
        assert config.ssl is not None
        config.ssl.maximum_version = highest
        return uvicorn.Server(config)


@dataclass
class GatewayUnderTest:
    """A gateway in front of a fake SuperLink, and the credentials of the client anna."""

    port: int
    tls: Path
    log: Path
    superlink: FakeSuperLink

    @property
    def key(self) -> Key:
        return load_private(self.tls / "clients" / "anna" / "node.key")

    def connect(self, source: str = HOST) -> http.client.HTTPSConnection:
        """Create a connection from a loopback address, not yet opened."""
        context = ssl.create_default_context(cafile=self.tls / "ca.crt")
        return http.client.HTTPSConnection(HOST, self.port, timeout=20, context=context, source_address=(source, 0))

    def begin(
        self,
        path: str,
        method: str = "POST",
        source: str = HOST,
        signed: dict[str, str] | None = None,
        **headers: object,
    ) -> http.client.HTTPSConnection:
        """Send only the header of a call, with an unmodified path; signed by anna unless `signed` is given."""
        call = self.connect(source)
        call.putrequest(method, path, skip_accept_encoding=True)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {**(signature(self.key) if signed is None else signed), **named}.items():
            call.putheader(name, str(value))
        call.endheaders()
        return call

    def call(
        self,
        path: str,
        body: bytes = b"",
        method: str = "POST",
        source: str = HOST,
        signed: dict[str, str] | None = None,
        **headers: object,
    ) -> tuple[int, bytes]:
        call = self.begin(path, method, source, signed, content_length=len(body), **headers)
        with suppress(OSError):  # the answer may come before the body is read
            call.send(body)
        answer = call.getresponse()
        with closing(call):
            return answer.status, answer.read()

    def lines(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if " WARNING " in line]


@contextmanager
def gateway_with_short_timeouts(
    tls: Path, superlink: FakeSuperLink, idle_s: float = 30.0, call_s: float = 30.0, first_call_s: float = 15.0
) -> Iterator[GatewayUnderTest]:
    """A gateway in this process with short timeouts."""
    port = free_port()

    async def run() -> None:
        async with superlink_client(tls / "ca.crt") as client:
            app = Gateway(
                client,
                f"{HOST}:{superlink.port}",
                Roster(tls / "nodes"),
                slots=ConnectionSlots(first_call_s),
                idle_s=idle_s,
                call_s=call_s,
                limits={**BODY_LIMITS, PUSH_OBJECT: LIMIT_MIB * MIB},
            )
            certificate = Certificate(tls / "server.crt", tls / "server.key")
            server = listener(app, HOST, port, certificate, app.slots, RateLimitedLog(LOG))
            server.config.timeout_keep_alive = 1
            servers.append(server)
            await server.serve()

    servers: list[uvicorn.Server] = []
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    until(lambda: listens(port))
    try:
        yield GatewayUnderTest(port, tls, Path(os.devnull), superlink)
    finally:
        servers[0].should_exit = servers[0].force_exit = True
        thread.join(10)
