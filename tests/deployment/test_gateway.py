"""The gateway as a separate process, in front of a fake SuperLink and finally of Flower itself."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr")

from fedamole.deployment.gateway.guard import BODY_LIMITS
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.client_keys import make_own_key
from fedamole.deployment.security.keys import load_private
from tests.deployment.gateway import (
    HALF,
    HOST,
    LIMIT_MIB,
    PULL,
    PUSH,
    PUSH_MESSAGES,
    FakeSuperLink,
    GatewayUnderTest,
    free_port,
    gateway,
    gateway_with_short_timeouts,
    listens,
    process,
    reply,
    signature,
    threaded,
    until,
)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, hosts=[HOST], clients=["anna"])
    return folder


@pytest.fixture(scope="module")
def one_door(tls: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    superlink, log = FakeSuperLink(), tmp_path_factory.mktemp("gateway") / "log"
    with threaded(superlink.server(tls), superlink.port), gateway(tls, superlink.port, log) as (port, _):
        yield GatewayUnderTest(port, tls, log, superlink)


@pytest.fixture
def door(one_door: GatewayUnderTest) -> GatewayUnderTest:
    """The module's shared gateway, with cleared records and log."""
    one_door.superlink.seen.clear()
    one_door.superlink.go_on.clear()
    one_door.log.write_text("")
    return one_door


REFUSED = (
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/health/",
    "/health?a",
    "/v1/fleet/get-run",
    "/v1/fleet/get-fab",
    "/v1/control/start-run",
    "/v1/control/list-nodes",
    "/v1/runtime/acquire-task",
    "/v1/runtime/pull-object",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/pull-object/",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/.%2E/control/start-run",
    "/v1/fleet/%252e%252e/control/start-run",
    "/v1%2ffleet/pull-object",
    "/v1/fleet%2Fpull-object",
    "/v1/fleet/pull%2dobject",
    "//v1/fleet/pull-object",
    "/v1//fleet/pull-object",
    "/v1/fleet//pull-object",
    "/v1/fleet/./pull-object",
    "/v1/fleet/pull-object?a=/v1/control",
    "/v1/fleet/pull-object;a",
    "/v1/fleet/pull-object%00",
    "/v1/fleet/pull-object%0a",
    "/v1/fleet/pull-object#a",
    "/V1/fleet/pull-object",
    "/v1/fleet/..\\control\\start-run",
    "v1/fleet/pull-object",
    "*",
    f"https://{HOST}/v1/fleet/pull-object",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
)


@pytest.mark.parametrize("path", REFUSED)
def test_all_else_is_not_there(door: GatewayUnderTest, path: str) -> None:
    assert door.call(path, b"x") == (404, b"")
    assert door.superlink.seen == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "CONNECT", "post"])
def test_only_post_is_there(door: GatewayUnderTest, method: str) -> None:
    assert door.call(PUSH, method=method) == (404, b"")
    assert door.superlink.seen == []


