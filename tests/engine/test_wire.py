"""What a client could send to harm a run: it is left out, the run goes on, and nothing of it stands in a log."""

import json
import logging
import random
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.deployment.fake_link import EXAMPLES, IDENTITY, NAMES, SHAPES, Answers, FakeLink, honest_reply, run

from fedamole.engine import link as timing
from fedamole.engine.messages import (
    EVALUATE,
    JOIN,
    PROTOCOL,
    TEST,
    UPDATE,
    Reply,
    Request,
    failure,
    read_reply,
    read_request,
)
from fedamole.engine.reply_template import check_reply, dry_run
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.record import PayloadError, bytes_as_tensor, pack, tensor_as_bytes, unpack
from fedamole.methods.hetlora import HetLora
from fedamole.methods.ifca_lora import IfcaLora
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.runs.run_files import BASE, MAJORITY

SECRET = "Mrs Miller has the flu"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(timing, "POLL_SECONDS", 0.005)


def forged(reply: Reply, kind: str = "Reply", **fields: Any) -> bytes:
    """The bytes of a reply with any JSON in its fields; a field that is None is left out."""
    table = {key: value for key, value in vars(reply).items() if key != "reply"}
    table = {key: value for key, value in {**table, **fields}.items() if value is not ...}
    tensors = {f"reply:{key}": tensor for key, tensor in reply.reply.items()}
    return save(tensors, {"record": json.dumps([kind, table])})


def asked(request: Request, **fields: Any) -> bytes:
    """The bytes of a request without a message, with any JSON in its fields; `...` leaves one out."""
    table = {key: value for key, value in vars(request).items() if key != "message"}
    table = {key: value for key, value in {**table, **fields}.items() if value is not ...}
    return save({}, {"record": json.dumps(["Request", table])})


def written(text: str, tensors: dict[str, Any] | None = None) -> bytes:
    """Bytes with a header of one's own making."""
    header = json.dumps({"__metadata__": {"record": text}, **(tensors or {})}).encode()
    return struct.pack("<Q", len(header)) + header


def spaced(payload: bytes) -> bytes:
    """The same record with megabytes of spaces in its header, where the format allows them."""
    end = 8 + int.from_bytes(payload[:8], "little")
    header = payload[8:end] + b" " * (4 << 20)
    return struct.pack("<Q", len(header)) + header + payload[end:]


def sent(reply: Reply, change: Callable[[dict[str, torch.Tensor]], Any]) -> bytes:
    """A reply whose tensors are changed."""
    tensors = dict(unpack(SharedTensors, tensor_as_bytes(reply.reply) or b"").tensors)
    change(tensors)
    return pack(replace(reply, reply=bytes_as_tensor(pack(SharedTensors(tensors)))))


A = "m/shared/A"
DEEP = '["Reply",' + "[" * 100_000 + "]" * 100_000 + "]"
HUGE_SHAPE = {"reply:record": {"dtype": "U8", "shape": [0, 2**62, 8], "data_offsets": [0, 0]}}
MANY_DIMENSIONS = {"reply:record": {"dtype": "U8", "shape": [0, *[1] * 10_000], "data_offsets": [0, 0]}}
Lie = Callable[[Reply], bytes | str | None]


def reported(key: str, value: Any) -> Lie:
    """A lie in one number of the report."""
    return lambda r: forged(r, report={**r.report, key: value})


def scored(**scores: Any) -> Lie:
    """A lie in all scores."""
    return lambda r: forged(r, scores=scores)


def scored_too(row: str, value: Any) -> Lie:
    """A lie in one row of the scores."""
    return lambda r: forged(r, scores={**r.scores, row: value})


