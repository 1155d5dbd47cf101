"""The client's ledger of its releases, in its folder: `private/ledger.jsonl`, one line for each answer that left.

The answer is written first (`private/round-NNNN.safetensors`), then the line in the ledger, and only then the answer is
sent. So after a crash
    - without a line, nothing has left: the request is answered anew, with new noise, and nothing is charged twice;
    - with a line, the answer may have left: the same request gets the same bytes again, which costs nothing.
Any other request of the same round is a new release.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fedamole.errors import RunError
from fedamole.federation.privacy.accounting import NoisedSteps
from fedamole.federation.record import PayloadError, pack, unpack
from fedamole.files import naming, write_atomic
from fedamole.received.files import inside
from fedamole.received.forms import MOST_WHOLE, check_form, number, record, text, whole
from fedamole.runs.checkpoint import files_by_round
from fedamole.runs.run_files import MOST_ROUNDS
from fedamole.runs.run_folder import RunFolder

ANSWERS_ON_DISK = 2
"""Number of answers to keep for a repeated request; an older request that comes again is a new release."""

_entry_form = record(
    {
        "round": whole(0, MOST_ROUNDS),
        "exchange": whole(0, 100),
        "request": text(100),
        "answer": text(100),
        "sampling": number(0, 1),
        "noise": number(0),
        "steps": whole(0, MOST_WHOLE),
    }
)


@dataclass(frozen=True)
class Answer:
    """What a client answered to a request, and its private state after it; files as one tensor of bytes each."""

    request: str
    """SHA-256 of the request."""
    payload: Mapping[str, Tensor]
    """The packed reply; empty for a failure."""
    state: Mapping[str, Tensor]
    """The file of the private state; empty if the client kept the one it had."""
    report: str
    """The report of the update, JSON."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    round: int
    exchange: int
    request: str
    """SHA-256 of the request."""
    answer: str
    """SHA-256 of the file of the answer."""
    sampling: float
    noise: float
    steps: int

    @property
    def noised(self) -> NoisedSteps:
        """The steps that this line charges."""
        return NoisedSteps(self.sampling, self.noise, self.steps)


class Ledger:
    """The ledger of one client in a run folder; read and written by its process alone."""

    def __init__(self, folder: RunFolder, client: str) -> None:
        """Read the ledger; RunError if it is damaged."""
        self.folder = inside(folder.path, folder.client(client) / "private")
        self.path = inside(folder.path, self.folder / "ledger.jsonl")
        self.entries = [self._entry(line) for line in self._lines()]

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []

    def _entry(self, line: str) -> Entry:
        try:
            content = json.loads(line)
            check_form(content, _entry_form, self.path, RunError)
            return Entry(**content)
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{self.path} is damaged: restore it from a copy; without it nobody knows how much of the privacy "
                "budget is spent"
            ) from error

    def answer_to(self, round_: int, exchange: int, request: str) -> Answer | None:
        """Return what was answered to this request if its release is in the ledger and its file still exists."""
        path = self._answer_path(round_, exchange)
        hashes = {e.answer for e in self.entries if (e.round, e.exchange, e.request) == (round_, exchange, request)}
        if not hashes or not path.exists():
            return None
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() not in hashes:  # of a later request that never left
            return None
        try:
            return unpack(Answer, content)
        except PayloadError as error:
            raise RunError(f"{path} is damaged ({error}): remove it; its release stays in the ledger") from error

    def record(self, round_: int, exchange: int, answer: Answer, noised: NoisedSteps) -> None:
        """Write an answer, and then its line in the ledger; when this returns, the answer may be sent."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        content, path = pack(answer), self._answer_path(round_, exchange)
        _write(path, content)
        sha = hashlib.sha256(content).hexdigest()
        entry = Entry(round_, exchange, answer.request, sha, noised.sampling, noised.noise, noised.steps)
        entries = [*self.entries, entry]
        _write(self.path, "".join(json.dumps(asdict(line)) + "\n" for line in entries).encode())
        self.entries = entries
        for old in files_by_round(self.folder, "safetensors")[:-ANSWERS_ON_DISK]:
            if old != path:
                old.unlink()

    def _answer_path(self, round_: int, exchange: int) -> Path:
        name = f"round-{round_:04d}" + (f"-exchange-{exchange}" if exchange else "")
        return self.folder / f"{name}.safetensors"


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it survives a crash of the machine too: its content and its name."""
    write_atomic(path, content)
    with naming(path):
        path.chmod(0o600)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