def test_the_list_is_that_of_flower() -> None:
    """Fails if another version of Flower has other calls."""
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    fleet = {path.encode() for method, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert {method for method, _ in PROTOBUF_REQUEST_TYPES} == {"POST"}
    left_out = {b"/v1/fleet/" + call for call in (b"register-node", b"unregister-node", b"get-run", b"get-fab")}
    assert fleet - set(BODY_LIMITS) == left_out
    assert fleet >= set(BODY_LIMITS)


def test_every_call_passes_and_is_not_logged(door: GatewayUnderTest) -> None:
    paths = [path.decode() for path in sorted(BODY_LIMITS)]
    for path in paths:
        body = reply() if path == PUSH_MESSAGES else b"abc"
        assert door.call(path, body) == (200, body)
    assert [seen[0] for seen in door.superlink.seen] == paths
    assert door.lines() == []


def test_flowers_headers_pass_unchanged_and_no_others(door: GatewayUnderTest) -> None:
    signed = signature(door.key)
    assert door.call(
        PUSH,
        b"abc",
        signed=signed,
        connection="close, x-private",
        x_private="1",
        te="trailers",
        x_forwarded_for="9.9.9.9",
        x_forwarded_proto="http",
        forwarded="for=9.9.9.9",
        cookie="a=b",
        accept="application/protobuf",
        content_type="application/protobuf",
        x_fedamole_gateway="guessed",
        authorization="Basic Zz09",
        flwr_package_version="1.41.0",
    ) == (200, b"abc")
    _, headers, _ = door.superlink.seen[0]
    assert headers == {
        **signed,
        "flwr-package-version": "1.41.0",
        "accept": "application/protobuf",
        "x-forwarded-for": HOST,
        "content-type": "application/protobuf",
        "content-length": "3",
        "host": f"{HOST}:{door.superlink.port}",
    }


def test_an_error_of_flower_passes_with_its_text(door: GatewayUnderTest) -> None:
    call = door.begin(PUSH, flwr_ask="refuse", content_length=0)
    answer = call.getresponse()
    assert (answer.status, answer.read()) == (412, b'{"code": 2004}')
    assert not {"keep-alive", "x-hop", "connection"} & {name.lower() for name, _ in answer.getheaders()}


def test_one_connection_serves_many_calls(door: GatewayUnderTest) -> None:
    call = door.connect()
    for _ in range(3):
        call.request("POST", PUSH, b"abc", signature(door.key))
        assert call.getresponse().read() == b"abc"
    assert call.sock is not None


def test_bodies_pass_whole(door: GatewayUnderTest) -> None:
    body = os.urandom(5_000_000)
    assert door.call(PUSH, body) == (200, body)


def test_a_body_passes_while_it_is_sent(door: GatewayUnderTest) -> None:
    call = door.begin(PUSH, content_length=200_000)
    call.send(b"1" * 100_000)
    until(lambda: door.superlink.arrived == 100_000, 5)
    call.send(b"2" * 100_000)
    assert len(call.getresponse().read()) == 200_000


def test_an_answer_passes_while_it_is_written(door: GatewayUnderTest) -> None:
    answer = door.begin(PUSH, flwr_ask="halves", content_length=0).getresponse()
    assert answer.read(100_000) == b"1" * 100_000
    door.superlink.go_on.set()
    assert answer.read()[-HALF - 1 :] == b"1" + b"2" * HALF


def test_an_answer_that_breaks_off_is_not_taken_for_whole(door: GatewayUnderTest) -> None:
    answer = door.begin(PUSH, flwr_ask="break", content_length=0).getresponse()
    assert answer.read(100_000)
    door.superlink.go_on.set()
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    assert "connection to the SuperLink failed" in door.lines()[0]


def test_a_body_that_is_too_large_is_not_read(door: GatewayUnderTest) -> None:
    for path, most in {**{path.decode(): most for path, most in BODY_LIMITS.items()}, PUSH: LIMIT_MIB * 2**20}.items():
        call = door.begin(path, content_length=most + 1)
        answer = call.getresponse()
        assert (answer.status, answer.read(), answer.getheader("connection")) == (
            413,
            b'{"error": "too-large"}',
            "close",
        ), path
    assert door.superlink.seen == []
    assert door.call(PUSH, bytes(LIMIT_MIB * 2**20))[0] == 200
    assert door.call(PULL, bytes(64 * 1024))[0] == 200


@pytest.mark.parametrize("length", [{}, {"content_length": 3}])
def test_a_body_without_a_stated_length_is_not_read(door: GatewayUnderTest, length: dict[str, Any]) -> None:
    call = door.begin(PUSH, transfer_encoding="chunked", **length)
    with suppress(OSError):
        call.send(b"3\r\nabc\r\n0\r\n\r\n")
    answer = call.getresponse()
    assert (answer.status, answer.read()) == (411, b'{"error": "no-length"}')
    assert door.superlink.seen == []


@pytest.mark.parametrize("headers", [{"flwr_a": 8000 * "a"}, {f"flwr_{number}": "a" for number in range(70)}])
def test_a_head_that_is_too_large_is_refused(door: GatewayUnderTest, headers: dict[str, Any]) -> None:
    assert door.call(PUSH, **headers) == (431, b'{"error": "head-too-large"}')
    assert door.superlink.seen == []


def test_a_head_of_many_bytes_is_not_read_to_its_end(door: GatewayUnderTest) -> None:
    call = door.connect()
    call.connect()
    call.sock.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\n")
    with suppress(OSError):
        for number in range(100):
            call.sock.sendall(b"flwr-%d: %s\r\n" % (number, 1000 * b"a"))
            time.sleep(0.001)
    assert call.sock.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 431")


def test_a_refused_call_is_one_short_line(tls: Path, door: GatewayUnderTest, tmp_path: Path) -> None:
    with gateway(tls, door.superlink.port, tmp_path / "log") as (port, _):
        quiet = GatewayUnderTest(port, tls, tmp_path / "log", door.superlink)
        quiet.call("/v1/control/" + 300 * "x", signed={}, x_forwarded_for="9.9.9.9")
        until(quiet.lines)
        (line,) = quiet.lines()
        assert re.search(r"404 POST /v1/control/x{88} from 127\.0\.0\.1: ", line)
        assert quiet.call(PUSH, flwr_a=8000 * "a")[0] == 431
        assert quiet.begin(PULL, content_length=65537).getresponse().status == 413
        assert quiet.call(PUSH_MESSAGES, reply(source=8))[0] == 403
        until(lambda: "from anna at 127.0.0.1: a pushed message is refused" in quiet.lines()[-1], 5)


def test_slow_callers_and_a_hanging_superlink_are_not_waited_for(tls: Path, door: GatewayUnderTest) -> None:
    with gateway_with_short_timeouts(tls, door.superlink, idle_s=0.5) as hasty:
        slow = hasty.begin(PUSH, content_length=10)
        slow.send(b"12345")
        assert slow.getresponse().status == 504
        assert hasty.begin(PUSH, content_length=10).getresponse().status == 504, "a head and nothing more"
        assert hasty.call(PUSH, b"abc", flwr_ask="hang") == (504, b"")
        assert hasty.call(PUSH, b"abc") == (200, b"abc")
    with gateway_with_short_timeouts(tls, door.superlink, idle_s=5, call_s=0.5) as hasty:
        steady = hasty.begin(PUSH, content_length=1000)
        start = time.monotonic()
        with suppress(OSError):
            for _ in range(40):
                steady.send(b"1")
                time.sleep(0.05)
        assert steady.getresponse().status == 504
        assert time.monotonic() - start < 4


@pytest.mark.parametrize("head", [b"", b"POST /v1/fleet/pull-object HTTP/1.1\r\n"])
def test_half_a_head_does_not_hold_a_connection(tls: Path, door: GatewayUnderTest, head: bytes) -> None:
    with gateway_with_short_timeouts(tls, door.superlink, idle_s=30) as hasty:
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


def test_a_superlink_that_is_down_is_a_passing_fault(tls: Path, tmp_path: Path) -> None:
    superlink, log = FakeSuperLink(), tmp_path / "log"
    with gateway(tls, superlink.port, log) as (port, _):
        door = GatewayUnderTest(port, tls, log, superlink)
        assert door.call(PUSH) == (503, b"")
        with threaded(superlink.server(tls), superlink.port):
            assert door.call(PUSH, b"abc") == (200, b"abc")
        assert door.call(PUSH)[0] in (502, 503)
        with threaded(superlink.server(tls), superlink.port):
            assert door.call(PUSH, b"abc") == (200, b"abc")
    assert "503 POST /v1/fleet/push-object from anna at 127.0.0.1: cannot reach the SuperLink" in log.read_text()


def test_a_superlink_of_another_authority_is_not_spoken_to(tls: Path, door: GatewayUnderTest, tmp_path: Path) -> None:
    other, log = tmp_path / "other", tmp_path / "log"
    make_certificates(other, hosts=[HOST], clients=[])
    with gateway(tls, door.superlink.port, log, ca=other / "ca.crt") as (port, _):
        assert GatewayUnderTest(port, tls, log, door.superlink).call(PUSH, b"secret") == (503, b"")
    assert door.superlink.seen == []
    assert "CERTIFICATE_VERIFY_FAILED" in log.read_text()


def test_sigterm_lets_a_call_end_and_exits_with_0(tls: Path, door: GatewayUnderTest, tmp_path: Path) -> None:
    with gateway(tls, door.superlink.port, tmp_path / "log") as (port, running):
        idle = GatewayUnderTest(port, tls, tmp_path / "log", door.superlink)
        spare = idle.connect()
        spare.connect()
        busy = idle.begin(PUSH, flwr_ask="halves", content_length=0)
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
    code = "import fedamole.deployment.gateway.process, sys; print(' '.join(sys.modules))"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(completed.stdout.split())
    assert not loaded & {"torch", "transformers", "peft", "datasets"}
    own = {name.removeprefix("fedamole.deployment.") for name in loaded if name.startswith("fedamole.")}
    assert own == {
        "fedamole.deployment",
        "fedamole.errors",
        "fedamole.terminal",
        "gateway",
        "gateway.connection_slots",
        "gateway.guard",
        "gateway.listener",
        "gateway.process",
        "gateway.proxy",
        "flower",
        "flower.messages",
        "security",
        "security.keys",
        "security.roster",
    }


SUPERLINKS = ("nowhere", "127.0.0.1", "a:b", "127.0.0.1:1/v1", "me@127.0.0.1:1", "h:99999")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--superlink", superlink) for superlink in SUPERLINKS),
        *((option, "missing") for option in ("--nodes", "--certificate", "--key", "--ca", "--superlink-token")),
        ("--key", "ca.key"),
        ("--superlink-token", "short"),
        ("--superlink-token", "open"),
        ("--max-body-mib", "0"),
        ("--max-total-mib", "many"),
    ],
)
def test_a_wrong_argument_is_reported(
    option: str, value: str, tls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedamole.deployment.gateway.process import main

    for name, content, mode in (("short", "secret", 0o600), ("open", 32 * "secret", 0o644)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)
    options = {
        "--host": HOST,
        "--port": "1",
        "--superlink": f"{HOST}:1",
        "--certificate": str(tls / "server.crt"),
        "--key": str(tls / "server.key"),
        "--ca": str(tls / "ca.crt"),
        "--nodes": str(tls / "nodes"),
    }
    options[option] = str((tls if value == "ca.key" else tmp_path) / value) if value in FILES else value
    with pytest.raises(SystemExit, match="2"):
        main([argument for pair in options.items() for argument in pair])
    message = capsys.readouterr().err
    assert option in message or value in message
    assert "secretsecret" not in message


FILES = ("missing", "ca.key", "short", "open")


def flower(home: Path) -> dict[str, str]:
    return {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def flwr(home: Path, *arguments: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).parent / "flwr"), *arguments, "--format", "json"]
    completed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flower(home)}, timeout=60)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    result: dict[str, Any] = json.loads(completed.stdout)
    return result