FORMS: dict[str, Lie] = {
    "nothing": lambda r: b"",
    "random bytes": lambda r: random.Random(1).randbytes(999),
    "truncated": lambda r: pack(r)[:-9],
    "truncated header": lambda r: pack(r)[:60],
    "too large": lambda r: spaced(pack(r)),
    "padded": lambda r: pack(r) + b" ",
    "deep": lambda r: written(DEEP),
    "deep header": lambda r: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "shape overflow": lambda r: written('["Reply", {}]', HUGE_SHAPE),
    "10,000 dimensions": lambda r: written('["Reply", {}]', MANY_DIMENSIONS),
    "an integer of 5,000 digits": lambda r: written('["Reply",' + "9" * 5000 + "]"),
    "its name is data": lambda r: forged(r, SECRET),
    "its name is a table": lambda r: written(json.dumps([{SECRET: 1}, {}])),
    "a list": lambda r: written(json.dumps([SECRET])),
    "no field": lambda r: forged(r, scores=...),
    "a field more": lambda r: forged(r, more=SECRET),
    "scores are a list": lambda r: forged(r, scores=[SECRET]),
    "report is text": lambda r: forged(r, report=SECRET),
    "other run": lambda r: forged(r, run="another"),
    "other round": lambda r: forged(r, round=r.round + 1),
    "round is text": lambda r: forged(r, round=SECRET),
    "other operation": lambda r: forged(r, operation=TEST if r.operation == UPDATE else UPDATE),
    "other client": lambda r: forged(r, client="bob"),
    "lone surrogate": lambda r: forged(r, client="\ud800"),
    "other protocol": lambda r: forged(r, protocol=1),
    "endless protocol": lambda r: forged(r, protocol=10**4000),
    "unknown failure": lambda r: forged(r, failed=SECRET),
    "failure is a number": lambda r: forged(r, failed=7),
    "failed with results": lambda r: forged(r, failed="worker"),
    "no scores": lambda r: forged(r, scores={}),
    "scores of another row": lambda r: forged(r, scores={**r.scores, SECRET: {"loss": 1.0}}),
    "a dead worker": lambda r: "worker",
    "no answer": lambda r: None,
}
"""Lies that can be told in every answer."""

SCORES: dict[str, Any] = {
    "text": {"loss": SECRET},
    "bool": {"loss": True},
    "NaN": {"loss": float("nan")},
    "list": {"loss": [1.0]},
    "infinity": {"loss": float("inf")},
    "400 digits": {"loss": 10**400},
    "1e200": {"loss": 1e200},
    "a loss below 0": {"loss": -1e-9},
    "a loss of -1e15": {"loss": -1e15},
    "a loss above 1e4": {"loss": 10001.0},
    "a score above 100": {"loss": 1.0, "score": 100.1},
    "a score below 0": {"loss": 1.0, "accuracy": -0.1},
    "half an example": {"loss": 1.0, "probed": 0.5},
    "examples below 0": {"loss": 1.0, "probed": -1},
    "half a token": {"loss": 1.0, "forward_tokens": 0.5},
    "too many tokens": {"loss": 1.0, "forward_tokens": 10**13},
    "training while it scores": {"loss": 1.0, "backward_tokens": 1},
    "none": {"loss": None},
    "empty": {},
    "no loss": {"probed": 3},
    "a list": [1.0],
    "a number": 1.0,
    "round": {"loss": 1.0, "round": 7},
    "method": {"loss": 1.0, "method": 7},
    "self": {"loss": 1.0, "self": 1},
    "a secret": {"loss": 1.0, SECRET: 1},
    "more": {"loss": 1.0, "bytes_down": 1, "which": 2, "split": 3, "client": 4},
}
"""What is no scores of a model."""

