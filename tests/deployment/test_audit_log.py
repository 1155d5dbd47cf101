"""The client's audit log: all messages, in a chain of hashes, written before a reply is sent."""

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from multiprocessing.connection import Client as Caller
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from fedamole.cli.main import app
from fedamole.data.settings import SourceSettings
from fedamole.deployment import warm_worker
from fedamole.deployment.client_handler import ClientHandler
from fedamole.deployment.run_session import ClientSettings
from fedamole.deployment.security.audit_log import FIRST_HASH, AuditError, AuditLog, read_audit
from fedamole.deployment.security.policy import UNBOUNDED, PolicySettings
from fedamole.engine.messages import EVALUATE, JOIN, TEST, UPDATE, Reply, Request, failure, unpacked
from fedamole.errors import RunError
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import bytes_as_tensor, pack, tensor_as_bytes
from tests.deployment.test_client_handler import RUN_ID, ManualServer


def host_of(tiny: Path, folder: Path, **settings: Any) -> ClientHandler:
    source = SourceSettings("entail", path=str(tiny / "entail.jsonl"), template="entail")
    own = {"base": str(tiny / "base"), "device": "cpu", "threads": 1, "policy": UNBOUNDED, **settings}
    return ClientHandler(
        ClientSettings(source, folder=str(folder), audit=str(folder / ".client-entail/audit.jsonl"), **own),
        ProgressListener(),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def logged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes], list[bytes]]:
    """A folder with the log of a short run of FedAMoLE; the requests and the answers."""
    folder = tmp_path_factory.mktemp("logged")
    server = ManualServer(
        tiny / "config.toml", "fedamole", "method.experts=4", "method.expert_choices=1", "method.top_k=1"
    )
    host = host_of(tiny, folder)
    requests = [
        pack(server.join()),
        pack(server.update(0, -1)),
        b"garbage",
        pack(server.update(1, 0, plus=0.1)),
        pack(Request(RUN_ID, 1, TEST, last=1, best={"fedamole": 0})),
    ]
    return folder, requests, [host.answer(request) for request in requests]


def test_every_message_has_a_line_with_what_is_in_it(logged: Any) -> None:
    folder, requests, answers = logged
    path = folder / ".client-entail/audit.jsonl"
    log_lines = lines(path)
    assert [line["direction"] for line in log_lines] == ["in", "out"] * 5
    for line, payload in zip(
        log_lines, [message for pair in zip(requests, answers, strict=True) for message in pair], strict=True
    ):
        assert (line["bytes"], line["sha256"]) == (len(payload), hashlib.sha256(payload).hexdigest())
        assert line["time"].endswith("+00:00")
    records = [(line["run"], line["round"], line["operation"]) for line in log_lines]
    assert records[::2] == [
        (RUN_ID, -1, JOIN),
        (RUN_ID, 0, UPDATE),
        ("", -1, "unreadable"),
        (RUN_ID, 1, UPDATE),
        (RUN_ID, 1, TEST),
    ]
    assert log_lines[5]["failed"] == "bad_request"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_records_are_logged_by_field_and_scores_by_value(logged: Any) -> None:
    folder, _, answers = logged
    log_lines = lines(folder / ".client-entail/audit.jsonl")
    join, update, test = log_lines[1], log_lines[3], log_lines[9]
    assert join["report"]["examples"]["train"] > 0
    assert join["scores"] == unpacked(Reply, answers[0]).scores
    assert test["scores"] == unpacked(Reply, answers[4]).scores
    assert update["report"] == unpacked(Reply, answers[1]).report
    record, packed = update["record"], tensor_as_bytes(unpacked(Reply, answers[1]).reply) or b""
    assert (record["kind"], record["sha256"]) == ("TrainedExperts", hashlib.sha256(packed).hexdigest())
    assert set(record["fields"]) == {"tensors", "token_embedding", "expert_embeddings"}
    from fedamole.federation.record import unpack
    from fedamole.methods.fedamole import TrainedExperts

    sent = unpack(TrainedExperts, packed)
    experts = record["fields"]["expert_embeddings"].pop("value")
    assert set(experts) == set(sent.expert_embeddings), "the keys of the outer mapping"
    for name, field in record["fields"].items():
        tensors = [*getattr(sent, name).values()]
        if name == "expert_embeddings":
            tensors = [tensor for by_expert in tensors for tensor in by_expert.values()]
        norm = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
        assert field == {
            "tensors": len(tensors),
            "numbers": sum(tensor.numel() for tensor in tensors),
            "norm": pytest.approx(norm),
        }
    assert log_lines[2]["record"]["fields"]["tensors"]["tensors"] > 0, "what came, too"