@pytest.mark.faults
def test_flower_itself(tls: Path, tmp_path: Path) -> None:
    """Flower's own client with a registered key is served and outlives restarts of SuperLink and gateway. A stranger
    gets neither in nor to the Control API, which anybody may use on the SuperLink's own port."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

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
    make_own_key(tmp_path / "stranger", "stranger")

    def client(path: Path, port: int) -> FleetHttpClient:
        key = load_private(path)
        authority = (tls / "ca.crt").read_bytes()
        return FleetHttpClient.from_server_address(
            f"{HOST}:{port}", False, authority, [NodeAuthHttpInterceptor(key, key.public_key())]
        )

    def status(call: Any, request: Any) -> int:
        with pytest.raises(httpx.HTTPStatusError) as error:
            call(request)
        return error.value.response.status_code

    with ExitStack() as stack:
        port, first = stack.enter_context(gateway(tls, secured, log))
        door = GatewayUnderTest(port, tls, log, FakeSuperLink())
        anna = stack.enter_context(client(tls / "clients" / "anna" / "node.key", port))
        stranger = stack.enter_context(client(tmp_path / "stranger" / "node.key", port))
        public = public_key_to_bytes(door.key.public_key())
        activate = ActivateNodeRequest(public_key=public, heartbeat_interval=30)
        with process(tmp_path / "superlink.log", *superlink, **flower(home)):
            until(lambda: listens(secured), 30)
            flwr(home, "supernode", "register", str(tls / "nodes" / "anna.pub"), "tls")
            assert status(stranger.ActivateNode, activate) == 401
            for path in REFUSED:
                assert door.call(path) == (404, b""), path
            assert GatewayUnderTest(secured, tls, log, FakeSuperLink()).call("/v1/control/list-nodes")[0] == 415, (
                "it is there, inside"
            )
            node = Node(node_id=anna.ActivateNode(activate).node_id)
            (listed,) = flwr(home, "supernode", "list", "tls")["nodes"]
            assert listed["status"] == "online"
            beat = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30)
            assert anna.SendNodeHeartbeat(beat).success
            assert not anna.PullMessages(PullMessagesRequest(node=node)).messages_list
            other = PullMessagesRequest(node=Node(node_id=node.node_id + 1))
            assert status(anna.PullMessages, other) == 401, "the SuperLink itself ties a node to its key"
        assert status(anna.SendNodeHeartbeat, beat) == 503
        with process(tmp_path / "superlink.log", *superlink, **flower(home)):
            until(lambda: listens(secured), 30)
            assert anna.SendNodeHeartbeat(beat).success
            first.terminate()
            first.wait(20)
            stack.enter_context(gateway(tls, secured, log, port=port))
            assert anna.SendNodeHeartbeat(beat).success