UPDATES: dict[str, Lie] = {
    "text in the report": lambda r: forged(r, report={**r.report, "loss": SECRET}),
    "a key of the server's in the report": lambda r: forged(r, report={"round_": 1, "client": 2, "self": 3}),
    "bytes in the report": lambda r: forged(r, report={"bytes_down": 10**9}),
    "data as a key of the report": lambda r: forged(r, report={SECRET: 1}),
    "failed in the report": lambda r: forged(r, report={"failed": 1}),
    "NaN in the report": lambda r: forged(r, report={"loss": float("nan")}),
    "400 digits in the report": lambda r: forged(r, report={"peak_memory_mib": 10**400}),
    **{
        f"{key} = {value:g} in the report": reported(key, value)
        for key, values in {
            "loss": (-0.5, 1e5),
            "seconds": (-1e15, 1e8),
            "seconds_training": (-1, 1e8),
            "steps": (-1, 2.5, 10**10),
            "group": (-1, 10**10),
            "probed": (-1, 0.5),
            "peak_memory_mib": (-1, 1e15),
            "forward_tokens": (-1, 0.5, 10**13),
            "backward_tokens": (-1, 0.5, 10**13),
        }.items()
        for value in values
    },
    "bool in the report": lambda r: forged(r, report={"group": True}),
    "NaN": lambda r: sent(r, lambda t: t.update({A: torch.full_like(t[A], torch.nan)})),
    "infinity": lambda r: sent(r, lambda t: t.update({A: torch.full_like(t[A], -torch.inf)})),
    "shape": lambda r: sent(r, lambda t: t.update({A: t[A].T.contiguous()})),
    "no shape": lambda r: sent(r, lambda t: t.update({A: torch.tensor(1.0)})),
    "dtype": lambda r: sent(r, lambda t: t.update({A: t[A].double()})),
    "complex": lambda r: sent(r, lambda t: t.update({A: t[A].to(torch.complex64)})),
    "missing": lambda r: sent(r, lambda t: t.pop(A)),
    "all missing": lambda r: sent(r, lambda t: t.clear()),
    "an expert it was not given": lambda r: sent(r, lambda t: t.update({"m/expert-07/A": t[A].clone()})),
    "its data as a name": lambda r: sent(r, lambda t: t.update({SECRET: t[A].clone()})),
    "norm": lambda r: sent(r, lambda t: t.update({A: t[A] + 1e7})),
    "norm beyond numbers": lambda r: sent(r, lambda t: t.update({A: torch.full_like(t[A], 3e38)})),
    "no reply": lambda r: pack(replace(r, reply={})),
    "two tensors": lambda r: pack(replace(r, reply={**r.reply, "more": torch.ones(1)})),
    "its reply is no bytes": lambda r: pack(replace(r, reply={"record": torch.ones(4)})),
    "its reply is a matrix": lambda r: pack(replace(r, reply={"record": torch.ones(4, 2, dtype=torch.uint8)})),
    "its reply is empty": lambda r: pack(replace(r, reply={"record": torch.ones(0, dtype=torch.uint8)})),
    "its reply is another record": lambda r: pack(replace(r, reply=bytes_as_tensor(pack(r)))),
    "its reply is deep": lambda r: pack(replace(r, reply=bytes_as_tensor(written(DEEP)))),
    **{f"scores: {key}": scored(fedit_ft=value) for key, value in SCORES.items()},
}
EVALUATES: dict[str, Lie] = {
    "a report": lambda r: forged(r, report={"loss": 1.0}),
    "a reply": lambda r: pack(replace(r, reply=bytes_as_tensor(b"more"))),
    **{f"scores: {key}": scored(fedit=value) for key, value in SCORES.items()},
}
TESTS: dict[str, Lie] = {
    "rows missing": lambda r: forged(r, scores={key: r.scores[key] for key in sorted(r.scores)[1:]}),
    "no score": lambda r: forged(r, scores={**r.scores, MAJORITY: {"loss": 1.0}}),
    **{f"scores: {key}": scored_too("fedit/best", value) for key, value in SCORES.items()},
}


def told(**about: Any) -> Lie:
    return lambda r: forged(r, report={key: value for key, value in {**r.report, **about}.items() if value is not ...})


