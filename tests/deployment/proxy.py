"""A small HTTP proxy on loopback with CONNECT and Basic authentication, and a fake gateway behind it."""

import base64
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HEALTHY = b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{"status":"ok"}'


class Listener:
    """Accepts connections on a free loopback port, each served in its own thread."""

    def __init__(self) -> None:
        self.place = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.place.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                stream = self.place.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        with suppress(OSError), stream:
            self.serve(stream)

    def serve(self, stream: socket.socket) -> None:
        raise NotImplementedError


class Gateway(Listener):
    """Answers every request over TLS as a gateway answers GET /health."""

    def __init__(self, certs: Path) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certs / "server.crt", certs / "server.key")
        super().__init__()

    def serve(self, stream: socket.socket) -> None:
        with self.context.wrap_socket(stream, server_side=True) as secured:
            head(secured)
            secured.sendall(HEALTHY)


class Proxy(Listener):
    """Tunnels CONNECT to whatever name, always to `behind` on loopback; what it was asked for is in `asked`.

    `login` is USER:PASSWORD to ask for; `status` refuses every CONNECT with that number; `inspects` is a gateway with
    another certificate that answers in the server's place, as a proxy does that opens TLS.
    """

    def __init__(
        self,
        behind: int,
        login: str | None = None,
        status: int | None = None,
        inspects: Gateway | None = None,
        answer: bytes | None = None,
    ) -> None:
        self.behind, self.login, self.status, self.inspects, self.answer = behind, login, status, inspects, answer
        self.asked: list[str] = []
        super().__init__()

    def serve(self, stream: socket.socket) -> None:
        lines = head(stream).decode("latin-1").split("\r\n")
        self.asked.append(lines[0])
        if self.answer is not None:
            stream.sendall(self.answer)
            return
        given = dict(line.partition(": ")[::2] for line in lines[1:])
        expected = None if self.login is None else "Basic " + base64.b64encode(self.login.encode()).decode()
        if given.get("Proxy-Authorization") != expected:
            stream.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        elif self.status is not None:
            stream.sendall(b"HTTP/1.1 %d Refused\r\nContent-Length: 0\r\n\r\n" % self.status)
        elif self.inspects is not None:
            stream.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self.inspects.serve(stream)
        else:
            with socket.create_connection(("127.0.0.1", self.behind)) as server:
                stream.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=_pass, args=(server, stream), daemon=True)
                back.start()
                _pass(stream, server)
                back.join(5)


def head(stream: socket.socket) -> bytes:
    """A request's head."""
    result = b""
    while b"\r\n\r\n" not in result:
        piece = stream.recv(4096)
        if not piece:
            raise OSError("the connection ended")
        result += piece
    return result


def _pass(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """Close the listeners at the end."""
    try:
        yield
    finally:
        for listener in listeners:
            listener.place.shutdown(socket.SHUT_RDWR)  # closing alone does not wake the thread that accepts
            listener.place.close()
