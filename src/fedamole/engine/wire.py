"""What crosses the network between a server and a client: requests and replies, as records.

A message names its run, its round and one of a closed list of operations, and is checked against what was asked. What
a method sends travels inside as the bytes of one tensor. No text of an error travels, only one of `FAILURES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedamole.federation.record import PayloadError, pack, unpack

PROTOCOL = 1
JOIN, UPDATE, EVALUATE, TEST = "join", "update", "evaluate", "test"
OPERATIONS = (JOIN, UPDATE, EVALUATE, TEST)

FAILURES = {
    "not_joined": "it does not know this run yet",
    "bad_request": "it refused the request as damaged, foreign or not allowed",
    "base": "it cannot use the base model; see its own log",
    "data": "it cannot use its data; see its own log",
    "config": "it cannot use the run's settings; see its own log",
    "diverged": "its training diverged",
    "out_of_memory": "it ran out of memory",
    "disk": "it cannot write to its disk",
    "worker": "its worker stopped or is not there",
    "internal": "an unexpected error; see its own log",
    "no_answer": "no answer in time",
    "lost": "its connection was lost",
    "too_large": "its answer is larger than it may be",
    "bad_reply": "its answer is damaged or not what was asked for",
}
"""Why a client could not do what was asked: a closed list, so that no error can carry data."""


@dataclass(frozen=True)
class Request:
    """What the server asks of one client."""

    run: str
    """Id of the run."""
    round: int
    operation: str
    row: str | None = None
    """Which of the run's models: evaluate."""
    best: dict[str, int] = field(default_factory=dict)
    """Best round so far by row: the client keeps the model it had then, if it has not yet."""
    last: int = -1
    """Last round whose answer of this client counted; what it did after that is undone."""
    settings: dict[str, Any] | None = None
    """The config's tables that all share: join."""
    message: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's message, packed, as the bytes of one tensor; empty for none."""
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Reply:
    """What one client answers."""

    run: str
    round: int
    operation: str
    client: str
    failed: str | None = None
    """One of FAILURES; None where all went well."""
    report: dict[str, Any] = field(default_factory=dict)
    """Of update: loss, steps, seconds and so on, numbers all; of join: what the client says of itself."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Scores by model."""
    reply: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's reply, packed, as the bytes of one tensor; empty for none."""
    protocol: int = PROTOCOL


def boxed(payload: bytes | None) -> dict[str, Tensor]:
    """Put packed bytes into a record as one tensor of bytes."""
    return {} if payload is None else {"record": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}


def unboxed(tensors: Mapping[str, Tensor]) -> bytes | None:
    """Take packed bytes out of a record again."""
    if not tensors:
        return None
    if set(tensors) != {"record"} or tensors["record"].dtype != torch.uint8 or tensors["record"].dim() != 1:
        raise PayloadError("a message holds one tensor of bytes and nothing else")
    return tensors["record"].numpy().tobytes()


def read_request(payload: bytes) -> Request:
    """Unpack a request and check its form; PayloadError says what is wrong with it."""
    request = unpack(Request, payload)
    _check_protocol(request.protocol)
    if request.operation not in OPERATIONS:
        raise PayloadError(f"operation {request.operation!r} is not one of {', '.join(OPERATIONS)}")
    if not request.run.isalnum() or len(request.run) > 64 or request.round < -1:
        raise PayloadError("not the id or the round of a run")
    if (request.settings is not None) != (request.operation == JOIN):
        raise PayloadError("settings come with join, and with nothing else")
    return request


def read_reply(payload: bytes, request: Request, client: str | None) -> Reply:
    """Unpack a reply and check that it answers this request of this client (None: of any); else PayloadError."""
    reply = unpack(Reply, payload)
    _check_protocol(reply.protocol)
    answered = (reply.run, reply.round, reply.operation, reply.client)
    if answered != (request.run, request.round, request.operation, reply.client if client is None else client):
        raise PayloadError("it answers another request (run, round, operation or client differ)")
    if reply.failed is not None and reply.failed not in FAILURES:
        raise PayloadError("its failure is none of the known ones")
    scores = [scores for scores in reply.scores.values() if isinstance(scores, dict)]
    if len(scores) < len(reply.scores):
        raise PayloadError("its scores are not in the expected form")
    parts = [*scores, *([reply.report] if reply.operation == UPDATE else [])]
    numbers = [value for part in parts for value in part.values()]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        raise PayloadError("its scores or its report hold something else than numbers")
    return reply


def _check_protocol(found: int) -> None:
    if found != PROTOCOL:
        raise PayloadError(f"protocol {found} where {PROTOCOL} was expected: use one version of fedamole everywhere")


def failure(request: Request, client: str, code: str) -> Reply:
    """A reply that says why there is none."""
    return Reply(request.run, request.round, request.operation, client, failed=code)


def packed(record: Request | Reply) -> bytes:
    """The bytes of a request or a reply."""
    return pack(record)
