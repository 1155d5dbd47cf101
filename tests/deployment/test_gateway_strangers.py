"""Limits on strangers and slow or greedy callers; the gateway's TLS, certificate renewal and health."""

import asyncio
import logging
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

pytest.importorskip("flwr")

from cryptography import x509

from fedamole.deployment.gateway import listener as gateway_listener
from fedamole.deployment.gateway.connection_slots import (
    MAX_KNOWN_ADDRESSES,
    MAX_PER_ADDRESS,
    MAX_PER_KEY,
    MAX_REGISTERED,
    MAX_UNKNOWN,
    MIN_PER_KEY,
    ConnectionSlot,
    ConnectionSlots,
    network_of,
)
from fedamole.deployment.gateway.guard import MIB, RefusedError
from fedamole.deployment.security.certificates import make_certificates
from fedamole.deployment.security.keys import new_key
from tests.deployment.gateway import (
    HOST,
    PULL,
    PUSH,
    FakeSuperLink,
    GatewayUnderTest,
    gateway,
    gateway_with_short_timeouts,
    signature,
    threaded,
    until,
)

MOST_MIB = 96
"""Maximum growth of the gateway in MiB through strangers, as in docs/deploy.md; 0 to 40 were measured."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, hosts=[HOST], clients=["anna"])
    return folder


@pytest.fixture(scope="module")
def superlink(tls: Path) -> Iterator[FakeSuperLink]:
    stand_in = FakeSuperLink()
    with threaded(stand_in.server(tls), stand_in.port):
        yield stand_in


@contextmanager
def guarded(tls: Path, superlink: FakeSuperLink, log: Path) -> Iterator[tuple[GatewayUnderTest, Callable[[], float]]]:
    """A separate gateway, and its growth in MiB since it served a client."""
    with gateway(tls, superlink.port, log) as (port, running):
        door = GatewayUnderTest(port, tls, log, superlink)
        assert door.call(PUSH, bytes(4 * MIB))[0] == 200
        superlink.seen.clear()
        process = psutil.Process(running.pid)
        before = process.memory_info().rss
        yield door, lambda: (process.memory_info().rss - before) / MIB


def opened(door: GatewayUnderTest, source: str) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=door.tls / "ca.crt")
    plain = socket.create_connection((HOST, door.port), 10, source_address=(source, 0))
    return context.wrap_socket(plain, server_hostname=HOST)


def sources(number: int) -> str:
    """Addresses of the loopback network, eight connections from each."""
    return f"127.0.0.{10 + number // 8}"


def test_large_bodies_of_strangers_are_not_taken(tls: Path, superlink: FakeSuperLink, tmp_path: Path) -> None:
    """Ten strangers try to send 60 MiB each; nothing is stored, and the client is served."""
    with guarded(tls, superlink, tmp_path / "log") as (door, grown), ExitStack() as stack:
        head = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (60 * MIB)
        sent = 0
        for number in range(10):
            stranger = stack.enter_context(opened(door, sources(number)))
            stranger.settimeout(2)
            with suppress(OSError):
                stranger.sendall(head)
                for _ in range(60):
                    stranger.sendall(bytes(MIB))
                    sent += 1
            assert door.call(PUSH, b"abc") == (200, b"abc")
        assert [body for _, _, body in superlink.seen] == 10 * [b"abc"]
        assert sent < 10 * 20, "the connections are cut"
        assert grown() < MOST_MIB


@pytest.mark.parametrize("source", [lambda number: "127.0.0.9", sources, lambda number: HOST])
def test_silent_strangers_do_not_block_clients(
    tls: Path, superlink: FakeSuperLink, tmp_path: Path, source: Callable[[int], str]
) -> None:
    """From one address, from many, and from the client's own: a third with half a head, a third with TLS alone, a
    third without. The client calls on connections of its own meanwhile, old ones and new ones."""
    with guarded(tls, superlink, tmp_path / "log") as (door, grown), ExitStack() as stack:
        old = door.connect()
        old.request("POST", PULL, b"abc", signature(door.key))
        assert old.getresponse().read() == b"abc"
        for number in range(180):
            with suppress(OSError):
                if number % 3 == 0:
                    plain = socket.create_connection((HOST, door.port), 5, source_address=(source(number), 0))
                    stack.enter_context(plain)
                    continue
                stranger = stack.enter_context(opened(door, source(number)))
                if number % 3 == 1:
                    stranger.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\n")
            if number % 60 == 59:
                start = time.monotonic()
                assert door.call(PULL, b"abc") == (200, b"abc")
                old.request("POST", PULL, b"abc", signature(door.key))
                assert old.getresponse().read() == b"abc"
                assert time.monotonic() - start < 3
        assert old.sock is not None
        assert grown() < MOST_MIB


def test_many_calls_of_strangers_are_few_lines_and_no_memory(
    tls: Path, superlink: FakeSuperLink, tmp_path: Path
) -> None:
    with guarded(tls, superlink, tmp_path / "log") as (door, grown):
        for number in range(60):
            with suppress(OSError), opened(door, sources(number)) as stranger:
                stranger.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\na")
                assert stranger.recv(100).startswith(b"HTTP/1.1 401 ")
        assert superlink.seen == []
        assert len(door.lines()) < 60
        assert grown() < MOST_MIB


@pytest.mark.parametrize("what", ["tcp", "tls", "half a head", "calls"])
def test_a_stranger_has_a_deadline(tls: Path, superlink: FakeSuperLink, what: str) -> None:
    """Also one that repeatedly calls /health, or sends its header byte by byte."""
    with gateway_with_short_timeouts(tls, superlink, first_call_s=0.6) as door:
        start = time.monotonic()
        stranger = socket.create_connection((HOST, door.port), 5) if what == "tcp" else opened(door, HOST)
        with stranger, suppress(OSError):
            while time.monotonic() - start < 4:
                if what == "half a head":
                    stranger.sendall(b"P")
                if what == "calls":
                    stranger.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                stranger.settimeout(0.1)
                with suppress(TimeoutError):
                    if not stranger.recv(4096):
                        break
        assert time.monotonic() - start < 3
        call = door.connect()
        for _ in range(3):
            call.request("POST", PULL, b"abc", signature(door.key))
            assert call.getresponse().read() == b"abc"
            time.sleep(0.4)
        assert call.sock is not None, "a client's connection outlives the strangers' deadline"


def held(slots: ConnectionSlots, *addresses: str) -> tuple[list[ConnectionSlot], set[int]]:
    """Slots for these addresses, and the indices of the closed ones."""
    ended: set[int] = set()
    entered = []
    for number, address in enumerate(addresses):
        slot = slots.acquire(address)
        slot.close = lambda number=number: ended.add(number)  # type: ignore[misc]
        entered.append(slot)
    return entered, ended


def within(scenario: Callable[[], None]) -> None:
    async def run() -> None:
        scenario()

    asyncio.run(run())


def test_the_oldest_stranger_of_the_address_makes_room() -> None:
    def scenario() -> None:
        slots = ConnectionSlots()
        _, ended = held(slots, "9.9.9.9", *(MAX_PER_ADDRESS + 2) * ["1.1.1.1"])
        assert ended == {1, 2}

    within(scenario)


def test_the_address_with_most_strangers_makes_room() -> None:
    def scenario() -> None:
        many = [f"1.1.1.{number // MAX_PER_ADDRESS}" for number in range(MAX_UNKNOWN - 1)]
        slots = ConnectionSlots()
        _, ended = held(slots, "9.9.9.9", *many, "8.8.8.8", "7.7.7.7")
        assert ended == {1, 1 + MAX_PER_ADDRESS}, "neither the single caller, though it is the oldest, nor the new ones"

    within(scenario)


def test_a_clients_address_has_waiting_places_of_its_own() -> None:
    def scenario() -> None:
        slots = ConnectionSlots()
        (first,), removed = held(slots, "9.9.9.9")
        slots.authenticate(first, "anna", 1)
        (new,), closed = held(slots, "9.9.9.9")
        held(slots, *(f"1.{number // 256}.{number % 256}.1" for number in range(3 * MAX_UNKNOWN)))
        assert not removed
        assert not closed
        slots.authenticate(new, "anna", 1)
        # Registered clients have many addresses too; the places beside strangers' are bounded as well.
        for number in range(MAX_KNOWN_ADDRESSES + 1):
            slots.authenticate(slots.acquire(f"2.2.{number}.2"), f"client-{number}", 1)
        _, ended = held(slots, *(f"2.2.{number}.2" for number in range(MAX_KNOWN_ADDRESSES + 1)))
        assert len(ended) == 1

    within(scenario)


def test_a_key_has_its_share_of_the_places_and_no_more() -> None:
    def scenario() -> None:
        slots = ConnectionSlots()
        own = [slots.acquire("1.1.1.1") for _ in range(MAX_PER_KEY)]
        for slot in own:
            slots.authenticate(slot, "anna", 3)
            slots.authenticate(slot, "anna", 3)
        with pytest.raises(RefusedError, match=f"the limit is {MAX_PER_KEY} per key"):
            slots.authenticate(slots.acquire("1.1.1.1"), "anna", 3)
        slots.release(own[0])
        slots.release(own[0])
        slots.authenticate(slots.acquire("1.1.1.1"), "anna", 3)
        keys = MAX_REGISTERED // MIN_PER_KEY
        for number in range(MIN_PER_KEY):
            slots.authenticate(slots.acquire(f"1.1.2.{number}"), "ben", keys)
        with pytest.raises(RefusedError, match=f"the limit is {MIN_PER_KEY} per key"):
            slots.authenticate(slots.acquire("1.1.2.9"), "ben", keys)

    within(scenario)


def test_registered_clients_together_have_a_bound() -> None:
    def scenario() -> None:
        slots = ConnectionSlots()
        for number in range(MAX_REGISTERED):
            slots.authenticate(slots.acquire(f"1.1.{number}.1"), f"client-{number}", 1000)
        with pytest.raises(RefusedError, match="which is the limit"):
            slots.authenticate(slots.acquire("1.2.1.1"), "another", 1000)

    within(scenario)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2ff:3:4:5:6", "2001:db8:1:200::/56"),
        ("fe80::1%eth0", "fe80::/56"),
        ("somewhere", "somewhere"),
    ],
)
def test_an_ipv6_network_counts_as_one_address(address: str, network: str) -> None:
    assert network_of(address) == network


def test_one_key_does_not_take_all_connections(tls: Path, superlink: FakeSuperLink) -> None:
    with gateway_with_short_timeouts(tls, superlink) as door, ExitStack() as stack:
        for _ in range(MAX_PER_KEY):
            stack.callback(door.begin(PUSH, content_length=10).close)
        time.sleep(0.2)
        assert door.call(PULL) == (503, b'{"error": "busy"}')


def test_tls_1_3_is_the_least_to_clients(tls: Path, superlink: FakeSuperLink) -> None:
    with gateway_with_short_timeouts(tls, superlink) as door:
        context = ssl.create_default_context(cafile=tls / "ca.crt")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection((HOST, door.port), 5) as plain, pytest.raises(ssl.SSLError):
            context.wrap_socket(plain, server_hostname=HOST)
        with opened(door, HOST) as stranger:
            assert stranger.version() == "TLSv1.3"


def test_tls_1_3_is_the_least_to_the_superlink(tls: Path) -> None:
    old = FakeSuperLink()
    with threaded(old.server(tls, ssl.TLSVersion.TLSv1_2), old.port), gateway_with_short_timeouts(tls, old) as door:
        assert door.call(PULL, b"abc") == (503, b"")
    assert old.seen == []


def serial(door: GatewayUnderTest) -> int:
    """The serial number of the certificate of a new connection."""
    context = ssl._create_unverified_context()
    with socket.create_connection((HOST, door.port), 5) as plain, context.wrap_socket(plain) as secured:
        shown = secured.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


@pytest.fixture
def hasty_watch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(gateway_listener, "CERTIFICATE_CHECK_S", 0.1)
    caplog.set_level(logging.INFO, "fedamole.gateway")


@pytest.mark.usefixtures("hasty_watch")
def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certs, own = tmp_path / "certs", FakeSuperLink()
    make_certificates(certs, hosts=[HOST], clients=["anna"])
    with threaded(own.server(certs), own.port), gateway_with_short_timeouts(certs, own) as door:
        first = serial(door)
        running = door.begin(PUSH, content_length=6)
        running.send(b"abc")

        make_certificates(certs, hosts=[HOST], clients=[], renew_server=True)
        until(lambda: serial(door) != first, 6)
        second = serial(door)
        assert "new connections use the new certificate" in caplog.text
        assert door.call(PULL, b"abc") == (200, b"abc")
        running.send(b"def")
        assert running.getresponse().read() == b"abcdef"

        def stayed(times: int) -> bool:
            return caplog.text.count("stays in use") == times

        good = (certs / "server.crt").read_bytes()
        for damage in (lambda: (certs / "server.crt").write_text("no certificate"), (certs / "server.crt").unlink):
            damage()
            warnings = caplog.text.count("stays in use")
            until(partial(stayed, warnings + 1), 6)
            assert serial(door) == second
        time.sleep(0.5)
        assert caplog.text.count("stays in use") == 2, "one line for each change"
        (certs / "server.crt").write_bytes(good)
        until(lambda: caplog.text.count("use the new certificate") == 2, 6)
        assert serial(door) == second


@pytest.mark.usefixtures("hasty_watch")
def test_a_key_that_does_not_belong_is_not_used(
    superlink: FakeSuperLink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certs, others = tmp_path / "certs", tmp_path / "others"
    for folder in (certs, others):
        make_certificates(folder, hosts=[HOST], clients=["anna"])
    with gateway_with_short_timeouts(certs, superlink) as door:
        first = serial(door)
        shutil.copy(others / "server.key", certs / "server.key")
        until(lambda: "stays in use" in caplog.text, 6)
        assert serial(door) == first


def test_health_needs_no_key_and_asks_the_superlink(tls: Path, tmp_path: Path) -> None:
    own = FakeSuperLink()
    with gateway(tls, own.port, tmp_path / "log") as (port, _):
        door = GatewayUnderTest(port, tls, tmp_path / "log", own)
        assert door.call("/health", method="GET", signed={}) == (503, b'{"status": "superlink-down"}')
        with threaded(own.server(tls), own.port):
            until(lambda: door.call("/health", method="GET", signed={}) == (200, b'{"status": "ok"}'), 3)
        assert own.seen == []
        assert door.lines() == []
        for method, path in (("POST", "/health"), ("HEAD", "/health"), ("GET", "/health?a"), ("GET", "/health/")):
            assert door.call(path, method=method, signed={}) == (404, b"")


def test_health_is_cheap_and_within_the_strangers_rules(tls: Path, tmp_path: Path) -> None:
    """A SuperLink with a full queue does not accept TCP connections; it is checked once a second, not per call."""
    with socket.create_server((HOST, 0)) as listening, ExitStack() as stack:
        listening.settimeout(0.01)
        requests = 0

        def count() -> None:
            nonlocal requests
            with suppress(TimeoutError):
                while True:
                    stack.enter_context(listening.accept()[0])
                    requests += 1

        port, _ = stack.enter_context(gateway(tls, listening.getsockname()[1], tmp_path / "log"))
        door = GatewayUnderTest(port, tls, tmp_path / "log", FakeSuperLink(port=0))
        start = time.monotonic()
        for _ in range(15):
            assert door.call("/health", method="GET", signed={}) == (200, b'{"status": "ok"}')
        count()
        assert requests <= 1 + (time.monotonic() - start)
        answer = door.begin("/health", "GET", signed={}).getresponse()
        assert answer.getheader("connection") == "close"


def test_an_unknown_key_takes_no_registered_place(tls: Path, superlink: FakeSuperLink) -> None:
    with gateway_with_short_timeouts(tls, superlink, first_call_s=0.5) as door:
        signed = signature(new_key())
        for _ in range(2 * MAX_PER_KEY):
            assert door.call(PULL, b"abc", signed=signed)[0] == 401
        assert door.call(PULL, b"abc") == (200, b"abc")