def test_nothing_of_the_data_is_in_the_log(logged: Any, tiny: Path) -> None:
    text = (logged[0] / ".client-entail/audit.jsonl").read_text()
    for row in map(json.loads, (tiny / "entail.jsonl").read_text().splitlines()):
        assert row["premise"] not in text
        assert row["hypothesis"] not in text


def test_a_refusal_is_logged_with_its_reason(tiny: Path, tmp_path: Path) -> None:
    server, host = ManualServer(tiny / "config.toml", "fedit"), host_of(tiny, tmp_path, policy=PolicySettings())
    assert unpacked(Reply, host.answer(pack(server.join()))).failed == "policy"
    line = lines(tmp_path / ".client-entail/audit.jsonl")[-1]
    assert line["failed"] == "policy"
    assert "steps of a round: requested 1, allowed at least 5 (min_steps)" in line["reason"]
    assert "scores" not in line


def test_an_answer_repeated_from_disk_is_logged_again(tiny: Path, tmp_path: Path) -> None:
    server, host = ManualServer(tiny / "config.toml", "fedit"), host_of(tiny, tmp_path)
    for _ in range(2):
        host.answer(pack(server.join()))
        host.answer(pack(server.update(0, -1)))
    host.answer(pack(Request(RUN_ID, 0, EVALUATE, "fedit", last=0, message=server.update(0, -1).message)))
    log_lines = lines(tmp_path / ".client-entail/audit.jsonl")
    assert log_lines[3]["sha256"] == log_lines[7]["sha256"]
    assert log_lines[-1]["row"] == "fedit"
    [round_] = [sent for sent in read_audit(tmp_path / ".client-entail/audit.jsonl").sent if sent.round == 0]
    assert (round_.answers, round_.bytes) == (3, 2 * log_lines[3]["bytes"] + log_lines[-1]["bytes"])
    assert round_.numbers == 2 * log_lines[3]["record"]["fields"]["tensors"]["numbers"]


# --- the chain -------------------------------------------------------------------------------------------------


def some(path: Path, count: int = 4) -> AuditLog:
    log = AuditLog(path)
    for number in range(count):
        request = Request("a", number, UPDATE)
        log.answered(b"x" * number, failure(request, "me", "policy"), None, f"reason {number}")
    return log


