"""Messages between the server and the clients of a deployment: requests and replies, as records.

A message names its run, its round and one of a closed list of operations. Every message is checked on arrival, and a
reply against its request. The method's own messages travel inside, as the bytes of one tensor. The text of an error is
never sent, only a key of `FAILURES`.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from torch import Tensor

from fedamole.evaluation.scores import GenerationScore
from fedamole.federation.record import PayloadError, unpack, whole_number
from fedamole.runs.run_files import SPLITS

R = TypeVar("R")

PROTOCOL = 4
"""Version of the messages, the same at server and clients. Raise it with every change of `Request`, of `Reply`, of the
keys of reports or scores, or of the config tables that are sent."""
JOIN, UPDATE, EVALUATE, TEST = "join", "update", "evaluate", "test"
OPERATIONS = (JOIN, UPDATE, EVALUATE, TEST)

FAILURES = {
    "not_joined": "it does not know this run yet",
    "bad_request": "it refused the request as damaged, foreign or not allowed",
    "policy": "its own policy forbids what was asked; see the client's log",
    "base": "it cannot use the base model; see the client's log",
    "data": "it cannot use its data; see the client's log",
    "config": "it cannot use the run's settings; see the client's log",
    "diverged": "its training diverged",
    "out_of_memory": "it ran out of memory",
    "disk": "it cannot write to its disk",
    "worker": "its worker process stopped or is not running",
    "internal": "an unexpected error; see the client's log",
    "no_answer": "no answer in time",
    "lost": "its connection was lost",
    "too_large": "its answer is larger than allowed",
    "bad_reply": "its answer is damaged or does not fit the request",
}
"""Reasons why a client could not serve a request; a closed list, so that no error can carry data."""
RETRIABLE = frozenset({"worker", "lost", "no_answer", "not_joined"})
"""Failures that may have passed when a client is asked again."""

MAX_LOSS, MAX_SECONDS, MAX_MIB = 1e4, 1e7, 1e8
"""Largest accepted loss in nats per token, time in seconds (115 days), and memory in MiB (95 TiB)."""
MAX_COUNT, MAX_EXAMPLES, MAX_EXCHANGE = 10**9, 10**9, 15
"""Largest accepted count, number of examples of a client, and index of an exchange within its round."""
MAX_TOKENS = 10**12
"""Largest accepted number of tokens of a client's round, and of trained parameters."""
REPORTED: dict[str, tuple[type, float]] = {
    "loss": (float, MAX_LOSS),
    "seconds": (float, MAX_SECONDS),
    "seconds_training": (float, MAX_SECONDS),
    "peak_memory_mib": (float, MAX_MIB),
    "steps": (int, MAX_COUNT),
    "group": (int, MAX_COUNT),
    "probed": (int, MAX_COUNT),
    "forward_tokens": (int, MAX_TOKENS),
    "backward_tokens": (int, MAX_TOKENS),
    "trained_parameters": (int, MAX_TOKENS),
}
"""Numbers that the report of an update may hold: type and largest value of each; the smallest is 0."""
SCORED: dict[str, tuple[type, float]] = {
    "loss": (float, MAX_LOSS),
    "probed": (int, MAX_COUNT),
    "forward_tokens": (int, MAX_TOKENS),
    **dict.fromkeys(
        ("score", "accuracy", "preference", "ranking_accuracy", *get_args(GenerationScore)), (float, 100.0)
    ),
}
"""Numbers that scores may hold, in the same form."""
JOIN_FIELDS = {"examples", "base", "device", "labels"}
"""Fields of a client's description of itself when it joins; `labels` only if its policy shares them."""
MOST_LABELS, LONGEST_LABEL = 1000, 200
"""Maximum number of labels that a client may share, and of characters of each."""


@dataclass(frozen=True)
class Request:
    """A request of the server to one client."""

    run: str
    """Id of the run."""
    round: int
    operation: str
    variant: str | None = None
    """Which model of the run to score; only for EVALUATE."""
    best: dict[str, int] = field(default_factory=dict)
    """The client's best round so far by variant; a client that has not saved the model of this round saves it now."""
    last: int = -1
    """Round of the client's last update that counted; the client undoes all later ones."""
    last_exchange: int = 0
    """Exchange of that update within its round."""
    settings: dict[str, Any] | None = None
    """The tables of the config that all clients share; only for JOIN."""
    message: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's message, packed, as one tensor of bytes; empty for none."""
    exchange: int = 0
    """Index of the exchange within its round; only for UPDATE."""
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class Reply:
    """The answer of one client."""

    run: str
    round: int
    operation: str
    client: str
    failed: str | None = None
    """A key of FAILURES; None if the request succeeded."""
    report: dict[str, Any] = field(default_factory=dict)
    """UPDATE: loss, steps, seconds and other numbers. JOIN: the client's description of itself."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Scores by model."""
    reply: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's reply, packed, as one tensor of bytes; empty for none."""
    exchange: int = 0
    """Index of the exchange, as in the request."""
    protocol: int = PROTOCOL


