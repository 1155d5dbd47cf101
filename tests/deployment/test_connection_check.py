"""The connection check through a proxy, over real sockets."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedamole.cli.main import app
from fedamole.deployment import connection_check as reach_module
from fedamole.deployment.connection_check import check_connection, is_loopback
from fedamole.deployment.security.certificates import make_certificates
from tests.deployment.proxy import Gateway, Proxy, listening

PASSWORD = "p@ss/word"
HOST = "fed.example.org"
"""A name that only the proxy can resolve."""


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "certs", (HOST,), ("clinic",))
    return tmp_path / "certs"


@pytest.fixture
def gateway(certs: Path) -> Iterator[Gateway]:
    gateway_process = Gateway(certs)
    with listening(gateway_process):
        yield gateway_process


def found(certs: Path, server: str = f"{HOST}:9092") -> tuple[str, list[str], list[str]]:
    """The text for success, the problems and the remedies; asserts that none contains the password."""
    fine, faults = check_connection(server, certs / "ca.crt")
    messages = [fine, *(fault.text for fault in faults), *(fault.remedy for fault in faults)]
    assert not any(word in text for text in messages for word in (PASSWORD, "p%40ss", "secret-user")), messages
    return fine, [fault.text for fault in faults], [fault.remedy for fault in faults]


def test_through_a_proxy_with_a_password(certs: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(gateway.port, login=f"secret-user:{PASSWORD}")
    with listening(proxy):
        monkeypatch.setenv("HTTPS_PROXY", f"http://secret-user:p%40ss%2Fword@localhost:{proxy.port}")
        fine, faults, _ = found(certs)
        assert faults == []
        assert fine.startswith(f"{HOST}:9092 answers through the proxy localhost:{proxy.port}; its certificate is trus")
        assert proxy.asked == [f"CONNECT {HOST}:9092 HTTP/1.1"]
        for url in (f"http://localhost:{proxy.port}", f"http://secret-user:wrong@localhost:{proxy.port}"):
            monkeypatch.setenv("HTTPS_PROXY", url)
            _, faults, remedies = found(certs)
            assert "requires a user name and password, or rejects the given ones (407)" in faults[0]
            assert "http://USER:PASSWORD@HOST:PORT" in remedies[0]


def test_all_proxy_counts_and_no_proxy_leaves_hosts_out(
    certs: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(gateway.port)
    with listening(proxy):
        monkeypatch.setenv("ALL_PROXY", f"localhost:{proxy.port}")  # without http:// before it
        assert found(certs)[1] == []
        assert len(proxy.asked) == 1
        monkeypatch.setenv("NO_PROXY", "other.example.org,example.org")
        real = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *more, **named: real("127.0.0.1" if host == HOST else host, *more, **named),
        )
        fine, faults, _ = found(certs, f"{HOST}:{gateway.port}")
        assert (faults, "proxy" in fine, len(proxy.asked)) == ([], False, 1)


def test_loopback_never_goes_to_a_proxy(certs: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    for host in ("localhost", "127.0.0.1"):
        assert found(certs, f"{host}:{gateway.port}")[1] == []
    assert [is_loopback(host) for host in ("::1", "127.9.9.9", "LOCALHOST", "10.0.0.1", HOST)] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_proxy_that_cannot_be_reached(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://secret-user:{PASSWORD.replace('/', '')}@localhost:{port}")
    _, faults, remedies = found(certs)
    assert faults == [f"the proxy localhost:{port} (HTTPS_PROXY) cannot be reached: refused: nothing listens there"]
    assert f"add {HOST} to NO_PROXY" in remedies[0]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (403, "refuses a connection to fed.example.org:9092 (403)"),
        (405, "refuses a connection to fed.example.org:9092 (405)"),
        (502, "cannot reach fed.example.org:9092 (502)"),
        (504, "cannot reach fed.example.org:9092 (504)"),
    ],
)
def test_a_proxy_that_refuses(certs: Path, monkeypatch: pytest.MonkeyPatch, status: int, text: str) -> None:
    proxy = Proxy(0, status=status)
    with listening(proxy):
        monkeypatch.setenv("HTTPS_PROXY", f"http://localhost:{proxy.port}")
        assert found(certs)[1] == [f"the proxy localhost:{proxy.port} {text}"]


def test_a_proxy_that_opens_tls(certs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificates(tmp_path / "other", (HOST,), ())
    inspector = Gateway(tmp_path / "other")
    proxy = Proxy(0, inspects=inspector)
    with listening(proxy, inspector):
        monkeypatch.setenv("HTTPS_PROXY", f"http://localhost:{proxy.port}")
        _, faults, remedies = found(certs)
        assert f"the proxy localhost:{proxy.port} intercepts TLS" in faults[0]
        assert "not to intercept this server" in remedies[0]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is not an HTTP proxy"),
        (b"", "is not an HTTP proxy"),
        (b"HTTP/1.1 200 OK\r\n\r\nrubbish that is no TLS", "TLS fails"),
    ],
)
def test_a_port_that_is_no_proxy(certs: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, text: str) -> None:
    proxy = Proxy(0, answer=answer)
    with listening(proxy):
        monkeypatch.setenv("HTTPS_PROXY", f"http://localhost:{proxy.port}")
        assert text in found(certs)[1][0]


def test_a_server_that_is_not_there_behind_a_proxy_that_is_silent(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_module, "TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HTTPS_PROXY", f"http://localhost:{silent.getsockname()[1]}")
        assert "is not an HTTP proxy" in found(certs)[1][0]


@pytest.mark.parametrize("url", ["ftp://u:p%40ssword@proxy:1", "http://u:p@ss@[::1"])
def test_a_proxy_that_cannot_be_meant(certs: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", url)
    assert found(certs)[1] == ["the proxy setting in HTTPS_PROXY or ALL_PROXY is invalid"]


def test_the_command_line_prints_no_password(certs: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["doctor", "--server", f"{HOST}:9092", "--certs", str(certs / "clients" / "clinic")]
    proxy = Proxy(gateway.port, login=f"secret-user:{PASSWORD}")
    with listening(proxy):
        for password, text in (("p%40ss%2Fword", "answers through the proxy"), ("wrong-p%40ss", "(407)")):
            monkeypatch.setenv("HTTPS_PROXY", f"http://secret-user:{password}@localhost:{proxy.port}")
            for more in ([], ["--json"]):
                done = CliRunner().invoke(app, [*arguments, *more])
                assert text in done.output, done.output
                assert not any(word in done.output for word in (PASSWORD, "p%40ss", "p@ss", "secret-user"))
