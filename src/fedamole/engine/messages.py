"""What crosses the network between a server and a client: requests and replies, as records.

A message names its run, its round and one of a closed list of operations, and is checked against what was asked. What
a method sends travels inside as the bytes of one tensor. No text of an error travels, only one of `FAILURES`.
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

PROTOCOL = 3
"""Version of the messages, the same on both sides. Raise it with every change of `Request` or `Reply`, of what a report
or scores may hold, and of the config's tables that travel."""
JOIN, UPDATE, EVALUATE, TEST = "join", "update", "evaluate", "test"
OPERATIONS = (JOIN, UPDATE, EVALUATE, TEST)

FAILURES = {
    "not_joined": "it does not know this run yet",
    "bad_request": "it refused the request as damaged, foreign or not allowed",
    "policy": "its own policy forbids what was asked; see its own log",
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

MOST_LOSS, MOST_SECONDS, MOST_MIB = 1e4, 1e7, 1e8
"""Largest loss in nats per token, time in seconds (115 days), and memory in MiB (95 TiB) that are believed."""
MOST_COUNT, MOST_EXAMPLES, MOST_EXCHANGE = 10**9, 10**9, 15
"""Largest count that is believed, most examples of a client, and highest index of an exchange within a round."""
MOST_TOKENS = 10**12
"""Largest number of tokens of a client's round, and of trained parameters, that is believed."""
REPORTED: dict[str, tuple[type, float]] = {
    "loss": (float, MOST_LOSS),
    "seconds": (float, MOST_SECONDS),
    "seconds_training": (float, MOST_SECONDS),
    "peak_memory_mib": (float, MOST_MIB),
    "steps": (int, MOST_COUNT),
    "group": (int, MOST_COUNT),
    "probed": (int, MOST_COUNT),
    "forward_tokens": (int, MOST_TOKENS),
    "backward_tokens": (int, MOST_TOKENS),
    "trained_parameters": (int, MOST_TOKENS),
}
"""What a client may tell of its training: for each number its type and the largest value; the smallest is 0."""
SCORED: dict[str, tuple[type, float]] = {
    "loss": (float, MOST_LOSS),
    "probed": (int, MOST_COUNT),
    "forward_tokens": (int, MOST_TOKENS),
    **dict.fromkeys(("score", "accuracy", *get_args(GenerationScore)), (float, 100.0)),
}
"""What scores may consist of, in the same form."""
TOLD = {"examples", "base", "device", "labels"}
"""What a client may tell of itself when it joins; labels only where it shares them."""
MOST_LABELS, LONGEST_LABEL = 1000, 200
"""Labels that can be shared, and characters of each."""


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
    """The client's best round so far by row: it keeps the model it had then, if it has not yet."""
    last: int = -1
    """Last round whose answer of this client counted; what it did after that is undone."""
    settings: dict[str, Any] | None = None
    """The config's tables that all share: join."""
    message: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's message, packed, as the bytes of one tensor; empty for none."""
    exchange: int = 0
    """Index of the exchange within its round."""
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


def unpacked(kind: type[R], payload: bytes) -> R:
    """Unpack a record that came from elsewhere; whatever is wrong with it is a PayloadError without a word of it."""
    try:
        return unpack(kind, payload)
    except Exception as error:  # nesting too deep, shapes that no tensor has: libraries raise what they like
        raise PayloadError(f"no {kind.__name__}: damaged or foreign bytes ({type(error).__name__})") from error


def read_request(payload: bytes) -> Request:
    """Unpack a request and check its form; PayloadError says what is wrong with it."""
    _check_protocol(payload)
    request = unpacked(Request, payload)
    if request.operation not in OPERATIONS:
        raise PayloadError(f"its operation is not one of {', '.join(OPERATIONS)}")
    first = 0 if request.operation in (UPDATE, EVALUATE) else -1
    if not request.run.isalnum() or len(request.run) > 64 or request.round < first:
        raise PayloadError("not the id or the round of a run")
    if not 0 <= request.exchange <= MOST_EXCHANGE:
        raise PayloadError(f"the index of its exchange is not between 0 and {MOST_EXCHANGE}")
    if (request.settings is not None) != (request.operation == JOIN):
        raise PayloadError("settings come with join, and with nothing else")
    return request


def read_reply(
    payload: bytes,
    request: Request,
    client: str | None,
    scored: Mapping[str, Collection[str]],
    optional: Collection[str] = (),
) -> Reply:
    """Unpack a reply and check that it answers this request of this client (None: of any); else PayloadError.

    `scored` names the models that have to be scored, and which numbers each must have; `optional` those of them whose
    scores a client may keep to itself.
    """
    _check_protocol(payload)
    reply = unpacked(Reply, payload)
    if (reply.run, reply.round, reply.operation) != (request.run, request.round, request.operation):
        raise PayloadError("it answers another request (run, round or operation differ)")
    if client is not None and reply.client != client:
        raise PayloadError(f"it takes part under another name; the key it has is that of --name {client}")
    if reply.failed is not None:
        if reply.failed not in FAILURES or reply.report or reply.scores or reply.reply:
            raise PayloadError("its failure is none of the known ones, or comes with results")
        return reply
    if not set(scored) - set(optional) <= set(reply.scores) <= set(scored):
        raise PayloadError("its scores are not of the models that were asked for")
    for row, found in reply.scores.items():
        _check_numbers(found, scored[row], SCORED, "its scores")
    if request.operation == JOIN:
        _check_about(reply.report)
    else:
        _check_numbers(reply.report, (), REPORTED if request.operation == UPDATE else {}, "its report")
    if bool(reply.reply) != (request.operation == UPDATE):
        raise PayloadError("a reply of the method comes with an update, and with nothing else")
    return reply


def _check_numbers(found: Any, needed: Collection[str], allowed: Mapping[str, tuple[type, float]], what: str) -> None:
    """Refuse a table of anything but the numbers that are needed or allowed, each within its bounds."""
    if not isinstance(found, dict) or set(needed) - set(found) or set(found) - set(allowed):
        raise PayloadError(f"{what} are not in the expected form")
    for key, value in found.items():
        kind, most = allowed[key]
        if type(value) not in (int, kind) or not 0 <= value <= most:  # NaN is not <=
            raise PayloadError(f"{what}: {key} is not {NUMBERS[kind]} from 0 to {most:g}")


def _check_about(report: Mapping[str, Any]) -> None:
    """Refuse what a client tells of itself unless it is in the expected form."""
    examples, device, labels = report.get("examples"), report.get("device"), report.get("labels", {})
    if set(report) - TOLD or not isinstance(examples, dict) or set(examples) != set(SPLITS):
        raise PayloadError("what it tells of itself is not in the expected form")
    if not all(_is_count(count) and count > 0 for count in examples.values()):
        raise PayloadError(f"its numbers of examples are not between 1 and {MOST_EXAMPLES}")
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", device):
        raise PayloadError("its device is none")
    known = isinstance(labels, dict) and len(labels) <= MOST_LABELS
    if not known or not all(len(text) <= LONGEST_LABEL and _is_count(count) for text, count in labels.items()):
        raise PayloadError("its labels are not counts by label")


NUMBERS: dict[type, str] = {int: "a whole number", float: "a number"}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_EXAMPLES


def _check_protocol(payload: bytes) -> None:
    """Refuse a message of another protocol, whatever its fields are; bytes that are no message are refused later."""
    found = whole_number(payload, "protocol")
    if found not in (PROTOCOL, None):
        told = found if 0 <= found < 1000 else "unknown"
        raise PayloadError(f"protocol {told} where {PROTOCOL} was expected: use one version of fedamole everywhere")


def failure(request: Request, client: str, code: str) -> Reply:
    """A reply that says why there is none."""
    return Reply(request.run, request.round, request.operation, client, failed=code)