def unpacked(kind: type[R], payload: bytes) -> R:
    """Unpack a record from another machine; PayloadError for anything else, without a part of its content."""
    try:
        return unpack(kind, payload)
    except Exception as error:  # damaged input makes libraries raise many kinds of errors
        raise PayloadError(f"no {kind.__name__}: damaged or foreign bytes ({type(error).__name__})") from error


def read_request(payload: bytes) -> Request:
    """Unpack and check a request; PayloadError describes what is wrong."""
    _check_protocol(payload)
    request = unpacked(Request, payload)
    if request.operation not in OPERATIONS:
        raise PayloadError(f"its operation is not one of {', '.join(OPERATIONS)}")
    first = 0 if request.operation in (UPDATE, EVALUATE) else -1
    if not request.run.isalnum() or len(request.run) > 64 or request.round < first:
        raise PayloadError("not the id or the round of a run")
    if not 0 <= request.exchange <= MAX_EXCHANGE or not 0 <= request.last_exchange <= MAX_EXCHANGE:
        raise PayloadError(f"the index of its exchange is not between 0 and {MAX_EXCHANGE}")
    if (request.settings is not None) != (request.operation == JOIN):
        raise PayloadError("settings must come with join, and with no other operation")
    return request


def read_reply(
    payload: bytes,
    request: Request,
    client: str | None,
    scored: Mapping[str, Collection[str]],
    optional: Collection[str] = (),
) -> Reply:
    """Unpack a reply and check that it answers a request; PayloadError describes what is wrong.

    `client` must have sent it (None: any may have). `scored` has the models that the reply must score, with the numbers
    that each needs. A client may leave out the scores of `optional` models.
    """
    _check_protocol(payload)
    reply = unpacked(Reply, payload)
    answered = (reply.run, reply.round, reply.exchange, reply.operation)
    if answered != (request.run, request.round, request.exchange, request.operation):
        raise PayloadError("it answers another request (run, round, exchange or operation differ)")
    if client is not None and reply.client != client:
        raise PayloadError(f"it takes part under another name; the key it has is that of --name {client}")
    if reply.failed is not None:
        if reply.failed not in FAILURES or reply.report or reply.scores or reply.reply:
            raise PayloadError("its failure is unknown, or comes with results")
        return reply
    if not set(scored) - set(optional) <= set(reply.scores) <= set(scored):
        raise PayloadError("its scores are not those of the requested models")
    for model, scores in reply.scores.items():
        _check_numbers(scores, scored[model], SCORED, "its scores")
    if request.operation == JOIN:
        _check_join_report(reply.report)
    else:
        _check_numbers(reply.report, (), REPORTED if request.operation == UPDATE else {}, "its report")
    if bool(reply.reply) != (request.operation == UPDATE):
        raise PayloadError("a reply of the method must come with an update, and with no other operation")
    return reply


def _check_numbers(table: Any, needed: Collection[str], allowed: Mapping[str, tuple[type, float]], label: str) -> None:
    """Refuse a table that lacks a needed number, holds anything but allowed ones, or one outside its bounds."""
    if not isinstance(table, dict) or set(needed) - set(table) or set(table) - set(allowed):
        raise PayloadError(f"{label} are not in the expected form")
    for key, value in table.items():
        kind, largest = allowed[key]
        if type(value) not in (int, kind) or not 0 <= value <= largest:  # NaN is not <=
            raise PayloadError(f"{label}: {key} is not {NUMBERS[kind]} from 0 to {largest:g}")


def _check_join_report(report: Mapping[str, Any]) -> None:
    """Refuse a client's description of itself that is not in the expected form."""
    examples, device, labels = report.get("examples"), report.get("device"), report.get("labels", {})
    if set(report) - JOIN_FIELDS or not isinstance(examples, dict) or set(examples) != set(SPLITS):
        raise PayloadError("its description of itself is not in the expected form")
    if not all(_is_count(count) and count > 0 for count in examples.values()):
        raise PayloadError(f"its numbers of examples are not between 1 and {MAX_EXAMPLES}")
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        raise PayloadError("its device is neither cpu nor cuda")
    valid = isinstance(labels, dict) and len(labels) <= MOST_LABELS
    if not valid or not all(len(text) <= LONGEST_LABEL and _is_count(count) for text, count in labels.items()):
        raise PayloadError("its labels are not counts by label")


NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_EXAMPLES


def _check_protocol(payload: bytes) -> None:
    """Refuse a message of another protocol, whatever its fields are; damaged bytes are refused later."""
    protocol = whole_number(payload, "protocol")
    if protocol not in (PROTOCOL, None):
        label = protocol if 0 <= protocol < 1000 else "unknown"
        raise PayloadError(f"protocol {label} where {PROTOCOL} was expected: use one version of fedamole everywhere")


def failure(request: Request, client: str, code: str) -> Reply:
    """Return a reply with a key of FAILURES in place of results."""
    return Reply(request.run, request.round, request.operation, client, failed=code, exchange=request.exchange)
