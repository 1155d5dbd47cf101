"""The gateway as a process of its own, in front of a stand-in for the SuperLink and, at the end, of Flower itself."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fedamole.deployment.certificates import make_certificates
from fedamole.deployment.client_keys import make_own_key
from fedamole.deployment.gateway import CALLS, Gateway, listener, superlink_client

HOST = "127.0.0.1"
PULL = "/v1/fleet/pull-object"
LIMIT_MIB = 8
HALF = 400_000
Running = tuple[int, subprocess.Popen[bytes]]
SIGNED = {"flwr-public-key": "AbC+/=", "flwr-timestamp": "2026-10-20T10:00:00.1+00:00", "flwr-signature": "Zz09=="}


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


@contextmanager
def process(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its own group, whose output goes to `log`; the whole group is killed in the end."""
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
def gateway(tls: Path, superlink: int, log: Path, ca: Path | None = None, port: int = 0) -> Iterator[Running]:
    """Its port and process, once it listens; a free port unless one is given."""
    port = port or free_port()
    command = (
        f"{sys.executable} -m fedamole.deployment.gateway --host {HOST} --port {port} --superlink {HOST}:{superlink} "
        f"--certificate {tls / 'server.crt'} --key {tls / 'server.key'} --ca {ca or tls / 'ca.crt'} "
        f"--max-body-mib {LIMIT_MIB}"
    )
    with process(log, *command.split()) as running:
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
class StandIn:
    """In place of the SuperLink: notes what arrives, and answers as the header `ask` of the call says."""

    port: int = field(default_factory=free_port)
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    arrived: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)

    async def answer(self, request: Request) -> Response:
        body, self.arrived = bytearray(), 0
        with suppress(ClientDisconnect):
            async for piece in request.stream():
                body += piece
                self.arrived += len(piece)
        self.seen.append((request.scope["raw_path"].decode(), dict(request.headers), bytes(body)))
        ask = request.headers.get("ask", "")
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

    def server(self, tls: Path) -> uvicorn.Server:
        app = Starlette(routes=[Route("/{rest:path}", self.answer, methods=["GET", "POST", "PUT"])])
        config = uvicorn.Config(app, host=HOST, port=self.port, log_config=None, lifespan="off")
        config.ssl_certfile, config.ssl_keyfile = tls / "server.crt", tls / "server.key"
        return uvicorn.Server(config)


@dataclass
class Door:
    """A gateway in front of a stand-in, and what an organisation needs to call it."""

    port: int
    tls: Path
    log: Path
    superlink: StandIn

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=self.tls / "ca.crt")
        return http.client.HTTPSConnection(HOST, self.port, timeout=20, context=context)

    def begin(self, path: str, method: str = "POST", **headers: object) -> http.client.HTTPSConnection:
        """A call of which only the head is sent, its path as it stands."""
        call = self.connect()
        call.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            call.putheader(name.replace("_", "-"), str(value))
        call.endheaders()
        return call

    def call(self, path: str, body: bytes = b"", method: str = "POST", **headers: object) -> tuple[int, bytes]:
        call = self.begin(path, method, content_length=len(body), **headers)
        call.send(body)
        answer = call.getresponse()
        with closing(call):
            return answer.status, answer.read()

    def lines(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if " WARNING " in line]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, hosts=[HOST], clients=["anna"])
    return folder


