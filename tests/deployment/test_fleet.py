"""A client's connection to servers that send invalid data or are temporarily unavailable."""

import gzip
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from fedamole.deployment.flower import fleet as flower_fleet
from fedamole.deployment.flower.content import from_array_record, to_array_record
from fedamole.deployment.flower.fleet import Fleet, FleetError, UnusableMessageError
from fedamole.deployment.processes import environment
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.keys import load_private
from tests.deployment.proxy import Proxy, listening

NODE, SUPERLINK = 77, 1


class Superlink:
    """A server with configurable responses: bytes, a status, or a function of the request's body."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[str] = []
        self.pieces: dict[str, bytes] = {}
        self.pushed: list[bytes] = []
        self.answers: dict[str, Any] = {
            "register-node": RegisterNodeFleetResponse(node_id=NODE),
            "activate-node": ActivateNodeResponse(node_id=NODE),
            "deactivate-node": DeactivateNodeResponse(),
            "send-node-heartbeat": SendNodeHeartbeatResponse(success=True),
            "pull-messages": PullMessagesResponse(),
            "pull-object": self._piece,
            "confirm-message-received": ConfirmMessageReceivedResponse(),
            "push-messages": self._pushed,
            "push-object": PushObjectResponse(stored=True),
        }
        superlink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                name = self.path.removeprefix("/v1/fleet/")
                superlink.asked.append(name)
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                answer = superlink.answers[name]
                answer = answer(body) if callable(answer) else answer
                status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
                content = content if isinstance(content, bytes) else content.SerializeToString()
                self.send_response(status)
                for key, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                try:
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                """Do not log."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _piece(self, body: bytes) -> PullObjectResponse:
        content = self.pieces.get(PullObjectRequest.FromString(body).object_id)
        result = content is not None
        return PullObjectResponse(object_found=result, object_available=True, object_content=content or b"")

    def _pushed(self, body: bytes) -> PushMessagesResponse:
        self.pushed.append(body)
        (tree,) = PushMessagesRequest.FromString(body).message_object_trees
        names = [tree.object_id]
        return PushMessagesResponse(objects_to_push=names, session_id="s")

    def queue(self, message: Message, source: int = SUPERLINK, target: int = NODE) -> None:
        """Queue a message for the node."""
        message.metadata.__dict__.update(_src_node_id=source, _dst_node_id=target, _message_id=message.object_id)
        self.pieces = {name: thing.deflate() for name, thing in get_all_nested_objects(message).items()}
        proto = message_to_proto(remove_content_from_message(message))
        self.answers["pull-messages"] = PullMessagesResponse(
            messages_list=[proto], message_object_trees=[get_object_tree(message)]
        )


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> Iterator[Superlink]:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 5)
    monkeypatch.setattr(flower_fleet, "PAUSES", (0.01,))
    server = Superlink()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def fleet(superlink: Superlink) -> Iterator[Fleet]:
    fleet_client = Fleet(f"127.0.0.1:{superlink.port}", None, None, threading.Event())
    fleet_client.activate()
    yield fleet_client
    fleet_client.close()


def request(content: RecordDict, kind: str = "query") -> Message:
    return Message(content, dst_node_id=NODE, message_type=kind, ttl=100.0)


def test_a_message_comes_whole_and_is_answered(superlink: Superlink, fleet: Fleet) -> None:
    payload = bytes(range(256)) * 50_000  # more than one of Flower's pieces
    superlink.queue(request(RecordDict({"request": to_array_record(payload)})))
    incoming = fleet.receive()
    assert incoming is not None
    assert incoming.payload == payload
    assert superlink.asked[-1] == "confirm-message-received"
    fleet.reply(incoming, b"answer")
    (body,) = superlink.pushed
    (sent,) = PushMessagesRequest.FromString(body).messages_list
    assert (sent.metadata.src_node_id, sent.metadata.dst_node_id) == (NODE, SUPERLINK)
    assert sent.metadata.reply_to_message_id == incoming.message.metadata.message_id
    assert not {"get-run", "get-fab"} & set(superlink.asked), "no app is ever asked for"


