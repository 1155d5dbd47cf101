"""A client's audit log: one JSON line per message received or sent, each with the hash of the previous line.

The file is append-only, and no message is sent before its line is on disk. Changing, inserting or removing a line
breaks the chain of hashes. Removal of the newest lines is detectable only with a known earlier hash (`fedamole
audit-log` prints the newest).
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedamole.engine.messages import JOIN, Reply, Request
from fedamole.errors import FedamoleError, RunError
from fedamole.federation.record import field_of, read_parts, tensor_as_bytes

MAX_FIELDS, OTHERS = 50, "(others)"
"""Number of a record's fields that are listed; the tensors of the others are counted together."""
AUDIT = "audit.jsonl"
"""File name in a client's home folder."""
FIRST_HASH = "0" * 64
"""The "previous" hash of the first line."""
IN, OUT = "in", "out"
MAX_VALUE = 200
"""Maximum length of a logged value in characters; longer values are logged as a hash."""


class AuditError(FedamoleError):
    """The audit log cannot be written, so no reply may be sent."""


class AuditLog:
    """Appends to the log of one client; without a path nothing is logged."""

    def __init__(self, path: Path | None) -> None:
        """Set the path; the file is created with mode 0600 at the first line."""
        self.path = path

    def received(self, payload: bytes, request: Request | None) -> None:
        """Log a received message; `request` is None if it could not be read. Errors: AuditError."""
        about: dict[str, Any] = {"run": "", "round": -1, "operation": "unreadable"}
        if request is not None:
            about = {"run": request.run, "round": request.round, "operation": request.operation, "row": request.variant}
            about["record"] = describe_record(request.message)
            if request.operation == JOIN:
                about["settings_sha256"] = hashlib.sha256(_canonical(request.settings)).hexdigest()
        self._append({"direction": IN, **about, **_size_and_hash(payload)})

    def answered(self, payload: bytes, reply: Reply, row: str | None, reason: str) -> None:
        """Log a reply before it is sent, with the reason if it is a refusal. Errors: AuditError."""
        header = {"run": reply.run, "round": reply.round, "operation": reply.operation, "row": row}
        optional = {"failed": reply.failed, "reason": reason, "report": reply.report, "scores": reply.scores}
        present = {key: value for key, value in optional.items() if value}
        self._append(
            {"direction": OUT, **header, **present, "record": describe_record(reply.reply), **_size_and_hash(payload)}
        )

    def _append(self, about: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                last, complete = _read_last_line(file)
                previous = FIRST_HASH if last is None else hashlib.sha256(last).hexdigest()
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                line = json.dumps({"time": now, **about, "previous": previous}, separators=(",", ":"))
                # A partial line, left by a crash or a full disk, stays and gets a line break.
                file.write((b"" if complete else b"\n") + line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise AuditError(
                f"the audit log {self.path} cannot be written ({error.strerror}); no reply is sent until this is fixed"
            ) from error


def _read_last_line(file: Any) -> tuple[bytes | None, bool]:
    """Return the last line without its line break (None in an empty file), and whether it has one."""
    position = end = file.seek(0, os.SEEK_END)
    if end == 0:
        return None, True
    parts, has_line_break = list[bytes](), False
    while position > 0 and not has_line_break:
        step = min(position, 1 << 16)
        position -= step
        file.seek(position)
        parts.insert(0, file.read(step))
        has_line_break = b"\n" in (parts[0][:-1] if len(parts) == 1 else parts[0])
    tail = b"".join(parts)
    complete = tail.endswith(b"\n")
    return (tail[:-1] if complete else tail).rpartition(b"\n")[2], complete


def _size_and_hash(payload: bytes) -> dict[str, Any]:
    return {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def describe_record(message: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise a packed record by field: tensors, numbers and norm, or the value; {} for no record.

    The record is untrusted: if it cannot be read, the summary states that.
    """
    try:
        packed = tensor_as_bytes(message)
        return {} if packed is None else _fields(packed)
    except Exception:  # untrusted bytes: the libraries raise many types of exceptions
        return {"unreadable": True}


def _fields(packed: bytes) -> dict[str, Any]:
    name, values, tensors_by_path = read_parts(packed)
    squares: dict[str, float] = {}
    summary: dict[str, dict[str, Any]] = {}
    for path, tensors in tensors_by_path.items():
        field_name = field_of(path)
        field_name = field_name if field_name in summary or len(summary) < MAX_FIELDS else OTHERS
        tensor_summary = summary.setdefault(field_name, {"tensors": 0, "numbers": 0})
        tensor_summary["tensors"] += len(tensors)
        tensor_summary["numbers"] += sum(tensor.numel() for tensor in tensors.values())
        squared_norms = (float(tensor.double().square().sum()) for tensor in tensors.values())
        squares[field_name] = sum(squared_norms, squares.get(field_name, 0.0))
    for field_name, total in squares.items():
        norm = total**0.5
        summary[field_name]["norm"] = norm if norm < float("inf") else "not finite"
    for field_name, value in list(values.items())[:MAX_FIELDS]:
        text = _canonical(value)
        is_short = len(text) <= MAX_VALUE
        described = {"value": value} if is_short else {"value_sha256": hashlib.sha256(text).hexdigest()}
        summary[field_name] = {**summary.get(field_name, {}), **described}
    return {"kind": name, "sha256": hashlib.sha256(packed).hexdigest(), "fields": summary}


@dataclass(frozen=True)
class RoundTraffic:
    """The replies sent for one run in one round."""

    run: str
    round: int
    answers: int = 0
    refused: int = 0
    bytes: int = 0
    numbers: int = 0
    """Numbers in the method's records."""
    scores: int = 0
    """Number of scores and losses."""


@dataclass(frozen=True)
class AuditSummary:
    """The content of an audit log after verification."""

    lines: int = 0
    came: int = 0
    """Number of messages received."""
    last: str = FIRST_HASH
    """SHA-256 of the newest line; if you note it down, you can verify later that nothing before it was changed."""
    faults: tuple[str, ...] = ()
    """Broken links of the chain and damaged lines; empty if the log is intact."""
    sent: tuple[RoundTraffic, ...] = ()
    """Replies by run and round, ordered by first reply."""
    refusals: tuple[str, ...] = field(default=())
    """Distinct reasons of refusals."""


def read_audit(path: Path) -> AuditSummary:
    """Read a log, verify its chain of hashes and sum up the replies."""
    faults, sent, reasons = list[str](), dict[tuple[str, int], RoundTraffic](), dict[str, None]()
    received, number, previous = 0, 0, FIRST_HASH
    for number, raw in enumerate(_read_lines(path), 1):
        line = _parse_line(raw)
        if line is None:
            faults.append(f"line {number} is damaged, as after a crash or a full disk")
        elif line.get("previous") != previous:
            faults.append(
                f"line {number} does not match the hash of the previous line: that line was changed, or one is missing"
            )
        previous = hashlib.sha256(raw).hexdigest()
        if line is None:
            continue
        if line.get("direction") != OUT:
            received += 1
            continue
        try:
            key = (str(line.get("run", "")), int(line.get("round", -1)))
            sent[key] = _add_line(sent.get(key, RoundTraffic(*key)), line)
        except (ValueError, TypeError, AttributeError, OverflowError):
            faults.append(f"line {number} is not in the format that this program writes")
            continue
        if line.get("reason"):
            reasons[str(line["reason"])] = None
    return AuditSummary(number, received, previous, tuple(faults), tuple(sent.values()), tuple(reasons))


def _read_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for raw in file:
            yield raw.removesuffix(b"\n")


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _add_line(before: RoundTraffic, line: Mapping[str, Any]) -> RoundTraffic:
    fields = line.get("record", {}).get("fields", {}).values()
    failed = bool(line.get("failed"))
    return RoundTraffic(
        before.run,
        before.round,
        before.answers + (not failed),
        before.refused + failed,
        before.bytes + int(line.get("bytes", 0)),
        before.numbers + sum(item.get("numbers", 0) for item in fields),
        before.scores + sum(len(item) for item in line.get("scores", {}).values()),
    )


def audit_files(path: Path) -> list[Path]:
    """Return the logs at a path: a log, a client's home, or a folder of run folders with client homes."""
    if path.is_file():
        return [path]
    logs = sorted(path.glob(AUDIT)) or sorted(path.glob(f".client-*/{AUDIT}"))
    if not logs:
        raise RunError(f"there is no audit log in {path}: give the --folder of `fedamole client`, or the file")
    return logs