@pytest.fixture(scope="module")
def one_door(tls: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    superlink, log = StandIn(), tmp_path_factory.mktemp("gateway") / "log"
    with threaded(superlink.server(tls), superlink.port), gateway(tls, superlink.port, log) as (port, _):
        yield Door(port, tls, log, superlink)


@pytest.fixture
def door(one_door: Door) -> Door:
    """The module's one gateway, with an empty notebook and log."""
    one_door.superlink.seen.clear()
    one_door.superlink.go_on.clear()
    one_door.log.write_text("")
    return one_door


@contextmanager
def impatient(tls: Path, superlink: StandIn, idle_s: float, call_s: float = 30.0) -> Iterator[Door]:
    """A gateway in this process, with clocks that a test can wait for."""
    port = free_port()

    async def run() -> None:
        async with superlink_client(tls / "ca.crt") as client:
            app = Gateway(client, f"https://{HOST}:{superlink.port}", LIMIT_MIB * 2**20, idle_s, call_s)
            server = listener(app, HOST, port, tls / "server.crt", tls / "server.key")
            server.config.timeout_keep_alive = 1
            servers.append(server)
            await server.serve()

    servers: list[uvicorn.Server] = []
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    until(lambda: listens(port))
    try:
        yield Door(port, tls, Path(os.devnull), superlink)
    finally:
        servers[0].should_exit = servers[0].force_exit = True
        thread.join(10)


REFUSED = (
    "/", "/docs", "/openapi.json", "/health", "/v1/control/start-run", "/v1/control/list-nodes",
    "/v1/runtime/acquire-task", "/v1/runtime/pull-object", "/v1/fleet", "/v1/fleet/", "/v1/fleet/pull-object/",
    "/v1/fleet/../control/start-run", "/v1/fleet/..%2fcontrol/start-run", "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/.%2E/control/start-run", "/v1/fleet/%252e%252e/control/start-run", "/v1%2ffleet/pull-object",
    "/v1/fleet%2Fpull-object", "/v1/fleet/pull%2dobject", "//v1/fleet/pull-object", "/v1//fleet/pull-object",
    "/v1/fleet//pull-object", "/v1/fleet/./pull-object", "/v1/fleet/pull-object?a=/v1/control",
    "/v1/fleet/pull-object;a", "/v1/fleet/pull-object%00", "/v1/fleet/pull-object%0a", "/v1/fleet/pull-object#a",
    "/V1/fleet/pull-object", "/v1/fleet/..\\control\\start-run", "v1/fleet/pull-object", "*",
    f"https://{HOST}/v1/fleet/pull-object", "/v1/fleet/register-node", "/v1/fleet/unregister-node",
)  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_all_else_is_not_there(door: Door, path: str) -> None:
    assert door.call(path, b"x") == (404, b"")
    assert door.superlink.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT", "post"])
def test_only_post_is_there(door: Door, method: str) -> None:
    assert door.call(PULL, method=method) == (404, b"")
    assert door.superlink.seen == []


def test_the_list_is_that_of_flower() -> None:
    """A change in Flower's list must be seen here before it is met by an organisation."""
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    fleet = {path.encode() for method, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert {method for method, _ in PROTOBUF_REQUEST_TYPES} == {"POST"}
    assert fleet - CALLS == {b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"}
    assert fleet >= CALLS


def test_every_call_passes_and_is_not_logged(door: Door) -> None:
    for path in sorted(CALLS):
        assert door.call(path.decode(), b"abc") == (200, b"abc")
    assert [seen[0] for seen in door.superlink.seen] == [path.decode() for path in sorted(CALLS)]
    assert door.lines() == []


def test_signatures_pass_unchanged_and_what_belongs_to_one_hop_does_not(door: Door) -> None:
    assert door.call(
        PULL, b"abc", connection="close, x-private", x_private="1", te="trailers", x_forwarded_for="9.9.9.9",
        x_forwarded_proto="http", forwarded="for=9.9.9.9", accept="application/x-protobuf", **SIGNED,
    ) == (200, b"abc")  # fmt: skip
    _, headers, _ = door.superlink.seen[0]
    assert SIGNED.items() <= headers.items()
    assert headers["accept"] == "application/x-protobuf"
    assert headers["x-forwarded-for"] == HOST
    assert headers["host"] == f"{HOST}:{door.superlink.port}"
    extra = set(headers) - set(SIGNED) - {"accept", "x-forwarded-for", "host", "content-length"}
    assert not extra, "nothing of the gateway's own, nothing of the hop"


def test_an_error_of_flower_passes_with_its_text(door: Door) -> None:
    call = door.begin(PULL, ask="refuse", content_length=0)
    answer = call.getresponse()
    assert (answer.status, answer.read()) == (412, b'{"code": 2004}')
    assert not {"keep-alive", "x-hop", "connection"} & {name.lower() for name, _ in answer.getheaders()}


def test_one_connection_serves_many_calls(door: Door) -> None:
    call = door.connect()
    for _ in range(3):
        call.request("POST", PULL, b"abc")
        assert call.getresponse().read() == b"abc"
    assert call.sock is not None


def test_bodies_pass_whole(door: Door) -> None:
    body = os.urandom(5_000_000)
    assert door.call(PULL, body) == (200, body)


def test_a_body_passes_while_it_is_sent(door: Door) -> None:
    call = door.begin(PULL, content_length=200_000)
    call.send(b"1" * 100_000)
    until(lambda: door.superlink.arrived == 100_000, 5)
    call.send(b"2" * 100_000)
    assert len(call.getresponse().read()) == 200_000


def test_an_answer_passes_while_it_is_written(door: Door) -> None:
    answer = door.begin(PULL, ask="halves", content_length=0).getresponse()
    assert answer.read(100_000) == b"1" * 100_000
    door.superlink.go_on.set()
    assert answer.read()[-HALF - 1 :] == b"1" + b"2" * HALF


def test_an_answer_that_breaks_off_is_not_taken_for_whole(door: Door) -> None:
    answer = door.begin(PULL, ask="break", content_length=0).getresponse()
    assert answer.read(100_000)
    door.superlink.go_on.set()
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    assert "broke off" in door.lines()[0]


def test_a_body_that_is_too_large_is_not_read(door: Door) -> None:
    call = door.begin(PULL, content_length=LIMIT_MIB * 2**20 + 1)
    assert call.getresponse().status == 413
    assert door.superlink.seen == []
    assert door.call(PULL, bytes(LIMIT_MIB * 2**20))[0] == 200


def test_a_body_that_turns_out_too_large_is_not_read_on(door: Door) -> None:
    call = door.begin(PULL, transfer_encoding="chunked")
    piece = b"100000\r\n" + bytes(2**20) + b"\r\n"
    with suppress(OSError):
        for _ in range(10 * LIMIT_MIB):
            call.send(piece)
    assert call.getresponse().status == 413
    assert door.superlink.arrived <= LIMIT_MIB * 2**20


def test_a_length_beside_chunks_is_not_believed(door: Door) -> None:
    call = door.begin(PULL, transfer_encoding="chunked", content_length=1)
    call.send(b"3\r\nabc\r\n0\r\n\r\n")
    assert call.getresponse().read() == b"abc"


def test_a_refused_call_is_one_short_line(door: Door) -> None:
    door.call("/v1/control/" + 300 * "x", x_forwarded_for="9.9.9.9")
    until(door.lines)
    (line,) = door.lines()
    assert re.search(r"404 POST /v1/control/x{88} from 127\.0\.0\.1: ", line)


def test_slow_callers_and_a_hanging_superlink_are_not_waited_for(tls: Path, door: Door) -> None:
    with impatient(tls, door.superlink, idle_s=0.5) as hasty:
        slow = hasty.begin(PULL, content_length=10)
        slow.send(b"12345")
        assert slow.getresponse().status == 504
        assert hasty.begin(PULL, content_length=10).getresponse().status == 504, "a head and nothing more"
        assert hasty.call(PULL, b"abc", ask="hang") == (504, b"")
        assert hasty.call(PULL, b"abc") == (200, b"abc")
    with impatient(tls, door.superlink, idle_s=5, call_s=0.5) as hasty:
        steady = hasty.begin(PULL, content_length=1000)
        start = time.monotonic()
        with suppress(OSError):
            for _ in range(40):
                steady.send(b"1")
                time.sleep(0.05)
        assert steady.getresponse().status == 504
        assert time.monotonic() - start < 4


@pytest.mark.parametrize("head", [b"", b"POST /v1/fleet/pull-object HTTP/1.1\r\n"])
def test_half_a_head_does_not_hold_a_connection(tls: Path, door: Door, head: bytes) -> None:
    with impatient(tls, door.superlink, idle_s=30) as hasty:
        call = hasty.connect()
        call.connect()
        start = time.monotonic()
        with suppress(OSError):
            call.sock.sendall(head)
            while time.monotonic() - start < 5 and head:
                call.sock.sendall(b"a: b\r\n")
                time.sleep(0.1)
            assert call.sock.recv(1) == b""
        assert 0.5 < time.monotonic() - start < 4


def test_a_superlink_that_is_down_is_waited_for_by_supernodes(tls: Path, tmp_path: Path) -> None:
    superlink, log = StandIn(), tmp_path / "log"
    with gateway(tls, superlink.port, log) as (port, _):
        door = Door(port, tls, log, superlink)
        assert door.call(PULL) == (503, b"")
        with threaded(superlink.server(tls), superlink.port):
            assert door.call(PULL, b"abc") == (200, b"abc")
        assert door.call(PULL)[0] in (502, 503)
        with threaded(superlink.server(tls), superlink.port):
            assert door.call(PULL, b"abc") == (200, b"abc")
    assert "503 POST /v1/fleet/pull-object from 127.0.0.1: the SuperLink cannot be reached" in log.read_text()


def test_a_superlink_of_another_authority_is_not_spoken_to(tls: Path, door: Door, tmp_path: Path) -> None:
    other, log = tmp_path / "other", tmp_path / "log"
    make_certificates(other, hosts=[HOST], clients=[])
    with gateway(tls, door.superlink.port, log, ca=other / "ca.crt") as (port, _):
        assert Door(port, tls, log, door.superlink).call(PULL, b"secret") == (503, b"")
    assert door.superlink.seen == []
    assert "CERTIFICATE_VERIFY_FAILED" in log.read_text()


def test_sigterm_lets_a_call_end_and_exits_with_0(tls: Path, door: Door, tmp_path: Path) -> None:
    with gateway(tls, door.superlink.port, tmp_path / "log") as (port, running):
        idle = Door(port, tls, tmp_path / "log", door.superlink)
        spare = idle.connect()
        spare.connect()
        busy = idle.begin(PULL, ask="halves", content_length=0)
        answer = busy.getresponse()
        running.send_signal(signal.SIGTERM)
        until(lambda: not listens(port), 5)
        assert running.poll() is None
        door.superlink.go_on.set()
        assert len(answer.read()) == 2 * HALF
        busy.close()
        assert running.wait(5) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_it_is_light() -> None:
    code = "import fedamole.deployment.gateway, sys; print(' '.join(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(told.stdout.split())
    assert not loaded & {"torch", "transformers", "peft", "numpy", "flwr", "fastapi"}
    own = {name.removeprefix("fedamole.") for name in loaded if name.startswith("fedamole.")}
    assert own == {"deployment", "deployment.gateway"}


@pytest.mark.parametrize("superlink", ["nowhere", "127.0.0.1", "a:b", "127.0.0.1:1/v1", "me@127.0.0.1:1", "h:99999"])
def test_a_wrong_argument_is_told(superlink: str, tls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedamole.deployment.gateway import main

    files = f"--certificate {tls / 'server.crt'} --key {tls / 'server.key'} --ca {tls / 'ca.crt'}"
    with pytest.raises(SystemExit, match="2"):
        main(f"--host {HOST} --port 1 --superlink {superlink} {files}".split())
    assert "--superlink" in capsys.readouterr().err


def flower(home: Path) -> dict[str, str]:
    return {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def flwr(home: Path, *words: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).parent / "flwr"), *words, "--format", "json"]
    told = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flower(home)}, timeout=60)
    assert told.returncode == 0, told.stdout + told.stderr
    result: dict[str, Any] = json.loads(told.stdout)
    return result


@pytest.mark.faults
def test_flower_itself(tls: Path, tmp_path: Path) -> None:
    """A SuperNode with a registered key gets online and outlives restarts of SuperLink and gateway; a stranger gets
    neither in nor to the Control API, which on the SuperLink's own port anybody may use."""
    home, secured, log = tmp_path / "home", free_port(), tmp_path / "gateway.log"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "tls"\n[superlink.tls]\naddress = "{HOST}:{secured}"\n'
        f'root-certificates = "{tls}/ca.crt"\n'
    )
    superlink = (
        f"flower-superlink --host {HOST} --port {secured} --ssl-ca-certfile {tls}/ca.crt "
        f"--ssl-certfile {tls}/server.crt --ssl-keyfile {tls}/server.key --enable-supernode-auth "
        f"--database {tmp_path}/state.db"
    ).split()

    def supernode(key: Path, port: int, own: int) -> list[str]:
        return (
            f"flower-supernode --superlink {HOST}:{port} --root-certificates {tls}/ca.crt --host {HOST} --port {own} "
            f"--auth-supernode-private-key {key}"
        ).split()

    make_own_key(tmp_path / "stranger", "stranger")
    known, strange = tmp_path / "known.log", tmp_path / "strange.log"
    with ExitStack() as stack:
        port, first = stack.enter_context(gateway(tls, secured, log))
        door = Door(port, tls, log, StandIn())
        with process(tmp_path / "superlink.log", *superlink, **flower(home)):
            until(lambda: listens(secured), 30)
            stranger = supernode(tmp_path / "stranger" / "node.key", port, free_port())
            with process(strange, *stranger, **flower(tmp_path / "s")) as refused:
                flwr(home, "supernode", "register", str(tls / "nodes" / "anna.pub"), "tls")
                assert refused.wait(30) == 1
            assert "[code: 2004]" in strange.read_text()
            for path in REFUSED:
                assert door.call(path) == (404, b""), path
            assert Door(secured, tls, log, StandIn()).call("/v1/control/list-nodes")[0] == 415, "it is there, inside"
            command = supernode(tls / "clients" / "anna" / "node.key", port, free_port())
            node = stack.enter_context(process(known, *command, **flower(tmp_path / "n")))
            until(lambda: "ID: " in known.read_text(), 30)
            (listed,) = flwr(home, "supernode", "list", "tls")["nodes"]
            assert listed["status"] == "online"
        until(lambda: "retrying in" in known.read_text(), 30)
        assert door.call(PULL) == (503, b"")
        with process(tmp_path / "superlink.log", *superlink, **flower(home)):
            until(lambda: known.read_text().count("Connection successful") == 1, 30)
            tries = known.read_text().count("retrying in")
            first.terminate()
            until(lambda: known.read_text().count("retrying in") > tries, 30)
            stack.enter_context(gateway(tls, secured, log, port=port))
            until(lambda: known.read_text().count("Connection successful") == 2, 30)
            assert node.poll() is None
