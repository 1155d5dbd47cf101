"""The audit log of a client: a line of JSON for every message that came in or went out, each with the hash of the last.

The file is only ever appended to, and nothing leaves before its line is on disk. A line that is changed, inserted or
taken out breaks the chain of hashes; that the newest lines were cut off can be noticed only by whoever knows an older
hash (`fedamole audit-log` prints the newest).
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

from safetensors.torch import load

from fedamole.engine.messages import JOIN, Reply, Request
from fedamole.errors import FedamoleError, RunError
from fedamole.federation.record import tensor_as_bytes

MOST_FIELDS, OTHERS = 50, "(others)"
"""Fields of a record that are named in a line; the tensors of the rest are counted together."""
AUDIT = "audit.jsonl"
"""Name of the file in a client's home."""
FIRST = "0" * 64
"""What stands for the hash of a line before the first."""
IN, OUT = "in", "out"
LONGEST = 200
"""Characters of a plain value that are logged; a longer one is told by its hash."""


class AuditError(FedamoleError):
    """The audit log cannot be written: nothing may be answered."""


class AuditLog:
    """Appends to the log of one client; without a path nothing is logged."""

    def __init__(self, path: Path | None) -> None:
        """Name the file; it is made with mode 0600 when the first line comes."""
        self.path = path

    def received(self, payload: bytes, request: Request | None) -> None:
        """Log a message that came in; None where it cannot be read. Errors: AuditError."""
        about: dict[str, Any] = {"run": "", "round": -1, "operation": "unreadable"}
        if request is not None:
            about = {"run": request.run, "round": request.round, "operation": request.operation, "row": request.variant}
            about["record"] = described(request.message)
            if request.operation == JOIN:
                about["settings_sha256"] = hashlib.sha256(_canonical(request.settings)).hexdigest()
        self._append({"direction": IN, **about, **_whole(payload)})

    def answered(self, payload: bytes, reply: Reply, row: str | None, reason: str) -> None:
        """Log a message that is about to leave, and why it is a refusal. Errors: AuditError."""
        about = {"run": reply.run, "round": reply.round, "operation": reply.operation, "row": row}
        told = {"failed": reply.failed, "reason": reason, "report": reply.report, "scores": reply.scores}
        kept = {key: value for key, value in told.items() if value}
        self._append({"direction": OUT, **about, **kept, "record": described(reply.reply), **_whole(payload)})

    def _append(self, about: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                last, whole = _last_line(file)
                previous = FIRST if last is None else hashlib.sha256(last).hexdigest()
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                line = json.dumps({"time": now, **about, "previous": previous}, separators=(",", ":"))
                # A line that a full disk or a crash has torn stays, and is ended.
                file.write((b"" if whole else b"\n") + line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise AuditError(
                f"the audit log {self.path} cannot be written ({error.strerror}); nothing is answered until it can be"
            ) from error


def _last_line(file: Any) -> tuple[bytes | None, bool]:
    """The bytes of the last line without its end, None in an empty file; and whether it has an end."""
    place = end = file.seek(0, os.SEEK_END)
    if end == 0:
        return None, True
    parts, found = list[bytes](), False
    while place > 0 and not found:
        step = min(place, 1 << 16)
        place -= step
        file.seek(place)
        parts.insert(0, file.read(step))
        found = b"\n" in (parts[0][:-1] if len(parts) == 1 else parts[0])
    tail = b"".join(parts)
    whole = tail.endswith(b"\n")
    return (tail[:-1] if whole else tail).rpartition(b"\n")[2], whole


def _whole(payload: bytes) -> dict[str, Any]:
    return {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def described(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a method's packed record holds, by field: tensors, numbers and norm, or the value; {} for no record.

    Nothing of it is trusted: a record that cannot be read is told as such.
    """
    try:
        packed = tensor_as_bytes(message)
        return {} if packed is None else _fields(packed)
    except Exception:  # damaged bytes from elsewhere: libraries raise what they like
        return {"unreadable": True}


def _fields(packed: bytes) -> dict[str, Any]:
    size = int.from_bytes(packed[:8], "little")
    name, plain = json.loads(json.loads(packed[8 : 8 + size])["__metadata__"]["record"])
    squares: dict[str, float] = {}
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in load(packed).items():
        where = key.partition(":")[0]
        where = where if where in found or len(found) < MOST_FIELDS else OTHERS
        one = found.setdefault(where, {"tensors": 0, "numbers": 0})
        one["tensors"] += 1
        one["numbers"] += tensor.numel()
        squares[where] = squares.get(where, 0.0) + float(tensor.double().square().sum())
    for where, total in squares.items():
        norm = total**0.5
        found[where]["norm"] = norm if norm < float("inf") else "not finite"
    for where, value in list(plain.items())[:MOST_FIELDS]:
        text = _canonical(value)
        short = len(text) <= LONGEST
        found[where] = {"value": value} if short else {"value_sha256": hashlib.sha256(text).hexdigest()}
    return {"kind": name, "sha256": hashlib.sha256(packed).hexdigest(), "fields": found}


@dataclass(frozen=True)
class Sent:
    """What left for one run in one round."""

    run: str
    round: int
    answers: int = 0
    refused: int = 0
    bytes: int = 0
    numbers: int = 0
    """Numbers in the method's records."""
    scores: int = 0
    """Scores and losses."""


@dataclass(frozen=True)
class Summary:
    """An audit log, read and checked."""

    lines: int = 0
    came: int = 0
    """Messages that came in."""
    last: str = FIRST
    """SHA-256 of the newest line: whoever notes it down can tell later that nothing before it was changed."""
    faults: tuple[str, ...] = ()
    """Where the chain is broken or a line is damaged; none for a log that is whole."""
    sent: tuple[Sent, ...] = ()
    """What left, by run and round, in the order in which it began."""
    refusals: tuple[str, ...] = field(default=())
    """Reasons of refusals, each once."""


def read_audit(path: Path) -> Summary:
    """Read a log, check its chain and add up what left."""
    faults, sent, reasons = list[str](), dict[tuple[str, int], Sent](), dict[str, None]()
    came, number, previous = 0, 0, FIRST
    for number, raw in enumerate(_raw_lines(path), 1):
        line = _parsed(raw)
        if line is None:
            faults.append(f"line {number} is damaged, as a crash or a full disk leaves it")
        elif line.get("previous") != previous:
            faults.append(f"line {number} does not follow on the line before it: that was changed, or one is missing")
        previous = hashlib.sha256(raw).hexdigest()
        if line is None:
            continue
        if line.get("direction") != OUT:
            came += 1
            continue
        try:
            key = (str(line.get("run", "")), int(line.get("round", -1)))
            sent[key] = _added(sent.get(key, Sent(*key)), line)
        except (ValueError, TypeError, AttributeError, OverflowError):
            faults.append(f"line {number} is not in the form that this program writes")
            continue
        if line.get("reason"):
            reasons[str(line["reason"])] = None
    return Summary(number, came, previous, tuple(faults), tuple(sent.values()), tuple(reasons))


def _raw_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for raw in file:
            yield raw.removesuffix(b"\n")


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _added(before: Sent, line: Mapping[str, Any]) -> Sent:
    fields = line.get("record", {}).get("fields", {}).values()
    failed = bool(line.get("failed"))
    return Sent(
        before.run,
        before.round,
        before.answers + (not failed),
        before.refused + failed,
        before.bytes + int(line.get("bytes", 0)),
        before.numbers + sum(one.get("numbers", 0) for one in fields),
        before.scores + sum(len(one) for one in line.get("scores", {}).values()),
    )


def audit_files(place: Path) -> list[Path]:
    """The logs that a path means: a log itself, a client's home, or a folder of run folders with homes in it."""
    if place.is_file():
        return [place]
    found = sorted(place.glob(AUDIT)) or sorted(place.glob(f".client-*/{AUDIT}"))
    if not found:
        raise RunError(f"there is no audit log in {place}: name the --folder that `fedamole client` has, or the file")
    return found