JOINS: dict[str, Lie] = {
    **{
        f"{key} examples": told(examples={**EXAMPLES, "train": value})
        for key, value in {
            "negative": -5,
            "no": 0,
            "bool": True,
            "400 digits of": 10**400,
            "2e9": 2 * 10**9,
            "half": 1.5,
            "text": SECRET,
            "NaN": float("nan"),
            "null": None,
            "a list of": [1],
        }.items()
    },
    "examples are a number": told(examples=9),
    "a split more": told(examples={**EXAMPLES, SECRET: 1}),
    "no examples": told(examples=...),
    "another base": told(base={**asdict(IDENTITY), "weights": "x"}),
    "no base": told(base=...),
    "its base is text": told(base=SECRET),
    "its device is text": told(device=SECRET),
    "more of itself": told(more=SECRET),
    "labels are texts": told(labels={"yes": SECRET}),
    "labels are a list": told(labels=[SECRET]),
    "a label is a row": told(labels={SECRET * 20: 1}),
    "endless labels": told(labels={str(number): 1 for number in range(2000)}),
    "a reply": lambda r: pack(replace(r, reply=bytes_as_tensor(b"more"))),
    **{f"scores: {key}": scored(**{BASE: value}) for key, value in SCORES.items()},
}
LIES = [
    (operation, name, lie)
    for operation, lies in ((JOIN, JOINS), (UPDATE, UPDATES), (EVALUATE, EVALUATES), (TEST, TESTS))
    for name, lie in {**FORMS, **lies}.items()
]


def lying(operation: str, lie: Lie) -> Answers:
    def answers(name: str, request: Request) -> bytes | str | None:
        reply = honest_reply(name, request)
        return lie(reply) if name == "eve" and request.operation == operation else pack(reply)

    return answers


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The run in which eve says openly that it cannot do what is asked, by operation."""
    remaining = {}

    def of(operation: str) -> dict[str, Any]:
        if operation not in remaining:
            open_ = lying(operation, lambda r: pack(Reply(r.run, r.round, r.operation, r.client, "internal")))
            remaining[operation] = run(tmp_path_factory.mktemp(operation) / "run", FakeLink(open_))
        return remaining[operation]

    return of


def test_an_honest_run(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", FakeLink(), rounds=2)
    assert not outcome["left_out"]
    assert set(outcome["rows"]["fedit"]["clients"]) == set(NAMES)
    assert len(outcome["scored"]) == 3 + 2 * 2 * 3


@pytest.mark.parametrize(("operation", "lie"), [pytest.param(op, lie, id=f"{op}: {name}") for op, name, lie in LIES])
def test_a_liar_is_left_out_and_nothing_else_happens(
    operation: str, lie: Lie, without: Any, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    outcome = run(tmp_path / "run", FakeLink(lying(operation, lie)))
    assert outcome == without(operation)
    assert outcome["left_out"] == ([("eve", 0)] if operation == UPDATE else [])
    assert ("eve" in outcome["rows"]["fedit"]["clients"]) == (operation in (UPDATE, EVALUATE))
    assert "eve" in caplog.text, "it is not said who was left out"
    assert max(len(record.getMessage()) for record in caplog.records) < 500
    for text in (caplog.text, *(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())):
        assert SECRET not in text


@pytest.mark.parametrize("method", [IfcaLora(rank=2), HetLora(rank=2)])
def test_methods_that_let_clients_decide(method: Any) -> None:
    """True is in range(3), and a reply without any A has no rank."""
    info = ClientInfo("ann", 5)
    server = Server(BaseInfo(SHAPES, 4), (info,), 0)
    expected = dry_run(method, server, info, method.message(method.init(server), info))
    check_reply(method, expected, expected, 1e4)
    bad = [replace(expected, tensors={}), replace(expected, tensors={"m/shared/B": torch.ones(3, 2)})]
    if hasattr(expected, "cluster"):
        bad += [replace(expected, cluster=cluster) for cluster in (True, 3, -1, 10**30)]
    for reply in bad:
        with pytest.raises(PayloadError):
            check_reply(method, expected, reply, 1e4)


def test_any_changed_byte_is_refused_or_harmless() -> None:
    """Bytes of a reply's JSON changed one at a time: a PayloadError, or a reply that passes all checks."""
    request = Request("run1", 0, EVALUATE, "fedit")
    good = pack(honest_reply("eve", request))
    for position in range(0, len(good)):
        for byte in b'\x00"9[{\\':
            changed = bytearray(good)
            changed[position] = byte
            try:
                reply = read_reply(bytes(changed), request, "eve", {"fedit": ("loss",)})
            except PayloadError:
                continue
            assert set(reply.scores) == {"fedit"}
            assert 0 <= reply.scores["fedit"]["loss"] <= 1e4


