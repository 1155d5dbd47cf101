"""The gateway's checks: signatures of registered keys, replies of the calling node, and limits on bytes."""

import logging
import os
import shutil
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.datastructures import Headers

from fedamole.deployment.flower.messages import MAX_OBJECTS, push_fault
from fedamole.deployment.gateway import guard as gateway_guard
from fedamole.deployment.gateway.guard import (
    KEY_BYTES,
    LINES_WINDOW_S,
    MAX_LINES,
    MIB,
    Budget,
    RateLimitedLog,
    RefusedError,
    check_signature,
)
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.keys import new_key, public_line
from fedamole.deployment.security.roster import Roster
from tests.deployment.gateway import (
    HOST,
    LIMIT_MIB,
    PULL,
    PUSH,
    PUSH_MESSAGES,
    FakeSuperLink,
    GatewayUnderTest,
    Key,
    gateway,
    reply,
    signature,
    threaded,
    until,
)

NOW = datetime(2027, 6, 30, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, hosts=[HOST], clients=["anna", "ben"])
    return folder


@pytest.fixture(scope="module")
def one_door(tls: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    superlink, folder = FakeSuperLink(), tmp_path_factory.mktemp("gateway")
    (folder / "token").write_text("T0ken-of-the-gateway\n")
    (folder / "token").chmod(0o600)
    more = ("--superlink-token", str(folder / "token"), "--max-total-mib", "20")
    with ExitStack() as stack:
        stack.enter_context(threaded(superlink.server(tls), superlink.port))
        port, _ = stack.enter_context(gateway(tls, superlink.port, folder / "log", *more))
        yield GatewayUnderTest(port, tls, folder / "log", superlink)


@pytest.fixture
def door(one_door: GatewayUnderTest) -> GatewayUnderTest:
    one_door.superlink.seen.clear()
    one_door.log.write_text("")
    return one_door


def test_names_and_window_are_those_of_flower() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

    assert gateway_guard.KEY_HEADER == FLEET_HTTP_PUBLIC_KEY_HEADER
    assert gateway_guard.SIGNATURE_HEADER == FLEET_HTTP_SIGNATURE_HEADER
    assert gateway_guard.TIMESTAMP_HEADER == TIMESTAMP_HEADER
    assert gateway_guard.MAX_AGE_S == TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    assert gateway_guard.MIN_AGE_S == -SYSTEM_TIME_TOLERANCE


@pytest.fixture
def key() -> Key:
    return new_key()


@pytest.fixture
def nodes(tmp_path: Path, key: Key) -> Roster:
    (tmp_path / "anna.pub").write_bytes(public_line(key.public_key(), "anna until=2027-06-30"))
    return Roster(tmp_path)


def word(headers: dict[str, str] | list[tuple[str, str]], nodes: Roster, now: datetime = NOW) -> str:
    """The client's name, or the error word of the refusal."""
    pairs = headers.items() if isinstance(headers, dict) else headers
    raw = [(name.encode(), value.encode("latin-1")) for name, value in pairs]
    try:
        return check_signature(Headers(raw=raw), nodes, now).name
    except RefusedError as error:
        return error.word if error.status == 401 else str(error.status)


def stamped(key: Key, seconds: float) -> dict[str, str]:
    return signature(key, stamp=(NOW - timedelta(seconds=seconds)).isoformat())


@pytest.mark.parametrize(
    ("age", "answer"), [(0, "anna"), (304, "anna"), (-4, "anna"), (305, "clock"), (-5, "clock"), (1e7, "clock")]
)
def test_a_signature_is_for_a_time(key: Key, nodes: Roster, age: float, answer: str) -> None:
    assert word(stamped(key, age), nodes) == answer


def test_a_key_has_a_last_day(key: Key, nodes: Roster) -> None:
    late = NOW + timedelta(days=1)
    assert word(signature(key, stamp=late.isoformat()), nodes, late) == "expired-key"


def test_only_a_registered_keys_own_signature_is_taken(key: Key, nodes: Roster) -> None:
    good, other = stamped(key, 0), stamped(new_key(), 0)
    assert word({}, nodes) == "unknown-key"
    assert word(other, nodes) == "unknown-key"
    assert word({**other, "flwr-public-key": good["flwr-public-key"]}, nodes) == "bad-signature"
    for name in ("flwr-timestamp", "flwr-signature"):
        assert word({**good, name: ""}, nodes) == "bad-signature"
        assert word({**good, name: "\xe9"}, nodes) == "bad-signature"
        assert word({field: value for field, value in good.items() if field != name}, nodes) == "bad-signature"
    for name in good:
        assert word([*good.items(), (name, good[name])], nodes) != "anna", "a header that is there twice"
    assert word({**good, "flwr-timestamp": stamped(key, 1)["flwr-timestamp"]}, nodes) == "bad-signature"
    assert word({**good, "flwr-public-key": "%%%"}, nodes) == "unknown-key"
    assert word({**good, "flwr-public-key": good["flwr-public-key"] + "===="}, nodes) == "unknown-key"


@pytest.mark.parametrize("stamp", ["", "now", "2027-06-30", "2027-06-30T12:00:00", "0001-01-01T00:00:00+23:59"])
def test_what_is_signed_must_be_a_time_with_a_zone(key: Key, nodes: Roster, stamp: str) -> None:
    assert word(signature(key, stamp=stamp), nodes) in ("bad-signature", "clock")


def test_another_digest_is_no_signature(key: Key, nodes: Roster) -> None:
    good = stamped(key, 0)
    signed = key.sign(good["flwr-timestamp"].encode(), ec.ECDSA(hashes.SHA384()))
    assert word({**good, "flwr-signature": b64encode(signed).decode()}, nodes) == "bad-signature"


def test_strangers_get_an_error_and_do_not_reach_the_superlink(door: GatewayUnderTest) -> None:
    for signed, reason in (
        ({}, "unknown-key"),
        (signature(new_key()), "unknown-key"),
        ({**signature(door.key), "flwr-signature": "AAAA"}, "bad-signature"),
        (signature(door.key, 400), "clock"),
    ):
        answer = door.begin(PUSH, signed=signed, content_length=5_000_000).getresponse()
        assert (answer.status, answer.read(), answer.getheader("connection")) == (
            401,
            b'{"error": "%s"}' % reason.encode(),
            "close",
        )
    assert door.superlink.seen == []
    text = door.log.read_text()
    assert "no registered client has this key" in text
    assert signature(door.key)["flwr-public-key"] not in text
    assert door.call(PUSH, b"abc") == (200, b"abc")


def flowers(door: GatewayUnderTest, name: str) -> FleetHttpClient:
    key = GatewayUnderTest(door.port, door.tls, door.log, door.superlink).key
    assert name == "anna"
    authority = (door.tls / "ca.crt").read_bytes()
    return FleetHttpClient.from_server_address(
        f"{HOST}:{door.port}", False, authority, [NodeAuthHttpInterceptor(key, key.public_key())]
    )


def test_a_removed_key_is_refused_at_once_with_an_error_for_flowers_client(door: GatewayUnderTest) -> None:
    """Also in the middle of a connection, and with a body that the gateway does not read."""
    file = door.tls / "nodes" / "anna.pub"
    body = PushObjectRequest(object_content=os.urandom(5_000_000))
    with flowers(door, "anna") as client:
        client.PullMessages(PullMessagesRequest())
        shutil.move(file, file.with_suffix(".removed"))
        try:
            time.sleep(0.6)
            for call, request in ((client.PushObject, body), (client.PullMessages, PullMessagesRequest())):
                with pytest.raises(httpx.HTTPStatusError) as error:
                    call(request)
                assert error.value.response.status_code == 401
                assert error.value.response.json() == {"error": "unknown-key"}
        finally:
            shutil.move(file.with_suffix(".removed"), file)
        time.sleep(0.6)
        client.PullMessages(PullMessagesRequest())


def test_the_superlink_gets_the_gateways_token_and_no_other(door: GatewayUnderTest) -> None:
    assert door.call(PULL, b"abc", x_fedamole_gateway="T0ken-of-a-caller") == (200, b"abc")
    _, headers, _ = door.superlink.seen[0]
    assert headers["x-fedamole-gateway"] == "T0ken-of-the-gateway"
    assert "T0ken" not in door.log.read_text()


def test_an_honest_reply_passes(door: GatewayUnderTest) -> None:
    assert push_fault(reply()) is None
    assert door.call(PUSH_MESSAGES, reply()) == (200, reply())
    assert door.superlink.seen[0][2] == reply()


FORGED = {
    "in the server's name": reply(source=1),
    "in another client's name": reply(source=8),
    "in nobody's name": reply(source=0),
    "of no node": reply(node=0, source=0),
    "to another client": reply(to=8),
    "to nobody": reply(to=0),
    "an order to another client in the server's name": reply(source=1, to=8, answers=""),
    "no reply": reply(answers=""),
    "no message": reply(messages=0),
    "two messages": reply(messages=2),
    "no tree": reply(trees=0),
    "two trees": reply(trees=2),
    "nothing": b"",
    "no protobuf": b"\xff\xff\xff\xff",
    "cut": reply()[:-3],
    "a running time that is no number": reply() + PushMessagesRequest(clientapp_runtime_list=[1.0]).SerializeToString(),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_is_no_reply_of_ones_own_is_refused(door: GatewayUnderTest, what: str) -> None:
    assert door.call(PUSH_MESSAGES, FORGED[what]) == (403, b'{"error": "not-a-reply"}')
    assert door.superlink.seen == []
    until(lambda: "from anna at 127.0.0.1: a pushed message is refused: " in door.log.read_text(), 5)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_running_time_is_a_number_of_seconds(seconds: float) -> None:
    request = PushMessagesRequest.FromString(reply())
    request.clientapp_runtime_list[0] = seconds
    assert push_fault(request.SerializeToString()) == "its running time is not a number of seconds"


def test_a_message_has_a_bounded_number_of_objects() -> None:
    def tree(objects: int) -> bytes:
        request = PushMessagesRequest.FromString(reply())
        children = [ObjectTree(children=[ObjectTree()]) for _ in range((objects - 1) // 2)]
        request.message_object_trees[0].CopyFrom(ObjectTree(children=children))
        return bytes(request.SerializeToString())

    assert push_fault(tree(MAX_OBJECTS - 1)) is None
    assert push_fault(tree(MAX_OBJECTS + 1)) == f"its message has more than {MAX_OBJECTS} objects"


def test_the_budget_bounds_a_key_and_all_and_is_given_back() -> None:
    budget = Budget(total=100, per_key=60)
    with budget.reserved("anna", 60):
        with pytest.raises(RefusedError, match="anna has 60 bytes"), budget.reserved("anna", 1):
            pass
        full = pytest.raises(RefusedError, match="100 bytes of all")
        with budget.reserved("ben", 40), full, budget.reserved("carl", 1):
            pass
        with budget.reserved("anna", 0), budget.reserved("ben", 40):
            pass
    with pytest.raises(KeyError), budget.reserved("anna", 60):
        raise KeyError
    with budget.reserved("anna", 60), budget.reserved("ben", 40):
        pass
    assert Budget(total=10).per_key == 10
    assert Budget().per_key == KEY_BYTES


def test_bytes_on_their_way_are_bounded_and_others_go_on(door: GatewayUnderTest) -> None:
    """The total is 20 MiB here: two bodies of 8 MiB are taken in part, a third one and more do not fit."""
    held = [door.begin(PUSH, content_length=LIMIT_MIB * MIB) for _ in range(2)]
    for call in held:
        call.send(bytes(MIB))
    time.sleep(0.2)
    answer = door.begin(PUSH, content_length=LIMIT_MIB * MIB).getresponse()
    assert (answer.status, answer.read()) == (503, b'{"error": "busy"}')
    assert door.call(PUSH, bytes(MIB))[0] == 200
    for call in held:
        call.send(bytes((LIMIT_MIB - 1) * MIB))
        assert call.getresponse().status == 200
        call.close()
    until(lambda: door.call(PUSH, bytes(LIMIT_MIB * MIB))[0] == 200, 5)
    assert "bytes in transit; the limit is" in door.log.read_text()


def test_a_stranger_cannot_fill_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limited_log = RateLimitedLog(logging.getLogger("fedamole.gateway"))
    for number in range(10 * MAX_LINES):
        limited_log.warning("strangers", f"line {number}")
    assert len(caplog.records) == MAX_LINES + 1
    assert caplog.messages[-1] == "further messages about strangers are suppressed for 10 s"
    limited_log.warning("anna", "a client's line")
    assert caplog.messages[-1] == "a client's line"
    now[0] += LINES_WINDOW_S
    limited_log.warning("strangers", "later")
    assert caplog.messages[-1] == "later"