def change_a_piece(it: Superlink) -> None:
    it.queue(request(RecordDict({"request": to_array_record(b"x")})))
    it.pieces = {name: piece + b"x" for name, piece in it.pieces.items()}


def lose_the_pieces(it: Superlink) -> None:
    it.queue(request(RecordDict({"request": to_array_record(b"x")})))
    it.pieces = {}


AGENT = RecordDict({"flwr.agentapp.message": ConfigRecord({"payload": "go"})})
FOREIGN: dict[str, Callable[[Superlink], None]] = {
    "an agent's message": lambda it: it.queue(request(AGENT)),
    "another kind of message": lambda it: it.queue(request(RecordDict({"request": to_array_record(b"x")}), "train")),
    "a record beside the request": lambda it: it.queue(
        request(RecordDict({"request": to_array_record(b"x"), "more": ConfigRecord({"a": 1})}))
    ),
    "another node's message": lambda it: it.queue(request(RecordDict({"request": to_array_record(b"x")})), source=78),
    "a message to another node": lambda it: it.queue(
        request(RecordDict({"request": to_array_record(b"x")})), target=78
    ),
    "a changed piece": change_a_piece,
    "a missing piece": lose_the_pieces,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_anything_but_a_request_is_refused_and_disconnected(name: str, superlink: Superlink, fleet: Fleet) -> None:
    FOREIGN[name](superlink)
    with pytest.raises(UnusableMessageError):
        fleet.receive()
    if name not in ("another node's message", "a message to another node"):
        assert "confirm-message-received" in superlink.asked
    assert not {"get-run", "get-fab"} & set(superlink.asked)


def test_a_message_without_metadata_is_refused(superlink: Superlink, fleet: Fleet) -> None:
    result = PullMessagesResponse()
    result.messages_list.add()
    result.message_object_trees.add()
    superlink.answers["pull-messages"] = result
    with pytest.raises(UnusableMessageError):
        fleet.receive()


def test_too_many_pieces_and_too_many_bytes_are_not_fetched(
    superlink: Superlink, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    superlink.queue(request(RecordDict({"request": to_array_record(b"x" * 1000)})))
    monkeypatch.setattr(flower_fleet, "MAX_OBJECTS", 2)
    with pytest.raises(UnusableMessageError, match="more than 2 objects"):
        fleet.receive()
    assert "pull-object" not in superlink.asked
    monkeypatch.setattr(flower_fleet, "MAX_OBJECTS", 100)
    monkeypatch.setattr(flower_fleet, "MAX_MESSAGE_BYTES", 500)
    with pytest.raises(UnusableMessageError, match="more than 500 bytes"):
        fleet.receive()


def test_an_answer_without_end_is_cut(superlink: Superlink, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_fleet, "MAX_RESPONSE_BYTES", 1000)
    superlink.answers["send-node-heartbeat"] = b"x" * 2000
    with pytest.raises(httpx.DecodingError, match="too large"):
        fleet.heartbeat()


def test_an_answer_is_never_unpacked(superlink: Superlink, fleet: Fleet) -> None:
    """A small compressed response could expand to gigabytes."""
    superlink.answers["send-node-heartbeat"] = (
        200,
        {"content-encoding": "gzip"},
        gzip.compress(SendNodeHeartbeatResponse(success=True).SerializeToString()),
    )
    with pytest.raises(httpx.DecodingError):
        fleet.heartbeat()


def test_a_redirect_is_not_followed(superlink: Superlink, fleet: Fleet) -> None:
    other = Superlink()
    target = f"http://127.0.0.1:{other.port}/v1/fleet/send-node-heartbeat"
    superlink.answers["send-node-heartbeat"] = (307, {"location": target}, b"")
    with pytest.raises(FleetError, match="status 307"):
        fleet.heartbeat()
    assert not other.asked
    other.server.shutdown()
    other.server.server_close()


@pytest.mark.parametrize(
    ("status", "content", "kind", "text"),
    [
        (401, b'{"error": "expired-key"}', "key", "expired-key"),
        (401, b'{"error": "\\u001b[31m' + b"x" * 99 + b'"}', "key", "unknown-key"),
        (401, b"[" * 60000, "key", "unknown-key"),
        (412, b'{"code": 2004, "detail": "x"}', "busy", "in use"),
        (403, b"", "refused", "status 403"),
        (404, b"not here", "refused", "status 404"),
    ],
)
def test_refusals(status: int, content: bytes, kind: str, text: str, superlink: Superlink, fleet: Fleet) -> None:
    superlink.answers["send-node-heartbeat"] = (status, {}, content)
    with pytest.raises(FleetError, match=text) as error:
        fleet.heartbeat()
    assert error.value.kind == kind


def test_what_passes_is_waited_for_but_not_for_ever(superlink: Superlink, fleet: Fleet) -> None:
    answers: Iterator[Any] = iter([(503, {}, b""), (500, {}, b""), (429, {}, b"")])
    superlink.answers["pull-messages"] = lambda body: next(answers, PullMessagesResponse())
    assert fleet.receive() is None
    superlink.answers["pull-messages"] = (500, {}, b"")
    with pytest.raises(FleetError, match="keeps failing at this call"):
        fleet.receive()


def test_an_end_is_not_waited_out(superlink: Superlink, fleet: Fleet) -> None:
    superlink.answers["pull-messages"] = (503, {}, b"")
    threading.Timer(0.05, fleet.stop.set).start()
    with pytest.raises(FleetError) as error:
        fleet.receive()
    assert error.value.kind == "stopped"


def test_a_former_node_is_ended_first(superlink: Superlink) -> None:
    fleet_client = Fleet(f"127.0.0.1:{superlink.port}", None, None, threading.Event())
    fleet_client.activate(former=5)
    assert superlink.asked == ["deactivate-node", "register-node", "activate-node"]
    assert from_array_record(to_array_record(b"abc")) == b"abc"
    fleet_client.close()


def test_the_connection_goes_through_a_proxy_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's name is one that only the proxy can resolve."""
    make_certificates(tmp_path, ["fl.example.org"], ["north"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    superlink = Superlink(context)
    key = load_private(tmp_path / "clients" / "north" / "node.key")
    proxy = Proxy(superlink.port, login="user:secret")
    for name in ("https_proxy", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with listening(proxy):
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@localhost:{proxy.port}")
        fleet_client = Fleet("fl.example.org:9092", tmp_path / "ca.crt", key, threading.Event())
        fleet_client.activate()
        assert fleet_client.receive() is None
        fleet_client.close()
        assert set(proxy.asked) == {"CONNECT fl.example.org:9092 HTTP/1.1"}
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:wrong@localhost:{proxy.port}")
        refused = Fleet("fl.example.org:9092", tmp_path / "ca.crt", key, threading.Event())
        with pytest.raises(FleetError, match="407") as error:
            refused.activate()
        assert error.value.kind == "proxy"
        assert "wrong" not in str(error.value)
    superlink.server.shutdown()
    superlink.server.server_close()


def test_loopback_never_goes_to_a_proxy(superlink: Superlink, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the client's own calls nor those of any process that a server or client starts."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "intranet.example.org")
    fleet_client = Fleet(f"127.0.0.1:{superlink.port}", None, None, threading.Event())
    assert fleet_client.activate() == NODE
    fleet_client.close()
    started = environment(tmp_path)
    assert started["HTTPS_PROXY"] == "http://127.0.0.1:9"
    assert set(started["NO_PROXY"].split(",")) >= {"intranet.example.org", "127.0.0.1", "localhost", "::1"}
    assert started["no_proxy"] == started["NO_PROXY"]