REQUESTS: dict[str, Callable[[Request], bytes]] = {
    "operation": lambda r: pack(replace(r, operation="delete")),
    "run": lambda r: pack(replace(r, run="../x")),
    "no run": lambda r: pack(replace(r, run="")),
    "round": lambda r: pack(replace(r, round=-1)),
    "settings with update": lambda r: pack(replace(r, settings={})),
    "join without settings": lambda r: pack(replace(r, operation=JOIN)),
    "exchange": lambda r: pack(replace(r, exchange=16)),
    "exchange below 0": lambda r: pack(replace(r, exchange=-1)),
    "exchange of no kind": lambda r: pack(replace(r, exchange=True)),
    "protocol": lambda r: pack(replace(r, protocol=1)),
    "reply": lambda r: pack(failure(r, "ann", "disk")),
    "deep": lambda r: written(DEEP.replace("Reply", "Request")),
    "random": lambda r: b"\x07" * 99,
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_client_refuses_requests_that_are_none(name: str) -> None:
    good = Request("run1", 0, UPDATE, message=bytes_as_tensor(b"x"))
    assert read_request(pack(good)).round == 0
    with pytest.raises(PayloadError):
        read_request(REQUESTS[name](good))


@pytest.mark.parametrize("more", [{}, {"more": SECRET}, {"scores": ..., "operation": ..., "settings": ...}])
@pytest.mark.parametrize("number", [0, PROTOCOL - 1, PROTOCOL + 1])
def test_another_version_is_named_whatever_its_messages_look_like(number: int, more: dict[str, Any]) -> None:
    """A version with other fields must not be refused as damaged bytes: the log says what to do."""
    request = Request("run1", 0, UPDATE, message=bytes_as_tensor(b"x"))
    message = f"protocol {number} where {PROTOCOL} was expected: use one version of fedamole everywhere"
    with pytest.raises(PayloadError, match=message):
        read_request(asked(request, protocol=number, **more))
    with pytest.raises(PayloadError, match=message):
        read_reply(forged(failure(request, "ann", "disk"), protocol=number, **more), request, "ann", {})


@pytest.mark.parametrize("wrong", [None, "3", 3.0, True, ...])
def test_a_message_without_a_version_is_refused(wrong: Any) -> None:
    request = Request("run1", 0, UPDATE)
    assert read_request(asked(request)).protocol == PROTOCOL
    with pytest.raises(PayloadError):
        read_request(asked(request, protocol=wrong))


def test_requests_and_replies_survive_the_wire() -> None:
    request = Request(
        "run1", 3, UPDATE, "fedit", {"fedit": 2}, 2, message=bytes_as_tensor(b"\x00\xffbytes"), exchange=15
    )
    again = read_request(pack(request))
    assert tensor_as_bytes(again.message) == b"\x00\xffbytes"
    assert (again.round, again.variant, again.best, again.last, again.exchange) == (3, "fedit", {"fedit": 2}, 2, 15)
    assert tensor_as_bytes(bytes_as_tensor(None)) is None


@pytest.mark.parametrize(("sharing", "row"), [(NAMES, True), (NAMES[:2], False), ((), False)])
def test_the_constant_answer_is_in_the_table_only_where_all_share_it(
    sharing: tuple[str, ...], row: bool, tmp_path: Path
) -> None:
    """A client may keep this score to itself, as it tells of the mix of labels; nothing else may be missing."""

    def answers(name: str, request: Request) -> bytes:
        reply = honest_reply(name, request)
        kept = () if name in sharing else ("majority",)
        return pack(replace(reply, scores={key: value for key, value in reply.scores.items() if key not in kept}))

    rows = run(tmp_path / "r", FakeLink(answers))["rows"]
    assert ("majority" in rows) == row
    assert set(rows["base"]["clients"]) == set(NAMES)