def test_a_whole_log_is_chained(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    some(path, 2)
    some(path, 2)  # another process goes on
    raw = path.read_bytes().splitlines()
    assert [json.loads(line)["previous"] for line in raw] == [
        FIRST_HASH,
        *(hashlib.sha256(line).hexdigest() for line in raw[:-1]),
    ]
    audit = read_audit(path)
    assert (audit.lines, audit.faults, audit.last) == (4, (), hashlib.sha256(raw[-1]).hexdigest())
    assert audit.refusals == ("reason 0", "reason 1")


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a line changed": lambda raw: [raw[0], raw[1].replace(b"reason 1", b"reason 7"), *raw[2:]],
    "a line taken out": lambda raw: [raw[0], *raw[2:]],
    "the first taken out": lambda raw: raw[1:],
    "a line put in": lambda raw: [raw[0], raw[0], *raw[1:]],
    "two lines exchanged": lambda raw: [raw[0], raw[2], raw[1], raw[3]],
    "a line that is no record": lambda raw: [raw[0], b"[]", *raw[1:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    some(path)
    path.write_bytes(b"\n".join(CHANGES[change](path.read_bytes().splitlines())) + b"\n")
    assert read_audit(path).faults
    result = CliRunner().invoke(app, ["audit-log", str(path)])
    assert isinstance(result.exception, RunError)
    assert "NOT INTACT: line" in result.output


def test_an_incomplete_line_after_a_crash_is_reported_and_the_chain_continues(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    some(path, 2)
    os.truncate(path, path.stat().st_size - 9)
    some(path, 2)
    assert read_audit(path).faults == ("line 2 is damaged, as after a crash or a full disk",)
    assert read_audit(path).lines == 4


def test_long_lines_are_read_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    for _ in range(3):
        log.answered(b"", failure(Request("a", 0, UPDATE), "me", "policy"), None, "x" * 200_000)
    assert read_audit(path).faults == ()


@pytest.mark.parametrize("message", [b"", b"\xff" * 40, b"\x10" + b"\0" * 7 + b'{"a":1}         '])
def test_a_record_that_cannot_be_read_is_logged_as_such(message: bytes, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    request = Request("a", 0, UPDATE, message=bytes_as_tensor(message or b"x"))
    AuditLog(path).received(pack(request), request)
    assert lines(path)[0]["record"] == {"unreadable": True}


def test_a_long_tensor_name_is_summarised_at_once(tmp_path: Path) -> None:
    """The time grows with the length of the name, not with its square: a squared time would be hours here."""
    name = "deltas" + ".1" * 250_000
    packed = save({name + ":x": torch.ones(2)}, metadata={"record": json.dumps(["AverageReply", {}])})
    request = Request("a", 0, UPDATE, message=bytes_as_tensor(packed))
    path = tmp_path / "audit.jsonl"
    AuditLog(path).received(pack(request), request)
    assert lines(path)[0]["record"]["fields"]["deltas"] == {"tensors": 1, "numbers": 2, "norm": pytest.approx(2**0.5)}


# --- a full disk -----------------------------------------------------------------------------------------------


def test_what_cannot_be_logged_is_not_answered(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A request that cannot be logged is not carried out, and a reply that cannot be logged is not sent."""
    server, host = ManualServer(tiny / "config.toml", "fedit"), host_of(tiny, tmp_path)
    host.answer(pack(server.join()))
    path, written, room = tmp_path / ".client-entail/audit.jsonl", os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal room
        is_log = os.fstat(descriptor).st_ino == path.stat().st_ino
        if is_log and room == 0:
            raise OSError(28, "No space left on device")
        room -= is_log
        written(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert host.session is not None
    for lines_that_fit, done in ((0, False), (1, True)):
        room = lines_that_fit
        with pytest.raises(AuditError, match=r"No space left on device.*no reply is sent"):
            host.answer(pack(server.update(0, -1)))
        assert host.session.answer_path(0).exists() == done, "the second time it was trained, and is not answered"
    monkeypatch.undo()
    assert unpacked(Reply, host.answer(pack(server.update(0, -1)))).failed is None


class Enough(BaseException):
    """Stops a worker."""


def test_the_worker_hangs_up_where_it_cannot_log(tmp_path: Path) -> None:
    """The caller gets no bytes; the next one is served."""

    class Answers:
        calls = 0

        def answer(self, payload: bytes) -> bytes:
            self.calls += 1
            if self.calls == 1:
                raise AuditError("full")
            if self.calls == 3:
                raise Enough
            return payload

    address = str(tmp_path / "w")

    def serve() -> None:
        with contextlib.suppress(Enough):
            warm_worker.serve(Answers(), address, b"secret")  # type: ignore[arg-type]

    Thread(target=serve, daemon=True).start()
    heard: list[bytes | None] = []
    for _ in range(3):
        for _ in range(100):
            if Path(address).exists():
                break
            time.sleep(0.05)
        with Caller(address, family="AF_UNIX", authkey=b"secret") as caller:
            caller.send_bytes(b"hello")
            try:
                heard.append(caller.recv_bytes())
            except EOFError:
                heard.append(None)
    assert heard == [None, b"hello", None]


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_shows_what_left_in_totals_and_by_round(logged: Any) -> None:
    folder = logged[0]
    path = folder / ".client-entail/audit.jsonl"
    for location in (folder, path.parent, path):
        result = CliRunner().invoke(app, ["audit-log", str(location), "--json"])
        assert result.exit_code == 0, result.output
        [(where, totals)] = json.loads(result.output).items()
        assert where == str(path)
        assert [(sent["round"], sent["answers"], sent["refused"]) for sent in totals["sent"]] == [
            (-1, 1, 0),
            (0, 1, 0),
            (-1, 0, 1),
            (1, 2, 0),
        ]
        assert sum(sent["bytes"] for sent in totals["sent"]) == sum(map(len, logged[2]))
        assert totals["came"] == 5
    text = CliRunner().invoke(app, ["audit-log", str(folder)]).output
    assert "before round 1" in text
    assert "total" in text
    assert str(sum(map(len, logged[2]))) in text
    assert "the log is intact" in text
    assert hashlib.sha256(path.read_bytes().splitlines()[-1]).hexdigest() in text.replace("\n", "")


def test_where_there_is_no_log(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["audit-log", str(tmp_path)])
    assert isinstance(result.exception, RunError)
    assert "there is no audit log in" in str(result.exception)
