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
from fedamole.federation.client_data import ClientData
from fedamole.federation.evaluator import Scores
from fedamole.federation.record import PayloadError
from fedamole.federation.worker import Worker
from fedamole.files import write_atomic
from fedamole.runs.checkpoint import answer_path, files_by_round, round_and_exchange, state_path
from fedamole.runs.run_folder import METRICS, RunFolder

log = logging.getLogger(__name__)

WORK = "work.json"
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
class Stored:
    """An answer on disk, and the hash of what it answers: the message, and the round that counted before."""

    digest: str
    reply: Reply


@dataclass
class Seat:
    """A client's place in one run."""

    config: Config
    worker: Worker
    data: ClientData
    labels: dict[str, int]
    hold: ExitStack = field(default_factory=ExitStack)
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
    def tested(self) -> Path:
        """Where its answer to the test lies, once it has been given."""
        return self.folder.client(self.name) / "test.safetensors"

    def answer_path(self, round_: int, exchange: int = 0) -> Path:
        """File of its answer in an exchange of a round."""
        return answer_path(self.folder, self.name, round_, exchange)

    def stored(self, path: Path) -> Stored | None:
        """The answer in a file, if there is one that can be read."""
        try:
            return unpacked(Stored, path.read_bytes()) if path.exists() else None
        except PayloadError as error:
            log.warning("%s is damaged (%s); that round is done again", path, error)
            return None

    def done(self) -> tuple[list[Path], list[Path]]:
        """Files of private states and of answers, oldest first."""
        states, answers = state_path(self.folder, self.name, 0).parent, self.answer_path(0).parent
        return files_by_round(states, "safetensors"), files_by_round(answers, "safetensors")

    def prune(self, rounds: int) -> None:
        """Remove private states and answers of all but the last `rounds` rounds that have some."""
        for paths in self.done():
            kept = sorted({round_and_exchange(path)[0] for path in paths})[-rounds:]
            for path in paths:
                if round_and_exchange(path)[0] not in kept:
                    path.unlink()

    def count(self, operation: str, most: int) -> None:
        """Count a piece of work before it is done; PolicyError where it is one more than `most`.

        A coordinator may ask for a round again, with another message, after a restart. Each answer tells something,
        so that all of them are counted, not rounds alone.
        """
        path = self.folder.client(self.name) / WORK
        work = self.folder.read_json(str(path.relative_to(self.folder.path))) if path.exists() else {}
        if work.get(operation, 0) >= most:
            raise PolicyError(
                f"the coordinator has asked for {most} times {operation} in this run, the most that the policy allows "
                "(max_rounds)"
            )
        write_atomic(path, json.dumps({**work, operation: work.get(operation, 0) + 1}))

    def undo(self, request: Request) -> None:
        """Remove what was done after the client's last update that counted."""
        last = request.last, request.last_exchange
        for path in chain(*self.done()):
            if round_and_exchange(path) > last:
                log.info("%s is undone: that update did not count", path.name)
                path.unlink()

        def counts(line: dict[str, Any]) -> bool:
            if line["split"] == "validation" and self.worker.variants.get(line["method"]) == "post_aggregation":
                return (line["round"], line["method"] == request.variant) < (request.round, True)
            return (line["round"], line.get("exchange", 0)) <= last

        self.folder.cut(METRICS, counts)

    def keep(self, request: Request) -> None:
        """Save the present model of every row whose best round is a new one."""
        path = self.folder.client(self.name) / "best.json"
        kept = self.folder.read_json(str(path.relative_to(self.folder.path))) if path.exists() else {}
        for row, round_ in request.best.items():
            if row in self.worker.variants and kept.get(row) != round_:
                self.worker.evaluator.save_best(self.data, row)
                kept[row] = round_
                write_atomic(path, json.dumps(kept))

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Add lines to the client's own metrics."""
        self.folder.append(METRICS, ({"round": line.pop("round"), "client": self.name, **line} for line in lines))

    def log_validation(self, round_: int, scores: dict[str, Scores], exchange: int = 0) -> None:
        """Add validation scores by variant to the client's own metrics."""
        line = {"round": round_, "split": "validation", **({"exchange": exchange} if exchange else {})}
        self.log([{**line, "method": variant, **values} for variant, values in scores.items()])


def counted_labels(config: Config, data: ClientData) -> dict[str, int]:
    """How often each answer occurs among the training rows; empty where answers are texts of all kinds."""
    examples = data.train.examples
    if score_name(examples[0], config.evaluation) != "accuracy":
        return {}
    labels = Counter(example.answer for example in examples)
    if len(labels) > MOST_LABELS or max(map(len, labels)) > LONGEST_LABEL:
        log.warning("labels are not shared: there are more than %d, or some are very long", MOST_LABELS)
        return {}
    return dict(labels)
