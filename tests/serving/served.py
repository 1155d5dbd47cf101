"""A server in this process, and requests to it by hand."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import torch

from fedamole.personal.generate import layout_of
from fedamole.personal.saved_models import open_bank, places
from fedamole.serving.connections import listen
from fedamole.serving.engine import Engine
from fedamole.serving.keys import Keys
from fedamole.serving.scheduling import Limits
from fedamole.serving.server import Offer, Server, Service


class Served:
    """A server in a thread over the models of a run, whose engine works from `start` on."""

    def __init__(self, run: Path, keys: Keys | None = None, per_minute: int | None = None, **limits: int) -> None:
        found = places(run)
        bank, adapters = open_bank(found)
        self.engine = Engine(bank, adapters, Limits(**limits))
        offer = Offer(tuple(place.client for place in found), 1, 16, tuple(map(layout_of, found)), keys, per_minute)
        self.server = Server(Service(self.engine, offer))
        self.door = listen("127.0.0.1", 0)
        self.address = "http://{}:{}".format(*self.door.getsockname())
        self.thread = threading.Thread(target=self.server.run, args=([self.door],))
        self.thread.start()
        until(lambda: self.server.started)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=30)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def until(found: Callable[[], object]) -> None:
    """Wait for something that is about to happen."""
    for _ in range(3000):
        if found():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def raw(served: Served, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request by hand."""
    connection = http.client.HTTPConnection(*served.door.getsockname())
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Content-Type": "application/json", **named})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


ASKED = {"model": "mood", "prompt": "a", "max_tokens": 2}
FOREVER = {**ASKED, "max_tokens": 10**6}


@contextlib.contextmanager
def serving(run: Path, *args: Any, **limits: int) -> Iterator[Served]:
    """A server whose answers may go on without end."""
    made = Served(run, *args, **dict[str, Any]({"answer": 10**6, "tokens": 10**9, **limits}))
    made.engine.bank.base.max_positions = 10**7  # the base's own positions are rotations, which go on
    take, end = made.engine._take, made.engine.bank.base.tokenizer.eos_token_id

    def without_end(requests: Any, logits: torch.Tensor) -> None:
        logits[:, end] = -1e9
        take(requests, logits)

    made.engine._take = without_end  # type: ignore[method-assign]
    made.engine.start()
    try:
        yield made
    finally:
        made.close()


def post(served: Served, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return raw(served, "POST", "/v1/completions", content, **headers)


def sent(served: Served, body: dict[str, Any], key: str = "") -> socket.socket:
    """A connection on which a request was sent and nothing was read yet."""
    content = json.dumps(body).encode()
    line = socket.create_connection(served.door.getsockname(), timeout=20)
    line.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (key.encode(), len(content), content)
    )
    return line


def ended(line: socket.socket) -> bytes:
    """What came on a connection until the server ended it."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := line.recv(65536):
            found += part
    return found
