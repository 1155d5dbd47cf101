"""A server in this process, and requests over plain sockets."""

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

from fedamole.personal.generate import prompt_format_of
from fedamole.personal.saved_models import open_bank, saved_models
from fedamole.serving.connections import listen
from fedamole.serving.engine import InferenceEngine
from fedamole.serving.keys import ApiKeys
from fedamole.serving.scheduling import Limits
from fedamole.serving.served_models import ServiceSettings, models_of_engine
from fedamole.serving.server import HttpServer
from fedamole.serving.service import Service


class Served:
    """A server in a thread for the models of a run. Its engine does not run before `engine.start()`."""

    def __init__(
        self,
        run: Path,
        keys: ApiKeys | None = None,
        per_minute: int | None = None,
        drain: float = 0,
        features: dict[str, Any] | None = None,
        **limits: int,
    ) -> None:
        models = saved_models(run)
        bank, adapters = open_bank(models)
        self.engine = InferenceEngine(bank, adapters, Limits(**limits))
        names, formats = tuple(model.client for model in models), tuple(map(prompt_format_of, models))
        self.service = Service(
            models_of_engine(self.engine, names, formats, 16, 1), ServiceSettings(keys, per_minute, **features or {})
        )
        self.server = HttpServer(self.service, None, drain)
        self.listening = listen("127.0.0.1", 0)
        self.address = "http://{}:{}".format(*self.listening.getsockname())
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],))
        self.thread.start()
        until(lambda: self.server.started)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=30)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition did not become true")


def raw(served: Served, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, Any]]:
    """Send a request; return the status and JSON of the response."""
    connection = http.client.HTTPConnection(*served.listening.getsockname())
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Content-Type": "application/json", **named})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


REQUEST = {"model": "mood", "prompt": "a", "max_tokens": 2}
ENDLESS = {**REQUEST, "max_tokens": 10**6}


@contextlib.contextmanager
def serving(run: Path, *args: Any, **limits: Any) -> Iterator[Served]:
    """A server whose answers never end by themselves."""
    served = Served(run, *args, **dict[str, Any]({"max_answer_tokens": 10**6, "max_tokens": 10**9, **limits}))
    served.engine.bank.base.max_positions = 10**7  # the base has rotary positions, which have no limit
    sample, end_of_text = served.engine._sample, served.engine.bank.base.tokenizer.eos_token_id

    def without_end(states: Any, logits: torch.Tensor) -> None:
        logits[:, end_of_text] = -1e9
        sample(states, logits)

    served.engine._sample = without_end  # type: ignore[method-assign]
    served.engine.start()
    try:
        yield served
    finally:
        served.close()


def post(served: Served, body: bytes | dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return raw(served, "POST", "/v1/completions", content, **headers)


def send(served: Served, body: dict[str, Any], key: str = "") -> socket.socket:
    """Send a request on a new connection and return it; nothing is read."""
    content = json.dumps(body).encode()
    line = socket.create_connection(served.listening.getsockname(), timeout=20)
    line.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s" % (key.encode(), len(content), content)
    )
    return line


def read_to_end(line: socket.socket) -> bytes:
    """Return everything that the server sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := line.recv(65536):
            received += part
    return received
