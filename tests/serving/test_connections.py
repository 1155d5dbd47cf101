"""Time limits of connections, over real HTTP."""

import contextlib
import socket
import time
from pathlib import Path

import pytest

from fedamole.serving import server, service
from fedamole.serving.connections import HttpConnection
from fedamole.serving.responses import ResponseFormat

from .served import ENDLESS, REQUEST, Served, post, read_to_end, send, serving, until

ANSWERED = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_connection_that_waits_between_two_requests_is_closed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.2)
    with serving(run) as served, socket.create_connection(served.listening.getsockname(), timeout=20) as line:
        since = time.monotonic()
        line.sendall(ANSWERED)
        assert b"200" in read_to_end(line)
        assert time.monotonic() - since < 4


def test_a_slow_body_is_cut(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BODY_TIMEOUT", 0.2)
    with socket.create_connection(served.listening.getsockname(), timeout=20) as line:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        response = read_to_end(line)
    assert response.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("begin", [b"", b"POST /v1/completions HT", ANSWERED + b"GET"])
def test_a_connection_without_a_whole_head_is_cut(
    served: Served, begin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or after an answer; more bytes now and then change nothing."""
    monkeypatch.setattr(HttpConnection, "head_seconds", 0.3)
    with socket.create_connection(served.listening.getsockname(), timeout=20) as line:
        line.sendall(begin)
        since = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < since + 5:
                time.sleep(0.1)
                line.sendall(b" " if begin else b"")
                line.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    while line.recv(65536):
                        pass
                    break
    assert 0.2 < time.monotonic() - since < 5


def test_a_connection_under_way_is_not_cut_for_its_head(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpConnection, "head_seconds", 0.2)
    with serving(run) as served, send(served, {**ENDLESS, "stream": True}) as line:
        since = time.monotonic()
        while time.monotonic() < since + 0.6:
            assert line.recv(65536)


def test_a_caller_who_reads_nothing_of_its_answer_is_cut(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpConnection, "stall_seconds", 0.2)
    chunk_event = ResponseFormat.chunk_event
    monkeypatch.setattr(
        ResponseFormat, "chunk_event", lambda response, index, text, _: chunk_event(response, index, text * 10**6)
    )
    with serving(run) as served, send(served, {**ENDLESS, "stream": True}):
        until(lambda: served.engine.running == 1)
        until(lambda: served.engine.running == 0)


def test_of_too_many_idle_connections_the_oldest_is_cut(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpConnection, "max_idle", 3)
    lines = []
    for _ in range(4):
        lines.append(socket.create_connection(served.listening.getsockname(), timeout=20))
        time.sleep(0.05)
    since = time.monotonic()
    assert read_to_end(lines[0]) == b""
    assert time.monotonic() - since < 5, "sooner than for want of a head"
    lines[3].sendall(ANSWERED)
    assert b"200" in lines[3].recv(100)
    for line in lines:
        line.close()


def test_nonsense_on_a_connection_is_no_traceback(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    refused = b"POST /v1/completions HTTP/1.1\r\nHost: evil\r\nTransfer-Encoding: chunked\r\n\r\n"
    for content in (b"\x00\xff\r\n\r\n", refused + b"zzz\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"a" * 10**5):
        with socket.create_connection(served.listening.getsockname(), timeout=20) as line:
            line.sendall(content)
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                line.sendall(b"zzz\r\n")
            read_to_end(line)
    assert not caplog.records
    assert post(served, REQUEST)[0] == 200
