"""A client's place in one run: its settings, what it has on disk of the run, and what it puts there."""

import json
import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fedamole.config import Config
from fedamole.data.settings import SourceSettings
from fedamole.deployment.security.policy import PolicyError, PolicySettings
from fedamole.engine.messages import LONGEST_LABEL, MOST_LABELS, Reply, Request, unpacked
from fedamole.evaluation.personal import score_name
from fedamole.federation.record import PayloadError
from fedamole.federation.worker import ClientData, Scores, Worker
from fedamole.files import write_atomic
from fedamole.runs.checkpoint import state_path
from fedamole.runs.run_folder import METRICS, RunFolder

log = logging.getLogger(__name__)

REQUEST_COUNTS = "work.json"
"""In the client's folder: how often it has trained and been scored for this run, whatever counted."""


@dataclass(frozen=True)
class ClientSettings:
    """What an organisation decides for itself."""

    source: SourceSettings
    """Its data; the source's name is the client's, unless it is a part of a source alone."""
    folder: str = "runs"
    """Where its run folders are written."""
    base: str | None = None
    """Its own copy of the base model, a folder or hub id; unset: what the server names."""
    device: str = "auto"
    threads: int = 0
    name: str = ""
    """Name of a client that is a part of a source; then `manifest` says which."""
    manifest: str | None = None
    """A stored partition of the source: the file that names this client's rows."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    """What it consents to."""
    agree: str = ""
    """First characters of the hash of the only run's settings that it takes part in; empty: of any."""
    audit: str = ""
    """Its audit log; empty: none is written, for clients that are the coordinator's own."""


@dataclass(frozen=True)
class StoredReply:
    """An answer on disk, and the hash of what it answers: the message, and the round that counted before."""

    digest: str
    reply: Reply


@dataclass
class RunSession:
    """A client's place in one run."""

    config: Config
    worker: Worker
    data: ClientData
    labels: dict[str, int]
    lock: ExitStack = field(default_factory=ExitStack)
    """Holds the run folder for this process."""

    @property
    def folder(self) -> RunFolder:
        """The client's own run folder."""
        return self.worker.folder

    @property
    def name(self) -> str:
        """The client's name."""
        return self.data.info.name

    @property
    def test_reply_path(self) -> Path:
        """Where its answer to the test lies, once it has been given."""
        return self.folder.client(self.name) / "test.safetensors"

    def answer_path(self, round_: int) -> Path:
        """Where its answer of a round lies."""
        return self.folder.client(self.name) / "answers" / f"round-{round_:04d}.safetensors"

    def read_stored(self, path: Path) -> StoredReply | None:
        """The answer in a file, if there is one that can be read."""
        try:
            return unpacked(StoredReply, path.read_bytes()) if path.exists() else None
        except PayloadError as error:
            log.warning("%s is damaged (%s); that round is done again", path, error)
            return None

    def round_files(self) -> tuple[list[Path], list[Path]]:
        """Files of private states and of answers, each by round."""
        states, answers = state_path(self.folder, self.name, 0).parent, self.answer_path(0).parent
        return sorted(states.glob("round-*.safetensors")), sorted(answers.glob("round-*.safetensors"))

    def count_request(self, operation: str, most: int) -> None:
        """Count a piece of work before it is done; PolicyError where it is one more than `most`.

        A coordinator may ask for a round again, with another message, after a restart. Each answer tells something,
        so that all of them are counted, not rounds alone.
        """
        path = self.folder.client(self.name) / REQUEST_COUNTS
        work = self.folder.read_json(str(path.relative_to(self.folder.path))) if path.exists() else {}
        if work.get(operation, 0) >= most:
            raise PolicyError(
                f"the coordinator has asked for {most} times {operation} in this run, the most that the policy allows "
                "(max_rounds)"
            )
        write_atomic(path, json.dumps({**work, operation: work.get(operation, 0) + 1}))

    def discard_after(self, request: Request) -> None:
        """Forget what was done in rounds after the last one that counted."""
        for path in chain(*self.round_files()):
            if int(path.stem.removeprefix("round-")) > request.last:
                log.info("%s is undone: that round did not count", path.name)
                path.unlink()

        def counts(line: dict[str, Any]) -> bool:
            if line["split"] == "validation" and self.worker.rows.get(line["method"]) == "post_aggregation":
                return (line["round"], line["method"] == request.row) < (request.round, True)
            return bool(line["round"] <= request.last)

        self.folder.cut(METRICS, counts)

    def save_best_models(self, request: Request) -> None:
        """Save the present model of every row whose best round is a new one."""
        path = self.folder.client(self.name) / "best.json"
        kept = self.folder.read_json(str(path.relative_to(self.folder.path))) if path.exists() else {}
        for row, round_ in request.best.items():
            if row in self.worker.rows and kept.get(row) != round_:
                self.worker.save_best(self.data, row)
                kept[row] = round_
                write_atomic(path, json.dumps(kept))

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Add lines to the client's own metrics."""
        self.folder.append(METRICS, ({"round": line.pop("round"), "client": self.name, **line} for line in lines))

    def append_validation(self, round_: int, scores: dict[str, Scores]) -> None:
        """Add validation scores by row to the client's own metrics."""
        self.log([{"round": round_, "split": "validation", "method": row, **one} for row, one in scores.items()])


def count_labels(config: Config, data: ClientData) -> dict[str, int]:
    """How often each answer occurs among the training rows; empty where answers are texts of all kinds."""
    examples = data.train.examples
    if score_name(examples[0], config.evaluation) != "accuracy":
        return {}
    labels = Counter(example.answer for example in examples)
    if len(labels) > MOST_LABELS or max(map(len, labels)) > LONGEST_LABEL:
        log.warning("labels are not shared: there are more than %d, or some are very long", MOST_LABELS)
        return {}
    return dict(labels)
